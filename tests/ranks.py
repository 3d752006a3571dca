"""Distributed cases on one machine: ranks forked from a server that has imported the heavy libraries once.

Importing Megatron and DeepSpeed takes seconds a process; forking from Python's forkserver takes a fraction of
one, and every case starts from clean processes.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import random
import select
import socket
import subprocess
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


def _rank(fn: Callable[..., Any], rank: int, world_size: int, store: str, args: tuple[Any, ...]) -> Any:
    import torch.distributed as dist

    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )
    return fn(rank, world_size, *args)


def _call(fn: Callable[..., Any], args: tuple[Any, ...], pipe: Connection) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # as in tests.preload, which some versions of Python do not find
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        result = (True, fn(*args))
    except BaseException:
        result = (False, traceback.format_exc())
    try:
        pipe.send_bytes(pickle.dumps(result))  # by value: torch's own pickling would share this process's memory
        if result[0]:  # a rank that leaves at once would break groups that others are still connecting
            reader = select.poll()
            reader.register(pipe.fileno(), 0)  # an error once the other end is closed
            reader.poll(60_000)
    finally:
        os._exit(0)  # no teardown: gloo's threads of a failed peer would hang it


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """Call ``fn(rank, world_size, *args)`` on every rank of a fresh gloo world; the results in rank order.

    Raises:
        AssertionError: a rank raised (with its traceback), died, or did not finish in ``timeout`` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        return run_each(_rank, [(fn, rank, world_size, store, args) for rank in range(world_size)], timeout)


def run_each(fn: Callable[..., Any], arguments: list[tuple[Any, ...]], timeout: float = 120) -> list[Any]:
    """Call ``fn`` with each of the arguments, in a process of its own, all at once; the results in their order.

    Raises:
        AssertionError: as :func:`run_ranks` does; the place in ``arguments`` is the rank.
    """
    pipes: list[Connection] = []
    processes = []
    for args in arguments:
        receiver, sender = _context.Pipe(duplex=False)
        process = _context.Process(target=_call, args=(fn, args, sender), daemon=True)
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    world_size = len(processes)
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
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.join(timeout=1 if len(results) == world_size else 0)
            if process.is_alive():
                process.kill()
    return [results[rank] for rank in range(world_size)]


def _command(args: list[str], files: dict[int, Path], variables: dict[str, str], before: Any, cwd: Path | None) -> None:
    """`peer-dist ARGS` with variables of a launcher's, its output to files, the exit code that main gives."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.update(variables)
    if cwd is not None:
        os.chdir(cwd)
    for stream, path in files.items():
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    import sys

    import torch

    from peer_dist.cli import main

    torch.set_num_threads(1)
    code = 0
    sys.argv = ["peer-dist", *args]
    try:
        if before is not None:
            before[0](int(variables["RANK"]), *before[1:])
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def _start_command(
    args: list[str],
    stdout: Path,
    stderr: Path,
    variables: dict[str, str] | None = None,
    before: Any = None,
    cwd: Path | None = None,
) -> Any:
    """The process of a command, forked and started."""
    files = {1: stdout, 2: stderr}
    process = _context.Process(target=_command, args=(args, files, variables or {}, before, cwd), daemon=True)
    process.start()
    return process


def run_command(*args: str, cwd: Path | None = None, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """`peer-dist ARGS` as nobody but a user starts it, forked instead of started afresh.

    Raises:
        AssertionError: it did not finish in ``timeout`` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr = Path(folder) / "stdout", Path(folder) / "stderr"
        process = _start_command(list(args), stdout, stderr, cwd=cwd)
        process.join(timeout)
        if process.is_alive():
            process.kill()
            raise AssertionError(f"peer-dist {' '.join(args)} did not finish in {timeout:.0f} s")
        return subprocess.CompletedProcess(list(args), process.exitcode or 0, stdout.read_text(), stderr.read_text())


def _free_port() -> int:
    """A port below those that the system gives to clients, who would take it before the ranks do."""
    while True:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port


class Forked:
    """`peer-dist ARGS` alone, its output in a file, seen as a :class:`subprocess.Popen` is."""

    def __init__(self, args: list[str], output: Path) -> None:
        self.returncode: int | None = None
        self._process = _start_command(args, output, output)

    def poll(self) -> int | None:
        self.returncode = self._process.exitcode
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self._process.pid is not None and self._process.is_alive():
            os.kill(self._process.pid, number)


class Command:
    """`peer-dist` on some ranks, forked instead of started afresh, whose exit codes and words are of interest.

    Args:
        args: of the command line.
        folder: of what the ranks write, to ``outputs`` and ``errors``.
        before: a function and its arguments, called as ``fn(rank, *args)`` in each process before the command.
    """

    def __init__(self, world_size: int, args: list[str], folder: Path, before: tuple[Any, ...] | None = None) -> None:
        size, port = str(world_size), str(_free_port())
        launcher = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        folder.mkdir(parents=True, exist_ok=True)
        self.outputs, self.errors = (
            [folder / f"{name}-{rank}" for rank in range(world_size)] for name in ("out", "err")
        )
        self.processes = []
        for rank, files in enumerate(zip(self.outputs, self.errors)):
            for file in files:
                file.write_bytes(b"")
            variables = launcher | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            self.processes.append(_start_command(args, *files, variables, before))

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def codes(self, timeout: float) -> list[int | None]:
        """Exit codes (minus the signal's number where one killed it); None of what still runs after ``timeout`` s."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in self.processes]

    def words(self, rank: int) -> str:
        """What a rank wrote, its lines joined."""
        return " ".join((self.errors[rank].read_text() + self.outputs[rank].read_text()).split())
