"""What the system has no more of, memory, files, threads or disk, named in a sentence with its limit.

Libraries say it in a hundred ways, most of them in the middle of a traceback; and what they leave half made can keep a
process from ending.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
import threading
from collections.abc import Iterator
from typing import NoReturn

from peer_dist.mistake import Mistake, in_words, printable

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

_FILES, _THREADS, _ADDRESSES = 96, 64, 3 << 29  # what a rank of a small model takes when it has joined the others
_DISK = {
    errno.ENOSPC: "no space is left on the disk; free some",
    errno.EDQUOT: "the disk quota is used up; free some of it, or have it raised",
}
_MEMORY_WORDS = re.compile(
    r"can't allocate memory|cannot allocate memory|not enough memory|bad_alloc|failed to map segment|out of memory",
    re.IGNORECASE,
)
_GPU_WORDS = re.compile(r"CUDA.*out of memory|CUDA_ERROR_OUT_OF_MEMORY|cudaErrorMemoryAllocation", re.IGNORECASE)
_FILES_WORDS = re.compile(r"too many open files", re.IGNORECASE)
_THREADS_WORDS = re.compile(
    r"can't start new thread|^resource temporarily unavailable$|thread constructor failed|pthread_create failed",
    re.IGNORECASE,
)
_DISK_WORDS = re.compile(r"no space left on device|disk quota exceeded|file too large", re.IGNORECASE)
_ASKED = re.compile(r"tried to allocate ([\d.]+) ?(bytes|[KMGT]i?B)?", re.IGNORECASE)


class ShortageError(Mistake):
    """There is too little of something; the message names it and its limit."""


def shortage(error: BaseException) -> str | None:
    """What the system ran short of, if that is what an error, or one that it came from, means; a sentence.

    Args:
        error: any error, also one of a library's import.
    """
    for cause in _chain(error):
        if _said_again(cause):
            continue
        if isinstance(cause, OSError) and cause.errno is not None:
            where = f"{cause.filename}: " if cause.filename else ""
            if cause.errno in _DISK:
                return f"{where}{_DISK[cause.errno]}"
            if cause.errno == errno.EFBIG:
                return f"{where}a file may not be larger than ulimit -f allows ({_limit('FSIZE')}); raise it"
            if cause.errno in (errno.EMFILE, errno.ENFILE):
                return _files()
            if cause.errno == errno.ENOMEM:
                return _memory("")
            if cause.errno == errno.EAGAIN:  # of fork; Python's name for it is BlockingIOError
                return _threads()
        if isinstance(cause, MemoryError):
            return _memory(str(cause))
        if isinstance(cause, (RuntimeError, ImportError, OSError, SystemError)):
            text = str(cause)
            if _GPU_WORDS.search(text) or type(cause).__name__ == "OutOfMemoryError":
                return _gpu_memory(text)
            for words, sentence in ((_FILES_WORDS, _files), (_THREADS_WORDS, _threads)):
                if words.search(text):
                    return sentence()
            if _DISK_WORDS.search(text):
                return f"the disk: {in_words(text)}; free some space"
            if _MEMORY_WORDS.search(text):
                return _memory(text)
    return None


def leave(sentence: str, code: int = ShortageError.exit_code) -> NoReturn:
    """Say it and end this process at once: what a library left half made could keep it, and its threads, for ever."""
    with contextlib.suppress(OSError):
        os.write(2, f"{printable(sentence)}\n".encode(errors="backslashreplace"))
    os._exit(code)


def check_room() -> None:
    """Make sure, before anything is begun, that this process can have the threads, files and addresses of a rank.

    Where one of them runs out in the middle of a start, libraries abort or wait for ever instead of failing.

    Raises:
        ShortageError: it cannot.
    """
    if resource is None:
        return
    if _finite(resource.RLIMIT_AS) is not None:
        try:
            # private and without access, it is counted by the limit and by nothing else
            mmap.mmap(-1, _ADDRESSES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=0).close()
        except OSError:
            raise ShortageError(_memory(f"tried to allocate {_ADDRESSES} bytes")) from None
    with contextlib.ExitStack() as held:
        try:
            for _ in range(_FILES):
                held.callback(os.close, os.open(os.devnull, os.O_RDONLY))
        except OSError:
            raise ShortageError(_files()) from None
        done = threading.Event()
        held.callback(done.set)
        try:
            for _ in range(_THREADS):
                threading.Thread(target=done.wait, daemon=True).start()
        except RuntimeError:
            raise ShortageError(_threads()) from None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, and those that it came from, the nearest first."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__


def _said_again(error: BaseException) -> bool:
    """Whether an error has the words of the one that it came from, and no more to tell: Megatron-core adds the name of
    the module that it was making, and leaves out the system's number and the file.
    """
    cause = error.__cause__ or error.__context__
    if cause is None or type(error) is not type(cause) or getattr(error, "errno", None) is not None:
        return False
    return str(error).startswith(str(cause))


def _memory(text: str) -> str:
    asked = _ASKED.search(text)
    more, limits = f"{_size(asked)} more" if asked else "more", []
    for name, option, held in (("AS", "v", "VmSize"), ("DATA", "d", "VmData")):
        limit = None if resource is None else _finite(getattr(resource, f"RLIMIT_{name}"))
        if limit is not None:
            limits.append(f"ulimit -{option} allows {_gb(limit)}, of which it has {_gb(_held(held))}")
    advice = "raise the limit, or lower" if limits else "lower"
    with contextlib.suppress(Exception):
        if not limits:
            from peer_dist.machine import free_memory

            limits.append(f"{_gb(free_memory())} are free on this machine")
    return (
        f"memory: {more} was asked for than this process can have ({'; '.join(limits)}); {advice} "
        "train.micro_batch_size or the model's sizes, or spread it over more ranks"
    )


def _gpu_memory(text: str) -> str:
    asked = _ASKED.search(text)
    more = _size(asked) if asked else "more"
    return (
        f"memory of the GPU: {more} was asked for and is not free ({in_words(text, 120)}); lower "
        "train.micro_batch_size, or spread the model over more GPUs (peer-dist plan says what fits)"
    )


def _files() -> str:
    return f"open files: this process may have no more than ulimit -n allows ({_limit('NOFILE')}); raise it to 1024"


def _threads() -> str:
    if resource is not None and (limit := _finite(resource.RLIMIT_AS)) is not None:
        return (
            f"threads: none can be started, for want of memory for their stacks (ulimit -v allows {_gb(limit)}, of "
            f"which this process has {_gb(_held('VmSize'))}) or because this user has too many (ulimit -u: "
            f"{_limit('NPROC')}); raise the limit"
        )
    return f"threads: the system starts no more of them for this user (ulimit -u: {_limit('NPROC')}); raise the limit"


def _finite(number: int) -> int | None:
    """A limit of this process; None if there is none."""
    soft = resource.getrlimit(number)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def _limit(name: str) -> str:
    """A limit of this process, for a sentence."""
    number = getattr(resource, f"RLIMIT_{name}", None)
    value = None if number is None else _finite(number)
    if value is None:
        return "unlimited"
    return _gb(value) if name == "FSIZE" else str(value)


def _held(name: str) -> int:
    """Bytes that this process has, by the kernel's name for them; 0 where the kernel does not say."""
    with contextlib.suppress(OSError, ValueError), open("/proc/self/status", encoding="ascii") as file:
        for line in file:
            if line.startswith(f"{name}:"):
                return 1024 * int(line.split()[1])
    return 0


def _size(asked: re.Match[str]) -> str:
    unit = asked[2] or "bytes"
    return _gb(int(float(asked[1]))) if unit == "bytes" else f"{asked[1]} {unit}"


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size} bytes"
