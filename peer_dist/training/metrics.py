"""metrics.jsonl and TensorBoard: the same numbers, written by rank 0."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter


class Metrics:
    """Writes scalars named ``group/name``; a resumed run continues where its checkpoint stands.

    Args:
        folder: of ``metrics.jsonl`` and TensorBoard's event files.
        resumed_at: the checkpoint's step: what was written about later ones is taken back. None for a new run:
            another run's ``metrics.jsonl`` is kept under another name.
    """

    def __init__(self, folder: Path, resumed_at: int | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "metrics.jsonl"
        if self._path.exists():
            if resumed_at is None:
                self._set_aside()
            else:
                self._rewind(resumed_at)
        self._file = self._path.open("a", encoding="utf-8")
        purge = 0 if resumed_at is None else resumed_at + 1
        self._board = SummaryWriter(str(folder), purge_step=purge, flush_secs=10)

    def _set_aside(self) -> None:
        number = 1
        while (kept := self._path.with_name(f"metrics-{number}.jsonl")).exists():
            number += 1
        self._path.rename(kept)

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
        """Of values in ``len(counts)`` buckets with the upper ``limits``, for TensorBoard alone."""
        middles = [(low + high) / 2 for low, high in zip([2 * limits[0] - limits[1], *limits], limits)]
        total, square = (sum(n * x**power for n, x in zip(counts, middles)) for power in (1, 2))
        self._board.add_histogram_raw(
            name, middles[0], middles[-1], sum(counts), total, square, limits, counts, global_step=step
        )

    def text(self, name: str, markdown: str) -> None:
        self._board.add_text(name, markdown, 0)

    def close(self) -> None:
        self._file.close()
        self._board.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl; a last line cut off by a killed run is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines
