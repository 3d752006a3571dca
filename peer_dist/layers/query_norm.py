"""Normalisation of queries, which keeps a million experts in use (PEER, section 3.4), and of sub-keys (UltraMem)."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from peer_dist.layers.buffers import ExactBuffers, at_least_float32
from peer_dist.layers.product_keys import retrieve
from peer_dist.layers.recomputation import in_first_pass, is_recomputation
from peer_dist.layers.vector_norm import vector_norm

QUERY_NORMS = ("batch", "layer", "rms", "none")
KEY_NORMS = ("none", "layer", "rms")


def make_query_norm(
    kind: str,
    heads: int,
    key_dim: int,
    group: dist.ProcessGroup | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> nn.Module:
    """The norm of queries ``[tokens, heads, key_dim]``.

    Args:
        kind: one of :data:`QUERY_NORMS`.
        heads: queries of a token.
        key_dim: width of a query.
        group: ranks whose tokens ``batch`` takes its statistics over; None for this one.
        device, dtype: as everywhere in torch.
    """
    if kind == "batch":
        return QueryBatchNorm(heads, key_dim, group, device=device, dtype=dtype)
    return nn.Identity() if kind == "none" else VectorNorm(kind, heads, key_dim, device=device, dtype=dtype)


class KeyNorm(nn.Module):
    """LayerNorm or RMSNorm of every sub-key, with an affine map per set of sub-keys.

    At the start the weights keep the scale that sub-keys are drawn with, and so that of the scores.

    Args:
        kind: ``layer`` or ``rms``.
        sets: of sub-keys, 2 per set of product keys.
        half: width of a sub-key.
        std: standard deviation that sub-keys are drawn with.
        device, dtype: as everywhere in torch.
    """

    def __init__(
        self,
        kind: str,
        sets: int,
        half: int,
        std: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.norm = VectorNorm(kind, sets, half, scale=std, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Start anew: weights of ``std`` and no bias."""
        self.norm.reset_parameters()

    def forward(self, keys: Tensor) -> Tensor:
        """The normalised sub-keys of ``keys [..., 2, n, half]``, in their shape and dtype."""
        per_key = keys.movedim(-2, 0)  # [n, ..., 2, half]
        return self.norm(per_key.flatten(1, -2)).view_as(per_key).movedim(0, -2)


class _SumOverRanks(torch.autograd.Function):
    """All-reduce whose gradient is the all-reduce of the gradients: each rank's loss depends on every input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        out = x.contiguous().clone()
        dist.all_reduce(out, group=group)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        dy = dy.contiguous().clone()
        dist.all_reduce(dy, group=ctx.group)
        return dy, None


class QueryBatchNorm(ExactBuffers):
    """BatchNorm of each of the ``heads * key_dim`` features over all tokens of all ranks of a group.

    In training the statistics are those of one forward pass over every rank's tokens, later positions
    included; in evaluation they are the running ones, which recomputed passes do not move again. Computed in at
    least float32; the running statistics stay float32 when the module is cast.

    Every rank of the group must take part in each forward and backward pass, tokens or not.

    Args:
        heads: queries of a token.
        key_dim: width of a query.
        group: ranks whose tokens the statistics are over; None for this one.
        eps: added to the variance.
        momentum: weight of a pass in the running statistics.
        device, dtype: as everywhere in torch.

    Raises:
        ValueError: a training pass over one token in all, whose variance is 0.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        heads: int,
        key_dim: int,
        group: dist.ProcessGroup | None,
        eps: float = 1e-5,
        momentum: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.group, self.eps, self.momentum = group, eps, momentum
        features = heads * key_dim
        self.weight = nn.Parameter(torch.empty(features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(features, device=device, dtype=dtype))
        exact = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        self.register_buffer("running_mean", torch.empty(features, device=device, dtype=exact))
        self.register_buffer("running_var", torch.empty(features, device=device, dtype=exact))
        self.reset_parameters()

    def __deepcopy__(self, memo: dict[int, Any]) -> QueryBatchNorm:
        memo[id(self.group)] = self.group  # shared: there is no copy of a process group
        new = memo[id(self)] = self.__new__(type(self))
        new.__setstate__(copy.deepcopy(self.__dict__, memo))
        return new

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew: weights and variance 1, bias and mean 0."""
        for tensor, value in ((self.weight, 1), (self.bias, 0), (self.running_mean, 0), (self.running_var, 1)):
            tensor.fill_(value)

    def _total(self, x: Tensor) -> Tensor:
        return x if self.group is None else _SumOverRanks.apply(x, self.group)

    @torch.no_grad()
    def _keep(self, mean: Tensor, var: Tensor) -> None:
        # a pass that is not finite is skipped by the optimizer and must not stay here either
        fine = torch.isfinite(mean) & torch.isfinite(var)
        if torch.compiler.is_compiling():
            fine &= in_first_pass(mean)
        for running, new in ((self.running_mean, mean), (self.running_var, var)):
            running.lerp_(torch.where(fine, new.to(running.dtype), running), self.momentum)

    def forward(self, query: Tensor) -> Tensor:
        """The normalised queries of ``query [tokens, heads, key_dim]``, in its shape and dtype."""
        x = at_least_float32(query.flatten(1))
        if self.training:
            sums = self._total(torch.cat([x.sum(0), x.new_full((1,), x.shape[0])]))  # filled there: no copy to wait for
            tokens = x.shape[0]
            if tokens < 2 and self.group is not None:  # where ranks have more, nobody waits for the device
                tokens = int(sums[-1])
            if tokens == 1:
                raise ValueError(
                    "batch norm of queries needs more than one token in a training pass; call .eval(), or use "
                    "query_norm='rms'"
                )
            count = sums[-1].detach().clamp(min=1)
            mean = sums[:-1] / count
            var = self._total((x - mean).square().sum(0)) / count
            if not is_recomputation():
                # detached: a recomputed pass must save as many tensors
                self._keep(mean.detach(), var.detach() * (count / (count - 1).clamp(min=1)))
        else:
            mean, var = self.running_mean.to(x.dtype), self.running_var.to(x.dtype)
        x = (x - mean) * torch.rsqrt(var + self.eps) * self.weight.to(x.dtype) + self.bias.to(x.dtype)
        return x.view_as(query).to(query.dtype)


class VectorNorm(nn.Module):
    """LayerNorm or RMSNorm of each query (or sub-key) vector, with an affine map per head, in at least float32.

    Args:
        kind: ``layer`` (with a bias) or ``rms``.
        heads: vectors of a token, each with weights of its own.
        key_dim: width of a vector.
        eps: added to the variance, or to the mean square.
        scale: the weights at the start.
        device, dtype: as everywhere in torch.
    """

    def __init__(
        self,
        kind: str,
        heads: int,
        key_dim: int,
        eps: float = 1e-5,
        scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.kind, self.eps, self.scale = kind, eps, scale
        self.weight = nn.Parameter(torch.empty(heads * key_dim, device=device, dtype=dtype))
        self.bias: nn.Parameter | None = None
        if kind == "layer":
            self.bias = nn.Parameter(torch.empty(heads * key_dim, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew: weights ``scale``, bias 0."""
        self.weight.fill_(self.scale)
        if self.bias is not None:
            self.bias.fill_(0)

    def forward(self, query: Tensor, keys: Tensor | None = None, top_k: int = 0) -> Any:
        """The normalised queries of ``query [tokens, heads, key_dim]``, in its shape and dtype.

        Args:
            keys, top_k: if given, the result is that of :func:`peer_dist.layers.product_keys.retrieve` for the
                normalised queries instead, which are then never held for all tokens at once.
        """
        if keys is None:
            return vector_norm(query, self.kind, self.weight, self.bias, self.eps)
        return retrieve(query, keys, top_k, self.kind, self.weight, self.bias, self.eps)
