"""Who owns which expert: a grid of row and column shards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class ExpertGroups:
    """The ranks that hold one copy of the tables between them, as a grid.

    Attributes:
        domain: all of them; rank ``r * columns + c`` has row shard ``r`` and column shard ``c``.
        rows: those with this rank's column shard, in order of row shards.
        columns: those with this rank's row shard, in order of column shards; None if rows are whole.

    Raises:
        ValueError: the groups are not such a grid.
    """

    domain: dist.ProcessGroup
    rows: dist.ProcessGroup
    columns: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        ranks, rows = (dist.get_process_group_ranks(group) for group in (self.domain, self.rows))
        columns = [dist.get_rank()] if self.columns is None else dist.get_process_group_ranks(self.columns)
        width, place = len(columns), ranks.index(dist.get_rank())
        if rows != ranks[place % width :: width] or columns != ranks[place // width * width :][:width]:
            raise ValueError(f"row shards {rows} and column shards {columns} are no grid of the ranks {ranks}")

    @classmethod
    def over(cls, group: dist.ProcessGroup, columns: int = 1) -> ExpertGroups:
        """A grid with ``columns`` column shards over the ranks of ``group``.

        With more than one, every rank of the world must call it, with its own group: it makes new ones.

        Raises:
            ValueError: the group's size is not a multiple of ``columns``.
        """
        ranks = dist.get_process_group_ranks(group)
        if columns < 1 or len(ranks) % columns:
            raise ValueError(f"{columns} column shards do not divide a group of {len(ranks)} ranks")
        if columns == 1:
            return cls(group, group)
        everyone: list[list[int]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, ranks)
        mine = dist.get_rank()
        new_groups = {}
        for members in sorted({tuple(domain) for domain in everyone}):
            for first in range(columns):
                new_groups["rows", members[first::columns]] = dist.new_group(list(members[first::columns]))
            for first in range(0, len(members), columns):
                row = members[first : first + columns]
                new_groups["columns", row] = dist.new_group(list(row))
        (rows,) = (group for (kind, members), group in new_groups.items() if kind == "rows" and mine in members)
        (column,) = (group for (kind, members), group in new_groups.items() if kind == "columns" and mine in members)
        return cls(group, rows, column)


_Number = TypeVar("_Number", int, Tensor)


def first_of(size: int, shard: _Number, shards: int) -> _Number:
    """The first row or column of shard number ``shard``, of ``size`` in all; ``size`` for the number ``shards``.

    The split is that of :func:`torch.chunk`, and so DTensor's: each has ``size / shards`` rounded up, and what is then
    missing is missing from the last ones, which may be empty.

    Args:
        shard: a number, or int64 numbers on any device, whose results stay there.
    """
    first = -(-size // shards) * shard
    return first.clamp(max=size) if isinstance(first, Tensor) else min(size, first)


@dataclass(frozen=True)
class GridLayout:
    """Contiguous row and column shards of ``[num_experts, dim]`` tables, split as :func:`first_of` says.

    Attributes:
        groups: the owners; None for one process.
    """

    num_experts: int
    dim: int
    groups: ExpertGroups | None = None

    @property
    def row_shards(self) -> int:
        """The number of row shards."""
        return 1 if self.groups is None else dist.get_world_size(self.groups.rows)

    @property
    def column_shards(self) -> int:
        """The number of column shards."""
        return 1 if self.groups is None or self.groups.columns is None else dist.get_world_size(self.groups.columns)

    @property
    def spread(self) -> bool:
        """Whether the tables have more than one shard, so that tokens travel."""
        return self.row_shards * self.column_shards > 1

    @property
    def row_shard(self) -> int:
        """The number of this rank's row shard."""
        return 0 if self.groups is None else dist.get_rank(self.groups.rows)

    @property
    def column_shard(self) -> int:
        """The number of this rank's column shard."""
        return 0 if self.groups is None or self.groups.columns is None else dist.get_rank(self.groups.columns)

    def first_row(self, shard: int) -> int:
        """The first global row of a row shard; ``num_experts`` for the number ``row_shards``."""
        return first_of(self.num_experts, shard, self.row_shards)

    def columns_of(self, shard: int) -> slice:
        """The columns of a column shard."""
        shards = self.column_shards
        return slice(first_of(self.dim, shard, shards), first_of(self.dim, shard + 1, shards))

    @property
    def rows(self) -> range:
        """This rank's global rows."""
        return range(self.first_row(self.row_shard), self.first_row(self.row_shard + 1))

    @property
    def columns(self) -> range:
        """This rank's columns."""
        part = self.columns_of(self.column_shard)
        return range(part.start, part.stop)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the whole tables."""
        return self.num_experts, self.dim

    @property
    def offset(self) -> tuple[int, int]:
        """Where in the whole tables this rank's shard begins."""
        return self.rows.start, self.columns.start

    @property
    def widths(self) -> list[int]:
        """The number of columns of every column shard."""
        return [part.stop - part.start for part in map(self.columns_of, range(self.column_shards))]

    def first_rows(self, device: torch.device) -> Tensor:
        """``[row_shards]`` int64: the first global row of every row shard."""
        return first_of(self.num_experts, torch.arange(self.row_shards, device=device), self.row_shards)
