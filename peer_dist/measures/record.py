"""What a run has left behind: its numbers, events, pictures, checkpoints and the plan that was made of it."""

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
    """A number along the run, where it is known and finite: int64 and float64 ``[points]``."""

    step: np.ndarray
    value: np.ndarray

    def __bool__(self) -> bool:
        return len(self.step) > 0

    @property
    def last(self) -> float:
        return float(self.value[-1])


@dataclass(frozen=True)
class RunRecord:
    """A run as its folder tells of it; read it with :func:`read_run`.

    Attributes:
        lines: of metrics.jsonl.
        events: of events.jsonl; empty for a run of an older version.
        maps: how a layer uses its experts, as PNG, by the layer's name.
        checkpoints: step and bytes of those that are there.
        plan: what ``peer-dist plan`` foretold, plan.json; empty without.
    """

    name: str
    lines: list[dict[str, Any]]
    events: list[dict[str, Any]]
    maps: dict[str, bytes]
    checkpoints: dict[int, int]
    plan: dict[str, Any]

    def series(self, name: str) -> Series:
        together = self.together([name])
        return Series(together.step, together.value[:, 0])

    def together(self, names: Sequence[str]) -> Series:
        """Several numbers, where all of them are known: values ``[points, names]``."""
        lines = [line for line in self.lines if all(line.get(name) is not None for name in names)]
        value = np.array([[line[name] for name in names] for line in lines], np.float64)
        return Series(np.array([line["step"] for line in lines], np.int64), value.reshape(-1, len(names)))

    def names(self, start: str) -> list[str]:
        """Names of the series that begin with ``start``, in the order of their first appearance."""
        return list(dict.fromkeys(name for line in self.lines for name in line if name.startswith(start)))

    @cached_property
    def layers(self) -> list[int]:
        """Numbers of the layers with experts."""
        ends = "_usage_percent"
        names = [name.removeprefix("experts/layer").removesuffix(ends) for name in self.names("experts/layer")]
        return sorted(int(name) for name in names if name.isdecimal())

    @cached_property
    def starts(self) -> list[dict[str, Any]]:
        """The events with which the run began and went on, each with config and environment."""
        return [event for event in self.events if event["event"] == "start"]

    @property
    def config(self) -> dict[str, Any]:
        """As the run last went on with; empty if that is not known."""
        return self.starts[-1]["config"] if self.starts else {}

    @property
    def planned_speed(self) -> float | None:
        """Tokens per second that the plan foretold."""
        return self.plan.get("tokens_per_second")


def read_run(folder: Path) -> RunRecord:
    """The record of the run in a folder, or in its logs' folder.

    Raises:
        ConfigError: there is no run, or nothing in its metrics.
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
    return path.stem.removeprefix("experts_layer").removesuffix("_map")


def _checkpoints(folders: list[Path]) -> dict[int, int]:
    """Checkpoints of the first folder that is there, read without the libraries that would load one."""
    folder = next((folder for folder in folders if folder.is_dir()), None)
    manifests = sorted(folder.glob("step-*/manifest.json")) if folder is not None else []
    told = [json.loads(path.read_text(encoding="utf-8")) for path in manifests]
    return {each["step"]: sum(size for size, _ in each["files"].values()) for each in told}
