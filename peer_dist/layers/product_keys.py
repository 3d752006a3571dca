"""Product keys: the best of n * n keys by looking at n + n (Lample 2019; PEER, section 2.1)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from peer_dist.kernels import Picks, mix, table_grad, top_pairs

_CHUNK = {"cpu": 256, "cuda": 8192}  # tokens; on a CPU the scores of one head's chunk stay in cache


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
    return _Retrieve.apply(query, keys, top_k, query.shape[1], None, None)


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
    """
    return _Retrieve.apply(x, keys, top_k, heads, weight, norm, *norm.parameters())


def _chunks(x: Tensor) -> Iterator[slice]:
    step = _CHUNK[x.device.type]
    for begin in range(0, x.shape[0], step):
        yield slice(begin, begin + step)


class _Retrieve(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        keys: Tensor,
        top_k: int,
        heads: int,
        weight: Tensor | None,
        norm: nn.Module | None,
        *learned: Tensor,
    ) -> tuple[Tensor, Tensor]:
        shape, wide = (x.shape[0], heads, top_k), torch.promote_types(keys.dtype, torch.float32)
        indices = torch.empty(shape, dtype=torch.int64, device=x.device)
        best = torch.empty(shape, dtype=wide, device=x.device)
        per_head = keys.expand(heads, *keys.shape[-3:]).transpose(-1, -2)  # [heads, 2, key_dim / 2, n]
        raw = x if weight is None else (x @ weight.t()).unflatten(-1, (heads, -1))
        scores = keys.new_empty(0)  # the memory of every chunk's
        for chunk in _chunks(x):
            query = raw[chunk] if norm is None else norm(raw[chunk])
            halves = query.unflatten(-1, (2, -1)).permute(1, 2, 0, 3)  # [heads, 2, tokens, key_dim / 2]
            scores.resize_(2, len(query), keys.shape[-2])
            for head in range(heads):
                first, second = torch.bmm(halves[head], per_head[head], out=scores).to(wide)
                indices[chunk, head], best[chunk, head] = top_pairs(first, second, top_k)
        ctx.norm, ctx.learned = norm, learned
        ctx.save_for_backward(x, raw, keys, weight, indices)
        ctx.mark_non_differentiable(indices)
        return indices, best

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: None, dscores: Tensor) -> tuple[Tensor | None, ...]:
        x, raw, keys, weight, indices = ctx.saved_tensors
        n, half = keys.shape[-2:]
        table = keys.reshape(-1, half)
        sets = torch.arange(len(table) // n, device=keys.device).view(-1, 2, 1)  # of sub-keys: [heads or 1, 2, 1]
        dkeys = torch.zeros(table.shape, dtype=dscores.dtype, device=keys.device)
        dweight = None if weight is None else torch.zeros_like(weight)
        learned = [parameter for parameter in ctx.learned if parameter.requires_grad]
        dlearned = [torch.zeros_like(parameter) for parameter in learned]
        dx = torch.empty_like(x)

        def take(chunk: slice) -> None:
            with torch.enable_grad():
                some = raw[chunk].detach().requires_grad_()
                query = ctx.norm(some) if ctx.learned else some
            rows = torch.stack([indices[chunk] // n, indices[chunk] % n], 2).add_(sets * n)
            picks = Picks.even(rows.flatten(0, 2))  # rows: [tokens, heads, 2, top_k]
            dpicked = dscores[chunk, :, None].expand_as(rows).flatten()
            table_grad(dpicked, query.detach().reshape(-1, half), picks, dkeys)
            dquery = mix(dpicked, table, picks).view_as(query).to(query.dtype)
            if ctx.learned:
                dquery, *grads = torch.autograd.grad(query, (some, *learned), dquery)
                for total, grad in zip(dlearned, grads):
                    total += grad
            if weight is None or dweight is None:
                dx[chunk] = dquery
            else:
                torch.mm(dquery.flatten(1), weight, out=dx[chunk])
                dweight.addmm_(dquery.flatten(1).t(), x[chunk])

        for chunk in _chunks(x):
            take(chunk)
        dnorm = iter(dlearned)
        dparameters = [next(dnorm) if parameter.requires_grad else None for parameter in ctx.learned]
        return dx, dkeys.view_as(keys).to(keys.dtype), None, None, dweight, None, *dparameters
