"""Where the time goes between a process's start and its first step."""

from __future__ import annotations

import time

from peer_dist.machine import process_age


class Startup:
    """Seconds by phase, in the order in which they ended; the first begins with the process."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.monotonic() - process_age()

    def ended(self, phase: str) -> None:
        """All since the last call was ``phase``."""
        now = time.monotonic()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._since
        self._since = now

    def __str__(self) -> str:
        phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in self.seconds.items())
        return f"first step done {sum(self.seconds.values()):.1f} s after the start: {phases}"
