"""How a function of ours becomes an operator of torch's: opaque to its compiler, exporters and tracers, and known to
them by its shapes, its gradient and its FLOPs.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from peer_dist.tracing import untraced

_library = torch.library.Library("peer_dist", "DEF")
functions: dict[str, Callable[..., Any]] = {}
"""What the operators run, by name, for whoever wants them run where torch runs their fakes."""


class _Caller(threading.local):
    python = False


caller = _Caller()
"""Who called the operator that this thread runs: ``python`` unless it was a compiled graph. Tensors of such a graph are
memory that its kernels write anew, past any count of versions, so that nothing found of one holds for the next call."""

_flops: dict[str, Callable[..., int]] = {}  # of operators that torch's counter does not know yet


def operator(
    schema: str, *, fake: Callable[..., Any], flops: Callable[..., int] | None = None
) -> Callable[[Callable[..., Any]], Any]:
    """Register the function below as ``torch.ops.peer_dist.<name>``, for tensors of any device.

    It runs with autocast off: what it computes in is its own decision. It refuses forward-mode derivatives.

    Args:
        schema: as torch writes it: ``name(Tensor x, int k) -> Tensor``. Results are new tensors.
        fake: the results' shapes and dtypes, as empty tensors, from the same arguments.
        flops: floating-point operations from the arguments with shapes in the place of tensors.

    Returns:
        What calls the operator, with the schema's arguments in their order.
    """
    name = schema.partition("(")[0]

    def register(function: Callable[..., Any]) -> Any:
        functions[name] = function
        _library.define(schema)
        _library.impl(name, untraced(_without_autocast(function)), "CompositeExplicitAutograd")
        torch.library.register_fake(f"peer_dist::{name}", fake, lib=_library)
        if flops is not None:
            _flops[name] = flops
        op = getattr(torch.ops.peer_dist, name).default

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            if torch.compiler.is_compiling():
                return op(*args)
            _tell_flops()
            _refuse_tangents(args)
            before, caller.python = caller.python, True
            try:
                return op(*args)
            finally:
                caller.python = before

        return call

    return register


def differentiable(name: str, save: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Give an operator its gradient.

    Args:
        name: of the operator.
        save: keeps in ``ctx`` (given as ``ctx, inputs, output`` by keyword) what ``backward`` needs.
        backward: ``ctx`` and the results' gradients to the arguments' gradients, by operators that torch can trace.
    """
    torch.library.register_autograd(f"peer_dist::{name}", backward, setup_context=save, lib=_library)


def differentiable_no_further(name: str) -> None:
    """Let an operator that computes gradients refuse to be differentiated itself, instead of giving none."""

    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(f"peer_dist::{name} has no gradient: the layers of peer_dist can be differentiated once")

    torch.library.register_autograd(f"peer_dist::{name}", backward, lib=_library)


def _tell_flops() -> None:
    """Tell torch's FLOP counter of the operators, if it is in use: importing it takes a while where Triton is."""
    if _flops and "torch.utils.flop_counter" in sys.modules:
        from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula

        told = {}
        for name in list(_flops):
            formula = _flops.pop(name, None)
            if formula is not None:  # else another thread was faster
                packet = getattr(torch.ops.peer_dist, name)
                register_flop_formula(packet)(formula)
                told[packet] = flop_registry[packet]
        for mode in _get_current_dispatch_mode_stack():  # a counter copies the formulas when it is made
            counter = getattr(mode, "counter", None)
            if isinstance(counter, FlopCounterMode):
                counter.flop_registry.update(told)


def _refuse_tangents(args: tuple[Any, ...]) -> None:
    """Refuse forward-mode differentiation, in which an operator would lose the tangents and say nothing."""
    if forward_ad._current_level < 0:
        return
    tensors = (value for value in args if isinstance(value, Tensor))
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError(
            "the layers of peer_dist have no forward-mode derivative (jvp, jacfwd, dual numbers); use reverse mode"
        )


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any) -> Any:
        kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
        if not kinds:
            return function(*args)
        with ExitStack() as off:
            for kind in kinds:
                off.enter_context(torch.autocast(kind, enabled=False))
            return function(*args)

    return call
