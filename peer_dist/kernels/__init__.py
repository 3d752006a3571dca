"""expert_mix, the op that PEER spends its time in, its parts, and the one place that picks their backend.

They are operators of torch's (``torch.ops.peer_dist``), in which picks are the two tensors of :class:`Picks`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peer_dist.kernels import mkl, native, reference
from peer_dist.kernels.allocation import huge_pages
from peer_dist.kernels.custom_ops import differentiable, differentiable_no_further, operator
from peer_dist.kernels.eight_bit import EightBit, gradient_dtype
from peer_dist.kernels.far import is_held, near
from peer_dist.kernels.pending import (
    PendingSums,
    asks_for_sums,
    edge_of,
    gradient_that_grows,
    leave_sums,
    place_for_sums,
    reached,
)
from peer_dist.kernels.picks import Picks
from peer_dist.kernels.reference import ACTIVATIONS, Composed, wide
from peer_dist.tracing import span

__all__ = [
    "ACTIVATIONS",
    "Picks",
    "backend",
    "differentiable",
    "differentiable_no_further",
    "dots",
    "expert_mix",
    "expert_mix_backward",
    "expert_mix_forward",
    "expert_table_grads",
    "huge_pages",
    "operator",
    "row_gradient",
    "search",
    "search_backward",
    "sum_rows",
    "value_mix",
    "value_table_grad",
    "wide",
]

Table = Tensor | EightBit
"""What backends read rows of: near, and in floating-point numbers or eight bits."""

_MKL, _REFERENCE = Composed(mkl), Composed(reference)


def backend(x: Tensor, *read: Table) -> Any:
    """The module, or the composed ops, that compute the mix for these tensors' devices and dtypes."""
    if x.is_cuda:
        from peer_dist.kernels import triton  # late: importing it takes a while, and needs a GPU to be of use

        return triton if triton.available(x, *read) else _REFERENCE
    if native.available(x, *read):
        return native
    tables = [table for table in read if isinstance(table, Tensor)]
    return _MKL if len(tables) == len(read) and mkl.available(x, *tables) else _REFERENCE


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
        ``[tokens, dim]`` in ``x``'s dtype. Differentiable (once) in ``x``, ``gate``, ``down`` and ``up``.
    """
    if is_held(down):
        held: Tensor = _HeldMix.apply(x, gate, picks, down, up, activation, edge_of(down, up))
        return held
    return _expert_mix(x, picks.offsets, picks.expert, gate, down, up, activation, sparse_grad, None, None)[0]


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
        ``y [tokens, dim]`` in ``x``'s dtype and the pre-activations ``x_t . down_e``, ``[picks]``, in at least float32.
    """
    if sum_columns is None:
        here = near(picks, down, up)
        offsets, expert = here.picks.offsets, here.picks.expert
        return _expert_mix(x, offsets, expert, gate, *here.tables, activation, False, *here.scales)
    y, pre = reference.by_halves(_Halves, x, picks, gate, down, up, activation, sum_columns)
    return y.to(x.dtype), pre


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
        ``dx [tokens, dim]`` and ``dgate [picks]`` in the dtypes of ``x`` and ``gate``; ``dpre`` and ``hidden`` (the
        gated activation), ``[picks]`` in ``pre``'s dtype, for :func:`expert_table_grads`.
    """
    if sum_columns is None:
        here = near(picks, down, up)
        offsets, expert = here.picks.offsets, here.picks.expert
        return _expert_mix_backward(dy, x, offsets, expert, pre, gate, *here.tables, activation, *here.scales)
    dx, dgate, dpre, hidden = reference.backward_by_halves(
        _Halves, dy, picks, pre, gate, down, up, activation, sum_columns
    )
    return dx.to(x.dtype), dgate.to(gate.dtype), dpre, hidden


def expert_table_grads(
    dpre: Tensor,
    hidden: Tensor,
    x: Tensor,
    dy: Tensor,
    picks: Picks,
    down: Tensor,
    up: Tensor,
    sparse: bool = False,
    edge: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of ``down`` and ``up``: ``sum of dpre_i x_t`` and ``sum of hidden_i dy_t`` of each row.

    Args:
        dpre, hidden: ``[picks]``.
        x, dy: ``[tokens, dim]``.
        down, up: ``[rows, dim]``, of one dtype.
        sparse: coalesced sparse tensors of the picked rows instead of dense ones.
        edge: of held tables (:func:`~peer_dist.kernels.pending.edge_of`).

    Returns:
        ``ddown`` and ``dup``, ``[rows, dim]`` in the tables' dtype; None where the sums are left on the tables, or were
        added to the gradients there are (:mod:`peer_dist.kernels.pending`).
    """
    ddown, dup = _grads_of_tables([dpre, hidden], [x, dy], picks.offsets, picks.expert, [down, up], sparse, edge)
    return ddown, dup


def dots(x: Tensor, table: Tensor, picks: Picks) -> Tensor:
    """``x_t . table_e`` of each pick: ``[tokens, dim], [rows, dim] -> [picks]``, at least float32."""
    here = near(picks, table)
    return _dots(x, *here.tables, here.picks.offsets, here.picks.expert, *here.scales)


def value_mix(gate: Tensor, values: Tensor, picks: Picks, sparse_grad: bool = False) -> Tensor:
    """``sum_i gate_i values_{e_i}`` of each token, differentiable (once) in ``gate`` and ``values``.

    Args:
        gate: ``[picks]``.
        values: ``[rows, dim]``.
        picks: the rows that each token reads.
        sparse_grad: give ``values`` a sparse gradient (coalesced, of the picked rows) instead of a dense one.

    Returns:
        ``[tokens, dim]`` in at least float32.
    """
    if is_held(values):
        held: Tensor = _HeldValues.apply(gate, picks, values, edge_of(values))
        return held
    return _value_mix(gate, values, picks.offsets, picks.expert, sparse_grad, None)


def value_table_grad(
    gate: Tensor, dy: Tensor, picks: Picks, values: Tensor, sparse: bool = False, edge: Tensor | None = None
) -> Tensor | None:
    """``sum of gate_i dy_t`` of each row of ``values``, of its shape and dtype; for a table of any size. None where
    the sums are left on the table, or were added to its gradient (:mod:`peer_dist.kernels.pending`).

    Args:
        gate: ``[picks]``.
        dy: ``[tokens, dim]``.
        sparse: a coalesced sparse tensor of the picked rows instead of a dense one.
        edge: of a held table (:func:`~peer_dist.kernels.pending.edge_of`).
    """
    (grad,) = _grads_of_tables([gate], [dy], picks.offsets, picks.expert, [values], sparse, edge)
    return grad


def sum_rows(rows: Tensor, picks: Picks, dtype: torch.dtype) -> Tensor:
    """The sum of the rows that each token picked, in the order of its picks; not differentiable.

    Args:
        rows: ``[rows, dim]``.
        picks: the rows of each token.
        dtype: of the result; sums are kept in at least float32.

    Returns:
        ``[tokens, dim]``.
    """
    ones = torch.ones(picks.expert.numel(), dtype=wide(rows), device=rows.device)
    sums: Tensor = backend(ones, rows).mix(ones, rows, picks, dtype=dtype)
    return sums


def row_gradient(rows: Tensor, values: Tensor, size: int) -> Tensor:
    """The gradient ``[size, columns]`` with ``values [touched, columns]`` at distinct ascending ``rows [touched]``."""
    return torch.sparse_coo_tensor(
        rows[None],
        values,
        (size, values.shape[1]),
        dtype=values.dtype,
        device=values.device,
        is_coalesced=True,
        check_invariants=False,
    )


def search(queries: Iterable[Tensor], keys: Tensor, numbers: Tensor, scores: Tensor) -> None:
    """The product keys of largest inner product with each query, exactly; see
    :func:`peer_dist.kernels.reference.top_pairs` for their order.

    Args:
        queries: the tokens in consecutive chunks, ``[tokens of the chunk, heads, key_dim]`` each, which need not exist
            before they are asked for. Little is held but for one chunk.
        keys: sub-keys ``[2, n, key_dim / 2]``, shared by the heads, or ``[heads, 2, n, key_dim / 2]``.
        numbers: ``[tokens, heads, top_k]`` int64, to be written, ``top_k`` at most ``n``; ``a * n + b`` for sub-keys
            ``a`` and ``b``.
        scores: ``[tokens, heads, top_k]``, to be written; computed in its dtype, which is at
            least float32.
    """
    backend(scores).search(queries, keys, numbers, scores)


def search_backward(
    dscores: Tensor, numbers: Tensor, query: Tensor, keys: Tensor, dkeys: Tensor, dtype: torch.dtype
) -> Tensor:
    """The gradients of one chunk of :func:`search`, in a fixed order of the sums.

    Args:
        dscores, numbers: ``[tokens, heads, top_k]``.
        query: ``[tokens, heads, key_dim]``.
        keys: as given to :func:`search`.
        dkeys: of ``keys``' shape, in ``dscores``' dtype, to be added to.
        dtype: of the queries' gradient, whose sums are in at least float32.

    Returns:
        The queries' gradient, ``[tokens, heads, key_dim]`` in ``dtype``.
    """
    keys = keys.contiguous()
    gradient: Tensor = backend(query, keys).search_backward(dscores, numbers, query, keys, dkeys, dtype)
    return gradient


# ---------------------------------------------------------------------------------------------------------------------
# The operators. Their FLOPs are those of the products over picks.


def _read(table: Tensor, scales: Tensor | None) -> Table:
    return table if scales is None else EightBit(table, scales)


def _empty(like: Tensor, shape: Sequence[Any], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


@operator(
    "expert_mix(Tensor x, Tensor offsets, Tensor expert, Tensor gate, Tensor down, Tensor up, str activation, "
    "bool sparse_grad, Tensor? down_scales=None, Tensor? up_scales=None) -> (Tensor, Tensor)",
    fake=lambda x, offsets, expert, gate, down, up, activation, sparse_grad, *_: (
        _empty(x, x.shape, x.dtype),
        _empty(x, expert.shape, wide(x, gate, down, up)),
    ),
    flops=lambda x, offsets, expert, *_, **__: 4 * expert[0] * x[1],
)
def _expert_mix(
    x: Tensor,
    offsets: Tensor,
    expert: Tensor,
    gate: Tensor,
    down: Tensor,
    up: Tensor,
    activation: str,
    sparse_grad: bool,
    down_scales: Tensor | None = None,
    up_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    with span("experts"):
        tables = _read(down, down_scales), _read(up, up_scales)
        y, pre = backend(x, *tables).forward(x.contiguous(), Picks(offsets, expert), gate, *tables, activation)
        return y.to(x.dtype), pre.to(wide(x, gate, down, up))


@operator(
    "expert_mix_backward(Tensor dy, Tensor x, Tensor offsets, Tensor expert, Tensor pre, Tensor gate, Tensor down, "
    "Tensor up, str activation, Tensor? down_scales=None, Tensor? up_scales=None) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=lambda dy, x, offsets, expert, pre, gate, down, up, activation, *_: (
        _empty(x, x.shape, x.dtype),
        _empty(x, expert.shape, gate.dtype),
        _empty(x, expert.shape, pre.dtype),
        _empty(x, expert.shape, pre.dtype),
    ),
    flops=lambda dy, x, offsets, expert, *_, **__: 4 * expert[0] * x[1],
)
def _expert_mix_backward(
    dy: Tensor,
    x: Tensor,
    offsets: Tensor,
    expert: Tensor,
    pre: Tensor,
    gate: Tensor,
    down: Tensor,
    up: Tensor,
    activation: str,
    down_scales: Tensor | None = None,
    up_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with span("experts"):
        picks, tables = Picks(offsets, expert), (_read(down, down_scales), _read(up, up_scales))
        dx, dgate, dpre, hidden = backend(x, *tables).backward(
            dy.contiguous(), x.contiguous(), picks, pre, gate, *tables, activation
        )
        return dx.to(x.dtype), dgate.to(gate.dtype), dpre.to(pre.dtype), hidden.to(pre.dtype)


@operator(
    "value_mix(Tensor gate, Tensor values, Tensor offsets, Tensor expert, bool sparse_grad, Tensor? scales=None) "
    "-> Tensor",
    fake=lambda gate, values, offsets, expert, sparse_grad, *_: _empty(
        values, (offsets.shape[0] - 1, values.shape[1]), wide(gate, values)
    ),
    flops=lambda gate, values, offsets, expert, *_, **__: 2 * expert[0] * values[1],
)
def _value_mix(
    gate: Tensor, values: Tensor, offsets: Tensor, expert: Tensor, sparse_grad: bool, scales: Tensor | None = None
) -> Tensor:
    with span("experts"):
        table = _read(values, scales)
        return backend(gate, table).mix(gate, table, Picks(offsets, expert)).to(wide(gate, values))


@operator(
    "dots(Tensor x, Tensor table, Tensor offsets, Tensor expert, Tensor? scales=None) -> Tensor",
    fake=lambda x, table, offsets, expert, *_: _empty(x, expert.shape, wide(x, table)),
    flops=lambda x, table, offsets, expert, *_, **__: 2 * expert[0] * table[1],
)
def _dots(x: Tensor, table: Tensor, offsets: Tensor, expert: Tensor, scales: Tensor | None = None) -> Tensor:
    with span("experts"):
        read = _read(table, scales)
        return backend(x, read).dots(x.contiguous(), read, Picks(offsets, expert)).to(wide(x, table))


def _backend_and_sums(
    weights: list[Tensor], xs: list[Tensor], dtype: torch.dtype
) -> tuple[Any, list[tuple[Tensor, Tensor]]]:
    """What computes the gradients of tables of this dtype, and what of."""
    table = xs[0].new_empty((0, xs[0].shape[1]), dtype=dtype)
    return backend(xs[0], table), [(weight, x.contiguous()) for weight, x in zip(weights, xs)]


@operator(
    "table_grads(Tensor[] weights, Tensor[] xs, Tensor offsets, Tensor expert, SymInt rows, ScalarType dtype) "
    "-> Tensor[]",
    fake=lambda weights, xs, offsets, expert, rows, dtype: [_empty(x, (rows, x.shape[1]), dtype) for x in xs],
    flops=lambda weights, xs, offsets, expert, *_, **__: 2 * len(xs) * expert[0] * xs[0][1],
)
def _table_grads(
    weights: list[Tensor], xs: list[Tensor], offsets: Tensor, expert: Tensor, rows: int, dtype: torch.dtype
) -> list[Tensor]:
    with span("experts"):
        ops, sums = _backend_and_sums(weights, xs, dtype)
        grads: list[Tensor] = ops.table_grads(sums, Picks(offsets, expert), rows, dtype=dtype)
        return grads


def _some_rows(weights: list[Tensor], xs: list[Tensor], offsets: Tensor, expert: Tensor, rows: Any, dtype: Any) -> Any:
    try:
        touched = torch.library.get_ctx().new_dynamic_size()
    except RuntimeError:  # of a plain meta tensor, which can stand for no number of rows but one
        touched = min(expert.shape[0], rows)
    return [_empty(expert, (touched,), torch.int64), *(_empty(x, (touched, x.shape[1]), dtype) for x in xs)]


@operator(
    "sparse_table_grads(Tensor[] weights, Tensor[] xs, Tensor offsets, Tensor expert, SymInt rows, ScalarType dtype) "
    "-> Tensor[]",
    fake=_some_rows,
    flops=lambda weights, xs, offsets, expert, *_, **__: 2 * len(xs) * expert[0] * xs[0][1],
)
def _sparse_table_grads(
    weights: list[Tensor], xs: list[Tensor], offsets: Tensor, expert: Tensor, rows: int, dtype: torch.dtype
) -> list[Tensor]:
    with span("experts"):
        ops, sums = _backend_and_sums(weights, xs, dtype)
        touched, grads = ops.sparse_table_grads(sums, Picks(offsets, expert), rows, dtype=dtype)
        return [touched, *grads]


for _name in ("expert_mix_backward", "dots", "table_grads", "sparse_table_grads"):
    differentiable_no_further(_name)


class _Halves:
    """The two products, for :func:`peer_dist.kernels.reference.by_halves`."""

    dots, mix = staticmethod(dots), staticmethod(value_mix)


def _grads_of_tables(
    weights: list[Tensor],
    xs: list[Tensor],
    offsets: Tensor,
    expert: Tensor,
    tables: list[Tensor],
    sparse: bool,
    edge: Tensor | None = None,
) -> Sequence[Tensor | None]:
    """``sum of w_i x_t`` of each row of ``table [rows, dim]``, for each table; or nothing, but the sums on them."""
    rows, dtype = tables[0].shape[0], gradient_dtype(tables[0])
    held = is_held(tables[0])
    if not sparse and not held:
        growing = [grad for grad in map(gradient_that_grows, tables) if grad is not None]
        if len(growing) == len(tables):
            with span("experts"):
                ops, sums = _backend_and_sums(weights, xs, dtype)
                ops.table_grads(sums, Picks(offsets, expert), rows, dtype=dtype, out=growing)
            return [None] * len(tables)
        grads: list[Tensor] = _table_grads(weights, xs, offsets, expert, rows, dtype)
        return grads
    if held:
        asked = [asks_for_sums(table) and reached(edge) for table in tables]
    else:
        asked = [all(place_for_sums(table) is not None for table in tables)] * len(tables)
    if any(asked):
        ops, sums = _backend_and_sums(weights, xs, dtype)
        left_on = [table for table, there in zip(tables, asked) if there]
        leave_sums(PendingSums(ops, sums, Picks(offsets, expert), tables), left_on)
    if not any(table.requires_grad and not there for table, there in zip(tables, asked)):
        return [None] * len(tables)
    touched, *some = _sparse_table_grads(weights, xs, offsets, expert, rows, dtype)
    touched = touched.to(tables[0].device)  # where a far table is
    return [None if there else row_gradient(touched, grad.to(touched.device), rows) for grad, there in zip(some, asked)]


def _keep_experts(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.activation, ctx.sparse_grad, _, _ = inputs  # held tables have a gradient of their own
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward_of_experts(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    x, offsets, expert, gate, down, up, pre = ctx.saved_tensors
    ddown: Tensor | None = None
    dup: Tensor | None = None
    dx, dgate, dpre, hidden = _expert_mix_backward(
        dy, x, offsets, expert, pre, gate, down, up, ctx.activation, None, None
    )
    if ctx.needs_input_grad[4] or ctx.needs_input_grad[5]:
        ddown, dup = _grads_of_tables([dpre, hidden], [x, dy], offsets, expert, [down, up], ctx.sparse_grad)
    return dx, None, None, dgate, ddown, dup, None, None, None, None


def _keep_values(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.sparse_grad, _ = inputs
    ctx.save_for_backward(*tensors)


def _backward_of_values(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    gate, values, offsets, expert = ctx.saved_tensors
    dgate = dvalues = None
    if ctx.needs_input_grad[0]:
        dgate = _dots(dy, values, offsets, expert, None).to(gate.dtype)
    if ctx.needs_input_grad[1]:
        (dvalues,) = _grads_of_tables([gate], [dy], offsets, expert, [values], ctx.sparse_grad)
    return dgate, dvalues, None, None, None, None


differentiable("expert_mix", _keep_experts, _backward_of_experts)
differentiable("value_mix", _keep_values, _backward_of_values)


def _versions(*tables: Tensor) -> list[int]:
    return [0 if table.is_inference() else table._version for table in tables]


def _check_versions(before: list[int], *tables: Tensor) -> None:
    """As autograd does with what it saves, which held tables cannot be."""
    if _versions(*tables) != before:
        raise RuntimeError(
            f"a table of {list(tables[0].shape)} was written to, by an optimizer's step say, between a forward pass "
            "and its backward pass, whose gradients would be those of other weights: go backward first"
        )


class _HeldMix(torch.autograd.Function):
    """:func:`expert_mix` of held tables, whose rows are asked for in both directions."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate: Tensor,
        picks: Picks,
        down: Tensor,
        up: Tensor,
        activation: str,
        edge: Tensor | None,
    ) -> Tensor:
        y, pre = expert_mix_forward(x, picks, gate, down, up, activation)
        ctx.activation, ctx.tables, ctx.versions, ctx.edge = activation, (down, up), _versions(down, up), edge
        ctx.save_for_backward(x, gate, pre, picks.offsets, picks.expert)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, pre, offsets, expert = ctx.saved_tensors
        picks = Picks(offsets, expert)
        down, up = ctx.tables
        _check_versions(ctx.versions, down, up)
        dx, dgate, dpre, hidden = expert_mix_backward(dy, x, picks, pre, gate, down, up, ctx.activation)
        ddown, dup = expert_table_grads(dpre, hidden, x, dy, picks, down, up, True, ctx.edge)
        return dx, dgate, None, ddown, dup, None, None


class _HeldValues(torch.autograd.Function):
    """:func:`value_mix` of a held table."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, picks: Picks, values: Tensor, edge: Tensor | None) -> Tensor:
        here = near(picks, values)
        ctx.values, ctx.versions, ctx.edge = values, _versions(values), edge
        ctx.save_for_backward(gate, picks.offsets, picks.expert)
        y: Tensor = _value_mix(gate, *here.tables, here.picks.offsets, here.picks.expert, False, *here.scales)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, offsets, expert = ctx.saved_tensors
        picks = Picks(offsets, expert)
        _check_versions(ctx.versions, ctx.values)
        dgate = dots(dy, ctx.values, picks).to(gate.dtype)
        return dgate, None, value_table_grad(gate, dy, picks, ctx.values, True, ctx.edge), None
