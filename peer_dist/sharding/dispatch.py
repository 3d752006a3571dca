"""The routed layer: tokens and their picks in, the sum of the picked experts out, wherever these live.

Three nodes of autograd's graph, dispatch, experts and combine, each of which starts what the next one waits for:

    forward    dispatch: start x  |  experts: per part wait for x, compute, start y  |  combine: wait for y
    backward   combine: start dy  |  experts: per part wait for dy, compute, start dx; tables  |  dispatch: wait for dx

So the exchange of one part overlaps the experts of another, the gradients of the tables overlap the last of dx, and
what a caller computes between two nodes overlaps too: autograd runs the nodes that are ready in the reverse of the
order in which they were made, so that in the backward pass it lies between the same two.

With values in the place of experts (product-key memory) only gates travel to the owners: there is no dispatch, and no
dx; gates and their gradients are waited for where the owners need them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peer_dist.kernels import (
    Picks,
    dots,
    expert_mix,
    expert_mix_backward,
    expert_mix_forward,
    expert_table_grads,
    value_mix,
    value_table_grad,
)
from peer_dist.kernels.far import is_held
from peer_dist.kernels.pending import edge_of
from peer_dist.sharding.exchange import ExchangePlan, MergedPicks, Traffic, plan_exchange
from peer_dist.sharding.fixed import FixedPlan, fixed_plan
from peer_dist.sharding.grid import GridLayout
from peer_dist.sharding.transport import Arrival
from peer_dist.tracing import span, untraced

Beside = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
"""The two halves of a dense block beside the experts; see :func:`routed_experts`."""
_untraced_mix, _untraced_values = untraced(expert_mix), untraced(value_mix)


def routed_experts(
    x: Tensor,
    indices: Tensor,
    gates: Tensor,
    down: Tensor,
    up: Tensor,
    activation: str,
    layout: GridLayout,
    traffic: Traffic,
    sparse_grad: bool = False,
    dispatch_chunks: int = 1,
    beside: Beside | None = None,
) -> Tensor:
    """``y_t = sum_i gate_i * act(x_t . down_{e_i}) * up_{e_i}`` with the tables spread over a grid of ranks.

    Every rank of the layout's domain must call it, with any number of tokens, none included.

    Args:
        x: ``[tokens, dim]``, this rank's tokens.
        indices: ``[tokens, picks]`` int64 global expert numbers.
        gates: ``[tokens, picks]``.
        down, up: ``[rows, columns]``, this rank's shard.
        traffic: adds up what was sent.
        sparse_grad: see :func:`peer_dist.kernels.expert_mix`.
        dispatch_chunks: number of contiguous parts in which the tokens travel, the same on all ranks of the domain: the
            exchange of one part overlaps the experts of another. Without effect where nothing travels.
        beside: the two halves of ``[tokens, dim] -> anything -> [tokens, dim]``, whose result for ``x`` is added. The
            first half runs while tokens travel to the owners, the second while results travel home; backward likewise.

    Returns:
        ``[tokens, dim]``. The gradients of ``down`` and ``up`` are summed over the tokens of all ranks of the
        domain: those of the SUM of the ranks' losses.
    """
    if not layout.spread:
        _count(indices, traffic)
        mix = _untraced_mix if is_held(down) else expert_mix  # which rows come near depends on the picks
        y = mix(x, Picks.even(indices), gates.reshape(-1), down, up, activation, sparse_grad)
        return y if beside is None else y + beside[1](beside[0](x))
    return _spread_experts(
        x, indices, gates, down, up, activation, layout, traffic, sparse_grad, dispatch_chunks, beside
    )


@untraced
def _spread_experts(
    x: Tensor,
    indices: Tensor,
    gates: Tensor,
    down: Tensor,
    up: Tensor,
    activation: str,
    layout: GridLayout,
    traffic: Traffic,
    sparse_grad: bool,
    dispatch_chunks: int,
    beside: Beside | None,
) -> Tensor:
    gate, transit = _planned(indices, gates, layout, traffic, sparse_grad, dispatch_chunks)
    edge = _Dispatch.apply(x, gate, transit)
    half = None if beside is None else beside[0](x)
    edge = _Experts.apply(edge, down, up, activation, sparse_grad, transit, edge_of(down, up))
    transit.start_last_home()
    other = None if beside is None or half is None else beside[1](half)
    y = _Combine.apply(edge, transit, x.dtype)
    return y if other is None else y + other


def routed_values(
    indices: Tensor,
    gates: Tensor,
    values: Tensor,
    dtype: torch.dtype,
    layout: GridLayout,
    traffic: Traffic,
    sparse_grad: bool = False,
) -> Tensor:
    """``y_t = sum_i gate_i * value_{e_i}`` with the table of values spread over a grid of ranks.

    Every rank of the layout's domain must call it, with any number of tokens, none included. Picks and gates go to the
    owners and sums come home; backward their gradients go to the owners, and the gates' come home.

    Args:
        indices: ``[tokens, picks]`` int64 global value numbers.
        gates: ``[tokens, picks]``.
        values: ``[rows, columns]``, this rank's shard.
        dtype: of the result, in which it and its gradient travel.
        traffic: adds up what was sent.
        sparse_grad: see :func:`peer_dist.kernels.value_mix`.

    Returns:
        ``[tokens, dim]``. The gradient of ``values`` is that of the SUM of the ranks' losses, as with
        :func:`routed_experts`.
    """
    if not layout.spread:
        _count(indices, traffic)
        mix = _untraced_values if is_held(values) else value_mix
        return mix(gates.reshape(-1), values, Picks.even(indices), sparse_grad).to(dtype)
    return _spread_values(indices, gates, values, dtype, layout, traffic, sparse_grad)


def _count(indices: Tensor, traffic: Traffic) -> None:
    """Count picks that stay here; not in a trace, which would keep one count for all calls."""
    if not torch.compiler.is_compiling() and not torch.jit.is_tracing():
        traffic.picks_received += indices.numel()


@untraced
def _spread_values(
    indices: Tensor,
    gates: Tensor,
    values: Tensor,
    dtype: torch.dtype,
    layout: GridLayout,
    traffic: Traffic,
    sparse_grad: bool,
) -> Tensor:
    gate, transit = _planned(indices, gates, layout, traffic, sparse_grad)
    edge = _Values.apply(gate, values, dtype, sparse_grad, transit, edge_of(values))
    transit.start_last_home()
    return _Combine.apply(edge, transit, dtype)


def _planned(
    indices: Tensor, gates: Tensor, layout: GridLayout, traffic: Traffic, sparse_grad: bool, parts: int = 1
) -> tuple[Tensor, _Transit]:
    """The gates ``[sent picks]`` in sending order, and the plan, nothing under way yet.

    Raises:
        ValueError: sizes are to stay on the device, but the host needs them.
    """
    with span("dispatch"):
        picks = MergedPicks.of(indices)
        plan: ExchangePlan | FixedPlan
        if layout.transport.sizes_on_device:
            if layout.column_shards > 1 or parts > 1 or sparse_grad:
                raise ValueError(
                    f"{type(layout.transport).__name__} keeps sizes on the device, where column shards, parts of the "
                    "tokens (dispatch_chunks) and sparse gradients of tables cannot be had; use all_to_all for these"
                )
            plan, sent = fixed_plan(picks, layout, traffic)
        else:
            plan, sent = plan_exchange(picks, layout, traffic, parts)
        return picks.gates(gates, sent), _Transit(plan)


class _Transit:
    """What is under way between homes and owners for one batch, in one direction of differentiation at a time.

    The three nodes hand it to each other here. The edges between them are empty tensors: autograd never sees memory
    that a collective is still writing.
    """

    def __init__(self, plan: ExchangePlan | FixedPlan) -> None:
        self.plan = plan
        self.rows: tuple[Tensor, list[Arrival]] | None = None  # x or dy, on the way to the owners
        self.picks: Arrival | None = None  # gates on the way to the owners, or their gradients on the way home
        self.home: list[Arrival] = []  # y or dx of each part, on the way home
        self.last: Tensor | None = None  # y of the last part, not sent yet

    def take_rows(self) -> tuple[Tensor, list[Arrival]]:
        assert self.rows is not None
        (rows, arrivals), self.rows, self.home = self.rows, None, []
        return rows, arrivals

    def take_picks(self) -> Arrival:
        assert self.picks is not None
        picks, self.picks = self.picks, None
        return picks

    def take_home(self) -> list[Arrival]:
        home, self.home = self.home, []
        return home

    def start_home(self, value: Tensor, what: str) -> None:
        """Send the next part's ``[received tokens, columns]``, ``y`` or ``dx``, home."""
        with span("combine"):
            self.home.append(self.plan.start_rows_to_homes(value, len(self.home), what))

    def start_last_home(self) -> None:
        assert self.last is not None
        value, self.last = self.last, None
        self.start_home(value, "y")

    def sum_columns(self, what: str) -> Callable[[Tensor], Tensor] | None:
        return partial(self.plan.sum_columns, what=what) if self.plan.layout.column_shards > 1 else None


class _Dispatch(torch.autograd.Function):
    """``x [tokens, dim]`` and ``gate [sent picks]`` leave for the owners; their gradients arrive."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, transit: _Transit) -> Tensor:
        ctx.transit, ctx.dtype = transit, x.dtype
        with span("dispatch"):
            transit.picks = transit.plan.start_picks_to_owners(gate)
            transit.rows = transit.plan.start_rows_to_owners(x, "x")
        return x.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, Tensor, None]:
        transit: _Transit = ctx.transit
        with span("combine"):
            dx = transit.plan.add_rows_at_home(transit.take_home(), ctx.dtype)
            return dx, transit.take_picks().wait(), None


class _Experts(torch.autograd.Function):
    """What the owners compute for each part of the tokens as it arrives; the tables' gradients once, for all parts."""

    @staticmethod
    def forward(
        ctx: Any,
        edge: Tensor,
        down: Tensor,
        up: Tensor,
        activation: str,
        sparse_grad: bool,
        transit: _Transit,
        asked: Tensor | None,
    ) -> Tensor:
        plan = transit.plan
        x, arrivals = transit.take_rows()
        with span("dispatch"):
            gate = plan.picks_at_owners(transit.take_picks())
        pre_of_parts: list[Tensor] = []
        picks_of_parts: list[Tensor] = []  # kept for the backward pass, which finds there what was sorted here
        for part, arrival in zip(plan.parts, arrivals):
            # The last part is left to the caller: recomputation under a checkpoint stops here and needs no result.
            if transit.last is not None:
                transit.start_last_home()
            with span("dispatch"):
                arrival.wait()
            picks = plan.picks_of(part)
            transit.last, pre = expert_mix_forward(
                x[part.tokens], picks, gate[part.picks], down, up, activation, transit.sum_columns("dots")
            )
            pre_of_parts.append(pre)
            picks_of_parts += [picks.offsets, picks.expert]
        ctx.transit, ctx.activation, ctx.sparse_grad = transit, activation, sparse_grad
        ctx.held, ctx.asked = (down, up) if is_held(down) else None, asked  # they are known by their objects
        ctx.save_for_backward(x, gate, down, up, *pre_of_parts, *picks_of_parts)
        return x.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, edge: Tensor) -> tuple[Tensor | None, ...]:
        transit: _Transit = ctx.transit
        plan = transit.plan
        x, gate, down, up, *of_parts = ctx.saved_tensors
        down, up = ctx.held or (down, up)
        pre_of_parts, of_parts = of_parts[: len(plan.parts)], of_parts[len(plan.parts) :]
        picks_of_parts = list(map(Picks, of_parts[::2], of_parts[1::2]))
        dy, arrivals = transit.take_rows()
        goes_home = ctx.needs_input_grad[0]
        ddown: Tensor | None = None
        dup: Tensor | None = None
        gradients: list[tuple[Tensor, Tensor, Tensor]] = []  # dgate, dpre, hidden
        for part, picks, arrival, pre in zip(plan.parts, picks_of_parts, arrivals, pre_of_parts):
            with span("dispatch"):
                arrival.wait()
            dx, dgate, dpre, hidden = expert_mix_backward(
                dy[part.tokens],
                x[part.tokens],
                picks,
                pre,
                gate[part.picks],
                down,
                up,
                ctx.activation,
                transit.sum_columns("ddots"),
            )
            gradients.append((dgate, dpre, hidden))
            if goes_home:
                transit.start_home(dx, "dx")
        dgate, dpre, hidden = (values[0] if len(values) == 1 else torch.cat(values) for values in zip(*gradients))
        if goes_home:
            with span("combine"):
                transit.picks = plan.start_picks_to_homes(dgate)
        if ctx.held or ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            picks = picks_of_parts[0] if len(plan.parts) == 1 else plan.all_picks()
            ddown, dup = expert_table_grads(dpre, hidden, x, dy, picks, down, up, ctx.sparse_grad, ctx.asked)
        return (edge if goes_home else None), ddown, dup, None, None, None, None


class _Values(torch.autograd.Function):
    """What the owners compute in :func:`routed_values`, and the gates' way there and back: ``gate [sent picks]``."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        values: Tensor,
        dtype: torch.dtype,
        sparse_grad: bool,
        transit: _Transit,
        asked: Tensor | None,
    ) -> Tensor:
        plan = transit.plan
        with span("dispatch"):
            received = plan.picks_at_owners(plan.start_picks_to_owners(gate))
        transit.last = value_mix(received, values, plan.all_picks()).to(dtype)
        ctx.transit, ctx.sparse_grad = transit, sparse_grad
        ctx.held, ctx.asked = values if is_held(values) else None, asked
        ctx.save_for_backward(received, values)
        return received.new_empty(0, dtype=dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        transit: _Transit = ctx.transit
        plan, picks = transit.plan, transit.plan.all_picks()
        gate, values = ctx.saved_tensors
        held, values = ctx.held is not None, values if ctx.held is None else ctx.held
        dy, (arrival,) = transit.take_rows()
        with span("dispatch"):
            arrival.wait()
        going: Arrival | None = None
        if ctx.needs_input_grad[0]:
            dgate = dots(dy, values, picks)
            sum_columns = transit.sum_columns("ddots")
            if sum_columns is not None:
                dgate = sum_columns(dgate)
            with span("combine"):
                going = plan.start_picks_to_homes(dgate.to(gate.dtype))
        dvalues = None
        if held or ctx.needs_input_grad[1]:
            dvalues = value_table_grad(gate, dy, picks, values, ctx.sparse_grad, ctx.asked)
        with span("combine"):
            return None if going is None else going.wait(), dvalues, None, None, None, None


class _Combine(torch.autograd.Function):
    """``y [tokens, dim]`` at home; its gradient leaves for the owners."""

    @staticmethod
    def forward(ctx: Any, edge: Tensor, transit: _Transit, dtype: torch.dtype) -> Tensor:
        ctx.transit = transit
        with span("combine"):
            return transit.plan.add_rows_at_home(transit.take_home(), dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        with span("dispatch"):
            ctx.transit.rows = ctx.transit.plan.start_rows_to_owners(dy, "dy")
        return dy.new_empty(0), None, None
