"""Tensors in scratch files, for tables that are larger than memory, and their rows through the file.

A tensor's file has no name, so that it goes with the process, however that ends, and its space is taken at once: a
full disk is met when the tensor is made. Whole tensors are streamed through the mapping. Rows at random are read and
written through the file, past the page cache where the disk lets them. Mapping and file agree, but bytes that are
written through one must not be used through the other meanwhile, nor must their neighbours within 4 KiB.
"""

from __future__ import annotations

import ctypes
import errno
import math
import mmap
import os
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from peer_dist.kernels.native import load_library
from peer_dist.kernels.signatures import call
from peer_dist.machine import mapped_memory, mount_of, nearest_existing
from peer_dist.mistake import Mistake

_BLOCK = 4096  # as in files.c
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
_TOUCHED = 8e9  # bytes a second, of a mapping by a process, about the most
_IN_MEMORY = ("tmpfs", "ramfs")
_NETWORK = (
    "9p", "afs", "beegfs", "ceph", "cifs", "fuse.ceph", "fuse.glusterfs", "fuse.s3fs", "fuse.sshfs", "gpfs", "lustre",
    "nfs", "nfs4", "orangefs", "panfs", "pvfs2", "smb3", "smbfs", "virtiofs", "wekafs",
)  # fmt: skip


class FolderError(Mistake):
    """A folder cannot hold scratch files; the message says why, and what to do."""


@dataclass
class Traffic:
    """What this process has moved through scratch files, in bytes; not what it has touched in their mappings.

    Attributes:
        read: from them, with what lies between rows that are read by one request.
        written: to them.
    """

    read: int = 0
    written: int = 0


traffic = Traffic()
_lock = threading.Lock()  # of the traffic, and of the watch's thread
_files: dict[int, _File] = {}
"""By the address at which they are mapped."""

if sys.platform != "win32":  # where no tensor can be mapped, but all else is
    _libc = ctypes.CDLL(None, use_errno=True)
    _libc.mmap.restype = ctypes.c_void_p
    _libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    _libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    _libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class _File:
    """A file without a name, and where it is mapped.

    Args:
        size: in bytes, a multiple of a block.
        folder: on the disk that is to hold it.

    Attributes:
        sector: what requests must begin and end at a multiple of; 1 where they go through the page cache.
        written: a bit for each block, set once it was written through the file.
        lock: of writers that share blocks.
    """

    def __init__(self, size: int, folder: Path) -> None:
        self.size, self.folder, self.sector = size, folder, 1
        self.written = torch.zeros(-(-size // (8 * _BLOCK)), dtype=torch.uint8, device="cpu")
        self.lock = threading.Lock()
        self.descriptor, self.start = -1, 0
        try:
            with tempfile.TemporaryFile(prefix="peer_dist-", dir=folder, buffering=0) as file:
                _take_space(file.fileno(), size)
                # Python's own mapping would keep one more descriptor of each file
                start = _libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, file.fileno(), 0)
                if start == ctypes.c_void_p(-1).value:
                    raise OSError(ctypes.get_errno(), "")
                self.start = int(start)
                self._open_for_rows(file.fileno())
        except OSError as error:
            self.fail(error.errno or errno.EIO)

    def _open_for_rows(self, descriptor: int) -> None:
        """Without a page cache, which would read whole pages to write rows to, one writer after the other."""
        if load_library() is not None and hasattr(os, "O_DIRECT"):
            page = mmap.mmap(-1, _BLOCK)
            for sector in (512, _BLOCK):
                try:
                    self.descriptor = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
                    os.preadv(self.descriptor, [memoryview(page)[:sector]], sector % _BLOCK)
                    self.sector = sector
                    return
                except OSError as error:
                    if self.descriptor >= 0:
                        os.close(self.descriptor)
                        self.descriptor = -1
                    if error.errno == errno.EMFILE:
                        raise
        self.descriptor = os.dup(descriptor)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def fail(self, number: int) -> None:
        """Raise the system's error."""
        raise OSError(number, f"{os.strerror(number)}, in a scratch file", str(self.folder)) from None

    def leave_mapping(self) -> None:
        """Give up the pages that the process has of it; the system keeps what they hold."""
        _libc.madvise(self.start, self.size, mmap.MADV_DONTNEED)

    def leave_memory(self) -> None:
        """Let the system write its pages and give them up, those that are written already first."""
        os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if ending():  # tensors may still lie here; the system clears up
            return
        if self.start:
            _libc.munmap(self.start, self.size)
        if self.descriptor >= 0:
            os.close(self.descriptor)


def _take_space(descriptor: int, size: int) -> None:
    """Where a disk is found full at a write to the mapping, the process dies of SIGBUS."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
            return
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    zeros = bytes(min(size, 1 << 24))
    for place in range(0, size, len(zeros)):
        _whole(os.pwritev, descriptor, memoryview(zeros)[: size - place], place)


def mapped(shape: Sequence[int], dtype: torch.dtype, folder: Path) -> Tensor:
    """A CPU tensor of zeros over a scratch file of its own, which is freed with the tensor.

    Args:
        shape: any.
        dtype: any.
        folder: on the disk that is to hold it; see :func:`check_folder`.

    Raises:
        OSError: the disk has no room for it, or the folder takes no file.
    """
    count = math.prod(shape)
    size = max(count, 1) * dtype.itemsize
    file = _File(-(-size // _BLOCK) * _BLOCK, folder)
    # the storage refers to it
    memory = (ctypes.c_char * size).from_address(file.start)
    _files[file.start] = file
    weakref.finalize(memory, _files.pop, file.start).atexit = False
    _watch.begin()
    return torch.frombuffer(memory, dtype=dtype, count=max(count, 1))[:count].view(tuple(shape))


def is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor's elements lie in a file of :func:`mapped`."""
    return _place(tensor) is not None


def read_rows(table: Tensor, rows: Tensor, out: Tensor) -> None:
    """Read rows through the file. Python's lock is let go of, and several threads may read at once.

    Args:
        table: ``[rows, ...]``, of :func:`mapped`: all of it or whole rows, also as a parameter.
        rows: ``[n]`` int64, ascending.
        out: ``[n, ...]``, contiguous, of the table's dtype, on the CPU.

    Raises:
        OSError: the disk failed.
        IndexError: rows that do not ascend, or that the table has not.
    """
    _move(table, rows, out, writes=False)


def write_rows(table: Tensor, rows: Tensor, values: Tensor) -> None:
    """Write rows through the file. Several threads may write rows at once, not the same ones.

    Args:
        table: see :func:`read_rows`.
        rows: ``[n]`` int64, ascending, each once.
        values: ``[n, ...]``, contiguous, of the table's dtype, on the CPU.

    Raises:
        OSError: the disk failed; some of the rows may be written.
        IndexError: rows that do not ascend, or that the table has not.
    """
    _move(table, rows, values, writes=True)


def _move(table: Tensor, rows: Tensor, values: Tensor, writes: bool) -> None:
    place = _place(table)
    if place is None or not table.is_contiguous() or table.dim() == 0:
        raise ValueError("rows of a scratch file are those of a contiguous tensor that lies in one")
    fits = values.dtype == table.dtype and values.shape == (len(rows), *table.shape[1:])
    if not fits or not values.is_contiguous() or values.device.type != "cpu":
        raise ValueError(
            f"{len(rows)} rows of {table.dtype} {list(table.shape)} on the CPU do not fit into {values.dtype} "
            f"{list(values.shape)} on {values.device}, or this is not contiguous"
        )
    file, begin = place
    width, memory = math.prod(table.shape[1:]) * table.element_size(), _bytes(values)
    if len(rows) == 0 or width == 0:
        return
    shared = writes and (begin % _BLOCK or width % _BLOCK)
    if shared:
        file.lock.acquire()
    try:
        if file.sector == 1:
            wrong, moved = _in_python(file, begin, len(table), width, rows, memory, writes)
        else:
            wrong, moved = _in_c(file, begin, len(table), width, rows, memory, writes)
    finally:
        if shared:
            file.lock.release()
    with _lock:
        traffic.read += moved[0]
        traffic.written += moved[1]
    if wrong < 0:
        raise IndexError(f"rows that do not ascend, or are not all of a table of {len(table)}")
    if wrong:
        file.fail(wrong)


def _in_c(
    file: _File, begin: int, length: int, width: int, rows: Tensor, memory: Tensor, writes: bool
) -> tuple[int, list[int]]:
    end = begin + length * width
    place = [file.descriptor, begin, end, file.sector, int(writes)]
    moved = torch.zeros(2, dtype=torch.int64, device="cpu")
    library = load_library()
    assert library is not None  # else there is no sector
    wrong = call(
        library,
        "scratch_rows",
        file=torch.tensor(place, dtype=torch.int64, device="cpu"),
        row=rows.contiguous(),
        values=memory.view(len(rows), width),
        written=file.written,
        moved=moved,
    )
    return wrong, moved.tolist()


def _in_python(
    file: _File, begin: int, length: int, width: int, rows: Tensor, memory: Tensor, writes: bool
) -> tuple[int, list[int]]:
    steps = rows[1:] - rows[:-1]
    if not (rows[0] >= 0 and rows[-1] < length and (steps >= int(writes)).all()):
        return -1, [0, 0]
    room, done = memory.numpy().data, 0
    try:
        for first, count, number in _runs(rows):
            part = room[number * width : (number + count) * width]
            _whole(os.pwritev if writes else os.preadv, file.descriptor, part, begin + first * width)
            done += len(part)
    except OSError as error:
        return error.errno or errno.EIO, [0, 0]
    return 0, [0, done] if writes else [done, 0]


def _place(tensor: Tensor) -> tuple[_File, int] | None:
    """The file that a tensor lies in, and at which byte it begins there."""
    try:
        start = int(tensor.untyped_storage().data_ptr() + tensor.storage_offset() * tensor.element_size())
    except (RuntimeError, NotImplementedError):  # it has no memory of its own
        return None
    file = _files.get(start)
    if file is None:
        file = next((f for f in list(_files.values()) if f.start <= start < f.start + f.size), None)
    return None if file is None else (file, start - file.start)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def _runs(rows: Tensor) -> Iterator[tuple[int, int, int]]:
    """Rows that follow one another: the first, how many, and the number of the first among those asked for."""
    ends = (rows[1:] != rows[:-1] + 1).nonzero().flatten() + 1
    edges = [0, *ends.tolist(), len(rows)]
    for begin, end in pairwise(edges):
        yield int(rows[begin]), end - begin, begin


def _whole(transfer: Callable[..., int], descriptor: int, memory: memoryview, offset: int) -> None:
    while len(memory):
        done = transfer(descriptor, [memory], offset)
        if done == 0:
            raise OSError(errno.EIO, "a scratch file ended early")
        memory, offset = memory[done:], offset + done


def let_resident(size: int) -> None:
    """Keep at most about this many bytes of all mappings in memory from now on, whoever touches them.

    A thread looks some ten times a second, more often for a small size, while there are scratch files. Pages that it
    gives up are met again in the page cache or in the file; nothing is lost.

    Args:
        size: in bytes, for this process.
    """
    _watch.budget = size
    _watch.begin()


class _Watch:
    """The thread behind :func:`let_resident`; only Linux tells what is resident."""

    def __init__(self) -> None:
        self.budget: int | None = None
        self._thread: threading.Thread | None = None
        self._writer: threading.Thread | None = None

    def begin(self) -> None:
        """Start it if there is something to watch."""
        with _lock:
            if self._thread is None and self.budget is not None and _files and sys.platform == "linux":
                self._thread = threading.Thread(target=self._run, name="scratch files", daemon=True)
                self._thread.start()

    def after_fork(self) -> None:
        """Threads stay with the parent."""
        global _lock
        _lock = threading.Lock()
        self._thread = self._writer = None
        self.begin()

    def _run(self) -> None:
        others = self._give_up()
        while True:
            with _lock:
                if not _files:
                    self._thread = None
                    return
            half = (self.budget or 0) / 2  # the other one is for what is touched between two looks
            time.sleep(min(max(half / _TOUCHED, 0.005), 0.1))
            now = mapped_memory()
            others = min(others, now)
            if now - others > half:
                others = self._give_up()

    def _give_up(self) -> int:
        """Leave all mappings; bytes that the process has mapped of other files."""
        for file in list(_files.values()):
            file.leave_mapping()
        if self._writer is None or not self._writer.is_alive():  # it waits for the disk
            self._writer = threading.Thread(target=self._write, name="scratch pages", daemon=True)
            self._writer.start()
        return mapped_memory()

    def _write(self) -> None:
        for file in list(_files.values()):
            file.leave_memory()


_watch = _Watch()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_watch.after_fork)


def default_folder() -> Path:
    """Where scratch files go if nobody says: the job's folder on the node under Slurm, else the system's for temporary
    files (TMPDIR).
    """
    job = os.environ.get("SLURM_TMPDIR", "")
    return Path(job if os.path.isabs(job) and os.path.isdir(job) else tempfile.gettempdir())


def check_folder(folder: Path, needed: int, key: str = "peer.table_folder") -> None:
    """Make sure that a folder can hold scratch files.

    Args:
        folder: any.
        needed: bytes of them, of all ranks and folders that share its disk.
        key: of the config, that names another folder.

    Raises:
        FolderError: it is no folder or in memory, files cannot be written there, or the disk has too little space.
    """
    advice = f"name a folder on a local disk in {key}"
    if not folder.is_dir():
        what = "is no folder" if os.path.lexists(folder) else "does not exist"
        raise FolderError(f"scratch files: {folder} {what}; {advice}")
    mount, kind = mount_of(folder)
    if kind in _IN_MEMORY:
        raise FolderError(f"scratch files: {folder} is in memory ({kind} at {mount}), not on a disk; {advice}")
    try:
        with tempfile.TemporaryFile(prefix="peer_dist-", dir=folder):
            pass
    except OSError as error:
        raise FolderError(f"scratch files: {folder} takes none ({error.strerror}); {advice}") from None
    space = os.statvfs(folder)
    free = space.f_bavail * space.f_frsize
    if free < needed:
        raise FolderError(
            f"scratch files: {folder} has {free / 1e9:,.1f} GB free, the tables need {needed / 1e9:,.1f} GB; free "
            f"some, name a folder on a larger disk in {key}, or spread the tables over more machines"
        )


def network_file_system(folder: Path) -> str | None:
    """The kind of network file system that a folder is on, where rows at random are slow; None on a local disk."""
    kind = mount_of(nearest_existing(folder))[1]
    return kind if kind in _NETWORK else None


class DiskRates(NamedTuple):
    """Bytes a second.

    Attributes:
        rows_read: of rows at random.
        rows_written: of rows at random.
        read: of rows in order.
        written: of rows in order.
    """

    rows_read: float
    rows_written: float
    read: float
    written: float


def disk_rates(folder: Path, row_bytes: int, size: int = 1 << 30) -> DiskRates:
    """Measure a disk past the page cache, in about two seconds.

    Args:
        folder: on it.
        row_bytes: of a row.
        size: of the scratch file, in bytes; less of it is used if the disk is slow.

    Raises:
        OSError: the disk has no room for it, or failed.
    """
    count = max(size // row_bytes, 1)
    table = mapped((count, row_bytes), torch.uint8, folder)
    place = _place(table)
    assert place is not None
    file = place[0]

    def rate(step: int, picks: Iterator[Tensor], seconds: float, writes: bool) -> tuple[float, int]:
        """Bytes a second, and rows, until the time or the rows are over."""
        values = torch.full((step, row_bytes), 1, dtype=torch.uint8, device="cpu")
        if file.sector == 1:
            _forget(file)
        begin, done = time.perf_counter(), 0
        for rows in picks:
            _move(table, rows, values[: len(rows)], writes)
            done += len(rows)
            if time.perf_counter() - begin > seconds:
                break
        if writes and file.sector == 1:
            os.fdatasync(file.descriptor)
        return done * row_bytes / (time.perf_counter() - begin), done

    def in_order(step: int, end: int) -> Iterator[Tensor]:
        for first in range(0, end, step):
            yield torch.arange(first, min(first + step, end), dtype=torch.int64, device="cpu")

    def at_random(step: int, end: int) -> Iterator[Tensor]:
        generator = torch.Generator(device="cpu").manual_seed(0)
        while True:
            picked = torch.randint(end, (step,), generator=generator, dtype=torch.int64, device="cpu")
            yield picked.unique()

    whole, some = max((1 << 24) // row_bytes, 1), 2048
    written, end = rate(whole, in_order(whole, count), 0.7, writes=True)
    read, _ = rate(whole, in_order(whole, end), 0.3, writes=False)  # what was never written is not on the disk
    rows_read, _ = rate(some, at_random(some, end), 0.4, writes=False)
    rows_written, _ = rate(some, at_random(some, end), 0.4, writes=True)
    return DiskRates(rows_read, rows_written, read, written)


def _forget(file: _File) -> None:
    os.fdatasync(file.descriptor)
    if hasattr(os, "posix_fadvise"):
        file.leave_memory()
