"""In what form the rows of ``x``, ``y``, ``dy`` and ``dx`` travel between homes and owners.

Picks and gates always travel as they are. A row that was rounded for the way counts as the row itself: the owner
computes with what arrived, and gradients pass the rounding straight through, themselves rounded likewise.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Wire:
    """Rows travel as they are.

    Attributes:
        beside: bytes that are sent beside the elements of each row.
    """

    beside = 0

    def itemsize(self, itemsize: int) -> int:
        """Bytes of a travelling element of a row whose elements have ``itemsize`` bytes at home."""
        return itemsize

    def length(self, width: int) -> int:
        """Elements of the message of a row of ``width`` elements."""
        return width

    def encode(self, rows: Tensor) -> Tensor:
        """``[rows, width]``, floating point -> their messages, ``[rows, length(width)]``."""
        return rows

    def decode(self, messages: Tensor) -> Tensor:
        """Messages ``[rows, length(width)]`` -> ``[rows, width]``, of the dtype that holds them."""
        return messages

    def __repr__(self) -> str:
        return type(self).__name__


class BFloat16(Wire):
    """Elements are rounded to bfloat16, each by at most 2^-8 of itself; narrower ones travel as they are."""

    def itemsize(self, itemsize: int) -> int:
        """At most 2."""
        return min(2, itemsize)

    def encode(self, rows: Tensor) -> Tensor:
        """bfloat16; no copy of what has 16 bits already."""
        return rows if rows.element_size() <= 2 else rows.bfloat16()


class Float8(Wire):
    """Elements are e4m3 multiples of a float32 scale of the row, with which its largest element becomes 448.

    An element is rounded by at most 2^-4 of itself, and the small ones by at most 2^-10 of the scale (2^-18.8 of the
    row's largest). A row with an element that is not finite arrives without a finite element: whoever looks for one
    finds it.
    """

    beside = 4
    _largest = 448.0  # of e4m3 without infinities

    def itemsize(self, itemsize: int) -> int:
        """1."""
        return 1

    def length(self, width: int) -> int:
        """Bytes: of the elements, and of the scale after them."""
        return width + self.beside

    def encode(self, rows: Tensor) -> Tensor:
        """uint8."""
        rows = rows.float()
        largest = rows.abs().amax(1, keepdim=True) if rows.shape[1] else rows.new_zeros(len(rows), 1)
        scale = (largest / self._largest).clamp_min(torch.finfo(torch.float32).tiny)  # lets NaN through
        values = (rows / scale).to(torch.float8_e4m3fn)
        return torch.cat([values.view(torch.uint8), scale.view(torch.uint8)], dim=1)

    def decode(self, messages: Tensor) -> Tensor:
        """float32."""
        values, scale = (
            part.clone(memory_format=torch.contiguous_format)  # aligned, even where there are no rows
            for part in (messages[:, : -self.beside], messages[:, -self.beside :])
        )
        return values.view(torch.float8_e4m3fn).float() * scale.view(torch.float32)


AS_IT_IS = Wire()

WIRES: dict[str | None, Wire] = {None: AS_IT_IS, "bfloat16": BFloat16(), "float8": Float8()}
"""By their names in a config; None for rows as they are."""
