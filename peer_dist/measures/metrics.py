"""Rank 0 writes a run's numbers to metrics.jsonl and TensorBoard, and its events to events.jsonl."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

METRICS, EVENTS, IMAGES = "metrics.jsonl", "events.jsonl", "images"
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


class Metrics:
    """Writes scalars named ``group/name``, events, histograms and images; a resumed run continues at its checkpoint.

    Args:
        folder: the folder of ``metrics.jsonl``, ``events.jsonl``, ``images`` and TensorBoard's event files; it is
            created if need be.
        resumed_at: the step of the checkpoint that the run goes on from; scalars of later steps are removed. None for a
            new run: files of another run in the folder are renamed.
    """

    def __init__(self, folder: Path, resumed_at: int | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._path, self._last_image = folder, folder / METRICS, -1
        if resumed_at is None:
            for path in (self._path, folder / EVENTS, folder / IMAGES):
                _set_aside(path)
        elif self._path.exists():
            self._rewind(resumed_at)
        self._file, self._events = ((folder / name).open("a", encoding="utf-8") for name in (METRICS, EVENTS))
        purge = 0 if resumed_at is None else resumed_at + 1
        self._board = SummaryWriter(str(folder), purge_step=purge, flush_secs=10)
        if resumed_at is None:
            tabs = {
                tab: {name: ["Multiline", [f"{tag}$" for tag in tags]] for name, tags in charts.items()}
                for tab, charts in _LAYOUT.items()
            }
            self._board.add_custom_scalars(tabs)

    def _rewind(self, step: int) -> None:
        """Remove the lines of steps after ``step`` from metrics.jsonl."""
        lines = [line for line in read_metrics(self._path) if line["step"] <= step]
        partial = self._path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        os.replace(partial, self._path)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write one line, and one point per scalar, for the state after ``step`` steps; null if it is not finite."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def histogram(self, name: str, step: int, counts: list[float], limits: list[float]) -> None:
        """Write a histogram to TensorBoard alone: the buckets' ``counts`` and as many upper ``limits``."""
        middles = [(low + high) / 2 for low, high in zip([2 * limits[0] - limits[1], *limits], limits)]
        total, square = (sum(n * x**power for n, x in zip(counts, middles)) for power in (1, 2))
        self._board.add_histogram_raw(
            name, middles[0], middles[-1], sum(counts), total, square, limits, counts, global_step=step
        )

    def image(self, name: str, step: int, pixels: np.ndarray) -> None:
        """Replace ``images/NAME.png`` by ``pixels``, uint8 ``[height, width, 3]``; TensorBoard gets fewer and fewer."""
        path = self._folder / IMAGES / f"{name.replace('/', '_')}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path, optimize=True)
        if step == self._last_image or step >= _SPARSE * self._last_image:
            self._board.add_image(name, pixels, step, dataformats="HWC")
            self._last_image = step

    def config(self, config: dict[str, Any]) -> None:
        """Write a run's config, by section, to TensorBoard: as text, and as hyperparameters beside the last losses."""
        self._board.add_text("config", f"```yaml\n{yaml.safe_dump(config, sort_keys=False)}```", 0)
        flat = {
            f"{section}.{key}": value if isinstance(value, bool | int | float | str) else str(value)
            for section, keys in config.items()
            if section not in ("checkpoint", "logging")
            for key, value in keys.items()
        }
        # not by add_hparams, which would write them as another run in a folder of its own
        for part in hparams(flat, {"train/loss": 0.0, "val/loss": 0.0}):
            self._board._get_file_writer().add_summary(part)

    def event(self, kind: str, step: int, **details: Any) -> None:
        """Write what happened to the run after ``step`` steps as a line of ``events.jsonl``, which is never removed."""
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "step": step, "event": kind, **details}
        self._events.write(json.dumps(line) + "\n")
        self._events.flush()

    def close(self) -> None:
        """Close all files."""
        self._file.close()
        self._events.close()
        self._board.close()


def metrics_file(folder: Path) -> Path | None:
    """The metrics.jsonl of a run, in its folder or in the folder ``logs`` inside; None if it has none."""
    return next((file for file in (folder / METRICS, folder / "logs" / METRICS) if file.is_file()), None)


def _set_aside(path: Path) -> None:
    """Rename a file or folder, if it is there, to the first free of NAME-1, NAME-2, ..."""
    number = 1
    while (free := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
        number += 1
    if path.exists():
        path.rename(free)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl or events.jsonl, up to one that a killed run has cut off."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines
