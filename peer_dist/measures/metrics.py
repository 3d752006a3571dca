"""metrics.jsonl and TensorBoard: the same numbers, written by rank 0; and events.jsonl, what befell the run."""

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
_SPARSE = 1.25  # an image is for TensorBoard when the run is this much longer than at its last one
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
    """Writes scalars named ``group/name``; a resumed run continues where its checkpoint stands.

    Args:
        folder: of ``metrics.jsonl``, ``events.jsonl``, ``images`` and TensorBoard's event files.
        resumed_at: the checkpoint's step: scalars of later ones are taken back. None for a new run: another run's
            files are kept under another name.
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
        kept = [line for line in read_metrics(self._path) if line["step"] <= step]
        partial = self._path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(partial, self._path)

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line, and one point per scalar, for the state after ``step`` steps; null where not finite."""
        known = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **known}, allow_nan=False) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def histogram(self, name: str, step: int, counts: list[float], limits: list[float]) -> None:
        """Write a histogram to TensorBoard alone: ``len(counts)`` buckets with the upper ``limits``."""
        middles = [(low + high) / 2 for low, high in zip([2 * limits[0] - limits[1], *limits], limits)]
        total, square = (sum(n * x**power for n, x in zip(counts, middles)) for power in (1, 2))
        self._board.add_histogram_raw(
            name, middles[0], middles[-1], sum(counts), total, square, limits, counts, global_step=step
        )

    def image(self, name: str, step: int, pixels: np.ndarray) -> None:
        """Replace ``images/NAME.png`` by uint8 ``[height, width, 3]``; TensorBoard gets ever sparser ones."""
        path = self._folder / IMAGES / f"{name.replace('/', '_')}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path, optimize=True)
        if step == self._last_image or step >= _SPARSE * self._last_image:
            self._board.add_image(name, pixels, step, dataformats="HWC")
            self._last_image = step

    def config(self, config: dict[str, Any]) -> None:
        """A run's config, by section: a text for TensorBoard, and hyperparameters beside the last losses."""
        self._board.add_text("config", f"```yaml\n{yaml.safe_dump(config, sort_keys=False)}```", 0)
        flat = {
            f"{section}.{key}": value if isinstance(value, bool | int | float | str) else str(value)
            for section, keys in config.items()
            if section not in ("checkpoint", "logging")
            for key, value in keys.items()
        }
        # add_hparams would write them as another run, in a folder of its own
        for part in hparams(flat, {"train/loss": 0.0, "val/loss": 0.0}):
            self._board._get_file_writer().add_summary(part)

    def event(self, kind: str, step: int, **told: Any) -> None:
        """What befell the run after ``step`` steps: a line of ``events.jsonl``, never taken back."""
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "step": step, "event": kind, **told}
        self._events.write(json.dumps(line) + "\n")
        self._events.flush()

    def close(self) -> None:
        self._file.close()
        self._events.close()
        self._board.close()


def metrics_file(folder: Path) -> Path | None:
    """The metrics of a run, in its folder or its logs' folder; None if it has none."""
    return next((file for file in (folder / METRICS, folder / "logs" / METRICS) if file.is_file()), None)


def _set_aside(path: Path) -> None:
    number = 1
    while (kept := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
        number += 1
    if path.exists():
        path.rename(kept)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl or events.jsonl; a last line cut off by a killed run is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines
