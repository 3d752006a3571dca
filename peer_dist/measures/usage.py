"""Measures how many of the experts are used, and how evenly (PEER, section 3.3.2 and table 3)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from peer_dist.sharding.grid import first_of

_DECADES = 5  # powers of ten that the histogram has on both sides of an even share
_OVERLAP_TOKENS = 64  # tokens of each forward pass that the heads' overlap is measured on: enough for a mean


@dataclass(frozen=True)
class UsageSummary:
    """Expert usage over a number of tokens.

    Attributes:
        usage_percent: percentage of experts to which some token gave a gate other than 0.
        top1_usage_percent: percentage of experts that were the best of some head for some token.
        dead_experts: number of experts to which no token gave a gate other than 0.
        never_first_experts: number of experts that were no head's best for any token.
        unevenness: ``log N + sum z log z`` in nats, the KL divergence of the gates' distribution ``z`` over the ``N``
            experts from the uniform one; 0 is even.
        unevenness_if_uniform: the expected unevenness of as many equal picks of uniformly random experts: few picks
            look uneven even then.
        picks_per_expert: mean number of picks per expert.
    """

    usage_percent: float
    top1_usage_percent: float
    dead_experts: int
    never_first_experts: int
    unevenness: float
    unevenness_if_uniform: float
    picks_per_expert: float


@dataclass(frozen=True)
class WindowSummary(UsageSummary):
    """Usage over a window of training steps.

    Attributes:
        picks_per_shard_max_over_mean: picks of the row shard with most of them over the shards' mean; 1 is balanced.
    """

    picks_per_shard_max_over_mean: float


@dataclass(frozen=True)
class HeadSpread:
    """How the heads of a layer differ, over a window of training steps.

    Attributes:
        head_top1_usage_percent_min, head_top1_usage_percent_max: least and largest percentage, over the heads, of
            experts that were the head's best for some token.
        head_overlap: fraction of a head's picks for a token that another head has too, the mean over pairs of heads.
    """

    head_top1_usage_percent_min: float
    head_top1_usage_percent_max: float
    head_overlap: float


def uniform_unevenness(num_experts: int, picks: int) -> float:
    """The expected unevenness of ``picks`` equal picks of uniformly random experts, in nats.

    It is ``log N - log P + (N / P) E[c log c]`` with ``c`` binomial (P, 1/N), which tends to ``(N - 1) / (2 P)`` for
    many picks per expert.
    """
    if num_experts == 1 or picks == 0:
        return 0.0
    mean = picks / num_experts
    spread = 12 * math.sqrt(mean) + 40
    low, high = max(0, int(mean - spread)), min(picks, int(mean + spread))
    count = torch.arange(low, high + 1, dtype=torch.float64, device="cpu")
    log_p = (
        math.lgamma(picks + 1)
        - torch.lgamma(count + 1)
        - torch.lgamma(picks - count + 1)
        - count * math.log(num_experts)
        + (picks - count) * math.log1p(-1 / num_experts)
    )
    expected = float((log_p.exp() * torch.special.xlogy(count, count)).sum())
    return math.log(num_experts) - math.log(picks) + expected / mean


def unevenness(mass: Tensor) -> float:
    """``log N + sum z log z`` in nats for ``z = mass / sum of mass``, float64 ``[N]``; 0 if there is no mass."""
    total = mass.sum()
    if total == 0:
        return 0.0
    z = mass / total
    return math.log(mass.numel()) + float(torch.special.xlogy(z, z).sum())


def summarize(mass: Tensor, first: Tensor, picks: int) -> UsageSummary:
    """The summary of some picks.

    Args:
        mass: sum of the gates of each expert, float64 ``[num_experts]``.
        first: whether each expert was the best of a head for some token, bool ``[num_experts]``.
        picks: number of picks, over all tokens and heads.
    """
    n, used, ever_first = mass.numel(), int((mass != 0).sum()), int(first.sum())
    return UsageSummary(
        usage_percent=100 * used / n,
        top1_usage_percent=100 * ever_first / n,
        dead_experts=n - used,
        never_first_experts=n - ever_first,
        unevenness=unevenness(mass),
        unevenness_if_uniform=uniform_unevenness(n, picks),
        picks_per_expert=picks / n,
    )


def shared_picks(indices: Tensor) -> Tensor:
    """The number of picks that two heads have in common for a token, summed over tokens: ``[heads, heads]`` int64.

    Args:
        indices: picked experts, int64 ``[tokens, heads, top_k]``, distinct within a head.
    """
    heads, top_k = indices.shape[1:]
    number = torch.arange(heads, dtype=torch.int64, device=indices.device).repeat_interleave(top_k)
    picks = (indices.flatten(1) * heads + number).sort(1).values
    expert, head = picks // heads, picks % heads
    pairs = torch.zeros(heads * heads, dtype=torch.int64, device=indices.device)
    for apart in range(1, heads):  # the picks of one expert are neighbours, in the order of heads
        pair = head[:, :-apart] * heads + head[:, apart:]
        pairs.index_add_(0, pair.flatten(), (expert[:, apart:] == expert[:, :-apart]).flatten().long())
    shared = pairs.view(heads, heads)
    return shared + shared.T + torch.diag(torch.full_like(shared[0], indices[:, 0].numel()))


def share_histogram(shares: Tensor) -> tuple[list[float], list[float]]:
    """A histogram of the experts in use by log10 of their shares.

    Args:
        shares: from :meth:`ExpertUsage.shares`.

    Returns:
        The number of experts in each bucket, and the buckets' upper limits.
    """
    counts = torch.histc(shares[shares != 0].log10().clamp(-_DECADES, _DECADES), 10 * _DECADES, -_DECADES, _DECADES)
    limits = torch.linspace(-_DECADES, _DECADES, 10 * _DECADES + 1, dtype=torch.float32, device="cpu")[1:]
    return counts.tolist(), limits.tolist()


class ExpertUsage:
    """Adds up a layer's gates per expert while it trains. Assign it to the layer's ``on_route``.

    It holds two numbers of 8 bytes per expert, and a bit per expert and head, on the layer's device. The unevenness of
    single heads would need a number per expert and head; `peer-dist usage` measures it.
    """

    def __init__(self, num_experts: int, device: torch.device) -> None:
        self._mass = torch.zeros(num_experts, dtype=torch.float64, device=device)
        self._counts = torch.zeros(num_experts, dtype=torch.int64, device=device)
        self._first = torch.zeros(0, num_experts, dtype=torch.uint8, device=device)  # a bit per head
        self._shared = torch.zeros(0, 0, dtype=torch.int64, device=device)

    def __call__(self, indices: Tensor, gates: Tensor) -> None:
        """Add a forward pass's picks and gates, both ``[tokens, heads, top_k]``, the best first along the last axis."""
        heads = indices.shape[1]
        if not len(self._shared):
            self._first = self._first.new_zeros(-(-heads // 8), self._first.shape[1])
            self._shared = self._shared.new_zeros(heads, heads)
        flat = indices.reshape(-1)
        self._mass.index_add_(0, flat, gates.reshape(-1).double())
        self._counts.index_add_(0, flat, torch.ones_like(flat))
        for head in range(heads):
            self._first[head // 8][indices[:, head, 0]] |= 1 << head % 8
        self._shared += shared_picks(indices[:_OVERLAP_TOKENS])

    def reset(self) -> None:
        """Begin the next window."""
        for tensor in (self._mass, self._counts, self._first, self._shared):
            tensor.zero_()

    def shares(self, group: dist.ProcessGroup | None = None) -> Tensor:
        """Each expert's share of the gates over the mean share, float64 ``[num_experts]``. A collective call."""
        mass = _sum(self._mass, group)
        return mass * (mass.numel() / max(float(mass.sum()), 1e-300))  # if all gates are 0, so are the shares

    def summary(self, shards: int, group: dist.ProcessGroup | None = None) -> WindowSummary:
        """The usage by all tokens that the ranks of ``group`` have seen since the last reset. A collective call.

        Args:
            shards: number of row shards, between which the balance is measured.
            group: the ranks to sum over; None for this rank alone.
        """
        counts, first = _sum(self._counts, group), torch.zeros_like(self._counts, dtype=torch.bool)
        for byte in self._first:
            first |= _sum((byte != 0).to(torch.uint8), group, dist.ReduceOp.MAX) != 0
        n, picks = counts.numel(), int(counts.sum())
        starts = first_of(n, torch.arange(shards, dtype=torch.int64, device=counts.device), shards)
        number = torch.arange(n, dtype=torch.int64, device=counts.device)
        owner = torch.bucketize(number, starts, right=True) - 1
        per_shard = torch.zeros(shards, dtype=torch.int64, device=counts.device).index_add_(0, owner, counts)
        return WindowSummary(
            **vars(summarize(_sum(self._mass, group), first, picks)),
            picks_per_shard_max_over_mean=float(per_shard.max()) * shards / max(1, picks),
        )

    def head_spread(self, group: dist.ProcessGroup | None = None) -> HeadSpread | None:
        """How the heads differ since the last reset; None for a layer with a single head. A collective call."""
        heads, n = len(self._shared), self._mass.numel()
        if heads < 2:
            return None
        top1 = [
            100 * int(_sum(self._first[head // 8] >> head % 8 & 1, group, dist.ReduceOp.MAX).sum()) / n
            for head in range(heads)
        ]
        shared = _sum(self._shared, group)
        own = float(shared.diagonal().sum())
        return HeadSpread(
            head_top1_usage_percent_min=min(top1),
            head_top1_usage_percent_max=max(top1),
            head_overlap=(float(shared.sum()) - own) / (max(own, 1.0) * (heads - 1)),
        )


def _sum(value: Tensor, group: dist.ProcessGroup | None, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """A copy of ``value``, reduced over the ranks of ``group``."""
    value = value.clone()
    if group is not None:
        dist.all_reduce(value, op, group)
    return value
