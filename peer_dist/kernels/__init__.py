"""expert_mix, the op that PEER spends its time in, and the one place that picks its backend.

Everything is built from three products over picks (token, row): ``dots``, ``mix`` and ``table_grad``. Each
half of the layer is one of them forward and the other two backward.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peer_dist.kernels import cpu, reference
from peer_dist.kernels.picks import Picks
from peer_dist.tracing import span

__all__ = ["ACTIVATIONS", "Picks", "expert_mix"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


def _backend(*tensors: Tensor) -> ModuleType:
    return cpu if cpu.available(*tensors) else reference


def expert_mix(x: Tensor, picks: Picks, gate: Tensor, down: Tensor, up: Tensor, activation: str) -> Tensor:
    """``y_t = sum_i gate_i * act(x_t . down_{e_i}) * up_{e_i}`` over the picks of each token (PEER, section 2).

    Sums are kept in at least float32 whatever the dtypes; no ``[tokens, picks, dim]`` tensor is made.

    Args:
        x: ``[tokens, dim]``.
        picks: the rows that each token reads.
        gate: ``[picks]``, multiplied after the activation.
        down: ``[rows, dim]``.
        up: ``[rows, dim]``, of ``down``'s dtype.
        activation: one of :data:`ACTIVATIONS`.

    Returns:
        ``[tokens, dim]`` in ``x``'s dtype. Differentiable in ``x``, ``gate``, ``down`` and ``up``.
    """
    return _ExpertMix.apply(x, picks, gate, down, up, activation)


class _ExpertMix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, picks: Picks, gate: Tensor, down: Tensor, up: Tensor, activation: str) -> Tensor:
        with span("experts"):
            x = x.contiguous()
            ops = _backend(x, down, up)
            pre = ops.dots(x, down, picks)
            hidden = ACTIVATIONS[activation](pre) * gate.to(pre.dtype)
            out = ops.mix(hidden, up, picks).to(x.dtype)
        ctx.picks, ctx.activation = picks, activation
        ctx.save_for_backward(x, pre, gate, down, up)
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, pre, gate, down, up = ctx.saved_tensors
        picks = ctx.picks
        with span("experts"):
            dy = dy.contiguous()
            ops = _backend(x, down, up)
            dhidden = ops.dots(dy, up, picks)
            with torch.enable_grad():
                leaves = pre.detach().requires_grad_(), gate.to(pre.dtype).detach().requires_grad_()
                hidden = ACTIVATIONS[ctx.activation](leaves[0]) * leaves[1]
            dpre, dgate = torch.autograd.grad(hidden, leaves, dhidden)
            needs_x, _, needs_gate, needs_down, needs_up, _ = ctx.needs_input_grad
            dx = ops.mix(dpre, down, picks).to(x.dtype) if needs_x else None
            ddown = ops.table_grad(dpre, x, picks, down.shape[0]).to(down.dtype) if needs_down else None
            dup = ops.table_grad(hidden.detach(), dy, picks, up.shape[0]).to(up.dtype) if needs_up else None
        return dx, None, dgate.to(gate.dtype) if needs_gate else None, ddown, dup, None
