"""What a grid's exchanges put on the wire, counted from the picks of the tokens at home."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peer_dist.sharding.exchange import merge_picks
from peer_dist.sharding.layout import first_of

COUNT = 4  # bytes of a row number, and of a token's number of picks
PARTIAL = 4  # bytes of a partial dot product


@dataclass(frozen=True)
class ExchangeBytes:
    """Bytes between ranks for the tokens of one home, what stays on a rank left out.

    Attributes:
        forward, backward: between homes and owners.
        column_forward, column_backward: between the owners of a row shard's columns.
        hits: mean number of distinct row shards that a token hits (``m``).
    """

    forward: int
    backward: int
    column_forward: int
    column_backward: int
    hits: float

    @property
    def total(self) -> int:
        return self.forward + self.backward + self.column_forward + self.column_backward


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
) -> ExchangeBytes:
    """Exactly what :class:`peer_dist.sharding.Traffic` counts over all ranks for these tokens, sizes of messages
    (16 bytes a pair of ranks, pass and part of the tokens) left out.

    Args:
        indices: ``[tokens, picks]`` int64 global expert numbers, of all heads.
        home: the tokens' rank in the domain.
        itemsize: bytes of an element of ``x``, ``y`` and their gradients.
        gate_itemsize: bytes of a gate and of its gradient.
        values: of product-key memory: ``x`` does not travel, so that there is no ``dx`` and no sum of dots forward.
    """
    tokens, picks = _hits(indices, num_experts, row_shards)

    row, column = divmod(home, column_shards)
    own_width = first_of(dim, column + 1, column_shards) - first_of(dim, column, column_shards)
    slices = int(tokens.sum()) * dim - int(tokens[row]) * own_width
    away_tokens, away_picks = (int(counts.sum() - counts[row]) for counts in (tokens, picks))
    all_tokens, all_picks = int(tokens.sum()), int(picks.sum())
    ring = 2 * (column_shards - 1) * all_picks * PARTIAL
    gathered = (column_shards - 1) * (all_tokens * COUNT + all_picks * (COUNT + gate_itemsize))
    ways = slices * itemsize * (1 if values else 2)
    return ExchangeBytes(
        forward=ways + away_tokens * COUNT + away_picks * (COUNT + gate_itemsize),
        backward=ways + away_picks * gate_itemsize,
        column_forward=gathered if values else gathered + ring,
        column_backward=ring,
        hits=all_tokens / max(1, len(indices)),
    )


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
        ]
    )
    ways = 1 if values else 2  # x (or nothing) and dy out, y and dx (or nothing) home
    slices = ways * itemsize * tokens[:, None] * widths  # [row shards, column shards]
    pairs = torch.zeros(row_shards, column_shards, row_shards, column_shards, dtype=torch.int64)
    pairs[row, column] += slices
    pairs[:, :, row, column] += slices
    numbers = tokens * COUNT + picks * (COUNT + gate_itemsize)
    pairs[row, column, :, column] += numbers
    pairs[:, column, row, column] += picks * gate_itemsize
    ring = ways * 2 * (column_shards - 1) * picks * PARTIAL // column_shards
    for shard in range(row_shards):
        pairs[shard, column, shard] += numbers[shard]
        for each in range(column_shards):
            pairs[shard, each, shard, (each + 1) % column_shards] += ring[shard]
    ranks = row_shards * column_shards
    return pairs.view(ranks, ranks).fill_diagonal_(0)


def synthetic_picks(
    num_experts: int, tokens: int, picks: int, zipf: float = 0.0, device: torch.device | str = "cpu"
) -> Tensor:
    """Experts ``[tokens, picks]`` int64: uniform or, with an exponent ``zipf``, by Zipf's law in a random order.

    A token may pick an expert twice, as two heads may.
    """
    shape = (tokens, picks)
    if zipf == 0:
        return torch.randint(num_experts, shape, device=device)
    weight = torch.arange(1, num_experts + 1, device=device, dtype=torch.float64).pow(-zipf)
    ranks = torch.searchsorted(weight.cumsum(0) / weight.sum(), torch.rand(shape, device=device, dtype=torch.float64))
    order = torch.randperm(num_experts, device=device)
    return order[ranks.clamp(max=num_experts - 1)]


def _hits(indices: Tensor, num_experts: int, row_shards: int) -> tuple[Tensor, Tensor]:
    """``[row shards]`` int64 each: the tokens that hit a shard, and the distinct picks of them that it has."""
    starts = torch.tensor([first_of(num_experts, shard, row_shards) for shard in range(row_shards)])
    token, expert, _ = merge_picks(indices, torch.zeros(indices.shape))
    owner = torch.bucketize(expert, starts, right=True) - 1
    each = torch.bincount(token * row_shards + owner, minlength=len(indices) * row_shards).view(
        len(indices), row_shards
    )
    return (each > 0).sum(0), each.sum(0)
