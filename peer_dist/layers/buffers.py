"""Modules whose statistics outlive a cast to fewer bits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class ExactBuffers(nn.Module):
    """A module whose own buffers stay float32 when it is cast to fewer bits, as engines do with whole models."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExactBuffers:
        exact = {name: value for name, value in self._buffers.items() if value is not None}
        super()._apply(fn, recurse)
        for name, value in exact.items():
            moved = getattr(self, name)
            if moved.dtype in (torch.bfloat16, torch.float16):
                setattr(self, name, value.to(moved.device))
        return self


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32, or in float64 if it is that: for sums over many tokens, and for close comparisons."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
