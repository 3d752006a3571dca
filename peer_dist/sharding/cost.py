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
    starts = torch.tensor([first_of(num_experts, shard, row_shards) for shard in range(row_shards)])
    token, expert, _ = merge_picks(indices, torch.zeros(indices.shape))
    owner = torch.bucketize(expert, starts, right=True) - 1
    each = torch.bincount(token * row_shards + owner, minlength=len(indices) * row_shards).view(
        len(indices), row_shards
    )
    tokens, picks = (each > 0).sum(0), each.sum(0)

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
