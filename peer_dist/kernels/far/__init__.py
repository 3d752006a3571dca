"""Tables whose rows lie in other memory than where the kernels compute, and what all kernels ask of any table: its rows
near them.
"""

from __future__ import annotations

from torch import Tensor

from peer_dist.kernels.eight_bit import is_eight_bit, scales_of
from peer_dist.kernels.far.hot import Hot
from peer_dist.kernels.far.place import Place
from peer_dist.kernels.far.rows import FarRows, FarTraffic, Near, RowStep
from peer_dist.kernels.picks import Picks

__all__ = ["FarRows", "FarTraffic", "Hot", "Near", "Place", "RowStep", "far_rows_of", "is_held", "near"]


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

    Raises:
        RuntimeError: somebody wrote to far tables whose newer rows were near.
        BaseException: what the last step of far rows failed with.
    """
    rows = far_rows_of(tables[0])
    if rows is not None:
        return rows.near(picks, tables)
    return Near(picks, list(tables), [scales_of(table) for table in tables])
