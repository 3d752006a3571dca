"""LayerNorm and RMSNorm of queries, as functions that can be taken for a part of the tokens at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peer_dist.layers.buffers import at_least_float32


def vector_norm(query: Tensor, kind: str, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Each vector of ``query [tokens, heads, key_dim]`` normalised and mapped, in its shape and dtype.

    Computed in at least float32.

    Args:
        kind: ``layer`` or ``rms``.
        weight, bias: ``[heads * key_dim]``.
        eps: added to the variance, or to the mean square.
    """
    x = at_least_float32(query)
    width = (x.shape[-1],)
    x = F.layer_norm(x, width, eps=eps) if kind == "layer" else F.rms_norm(x, width, eps=eps)
    x = x * weight.view(query.shape[1:]).to(x.dtype)
    if bias is not None:
        x = x + bias.view(query.shape[1:]).to(x.dtype)
    return x.to(query.dtype)


def vector_norm_backward(
    dy: Tensor, query: Tensor, kind: str, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of :func:`vector_norm`'s ``query``, ``weight`` and ``bias``, in at least float32.

    Args:
        dy: ``[tokens, heads, key_dim]``.
    """
    x, dy = at_least_float32(query), at_least_float32(dy)
    if kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    unit = x * scale
    dunit = dy * weight.view(query.shape[1:]).to(dy.dtype)
    dx = dunit - unit * (dunit * unit).mean(-1, keepdim=True)
    if kind == "layer":
        dx = dx - dunit.mean(-1, keepdim=True)
    return dx * scale, (dy * unit).sum(0).flatten(), dy.sum(0).flatten()
