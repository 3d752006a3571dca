"""Product keys: the best of n * n keys by looking at n + n (Lample 2019; PEER, section 2.1)."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=64)
def _candidates(top_k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The pairs (i, j) of ranks that can be among the ``top_k`` largest sums: ``(i + 1) * (j + 1) <= top_k``.

    Every pair (i', j') with i' <= i and j' <= j scores at least as much, and there are (i + 1)(j + 1) of them.
    For 16 this leaves 50 of 256.
    """
    pairs = [(i, j) for i in range(top_k) for j in range(top_k) if (i + 1) * (j + 1) <= top_k]
    with torch.inference_mode(False):  # the cached tensors also serve training later
        first, second = torch.tensor(pairs, device=device).unbind(1)
    return first, second


def retrieve(query: Tensor, keys: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The ``top_k`` product keys of largest inner product with each query. Exact.

    Key ``(a, b)`` is the concatenation of sub-keys ``keys[0, a]`` and ``keys[1, b]``; its number is
    ``a * n + b``.

    Args:
        query: ``[tokens, heads, key_dim]``.
        keys: ``[2, n, key_dim / 2]``, shared by the heads, or ``[heads, 2, n, key_dim / 2]``.
        top_k: at most ``n``.

    Returns:
        Expert numbers ``[tokens, heads, top_k]`` int64 and their scores, best first, in at least float32 and
        differentiable in ``query`` and ``keys``.
    """
    n = keys.shape[-2]
    halves = query.unflatten(-1, (2, -1))
    pattern = "thpc,pnc->pthn" if keys.dim() == 3 else "thpc,hpnc->pthn"
    scores = torch.einsum(pattern, halves, keys)
    if scores.dtype in (torch.bfloat16, torch.float16):
        scores = scores.float()
    (first_scores, second_scores), (first, second) = scores.topk(top_k, dim=-1)
    i, j = _candidates(top_k, query.device)
    best, position = (first_scores[..., i] + second_scores[..., j]).topk(top_k, dim=-1)
    indices = first.gather(-1, i[position]) * n + second.gather(-1, j[position])
    return indices, best
