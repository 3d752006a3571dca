"""expert_mix, the op that PEER spends its time in, its parts, and the one place that picks their backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peer_dist.kernels import mkl, native, reference
from peer_dist.kernels.allocation import huge_pages
from peer_dist.kernels.picks import Picks
from peer_dist.kernels.reference import ACTIVATIONS, Composed
from peer_dist.tracing import span

__all__ = [
    "ACTIVATIONS",
    "Picks",
    "dots",
    "expert_mix",
    "expert_mix_backward",
    "expert_mix_forward",
    "expert_table_grads",
    "huge_pages",
    "mix",
    "table_grad",
    "top_pairs",
    "value_mix",
    "value_table_grad",
]

_MKL, _REFERENCE = Composed(mkl), Composed(reference)


def backend(x: Tensor, *tables: Tensor) -> Any:
    """The module, or the composed ops, that compute the mix for these tensors' devices and dtypes."""
    if x.is_cuda:
        from peer_dist.kernels import triton  # late: importing it takes a while, and needs a GPU to be of use

        return triton if triton.available(x, *tables) else _REFERENCE
    if native.available(x, *tables):
        return native
    return _MKL if mkl.available(x, *tables) else _REFERENCE


def expert_mix(
    x: Tensor,
    picks: Picks,
    gate: Tensor,
    down: Tensor,
    up: Tensor,
    activation: str,
    sparse_grad: bool = False,
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


def expert_mix_forward(
    x: Tensor,
    picks: Picks,
    gate: Tensor,
    down: Tensor,
    up: Tensor,
    activation: str,
    sum_columns: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`expert_mix` for callers that differentiate by :func:`expert_mix_backward` and
    :func:`expert_table_grads` themselves, say because they take the tokens in parts.

    Args:
        sum_columns: where ``x`` and the tables are a slice of the columns, adds up the slices' dot products
            ``[picks]``.

    Returns:
        ``y [tokens, dim]`` and the pre-activations ``x_t . down_e``, ``[picks]``, both in at least float32.
    """
    ops = backend(x, down, up)
    with span("experts"):
        if sum_columns is None:
            return ops.forward(x.contiguous(), picks, gate, down, up, activation)
        return reference.by_halves(ops, x.contiguous(), picks, gate, down, up, activation, sum_columns)


def expert_mix_backward(
    dy: Tensor,
    x: Tensor,
    picks: Picks,
    pre: Tensor,
    gate: Tensor,
    down: Tensor,
    up: Tensor,
    activation: str,
    sum_columns: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of :func:`expert_mix_forward` but those of the tables.

    Args:
        dy: ``[tokens, dim]``.
        pre: ``[picks]``, from the forward pass.

    Returns:
        ``dx [tokens, dim]`` and per pick ``dgate``, ``dpre`` and ``hidden`` (the gated activation), of which the last
        two are for :func:`expert_table_grads`; all in at least float32.
    """
    ops = backend(x, down, up)
    with span("experts"):
        x, dy = x.contiguous(), dy.contiguous()
        if sum_columns is None:
            return ops.backward(dy, x, picks, pre, gate, down, up, activation)
        return reference.backward_by_halves(ops, dy, picks, pre, gate, down, up, activation, sum_columns)


def expert_table_grads(
    dpre: Tensor, hidden: Tensor, x: Tensor, dy: Tensor, picks: Picks, table: Tensor, sparse: bool = False
) -> tuple[Tensor, Tensor]:
    """The gradients of ``down`` and ``up``: ``sum of dpre_i x_t`` and ``sum of hidden_i dy_t`` of each row.

    Args:
        dpre, hidden: ``[picks]``.
        x, dy: ``[tokens, dim]``.
        table: ``[rows, dim]``, either of the two, for its shape and dtype.
        sparse: coalesced sparse tensors of the picked rows instead of dense ones.

    Returns:
        ``ddown`` and ``dup``, ``[rows, dim]`` in ``table``'s dtype.
    """
    ddown, dup = _table_grads([(dpre, x), (hidden, dy)], picks, table, sparse)
    return ddown, dup


def _table_grads(sums: list[tuple[Tensor, Tensor]], picks: Picks, table: Tensor, sparse: bool) -> list[Tensor]:
    ops = backend(sums[0][1], table)
    sums = [(weight, x.contiguous()) for weight, x in sums]
    with span("experts"):
        if not sparse:
            return ops.table_grads(sums, picks, len(table), dtype=table.dtype)
        touched, grads = ops.sparse_table_grads(sums, picks, len(table), dtype=table.dtype)
        return [
            torch.sparse_coo_tensor(touched[None], grad, table.shape, is_coalesced=True, check_invariants=False)
            for grad in grads
        ]


def mix(weight: Tensor, table: Tensor, picks: Picks) -> Tensor:
    """``sum_i w_i table_{e_i}`` of each token: ``[picks], [rows, dim] -> [tokens, dim]``, at least float32."""
    return backend(weight, table).mix(weight, table, picks)


def dots(x: Tensor, table: Tensor, picks: Picks) -> Tensor:
    """``x_t . table_e`` of each pick: ``[tokens, dim], [rows, dim] -> [picks]``, at least float32."""
    return backend(x, table).dots(x.contiguous(), table, picks)


def value_mix(gate: Tensor, values: Tensor, picks: Picks, sparse_grad: bool = False) -> Tensor:
    """:func:`mix` that is differentiable in ``gate`` (by :func:`dots`) and ``values`` (by :func:`value_table_grad`).

    Args:
        gate: ``[picks]``.
        values: ``[rows, dim]``.
        picks: the rows that each token reads.
        sparse_grad: give ``values`` a sparse gradient (coalesced, of the picked rows) instead of a dense one.

    Returns:
        ``[tokens, dim]`` in at least float32.
    """
    return _ValueMix.apply(gate, values, picks, sparse_grad)


def value_table_grad(gate: Tensor, dy: Tensor, picks: Picks, values: Tensor, sparse: bool = False) -> Tensor:
    """``sum of gate_i dy_t`` of each row of ``values``, of its shape and dtype; for a table of any size.

    Args:
        gate: ``[picks]``.
        dy: ``[tokens, dim]``.
        sparse: a coalesced sparse tensor of the picked rows instead of a dense one.
    """
    (grad,) = _table_grads([(gate, dy)], picks, values, sparse)
    return grad


def table_grad(weight: Tensor, x: Tensor, picks: Picks, out: Tensor) -> None:
    """``out_e += sum over picks of row e of w_i x_t``, the gradient of :func:`mix`, in a fixed order of the sum.

    Args:
        weight: ``[picks]``.
        x: ``[tokens, dim]``.
        picks: the rows that each token reads.
        out: ``[rows, dim]``, at least float32; a table that is small beside the number of picks.
    """
    backend(x, x).table_grad(weight, x, picks, out)


def top_pairs(first: Tensor, second: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The ``top_k`` largest sums ``first[:, a] + second[:, b]`` of each row, largest first; NaN counts as largest.

    Args:
        first, second: ``[queries, n]``.
        top_k: at most ``n``.

    Returns:
        Their numbers ``a * n + b``, ``[queries, top_k]`` int64, and the sums, ``[queries, top_k]``.
    """
    return (native if native.searches(first, top_k) else reference).top_pairs(first, second, top_k)


class _ExpertMix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        picks: Picks,
        gate: Tensor,
        down: Tensor,
        up: Tensor,
        activation: str,
        sparse_grad: bool,
    ) -> Tensor:
        y, pre = expert_mix_forward(x, picks, gate, down, up, activation)
        ctx.picks, ctx.activation, ctx.sparse_grad = picks, activation, sparse_grad
        ctx.save_for_backward(x, pre, gate, down, up)
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, pre, gate, down, up = ctx.saved_tensors
        picks = Picks(ctx.picks.offsets, ctx.picks.expert)  # what it works out goes when this is done
        x, dy = x.contiguous(), dy.contiguous()
        dx, dgate, dpre, hidden = expert_mix_backward(dy, x, picks, pre, gate, down, up, ctx.activation)
        ddown: Tensor | None = None
        dup: Tensor | None = None
        if ctx.needs_input_grad[3] or ctx.needs_input_grad[4]:
            ddown, dup = expert_table_grads(dpre, hidden, x, dy, picks, down, ctx.sparse_grad)
        return dx.to(x.dtype), None, dgate.to(gate.dtype), ddown, dup, None, None


class _ValueMix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, values: Tensor, picks: Picks, sparse_grad: bool) -> Tensor:
        ctx.picks, ctx.sparse_grad = picks, sparse_grad
        ctx.save_for_backward(gate, values)
        with span("experts"):
            return mix(gate, values, picks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, values = ctx.saved_tensors
        picks = Picks(ctx.picks.offsets, ctx.picks.expert)  # what it works out goes when this is done
        dgate = dvalues = None
        if ctx.needs_input_grad[0]:
            with span("experts"):
                dgate = dots(dy, values, picks).to(gate.dtype)
        if ctx.needs_input_grad[1]:
            dvalues = value_table_grad(gate, dy, picks, values, ctx.sparse_grad)
        return dgate, dvalues, None, None
