"""A rank's block of a tensor as a DTensor, and back."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

from peer_dist.sharding.grid import GridLayout

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(value: Any) -> TypeGuard[DTensor]:
    """Whether it is one; there is none where nobody has imported the class, which takes a while."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def as_dtensor(block: Tensor, layout: GridLayout, name: str) -> DTensor:
    """The whole of which ``block`` is this rank's, in the same memory.

    Args:
        block: ``[rows, columns]``; or ``[rows]`` or ``[rows, 1]``, if there is one column shard.
        layout: spread.
        name: of the tensor, for the error.

    Raises:
        ValueError: it is of another shape, such as one number a column.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    assert layout.groups is not None
    rows, columns = len(layout.rows), len(layout.columns)
    one_column = layout.column_shards == 1
    is_block = tuple(block.shape) == (rows, columns)
    if not is_block and not (one_column and _has_rows(block.shape, rows)):
        raise ValueError(
            f"{name} has the shape {list(block.shape)} on this rank, whose block of the table is [{rows}, {columns}]: "
            "only states of that shape" + (", or with a number a row," if one_column else "") + " can be put together "
            "from the ranks; use an optimizer that has no others (such as AdamW, SGD, Adagrad)"
        )
    shape = torch.Size(layout.shape if is_block else (layout.num_experts, *block.shape[1:]))
    strides = torch.empty(shape, dtype=block.dtype, device="meta").stride()
    mesh = layout.groups.mesh("cpu" if block.is_meta else block.device.type)
    placements = [Shard(0), Replicate() if one_column else Shard(1)][: mesh.ndim]
    return DTensor.from_local(block, mesh, placements, run_check=False, shape=shape, stride=strides)


def block_of(value: Tensor, layout: GridLayout, name: str) -> Tensor:
    """This rank's block of ``value``, as a plain tensor; collective where a DTensor is split in another way.

    Args:
        value: a DTensor or a plain whole, of the table's shape or with one number a row; or a block already.
        layout: spread.
        name: of the tensor, for the error.

    Raises:
        ValueError: it is none of these.
    """
    rows, columns = layout.rows, layout.columns
    block, shape = (len(rows), len(columns)), tuple(value.shape)
    is_whole = shape == layout.shape or _has_rows(shape, layout.num_experts)
    if is_dtensor(value) and is_whole:
        if _is_split_as(value, layout, name):
            return value.to_local()
        value = value.full_tensor()
    elif not is_dtensor(value) and (shape == block or _has_rows(shape, len(rows))):
        return value
    if not is_whole:
        raise ValueError(
            f"{name} has the shape {list(shape)}: it must be of a table {list(layout.shape)}, as a DTensor or whole, "
            f"or this rank's block {list(block)} of it"
        )
    value = value[rows.start : rows.stop]
    if shape == layout.shape:
        value = value[:, columns.start : columns.stop]
    return value.clone(memory_format=torch.contiguous_format)  # it may become the parameter; the whole goes


def _has_rows(shape: Sequence[int], rows: int) -> bool:
    """Whether it is the shape of one number a row."""
    return tuple(shape) in ((rows,), (rows, 1))


def _is_split_as(value: DTensor, layout: GridLayout, name: str) -> bool:
    """Whether ``value``'s part on this rank is that of ``layout``."""
    from torch.distributed.tensor import Shard

    assert layout.groups is not None
    mesh, places = value.device_mesh, value.placements
    here = mesh.get_coordinate()
    if here is None or int(mesh.mesh[tuple(here)]) != dist.get_rank():
        raise ValueError(
            f"{name} has another rank's block alone, by which it was saved: save on all ranks, with "
            "torch.distributed.checkpoint"
        )
    if any(type(place) is not Shard and not place.is_replicate() for place in places):
        return False
    split = [(place.dim, mesh.size(i)) for i, place in enumerate(places) if isinstance(place, Shard)]
    wanted = [(dim, shards) for dim, shards in enumerate((layout.row_shards, layout.column_shards)) if shards > 1]
    ranks = dist.get_process_group_ranks(layout.groups.domain)
    return mesh.mesh.flatten().tolist() == ranks and [part for part in split if part[1] > 1] == wanted
