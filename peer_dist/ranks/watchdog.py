"""A rank that dies or hangs is noticed, and every rank leaves, saying which one it was and where.

On each rank a thread reports to a store of the watchdog's own, many times in ``seconds``, where its process is: step,
phase, span (:data:`peer_dist.tracing.position`), how many collectives it has begun, and for how long none of these has
changed. Rank 0, which hosts the store, reads all reports:

- **gone**: a rank has reported nothing for ``seconds``; or for a moment only, if another rank's connection broke.
- **hangs**: nothing has changed on *any* rank for ``seconds``. The culprit is a rank that does not wait for the others
  in a collective; if all of them wait, or none is seen to (with NCCL), the one that has begun the fewest collectives.

Ranks that wait for one that works never leave: what counts is the rank that moved last. Some phases are long and have
no spans inside, or keep Python's lock (imports, compilers), so that even the thread reports nothing: while a rank is
starting, in its first step, validating or saving, the limit is ten times as long.

The others watch for rank 0's verdict and for its reports. If the connection to the store breaks, or the store does not
answer for ``seconds``, rank 0 is the culprit. Time is counted in turns of the thread, so that a process that was itself
asleep blames nobody.

A main thread that is stuck in a collective cannot end its process: another thread does, by ``os._exit`` with
:data:`~peer_dist.ranks.exit_codes.PEER_LOST`. Checkpoints are complete or absent at any moment: nothing is lost.
"""

from __future__ import annotations

import contextlib
import linecache
import os
import re
import sys
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from peer_dist.output import say_at_once
from peer_dist.ranks.exit_codes import PEER_LOST
from peer_dist.ranks.rank_zero import on_rank_zero
from peer_dist.ranks.verdict import Beat, gone_sentence, judge, limit
from peer_dist.shortage import shortage
from peer_dist.tracing import position

_BROKEN = re.compile(
    r"gloo[/:]|Connection closed by peer|Connection reset by peer|NCCL error|ncclRemoteError|NCCL comm"
)
_NCCL_FILES = "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"  # what names of files begin with; the rank follows
_DUMP_SECONDS = 10.0  # what NCCL's record may take
_PACKAGE = str(Path(__file__).parents[1]) + os.sep
_TORCH = str(Path(dist.__file__).parent) + os.sep


class Watchdog:
    """A context in which this process and the others are watched; torch.distributed must be up.

    Args:
        seconds: the limit within which a rank that is gone or hangs is noticed; 0 watches nobody, and a broken
            connection is then reported without the name of the rank.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        self._interval = min(1.0, max(0.05, seconds / 20))
        self._main = threading.get_ident()
        self._ending, self._leaving = threading.Event(), threading.Lock()
        self._threads: list[threading.Thread] = []
        self._lost, self._failed = False, ""  # what this rank reports of its own end
        self._answered_at, self._since_loss = 0.0, 0.0
        self._beats: dict[int, Beat] = {}  # the last one of each rank
        self._silence = dict.fromkeys(range(self._ranks), 0.0)  # seconds since that one was new

    def __enter__(self) -> Watchdog:
        if self._seconds and self._ranks > 1:
            self._store = self._meet()
            for target in (self._report, self._watch_store):
                thread = threading.Thread(target=target, name=f"watchdog {target.__name__}", daemon=True)
                thread.start()
                self._threads.append(thread)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        watching = bool(self._seconds) and self._ranks > 1
        if error is not None and self._ranks > 1 and is_peer_loss(error):
            self._await_verdict(error, watching)
        if error is None and self._ranks > 1:
            # Launchers may end the others as soon as one rank leaves with a code; whoever comes late is still watched.
            _barrier()
        if not watching:
            return
        if error is not None:
            self._failed = shortage(error) or _one_line(error)
            time.sleep(2 * self._interval)  # until the others know
        self._ending.set()
        for thread in self._threads:
            # Python would end a thread that comes out of the store's C++ while it shuts down, and C++ aborts on that. A
            # thread that a broken store holds for longer is left behind.
            thread.join(self._interval + 1)

    def _meet(self) -> dist.TCPStore:
        """Connect to a new store on rank 0, which then has a first report of each rank. A collective call."""
        patience = max(30.0, self._seconds)

        def serve() -> tuple[str, int]:
            host = os.environ.get("MASTER_ADDR", "127.0.0.1")
            store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=patience))
            store.set("verdict", "")
            # the server must outlive this object: others may read once more when this rank is done
            _servers.append(store)
            return host, store.port

        self._address = on_rank_zero(serve, raises=RuntimeError)
        store = _servers[-1] if self._rank == 0 else self._connect(patience)
        store.set(f"beat/{self._rank}", self._beat(0, 0.0).json())
        _barrier()
        return store

    # What each rank reports

    def _beat(self, number: int, idle: float) -> Beat:
        """This rank's report ``number``, after ``idle`` seconds without a change."""
        where, waits = "", False
        with contextlib.suppress(Exception):  # the frames belong to a thread that goes on meanwhile
            where, waits = self._where()
        return Beat(
            number=number,
            step=position.step,
            phase=position.phase,
            span=position.span,
            collectives=_collectives(),
            idle=idle,
            where=where,
            waits=waits,
            lost=self._lost,
            failed=self._failed,
        )

    def _where(self) -> tuple[str, bool]:
        """The line of this package at which the main thread is, and whether it waits there for other ranks."""
        frame: FrameType | None = sys._current_frames().get(self._main)
        if frame is None:
            return "", False
        inner, call = frame, ""
        waits = ".wait(" in linecache.getline(frame.f_code.co_filename, frame.f_lineno or 0)
        while frame is not None and frame.f_code.co_filename.startswith(_TORCH):
            name = frame.f_code.co_name
            waits, call, frame = True, call if name == "wrapper" else name, frame.f_back
        while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
            frame = frame.f_back
        shown = frame or inner
        line = f"{shown.f_code.co_filename.removeprefix(_PACKAGE)}:{shown.f_lineno}"
        return f"{call} at {line}" if call else f"at {line} in {shown.f_code.co_name}", waits

    def _report(self) -> None:
        """Report, and read what the others report, turn by turn; a thread's work, the only one that uses the store."""
        number, idle, before, last_moves = 0, 0.0, time.monotonic(), None
        while not self._ending.wait(self._interval):
            passed, before = min(time.monotonic() - before, 2 * self._interval), time.monotonic()
            moves = (position.moves, position.step, _collectives())
            idle = 0.0 if moves != last_moves else idle + passed
            number, last_moves = number + 1, moves
            try:
                self._turn(self._beat(number, idle), passed)
            except Exception as error:
                self._reconnect(_one_line(error, 200))

    def _turn(self, beat: Beat, passed: float) -> None:
        """Send a report and read those of others, ``passed`` seconds after the turn before; leave on a verdict."""
        self._store.set(f"beat/{self._rank}", beat.json())
        verdict = self._store.get("verdict").decode()
        if verdict:
            self._store.set(f"known/{self._rank}", "")
            self._leave(verdict)
        self._read_beats(range(self._ranks) if self._rank == 0 else [0], passed)
        self._answered_at = time.monotonic()
        if self._rank == 0:
            self._judge()
        elif self._silence[0] > limit(self._seconds, [self._beats[0]]):
            self._leave(gone_sentence([0], f"no sign of life for {self._silence[0]:.1f} s", self._beats))

    def _reconnect(self, reason: str) -> None:
        """Connect again after the store failed, or leave if that fails too: rank 0 is gone. Rank 0 only says it."""
        patience = max(1.0, 3 * self._interval)
        if self._rank == 0:
            say_at_once(f"the watchdog's store failed: {reason}")
        elif not self._ending.wait(patience):
            try:
                self._store = self._connect(patience)
            except Exception:
                self._leave(gone_sentence([0], f"its connection broke ({reason})", self._beats))

    def _connect(self, patience: float) -> dist.TCPStore:
        """A new connection to rank 0's store, whose calls fail after ``patience`` seconds."""
        host, port = self._address
        return dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=patience))

    def _read_beats(self, ranks: Sequence[int], passed: float) -> None:
        """Read the reports of ``ranks``, ``passed`` seconds after the last time."""
        for rank, text in zip(ranks, self._store.multi_get([f"beat/{rank}" for rank in ranks])):
            beat = Beat.parse(text)
            same = rank in self._beats and self._beats[rank].number == beat.number
            self._silence[rank] = self._silence[rank] + passed if same else 0.0
            self._beats[rank] = beat

    def _watch_store(self) -> None:
        """Notice that the store does not answer, in whose calls the other thread may wait for ever; a thread's work."""
        unanswered, before = 0.0, self._answered_at
        while not self._ending.wait(self._interval):
            unanswered = unanswered + self._interval if self._answered_at == before else 0.0
            before = self._answered_at
            if unanswered > self._seconds and self._rank > 0:
                self._leave(gone_sentence([0], f"no answer for {unanswered:.1f} s", self._beats))

    # What rank 0 decides

    def _judge(self) -> None:
        """Ask for the verdict; if there is one, publish it, and leave when the others know it."""
        if any(beat.lost for beat in self._beats.values()):
            self._since_loss += self._interval
        verdict = judge(self._beats, self._silence, self._since_loss, self._seconds, self._interval)
        if verdict is None:
            return
        self._store.set("verdict", verdict.text)
        others = [f"known/{rank}" for rank in self._beats if rank > 0 and rank not in verdict.gone]
        deadline = time.monotonic() + 5 + 3 * self._interval
        while others and not self._store.check(others) and time.monotonic() < deadline:
            time.sleep(self._interval / 4)
        self._leave(verdict.text)

    # Leaving

    def _await_verdict(self, error: BaseException, watching: bool) -> None:
        """Leave after a connection broke under the main thread; a watchdog knows in a moment which rank is gone."""
        if watching:
            self._lost = True
            time.sleep(30 + 20 * self._interval)  # another thread leaves meanwhile
        self._leave(f"another rank is gone: {_first_line(error)[:200]}")

    def _leave(self, verdict: str) -> None:
        """Print the verdict and end this process, whatever its main thread does."""
        with self._leaving:  # one thread says it once
            rank = f" (rank {self._rank})" if self._rank else ""
            text = f"error{rank}: {verdict}; start again to go on from the newest checkpoint"
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(Exception):
                    stream.flush()
            say_at_once(text)
            with contextlib.suppress(RuntimeError):  # no thread can be started
                dump = threading.Thread(target=self._dump_nccl, daemon=True)  # NCCL may not answer
                dump.start()
                dump.join(_DUMP_SECONDS)
            os._exit(PEER_LOST)

    def _dump_nccl(self) -> None:
        """Write NCCL's record of the last collectives, for torch's own tools. Never run yet, for want of a GPU."""
        if dist.is_initialized() and dist.get_backend() == "nccl":
            with contextlib.suppress(Exception):
                trace = torch._C._distributed_c10d._dump_nccl_trace()  # type: ignore[attr-defined]
                Path(f"{os.environ[_NCCL_FILES]}{self._rank}").write_bytes(trace)


def _barrier() -> None:
    """Wait for all ranks; nccl wants to be told on which device, or guesses and warns."""
    nccl = dist.get_backend() == "nccl"
    dist.barrier(device_ids=[torch.cuda.current_device()] if nccl else None)


_servers: list[dist.TCPStore] = []


def record_nccl(folder: str | os.PathLike[str]) -> None:
    """Let NCCL record its collectives and write them to ``folder``, a file per rank, when one hangs.

    What the environment says of this already stays, such as another place for the files. To be called before
    torch.distributed starts; without GPUs it does nothing.
    """
    if not torch.cuda.is_available():
        return
    size = os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_TRACE_BUFFER_SIZE", size)  # the only name that older versions of torch know
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    prefix = os.environ.setdefault(_NCCL_FILES, str(Path(folder) / "nccl_trace_rank_"))
    with contextlib.suppress(OSError):  # torch makes no folder
        Path(prefix).parent.mkdir(parents=True, exist_ok=True)


def is_peer_loss(error: BaseException) -> bool:
    """Whether an error, or one of its causes, means that a connection to another rank broke."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, dist.DistError) or (isinstance(cause, RuntimeError) and _BROKEN.search(str(cause))):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def _first_line(error: BaseException) -> str:
    """The first line of an error's message; empty if it has none."""
    return (str(error).splitlines() or [""])[0]


def _one_line(error: BaseException, characters: int | None = None) -> str:
    """An error's type and the beginning of its message, at most so many characters of it."""
    return f"{type(error).__name__}: {_first_line(error)[:characters]}"


def _collectives() -> int:
    """The number of collectives that this process has begun, in all groups; 0 if torch does not say."""
    total = 0
    with contextlib.suppress(Exception):  # torch's own numbers, for its own flight recorder
        for group in list(distributed_c10d._world.pg_map):
            total += group._get_sequence_number_for_group()  # type: ignore[attr-defined]
    return total
