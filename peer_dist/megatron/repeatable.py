"""The same bits from the same numbers on CUDA, where some of torch's kernels add up in whatever order threads come.

torch has kernels that add up in one order, behind one flag for the whole process. Nothing else needs the flag: it would
make every scatter a sort, fill every new tensor, and refuse what has no such kernel, cuBLAS among it. So it is on for
the few calls that need it, on CUDA only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


def varies(device: torch.device) -> bool:
    """Whether kernels on this device may give other bits each time; the CPU's never do."""
    return device.type == "cuda"


@contextlib.contextmanager
def repeatable() -> Iterator[None]:
    """A context in which torch takes kernels that add up in one order, whatever thread calls them."""
    # not torch.use_deterministic_algorithms, which imports torch's compiler
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch._C._get_deterministic_fill_uninitialized_memory()
    torch._C._set_deterministic_algorithms(True, warn_only=False)
    torch._C._set_deterministic_fill_uninitialized_memory(False)
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(before[0], warn_only=before[1])
        torch._C._set_deterministic_fill_uninitialized_memory(filled)


def with_repeatable_backward(function: Callable[..., Any], *inputs: Tensor) -> Any:
    """``function(*inputs)``, whose backward pass runs in :func:`repeatable`; its forward pass does not.

    Args:
        function: returns a tensor or a tuple of tensors; takes what else it needs from elsewhere, and no gradients
            reach that. Its backward pass runs once.
    """
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in inputs):
        return function(*inputs)
    return _RepeatableBackward.apply(function, *inputs)


class _RepeatableBackward(torch.autograd.Function):
    """A part of the graph as one node, whose own graph is walked inside the context.

    Hooks around the nodes could switch the flag too, but nobody would call the last one after an error.
    """

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Any], *inputs: Tensor) -> Any:
        leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in inputs]
        with torch.enable_grad():
            result = function(*leaves)
        outputs = result if isinstance(result, tuple) else (result,)
        ctx.graph = leaves, outputs
        ends = tuple(output.detach() for output in outputs)
        ctx.mark_non_differentiable(*(end for end, output in zip(ends, outputs) if not output.requires_grad))
        return ends if isinstance(result, tuple) else ends[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        leaves, outputs = ctx.graph
        del ctx.graph  # now, like any node's: its tensors would last until the whole pass ends
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        ends = [output for output in outputs if output.requires_grad]
        given = [gradient for output, gradient in zip(outputs, gradients) if output.requires_grad]
        with repeatable():
            got = iter(torch.autograd.grad(ends, wanted, given, allow_unused=True))
        return None, *(next(got) if leaf.requires_grad else None for leaf in leaves)
