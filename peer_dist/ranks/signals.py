"""SIGTERM, SIGUSR1 and Ctrl-C ask a run to save and leave."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType


class StopRequest:
    """A context that notes one of the signals instead of ending the process; the run looks between steps.

    A second one changes nothing, because torchrun passes on the Ctrl-C that the terminal has sent to every rank
    already; SIGQUIT ends a run at once.

    Attributes:
        received: the signal that came last; None if none came.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __enter__(self) -> StopRequest:
        self._previous = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
