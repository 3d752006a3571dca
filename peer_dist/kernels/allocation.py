"""CPU memory of tables and of their gradients: huge pages, and no fresh ones each step."""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
import weakref

import torch
from torch import Tensor

_LARGE = 1 << 24  # bytes from which pages matter

_idle: list[mmap.mmap] = []


def huge_pages(tensor: Tensor) -> Tensor:
    """Ask for huge pages under a large CPU tensor that nothing was written to yet: rows at random in gigabytes
    otherwise cost an address translation each. Without effect where the system has none.
    """
    if tensor.device.type == "cpu" and tensor.nbytes >= _LARGE and sys.platform == "linux":
        page = 1 << 21
        begin = -(-tensor.data_ptr() // page) * page
        length = (tensor.data_ptr() + tensor.nbytes - begin) // page * page
        libc = ctypes.CDLL(None)
        libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), ctypes.c_int(mmap.MADV_HUGEPAGE))
    return tensor


def gradient_memory(rows: int, dim: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised CPU tensor ``[rows, dim]`` whose memory, if large, is used again once nothing refers to it.

    A system that hands out fresh pages zeroes them first, at times after looking for huge ones: for the gradients of a
    large table, made anew each step, that costs more than the gradients do. As in torch's allocator for GPUs, the
    process keeps what it once needed; what serves no request of about its size is given back.
    """
    count = rows * dim * dtype.itemsize
    if count < _LARGE:
        return torch.empty(rows, dim, dtype=dtype)
    block = _take(count)
    view = memoryview(block)
    weakref.finalize(view, _idle.append, block).atexit = False
    return torch.frombuffer(view, dtype=dtype, count=rows * dim).view(rows, dim)


def _take(count: int) -> mmap.mmap:
    fitting = [block for block in _idle if count <= len(block) <= 2 * count]
    if fitting:
        block = min(fitting, key=len)
        _idle.remove(block)
        return block
    _idle.clear()
    step = 1 << max(21, math.ceil(math.log2(count)) - 3)  # the next step's rows are about as many
    block = mmap.mmap(-1, -(-count // step) * step)
    if sys.platform == "linux":
        block.madvise(mmap.MADV_HUGEPAGE)
    return block
