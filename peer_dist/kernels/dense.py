"""What a transformer's dense part does between its matrix products: a kernel each on GPUs, plain PyTorch elsewhere.

Each is differentiable once. Elementwise work is bound by memory, so that its time is the number of passes over it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 2**18
"""Logits that plain PyTorch has in float32 at once: few enough for a CPU's caches."""


def backend(x: Tensor) -> Any:
    """What computes for this tensor's device and dtype: Triton on GPUs, plain PyTorch otherwise."""
    if x.is_cuda:
        from peer_dist.kernels import triton  # late: importing it takes a while, and needs a GPU to be of use

        return triton.dense if triton.available(x) else Plain
    return Plain


def swiglu(x: Tensor) -> Tensor:
    """``silu(a) * b`` of the halves ``a`` and ``b`` of the last dimension; of them, ``x`` alone is kept.

    Args:
        x: ``[..., 2 n]``.

    Returns:
        ``[..., n]`` in ``x``'s dtype.
    """
    out: Tensor = _SwiGLU.apply(x)
    return out


def split_heads(mixed: Tensor, angles: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of one product, queries and keys rotated by their positions' angles (RoPE).

    Args:
        mixed: ``[s, b, width]``: for each group its query heads one after the other, its key, its value.
        angles: float32 ``[s, channels]``, whose second half repeats the first; no gradient flows to them.
        groups: heads of keys and values, which divide those of queries.

    Returns:
        Queries ``[s, b, heads, channels]``, keys and values ``[s, b, groups, channels]``, in ``mixed``'s dtype.
    """
    if backend(mixed) is Plain:
        return Plain.split_heads(mixed, angles, groups)
    return _SplitHeads.apply(mixed, angles, groups)


def label_logs(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
    """The logarithm of each label's probability among its row of logits; see :func:`logits_to_gradient`.

    Args:
        logits: ``[rows, words]``, contiguous.
        labels: int64 ``[rows, 1]``.

    Returns:
        ``[rows, 1]`` in at least float32; and what :func:`logits_to_gradient` wants to be given.
    """
    return backend(logits).label_logs(logits, labels)


def logits_to_gradient(logits: Tensor, labels: Tensor, kept: Tensor | None, factor: Tensor, at_label: Tensor) -> None:
    """Turn logits into ``factor`` times their softmax, less ``at_label`` at the label, where they are.

    Args:
        logits: ``[rows, words]``, contiguous.
        labels: int64 ``[rows, 1]``.
        kept: from :func:`label_logs`.
        factor, at_label: ``[rows, 1]`` in at least float32.
    """
    backend(logits).logits_to_gradient(logits, labels, kept, factor, at_label)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        out: Tensor = backend(x).swiglu(x.contiguous())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        dx: Tensor = backend(x).swiglu_backward(dy.contiguous(), x.contiguous())
        return dx


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mixed: Tensor, angles: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(angles)
        return backend(mixed).split_heads(mixed.contiguous(), angles, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (angles,) = ctx.saved_tensors
        return backend(gradients[0]).join_heads(*gradients, angles), None, None


class Plain:
    """The definition, in plain PyTorch."""

    @staticmethod
    def swiglu(x: Tensor) -> Tensor:
        """See :func:`swiglu`."""
        a, b = x.chunk(2, -1)
        return F.silu(a).mul_(b)

    @staticmethod
    def swiglu_backward(dy: Tensor, x: Tensor) -> Tensor:
        """The gradient of :func:`swiglu`'s ``x``."""
        (a, b), dx = x.chunk(2, -1), torch.empty_like(x)
        da, db = dx.chunk(2, -1)
        torch.mul(dy, F.silu(a), out=db)
        torch.ops.aten.silu_backward.grad_input(dy * b, a, grad_input=da)
        return dx

    @staticmethod
    def split_heads(mixed: Tensor, angles: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
        """See :func:`split_heads`; differentiable as it is."""
        channels = angles.shape[-1]
        cos, sin = (part.to(mixed.dtype)[:, None, None] for part in (angles.cos(), angles.sin()))

        def rotated(x: Tensor) -> Tensor:
            first, second = x.chunk(2, -1)
            return x * cos + torch.cat((-second, first), -1) * sin

        heads = mixed.unflatten(-1, (groups, -1, channels))
        query, key, value = heads.split((heads.shape[3] - 2, 1, 1), 3)
        return rotated(query.flatten(2, 3)), rotated(key.squeeze(3)), value.squeeze(3)

    @staticmethod
    def label_logs(logits: Tensor, labels: Tensor) -> tuple[Tensor, None]:
        """See :func:`label_logs`."""
        dtype = torch.promote_types(logits.dtype, torch.float32)
        logs = [logits[rows].log_softmax(-1, dtype=dtype).gather(1, labels[rows]) for rows in _blocks(logits)]
        return torch.cat(logs), None

    @staticmethod
    def logits_to_gradient(logits: Tensor, labels: Tensor, kept: None, factor: Tensor, at_label: Tensor) -> None:
        """See :func:`logits_to_gradient`."""
        for rows in _blocks(logits):
            shares = logits[rows].softmax(-1, dtype=factor.dtype)
            own = shares.gather(1, labels[rows]) * factor[rows] - at_label[rows]
            torch.mul(shares, factor[rows], out=logits[rows])
            logits[rows].scatter_(1, labels[rows], own.to(logits.dtype))


def _blocks(logits: Tensor) -> Iterator[slice]:
    """Stretches of rows that are in float32 at once."""
    size = max(1, BLOCK // logits.shape[1])
    return (slice(begin, begin + size) for begin in range(0, max(1, len(logits)), size))
