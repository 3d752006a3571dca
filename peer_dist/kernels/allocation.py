"""CPU memory of tables and of their gradients: huge pages, and no fresh ones each step."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import sys
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

_LARGE = 1 << 24  # bytes from which pages matter

_idle: list[mmap.mmap] = []


def address(tensor: Tensor) -> int | None:
    """Where a CPU tensor's elements lie one after the other. None if they do not, or nowhere: a tensor may be strided,
    stand for one of another device or of several processes, or have had its memory taken away.
    """
    try:
        if tensor.layout is not torch.strided or not tensor.is_cpu or not tensor.is_contiguous() or tensor.is_neg():
            return None
        place, held = tensor.data_ptr(), tensor.untyped_storage().nbytes()
    except RuntimeError:  # of functional transforms, say
        return None
    count = tensor.numel()
    inside = (tensor.storage_offset() + count) * tensor.element_size() <= held
    return place if count == 0 or (place and inside) else None


def huge_pages(tensor: Tensor) -> Tensor:
    """Ask for huge pages under a large CPU tensor that nothing was written to yet: rows at random in gigabytes
    otherwise cost an address translation each. Without effect where the system has none.
    """
    start = address(tensor) if sys.platform == "linux" and tensor.nbytes >= _LARGE else None
    if start is not None:
        page = 1 << 21
        begin = -(-start // page) * page
        length = (start + tensor.nbytes - begin) // page * page
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
        return torch.empty(rows, dim, dtype=dtype, device="cpu")
    block = _take(count)
    view = memoryview(block)
    weakref.finalize(view, _idle.append, block).atexit = False
    return torch.frombuffer(view, dtype=dtype, count=rows * dim).view(rows, dim)


def host_zeros(shape: Sequence[int], dtype: torch.dtype, *, pinned: bool) -> Tensor:
    """A CPU tensor of zeros whose pages the system provides when they are first written to, huge ones where it can.

    Args:
        shape: any.
        dtype: any.
        pinned: let GPUs read it over the bus, and copy it while the host goes on. Torch's own pinned memory is of
            powers of two, which would double a table. Its pages are provided at once then.
    """
    count = math.prod(shape)
    if not pinned or count == 0:
        return huge_pages(torch.zeros(tuple(shape), dtype=dtype, device="cpu"))
    block = _block(count * dtype.itemsize)
    view = memoryview(block)
    tensor = torch.frombuffer(view, dtype=dtype, count=count)
    torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), len(block), 0)))
    weakref.finalize(view, _unregister, block, tensor.data_ptr()).atexit = False
    return tensor.view(tuple(shape))


def _unregister(block: mmap.mmap, start: int) -> None:
    """Let go of pinned memory; the mapping goes with the last reference to it, which is this one."""
    torch.cuda.cudart().cudaHostUnregister(start)


def _take(count: int) -> mmap.mmap:
    for block in sorted(_idle, key=len):
        if count <= len(block) <= 2 * count:
            with contextlib.suppress(ValueError):  # another thread was faster
                _idle.remove(block)
                return block
    _idle.clear()
    step = 1 << max(21, math.ceil(math.log2(count)) - 3)  # the next step's rows are about as many
    return _block(-(-count // step) * step)


def _block(size: int) -> mmap.mmap:
    if sys.platform == "win32":
        return mmap.mmap(-1, size)
    # private: a process that is forked off has its own from then on
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a system without huge pages
            block.madvise(mmap.MADV_HUGEPAGE)
    return block
