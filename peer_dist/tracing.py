"""Records what a process is doing in named spans, which the watchdog can always read, and which can be timed; and keeps
torch's compiler from looking into functions.
"""

from __future__ import annotations

import functools
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


class StepTimes:
    """Seconds by span name since :meth:`reset`, forward and backward passes together.

    On a GPU a span is timed by CUDA events, which are read once per step, so that nothing waits within a step; on a CPU
    it is timed by the clock.

    Args:
        device: the device whose work is timed.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self.reset()

    def reset(self) -> None:
        """Forget all spans."""
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def read(self) -> dict[str, float]:
        """Seconds by span name. The call waits for the device."""
        if self._events:
            torch.cuda.synchronize()
            for name, start, stop in self._events:
                self._seconds[name] += start.elapsed_time(stop) / 1e3
            self._events.clear()
        return dict(self._seconds)

    @contextmanager
    def _time(self, name: str) -> Iterator[None]:
        """A context whose duration is added to the span ``name``."""
        if self._cuda:
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            stop.record()
            self._events.append((name, start, stop))
        else:
            begin = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - begin


class Position:
    """Where in the run this process is. The working thread writes it, and the watchdog's thread reads it.

    Attributes:
        step: number of the step.
        phase: what the process does, such as "first step" or "save".
        span: the part of the step; empty between spans.
        moves: number of spans entered and left, and of phases begun; while it does not grow, nothing progresses.
    """

    def __init__(self) -> None:
        self.step, self.phase, self.span, self.moves = 0, "start", "", 0

    def at(self, phase: str, step: int) -> None:
        """Begin a phase, in or after step ``step``."""
        self.phase, self.step = phase, step
        self.moves += 1


position = Position()
"""The position of this process."""
_listener: StepTimes | None = None


def listen(times: StepTimes | None) -> None:
    """Time the spans of this process in ``times`` from now on; None stops it."""
    global _listener
    _listener = times


def span(name: str) -> AbstractContextManager[None]:
    """A context that marks a part of the step: for the watchdog, for torch's profiler and for :func:`listen`."""
    return nullcontext() if torch.compiler.is_compiling() else _span(name)


@contextmanager
def _span(name: str) -> Iterator[None]:
    position.moves += 1
    outer, position.span = position.span, name
    # asked first, because a range takes ten microseconds even if no profiler records it
    profiled = torch.autograd._profiler_enabled()
    with torch.profiler.record_function(f"peer/{name}") if profiled else nullcontext():
        if _listener is None:
            yield
        else:
            with _listener._time(name):
                yield
    position.span = outer  # not after an error: then it shows where that was
    position.moves += 1


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """The function as ``torch.compile`` takes it: a call that is not looked into.

    What our kernels and exchanges do is no graph of torch's. Where nothing is compiled this asks for nothing, above all
    not for torch's compiler, whose import takes seconds.
    """
    opaque: list[Callable[P, R]] = []

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not opaque:
            opaque.append(torch.compiler.disable(function))
        return opaque[0](*args, **kwargs)

    return call
