"""Product keys: the best of n * n keys by looking at n + n (Lample 2019; PEER, section 2.1)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from peer_dist.kernels import differentiable, differentiable_no_further, operator, search, search_backward, wide
from peer_dist.layers.vector_norm import vector_norm, vector_norm_backward
from peer_dist.tracing import span

CHUNK_TOKENS = {"cpu": 256, "cuda": 8192}
"""Tokens whose normalised queries are held at a time; on a CPU the scores of one head's chunk stay in cache."""


def retrieve(
    query: Tensor,
    keys: Tensor,
    top_k: int,
    norm: str = "none",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The ``top_k`` product keys of largest inner product with each query. Exact.

    Key ``(a, b)`` is the concatenation of sub-keys ``keys[0, a]`` and ``keys[1, b]``; its number is
    ``a * n + b``. The scores of all sub-keys are never held for all tokens at once, nor are normalised queries.

    Args:
        query: ``[tokens, heads, key_dim]``.
        keys: ``[2, n, key_dim / 2]``, shared by the heads, or ``[heads, 2, n, key_dim / 2]``.
        top_k: at most ``n``.
        norm: ``layer`` or ``rms`` takes :func:`peer_dist.layers.vector_norm.vector_norm` of the queries first, with
            ``weight`` and ``bias`` ``[heads * key_dim]`` and ``eps``; ``none`` takes them as they are.

    Returns:
        Expert numbers ``[tokens, heads, top_k]`` int64 and their scores, best first, in at least float32 (autocast or
        not) and differentiable (once) in ``query``, ``keys``, ``weight`` and ``bias``.
    """
    scores, indices = _retrieve(query, keys, top_k, norm, weight, bias, eps)
    return indices, scores


def _chunks(x: Tensor) -> Iterator[slice]:
    step = CHUNK_TOKENS[x.device.type]
    for begin in range(0, x.shape[0], step):
        yield slice(begin, begin + step)


def _like_scores(
    query: Tensor, keys: Tensor, top_k: int, norm: str, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    shape = (*query.shape[:2], top_k)
    return (
        torch.empty(shape, dtype=wide(keys), device=query.device),
        torch.empty(shape, dtype=torch.int64, device=query.device),
    )


@operator(
    "retrieve(Tensor query, Tensor keys, int top_k, str norm, Tensor? weight, Tensor? bias, float eps) "
    "-> (Tensor, Tensor)",
    fake=_like_scores,
    flops=lambda query, keys, *_, **__: 2 * query[0] * query[1] * query[2] * keys[-2],
)
def _retrieve(
    query: Tensor, keys: Tensor, top_k: int, norm: str, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    scores, indices = _like_scores(query, keys, top_k, norm, weight, bias, eps)
    parts = (query[chunk] for chunk in _chunks(query))
    with span("retrieve"):
        search(
            (part if weight is None else vector_norm(part, norm, weight, bias, eps) for part in parts),
            keys,
            indices,
            scores,
        )
        return scores, indices


def _like_arguments(
    dscores: Tensor, indices: Tensor, query: Tensor, keys: Tensor, norm: str, weight: Tensor | None, bias: Any, eps: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def like(x: Tensor | None) -> Tensor:
        shape, dtype = ((), dscores.dtype) if x is None else (x.shape, x.dtype)
        return torch.empty(shape, dtype=dtype, device=query.device)

    return like(query), like(keys), like(weight), like(bias)


@operator(
    "retrieve_backward(Tensor dscores, Tensor indices, Tensor query, Tensor keys, str norm, Tensor? weight, "
    "Tensor? bias, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_like_arguments,
    flops=lambda dscores, indices, query, *_, **__: 4 * indices[0] * indices[1] * indices[2] * query[2],
)
def _retrieve_backward(
    dscores: Tensor,
    indices: Tensor,
    query: Tensor,
    keys: Tensor,
    norm: str,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of ``query``, ``keys``, ``weight`` and ``bias``; a number where there is no such argument."""
    dquery = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    others = (keys, weight, bias)
    sums = [torch.zeros(() if x is None else x.shape, dtype=dscores.dtype, device=query.device) for x in others]
    with span("retrieve"):
        for chunk in _chunks(query):
            part = query[chunk]
            normed = part if weight is None else vector_norm(part, norm, weight, bias, eps)
            dtype = query.dtype if weight is None else dscores.dtype
            gradient = search_backward(dscores[chunk], indices[chunk], normed, keys, sums[0], dtype)
            if weight is not None:
                gradient, of_weight, of_bias = vector_norm_backward(gradient, part, norm, weight, eps)
                sums[1] += of_weight
                if bias is not None:
                    sums[2] += of_bias
            dquery[chunk] = gradient
    dkeys, dweight, dbias = (total.to(dscores.dtype if x is None else x.dtype) for total, x in zip(sums, others))
    return dquery, dkeys, dweight, dbias


differentiable_no_further("retrieve_backward")


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, keys, _, ctx.norm, weight, bias, ctx.eps = inputs
    ctx.save_for_backward(query, keys, weight, bias, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dscores: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    query, keys, weight, bias, indices = ctx.saved_tensors
    dquery, dkeys, dweight, dbias = _retrieve_backward(dscores, indices, query, keys, ctx.norm, weight, bias, ctx.eps)
    return (
        dquery,
        dkeys,
        None,
        None,
        None if weight is None else dweight,
        None if bias is None else dbias,
        None,
    )


differentiable("retrieve", _keep, _backward)
