"""Tokens travel to the owners of the experts that they picked, and results travel back.

A token goes to each shard that it hits once, however many of its experts live there, as one row of ``x``;
with it go the local row number and the gate of each pick. The plan is made once per forward pass and serves
the backward pass too, which is its mirror image: ``to_owners`` and ``to_homes`` are each other's transpose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from peer_dist.kernels import Picks
from peer_dist.sharding.layout import RowLayout
from peer_dist.tracing import span


@dataclass
class Traffic:
    """Bytes that this rank sent to other ranks, and what it received, since :meth:`reset`."""

    bytes_sent: int = 0
    picks_received: int = 0  # after merging, its own included

    def reset(self) -> None:
        self.bytes_sent = self.picks_received = 0


def _all_to_all(
    x: Tensor, send: Sequence[int], receive: Sequence[int], group: dist.ProcessGroup, traffic: Traffic
) -> Tensor:
    """Rows of ``x`` grouped by destination -> rows grouped by source."""
    x = x.contiguous()
    out = x.new_empty(sum(receive), *x.shape[1:])
    dist.all_to_all_single(out, x, list(receive), list(send), group=group)
    row_bytes = x.element_size() * x.shape[1:].numel()
    traffic.bytes_sent += (sum(send) - send[dist.get_rank(group)]) * row_bytes
    return out


@dataclass(frozen=True)
class ExchangePlan:
    """What this rank sends to and receives from each shard's owner, for one batch of tokens.

    Attributes:
        send_tokens, receive_tokens: rows per shard, ``shards`` long.
        send_picks, receive_picks: merged picks per shard.
        token: ``[sum(send_tokens)]`` int64, the home row of each sent token; ascending within a shard.
        tokens: rows at home.
        picks: the received picks, in local row numbers.
    """

    group: dist.ProcessGroup
    traffic: Traffic
    send_tokens: list[int]
    receive_tokens: list[int]
    send_picks: list[int]
    receive_picks: list[int]
    token: Tensor
    tokens: int
    picks: Picks

    def rows_to_owners(self, x: Tensor) -> Tensor:
        """``[tokens, dim]`` at home -> ``[received tokens, dim]`` at the owners."""
        return _all_to_all(x[self.token], self.send_tokens, self.receive_tokens, self.group, self.traffic)

    def rows_to_homes(self, y: Tensor) -> Tensor:
        """``[received tokens, dim]`` at the owners -> their sum over shards, ``[tokens, dim]``, at home."""
        back = _all_to_all(y, self.receive_tokens, self.send_tokens, self.group, self.traffic)
        out = y.new_zeros(self.tokens, y.shape[1], dtype=torch.promote_types(y.dtype, torch.float32))
        # Shard by shard: rows are distinct within one, so the order of the sum is fixed on every device.
        for rows, part in zip(self.token.split(self.send_tokens), back.split(self.send_tokens)):
            out.index_add_(0, rows, part.to(out.dtype))
        return out.to(y.dtype)

    def picks_to_owners(self, value: Tensor) -> Tensor:
        """``[sent picks] -> [received picks]``."""
        return _all_to_all(value, self.send_picks, self.receive_picks, self.group, self.traffic)

    def picks_to_homes(self, value: Tensor) -> Tensor:
        """``[received picks] -> [sent picks]``."""
        return _all_to_all(value, self.receive_picks, self.send_picks, self.group, self.traffic)


def merge_picks(indices: Tensor, gates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Join the picks of one expert by several heads of a token: their gates add.

    Args:
        indices: ``[tokens, picks]`` int64 expert numbers.
        gates: ``[tokens, picks]``.

    Returns:
        ``token``, ``expert`` and ``gate`` of the distinct picks, each ``[distinct]``, in order of token and
        then expert. ``gate`` is differentiable in ``gates``.
    """
    expert, order = indices.sort(dim=1)
    first = torch.ones_like(expert, dtype=torch.bool)
    first[:, 1:] = expert[:, 1:] != expert[:, :-1]
    token, column = first.nonzero(as_tuple=True)
    slot = first.reshape(-1).cumsum(0) - 1
    merged = gates.new_zeros(token.numel()).index_add(0, slot, gates.gather(1, order).reshape(-1))
    return token, expert[token, column], merged


def plan_exchange(
    token: Tensor, expert: Tensor, tokens: int, layout: RowLayout, traffic: Traffic
) -> tuple[ExchangePlan, Tensor]:
    """Work out, with every other owner, who sends what to whom.

    Args:
        token, expert: ``[distinct]`` int64, from :func:`merge_picks`.
        tokens: rows at home.

    Returns:
        The plan, and ``order: [distinct]`` int64, which puts distinct picks into sending order.
    """
    assert layout.group is not None
    starts = layout.first_rows(expert.device)
    owner = torch.bucketize(expert, starts, right=True) - 1
    order = torch.argsort(owner, stable=True)
    owner, token, local = owner[order], token[order], (expert - starts[owner])[order]

    fresh = torch.ones_like(token, dtype=torch.bool)  # the first pick of a (shard, token) pair
    fresh[1:] = (owner[1:] != owner[:-1]) | (token[1:] != token[:-1])
    begin = fresh.nonzero().squeeze(1)
    picks_each = torch.diff(begin, append=begin.new_tensor([token.numel()])).to(torch.int32)

    counts = torch.stack(
        [
            torch.bincount(owner[begin], minlength=layout.shards),
            torch.bincount(owner, minlength=layout.shards),
        ],
        dim=1,
    )
    theirs = torch.empty_like(counts)
    dist.all_to_all_single(theirs, counts, group=layout.group)
    traffic.bytes_sent += (layout.shards - 1) * 2 * counts.element_size()
    sent, received = torch.stack(
        [counts, theirs]
    ).tolist()  # waits for the device: all_to_all wants its sizes on the host
    send_tokens, send_picks = (list(column) for column in zip(*sent))
    receive_tokens, receive_picks = (list(column) for column in zip(*received))

    group = layout.group
    each = _all_to_all(picks_each, send_tokens, receive_tokens, group, traffic)
    rows = _all_to_all(local.to(torch.int32), send_picks, receive_picks, group, traffic)
    offsets = torch.zeros(each.numel() + 1, dtype=torch.int64, device=each.device)
    torch.cumsum(each, 0, out=offsets[1:])
    traffic.picks_received += rows.numel()
    plan = ExchangePlan(
        group=group,
        traffic=traffic,
        send_tokens=send_tokens,
        receive_tokens=receive_tokens,
        send_picks=send_picks,
        receive_picks=receive_picks,
        token=token[begin],
        tokens=tokens,
        picks=Picks(offsets, rows.long()),
    )
    return plan, order


def dispatch(x: Tensor, gate: Tensor, plan: ExchangePlan) -> tuple[Tensor, Tensor]:
    """Send tokens and gates to the owners.

    Args:
        x: ``[tokens, dim]`` at home.
        gate: ``[sent picks]`` in sending order.

    Returns:
        ``[received tokens, dim]`` and ``[received picks]``; gradients come home by the same plan.
    """
    return _Dispatch.apply(x, gate, plan)


def combine(y: Tensor, plan: ExchangePlan) -> Tensor:
    """Send the owners' results ``[received tokens, dim]`` home and add them: ``[tokens, dim]``."""
    return _Combine.apply(y, plan)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, plan: ExchangePlan) -> tuple[Tensor, Tensor]:
        ctx.plan = plan
        with span("dispatch"):
            return plan.rows_to_owners(x), plan.picks_to_owners(gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor, dgate: Tensor) -> tuple[Tensor, Tensor, None]:
        with span("combine"):
            return ctx.plan.rows_to_homes(dx), ctx.plan.picks_to_homes(dgate), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, plan: ExchangePlan) -> Tensor:
        ctx.plan = plan
        with span("combine"):
            return plan.rows_to_homes(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        with span("dispatch"):
            return ctx.plan.rows_to_owners(dy), None
