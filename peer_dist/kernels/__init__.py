"""expert_mix, the op that PEER spends its time in, and the one place that picks its backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peer_dist.kernels import mkl, native, reference
from peer_dist.kernels.native import huge_pages
from peer_dist.kernels.picks import Picks
from peer_dist.kernels.reference import ACTIVATIONS, Composed
from peer_dist.tracing import span

__all__ = ["ACTIVATIONS", "Picks", "expert_mix", "huge_pages"]

_MKL, _REFERENCE = Composed(mkl), Composed(reference)


def _backend(x: Tensor, down: Tensor, up: Tensor) -> Any:
    if x.is_cuda:
        from peer_dist.kernels import triton  # late: importing it takes a while, and needs a GPU to be of use

        return triton if triton.available(x, down, up) else _REFERENCE
    if native.available(x, down, up):
        return native
    return _MKL if mkl.available(x, down, up) else _REFERENCE


def expert_mix(
    x: Tensor, picks: Picks, gate: Tensor, down: Tensor, up: Tensor, activation: str, sparse_grad: bool = False
) -> Tensor:
    """``y_t = sum_i gate_i * act(x_t . down_{e_i}) * up_{e_i}`` over the picks of each token (PEER, section 2).

    Sums are kept in at least float32 whatever the dtypes; no ``[tokens, picks, dim]`` tensor is made.

    Args:
        x: ``[tokens, dim]``.
        picks: the rows that each token reads.
        gate: ``[picks]``, multiplied after the activation.
        down: ``[rows, dim]``.
        up: ``[rows, dim]``, of ``down``'s dtype.
        activation: one of :data:`ACTIVATIONS`.
        sparse_grad: give the tables sparse gradients (coalesced, of the picked rows) instead of dense ones.

    Returns:
        ``[tokens, dim]`` in ``x``'s dtype. Differentiable in ``x``, ``gate``, ``down`` and ``up``.
    """
    return _ExpertMix.apply(x, picks, gate, down, up, activation, sparse_grad)


class _ExpertMix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, picks: Picks, gate: Tensor, down: Tensor, up: Tensor, activation: str, sparse_grad: bool
    ) -> Tensor:
        with span("experts"):
            y, pre = _backend(x, down, up).forward(x.contiguous(), picks, gate, down, up, activation)
        ctx.picks, ctx.activation, ctx.sparse_grad = picks, activation, sparse_grad
        ctx.save_for_backward(x, pre, gate, down, up)
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, pre, gate, down, up = ctx.saved_tensors
        picks, (rows, dim) = ctx.picks, down.shape
        with span("experts"):
            x, dy = x.contiguous(), dy.contiguous()
            ops = _backend(x, down, up)
            dx, dgate, dpre, hidden = ops.backward(dy, x, picks, pre, gate, down, up, ctx.activation)
            ddown: Tensor | None = None
            dup: Tensor | None = None
            if ctx.needs_input_grad[3] or ctx.needs_input_grad[4]:
                if ctx.sparse_grad:
                    touched, *values = ops.sparse_table_grads(dpre, hidden, x, dy, picks, rows, dtype=down.dtype)
                    ddown, dup = (
                        torch.sparse_coo_tensor(
                            touched[None], value, (rows, dim), is_coalesced=True, check_invariants=False
                        )
                        for value in values
                    )
                else:
                    ddown, dup = ops.table_grads(dpre, hidden, x, dy, picks, rows, dtype=down.dtype)
        return dx.to(x.dtype), None, dgate.to(gate.dtype), ddown, dup, None, None
