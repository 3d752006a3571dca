"""Measures where the time goes between a process's start and the end of its first step."""

from __future__ import annotations

import time

from peer_dist.machine import process_age


class Startup:
    """Measures the phases of a process's start; the first phase begins with the process.

    Attributes:
        seconds: duration of each phase, in the order in which they ended.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.monotonic() - process_age()

    def ended(self, phase: str) -> None:
        """Count the time since the last call, or since the process began, as ``phase``."""
        now = time.monotonic()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._since
        self._since = now

    def __str__(self) -> str:
        phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in self.seconds.items())
        return f"first step done {sum(self.seconds.values()):.1f} s after the start: {phases}"
