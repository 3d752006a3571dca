"""Rows between a GPU and the host's memory, which it reads and writes over the bus as its own.

``far`` is a tensor of the CPU in pinned memory: a GPU has an address for each of its bytes (unified addressing), and
Triton's launcher asks the driver for it (``cuPointerGetAttribute``), so that the tensor is given to a kernel as it is.
The host copies nothing, packs nothing and is asked for nothing: the numbers of the rows stay on the GPU, a launch is
all that it does, and the bytes pass on the stream that the kernels around are on. Memory that is not pinned has no such
address, and is refused.

Over the bus go ``touched * row bytes``, each row once, and nothing else; on the GPU's side as many bytes are written
(or read), and the 8 of a row's number read. PCIe 4 moves up to 32 GB/s in a direction and PCIe 5 twice that, in
requests of whole sectors of 32 bytes: rows of a multiple of 32 bytes waste nothing, and a row's scale alone costs as
much as 32 bytes. The two ways are independent of each other.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from peer_dist.kernels.triton import launching
from peer_dist.kernels.triton.launching import jit, tl, triton

TILE = 1024
"""Words of 4 bytes of a program: two requests of 16 bytes a thread. The bus needs some 2 us of its bytes in flight,
130 KB at 64 GB/s, which the programs of a few multiprocessors have."""

MAX_BLOCK_W = 4096
"""Words that a program takes of a row at once; wider rows are taken in pieces."""


@jit
def _copy_rows_kernel(  # type: ignore[no-untyped-def]
    rows,  # [touched]: of `far`
    slots,  # [touched]: of `near`, or None: in order
    near,  # [slots, WORDS]
    far,  # [rows, WORDS]: the host's
    touched,
    WORDS: tl.constexpr,
    BACK: tl.constexpr,  # to the host
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """One program for BLOCK_R rows, in pieces of BLOCK_W words."""
    place = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = place < touched
    row = tl.load(rows + place, mask=live, other=0)
    slot = place if slots is None else tl.load(slots + place, mask=live, other=0)
    for begin in range(0, WORDS, BLOCK_W):
        word = begin + tl.arange(0, BLOCK_W)
        mask = live[:, None] & (word < WORDS)[None, :]
        there, here = far + row[:, None] * WORDS + word[None, :], near + slot[:, None] * WORDS + word[None, :]
        if BACK:
            tl.store(there, tl.load(here, mask=mask, other=0), mask=mask)
        else:
            tl.store(here, tl.load(there, mask=mask, other=0), mask=mask)


def gather_rows(far: Tensor, rows: Tensor, out: Tensor, to: Tensor | None = None) -> None:
    """``out[i] = far[rows[i]]``, or with slots ``out[to[i]] = far[rows[i]]``, in one launch on the current stream.

    ``touched * row bytes`` pass over the bus, each row once, in words of 16 bytes where rows are multiples of them,
    whatever the dtype. Nothing is asked of the host, and the host waits for nothing. Who writes to ``far`` on the host
    must have done so before the launch, and must not again before the stream has come past it.

    Args:
        far: ``[rows, ...]`` of any dtype, contiguous, in pinned memory of the host (or on the GPU).
        rows: ``[touched]`` int64, on the GPU.
        out: ``[touched, ...]``, or ``[slots, ...]`` with ``to``, of ``far``'s dtype, contiguous, on the GPU.
        to: ``[touched]`` int64 slots, each once, on the GPU.

    Raises:
        ValueError: tensors that do not fit each other, or memory that is not pinned.
    """
    _copy_rows(far, rows, out, to, back=False)


def scatter_rows(far: Tensor, rows: Tensor, values: Tensor, frm: Tensor | None = None) -> None:
    """``far[rows[i]] = values[i]``, or with slots ``far[rows[i]] = values[frm[i]]``: :func:`gather_rows` the other way.

    As many bytes pass over the bus, and nothing is asked of the host; it may read the rows once the stream has come
    past the launch.

    Args:
        far: ``[rows, ...]``, as for :func:`gather_rows`.
        rows: ``[touched]`` int64, each once, on the GPU.
        values: ``[touched, ...]``, or ``[slots, ...]`` with ``frm``, of ``far``'s dtype, contiguous, on the GPU.
        frm: ``[touched]`` int64 slots, on the GPU.

    Raises:
        ValueError: tensors that do not fit each other, or memory that is not pinned.
    """
    _copy_rows(far, rows, values, frm, back=True)


def _copy_rows(far: Tensor, rows: Tensor, near: Tensor, slots: Tensor | None, back: bool) -> None:
    if far.dtype != near.dtype or far.shape[1:] != near.shape[1:]:
        raise ValueError(
            f"rows of {list(far.shape)} {far.dtype} cannot be those of {list(near.shape)} {near.dtype}: "
            "give tensors of one dtype whose rows are alike"
        )
    if slots is None and len(near) != len(rows):
        raise ValueError(f"{len(rows)} numbers of rows need as many rows, not {len(near)}")
    if slots is not None and slots.shape != rows.shape:
        raise ValueError(f"{len(rows)} numbers of rows need as many slots, not {len(slots)}")
    if not (far.is_contiguous() and near.is_contiguous()):
        raise ValueError(f"rows must lie one after the other, not with strides {far.stride()} and {near.stride()}")
    if near.is_cuda and far.device.type == "cpu" and not far.is_pinned():
        raise ValueError("a GPU reads pinned memory of the host alone: make the far tensor with pin_memory=True")
    word = next(each for each in (torch.int32, torch.int16, torch.uint8) if _divides(each.itemsize, far, near))
    words = math.prod(far.shape[1:]) * far.element_size() // word.itemsize
    if not words or not len(rows):
        return
    block_w = min(triton.next_power_of_2(words), MAX_BLOCK_W)
    block_r = max(1, TILE // block_w)
    launching.launch(
        _copy_rows_kernel,
        (triton.cdiv(len(rows), block_r),),
        rows,
        slots,
        _flat(near).view(word),
        _flat(far).view(word),
        len(rows),
        WORDS=words,
        BACK=back,
        BLOCK_R=block_r,
        BLOCK_W=block_w,
        num_warps=min(16, max(1, block_r * block_w // 256)),
    )
    # Triton writes where autograd does not see it
    torch.autograd.graph.increment_version(far if back else near)


def _flat(tensor: Tensor) -> Tensor:
    """A tensor as ``[rows, columns]``."""
    return tensor.detach().view(len(tensor), math.prod(tensor.shape[1:]))


def _divides(itemsize: int, *tensors: Tensor) -> bool:
    """Whether all rows of these tensors are whole words of so many bytes."""
    return all(
        math.prod(tensor.shape[1:]) * tensor.element_size() % itemsize == 0
        and tensor.storage_offset() * tensor.element_size() % itemsize == 0
        for tensor in tensors
    )
