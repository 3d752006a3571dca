"""Tensors in scratch files, for tables that are larger than memory, and their rows through the file.

The file of a tensor has no name, so that it goes with the process, however that ends. Whole tensors are streamed
through the mapping; rows at random are read and written through the file, of which no page is then mapped.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

_files: dict[int, _File] = {}
"""By the address at which they are mapped."""


class _File:
    """A file without a name, and where it is mapped.

    Args:
        size: in bytes.
        folder: on the disk that is to hold it.

    Raises:
        OSError: the disk has no room for it, or the folder takes no file.
    """

    def __init__(self, size: int, folder: Path) -> None:
        self.size, self.folder = size, folder
        self.descriptor, self.start = -1, 0
        try:
            with tempfile.TemporaryFile(prefix="peer_dist-", dir=folder, buffering=0) as file:
                # with its space: where a disk is found full at a write to the mapping, the process dies of SIGBUS
                os.posix_fallocate(file.fileno(), 0, size)
                self.descriptor = os.dup(file.fileno())
            self.start = _map(self.descriptor, size)
        except OSError as error:
            raise OSError(error.errno, os.strerror(error.errno or 0), str(folder)) from None

    def __del__(self) -> None:
        if self.start:
            _libc.munmap(self.start, self.size)
        if self.descriptor >= 0:
            os.close(self.descriptor)


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def _map(descriptor: int, size: int) -> int:
    """Python's own mapping would keep a second descriptor of each file."""
    start = _libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, descriptor, 0)
    if start == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "")
    return int(start)


def mapped(shape: Sequence[int], dtype: torch.dtype, folder: Path) -> Tensor:
    """A CPU tensor of zeros over a scratch file of its own, whose space is taken at once and freed with the tensor.

    Args:
        shape: any.
        dtype: any.
        folder: on the disk that is to hold it.

    Raises:
        OSError: the disk has no room for it, or the folder takes no file.
    """
    count = math.prod(shape)
    file = _File(max(count * dtype.itemsize, 1), folder)
    # ctypes calls what is here for as long as the storage refers to it
    memory = (ctypes.c_char * max(file.size, dtype.itemsize)).from_address(file.start)
    _files[file.start] = file
    weakref.finalize(memory, _files.pop, file.start).atexit = False
    return torch.frombuffer(memory, dtype=dtype, count=max(count, 1))[:count].view(tuple(shape))


def is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor's elements lie in a file of :func:`mapped`."""
    return _place(tensor) is not None


def read_rows(table: Tensor, rows: Tensor, out: Tensor) -> None:
    """Read rows through the file.

    Args:
        table: ``[rows, ...]``, of :func:`mapped`: whole or whole rows of it.
        rows: ``[n]`` int64, ascending.
        out: ``[n, ...]``, contiguous, of the table's dtype, on the CPU.

    Raises:
        OSError: the disk failed.
    """
    descriptor, begin, width = _checked(table, rows, out)
    memory = _bytes(out)
    for first, count, number in _runs(rows):
        _whole(os.preadv, descriptor, memory[number * width : (number + count) * width], begin + first * width)


def write_rows(table: Tensor, rows: Tensor, values: Tensor) -> None:
    """Write rows through the file; see :func:`read_rows`.

    Args:
        table: ``[rows, ...]``, of :func:`mapped`: whole or whole rows of it.
        rows: ``[n]`` int64, ascending, each once.
        values: ``[n, ...]``, contiguous, of the table's dtype, on the CPU.

    Raises:
        OSError: the disk failed.
    """
    descriptor, begin, width = _checked(table, rows, values)
    memory = _bytes(values)
    for first, count, number in _runs(rows):
        _whole(os.pwritev, descriptor, memory[number * width : (number + count) * width], begin + first * width)


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


def _checked(table: Tensor, rows: Tensor, values: Tensor) -> tuple[int, int, int]:
    """Descriptor, the byte at which the table begins, and the bytes of a row."""
    place = _place(table)
    if place is None or not table.is_contiguous():
        raise ValueError("rows through a file are those of a contiguous table in a scratch file")
    if rows.dtype != torch.int64 or rows.dim() != 1 or rows.device.type != "cpu":
        raise TypeError(f"rows must be int64 [n] on the CPU, not {rows.dtype} {list(rows.shape)} on {rows.device}")
    if (
        values.dtype != table.dtype
        or values.shape != (len(rows), *table.shape[1:])
        or not values.is_contiguous()
        or values.device.type != "cpu"
    ):
        raise ValueError(
            f"{len(rows)} rows of {table.dtype} {list(table.shape)} do not fit {values.dtype} {list(values.shape)}"
        )
    if len(rows) and not 0 <= int(rows[0]) <= int(rows[-1]) < len(table):
        raise IndexError(f"rows {int(rows[0])} to {int(rows[-1])} of a table of {len(table)}")
    file, begin = place
    return file.descriptor, begin, math.prod(table.shape[1:]) * table.element_size()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def _runs(rows: Tensor) -> Iterator[tuple[int, int, int]]:
    """Rows that follow one another: the first, how many, and the number of the first among those asked for."""
    if len(rows) == 0:
        return
    ends = (rows[1:] != rows[:-1] + 1).nonzero().flatten() + 1
    edges = [0, *ends.tolist(), len(rows)]
    for begin, end, first in zip(edges, edges[1:], rows[torch.tensor(edges[:-1], device="cpu")].tolist()):
        yield first, end - begin, begin


def _whole(transfer: object, descriptor: int, memory: memoryview, offset: int) -> None:
    while len(memory):
        done = transfer(descriptor, [memory], offset)  # type: ignore[operator]
        if done == 0:
            raise OSError(5, "a scratch file ended early")
        memory, offset = memory[done:], offset + done
