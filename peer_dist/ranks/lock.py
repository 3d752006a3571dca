"""One writer for a run's folder: a lock file that says who writes there, and whose age says that it still does.

``run.lock`` is created exclusively (O_EXCL, which network file systems keep too, unlike flock) and its modification
time is renewed while its run lives. A holder that is seen to be gone loses it: its process has ended on this machine,
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
from peer_dist.ranks.rank_zero import on_rank_zero

NAME = "run.lock"
HEARTBEAT_SECONDS = 20.0
STALE_SECONDS = 600.0
_GUARD_SECONDS = 60.0  # a takeover takes milliseconds
# Slurm's states of a job that may still have processes.
_ALIVE = {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"}


@contextlib.contextmanager
def run_lock(folder: str | os.PathLike[str], rank: int) -> Iterator[RunLock | None]:
    """Rank 0 takes the lock of ``folder``, and all ranks go on or none does: a collective call.

    Raises:
        LockError: on every rank, where another run holds it.
    """
    lock = RunLock(folder)
    with contextlib.ExitStack() as stack:

        def take() -> None:
            try:
                stack.enter_context(lock)
            except OSError as error:
                raise LockError(str(error)) from error

        on_rank_zero(take, raises=LockError)
        yield lock if rank == 0 else None


class LockError(RuntimeError):
    """Another run writes to the folder; the message names it."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock, as far as another one can check on it."""

    host: str
    pid: int
    started: str  # by the kernel's clock: tells the process from a later one with its pid
    machine: str  # boot and pid namespace in which the pid means something
    job: str = ""  # Slurm's, with the cluster's name
    restart: int = 0  # how often that job was requeued
    elastic: str = ""  # torchrun's run and where it meets, if that can be told from another's
    since: str = ""

    @classmethod
    def current(cls) -> Holder:
        """This process."""
        job = os.environ.get("SLURM_JOB_ID", "")
        if job and "SLURM_CLUSTER_NAME" in os.environ:
            job += "@" + os.environ["SLURM_CLUSTER_NAME"]
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            started=process_start(os.getpid()),
            machine=process_space(),
            job=job,
            restart=int(os.environ.get("SLURM_RESTART_COUNT") or 0) if job else 0,
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

    def gone(self, me: Holder, silent: float) -> str | None:
        """Why it cannot be writing any more, ``silent`` seconds after its last sign of life; None where it may be."""
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
        return f"has shown no life for {silent / 60:.0f} minutes" if silent > STALE_SECONDS else None


class RunLock:
    """The lock of one folder, held while in context; on rank 0 only.

    Raises:
        LockError: on entering, where another run holds it.
        OSError: the folder cannot be written to.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = Path(folder) / NAME
        self.note = ""  # set on entering, where a lock was taken over: whose, and why
        self.lost = False  # somebody else has it: this run must write nothing more
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
        """Replace the lock of a run that is gone; a second lock keeps others from doing the same meanwhile."""
        with _guard(self.path.with_name(f".{NAME}.takeover")) as free:
            holder = _read(self.path)
            silent = _age(self.path)
            if not free:
                raise LockError(self._refusal(holder, "another run is taking it over"))
            if silent is None:  # let go in this moment
                why: str | None = "has ended"
            elif holder is None:  # its writer was cut off, or writes this moment
                why = "left no name" if silent > _GUARD_SECONDS else None
            else:
                why = holder.gone(self._me, silent)
            if why is None:
                raise LockError(self._refusal(holder, f"last seen {max(0, round(silent or 0))} s ago"))
            fresh = self.path.with_name(f".{NAME}.{self._me.host}.{self._me.pid}")
            fresh.unlink(missing_ok=True)
            self._create(fresh)
            os.replace(fresh, self.path)
            if silent is not None:
                self.note = f"{self.path.parent}: taken over from a run that {why} ({holder or 'unnamed'})"

    def _refusal(self, holder: Holder | None, seen: str) -> str:
        return (
            f"{self.path.parent}: another run writes there ({holder or 'unnamed'}; {seen}); wait for it, end it, "
            f"choose another checkpoint.dir, or delete {self.path} if you know it is gone"
        )

    def _beat(self) -> None:
        while not self._end.wait(HEARTBEAT_SECONDS):
            # A hiccup of the file system is no loss; an absent lock or another's name is.
            with contextlib.suppress(OSError):
                if _read(self.path, unsure=self._me) != self._me:
                    self.lost = True
                    return
                os.utime(self.path)


@contextlib.contextmanager
def _guard(path: Path) -> Iterator[bool]:
    """Whether this process alone is inside; one that was cut off inside keeps others out for a minute."""
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
    """Seconds since the file was renewed, by its file server's clock; None where there is no such file."""
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
    """None: no lock, or one that is not written to its end; ``unsure`` where the file system does not answer."""
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except OSError:
        return unsure
    except (ValueError, TypeError):
        return None


def _elastic_run() -> str:
    """Names a torchrun of several nodes; empty under another launcher, and where its run id is the default one."""
    run = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    meeting = os.environ.get("RDZV_ENDPOINT") or os.environ.get("PET_RDZV_ENDPOINT")
    return f"{run}@{meeting}" if meeting and run != "none" else ""


def _slurm_state(job: str) -> str | None:
    """A job's state by Slurm; None where Slurm does not say."""
    try:
        told = subprocess.run(
            ["squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T"],
            capture_output=True,
            text=True,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if told.returncode == 0:
        return told.stdout.split()[0] if told.stdout.split() else "FORGOTTEN"
    return "FORGOTTEN" if "Invalid job id" in told.stderr else None
