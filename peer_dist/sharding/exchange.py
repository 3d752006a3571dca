"""Tokens travel to the owners of the experts that they picked, and results travel back.

A token goes to each row shard that it hits once, however many of its experts live there: a slice of its ``x`` to the
owner of each column shard. The local row number and the gate of each pick go once, to the owner in the sender's own
column, and from there to the other columns. The plan is made once per forward pass and serves the backward pass too,
which is its mirror image: rows to the owners and rows to the homes are each other's transpose, and so with picks.

Tokens may travel in parts, so that the exchange of one part overlaps the experts of another. Received tokens and picks
lie in order of part and then of home, so that a part is a contiguous range of both. All ranks take as many parts, and
start the same collectives in the same order, whatever number of tokens they have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from peer_dist.kernels import Picks
from peer_dist.sharding.grid import ExpertGroups, GridLayout


@dataclass
class Traffic:
    """What this rank sent to other ranks, and what it received, since :meth:`reset`.

    Attributes:
        sent: bytes by collective: ``counts``, ``picks`` (a number a token, and rows), ``gates``, ``x`` and ``y``
            forward, ``dy``, ``dx`` and ``dgates`` backward; within the column group ``column counts``,
            ``column picks``, ``column gates`` and ``dots`` forward, ``ddots`` backward.
        picks_received: after merging, its own included.
        tokens, tokens_received: at home, and from all homes (a token counts at each owner): where tables are spread.
    """

    sent: Counter[str] = field(default_factory=Counter)
    picks_received: int = 0
    tokens: int = 0
    tokens_received: int = 0

    @property
    def bytes_sent(self) -> int:
        return sum(self.sent.values())

    def reset(self) -> None:
        self.sent.clear()
        self.picks_received = self.tokens = self.tokens_received = 0


class Arrival:
    """An all-to-all under way. What it reads and writes stays alive until it has been waited for."""

    def __init__(self, work: dist.Work, out: Tensor, sent: Tensor) -> None:
        self._work, self._out, self._sent = work, out, [sent]

    def wait(self) -> Tensor:
        """What was received; on a GPU the current stream waits, not the host."""
        self._work.wait()
        self._sent.clear()
        return self._out


def _start(
    x: Tensor,
    send: Sequence[int],
    receive: Sequence[int],
    group: dist.ProcessGroup,
    traffic: Traffic,
    what: str,
    out: Tensor | None = None,
) -> Arrival:
    """Send rows of ``x`` grouped by destination; rows grouped by source will arrive, in ``out`` if given."""
    x = x.contiguous()
    if out is None:
        out = x.new_empty(sum(receive), *x.shape[1:])
    work = dist.all_to_all_single(out, x, list(receive), list(send), group=group, async_op=True)
    row_bytes = x.element_size() * x.shape[1:].numel()
    traffic.sent[what] += (sum(send) - send[dist.get_rank(group)]) * row_bytes
    return Arrival(work, out, x)


def _all_to_all(
    x: Tensor, send: Sequence[int], receive: Sequence[int], group: dist.ProcessGroup, traffic: Traffic, what: str
) -> Tensor:
    """Rows of ``x`` grouped by destination -> rows grouped by source."""
    return _start(x, send, receive, group, traffic, what).wait()


@dataclass(frozen=True)
class Part:
    """A contiguous part of the tokens at each home, which travels by itself.

    Attributes:
        send: its tokens at this home that go to each row shard.
        receive: its tokens that come from each home in the domain, ``[row shards][column shards]``.
        token: ``[sum(send)]`` int64, the home row of each sent token; ascending within a row shard.
        tokens, picks: its place among the received tokens and among the received picks.
    """

    send: list[int]
    receive: list[list[int]]
    token: Tensor
    tokens: slice
    picks: slice


@dataclass(frozen=True)
class ExchangePlan:
    """What this rank sends to and receives from whom, for one batch of tokens.

    Attributes:
        parts: of the tokens, as many on every rank.
        send_picks: merged picks per row shard.
        receive_picks: per home in the domain and part, ``[row shards][column shards][parts]``.
        tokens: rows at home.
        picks: all received picks, in local row numbers, parts one after the other, homes in the domain's order in each.
    """

    layout: GridLayout
    groups: ExpertGroups
    traffic: Traffic
    parts: list[Part]
    send_picks: list[int]
    receive_picks: list[list[list[int]]]
    tokens: int
    picks: Picks

    def all_picks(self) -> Picks:
        """:attr:`picks` without what was worked out of them, which would otherwise live as long as the plan."""
        return Picks(self.picks.offsets, self.picks.expert)

    def picks_of(self, part: Part) -> Picks:
        """The received picks of a part, its first token being number 0."""
        offsets = self.picks.offsets[part.tokens.start : part.tokens.stop + 1]
        return Picks(offsets - part.picks.start if part.picks.start else offsets, self.picks.expert[part.picks])

    def _sizes(self, part: Part) -> tuple[list[int], list[int]]:
        """Elements of x that this rank as a home exchanges with each owner, and as an owner with each home."""
        width = len(self.layout.columns)
        home = [count * each for count in part.send for each in self.layout.widths]
        return home, [count * width for row in part.receive for count in row]

    def start_rows_to_owners(self, x: Tensor, what: str) -> tuple[Tensor, list[Arrival]]:
        """Send ``[tokens, dim]`` at home, part by part; ``what`` it is, ``x`` or ``dy``, is counted apart.

        Returns:
            ``[received tokens, columns]`` at the owner, where the rows of a part are once its arrival is waited for.
        """
        width = len(self.layout.columns)
        received = x.new_empty(self.picks.tokens, width)
        flat, arrivals = received.view(-1), []
        for part in self.parts:
            home, owner = self._sizes(part)
            if self.layout.column_shards == 1:
                sent = x[part.token]
            else:
                slices = [x[:, self.layout.columns_of(shard)] for shard in range(self.layout.column_shards)]
                sent = torch.cat([piece[rows].flatten() for rows in part.token.split(part.send) for piece in slices])
            out = flat[part.tokens.start * width : part.tokens.stop * width]
            arrivals.append(_start(sent.flatten(), home, owner, self.groups.domain, self.traffic, what, out))
        return received, arrivals

    def start_rows_to_homes(self, y: Tensor, part: Part, what: str) -> Arrival:
        """Send a part's ``[its received tokens, columns]`` from the owner to the homes."""
        home, owner = self._sizes(part)
        return _start(y.flatten(), owner, home, self.groups.domain, self.traffic, what)

    def add_rows_at_home(self, arrivals: Iterable[Arrival], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The sum over row shards of what the owners sent, part by part in order, ``[tokens, dim]``."""
        wide = torch.promote_types(dtype, torch.float32)
        out = torch.zeros(self.tokens, self.layout.dim, dtype=wide, device=device)
        for part, arrival in zip(self.parts, arrivals):
            pieces = iter(arrival.wait().split(self._sizes(part)[0]))
            # Shard by shard: rows are distinct within one, so the order of the sum is fixed on every device.
            for rows in part.token.split(part.send):
                for shard, width in enumerate(self.layout.widths):
                    piece = next(pieces).view(len(rows), width).to(wide)
                    out[:, self.layout.columns_of(shard)].index_add_(0, rows, piece)
        return out.to(dtype)

    def start_picks_to_owners(self, value: Tensor) -> Arrival:
        """Send ``[sent picks]`` to the owners in this home's column."""
        received = [sum(row[self.layout.column_shard]) for row in self.receive_picks]
        return _start(value, self.send_picks, received, self.groups.rows, self.traffic, "gates")

    def picks_at_owners(self, arrival: Arrival) -> Tensor:
        """``[received picks]``, at all owners of a row shard."""
        return _gather_columns(arrival.wait(), self.receive_picks, self.groups, self.traffic, "gates")

    def start_picks_to_homes(self, value: Tensor) -> Arrival:
        """Send ``[received picks]``, the same at all owners of a row shard; ``[sent picks]`` will arrive."""
        mine, sizes, parts = self.layout.column_shard, self.receive_picks, range(len(self.parts))
        pieces = iter(value.split([count[part] for part in parts for row in sizes for count in row]))
        by_part = [[[next(pieces) for _ in row][mine] for row in sizes] for _ in parts]
        own = torch.cat([by_part[part][row] for row in range(len(sizes)) for part in parts])
        received = [sum(row[mine]) for row in sizes]
        return _start(own, received, self.send_picks, self.groups.rows, self.traffic, "dgates")

    def sum_columns(self, value: Tensor, what: str) -> Tensor:
        """Partial sums ``[picks]`` -> their sum over the column shards, in place."""
        dist.all_reduce(value, group=self.groups.columns)
        others = self.layout.column_shards - 1  # a ring sends each number on twice, but for a rank's own part
        self.traffic.sent[what] += 2 * others * value.nbytes // self.layout.column_shards
        return value


def _gather_columns(
    value: Tensor, sizes: list[list[list[int]]], groups: ExpertGroups, traffic: Traffic, what: str
) -> Tensor:
    """What the owners of a row shard received, each from the homes of its own column, at all of them.

    Args:
        value: from the homes in this column, in order of row shards and then of parts.
        sizes: ``[row shards][column shards][parts]``, of what every home sent.

    Returns:
        In order of parts and then of homes in the domain.
    """
    columns, parts = len(sizes[0]), len(sizes[0][0])
    if columns > 1:
        totals = [sum(sum(row[column]) for row in sizes) for column in range(columns)]
        # every one of them sends all that it has to each of the others
        repeated = value.repeat(columns, *([1] * (value.dim() - 1)))
        assert groups.columns is not None
        value = _all_to_all(repeated, [len(value)] * columns, totals, groups.columns, traffic, f"column {what}")
    elif parts == 1:
        return value
    pieces = iter(value.split([count for column in range(columns) for row in sizes for count in row[column]]))
    by_column = [[[next(pieces) for _ in range(parts)] for _ in sizes] for _ in range(columns)]
    return torch.cat(
        [
            by_column[column][row][part]
            for part in range(parts)
            for row in range(len(sizes))
            for column in range(columns)
        ]
    )


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
    token: Tensor, expert: Tensor, tokens: int, layout: GridLayout, traffic: Traffic, parts: int = 1
) -> tuple[ExchangePlan, Tensor]:
    """Work out, with every other owner, who sends what to whom.

    Args:
        token, expert: ``[distinct]`` int64, from :func:`merge_picks`.
        tokens: rows at home.
        parts: number of contiguous parts in which they travel, the same on all ranks; some may be empty.

    Returns:
        The plan, and ``order: [distinct]`` int64, which puts distinct picks into sending order.
    """
    groups = layout.groups
    assert groups is not None
    row_shards, column_shards = layout.row_shards, layout.column_shards
    starts = layout.first_rows(expert.device)
    owner = torch.bucketize(expert, starts, right=True) - 1
    order = torch.argsort(owner, stable=True)
    owner, token, local = owner[order], token[order], (expert - starts[owner])[order]
    # part p begins with token first_of(tokens, p, parts)
    owner_part = owner * parts + ((token + 1) * parts - 1) // max(1, tokens)

    fresh = torch.ones_like(token, dtype=torch.bool)  # the first pick of a (shard, token) pair
    fresh[1:] = (owner[1:] != owner[:-1]) | (token[1:] != token[:-1])
    begin = fresh.nonzero().squeeze(1)
    picks_each = torch.diff(begin, append=begin.new_tensor([token.numel()])).to(torch.int32)

    counts = torch.stack(
        [torch.bincount(each, minlength=row_shards * parts) for each in (owner_part[begin], owner_part)], dim=1
    ).view(row_shards, parts, 2)
    theirs = torch.empty_like(counts)
    dist.all_to_all_single(theirs, counts, group=groups.rows)
    traffic.sent["counts"] += (row_shards - 1) * parts * 2 * counts.element_size()
    once = [[[row_shards]] * column_shards]  # as if from one home a column
    theirs = _gather_columns(theirs, once, groups, traffic, "counts").view(column_shards, row_shards, parts, 2)
    # waits for the device: all_to_all wants its sizes on the host
    sent, *received = torch.cat([counts[None], theirs]).tolist()  # [row][part][tokens, picks], [column] of that
    send_tokens, send_picks = ([sum(count[which] for count in row) for row in sent] for which in (0, 1))
    receive_tokens, receive_picks = (
        [[[count[which] for count in column[row]] for column in received] for row in range(row_shards)]
        for which in (0, 1)
    )

    mine = layout.column_shard
    column_tokens = [sum(row[mine]) for row in receive_tokens]
    each = _all_to_all(picks_each, send_tokens, column_tokens, groups.rows, traffic, "picks")
    each = _gather_columns(each, receive_tokens, groups, traffic, "picks")
    column_picks = [sum(row[mine]) for row in receive_picks]
    rows = _all_to_all(local.to(torch.int32), send_picks, column_picks, groups.rows, traffic, "picks")
    rows = _gather_columns(rows, receive_picks, groups, traffic, "picks")
    offsets = torch.zeros(each.numel() + 1, dtype=torch.int64, device=each.device)
    torch.cumsum(each, 0, out=offsets[1:])
    traffic.picks_received += rows.numel()
    traffic.tokens += tokens
    traffic.tokens_received += each.numel()

    pieces = iter(token[begin].split([count[0] for row in sent for count in row]))
    by_row = [[next(pieces) for _ in range(parts)] for _ in range(row_shards)]
    made: list[Part] = []
    first_token, first_pick = 0, 0
    for part in range(parts):
        receive = [[column[part] for column in row] for row in receive_tokens]
        last_token = first_token + sum(map(sum, receive))
        last_pick = first_pick + sum(column[part] for row in receive_picks for column in row)
        made.append(
            Part(
                send=[row[part][0] for row in sent],
                receive=receive,
                token=torch.cat([row[part] for row in by_row]),
                tokens=slice(first_token, last_token),
                picks=slice(first_pick, last_pick),
            )
        )
        first_token, first_pick = last_token, last_pick
    plan = ExchangePlan(
        layout=layout,
        groups=groups,
        traffic=traffic,
        parts=made,
        send_picks=send_picks,
        receive_picks=receive_picks,
        tokens=tokens,
        picks=Picks(offsets, rows.long()),
    )
    return plan, order
