"""Gradients of the rows that were touched: sparse COO tensors with one sparse dimension, the rows."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from peer_dist.kernels import row_gradient
from peer_dist.sharding.grid import first_of


def merge(grad: Tensor) -> Tensor:
    """The gradient with every touched row once, in ascending order; one that is so already is not copied."""
    rows = grad._indices()[0]
    if grad.is_coalesced() or bool((rows[1:] > rows[:-1]).all()):  # accumulation forgets that it is
        return grad._coalesced_(True)
    return grad.coalesce()


def sum_over_copies(grad: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of the ranks' gradients, of which each touches rows of its own; the same bits on every rank.

    Each rank adds up an equal share of the rows, for all, in the order of the ranks and in float32, and sends the
    sums to all: a row travels as often as in a dense all-reduce, whatever the number of ranks.

    Args:
        grad: ``[rows, columns]``, merged (:func:`merge`); it may touch no row.
        group: the ranks that hold copies of the table.

    Returns:
        ``[rows, columns]`` in ``grad``'s dtype, sparse and merged.
    """
    ranks, size = dist.get_world_size(group), grad.shape[0]
    rows, values = grad.indices()[0], grad.values()
    edges = first_of(size, torch.arange(ranks + 1, dtype=torch.int64, device=rows.device), ranks)
    send, receive = _counts(torch.searchsorted(rows, edges).diff(), group)
    rows, values = (_exchange(tensor, send, receive, group) for tensor in (rows, values))
    touched, place = torch.unique(rows, return_inverse=True)
    total = torch.zeros(len(touched), values.shape[1], dtype=torch.float32, device=values.device)
    for to, part in zip(place.split(receive), values.split(receive)):
        total.index_add_(0, to, part.float())  # distinct rows: no order is left to the device
    send, receive = _counts(torch.full((ranks,), len(touched), dtype=torch.int64, device=rows.device), group)
    sums = total.to(values.dtype)
    rows, values = (
        _exchange(tensor.repeat(ranks, *[1] * (tensor.dim() - 1)), send, receive, group) for tensor in (touched, sums)
    )
    return row_gradient(rows, values, size)


def _counts(send: Tensor, group: dist.ProcessGroup) -> tuple[list[int], list[int]]:
    """What every rank gets from this one, ``[ranks]``, and in turn what this one gets from every rank."""
    receive = torch.empty_like(send)
    dist.all_to_all_single(receive, send, group=group)
    sent, received = torch.stack([send, receive]).tolist()
    return sent, received


def _exchange(x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    """Rows of ``x`` grouped by destination -> rows grouped by source."""
    out = x.new_empty(sum(receive), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), receive, send, group=group)
    return out
