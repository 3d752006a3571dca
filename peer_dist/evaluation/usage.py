"""How many of the experts are used, and how evenly (PEER, section 3.3.2 and table 3)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class UsageSummary:
    """Expert usage over a window of tokens.

    Attributes:
        usage_percent: share of experts that any token gave a gate other than 0.
        top1_usage_percent: share of experts that were the best of some head for some token.
        unevenness: ``log N + sum z log z`` in nats, the KL divergence of the gates' distribution ``z`` over
            experts from the uniform one; 0 is even.
        unevenness_if_uniform: what as many equal picks of uniformly random experts would be expected to give:
            few picks look uneven however they were made.
        picks_per_shard_max_over_mean: imbalance of the picks between equal row ranges, 1 is balanced.
    """

    usage_percent: float
    top1_usage_percent: float
    unevenness: float
    unevenness_if_uniform: float
    picks_per_shard_max_over_mean: float


def uniform_unevenness(num_experts: int, picks: int) -> float:
    """Expected unevenness of ``picks`` equal picks of uniformly random experts, in nats.

    ``log N - log P + (N / P) E[c log c]`` with ``c`` binomial (P, 1/N). For many picks per expert it tends to
    ``(N - 1) / (2 P)``.
    """
    if num_experts == 1 or picks == 0:
        return 0.0
    mean = picks / num_experts
    spread = 12 * math.sqrt(mean) + 40
    low, high = max(0, int(mean - spread)), min(picks, int(mean + spread))
    count = torch.arange(low, high + 1, dtype=torch.float64)
    log_p = (
        math.lgamma(picks + 1)
        - torch.lgamma(count + 1)
        - torch.lgamma(picks - count + 1)
        - count * math.log(num_experts)
        + (picks - count) * math.log1p(-1 / num_experts)
    )
    expected = float((log_p.exp() * torch.special.xlogy(count, count)).sum())
    return math.log(num_experts) - math.log(picks) + expected / mean


class ExpertUsage:
    """Adds up a layer's gates per expert; feed it to ``PEER.on_route``.

    Holds ``num_experts`` float64 and bool on the layer's device.
    """

    def __init__(self, num_experts: int, device: torch.device) -> None:
        self._mass = torch.zeros(num_experts, dtype=torch.float64, device=device)
        self._best = torch.zeros(num_experts, dtype=torch.bool, device=device)
        self._counts = torch.zeros(num_experts, dtype=torch.int64, device=device)

    def __call__(self, indices: Tensor, gates: Tensor) -> None:
        """Add the picks ``[tokens, heads, top_k]`` of one forward pass, best first along the last axis."""
        flat = indices.reshape(-1)
        self._mass.index_add_(0, flat, gates.reshape(-1).double())
        self._counts.index_add_(0, flat, torch.ones_like(flat))
        self._best[indices[..., 0].reshape(-1)] = True

    def reset(self) -> None:
        for tensor in (self._mass, self._best, self._counts):
            tensor.zero_()

    def summary(self, shards: int, group: dist.ProcessGroup | None = None) -> UsageSummary:
        """Over all tokens seen by the ranks of ``group`` since the last reset. A collective call."""
        mass, best, counts = self._mass.clone(), self._best.to(torch.int32), self._counts.clone()
        if group is not None:
            for tensor in (mass, best, counts):
                dist.all_reduce(tensor, group=group)
        n, picks = mass.numel(), int(counts.sum())
        z = mass / mass.sum().clamp(min=torch.finfo(torch.float64).tiny)
        starts = torch.tensor([n * shard // shards for shard in range(shards)], device=counts.device)
        owner = torch.bucketize(torch.arange(n, device=counts.device), starts, right=True) - 1
        per_shard = torch.zeros(shards, dtype=torch.int64, device=counts.device).index_add_(0, owner, counts)
        return UsageSummary(
            usage_percent=100 * int((mass != 0).sum()) / n,
            top1_usage_percent=100 * int((best > 0).sum()) / n,
            unevenness=math.log(n) + float(torch.special.xlogy(z, z).sum()) if picks else 0.0,
            unevenness_if_uniform=uniform_unevenness(n, picks),
            picks_per_shard_max_over_mean=float(per_shard.max()) * shards / max(1, picks),
        )
