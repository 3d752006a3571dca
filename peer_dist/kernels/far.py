"""Tables whose rows lie in other memory than where the kernels compute, and what all kernels ask of any table: its rows
near them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from peer_dist.kernels.eight_bit import is_eight_bit, scales_of
from peer_dist.kernels.picks import Picks


class Near(NamedTuple):
    """Tables that kernels can read, and which of their rows each token reads.

    Attributes:
        picks: of rows of these tables.
        tables: ``[rows, columns]`` each, on the picks' device; codes, where they have eight bits.
        scales: of each, ``[rows]``; None where it has none.
    """

    picks: Picks
    tables: list[Tensor]
    scales: list[Tensor | None]


@dataclass(frozen=True)
class Place:
    """Where the rows of tables lie, and where they are computed with.

    Attributes:
        memory: ``host`` or ``disk``.
        device: of the kernels.
        cache_bytes: of memory near the kernels in which rows are kept that are picked often, for the tables of one
            layer and the states of their optimizer.
        folder: of scratch files on a local disk; for ``disk``.
        resident_bytes: of these files that the process keeps in memory, beside the cache, at most.
    """

    memory: str
    device: torch.device
    cache_bytes: int
    folder: Path | None = None
    resident_bytes: int = 1 << 30

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of rows there, filled with zeros; of the CPU for torch."""
        return torch.zeros(*shape, dtype=dtype, device="cpu")


class FarRows:
    """What holds the rows of tables that the same picks read.

    Args:
        place: where they lie.
        tables: ``[rows, columns]`` each, made by ``place``, their scales too.
    """

    def __init__(self, place: Place, tables: Sequence[Tensor]) -> None:
        self.place = place
        for table in tables:
            table.far_rows = self  # type: ignore[attr-defined]

    def flush(self) -> None:
        """Let the tables' memory be what their rows are."""

    def near(self, picks: Picks, tables: Sequence[Tensor]) -> Near:
        """Some of its tables with the rows that these picks read."""
        touched, numbers = torch.unique(picks.expert, return_inverse=True)
        far = touched.to("cpu")

        def rows(tensor: Tensor) -> Tensor:
            return tensor.detach().index_select(0, far).to(picks.expert.device)

        scales = [scales_of(table) for table in tables]
        return Near(
            Picks(picks.offsets, numbers),
            [rows(table) for table in tables],
            [s if s is None else rows(s) for s in scales],
        )


def far_rows_of(table: Tensor) -> FarRows | None:
    """What holds the rows of a table that is not near; None of any other."""
    return getattr(table, "far_rows", None)


def is_held(table: Tensor) -> bool:
    """Whether a table is not simply a tensor of floating-point numbers where the kernels compute."""
    return is_eight_bit(table) or far_rows_of(table) is not None


def near(picks: Picks, *tables: Tensor) -> Near:
    """The tables as kernels can read them.

    Args:
        picks: of rows of these tables.
        tables: those of one layer, held alike.
    """
    rows = far_rows_of(tables[0])
    if rows is not None:
        return rows.near(picks, tables)
    return Near(picks, list(tables), [scales_of(table) for table in tables])
