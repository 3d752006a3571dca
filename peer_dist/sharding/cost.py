"""What a grid's exchanges put on the wire: exactly, from the picks of the tokens at home, or for uniform picks."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from peer_dist.sharding.exchange import MergedPicks
from peer_dist.sharding.grid import first_of
from peer_dist.sharding.wire import AS_IT_IS, Wire

COUNT = 4  # bytes of a row number, and of a token's number of picks
PARTIAL = 4  # bytes of a partial dot product
SIZE = 8  # bytes of the size of a message
_COUNTED = 1 << 22  # experts whose probabilities are listed one by one


@dataclass(frozen=True)
class ExchangeBytes:
    """Bytes between ranks for the tokens of one home, what stays on a rank left out.

    Attributes:
        rows_forward, rows_backward: slices of ``x``, ``y`` and of their gradients, over the whole domain.
        picks_forward, picks_backward: between a home and the owners in its column.
        column_forward, column_backward: between the owners of a row shard's columns.
        hits: mean number of distinct row shards that a token hits (``m``).
        picks: mean number of distinct experts that it picks.
    """

    rows_forward: float
    rows_backward: float
    picks_forward: float
    picks_backward: float
    column_forward: float
    column_backward: float
    hits: float
    picks: float

    @property
    def forward(self) -> float:
        """Bytes of the forward pass between homes and owners."""
        return self.rows_forward + self.picks_forward

    @property
    def backward(self) -> float:
        """Bytes of the backward pass between homes and owners."""
        return self.rows_backward + self.picks_backward

    @property
    def total(self) -> float:
        """All bytes, forward and backward, between homes and owners and between owners."""
        return self.forward + self.backward + self.column_forward + self.column_backward


@dataclass(frozen=True)
class Routes:
    """Where the tokens of one home go: (token, row shard) pairs and distinct picks, all of them and those of the home's
    own row shard.
    """

    tokens: float
    pairs: float
    own_pairs: float
    picks: float
    own_picks: float

    @classmethod
    def of(cls, indices: Tensor, num_experts: int, row_shards: int, row: int) -> Routes:
        """The routes of ``indices: [tokens, picks]``, global expert numbers of all heads, from row shard ``row``."""
        tokens, picks = (counts.tolist() for counts in _hits(indices, num_experts, row_shards))
        return cls(len(indices), sum(tokens), tokens[row], sum(picks), picks[row])

    @classmethod
    def uniform(
        cls, tokens: float, num_experts: int, heads: int, top_k: int, row_shards: int, hits: float | None = None
    ) -> Routes:
        """The expected routes where each head picks ``top_k`` distinct experts, all equally likely.

        Args:
            hits: row shards that a token hits, if it is known better.
        """
        if hits is None:
            edges = [first_of(num_experts, shard, row_shards) for shard in range(row_shards + 1)]
            sizes = Counter(end - begin for begin, end in pairwise(edges))  # two or three kinds, however many shards
            hits = sum(number * (1 - _missed(num_experts, size, heads, top_k)) for size, number in sizes.items())
        pairs = tokens * hits
        picks = tokens * num_experts * (1 - (1 - top_k / num_experts) ** heads)
        return cls(tokens, pairs, pairs / row_shards, picks, picks / row_shards)


def _missed(num_experts: int, shard: int, heads: int, top_k: int) -> float:
    """The probability that a token's picks are all outside a shard of so many experts."""
    return math.prod(max(0.0, num_experts - shard - i) / (num_experts - i) for i in range(top_k)) ** heads


def exchange_bytes(
    indices: Tensor,
    num_experts: int,
    dim: int,
    row_shards: int,
    column_shards: int,
    home: int = 0,
    itemsize: int = 2,
    gate_itemsize: int = 4,
    values: bool = False,
    wire: Wire = AS_IT_IS,
) -> ExchangeBytes:
    """Exactly what :class:`peer_dist.sharding.Traffic` counts over all ranks for these tokens, sizes of messages
    (:func:`size_bytes`) left out.

    Args:
        indices: ``[tokens, picks]`` int64 global expert numbers, of all heads.
        home: the tokens' rank in the domain.
        itemsize: bytes of an element of ``x``, ``y`` and their gradients.
        gate_itemsize: bytes of a gate and of its gradient.
        values: of product-key memory: ``x`` does not travel, so that there is no ``dx`` and no sum of dots forward.
        wire: in what form rows travel.
    """
    row, column = divmod(home, column_shards)
    own_width = first_of(dim, column + 1, column_shards) - first_of(dim, column, column_shards)
    routes = Routes.of(indices, num_experts, row_shards, row)
    return bytes_of(routes, dim, own_width, column_shards, itemsize, gate_itemsize, values, wire)


def bytes_of(
    routes: Routes,
    dim: int,
    own_width: float,
    column_shards: int,
    itemsize: int,
    gate_itemsize: int = 4,
    values: bool = False,
    wire: Wire = AS_IT_IS,
) -> ExchangeBytes:
    """:func:`exchange_bytes` of routes; ``own_width`` is the home's number of columns."""
    elements = routes.pairs * dim - routes.own_pairs * own_width
    slices = routes.pairs * column_shards - routes.own_pairs
    away_pairs, away_picks = routes.pairs - routes.own_pairs, routes.picks - routes.own_picks
    ring = 2 * (column_shards - 1) * routes.picks * PARTIAL
    gathered = (column_shards - 1) * (routes.pairs * COUNT + routes.picks * (COUNT + gate_itemsize))
    ways = (elements * wire.itemsize(itemsize) + slices * wire.beside) * (1 if values else 2)
    return ExchangeBytes(
        rows_forward=ways,
        rows_backward=ways,
        picks_forward=away_pairs * COUNT + away_picks * (COUNT + gate_itemsize),
        picks_backward=away_picks * gate_itemsize,
        column_forward=gathered if values else gathered + ring,
        column_backward=ring,
        hits=routes.pairs / max(1, routes.tokens),
        picks=routes.picks / max(1, routes.tokens),
    )


def size_bytes(row_shards: int, column_shards: int, parts: int = 1) -> tuple[int, int]:
    """Bytes of the sizes of messages, which a rank sends in a forward pass.

    Returns:
        Bytes to the owners of the other rows in its column, and to those of the other columns in its row.
    """
    pair = parts * 2 * SIZE  # tokens and picks
    return (row_shards - 1) * pair, (column_shards - 1) * row_shards * pair


def exchange_pairs(
    indices: Tensor,
    num_experts: int,
    dim: int,
    row_shards: int,
    column_shards: int,
    home: int = 0,
    itemsize: int = 2,
    gate_itemsize: int = 4,
    values: bool = False,
    wire: Wire = AS_IT_IS,
) -> Tensor:
    """Who sends how much of :func:`exchange_bytes`, forward and backward, to whom.

    A ring sums the partial dot products: each of a row shard's owners sends to the next. (A group of two may do without
    one; the bytes are the same.)

    Returns:
        ``[ranks, ranks]`` int64, bytes from the row's rank of the domain to the column's.
    """
    tokens, picks = _hits(indices, num_experts, row_shards)
    row, column = divmod(home, column_shards)
    widths = torch.tensor(
        [
            first_of(dim, shard + 1, column_shards) - first_of(dim, shard, column_shards)
            for shard in range(column_shards)
        ],
        dtype=torch.int64,
        device=tokens.device,
    )
    ways = 1 if values else 2  # x (or nothing) and dy out, y and dx (or nothing) home
    slices = ways * tokens[:, None] * (wire.itemsize(itemsize) * widths + wire.beside)  # [row shards, column shards]
    pairs = torch.zeros((row_shards, column_shards) * 2, dtype=torch.int64, device=tokens.device)
    pairs[row, column] += slices
    pairs[:, :, row, column] += slices
    numbers = tokens * COUNT + picks * (COUNT + gate_itemsize)
    pairs[row, column, :, column] += numbers
    pairs[:, column, row, column] += picks * gate_itemsize
    ring = ways * 2 * (column_shards - 1) * picks * PARTIAL // column_shards
    for shard in range(row_shards):
        pairs[shard, column, shard] += numbers[shard]
        for sender in range(column_shards):
            pairs[shard, sender, shard, (sender + 1) % column_shards] += ring[shard]
    ranks = row_shards * column_shards
    return pairs.view(ranks, ranks).fill_diagonal_(0)


def synthetic_picks(
    num_experts: int, tokens: int, picks: int, zipf: float = 0.0, device: torch.device | str = "cpu"
) -> Tensor:
    """Experts ``[tokens, picks]`` int64: uniform or, with an exponent ``zipf``, by Zipf's law in a random order.

    A token may pick an expert twice, as when two of its heads pick the same one.
    """
    shape = (tokens, picks)
    if zipf == 0:
        return torch.randint(num_experts, shape, dtype=torch.int64, device=device)
    if num_experts > max(_COUNTED, 4 * tokens * picks):
        return _of_many(num_experts, shape, zipf, device)
    weight = torch.arange(1, num_experts + 1, device=device, dtype=torch.float64).pow(-zipf)
    ranks = torch.searchsorted(weight.cumsum(0) / weight.sum(), torch.rand(shape, device=device, dtype=torch.float64))
    order = torch.randperm(num_experts, dtype=torch.int64, device=device)
    return order[ranks.clamp(max=num_experts - 1)]


def _of_many(num_experts: int, shape: tuple[int, int], zipf: float, device: torch.device | str) -> Tensor:
    """Picks by Zipf's law where the experts are too many to list: the first ranks are counted, and of the others the
    law is taken as continuous.
    """
    weight = torch.arange(1, _COUNTED + 1, device=device, dtype=torch.float64).pow(-zipf)
    counted, first = weight.cumsum(0), _COUNTED + 0.5
    power = 1 - zipf

    def others(end: float) -> float:
        return math.log(end / first) if power == 0 else (end**power - first**power) / power

    drawn = torch.rand(shape, device=device, dtype=torch.float64) * (float(counted[-1]) + others(num_experts + 0.5))
    beyond = (drawn - counted[-1]).clamp(min=0)
    continuous = first * beyond.exp() if power == 0 else (first**power + power * beyond).pow(1 / power)
    rank = torch.where(beyond > 0, continuous.round().long() - 1, torch.searchsorted(counted, drawn))
    distinct, number = rank.clamp(max=num_experts - 1).unique(return_inverse=True)
    # twice as many numbers as are needed: some come again
    order = torch.randint(num_experts, (2 * len(distinct),), dtype=torch.int64, device=device).unique()
    return order[torch.randperm(len(order), dtype=torch.int64, device=device)][number]


def _hits(indices: Tensor, num_experts: int, row_shards: int) -> tuple[Tensor, Tensor]:
    """``[row shards]`` int64 each: the tokens that hit a shard, and the distinct picks of them that it has."""
    shards = torch.arange(row_shards, dtype=torch.int64, device=indices.device)
    starts = first_of(num_experts, shards, row_shards)
    merged = MergedPicks.of(indices)
    token = merged.kept.nonzero()[:, 0]
    owner = torch.bucketize(merged.expert[merged.kept], starts, right=True) - 1
    picks = torch.bincount(token * row_shards + owner, minlength=len(indices) * row_shards)
    picks = picks.view(len(indices), row_shards)  # of each token in each row shard
    return (picks > 0).sum(0), picks.sum(0)
