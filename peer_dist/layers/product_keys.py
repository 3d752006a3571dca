"""Product keys: the best of n * n keys by looking at n + n (Lample 2019; PEER, section 2.1)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from peer_dist.kernels import (
    Picks,
    backend,
    differentiable,
    differentiable_no_further,
    operator,
    table_grad,
    top_pairs,
    wide,
)
from peer_dist.layers.vector_norm import vector_norm, vector_norm_backward
from peer_dist.tracing import span

CHUNK_TOKENS = {"cpu": 256, "cuda": 8192}  # tokens; on a CPU the scores of one head's chunk stay in cache


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


def _search(
    queries: Iterable[tuple[slice, Tensor]], keys: Tensor, tokens: int, heads: int, top_k: int
) -> tuple[Tensor, Tensor]:
    """What :func:`retrieve` returns, for queries that come in chunks.

    Args:
        queries: chunks of the tokens, each with its queries ``[chunk's tokens, heads, key_dim]``.
    """
    dtype = wide(keys)
    indices = torch.empty(tokens, heads, top_k, dtype=torch.int64, device=keys.device)
    best = torch.empty(tokens, heads, top_k, dtype=dtype, device=keys.device)
    # wide before the product, which would else round scores to bfloat16 and make ties of neighbours
    per_head = keys.to(dtype).expand(heads, *keys.shape[-3:]).transpose(-1, -2)  # [heads, 2, key_dim / 2, n]
    scores = torch.empty(0, dtype=dtype, device=keys.device)  # one memory for the scores of all chunks
    for chunk, query in queries:
        halves = query.to(dtype).unflatten(-1, (2, -1)).permute(1, 2, 0, 3)  # [heads, 2, tokens, key_dim / 2]
        scores.resize_(2, len(query), keys.shape[-2])
        for head in range(heads):
            first, second = torch.bmm(halves[head], per_head[head], out=scores)
            indices[chunk, head], best[chunk, head] = top_pairs(first, second, top_k)
    return indices, best


def _score_grads(query: Tensor, keys: Tensor, indices: Tensor, dscores: Tensor, dkeys: Tensor) -> Tensor:
    """The gradient of a chunk's queries, and that of the keys, which is added to ``dkeys``.

    Args:
        query: ``[tokens, heads, key_dim]``.
        keys: ``[2, n, key_dim / 2]``, or ``[heads, 2, n, key_dim / 2]``.
        indices, dscores: ``[tokens, heads, top_k]``.
        dkeys: the keys' shape, in ``dscores``' dtype.

    Returns:
        ``[tokens, heads, key_dim]`` in at least float32.
    """
    n, half = keys.shape[-2:]
    table = keys.reshape(-1, half)
    sets = torch.arange(len(table) // n, dtype=torch.int64, device=keys.device).view(-1, 2, 1)  # [heads or 1, 2, 1]
    rows = torch.stack([indices // n, indices % n], 2).add_(sets * n)  # [tokens, heads, 2, top_k]
    picks = Picks.even(rows.flatten(0, 2))
    dpicked = dscores[:, :, None].expand_as(rows).flatten()
    x = query.reshape(-1, half)
    table_grad(dpicked, x, picks, dkeys.view_as(table))
    dquery: Tensor = backend(dpicked, table).mix(dpicked, table, picks)
    return dquery.view_as(query)


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
    tokens, heads = query.shape[:2]

    def queries() -> Iterator[tuple[slice, Tensor]]:
        for chunk in _chunks(query):
            part = query[chunk]
            yield chunk, part if weight is None else vector_norm(part, norm, weight, bias, eps)

    with span("retrieve"):
        indices, scores = _search(queries(), keys, tokens, heads, top_k)
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
            gradient = _score_grads(normed, keys, indices[chunk], dscores[chunk], sums[0])
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
