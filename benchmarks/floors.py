"""The least that each part of a layer's step must move through memory: arguments read once and results written once."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """A layer's sizes on one rank: ``experts`` are the whole layer's, of which it has its share."""

    tokens: int = 8192
    dim: int = 1024
    experts: int = 1024**2
    heads: int = 8
    top_k: int = 16
    key_dim: int = 128
    ranks: int = 1
    item: int = 2  # bytes of a number of x and of the tables

    @property
    def rows(self) -> int:
        """Of this rank's tables."""
        return self.experts // self.ranks

    @property
    def picks(self) -> int:
        """Of this rank's tokens; its tables are picked as often."""
        return self.tokens * self.heads * self.top_k

    def hit(self, picks: int, rows: int) -> int:
        """The mean number of distinct rows among so many uniform picks."""
        return round(rows * -math.expm1(picks * math.log1p(-1 / rows))) if rows > 1 else min(picks, rows)

    @property
    def sent(self) -> int:
        """Tokens that this rank sends, and receives: each goes once to every rank that it hits."""
        return self.tokens * self.hit(self.heads * self.top_k, self.ranks) if self.ranks > 1 else self.tokens


def update_floor(sizes: Sizes, kind: str, lazy: bool, stochastic: bool = False, eight_bit: bool = False) -> int:
    """Gradient read, moments and master read and written, the table written; without a master the table is read too.

    Tables of eight bits have gradients of ``item`` bytes a number, codes of one, and a scale of four for each row.
    """
    rows = 2 * (sizes.hit(sizes.picks, sizes.rows) if lazy else sizes.rows)
    numbers = sizes.dim * rows
    moments = {"adam": 16, "rowwise_adam": 8, "rowwise_adagrad": 0}[kind]
    if eight_bit:
        return numbers * (sizes.item + moments + 2) + rows * 8
    return numbers * (sizes.item + moments + (2 * sizes.item if stochastic else 8 + sizes.item))


def products_floor(sizes: Sizes, code_bytes: int, scale_bytes: int = 0) -> int:
    """The forward pass of the experts: the rows that are picked at all, of both tables, with their scales; x, y, and of
    each pick its expert, gate and pre-activation.
    """
    rows = 2 * sizes.hit(sizes.picks, sizes.rows) * (sizes.dim * code_bytes + scale_bytes)
    return rows + 2 * sizes.sent * sizes.dim * sizes.item + sizes.picks * (4 + 4 + 4)


def floors(sizes: Sizes, kind: str, lazy: bool, one_pass: bool = False) -> dict[tuple[str, str], int]:
    """Bytes that each part must move at least, by part and pass; with ``one_pass`` lazy tables have no gradients in
    memory, and what they are sums of is read for the norm and for the update.
    """
    d, item, picks = sizes.dim, sizes.item, sizes.picks
    x, queries = sizes.tokens * d * item, sizes.tokens * sizes.heads * sizes.key_dim * item
    weight, keys = sizes.heads * sizes.key_dim * d * item, math.isqrt(sizes.experts) * sizes.key_dim * item
    received = sizes.sent * d * item
    hit = sizes.hit(picks, sizes.rows)
    rows = 2 * hit * d * item  # of both tables
    grads = rows if lazy else 2 * sizes.rows * d * item
    gathered = 2 * received + picks * (4 + 4 + 4)  # rows in and out; expert, gate, pre-activation
    counted = {
        ("queries", "forward"): x + weight + queries + 2 * picks * 4,  # and gates from scores
        ("retrieval", "forward"): queries + keys + picks * (4 + 8),  # scores and numbers
        ("experts", "forward"): rows + gathered,
        ("experts", "backward"): rows + gathered + picks * 4,
        # three passes over the 20 bits of a million rows in pairs of 8 bytes, each after a histogram; where rows begin
        ("sort", "backward"): picks * 3 * (16 + 4) + 4 * (hit if lazy else sizes.rows),
        ("table gradients", "backward"): grads + 2 * received + picks * (4 + 4 + 4 + 4),  # order, token, two weights
        ("retrieval", "backward"): 2 * queries + 2 * keys + picks * (4 + 8),
        ("queries", "backward"): 2 * queries + 2 * x + 2 * weight + 3 * picks * 4,
        ("gradient norm", "forward"): grads,
        ("update of tables", "forward"): update_floor(sizes, kind, lazy),
    }
    if lazy and one_pass:
        sort, operands = counted.pop(("sort", "backward")), counted.pop(("table gradients", "backward")) - grads
        counted["gradient norm", "forward"] = sort + operands + 2 * sizes.rows * 4  # a number for each row
        counted["update of tables", "forward"] += operands - grads
    if sizes.ranks > 1:
        # rows are gathered, sent and received; sums at home read what arrived and write tokens
        counted["dispatch", "forward"] = counted["dispatch", "backward"] = x + 3 * received + 3 * picks * 4
        counted["combine", "forward"] = counted["combine", "backward"] = 3 * received + x
    return counted
