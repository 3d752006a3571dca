"""What a process is doing: named spans, always known to the watchdog, and timed for whoever asks."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch


class StepTimes:
    """Seconds per span name since :meth:`reset`, forward and backward together.

    On a GPU a span is bracketed by CUDA events, which are read once per step and so cost no
    synchronisation inside it; on CPU by the clock.
    """

    def __init__(self, device: torch.device) -> None:
        """Begin empty; ``device`` is that whose work is timed."""
        self._cuda = device.type == "cuda"
        self.reset()

    def reset(self) -> None:
        """Forget all spans."""
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def read(self) -> dict[str, float]:
        """Span name to seconds; waits for the device."""
        if self._events:
            torch.cuda.synchronize()
            for name, start, stop in self._events:
                self._seconds[name] += start.elapsed_time(stop) / 1e3
            self._events.clear()
        return dict(self._seconds)

    @contextmanager
    def _time(self, name: str) -> Iterator[None]:
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
    """Where this process is. Written by the thread that works, read by the watchdog's.

    Attributes:
        step: steps done.
        phase: what the run is at.
        span: the part of the step; empty between spans.
        moves: grows with every entering and leaving; while it stands still nothing goes on.
    """

    def __init__(self) -> None:
        """Begin at the start of the run."""
        self.step, self.phase, self.span, self.moves = 0, "start", "", 0

    def at(self, phase: str, step: int) -> None:
        """Say what comes next."""
        self.phase, self.step = phase, step
        self.moves += 1


position = Position()
_listener: StepTimes | None = None


def listen(times: StepTimes | None) -> None:
    """Send the spans of this process to ``times``; None stops."""
    global _listener
    _listener = times


@contextmanager
def span(name: str) -> Iterator[None]:
    """Mark a part of the step: a range in torch's profiler where one is on, and its time for whoever listens."""
    position.moves += 1
    outer, position.span = position.span, name
    # Asked, because a range takes ten microseconds even where nobody records it.
    profiled = torch.autograd._profiler_enabled()
    with torch.profiler.record_function(f"peer/{name}") if profiled else nullcontext():
        if _listener is None:
            yield
        else:
            with _listener._time(name):
                yield
    position.span = outer  # not after an error: it tells where that was
    position.moves += 1
