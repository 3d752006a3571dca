"""SIGTERM, SIGUSR1, SIGHUP and Ctrl-C ask a run to save and leave; the end of its launcher does, too."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
import time
from types import FrameType, TracebackType

from peer_dist.machine import ancestors, process_start

_PARENT = os.getppid()
_PR_SET_PDEATHSIG = 1
_LAUNCHERS = {"torchrun", "torch.distributed.run", "torch.distributed.launch"}
_LOOK_SECONDS = 1.0


class StopRequest:
    """A context that notes one of the signals instead of ending the process; the run looks between steps.

    A second one changes nothing, because torchrun passes on the Ctrl-C that the terminal has sent to every rank
    already; SIGQUIT ends a run at once. A signal that is ignored, as nohup does with SIGHUP, stays ignored.

    Attributes:
        received: the signal that came last; None if none came.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __enter__(self) -> StopRequest:
        heard = [number for number in self.SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)


def end_with_torchrun() -> None:
    """Let this process, if torchrun has started it, get SIGTERM when that is killed: nobody else would end it.

    To be called early in the process.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != _PARENT:  # it was killed just before
        os.kill(os.getpid(), signal.SIGTERM)
    launcher = next((pid for pid, command in ancestors() if _LAUNCHERS & set(map(os.path.basename, command))), _PARENT)
    if launcher != _PARENT:  # a shell in between may go on without torchrun
        threading.Thread(target=_end_with, args=(launcher, process_start(launcher)), daemon=True).start()


def _end_with(pid: int, started: str) -> None:
    """Send this process SIGTERM when process ``pid`` ends; a thread's work."""
    while process_start(pid) == started:
        time.sleep(_LOOK_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
