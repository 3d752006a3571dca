"""Who owns which expert: a grid of row and column shards."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from peer_dist.sharding.transport import ALL_TO_ALL, ALONE, Transport
from peer_dist.sharding.wire import AS_IT_IS, Wire

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class ExpertGroups:
    """The ranks that hold one copy of the tables between them, as a grid.

    A copy of it (``deepcopy``) is itself: process groups are shared.

    Attributes:
        domain: all of them; rank ``r * columns + c`` has row shard ``r`` and column shard ``c``.
        rows: those with this rank's column shard, in order of row shards.
        columns: those with this rank's row shard, in order of column shards; None if rows are whole.
        wire: in what form rows travel between them.
        transport: by what they travel.

    Raises:
        ValueError: the groups are not such a grid.
    """

    domain: dist.ProcessGroup
    rows: dist.ProcessGroup
    columns: dist.ProcessGroup | None = None
    wire: Wire = AS_IT_IS
    transport: Transport = ALL_TO_ALL
    _meshes: dict[str, DeviceMesh] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        ranks, rows = (dist.get_process_group_ranks(group) for group in (self.domain, self.rows))
        columns = [dist.get_rank()] if self.columns is None else dist.get_process_group_ranks(self.columns)
        width, place = len(columns), ranks.index(dist.get_rank())
        if rows != ranks[place % width :: width] or columns != ranks[place // width * width :][:width]:
            raise ValueError(f"row shards {rows} and column shards {columns} are no grid of the ranks {ranks}")

    @classmethod
    def over(cls, group: dist.ProcessGroup, columns: int = 1, wire: Wire = AS_IT_IS) -> ExpertGroups:
        """A grid with ``columns`` column shards over the ranks of ``group``, and rows on the way in the form ``wire``.

        With more than one, every rank of the world must call it, with its own group: it makes new ones.

        Raises:
            ValueError: the group's size is not a multiple of ``columns``.
        """
        ranks = dist.get_process_group_ranks(group)
        if columns < 1 or len(ranks) % columns:
            raise ValueError(f"{columns} column shards do not divide a group of {len(ranks)} ranks")
        if columns == 1:
            return cls(group, group, wire=wire)
        place = ranks.index(dist.get_rank())
        first = place // columns * columns
        rows, row = _new_groups([ranks[place % columns :: columns], ranks[first : first + columns]])
        return cls(group, rows, row, wire)

    @classmethod
    def of(cls, group: dist.ProcessGroup | DeviceMesh | ExpertGroups) -> ExpertGroups:
        """The grid that a layer's ``group`` means.

        Args:
            group: whose ranks have row shards; or a mesh, whose first dimension has row shards and whose second, if
                there is one, has column shards. With two, every rank of the world must call this together, with its
                own mesh, unless the mesh has all ranks: it makes a group, once for a mesh.

        Raises:
            ValueError: a mesh of more dimensions, in another order than that of its ranks, or without this rank.
            TypeError: something else, such as a group that this rank is not in.
        """
        if isinstance(group, cls):
            return group
        if isinstance(group, dist.ProcessGroup):
            return cls.over(group)
        if not isinstance(group, dist.DeviceMesh):
            raise TypeError(
                "group must be a process group with this rank in it, a DeviceMesh or ExpertGroups, "
                f"not {type(group).__name__} {group!r}"
            )
        known = _of_meshes.get(group)
        if known is None or known.rows is not group.get_group(0):  # of an equal mesh in an earlier world
            known = _of_meshes[group] = cls._of_mesh(group)
        return known

    @classmethod
    def _of_mesh(cls, mesh: DeviceMesh) -> ExpertGroups:
        ranks = mesh.mesh.flatten().tolist()
        if mesh.ndim > 2:
            raise ValueError(
                f"group must be a mesh of one dimension (row shards) or two (rows and columns), not {mesh.ndim}: "
                "take the dimensions of the tables out of it by their names, as mesh['rows', 'columns']"
            )
        if dist.get_rank() not in ranks:
            raise ValueError(f"group must be a mesh with this rank, {dist.get_rank()}, in it: it has {ranks}")
        if ranks != sorted(ranks):
            raise ValueError(f"group must be a mesh whose ranks ascend, row by row: it has {mesh.mesh.tolist()}")
        rows = mesh.get_group(0)
        if mesh.ndim == 1:
            groups = cls(rows, rows)
        else:
            columns = mesh.get_group(1)
            # every rank finds a group of all these ranks, or none does
            fits = [group for group in (rows, columns) if dist.get_process_group_ranks(group) == ranks]
            if ranks == list(range(dist.get_world_size())):
                fits.append(dist.distributed_c10d._get_default_group())
            groups = cls(fits[0] if fits else _new_groups([ranks])[0], rows, columns)
        groups._meshes[mesh.device_type] = mesh
        return groups

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertGroups:
        return self

    def mesh(self, device_type: str) -> DeviceMesh:
        """The grid as a mesh of devices of this type: row shards, then column shards if there are such groups."""
        if device_type not in self._meshes:
            if self.columns is None:
                mesh = dist.DeviceMesh.from_group(self.rows, device_type)
            else:
                ranks = torch.tensor(dist.get_process_group_ranks(self.domain), dtype=torch.int64, device="cpu")
                mesh = dist.DeviceMesh.from_group(
                    [self.rows, self.columns],
                    device_type,
                    mesh=ranks.view(-1, dist.get_world_size(self.columns)),
                    mesh_dim_names=("rows", "columns"),
                )
            self._meshes[device_type] = mesh
        return self._meshes[device_type]


_of_meshes: weakref.WeakKeyDictionary[DeviceMesh, ExpertGroups] = weakref.WeakKeyDictionary()


def _new_groups(mine: list[list[int]]) -> list[dist.ProcessGroup]:
    """New groups of these ranks; every rank of the world must call it, with as many lists of its own."""
    everyone: list[list[list[int]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine)
    made = {ranks: dist.new_group(list(ranks)) for ranks in sorted({tuple(each) for of in everyone for each in of})}
    return [made[tuple(ranks)] for ranks in mine]


def agreed_seed(seed: int | None, drawn: int, groups: list[dist.ProcessGroup]) -> int:
    """The seed of all ranks over which a layer is spread. Collective over the groups, one after the other.

    Args:
        seed: which this rank was given; None if it was given none.
        drawn: which the first rank has if none was given to any.
        groups: a mesh's, by dimension, or a single one; of a layer that is not spread none.

    Raises:
        ValueError: on every rank of a group, if its ranks were given different ones.
    """
    for group in groups:
        everyone: list[tuple[int | None, int]] = [(None, 0)] * dist.get_world_size(group)
        dist.all_gather_object(everyone, (seed, drawn), group=group)
        given = {rank: each for rank, (each, _) in zip(dist.get_process_group_ranks(group), everyone)}
        if len(set(given.values())) > 1:
            raise ValueError(
                "seed must be the same on all ranks, or None on all: "
                + ", ".join(f"{each} on rank {rank}" for rank, each in given.items())
            )
        drawn = everyone[0][1]
    return drawn if seed is None else seed


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

    def __deepcopy__(self, memo: dict[int, Any]) -> GridLayout:
        return self

    @property
    def domain_group(self) -> dist.ProcessGroup | None:
        """All owners; None for one process."""
        return None if self.groups is None else self.groups.domain

    @property
    def row_group(self) -> dist.ProcessGroup | None:
        """The owners with this rank's column shard; None for one process."""
        return None if self.groups is None else self.groups.rows

    @property
    def column_group(self) -> dist.ProcessGroup | None:
        """The owners with this rank's row shard; None if rows are whole."""
        return None if self.groups is None else self.groups.columns

    @property
    def wire(self) -> Wire:
        """In what form rows travel."""
        return AS_IT_IS if self.groups is None else self.groups.wire

    @property
    def transport(self) -> Transport:
        """By what they travel."""
        return ALONE if self.groups is None else self.groups.transport

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
        shards = torch.arange(self.row_shards, dtype=torch.int64, device=device)
        return first_of(self.num_experts, shards, self.row_shards)
