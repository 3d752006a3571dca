"""Reads what a run has left behind: its numbers, events, pictures, checkpoints and the plan made for it."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from peer_dist.config import ConfigError
from peer_dist.measures.metrics import EVENTS, IMAGES, metrics_file, read_metrics
from peer_dist.mistake import Mistake, printable
from peer_dist.reading import check_regular, opened, read_object

_MOST_PICTURE = 1 << 26  # bytes


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
        return sorted(int(name) for name in names if name.isascii() and name.isdecimal() and len(name) < 6)

    @cached_property
    def starts(self) -> list[dict[str, Any]]:
        """The events of the run's start and of each resumption, which hold config and environment."""
        return [event for event in self.events if event["event"] == "start"]

    @property
    def config(self) -> dict[str, Any]:
        """The config with which the run last started or went on; empty if it is not known."""
        return self.starts[-1]["config"] if self.starts else {}

    @property
    def planned_steps(self) -> int:
        """The steps that the config asks for; 0 if that is not known."""
        steps = self.config.get("train", {}).get("steps")
        return steps if type(steps) is int else 0

    @property
    def planned_speed(self) -> float | None:
        """Tokens per second that the plan predicted; None without a plan."""
        return self.plan.get("tokens_per_second")


def read_run(folder: Path) -> RunRecord:
    """Read the record of a run. What is damaged in it is left out, unless nothing is left.

    Args:
        folder: the run's folder, or that of its logs.

    Raises:
        ConfigError: there is no run in the folder, its metrics hold no step yet, or its plan.json is no plan.
    """
    metrics = metrics_file(folder)
    if metrics is None:
        raise ConfigError(f"{folder}: has no metrics.jsonl, nor has its folder logs; name the folder of a run")
    lines = read_metrics(metrics)
    if not any("train/loss" in line for line in lines):
        raise ConfigError(f"{metrics}: holds no step yet; wait for the run's first")
    logs = metrics.parent
    run = logs.parent if logs.name == "logs" else logs
    events = read_metrics(logs / EVENTS) if os.path.isfile(logs / EVENTS) else []
    stores = [event["config"].get("checkpoint", {}).get("dir") for event in events if event["event"] == "start"]
    return RunRecord(
        name=printable(run.absolute().name),
        lines=lines,
        events=events,
        maps=_maps(logs / IMAGES),
        checkpoints=_checkpoints([*(Path(name) for name in stores[-1:] if _is_path(name)), run / "checkpoints"]),
        plan=_plan([run / "plan.json", logs / "plan.json"]),
    )


def _maps(folder: Path) -> dict[str, bytes]:
    """The pictures that can be read, in the order of their layers."""
    maps: dict[int, bytes] = {}
    with contextlib.suppress(OSError):
        for path in folder.glob("experts_layer*_map.png"):
            layer = path.stem.removeprefix("experts_layer").removesuffix("_map")
            if not (layer.isascii() and layer.isdecimal() and len(layer) < 6):
                continue
            with contextlib.suppress(OSError):
                check_regular(path)
                with opened(path) as file:
                    picture = file.read(_MOST_PICTURE)
                if picture.startswith(b"\x89PNG\r\n\x1a\n"):
                    maps[int(layer)] = picture
    return {f"layer {layer}": maps[layer] for layer in sorted(maps)}


def _plan(files: list[Path]) -> dict[str, Any]:
    """The first of the files that is there; empty if none is.

    Raises:
        ConfigError: it is no plan.
    """
    path = next((path for path in files if os.path.isfile(path)), None)
    if path is None:
        return {}
    advice = "write it again by peer-dist plan --json, or remove it"
    plan = read_object(path, ConfigError, advice)
    speed = plan.get("tokens_per_second")
    if speed is not None and not (_is_number(speed) and 0 < speed < math.inf):
        raise ConfigError(f"{path}: tokens_per_second must be a number above 0; {advice}")
    return plan


def _checkpoints(folders: list[Path]) -> dict[int, int]:
    """Bytes by step of the checkpoints in the first folder that exists, read without the libraries that load one.

    Those whose manifest is damaged, or of another step than its folder, are left out.
    """
    folder = next((folder for folder in folders if os.path.isdir(folder)), None)
    sizes: dict[int, int] = {}
    for path in sorted(folder.glob("step-*/manifest.json")) if folder is not None else []:
        with contextlib.suppress(Mistake):
            manifest = read_object(path, ConfigError)
            step, files = manifest.get("step"), manifest.get("files")
            if type(step) is not int or path.parent.name != f"step-{step:08d}" or not isinstance(files, dict):
                continue
            if all(_is_sized(entry) for entry in files.values()):
                sizes[step] = sum(entry[0] for entry in files.values())
    return sizes


def _is_sized(entry: object) -> bool:
    """Whether a manifest's entry of a file is ``[size, checksum]``."""
    return isinstance(entry, list) and len(entry) == 2 and type(entry[0]) is int and entry[0] >= 0


def _is_path(name: object) -> bool:
    return isinstance(name, str) and name != "" and "\0" not in name


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
