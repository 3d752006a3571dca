"""Cross-entropy over a vocabulary that is split over tensor ranks, without float32 copies of all logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BLOCK = {"cpu": 2**18, "cuda": 2**24}
"""Logits that are in float32 at once: few enough for a CPU's caches; on a GPU 64 MiB, for few kernels."""


def cross_entropy(logits: Tensor, labels: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The negative logarithm of each label's probability. A collective call.

    Sums are in float32, or in float64 for float64 logits. The backward pass turns the logits into their gradient where
    they are, so it runs once, and nothing else may keep them.

    Args:
        logits: [..., words], contiguous: the scores of this rank's words, of which all ranks have as many.
        labels: int64 [...], numbers of words in the whole vocabulary.
        group: the ranks over which the vocabulary is split, in its order.

    Returns:
        [...], of the dtype of the sums; the same on all ranks of the group.
    """
    return _CrossEntropy.apply(logits, labels, group)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, group: dist.ProcessGroup) -> Tensor:
        words = logits.shape[-1]
        rows, wide = logits.view(-1, words), torch.promote_types(logits.dtype, torch.float32)
        own = labels.view(-1, 1) - group.rank() * words
        here = (own >= 0) & (own < words)
        own = own.masked_fill(~here, 0)
        alone = group.size() == 1
        # the likeliest word, whose logit is finite where one is, tells the sum of all
        asked = own if alone else torch.cat([own, rows.argmax(-1, keepdim=True)], 1)
        logs = torch.cat([rows[block].log_softmax(-1, dtype=wide).gather(1, asked[block]) for block in _blocks(rows)])
        shift = None
        if not alone:
            sums = rows.gather(1, asked[:, 1:]) - logs[:, 1:]
            largest = sums.clone()
            dist.all_reduce(largest, dist.ReduceOp.MAX, group)
            total = (sums - largest).exp()
            dist.all_reduce(total, group=group)
            shift = largest + total.log() - sums
            logs = (logs[:, :1] - shift).masked_fill(~here, 0)
            dist.all_reduce(logs, group=group)
        ctx.save_for_backward(logits, own, here, shift)
        return -logs.view_as(labels)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        logits, own, here, shift = ctx.saved_tensors
        result, scale = logits.detach(), gradients[0].reshape(-1, 1)
        rows, factor = result.view(-1, logits.shape[-1]), scale if shift is None else scale * (-shift).exp()
        for block in _blocks(rows):
            shares = rows[block].softmax(-1, dtype=scale.dtype)
            at_label = shares.gather(1, own[block]) * factor[block] - scale[block] * here[block]
            torch.mul(shares, factor[block], out=rows[block])
            rows[block].scatter_(1, own[block], at_label.to(rows.dtype))
        return result, None, None


def _blocks(rows: Tensor) -> Iterator[slice]:
    """Stretches of rows ``[rows, words]`` that are in float32 at once."""
    size = max(1, BLOCK["cpu" if rows.device.type == "cpu" else "cuda"] // rows.shape[1])
    return (slice(begin, begin + size) for begin in range(0, max(1, len(rows)), size))
