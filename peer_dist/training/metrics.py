"""metrics.jsonl and TensorBoard: the same numbers, written by rank 0."""

from __future__ import annotations

import json
import os
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter


class Metrics:
    """Writes scalars named ``group/name``; a resumed run continues where its checkpoint stands.

    Args:
        folder: of ``metrics.jsonl`` and TensorBoard's event files.
        step: the checkpoint's step: what was written about later ones is taken back.
    """

    def __init__(self, folder: Path, step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "metrics.jsonl"
        self._rewind(step)
        self._file = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder), purge_step=step + 1, flush_secs=10)

    def _rewind(self, step: int) -> None:
        if self._path.exists():
            kept = [line for line in read_metrics(self._path) if line["step"] <= step]
            partial = self._path.with_suffix(".partial")
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
            os.replace(partial, self._path)

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line, and one point per scalar, for the state after ``step`` steps."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

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
