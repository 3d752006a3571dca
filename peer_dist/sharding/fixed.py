"""An exchange whose sizes stay on the device: shapes depend on the number of tokens alone, and the host never waits.

There is room for the most that there can be, so that nothing can overflow and nothing need be agreed on. Every rank has
as many tokens, ``T`` with ``P`` picks each; of ``R`` ranks with row shards

- a home sends at most ``T min(R, P)`` rows, and an owner receives at most ``R T``: hardly more than there are where a
  token hits nearly all ranks;
- an owner receives at most ``R T P`` picks, ``R`` times the mean. Room for a pick that is not there costs memory at the
  owner (some 40 bytes) and its share of a sort of 32-bit keys. It is not sent, and the products over picks do not see
  it: it belongs to no token, and its row is -1.

Numbers travel in units of :data:`UNIT`, so that a message is a multiple of 32 bytes whatever it holds. A unit is filled
up with picks of row 0 whose gate is 0, which belong to the last token of the message. How many picks a token has does
not travel: the first of each is sent as the complement of its row number.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from peer_dist.kernels import Picks, sum_rows
from peer_dist.sharding.exchange import MergedPicks, Place, Traffic
from peer_dist.sharding.grid import GridLayout
from peer_dist.sharding.transport import Arrival

UNIT = 8
"""Numbers of a unit of what travels with picks: 32 bytes."""


@dataclass(frozen=True)
class Sizes:
    """How many rows, or units of numbers, this rank exchanges with each.

    Attributes:
        sent, received: ``[ranks]`` int64 on the device.
        away, from_away: ``[]`` int64 on the device, how many of these go to, and come from, other ranks.
        room: for how many there is room at the sender, and at the receiver.
    """

    sent: Tensor
    received: Tensor
    away: Tensor
    from_away: Tensor
    room: tuple[int, int]

    @classmethod
    def of(cls, sent: Tensor, received: Tensor, rank: int, room: tuple[int, int]) -> Sizes:
        """The sizes as counted."""
        return cls(sent, received, sent.sum() - sent[rank], received.sum() - received[rank], room)


@dataclass(frozen=True)
class _Ways:
    """The ways to the owners and back."""

    layout: GridLayout
    traffic: Traffic

    def to_owners(self, x: Tensor, sizes: Sizes, what: str) -> Arrival:
        """Start ``[room at the sender, ...]``; ``[room at the receiver, ...]`` will arrive."""
        return self._start(x, sizes.sent, sizes.received, sizes.away, sizes.room[1], what)

    def to_homes(self, x: Tensor, sizes: Sizes, what: str) -> Arrival:
        """Start ``[room at the receiver, ...]``; ``[room at the sender, ...]`` will arrive."""
        return self._start(x, sizes.received, sizes.sent, sizes.from_away, sizes.room[0], what)

    def _start(self, x: Tensor, send: Tensor, receive: Tensor, away: Tensor, room: int, what: str) -> Arrival:
        out = x.new_empty(room, *x.shape[1:])
        self.traffic.add_later(away, {what: x.element_size() * x.shape[1:].numel()})
        return self.layout.transport.start(x.contiguous(), send, receive, self.layout.row_group, out)


@dataclass(frozen=True)
class FixedPlan:
    """As :class:`peer_dist.sharding.exchange.ExchangePlan`, with room instead of sizes; the tokens are one part.

    Attributes:
        parts: the only one.
        tokens: rows at home.
        token: ``[room for rows]`` int64, the home row of each sent one; ``tokens`` for what is not there.
        place: ``[tokens * picks]`` int64, where each pick in sending order lies among the numbers sent; one beyond them
            for those that are not sent.
        rows, units: how many rows, and units of numbers, go where.
        picks: the received picks, in local row numbers.
    """

    layout: GridLayout
    ways: _Ways
    parts: list[Place]
    tokens: int
    token: Tensor
    place: Tensor
    rows: Sizes
    units: Sizes
    picks: Picks

    def all_picks(self) -> Picks:
        """:attr:`picks` as a tensor of their own, lest an order of theirs live as long as the plan."""
        return Picks(self.picks.offsets, self.picks.expert.view(-1))

    def picks_of(self, part: Place) -> Picks:
        """:meth:`all_picks`."""
        return self.all_picks()

    def start_rows_to_owners(self, x: Tensor, what: str) -> tuple[Tensor, list[Arrival]]:
        """Send ``[tokens, dim]`` at home; see :meth:`peer_dist.sharding.exchange.ExchangePlan.start_rows_to_owners`."""
        wire = self.layout.wire
        messages = wire.encode(x)
        arrival = self.ways.to_owners(messages[self.token.clamp(max=self.tokens - 1)], self.rows, what)
        if messages.dtype == x.dtype:
            return arrival.out, [arrival]
        received = x.new_empty(self.rows.room[1], x.shape[1])
        return received, [arrival.then(lambda rows: received.copy_(wire.decode(rows)))]

    def start_rows_to_homes(self, y: Tensor, number: int, what: str) -> Arrival:
        """Send ``[received tokens, dim]`` to the homes."""
        return self.ways.to_homes(self.layout.wire.encode(y), self.rows, what)

    def add_rows_at_home(self, arrivals: Iterable[Arrival], dtype: torch.dtype) -> Tensor:
        """The sum over row shards, in their order, of what the owners sent, ``[tokens, dim]``."""
        (arrival,) = arrivals
        return sum_rows(self.layout.wire.decode(arrival.wait()), self.at_home, dtype)

    @cached_property
    def at_home(self) -> Picks:
        """The rows that come home for each token, in the order of the row shards that send them."""
        return Picks.of_rows(self.token, self.tokens)

    def start_picks_to_owners(self, value: Tensor) -> Arrival:
        """Send ``[tokens * picks]`` in sending order to the owners."""
        return self.ways.to_owners(_spaced(value, self.place, self.units.room[0]), self.units, "gates")

    def picks_at_owners(self, arrival: Arrival) -> Tensor:
        """``[received picks]``."""
        return arrival.wait().view(-1)

    def start_picks_to_homes(self, value: Tensor) -> Arrival:
        """Send ``[received picks]``; ``[tokens * picks]`` in sending order will arrive."""
        arrival = self.ways.to_homes(value.view(-1, UNIT), self.units, "dgates")
        return arrival.then(lambda numbers: F.pad(numbers.view(-1), (0, 1))[self.place])

    def sum_columns(self, value: Tensor, what: str) -> Tensor:
        """There is one column shard."""
        return value


def _spaced(value: Tensor, place: Tensor, units: int) -> Tensor:
    """``value`` at its places in ``[units, UNIT]``, and 0 elsewhere."""
    return value.new_zeros(units * UNIT + 1).scatter_(0, place, value)[:-1].view(units, UNIT)


def fixed_plan(picks: MergedPicks, layout: GridLayout, traffic: Traffic) -> tuple[FixedPlan, Tensor]:
    """:func:`peer_dist.sharding.exchange.plan_exchange` without the host, for tables of whole rows.

    Returns:
        The plan, and ``sent: [tokens * picks]`` int64, the places of ``[tokens * picks]`` in sending order: those that
        are kept, and then the others.
    """
    tokens, of_token = picks.expert.shape
    ranks, device = layout.row_shards, picks.expert.device
    starts = layout.first_rows(device)
    owner = torch.bucketize(picks.expert, starts, right=True) - 1
    block, sent = torch.where(picks.kept, owner, ranks).to(torch.int32).view(-1).sort(stable=True)
    token = sent // max(1, of_token)
    fresh = torch.ones_like(token, dtype=torch.bool)  # the first pick of a (shard, token) pair
    fresh[1:] = (block[1:] != block[:-1]) | (token[1:] != token[:-1])
    messages = F.pad(fresh.cumsum(0), (1, 0))
    edges = torch.searchsorted(block, torch.arange(ranks + 1, dtype=torch.int32, device=device))
    rows_before = messages[edges]
    counts = torch.stack([rows_before.diff(), edges.diff()], dim=1)
    received = layout.transport.counts(counts, layout.row_group)
    traffic.sent["counts"] += (ranks - 1) * counts[0].nbytes

    ways = _Ways(layout, traffic)
    most_picks = tokens * min(of_token, layout.first_row(1))  # of a home, at an owner
    rooms = (
        (tokens * min(ranks, of_token), tokens * ranks),
        (tokens * of_token // UNIT + ranks, -(-most_picks // UNIT) * ranks),
    )
    row_sizes = Sizes.of(counts[:, 0], received[:, 0], layout.row_shard, rooms[0])
    units, units_received = ((picks_of_rank[:, 1] + UNIT - 1) // UNIT for picks_of_rank in (counts, received))
    unit_sizes = Sizes.of(units, units_received, layout.row_shard, rooms[1])
    for sizes in (row_sizes, unit_sizes):  # or a rank has more tokens than this one
        torch._assert_async(sizes.received.sum() <= sizes.room[1])

    row = torch.arange(1, row_sizes.room[0] + 1, dtype=torch.int64, device=device)
    begin = torch.searchsorted(messages[1:], row).clamp(max=max(0, tokens * of_token - 1))
    home_row = torch.where(row <= rows_before[-1], token[begin], tokens)

    first = F.pad((units.cumsum(0) - units) * UNIT - edges[:-1], (0, 1))
    number = torch.arange(tokens * of_token, dtype=torch.int64, device=device)
    place = torch.where(block < ranks, first[block] + number, unit_sizes.room[0] * UNIT)
    local = (picks.expert.view(-1)[sent] - starts[block.clamp(max=ranks - 1)]).to(torch.int32)
    local = torch.where(fresh, ~local, local)
    rows = ways.to_owners(_spaced(local, place, unit_sizes.room[0]), unit_sizes, "picks").wait().view(-1)

    total = unit_sizes.received.sum() * UNIT
    number = torch.arange(len(rows), dtype=torch.int64, device=device)
    live = number < total
    of_row = (live & (rows < 0)).cumsum(0)
    row = torch.arange(1, row_sizes.room[1] + 1, dtype=torch.int64, device=device)
    begins = torch.searchsorted(of_row, row)
    offsets = torch.minimum(F.pad(begins, (0, 1), value=len(rows)), total)
    traffic.tokens += tokens
    traffic.add_later(row_sizes.received.sum(), {"tokens_received": 1})
    traffic.add_later(received[:, 1].sum(), {"picks_received": 1})
    plan = FixedPlan(
        layout=layout,
        ways=ways,
        parts=[Place(slice(0, row_sizes.room[1]), slice(0, len(rows)))],
        tokens=tokens,
        token=home_row,
        place=place,
        rows=row_sizes,
        units=unit_sizes,
        picks=Picks(offsets, torch.where(live, torch.where(rows < 0, ~rows, rows), -1).long()),
    )
    return plan, sent
