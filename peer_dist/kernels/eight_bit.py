"""Tables of eight bits an element, with a scale per row, and how float32 rows are rounded to them.

A row's scale is the smallest power of two, of 2**-100 and more, with which its largest element fits. Codes times scale
are therefore exact in bfloat16: a checkpoint holds the values in that dtype, and who quantises these again has the same
values, though perhaps by other codes under a finer scale.

No code stands for an infinity or NaN. A row that gets one has the scale NaN, and with it all of its elements are NaN:
where float32 would have one such element, what reads the row sees that something went wrong too.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

CODES = {"int8": torch.int8, "float8_e4m3": torch.uint8}
"""The dtype of a table's codes by the name of its format. The bits of float8_e4m3fn are kept as uint8: modules cast
what is floating, and the codes of a table must not be cast."""
LARGEST = {torch.int8: 127.0, torch.uint8: 448.0}
"""The largest code as a number."""
_LEAST_EXPONENT = -100  # of a scale: codes times scale, and their products, stay normal numbers of float32


class EightBit(NamedTuple):
    """A table for the kernels.

    Attributes:
        codes: ``[rows, columns]`` int8, or uint8 with the bits of float8_e4m3fn.
        scales: ``[rows]`` float32, powers of two.
    """

    codes: Tensor
    scales: Tensor


def is_eight_bit(table: Tensor) -> bool:
    """Whether a table's elements are codes of this module."""
    return table.dtype in LARGEST


def let_scales(table: Tensor, scales: Tensor) -> None:
    """Say which scales the rows of an eight-bit table have, ``[rows]`` float32, in memory of the table's own kind."""
    table.scales = scales  # type: ignore[attr-defined]


def scales_of(table: Tensor) -> Tensor | None:
    """The scales of an eight-bit table's rows; None of any other table.

    Raises:
        RuntimeError: codes that nobody gave scales, as a detached copy of a table is.
    """
    if not is_eight_bit(table):
        return None
    scales: Tensor | None = getattr(table, "scales", None)
    if scales is None:
        raise RuntimeError(
            f"codes of eight bits {list(table.shape)} without the scales of their rows, as in a detached copy of a "
            "layer's table, mean nothing: take the values, which the layer's state_dict() has"
        )
    return scales


def gradient_dtype(table: Tensor) -> torch.dtype:
    """The dtype of a table's gradient: its own, or bfloat16 where that has eight bits."""
    return torch.bfloat16 if is_eight_bit(table) else table.dtype


def dequantised(codes: Tensor, scales: Tensor) -> Tensor:
    """The values of rows, float32: ``[..., columns]`` codes times ``[...]`` scales."""
    numbers = codes if codes.dtype == torch.int8 else codes.view(torch.float8_e4m3fn)
    return numbers.float() * scales[..., None]


def quantised(values: Tensor, dtype: torch.dtype, bits: Tensor | None = None) -> EightBit:
    """Rows in eight bits.

    Args:
        values: ``[rows, columns]`` float32, below 2**127.
        dtype: of the codes.
        bits: ``[rows, columns]`` int32 from 0 to 65535, to round stochastically: up with the probability of the
            remainder. None: to the nearest, of two as near to the even one.
    """
    largest = LARGEST[dtype]
    most = values.abs().amax(1) if values.shape[1] else values.new_zeros(len(values))
    # the least power of two s with most <= largest s: powers of two divide exactly, so the comparison is exact
    least = 2.0**_LEAST_EXPONENT
    exponent = torch.frexp(most.clamp(min=least) / largest).exponent.clamp_(min=_LEAST_EXPONENT)
    half = torch.ldexp(torch.ones_like(most), exponent - 1)
    scales = torch.where((half * largest >= most) & (exponent > _LEAST_EXPONENT), half, 2 * half)
    scales = torch.where(most == 0, 0.5, scales)  # of which any would do
    finite = most.isfinite()
    scaled = torch.where(finite[:, None], values / scales[:, None], 0.0)
    magnitude = scaled.abs()
    if dtype == torch.int8:
        steps = torch.ones_like(magnitude)
    else:  # three bits after the leading one; below 2**-6 as many as there
        steps = torch.ldexp(torch.ones_like(magnitude), torch.frexp(magnitude).exponent.clamp_(min=-5) - 4)
    places = magnitude / steps
    places = places.round() if bits is None else (places + bits.float() * 2.0**-16).floor()
    codes = (places * steps).copysign(scaled)
    codes = codes.to(torch.int8) if dtype == torch.int8 else codes.to(torch.float8_e4m3fn).view(dtype)
    return EightBit(codes, torch.where(finite, scales, math.nan))
