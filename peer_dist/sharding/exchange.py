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
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from peer_dist.kernels import Picks, sum_rows
from peer_dist.sharding.grid import GridLayout
from peer_dist.sharding.transport import Arrival
from peer_dist.sharding.wire import Wire

_TOKENS, _PICKS = 0, 1  # places on the last axis of counts
_MANY = 64  # numbers of a kind on the device, which are then made one


@dataclass
class Traffic:
    """What this rank sent to other ranks, and what it received, since :meth:`reset`.

    What only the device knows (:meth:`add_later`) is waited for, and counted, when :attr:`bytes_sent` is asked.

    Attributes:
        sent: bytes by collective: ``counts``, ``picks`` (a number a token, and rows), ``gates``, ``x`` and ``y``
            forward, ``dy``, ``dx`` and ``dgates`` backward; within the column group ``column counts``,
            ``column picks``, ``column gates`` and ``dots`` forward, ``ddots`` backward.
        picks_received: picks after merging that this rank computed as an owner, those of its own tokens included.
        tokens: tokens at home; counted only where tables are spread over ranks.
        tokens_received: tokens from all homes, of which one counts at each of its owners; likewise.
    """

    sent: Counter[str] = field(default_factory=Counter)
    picks_received: int = 0
    tokens: int = 0
    tokens_received: int = 0
    _later: dict[tuple[tuple[str, int], ...], list[Tensor]] = field(default_factory=dict, repr=False)

    def add_later(self, number: Tensor, factors: dict[str, int]) -> None:
        """Count ``number []`` int64 on the device, times its factor, for each collective (or ``picks_received`` or
        ``tokens_received``) that is named.
        """
        numbers = self._later.setdefault(tuple(factors.items()), [])
        numbers.append(number)
        if len(numbers) == _MANY:  # nobody may ever ask
            numbers[:] = [torch.stack(numbers).sum()]

    @property
    def bytes_sent(self) -> int:
        """Bytes sent to other ranks, by all collectives."""
        later, self._later = self._later, {}
        if later:
            numbers = torch.stack([torch.stack(numbers).sum() for numbers in later.values()]).tolist()
            for number, factors in zip(numbers, map(dict, later)):
                self.picks_received += number * factors.pop("picks_received", 0)
                self.tokens_received += number * factors.pop("tokens_received", 0)
                self.sent.update({what: number * factor for what, factor in factors.items()})
        return sum(self.sent.values())

    def reset(self) -> None:
        """Set all counts to 0."""
        self.sent.clear()
        self._later.clear()
        self.picks_received = self.tokens = self.tokens_received = 0


def _start(
    x: Tensor,
    send: Sequence[int],
    receive: Sequence[int],
    group: dist.ProcessGroup | None,
    layout: GridLayout,
    traffic: Traffic,
    what: str,
    out: Tensor | None = None,
) -> Arrival:
    """Send rows of ``x`` grouped by destination; rows grouped by source will arrive, in ``out`` if given."""
    x = x.contiguous()
    if out is None:
        out = x.new_empty(sum(receive), *x.shape[1:])
    arrival = layout.transport.start(x, send, receive, group, out)
    row_bytes = x.element_size() * x.shape[1:].numel()
    traffic.sent[what] += (sum(send) - send[0 if group is None else dist.get_rank(group)]) * row_bytes
    return arrival


@dataclass(frozen=True)
class ColumnRoute:
    """How numbers, one for each token or for each pick, travel between homes and all owners of a row shard.

    On the way to the owners they lie in blocks, in this order of the blocks' axes:

    1. ``[row, part]`` as a home sends them, and as the homes' owner in the same column receives them: ``row`` is the
       row shard of the owner, then of the home.
    2. ``[column, row, part]`` after each owner has passed what it received on to the other columns' owners.
    3. ``[part, row, column]`` as the owners work on them: parts one after the other, in each the homes of the domain.

    Attributes:
        send: ``[row shards]``, how many this home sends to the owner of each row shard.
        receive: ``[row shards]``, how many this owner receives from each home in its column.
        passed_on: ``[column shards]``, how many the owner in each column received, and passes on.
        gathered: sizes of the blocks in order 2.
        worked_on: sizes of the blocks in order 3.
        work_order: the blocks of order 3, as their places in order 2.
        own_blocks: the blocks ``[row, part]`` of this column, as their places in order 3.
    """

    layout: GridLayout
    traffic: Traffic
    send: list[int]
    receive: list[int]
    passed_on: list[int]
    gathered: list[int]
    worked_on: list[int]
    work_order: list[int]
    own_blocks: list[int]

    @classmethod
    def of(cls, sent: np.ndarray, received: np.ndarray, layout: GridLayout, traffic: Traffic) -> ColumnRoute:
        """The route of what is counted in ``sent [row, part]`` and ``received [row, column, part]``, both int64."""
        gathered, worked_on = received.transpose(1, 0, 2), received.transpose(2, 0, 1)
        place, mine = np.arange(received.size), layout.column_shard
        return cls(
            layout=layout,
            traffic=traffic,
            send=sent.sum(1).tolist(),
            receive=received[:, mine].sum(1).tolist(),
            passed_on=received.sum((0, 2)).tolist(),
            gathered=gathered.flatten().tolist(),
            worked_on=worked_on.flatten().tolist(),
            work_order=place.reshape(gathered.shape).transpose(2, 1, 0).flatten().tolist(),
            own_blocks=place.reshape(worked_on.shape).transpose(2, 1, 0)[mine].flatten().tolist(),
        )

    def start_to_owners(self, value: Tensor, what: str) -> Arrival:
        """Send ``[sum(send)]`` from the home to the owners in its column."""
        return _start(value, self.send, self.receive, self.layout.row_group, self.layout, self.traffic, what)

    def at_owners(self, received: Tensor, what: str) -> Tensor:
        """``[sum(passed_on)]`` in the order of work at all owners, from what arrived at each, ``[sum(receive)]``."""
        gathered = _pass_on(received, self.passed_on, self.layout, self.traffic, what)
        return _in_order(gathered, self.gathered, self.work_order)

    def start_to_homes(self, value: Tensor, what: str) -> Arrival:
        """Send ``[sum(passed_on)]``, the same at all owners, to the homes, each of which gets ``[sum(send)]``."""
        own = _in_order(value, self.worked_on, self.own_blocks)
        return _start(own, self.receive, self.send, self.layout.row_group, self.layout, self.traffic, what)


def _pass_on(value: Tensor, sizes: list[int], layout: GridLayout, traffic: Traffic, what: str) -> Tensor:
    """The values of all owners of a row shard, ``sizes`` long, at each of them, column after column."""
    if len(sizes) == 1:
        return value
    repeated = value.repeat(len(sizes), *([1] * (value.dim() - 1)))  # all that it has, to each of the others
    send = [len(value)] * len(sizes)
    return _start(repeated, send, sizes, layout.column_group, layout, traffic, f"column {what}").wait()


def _joined(tensors: list[Tensor], dim: int) -> Tensor:
    """The tensors one after the other along ``dim``, one alone as it is."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def _in_order(value: Tensor, sizes: list[int], order: list[int]) -> Tensor:
    """The blocks of ``value``, which are ``sizes`` long, in the order of their places ``order``."""
    if order == list(range(len(sizes))):
        return value
    blocks = value.split(sizes)
    return torch.cat([blocks[place] for place in order])


@dataclass(frozen=True)
class Place:
    """Where the tokens and picks of a part lie among those that an owner received."""

    tokens: slice
    picks: slice


@dataclass(frozen=True)
class Part(Place):
    """A contiguous part of the tokens at each home, which travels by itself.

    Attributes:
        home: the part's place among the tokens at home.
        token: ``[sum(send)]`` int64, the home row of each sent token; ascending within a row shard.
        send: ``[row shards]``, how many tokens of this home go to each row shard.
        home_messages: elements of the messages between this rank as a home and each owner, in the domain's order.
        owner_messages: those between this rank as an owner and each home, likewise.
    """

    home: slice
    token: Tensor
    send: list[int]
    home_messages: list[int]
    owner_messages: list[int]

    @cached_property
    def at_home(self) -> Picks:
        """The rows that come home for each of the part's tokens, in the order of the row shards that send them."""
        return Picks.of_rows(self.token - self.home.start, self.home.stop - self.home.start)


@dataclass(frozen=True)
class ExchangePlan:
    """What this rank sends to and receives from whom, for one batch of tokens.

    Attributes:
        parts: the parts of the tokens, as many on every rank.
        route: the way of a number for each pick, merged picks that is: gates and their gradients.
        tokens: rows at home.
        picks: all received picks, in local row numbers, parts one after the other, homes in the domain's order in each.
    """

    layout: GridLayout
    traffic: Traffic
    parts: list[Part]
    route: ColumnRoute
    tokens: int
    picks: Picks

    def all_picks(self) -> Picks:
        """:attr:`picks` as a tensor of their own, lest an order of theirs live as long as the plan."""
        return Picks(self.picks.offsets, self.picks.expert.view(-1))

    def picks_of(self, part: Place) -> Picks:
        """The received picks of a part, its first token being number 0."""
        offsets = self.picks.offsets[part.tokens.start : part.tokens.stop + 1]
        return Picks(offsets - part.picks.start if part.picks.start else offsets, self.picks.expert[part.picks])

    def start_rows_to_owners(self, x: Tensor, what: str) -> tuple[Tensor, list[Arrival]]:
        """Send ``[tokens, dim]`` at home, part by part; ``what`` it is, ``x`` or ``dy``, is counted apart.

        Returns:
            ``[received tokens, columns]`` at the owner, where the rows of a part are once its arrival is waited for.
        """
        layout, wire, width = self.layout, self.layout.wire, len(self.layout.columns)
        received = x.new_empty(self.picks.tokens, width)
        slices = [wire.encode(x[:, layout.columns_of(shard)]) for shard in range(layout.column_shards)]
        as_it_is = slices[0].dtype == x.dtype
        messages = received if as_it_is else slices[0].new_empty(self.picks.tokens, wire.length(width))
        arrivals = []
        for part in self.parts:
            if len(slices) == 1:
                sent = slices[0][part.token].flatten()
            else:
                sent = torch.cat([piece[rows].flatten() for rows in part.token.split(part.send) for piece in slices])
            out = messages[part.tokens]
            sizes = part.home_messages, part.owner_messages
            arrival = _start(sent, *sizes, layout.domain_group, layout, self.traffic, what, out.view(-1))
            if not as_it_is:
                arrival.then(partial(_decode_into, wire, received[part.tokens], out))
            arrivals.append(arrival)
        return received, arrivals

    def start_rows_to_homes(self, y: Tensor, number: int, what: str) -> Arrival:
        """Send ``[its received tokens, columns]`` of a part, by its number, from the owner to the homes."""
        layout, wire, part = self.layout, self.layout.wire, self.parts[number]
        sent = wire.encode(y)
        sizes = part.owner_messages, part.home_messages
        return _start(sent.flatten(), *sizes, layout.domain_group, layout, self.traffic, what)

    def add_rows_at_home(self, arrivals: Iterable[Arrival], dtype: torch.dtype) -> Tensor:
        """The sum over row shards, in their order, of what the owners sent, ``[tokens, dim]``."""
        sums = []
        for part, arrival in zip(self.parts, arrivals):
            rows, columns = arrival.wait(), range(self.layout.column_shards)
            of_columns = [sum_rows(self._columns(rows, part, each), part.at_home, dtype) for each in columns]
            sums.append(_joined(of_columns, 1))
        return _joined(sums, 0)

    def _columns(self, messages: Tensor, part: Part, shard: int) -> Tensor:
        """``[sum(part.send), columns]`` of a column shard, out of all messages that came home for a part."""
        wire, shards = self.layout.wire, self.layout.column_shards
        length = wire.length(self.layout.widths[shard])
        if shards == 1:
            return wire.decode(messages.view(-1, length))
        pieces = messages.split(part.home_messages)[shard::shards]
        return wire.decode(torch.cat([piece.view(sent, length) for sent, piece in zip(part.send, pieces)]))

    def start_picks_to_owners(self, value: Tensor) -> Arrival:
        """Send ``[sent picks]`` to the owners in this home's column."""
        return self.route.start_to_owners(value, "gates")

    def picks_at_owners(self, arrival: Arrival) -> Tensor:
        """``[received picks]``, at all owners of a row shard."""
        return self.route.at_owners(arrival.wait(), "gates")

    def start_picks_to_homes(self, value: Tensor) -> Arrival:
        """Send ``[received picks]``, the same at all owners of a row shard; ``[sent picks]`` will arrive."""
        return self.route.start_to_homes(value, "dgates")

    def sum_columns(self, value: Tensor, what: str) -> Tensor:
        """The sum of ``value [picks]`` over the column shards, in place; ``what`` is counted, ``dots`` or ``ddots``."""
        self.layout.transport.sum(value, self.layout.column_group)
        others = self.layout.column_shards - 1  # a ring sends each number on twice, but for a rank's own part
        self.traffic.sent[what] += 2 * others * value.nbytes // self.layout.column_shards
        return value


def _decode_into(wire: Wire, rows: Tensor, messages: Tensor, _: Tensor) -> Tensor:
    return rows.copy_(wire.decode(messages))


@dataclass(frozen=True)
class MergedPicks:
    """The picks of each token by ascending expert, where those of one expert by several heads are one.

    Nothing here depends on how many are left, so that the host need not wait for the device to know.

    Attributes:
        expert: ``[tokens, picks]`` int64, ascending within a token.
        order: ``[tokens, picks]`` int64, the places among the token's picks that they come from.
        kept: ``[tokens, picks]`` bool, the last pick of each expert.
    """

    expert: Tensor
    order: Tensor
    kept: Tensor

    @classmethod
    def of(cls, indices: Tensor) -> MergedPicks:
        """The merged picks of ``indices: [tokens, picks]`` int64 expert numbers."""
        expert, order = indices.sort(dim=1, stable=True)
        kept = torch.ones_like(expert, dtype=torch.bool)
        kept[:, :-1] = expert[:, 1:] != expert[:, :-1]
        return cls(expert, order, kept)

    def gates(self, gates: Tensor, sent: Tensor) -> Tensor:
        """The sum of the gates of each expert of a token, in a fixed order of the sum; differentiable in ``gates``.

        Args:
            gates: ``[tokens, picks]``, in the order of the indices.
            sent: ``[sent picks]`` int64, places in the flattened ``[tokens * picks]``, each once: all that are kept, or
                all. What is given for the others has no meaning.

        Returns:
            ``[sent picks]``.
        """
        return _MergedGates.apply(gates, self, sent)


class _MergedGates(torch.autograd.Function):
    """:meth:`MergedPicks.gates`. An ``index_add`` would be atomic on GPUs, and its order that of the moment."""

    @staticmethod
    def forward(ctx: Any, gates: Tensor, picks: MergedPicks, sent: Tensor) -> Tensor:
        ctx.save_for_backward(picks.order, picks.kept, sent)
        total, step = gates.gather(1, picks.order), 1
        while step < total.shape[1]:  # a scan: each takes the sum up to twice as many places back, of its own expert
            same = picks.expert[:, step:] == picks.expert[:, :-step]
            total[:, step:] += torch.where(same, total[:, :-step], 0.0)
            step *= 2
        return total.view(-1)[sent]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dsent: Tensor) -> tuple[Tensor, None, None]:
        order, kept, sent = ctx.saved_tensors
        flat = kept.view(-1)
        number = flat.cumsum(0) - flat.to(torch.int64)  # of the expert among those of all tokens
        # that of a place that is not kept, if there is one, goes to where there is then no expert
        number_sent = torch.where(flat[sent], number[sent], len(sent) - 1)
        of_expert = torch.empty_like(dsent).index_copy_(0, number_sent, dsent)
        return (
            torch.empty_like(order, dtype=dsent.dtype).scatter_(1, order, of_expert[number].view_as(order)),
            None,
            None,
        )


def plan_exchange(
    picks: MergedPicks, layout: GridLayout, traffic: Traffic, parts: int = 1
) -> tuple[ExchangePlan, Tensor]:
    """Work out, with every other owner, who sends what to whom. Collective over the layout's domain.

    Args:
        picks: of the tokens at home.
        layout: the grid of owners.
        traffic: adds up what was sent.
        parts: number of contiguous parts in which they travel, the same on all ranks; some may be empty.

    Returns:
        The plan, and ``sent: [sent picks]`` int64, the kept places of ``[tokens * picks]`` in sending order.
    """
    tokens, of_token = picks.expert.shape
    starts, blocks = layout.first_rows(picks.expert.device), layout.row_shards * parts
    token = torch.arange(tokens, dtype=torch.int64, device=starts.device)
    part = ((token + 1) * parts - 1) // max(1, tokens)  # part p begins with token tokens * p // parts
    owner = torch.bucketize(picks.expert, starts, right=True) - 1
    block = torch.where(picks.kept, owner * parts + part[:, None], blocks).to(torch.int32)  # the others come last
    block, sent = block.view(-1).sort(stable=True)

    token = sent // max(1, of_token)
    fresh = torch.ones_like(token, dtype=torch.bool)  # the first pick of a (shard, token) pair
    fresh[1:] = (block[1:] != block[:-1]) | (token[1:] != token[:-1])
    messages = F.pad(fresh.cumsum(0), (1, 0))
    edges = torch.searchsorted(block, torch.arange(blocks + 1, dtype=torch.int32, device=block.device))
    counts = torch.stack([messages[edges].diff(), edges.diff()], dim=1)
    sizes, received = _exchange_counts(counts.view(layout.row_shards, parts, 2), layout, traffic)
    sent_tokens, sent_picks = sizes.sum((0, 1)).tolist()

    sent = sent[:sent_picks]
    numbers = torch.arange(1, sent_tokens + 1, dtype=torch.int64, device=messages.device)
    begin = torch.searchsorted(messages[1:], numbers)
    picks_of_token = F.pad(begin, (0, 1), value=sent_picks).diff().to(torch.int32)
    local = picks.expert.view(-1)[sent] - starts[block[:sent_picks] // parts]
    token_route, pick_route = (
        ColumnRoute.of(sizes[..., unit], received[..., unit], layout, traffic) for unit in (_TOKENS, _PICKS)
    )
    picks_of_token = token_route.at_owners(token_route.start_to_owners(picks_of_token, "picks").wait(), "picks")
    rows = pick_route.at_owners(pick_route.start_to_owners(local.to(torch.int32), "picks").wait(), "picks")
    traffic.picks_received += rows.numel()
    traffic.tokens += tokens
    traffic.tokens_received += picks_of_token.numel()
    plan = ExchangePlan(
        layout=layout,
        traffic=traffic,
        parts=_parts(token[begin], tokens, sizes, received, layout),
        route=pick_route,
        tokens=tokens,
        picks=Picks(F.pad(picks_of_token.cumsum(0), (1, 0)), rows.long()),
    )
    return plan, sent


def _exchange_counts(sent: Tensor, layout: GridLayout, traffic: Traffic) -> tuple[np.ndarray, np.ndarray]:
    """Tell the other owners how much they will receive, and wait for the device: all_to_all wants sizes on the host.

    Args:
        sent: ``[row, part, 2]`` int64 on the device, the tokens and the picks that this home sends to each row shard.

    Returns:
        ``sent``, and ``[row, column, part, 2]`` int64, what the home ``row, column`` sends to this row shard; both on
        the host.
    """
    received = layout.transport.counts(sent, layout.row_group)
    traffic.sent["counts"] += (len(sent) - 1) * sent[0].nbytes
    sizes = [len(sent)] * layout.column_shards
    received = _pass_on(received, sizes, layout, traffic, "counts").view(-1, *sent.shape).transpose(0, 1)
    counts = on_host(torch.cat([sent[:, None], received], dim=1))
    return counts[:, 0], counts[:, 1:]


def on_host(counts: Tensor) -> np.ndarray:
    """Numbers on the host, where small sums are fast: the one wait for the device in a forward pass of a layer."""
    return counts.cpu().numpy()


def _parts(token: Tensor, at_home: int, sent: np.ndarray, received: np.ndarray, layout: GridLayout) -> list[Part]:
    """The parts in which tokens travel.

    Args:
        token: ``[sent tokens]`` int64, the home row of each sent token, in blocks ``[row, part]``.
        at_home: how many tokens there are at home.
        sent, received: from :func:`_exchange_counts`.
    """
    tokens = sent[..., _TOKENS]  # [row, part]
    by_part = np.arange(tokens.size).reshape(tokens.shape).T.flatten().tolist()
    token_of_part = _in_order(token, tokens.flatten().tolist(), by_part).split(tokens.sum(0).tolist())
    lengths = np.array([layout.wire.length(width) for width in layout.widths])
    home_messages = tokens[:, None] * lengths[:, None]  # [row, column, part], as are the owner's
    owner_messages = received[..., _TOKENS] * layout.wire.length(len(layout.columns))
    sizes = received.sum((0, 1))  # [part, 2], as are ends and begins
    ends = sizes.cumsum(0)
    begins = ends - sizes
    return [
        Part(
            home=slice(at_home * part // tokens.shape[1], at_home * (part + 1) // tokens.shape[1]),
            token=token_of_part[part],
            send=tokens[:, part].tolist(),
            home_messages=home_messages[..., part].flatten().tolist(),
            owner_messages=owner_messages[..., part].flatten().tolist(),
            tokens=slice(int(begins[part, _TOKENS]), int(ends[part, _TOKENS])),
            picks=slice(int(begins[part, _PICKS]), int(ends[part, _PICKS])),
        )
        for part in range(tokens.shape[1])
    ]
