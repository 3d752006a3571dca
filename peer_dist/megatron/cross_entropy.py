"""Cross-entropy over a vocabulary that is split over tensor ranks, without float32 copies of all logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from peer_dist.kernels.dense import label_logs, logits_to_gradient


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
        rows = logits.view(-1, words)
        own = labels.view(-1, 1) - group.rank() * words
        here = (own >= 0) & (own < words)
        own = own.masked_fill(~here, 0)
        shift = None
        if group.size() == 1:
            logs, kept = label_logs(rows, own)
        else:
            # the likeliest word, whose logit is finite where one is, tells the sum of all
            likeliest = rows.argmax(-1, keepdim=True)
            logs, kept = label_logs(rows, likeliest)
            sums = rows.gather(1, likeliest) - logs
            largest = sums.clone()
            dist.all_reduce(largest, dist.ReduceOp.MAX, group)
            total = (sums - largest).exp()
            dist.all_reduce(total, group=group)
            all_words = largest + total.log()
            shift = all_words - sums
            logs = (rows.gather(1, own) - all_words).masked_fill(~here, 0)
            dist.all_reduce(logs, group=group)
        ctx.save_for_backward(logits, own, here, shift, kept)
        return -logs.view_as(labels)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        logits, own, here, shift, kept = ctx.saved_tensors
        result, scale = logits.detach(), gradients[0].reshape(-1, 1)
        factor = scale if shift is None else scale * (-shift).exp()
        logits_to_gradient(result.view(-1, logits.shape[-1]), own, kept, factor, scale * here)
        return result, None, None
