"""Which rows of a table are worth a place near the kernels: those that steps touched most often of late."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

HALF_LIFE = 1000
"""Steps after which a touch counts half."""
MARGIN = 1.25
"""How much more often a row must be touched than the one whose place it takes: what is exchanged costs two journeys."""
SHARE = 8
"""A part of the places in this many may change hands in one step."""
_LARGEST = 2.0**40  # of what a touch adds: float32 counts it exactly enough beside the sum of all earlier ones


class Exchange(NamedTuple):
    """Rows that get a place, and those that leave it.

    Attributes:
        coming: ``[n]`` int64, rows.
        slots: ``[n]`` int64, their places.
        going: ``[n]`` int64, the rows that had these places; -1 where nobody did.
    """

    coming: Tensor
    slots: Tensor
    going: Tensor


class Hot:
    """The places and who has them. It moves no rows, so that a benchmark may replay any routing through it.

    The counts decay: instead of all of them shrinking in each step, what a touch adds grows.

    Args:
        rows: of the table.
        capacity: number of places; no more are used than there are rows.
        device: of its tensors: ``8`` bytes a row of the table and as many a place, nothing without places.

    Attributes:
        rows: ``[capacity]`` int64, who has each place; -1 where nobody does.
        used: the number of places that somebody has, which are the first.
    """

    def __init__(self, rows: int, capacity: int, device: torch.device) -> None:
        self.capacity = capacity = min(rows, max(capacity, 0))
        self.used = 0
        known = rows if capacity else 0
        self.rows = torch.full((capacity,), -1, dtype=torch.int64, device=device)
        self._slots = torch.full((known,), -1, dtype=torch.int32, device=device)
        self._counts = torch.zeros(known, dtype=torch.float32, device=device)
        self._touch = 1.0

    def slots(self, rows: Tensor) -> Tensor:
        """The places of rows, ``[n] -> [n]`` int64; -1 of those without."""
        if not self.capacity:
            return torch.full_like(rows, -1)
        return self._slots.index_select(0, rows).long()

    def step(self, touched: Tensor) -> Exchange:
        """Count the rows that a step touched, ``[n]`` int64, each once, and give places to those that deserve one.

        Free places go to whoever was touched, the more often first.
        """
        none = touched[:0]
        if not self.capacity or not len(touched):
            return Exchange(none, none, none)
        self._count(touched)
        outside = touched[self._slots.index_select(0, touched) < 0]
        free = self.capacity - self.used
        most = free + min(self.used, max(1, self.capacity // SHARE))
        best = self._counts.index_select(0, outside).topk(min(len(outside), most))
        into_free = min(len(outside), free)
        rivals = best.values[into_free:]
        held = self._counts.index_select(0, self.rows[: self.used])
        coldest = held.topk(len(rivals), largest=False)  # ascending, where the rivals descend
        better = int((rivals > MARGIN * coldest.values).sum()) if len(rivals) else 0
        coming = outside[best.indices[: into_free + better]]
        new = torch.arange(self.used, self.used + into_free, dtype=torch.int64, device=touched.device)
        slots = torch.cat([new, coldest.indices[:better]])
        going = self.rows[slots]
        self._slots[going[into_free:]] = -1
        self._slots[coming] = slots.to(torch.int32)
        self.rows[slots] = coming
        self.used += into_free
        return Exchange(coming, slots, going)

    def _count(self, touched: Tensor) -> None:
        self._counts[touched] += self._touch
        self._touch *= 2.0 ** (1 / HALF_LIFE)
        if self._touch > _LARGEST:
            self._counts *= 1 / self._touch
            self._touch = 1.0

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """All that it keeps."""
        return self.rows, self._slots, self._counts
