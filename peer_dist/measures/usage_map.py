"""Draws a layer's use of its experts: experts lie as their sub-keys do, and colours are their shares."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

_PIXELS = 256  # about that many on a side
_DECADES = 2.0  # the colours end that many powers of ten above and below an even share
# red, green and blue from dark violet over green to yellow, with evenly growing lightness
_COLORS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], np.float64)
_UNUSED = (0, 0, 0)


def usage_map(shares: Tensor) -> np.ndarray:
    """A picture of the experts' shares, uint8 ``[height, width, 3]``, about 256 pixels a side.

    With product keys expert ``a sqrt(N) + b`` lies in row ``a`` and column ``b``: a bright line is a sub-key that most
    tokens pick. A hundredth of an even share is violet, an even share is green-blue, a hundredfold one is yellow, and
    unused experts are black. With more than 256 rows several experts share a pixel, which shows their mean.

    Args:
        shares: ``[num_experts]``, where 1 is an even share; see :meth:`peer_dist.measures.usage.ExpertUsage.shares`.
    """
    rows = next(side for side in range(math.isqrt(len(shares)), 0, -1) if len(shares) % side == 0)
    grid = shares.cpu().numpy().reshape(rows, -1)
    for axis in (0, 1):
        per_pixel = -(-grid.shape[axis] // _PIXELS)
        starts = np.arange(0, grid.shape[axis], per_pixel)
        counts = np.diff(starts, append=grid.shape[axis])
        grid = np.add.reduceat(grid, starts, axis) / np.expand_dims(counts, 1 - axis)
    with np.errstate(divide="ignore"):
        place = np.clip((np.log10(grid) / _DECADES + 1) / 2, 0, 1) * (len(_COLORS) - 1)
    pixels = np.stack([np.interp(place, range(len(_COLORS)), channel) for channel in _COLORS.T], -1)
    pixels[grid == 0] = _UNUSED
    times = max(1, _PIXELS // max(grid.shape))
    return pixels.round().astype(np.uint8).repeat(times, 0).repeat(times, 1)
