"""Distributed cases on one machine: ranks forked from a server that has imported the heavy libraries once.

Importing Megatron and DeepSpeed takes seconds a process; forking from Python's forkserver takes a fraction of
one, and every case starts from clean processes.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.preload"])


def _rank(
    fn: Callable[..., Any], rank: int, world_size: int, store: str, args: tuple[Any, ...], pipe: Connection
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=60),
        )
        result = (True, fn(rank, world_size, *args))
    except BaseException:
        result = (False, traceback.format_exc())
    try:
        pipe.send_bytes(pickle.dumps(result))  # by value: torch's own pickling would share this process's memory
    finally:
        pipe.close()
        os._exit(0)  # no teardown: gloo's threads of a failed peer would hang it


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """Call ``fn(rank, world_size, *args)`` on every rank of a fresh gloo world; the results in rank order.

    Raises:
        AssertionError: a rank raised (with its traceback), died, or did not finish in ``timeout`` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes: list[Connection] = []
        processes = []
        for rank in range(world_size):
            receiver, sender = _context.Pipe(duplex=False)
            process = _context.Process(
                target=_rank,
                args=(fn, rank, world_size, str(Path(folder) / "store"), args, sender),
                daemon=True,
            )
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        results: dict[int, Any] = {}
        deadline = time.monotonic() + timeout
        try:
            while len(results) < world_size:
                open_pipes = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
                ready = wait(open_pipes, timeout=max(0.0, deadline - time.monotonic()))
                if not ready:
                    missing = [rank for rank in range(world_size) if rank not in results]
                    raise AssertionError(f"rank(s) {missing} of {world_size} did not finish in {timeout:.0f} s")
                for pipe in ready:
                    rank = pipes.index(pipe)  # type: ignore[arg-type]
                    try:
                        fine, value = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
                    except EOFError:
                        raise AssertionError(f"rank {rank} of {world_size} died") from None
                    if not fine:
                        raise AssertionError(f"rank {rank} of {world_size} raised:\n{value}")
                    results[rank] = value
        finally:
            for process in processes:
                process.join(timeout=1 if len(results) == world_size else 0)
                if process.is_alive():
                    process.kill()
        return [results[rank] for rank in range(world_size)]
