"""Rank 0 writes a run's numbers to metrics.jsonl and TensorBoard, and its events to events.jsonl.

A disk that is full, or a folder that is gone, never ends the run: it goes on without what cannot be written, says so,
and tries again. What cannot be read in these files stays as it is, and readers leave it out.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from torch.utils.tensorboard import summary

from peer_dist.config import ConfigError
from peer_dist.measures.board import Board
from peer_dist.mistake import Mistake, in_words, printable
from peer_dist.output import messages
from peer_dist.reading import json_lines, opened, reading

METRICS, EVENTS, IMAGES = "metrics.jsonl", "events.jsonl", "images"
_WAITING = 1000  # events
_MOST = 2**53  # of a step or a count: as far as float64 counts
_MOST_VALUE = 1e100  # of a number that can be drawn and added up
_DEEPEST = 10  # of a config
_SPARSE = 1.25  # TensorBoard gets an image when the run is this many times as long as at the last one
_LAYOUT: dict[str, dict[str, tuple[str, ...]]] = {  # of TensorBoard's custom scalars: tab, chart, the scalars in it
    "learning": {
        "loss (nats per token)": ("train/loss", "val/loss"),
        "perplexity": ("train/perplexity", "val/perplexity"),
        "learning rate": ("optimizer/lr", "optimizer/table_lr"),
        "gradient norm": ("optimizer/grad_norm",),
    },
    "experts": {
        "experts used (%)": (r"experts/layer\d+_usage_percent",),
        "experts that were some head's best (%)": (r"experts/layer\d+_top1_usage_percent",),
        "unevenness (nats)": (r"experts/layer\d+_unevenness",),
        "picks of the busiest shard over the mean": (r"experts/layer\d+_picks_per_shard_max_over_mean",),
    },
    "speed": {
        "tokens per second": ("speed/tokens_per_second",),
        "where a step's seconds go": (r"time/\w+",),
        "bytes exchanged per token": ("exchange/bytes_per_token",),
        "slowest rank over the median": ("speed/slowest_rank_ratio",),
        "peak memory (GiB)": ("memory/peak_gib",),
    },
}
_FAR_LAYOUT: dict[str, dict[str, tuple[str, ...]]] = {
    "far tables": {
        "rows found near the kernels (of 1)": ("tables/cache_hit_rate",),
        "bytes of far rows per token": (r"tables/far_\w+_bytes_per_token",),
    },
}


class Metrics:
    """Writes scalars named ``group/name``, events, histograms and images; a resumed run continues at its checkpoint.

    Args:
        folder: the folder of ``metrics.jsonl``, ``events.jsonl``, ``images`` and TensorBoard's event files; it is
            created if need be.
        resumed_at: the step of the checkpoint that the run goes on from; scalars of later steps are removed. None for a
            new run: files of another run in the folder are renamed.
        tell: prints a sentence about what cannot be written or read.
        far: whether the run has far tables, so that there is a tab for them.
    """

    def __init__(
        self, folder: Path, resumed_at: int | None, tell: Callable[[str], None] | None = None, far: bool = False
    ) -> None:
        self._folder, self._tell, self._last_image = folder, tell or messages().print, -1
        self._lost: dict[str, str] = {}  # what is not written at present, and why
        self._untold: list[dict[str, Any]] = []  # events that wait until events can be written again
        self._metrics = _LineFile(folder / METRICS, _set_aside if resumed_at is None else self._rewound(resumed_at))
        self._events = _LineFile(folder / EVENTS, _set_aside if resumed_at is None else self._checked)
        with self._outlasting("events", self._events.path, resumed_at or 0):
            self._events.open()
        with self._outlasting("metrics", self._metrics.path, resumed_at or 0):
            self._metrics.open()
        self._board = Board(folder, 0 if resumed_at is None else resumed_at + 1)
        if resumed_at is None:
            with self._outlasting("pictures", folder / IMAGES):
                _set_aside(folder / IMAGES)
            layout = _LAYOUT | _FAR_LAYOUT if far else _LAYOUT
            tabs = {
                tab: {name: ["Multiline", [f"{tag}$" for tag in tags]] for name, tags in charts.items()}
                for tab, charts in layout.items()
            }
            self._add(summary.custom_scalars(tabs), step=0)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write one line, and one point per scalar, for the state after ``step`` steps; null if it is not finite."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with self._outlasting("metrics", self._metrics.path, step):
            self._metrics.write({"step": step, **finite})
        self._add(*(summary.scalar(name, value) for name, value in values.items()), step=step)

    def histogram(self, name: str, step: int, counts: list[float], limits: list[float]) -> None:
        """Write a histogram to TensorBoard alone: the buckets' ``counts`` and as many upper ``limits``."""
        middles = [(low + high) / 2 for low, high in zip([2 * limits[0] - limits[1], *limits], limits)]
        total, square = (sum(n * x**power for n, x in zip(counts, middles)) for power in (1, 2))
        ends = (middles[0], middles[-1])
        self._add(summary.histogram_raw(name, *ends, sum(counts), total, square, limits, counts), step=step)

    def image(self, name: str, step: int, pixels: np.ndarray) -> None:
        """Replace ``images/NAME.png`` by ``pixels``, uint8 ``[height, width, 3]``; TensorBoard gets fewer and fewer."""
        path = self._folder / IMAGES / f"{name.replace('/', '_')}.png"
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "png", optimize=True)
        with self._outlasting("pictures", path.parent, step):
            path.parent.mkdir(parents=True, exist_ok=True)
            _replace(path, [file.getvalue()], sync=False)
        if step == self._last_image or step >= _SPARSE * self._last_image:
            self._add(summary.image(name, pixels, dataformats="HWC"), step=step)
            self._last_image = step

    def config(self, config: dict[str, Any]) -> None:
        """Write a run's config, by section, to TensorBoard: as text, and as hyperparameters beside the last losses."""
        text = yaml.safe_dump(config, sort_keys=False)
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))  # longer than what is inside
        self._add(summary.text("config", f"{fence}yaml\n{text}{fence}"), step=0)
        flat = {
            f"{section}.{key}": value if isinstance(value, bool | int | float) else printable(str(value))
            for section, keys in config.items()
            if section not in ("checkpoint", "logging")
            for key, value in keys.items()
        }
        # not as SummaryWriter.add_hparams, which would write them as another run in a folder of its own
        for part in summary.hparams(flat, {"train/loss": 0.0, "val/loss": 0.0}):
            self._add(part, step=0)

    def event(self, kind: str, step: int, **details: Any) -> None:
        """Write what happened to the run after ``step`` steps as a line of ``events.jsonl``, which is never removed.

        Events that cannot be written wait, the newest of them, until they can be.
        """
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "step": step, "event": kind, **details}
        self._untold = [*self._untold, line][-_WAITING:]
        with self._outlasting("events", self._events.path, step):
            while self._untold:
                self._events.write(self._untold[0])
                del self._untold[0]

    def close(self) -> None:
        """Write what waits, and close all files."""
        with self._outlasting("TensorBoard's files", self._folder):
            self._board.flush()
        self._metrics.close()
        self._events.close()

    def _add(self, *summaries: Any, step: int) -> None:
        self._board.add(*summaries, step=step)
        if self._board.due:
            with self._outlasting("TensorBoard's files", self._folder, step):
                self._board.flush()

    @contextlib.contextmanager
    def _outlasting(self, what: str, where: Path, step: int = 0) -> Iterator[None]:
        """A context in which an error of the file system does not end the run; the first one is told, and the end.

        Args:
            what: what is written, as the beginning of a sentence.
            where: the file or folder.
            step: at which an event is written of it.
        """
        try:
            yield
        except (OSError, Mistake) as error:
            if what not in self._lost:
                why = (isinstance(error, OSError) and error.strerror) or in_words(error)
                self._lost[what] = why.removeprefix(f"{where}: ")
                told = f"{what} are no longer written to {where}: {self._lost[what]}"
                self._tell(f"{told}; training goes on, and tries again")
                self.event("logs lost", step, told=told)
        else:
            if self._lost.pop(what, None):
                self._tell(f"{what} are written to {where} again")
                self.event("logs written again", step, told=f"{what}, to {where}")

    def _rewound(self, step: int) -> Callable[[Path], None]:
        """Prepares metrics.jsonl: removes the lines of steps after ``step``, and keeps what cannot be read."""

        def rewind(path: Path) -> None:
            if not path.exists():
                return
            later = {number for number, line in self._readable(path, _is_numbers) if line["step"] > step}
            if later:
                with reading(path, ConfigError), opened(path) as file:
                    lines = (line.removesuffix(b"\n") + b"\n" for n, line in enumerate(file) if n not in later)
                    _replace(path, lines)

        return rewind

    def _checked(self, path: Path) -> None:
        """Prepares events.jsonl, which keeps all its lines."""
        if path.exists():
            for _ in self._readable(path, _is_event):
                pass

    def _readable(self, path: Path, right: Callable[[dict[str, Any]], bool]) -> Iterator[tuple[int, dict[str, Any]]]:
        """The lines that are ``right``, each behind its number from 0, one at a time; at the end, others are told."""
        first: list[str] = []
        unread = 0
        for number, (text, line) in enumerate(json_lines(path, ConfigError)):
            if line is not None and right(line):
                yield number, line
            elif text.strip():
                unread += 1
                first = [*first, str(number + 1)][:5]
        if unread:
            more = f" and {unread - 5} more" if unread > 5 else ""
            which = f"line {first[0]}" if unread == 1 else f"{unread} lines ({', '.join(first)}{more})"
            self._tell(f"{path}: {which} cannot be read; what is there stays, and is left out of reports and plots")


class _LineFile:
    """A file to which JSON lines are appended. After an error the next line is tried again, in a line of its own.

    Args:
        path: of the file; its folder is created if need be.
        prepare: called with the path before the file is first opened, until that succeeds.
    """

    def __init__(self, path: Path, prepare: Callable[[Path], None]) -> None:
        self.path, self._prepare = path, prepare
        self._prepared, self._file, self._whole = False, -1, True

    def open(self) -> None:
        """Open the file.

        Raises:
            OSError, Mistake: it cannot be.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self._prepared:
            self._prepare(self.path)
            self._prepared = True
        self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        size = os.fstat(self._file).st_size
        self._whole = size == 0 or os.pread(self._file, 1, size - 1) == b"\n"  # else a killed run left half a line

    def write(self, line: dict[str, Any]) -> None:
        """Append a line.

        Raises:
            OSError, Mistake: it cannot be written.
        """
        data = json.dumps(line).encode() + b"\n"
        try:
            if self._file >= 0 and os.fstat(self._file).st_nlink == 0:  # somebody has removed the file
                self.close()
            if self._file < 0:
                self.open()
            data = data if self._whole else b"\n" + data
            while data:
                data = data[os.write(self._file, data) :]
                self._whole = not data
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        if self._file >= 0:
            with contextlib.suppress(OSError):
                os.close(self._file)
            self._file = -1


def metrics_file(folder: Path) -> Path | None:
    """The metrics.jsonl of a run, in its folder or in the folder ``logs`` inside; None if it has none."""
    return next((file for file in (folder / METRICS, folder / "logs" / METRICS) if os.path.isfile(file)), None)


def _set_aside(path: Path) -> None:
    """Rename a file or folder, if it is there, to the first free of NAME-1, NAME-2, ..."""
    number = 1
    while (free := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
        number += 1
    if path.exists():
        path.rename(free)


def _replace(path: Path, parts: Iterable[bytes], sync: bool = True) -> None:
    """Replace a file by one that holds ``parts``, completely or not at all; with ``sync``, come what may."""
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as file:
            file.writelines(parts)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, in the order of their steps, or the events of an events.jsonl; no others.

    A line of metrics.jsonl has a ``step``, a whole number, and besides numbers, or None for one that is not finite. Of
    lines of one step the last counts. An event has a ``step``, a ``time`` (see :func:`time_of`) and an ``event``.

    Raises:
        ConfigError: the file cannot be read.
    """
    if path.name.startswith(Path(EVENTS).stem):
        return [line for _, line in json_lines(path, ConfigError) if line is not None and _is_event(line)]
    by_step = {line["step"]: {name: _finite(value) for name, value in line.items()} for line in _numbers(path)}
    return [by_step[step] for step in sorted(by_step)]


def along(path: Path, name: str) -> dict[int, float]:
    """One number of a metrics.jsonl by its step, where it is known; the file is not held in memory.

    Raises:
        ConfigError: the file cannot be read.
    """
    known = {line["step"]: _finite(line[name]) for line in _numbers(path) if name in line}
    return {step: value for step, value in sorted(known.items()) if value is not None}


def _numbers(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics.jsonl that can be read, one at a time."""
    return (line for _, line in json_lines(path, ConfigError) if line is not None and _is_numbers(line))


def time_of(event: dict[str, Any]) -> datetime:
    """When an event happened."""
    return datetime.strptime(event["time"], "%Y-%m-%dT%H:%M:%S%z")


def _is_numbers(line: dict[str, Any]) -> bool:
    return _is_step(line.get("step")) and {float, int, type(None)}.issuperset(map(type, line.values()))


def _is_event(line: dict[str, Any]) -> bool:
    """Whether a line is an event; a start has a config and an environment too, whose parts are by name."""
    if not (_is_step(line.get("step")) and isinstance(line.get("event"), str) and isinstance(line.get("time"), str)):
        return False
    if not isinstance(line.get("told", ""), str):
        return False
    try:
        time_of(line)
    except ValueError:
        return False
    if line["event"] != "start":
        return True
    config, environment = line.get("config"), line.get("environment")
    return (
        isinstance(config, dict)
        and isinstance(environment, dict)
        and all(isinstance(keys, dict) for keys in config.values())
        and all(isinstance(environment.get(part), dict) for part in ("hosts", "layout", "versions"))
        and all(_is_step(line.get(name)) for name in ("parameters", "expert_parameters"))
        and _depth(config) <= _DEEPEST
    )


def _is_step(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST


def _finite(value: float | None) -> float | None:
    return value if value is not None and abs(value) < _MOST_VALUE else None


def _depth(tree: object) -> int:
    """How deeply lists and mappings are nested."""
    level, depth = [tree], 0
    while level:
        level = [inner for part in level for inner in _inside(part)]
        depth += 1
    return depth


def _inside(part: object) -> list[object]:
    return list(part.values()) if isinstance(part, dict) else part if isinstance(part, list) else []
