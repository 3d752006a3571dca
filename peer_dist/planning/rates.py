"""How the doctor and the calibration time work on a rank's device."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch

from peer_dist.ranks.examination import Here


def fastest(here: Here, run: Callable[[], Any], rounds: int = 0) -> float:
    """Seconds of the fastest call, after a first one that compiles and allocates: slower ones were disturbed by other
    programs. The device has finished its work whenever the clock is read.

    Args:
        rounds: number of calls; 0 for at least 5 calls, and for at least 0.3 s.
    """
    run()
    here.finish()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < (rounds or 5) or (not rounds and time.perf_counter() - begin < 0.3):
        start = time.perf_counter()
        run()
        here.finish()
        times.append(time.perf_counter() - start)
    return min(times)


def product_seconds(here: Here, width: int, dtype: torch.dtype) -> float:
    """Seconds of a product of two square matrices, ``2 * width**3`` FLOPs."""
    # random numbers: a GPU multiplies ones faster, for they take less power
    a = torch.randn(width, width, dtype=torch.float32, device=here.device).to(dtype)
    return fastest(here, functools.partial(torch.mm, a, a, out=torch.empty_like(a)))


def copy_seconds(here: Here, count: int) -> float:
    """Seconds of a copy of ``count`` float32 numbers, which reads and writes ``8 * count`` bytes."""
    source = torch.ones(count, dtype=torch.float32, device=here.device)
    target = torch.empty_like(source)
    return fastest(here, lambda: target.copy_(source))
