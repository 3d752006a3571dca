"""How our Triton kernels are compiled and launched, and which tensors they can serve."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from peer_dist.kernels.eight_bit import LARGEST, EightBit

try:
    import triton
    import triton.language as tl
except ImportError:  # then available() is False and no kernel is called
    triton = tl = None

OPTIONS = {"enable_fp_fusion": True}
"""Compiler options of every kernel that asks for no others: fused multiply-adds, whatever Triton's default is."""

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})

BY_PICK = (
    "offsets", "expert", "gate", "pre", "dgate", "dpre", "hidden", "token", "order", "weight", "slots", "called",
)  # fmt: skip
"""Parameters with a number for each pick, or for each row touched. Those of a part of the tokens begin anywhere, and
their alignment is of no use to a kernel: to compile it once more for each would stop some ranks in mid-training, and
others not."""

COUNTS = (
    "picks", "rows", "runs", "each", "size", "tokens", "touched", "length", "batch", "key", "first_row",
    "first_column",
)  # fmt: skip
"""Parameters that are counts, which differ from step to step or from rank to rank: no kernel is compiled for one of
them."""


def jit(function: Any) -> Any:
    """Triton's just-in-time compilation of a kernel, once for all parts of the tokens and all numbers of picks."""
    if triton is None:
        return function
    names = inspect.signature(function).parameters
    return triton.jit(
        do_not_specialize_on_alignment=[name for name in BY_PICK if name in names],
        do_not_specialize=[name for name in COUNTS if name in names],
    )(function)


@jit
def _nothing() -> None:
    """Tells whether kernels are interpreted."""


INTERPRETED = triton is not None and not isinstance(_nothing, triton.JITFunction)


def available(*tensors: Tensor | EightBit) -> bool:
    """Whether these kernels can serve these tensors: on CUDA, or anywhere under Triton's interpreter; and with columns,
    which the last shards of few columns over many ranks may lack.
    """
    if triton is None:
        return False
    elements = [(tensor.codes, LARGEST) if isinstance(tensor, EightBit) else (tensor, DTYPES) for tensor in tensors]
    return all(
        (INTERPRETED or tensor.is_cuda) and tensor.dtype in dtypes and 0 not in tensor.shape[1:]
        for tensor, dtypes in elements
    )


def launch(kernel: Any, grid: tuple[int, ...], *args: Tensor | float | None, num_warps: int, **constants: Any) -> None:
    """Run a kernel on the device of its first argument; an empty grid is no launch.

    Raises:
        ValueError: a tensor is not contiguous.
    """
    for tensor in args:
        if isinstance(tensor, Tensor) and not tensor.is_contiguous():
            raise ValueError(f"tables must be contiguous, not {tuple(tensor.shape)} with strides {tensor.stride()}")
    if 0 in grid:
        return
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, num_warps=num_warps, **(OPTIONS | constants))


def accumulator(dtype: torch.dtype) -> Any:
    """Triton's dtype of sums that torch's ``dtype`` is wide enough for."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def element(dtype: torch.dtype) -> Any:
    """Triton's name of torch's ``dtype``."""
    return getattr(tl, str(dtype).removeprefix("torch."))
