"""Reads what a run has left behind: its numbers, events, pictures, checkpoints and the plan made for it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from peer_dist.config import ConfigError
from peer_dist.measures.metrics import EVENTS, IMAGES, metrics_file, read_metrics


@dataclass(frozen=True)
class Series:
    """A number along the run, at the steps where it is known and finite. A series without points is false.

    Attributes:
        step: int64 ``[points]``.
        value: float64 ``[points]``, or ``[points, names]`` for several numbers.
    """

    step: np.ndarray
    value: np.ndarray

    def __bool__(self) -> bool:
        return len(self.step) > 0

    @property
    def last(self) -> float:
        """The last value of a series of one number."""
        return float(self.value[-1])


@dataclass(frozen=True)
class RunRecord:
    """What a run's folder says of it; :func:`read_run` makes it.

    Attributes:
        name: the name of the run's folder.
        lines: the lines of metrics.jsonl.
        events: the lines of events.jsonl; empty for a run of an older version.
        maps: pictures of how layers use their experts, as PNG files' contents, by the layer's name.
        checkpoints: the bytes of each checkpoint that is still there, by its step.
        plan: what ``peer-dist plan`` predicted, from plan.json; empty if there is no such file.
    """

    name: str
    lines: list[dict[str, Any]]
    events: list[dict[str, Any]]
    maps: dict[str, bytes]
    checkpoints: dict[int, int]
    plan: dict[str, Any]

    def series(self, name: str) -> Series:
        """One number along the run, by its name in metrics.jsonl."""
        together = self.together([name])
        return Series(together.step, together.value[:, 0])

    def together(self, names: Sequence[str]) -> Series:
        """Several numbers along the run, at the steps where all of them are known: values ``[points, names]``."""
        lines = [line for line in self.lines if all(line.get(name) is not None for name in names)]
        value = np.array([[line[name] for name in names] for line in lines], np.float64)
        return Series(np.array([line["step"] for line in lines], np.int64), value.reshape(-1, len(names)))

    def names(self, start: str) -> list[str]:
        """Names of the numbers that begin with ``start``, in the order of their first appearance."""
        return list(dict.fromkeys(name for line in self.lines for name in line if name.startswith(start)))

    @cached_property
    def layers(self) -> list[int]:
        """Numbers of the layers with experts, counted from 1, in order."""
        ends = "_usage_percent"
        names = [name.removeprefix("experts/layer").removesuffix(ends) for name in self.names("experts/layer")]
        return sorted(int(name) for name in names if name.isdecimal())

    @cached_property
    def starts(self) -> list[dict[str, Any]]:
        """The events of the run's start and of each resumption, which hold config and environment."""
        return [event for event in self.events if event["event"] == "start"]

    @property
    def config(self) -> dict[str, Any]:
        """The config with which the run last started or went on; empty if it is not known."""
        return self.starts[-1]["config"] if self.starts else {}

    @property
    def planned_speed(self) -> float | None:
        """Tokens per second that the plan predicted; None without a plan."""
        return self.plan.get("tokens_per_second")


def read_run(folder: Path) -> RunRecord:
    """Read the record of a run.

    Args:
        folder: the run's folder, or that of its logs.

    Raises:
        ConfigError: there is no run in the folder, or its metrics hold no step yet.
    """
    metrics = metrics_file(folder)
    if metrics is None:
        raise ConfigError(f"{folder}: has no metrics.jsonl, nor has its folder logs; name the folder of a run")
    lines = read_metrics(metrics)
    if not any("train/loss" in line for line in lines):
        raise ConfigError(f"{metrics}: holds no step yet; wait for the run's first")
    logs = metrics.parent
    run = logs.parent if logs.name == "logs" else logs
    events = read_metrics(logs / EVENTS) if (logs / EVENTS).is_file() else []
    pictures = sorted((logs / IMAGES).glob("experts_layer*_map.png"), key=lambda path: int(_layer(path)))
    stores = [Path(event["config"]["checkpoint"]["dir"]) for event in events if event["event"] == "start"]
    plans = [path for path in (run / "plan.json", logs / "plan.json") if path.is_file()]
    return RunRecord(
        name=run.absolute().name,
        lines=lines,
        events=events,
        maps={f"layer {_layer(path)}": path.read_bytes() for path in pictures},
        checkpoints=_checkpoints([*stores[-1:], run / "checkpoints"]),
        plan=json.loads(plans[0].read_text(encoding="utf-8")) if plans else {},
    )


def _layer(path: Path) -> str:
    """The number of the layer that a picture shows."""
    return path.stem.removeprefix("experts_layer").removesuffix("_map")


def _checkpoints(folders: list[Path]) -> dict[int, int]:
    """Bytes by step of the checkpoints in the first folder that exists, read without the libraries that load one."""
    folder = next((folder for folder in folders if folder.is_dir()), None)
    manifests = sorted(folder.glob("step-*/manifest.json")) if folder is not None else []
    contents = [json.loads(path.read_text(encoding="utf-8")) for path in manifests]
    return {manifest["step"]: sum(size for size, _ in manifest["files"].values()) for manifest in contents}
