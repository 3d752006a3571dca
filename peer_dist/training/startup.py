"""Where the time goes between a process's start and its first step."""

from __future__ import annotations

import os
import time
from pathlib import Path


class Startup:
    """Seconds by phase, in the order in which they ended; the first begins with the process."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.monotonic() - _process_age()

    def ended(self, phase: str) -> None:
        """All since the last call was ``phase``."""
        now = time.monotonic()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._since
        self._since = now

    def __str__(self) -> str:
        phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in self.seconds.items())
        return f"first step done {sum(self.seconds.values()):.1f} s after the start: {phases}"


def _process_age() -> float:
    """Seconds since this process began, launcher's imports included; 0 where the system does not say."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return 0.0
