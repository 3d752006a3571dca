"""Tokens travel to the owners of the experts that they picked, and results travel back.

A token goes to each row shard that it hits once, however many of its experts live there: a slice of its ``x`` to the
owner of each column shard. The local row number and the gate of each pick go once, to the owner in the sender's own
column, and from there to the other columns. The plan is made once per forward pass and serves the backward pass too,
which is its mirror image: ``rows_to_owners`` and ``rows_to_homes`` are each other's transpose.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from peer_dist.kernels import Picks
from peer_dist.sharding.layout import ExpertGroups, GridLayout
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
    """What this rank sends to and receives from whom, for one batch of tokens.

    Attributes:
        send_tokens, send_picks: tokens and merged picks per row shard.
        receive_tokens, receive_picks: per home in the domain, ``[row shards][column shards]`` long.
        token: ``[sum(send_tokens)]`` int64, the home row of each sent token; ascending within a row shard.
        tokens: rows at home.
        picks: the received picks, in local row numbers, homes in the domain's order.
    """

    layout: GridLayout
    groups: ExpertGroups
    traffic: Traffic
    send_tokens: list[int]
    receive_tokens: list[list[int]]
    send_picks: list[int]
    receive_picks: list[list[int]]
    token: Tensor
    tokens: int
    picks: Picks

    def _sizes(self) -> tuple[list[int], list[int]]:
        """Elements of x that this rank as a home exchanges with each owner, and as an owner with each home."""
        width = len(self.layout.columns)
        home = [count * each for count in self.send_tokens for each in self.layout.widths]
        return home, [count * width for row in self.receive_tokens for count in row]

    def rows_to_owners(self, x: Tensor) -> Tensor:
        """``[tokens, dim]`` at home -> ``[received tokens, columns]`` at the owners."""
        home, owner = self._sizes()
        if self.layout.column_shards == 1:
            sent = x[self.token]
        else:
            slices = [x[:, self.layout.columns_of(shard)] for shard in range(self.layout.column_shards)]
            sent = torch.cat([part[rows].flatten() for rows in self.token.split(self.send_tokens) for part in slices])
        back = _all_to_all(sent.flatten(), home, owner, self.groups.domain, self.traffic)
        return back.view(-1, len(self.layout.columns))

    def rows_to_homes(self, y: Tensor) -> Tensor:
        """``[received tokens, columns]`` at the owners -> their sum over row shards, ``[tokens, dim]``, at home."""
        home, owner = self._sizes()
        back = iter(_all_to_all(y.flatten(), owner, home, self.groups.domain, self.traffic).split(home))
        out = y.new_zeros(self.tokens, self.layout.dim, dtype=torch.promote_types(y.dtype, torch.float32))
        # Shard by shard: rows are distinct within one, so the order of the sum is fixed on every device.
        for rows in self.token.split(self.send_tokens):
            for shard, width in enumerate(self.layout.widths):
                part = next(back).view(len(rows), width).to(out.dtype)
                out[:, self.layout.columns_of(shard)].index_add_(0, rows, part)
        return out.to(y.dtype)

    def picks_to_owners(self, value: Tensor) -> Tensor:
        """``[sent picks] -> [received picks]``, at all owners of a row shard."""
        mine = self.layout.column_shard
        received = [row[mine] for row in self.receive_picks]
        column = _all_to_all(value, self.send_picks, received, self.groups.rows, self.traffic)
        return _gather_columns(column, self.receive_picks, self.groups, self.traffic)

    def picks_to_homes(self, value: Tensor) -> Tensor:
        """``[received picks]``, the same at all owners of a row shard ``-> [sent picks]``."""
        mine, sizes = self.layout.column_shard, self.receive_picks
        parts = iter(value.split([count for row in sizes for count in row]))
        own = torch.cat([part for row in sizes for column, part in zip(range(len(row)), parts) if column == mine])
        return _all_to_all(own, [row[mine] for row in sizes], self.send_picks, self.groups.rows, self.traffic)

    def sum_columns(self, value: Tensor) -> Tensor:
        """Partial sums ``[received picks]`` -> their sum over the column shards, in place."""
        dist.all_reduce(value, group=self.groups.columns)
        others = self.layout.column_shards - 1  # a ring sends each number on twice, but for a rank's own part
        self.traffic.bytes_sent += 2 * others * value.nbytes // self.layout.column_shards
        return value


def _gather_columns(value: Tensor, sizes: list[list[int]], groups: ExpertGroups, traffic: Traffic) -> Tensor:
    """What the owners of a row shard received, each from the homes of its own column, at all of them.

    Args:
        value: from the homes in this column, in order of row shards.
        sizes: ``[row shards][column shards]``, of every home's part.

    Returns:
        All parts, in the domain's order of homes.
    """
    columns = len(sizes[0])
    if groups.columns is None or columns == 1:
        return value
    totals = [sum(row[column] for row in sizes) for column in range(columns)]
    # every one of them sends all that it has to each of the others
    repeated = value.repeat(columns, *([1] * (value.dim() - 1)))
    everything = _all_to_all(repeated, [len(value)] * columns, totals, groups.columns, traffic)
    parts = iter(everything.split([row[column] for column in range(columns) for row in sizes]))
    by_column = [[next(parts) for _ in sizes] for _ in range(columns)]
    return torch.cat(list(itertools.chain.from_iterable(zip(*by_column))))


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
    token: Tensor, expert: Tensor, tokens: int, layout: GridLayout, traffic: Traffic
) -> tuple[ExchangePlan, Tensor]:
    """Work out, with every other owner, who sends what to whom.

    Args:
        token, expert: ``[distinct]`` int64, from :func:`merge_picks`.
        tokens: rows at home.

    Returns:
        The plan, and ``order: [distinct]`` int64, which puts distinct picks into sending order.
    """
    groups = layout.groups
    assert groups is not None
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
            torch.bincount(owner[begin], minlength=layout.row_shards),
            torch.bincount(owner, minlength=layout.row_shards),
        ],
        dim=1,
    )
    theirs = torch.empty_like(counts)
    dist.all_to_all_single(theirs, counts, group=groups.rows)
    traffic.bytes_sent += (layout.row_shards - 1) * 2 * counts.element_size()
    once = [[layout.row_shards] * layout.column_shards]  # as if from one home a column
    theirs = _gather_columns(theirs, once, groups, traffic).view(layout.column_shards, layout.row_shards, 2)
    # waits for the device: all_to_all wants its sizes on the host
    sent, *received = torch.cat([counts[None], theirs]).tolist()
    send_tokens, send_picks = (list(column) for column in zip(*sent))
    receive_tokens, receive_picks = (
        [[received[column][row][which] for column in range(layout.column_shards)] for row in range(layout.row_shards)]
        for which in (0, 1)
    )

    mine = layout.column_shard
    column_tokens = [row[mine] for row in receive_tokens]
    each = _all_to_all(picks_each, send_tokens, column_tokens, groups.rows, traffic)
    each = _gather_columns(each, receive_tokens, groups, traffic)
    column_picks = [row[mine] for row in receive_picks]
    rows = _all_to_all(local.to(torch.int32), send_picks, column_picks, groups.rows, traffic)
    rows = _gather_columns(rows, receive_picks, groups, traffic)
    offsets = torch.zeros(each.numel() + 1, dtype=torch.int64, device=each.device)
    torch.cumsum(each, 0, out=offsets[1:])
    traffic.picks_received += rows.numel()
    plan = ExchangePlan(
        layout=layout,
        groups=groups,
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
        ``[received tokens, columns]`` and ``[received picks]``; gradients come home by the same plan.
    """
    return _Dispatch.apply(x, gate, plan)


def combine(y: Tensor, plan: ExchangePlan) -> Tensor:
    """Send the owners' results ``[received tokens, columns]`` home and add them: ``[tokens, dim]``."""
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
