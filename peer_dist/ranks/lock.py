"""One writer for a run's folder: a lock file names the process that writes there, and its age shows that it still does.

``run.lock`` is created exclusively (O_EXCL, which network file systems respect too, unlike flock) and its modification
time is renewed while its run lives. A holder that is known to be gone loses it: its process has ended on this machine,
its Slurm job no longer runs, it is this job before it was requeued or this torchrun before it lost a node, or nothing
has renewed the file for :data:`STALE_SECONDS`.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from peer_dist.machine import process_space, process_start
from peer_dist.mistake import Mistake, in_words
from peer_dist.ranks.rank_zero import on_rank_zero
from peer_dist.reading import opened

NAME = "run.lock"
HEARTBEAT_SECONDS = 20.0
STALE_SECONDS = 600.0
_LONGEST = 300  # characters of what a lock says of its holder
_GUARD_SECONDS = 60.0  # a takeover takes milliseconds
# the states in which a job of Slurm's may still have processes
_ALIVE = {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"}


@contextlib.contextmanager
def run_lock(folder: str | os.PathLike[str], rank: int) -> Iterator[RunLock | None]:
    """A context in which rank 0 holds the lock of ``folder``: all ranks enter it or none does. A collective call.

    Yields:
        The lock on rank 0, None on the others.

    Raises:
        LockError: on every rank, where another run holds it.
    """
    lock = RunLock(folder)
    with contextlib.ExitStack() as stack:

        def take() -> None:
            try:
                stack.enter_context(lock)
            except OSError as error:
                why = error.strerror or in_words(error)
                raise LockError(f"{lock.path}: cannot be written ({why}); choose another checkpoint.dir") from error

        on_rank_zero(take, raises=LockError)
        yield lock if rank == 0 else None


class LockError(Mistake, RuntimeError):
    """Another run writes to the folder; the message names it."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock, with what another process needs to check whether it is gone.

    Attributes:
        host, pid: of the process.
        started: its start by the kernel's clock, which distinguishes it from a later process with its pid.
        machine: the boot and the pid namespace in which the pid is valid.
        job: the Slurm job's number, with the cluster's name; empty without Slurm.
        restart: how often that job was requeued.
        elastic: torchrun's run and its meeting point, if both distinguish it from other runs; else empty.
        since: when the lock was taken, for messages.
    """

    host: str
    pid: int
    started: str
    machine: str
    job: str = ""
    restart: int = 0
    elastic: str = ""
    since: str = ""

    @classmethod
    def current(cls) -> Holder:
        """The holder that this process would be."""
        job, restarts = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_RESTART_COUNT", "")[:9]
        if job and "SLURM_CLUSTER_NAME" in os.environ:
            job += "@" + os.environ["SLURM_CLUSTER_NAME"]
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            started=process_start(os.getpid()),
            machine=process_space(),
            job=job,
            restart=int(restarts) if job and restarts.isdecimal() else 0,
            elastic=_elastic_run(),
            since=time.strftime("%Y-%m-%d %H:%M:%S"),
        )

    def __str__(self) -> str:
        where = f"process {self.pid} on {self.host}, since {self.since}"
        if not self.job:
            return where
        return (
            f"Slurm job {self.job.partition('@')[0]}"
            + (f" (restart {self.restart})" if self.restart else "")
            + (f", {where}")
        )

    def why_gone(self, me: Holder, silence: float) -> str | None:
        """Why the holder cannot be writing any more, as the end of a sentence; None if it may be.

        Args:
            me: this process.
            silence: seconds since the lock was renewed.
        """
        if self.job and self.job == me.job and self.restart < me.restart:
            return "was this job before it was requeued"
        if self.machine and self.machine == me.machine:
            return None if process_start(self.pid) == self.started else "has ended"
        if self.elastic and self.elastic == me.elastic:
            return "was this run on a node that torchrun has lost or left out"
        if self.job and self.job != me.job and self.job.partition("@")[2] == me.job.partition("@")[2]:
            state = _slurm_state(self.job.partition("@")[0])
            if state == "SUSPENDED":  # silent, and yet alive
                return None
            if state is not None and state not in _ALIVE:
                return f"is no longer running ({state.lower()})"
        return f"has shown no life for {silence / 60:.0f} minutes" if silence > STALE_SECONDS else None


class RunLock:
    """The lock of one folder, held while its context is entered; on rank 0 only.

    Attributes:
        path: of the lock file.
        note: set on entering if a lock was taken over: whose, and why; else empty.
        lost: whether another run has taken the lock over: this one must write nothing more.

    Raises:
        LockError: on entering, where another run holds it.
        OSError: the folder cannot be written to.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = Path(folder) / NAME
        self.note, self.lost = "", False
        self._me = Holder.current()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> RunLock:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self._create(self.path):
            self._take_over()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()
        if _read(self.path) == self._me:
            self.path.unlink(missing_ok=True)

    def _create(self, path: Path) -> bool:
        """Write a lock file that names this process; return whether none was there."""
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(asdict(self._me), file)
            file.flush()
            os.fsync(file.fileno())
        return True

    def _take_over(self) -> None:
        """Replace the lock of a run that is gone; a second lock keeps others from doing the same meanwhile.

        Raises:
            LockError: the run may still write, or another one is taking the lock over.
        """
        with _guard(self.path.with_name(f".{NAME}.takeover")) as alone:
            holder = _read(self.path)
            silence = _age(self.path)
            if not alone:
                raise LockError(self._refusal(holder, "another run is taking it over"))
            if silence is None:  # released in this moment
                why: str | None = "has ended"
            elif holder is None:  # its writer was cut off, or writes this moment
                why = "left no name" if silence > _GUARD_SECONDS else None
            else:
                why = holder.why_gone(self._me, silence)
            if why is None:
                raise LockError(self._refusal(holder, f"last seen {max(0, round(silence or 0))} s ago"))
            fresh = self.path.with_name(f".{NAME}.{self._me.host}.{self._me.pid}")
            fresh.unlink(missing_ok=True)
            self._create(fresh)
            os.replace(fresh, self.path)
            if silence is not None:
                self.note = f"{self.path.parent}: taken over from a run that {why} ({holder or 'unnamed'})"

    def _refusal(self, holder: Holder | None, seen: str) -> str:
        """The message of a :class:`LockError`."""
        return (
            f"{self.path.parent}: another run writes there ({holder or 'unnamed'}; {seen}); wait for it, end it, "
            f"choose another checkpoint.dir, or delete {self.path} if you know it is gone"
        )

    def _beat(self) -> None:
        """Renew the lock until it is released or lost; a thread's work."""
        while not self._end.wait(HEARTBEAT_SECONDS):
            # an error of the file system is no loss; an absent lock or another's name is
            with contextlib.suppress(OSError):
                if _read(self.path, unsure=self._me) != self._me:
                    self.lost = True
                    return
                os.utime(self.path)


@contextlib.contextmanager
def _guard(path: Path) -> Iterator[bool]:
    """A context for one process at a time; one that was killed inside keeps others out for a minute.

    Yields:
        Whether this process is the one.
    """
    for _ in range(2):
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
            break
        except FileExistsError:
            age = _age(path)
            if age is not None and age > _GUARD_SECONDS:
                path.unlink(missing_ok=True)
    else:
        yield False
        return
    try:
        yield True
    finally:
        path.unlink(missing_ok=True)


def _age(path: Path) -> float | None:
    """Seconds since the file was renewed, by the clock of its file server; None if there is no such file."""
    probe = path.with_name(f".{NAME}.now.{socket.gethostname()}.{os.getpid()}")
    try:
        probe.touch()
        now = probe.stat().st_mtime
        return now - path.stat().st_mtime
    except FileNotFoundError:
        return None
    finally:
        probe.unlink(missing_ok=True)


def _read(path: Path, unsure: Holder | None = None) -> Holder | None:
    """The holder that a lock file names; None if there is no file, or it is not written to its end.

    Args:
        unsure: returned if the file system does not answer.
    """
    try:
        with opened(path) as file:
            holder = Holder(**json.loads(file.read(1 << 16)))
    except FileNotFoundError:
        return None
    except OSError:
        return unsure
    except (ValueError, TypeError, RecursionError):
        return None
    for field, value in asdict(holder).items():
        if type(value) is not (int if field in ("pid", "restart") else str):
            return None
        if isinstance(value, str) and not (value.isprintable() and len(value) <= _LONGEST):
            return None
    return holder


def _elastic_run() -> str:
    """The name of a torchrun of several nodes; empty under another launcher, or if its run id is the default one."""
    run = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    meeting = os.environ.get("RDZV_ENDPOINT") or os.environ.get("PET_RDZV_ENDPOINT")
    return f"{run}@{meeting}" if meeting and run != "none" else ""


def _slurm_state(job: str) -> str | None:
    """A job's state as Slurm gives it, or FORGOTTEN for a job that it does not know; None if Slurm does not answer."""
    try:
        answer = subprocess.run(
            ["squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T"],
            capture_output=True,
            text=True,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if answer.returncode == 0:
        return answer.stdout.split()[0] if answer.stdout.split() else "FORGOTTEN"
    return "FORGOTTEN" if "Invalid job id" in answer.stderr else None
