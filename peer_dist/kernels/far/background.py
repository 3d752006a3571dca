"""Work on far rows that goes on while the kernels compute."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from functools import cache, lru_cache

import torch


@lru_cache(maxsize=1)
def _thread(process: int) -> ThreadPoolExecutor:
    """One thread for all pools of a process: their jobs are done in the order in which layers wait for them."""
    return ThreadPoolExecutor(1, "peer_dist far rows")


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class Job:
    """Something that one thread does after what it was given before; on a GPU on a stream of its own, after what the
    caller's stream was given until now.

    Args:
        work: to be done.
        device: of the kernels.
    """

    def __init__(self, work: Callable[[], None], device: torch.device) -> None:
        # its tensors are needed for as long as a stream reads them, which is longer than the thread has to do with them
        self._work = None if device.type == "cpu" else work
        self._done: torch.cuda.Event | None = None
        ready = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

        def run() -> None:
            stream = None if ready is None else _stream(device)
            # what the caller's thread had set is not set here: neither its device nor that nothing is differentiated
            with torch.no_grad(), nullcontext() if stream is None else torch.cuda.stream(stream):
                if stream is not None and ready is not None:
                    stream.wait_event(ready)
                work()
                if stream is not None:
                    self._done = stream.record_event()

        self._process = os.getpid()
        self._future: Future[None] = _thread(self._process).submit(run)

    def wait(self) -> None:
        """Until it is done; on a GPU, until the host has done its part, and the current stream waits for the rest.

        Raises:
            BaseException: what it failed with, each time that somebody waits.
            RuntimeError: this process was forked off since; threads stay with the parent.
        """
        if self._process != os.getpid():
            raise RuntimeError(
                f"process {os.getpid()} was forked off from process {self._process} while that stepped far tables in "
                "the background, and has none of their newer rows: call FarRows.flush before a fork"
            )
        self._future.result()
        if self._done is not None:
            torch.cuda.current_stream().wait_event(self._done)

    def settle(self) -> None:
        """Until the thread has no more to do with it, however that went."""
        if self._process == os.getpid():
            wait([self._future])
