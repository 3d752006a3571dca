"""Product keys: the best of n * n keys by looking at n + n (Lample 2019; PEER, section 2.1)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from peer_dist.kernels import Picks, mix, table_grad, top_pairs
from peer_dist.tracing import untraced

CHUNK_TOKENS = {"cpu": 256, "cuda": 8192}  # tokens; on a CPU the scores of one head's chunk stay in cache


@untraced
def retrieve(query: Tensor, keys: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The ``top_k`` product keys of largest inner product with each query. Exact.

    Key ``(a, b)`` is the concatenation of sub-keys ``keys[0, a]`` and ``keys[1, b]``; its number is
    ``a * n + b``. The scores of all sub-keys are never held for all tokens at once.

    Args:
        query: ``[tokens, heads, key_dim]``.
        keys: ``[2, n, key_dim / 2]``, shared by the heads, or ``[heads, 2, n, key_dim / 2]``.
        top_k: at most ``n``.

    Returns:
        Expert numbers ``[tokens, heads, top_k]`` int64 and their scores, best first, in at least float32 and
        differentiable (once) in ``query`` and ``keys``.
    """
    return _Retrieve.apply(query, keys, top_k)


@untraced
def project_and_retrieve(
    x: Tensor, weight: Tensor, norm: nn.Module, keys: Tensor, top_k: int, heads: int
) -> tuple[Tensor, Tensor]:
    """:func:`retrieve` with the queries ``norm(x @ weight.T)``, whose gradients are never held for all tokens either.

    Args:
        x: ``[tokens, dim]``.
        weight: ``[heads * key_dim, dim]``.
        norm: takes ``[tokens, heads, key_dim]`` and treats each token by itself.
        keys, top_k: as in :func:`retrieve`.
        heads: queries of a token.

    Returns:
        As :func:`retrieve`; the scores are differentiable (once) in ``x``, ``weight``, ``keys`` and the norm's
        parameters.
    """
    return _ProjectAndRetrieve.apply(x, weight, keys, norm, top_k, heads, *norm.parameters())


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
    wide = torch.promote_types(keys.dtype, torch.float32)
    indices = torch.empty(tokens, heads, top_k, dtype=torch.int64, device=keys.device)
    best = torch.empty(tokens, heads, top_k, dtype=wide, device=keys.device)
    # wide before the product, which would else round scores to bfloat16 and make ties of neighbours
    per_head = keys.to(wide).expand(heads, *keys.shape[-3:]).transpose(-1, -2)  # [heads, 2, key_dim / 2, n]
    scores = per_head.new_empty(0)  # one memory for the scores of all chunks
    for chunk, query in queries:
        halves = query.to(wide).unflatten(-1, (2, -1)).permute(1, 2, 0, 3)  # [heads, 2, tokens, key_dim / 2]
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
        ``[tokens, heads, key_dim]`` in ``query``'s dtype.
    """
    n, half = keys.shape[-2:]
    table = keys.reshape(-1, half)
    sets = torch.arange(len(table) // n, device=keys.device).view(-1, 2, 1)  # of sub-keys: [heads or 1, 2, 1]
    rows = torch.stack([indices // n, indices % n], 2).add_(sets * n)  # [tokens, heads, 2, top_k]
    picks = Picks.even(rows.flatten(0, 2))
    dpicked = dscores[:, :, None].expand_as(rows).flatten()
    table_grad(dpicked, query.reshape(-1, half), picks, dkeys.view_as(table))
    return mix(dpicked, table, picks).view_as(query).to(query.dtype)


class _Retrieve(torch.autograd.Function):
    """:func:`retrieve`, whose backward pass takes the tokens in chunks too."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, keys: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        tokens, heads = query.shape[:2]
        indices, best = _search(((chunk, query[chunk]) for chunk in _chunks(query)), keys, tokens, heads, top_k)
        ctx.save_for_backward(query, keys, indices)
        ctx.mark_non_differentiable(indices)
        return indices, best

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: None, dscores: Tensor) -> tuple[Tensor | None, ...]:
        query, keys, indices = ctx.saved_tensors
        dkeys = torch.zeros(keys.shape, dtype=dscores.dtype, device=keys.device)
        dquery = torch.empty_like(query)
        for chunk in _chunks(query):
            dquery[chunk] = _score_grads(query[chunk], keys, indices[chunk], dscores[chunk], dkeys)
        return dquery, dkeys.to(keys.dtype), None


class _ProjectAndRetrieve(torch.autograd.Function):
    """:func:`project_and_retrieve`. The queries before the norm are kept; each chunk's norm is computed again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, keys: Tensor, norm: nn.Module, top_k: int, heads: int, *learned: Tensor
    ) -> tuple[Tensor, Tensor]:
        raw = (x @ weight.t()).unflatten(-1, (heads, -1))
        indices, best = _search(((chunk, norm(raw[chunk])) for chunk in _chunks(x)), keys, len(x), heads, top_k)
        ctx.norm, ctx.learned = norm, learned
        ctx.save_for_backward(x, weight, raw, keys, indices)
        ctx.mark_non_differentiable(indices)
        return indices, best

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: None, dscores: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, raw, keys, indices = ctx.saved_tensors
        dkeys = torch.zeros(keys.shape, dtype=dscores.dtype, device=keys.device)
        learned = [parameter for parameter in ctx.learned if parameter.requires_grad]
        dlearned = [torch.zeros_like(parameter) for parameter in learned]
        dweight, dx = torch.zeros_like(weight), torch.empty_like(x)

        def add_grads(chunk: slice) -> None:
            with torch.enable_grad():
                projected = raw[chunk].detach().requires_grad_()
                query = ctx.norm(projected)
            dquery = _score_grads(query.detach(), keys, indices[chunk], dscores[chunk], dkeys)
            dprojected, *grads = torch.autograd.grad(query, (projected, *learned), dquery)
            for total, grad in zip(dlearned, grads):
                total += grad
            torch.mm(dprojected.flatten(1), weight, out=dx[chunk])
            dweight.addmm_(dprojected.flatten(1).t(), x[chunk])

        for chunk in _chunks(x):
            add_grads(chunk)
        grads_of_learned = iter(dlearned)
        dnorm = [next(grads_of_learned) if parameter.requires_grad else None for parameter in ctx.learned]
        return dx, dweight, dkeys.to(keys.dtype), None, None, None, *dnorm
