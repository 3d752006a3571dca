"""The dense part's elementwise work on GPUs, each in as many passes over memory as it has arguments and results; what
it computes is said in :mod:`peer_dist.kernels.dense`.

All sums and products are in float32, or in float64 for float64, and rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peer_dist.kernels.triton import launching
from peer_dist.kernels.triton.launching import accumulator, jit, tl, triton

TILE = 1024
"""Elements of a program: 8 a thread, 16 bytes of a 16-bit type."""

WORDS = 4096
"""Logits that a program holds at once."""

# ---------------------------------------------------------------------------------------------------------------------
# Kernels. Pointers are to contiguous tensors.


@jit
def _swiglu_kernel(  # type: ignore[no-untyped-def]
    x,  # [tokens, 2 * DIM]
    dy,  # [tokens, DIM], or None: forward
    out,  # [tokens, DIM], or backward [tokens, 2 * DIM]
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One program for BLOCK_D hidden units of a token."""
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = col < DIM
    a = tl.load(x + token * 2 * DIM + col, mask=mask, other=0.0).to(WIDE)
    b = tl.load(x + token * 2 * DIM + DIM + col, mask=mask, other=0.0).to(WIDE)
    share = 1 / (1 + tl.exp(-a))
    if dy is None:
        tl.store(out + token * DIM + col, a * share * b, mask=mask)
    else:
        g = tl.load(dy + token * DIM + col, mask=mask, other=0.0).to(WIDE)
        tl.store(out + token * 2 * DIM + col, g * b * share * (1 + a * (1 - share)), mask=mask)
        tl.store(out + token * 2 * DIM + DIM + col, g * a * share, mask=mask)


@jit
def _heads_kernel(  # type: ignore[no-untyped-def]
    mixed,  # [s, b, groups, EACH + 2, 2 * HALF]
    query,  # [b, s, groups * EACH, 2 * HALF]
    key,  # [b, s, groups, 2 * HALF]
    value,  # [b, s, groups, 2 * HALF]
    cos,  # [s, HALF]
    sin,  # [s, HALF]
    length,
    batch,
    groups,
    EACH: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    JOIN: tl.constexpr,  # the other way, for gradients
    WIDE: tl.constexpr,
):
    """One program for BLOCK_R heads of a token."""
    token = tl.program_id(0).to(tl.int64)
    place = token // batch
    packed = token % batch * length + place
    row = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    col = tl.arange(0, BLOCK_C)[None, :]
    group, head = row // (EACH + 2), row % (EACH + 2)
    live = (row < groups * (EACH + 2))[:, None] & (col < HALF)
    head = head[:, None]
    is_query, is_key, is_value = live & (head < EACH), live & (head == EACH), live & (head == EACH + 1)
    width = 2 * HALF
    to_mixed = mixed + ((token * groups * (EACH + 2) + row) * width)[:, None] + col
    to_query = query + ((packed * groups + group) * EACH * width)[:, None] + head * width + col
    to_key = key + ((packed * groups + group) * width)[:, None] + col
    to_value = value + ((packed * groups + group) * width)[:, None] + col
    if JOIN:
        first = tl.load(to_query, mask=is_query, other=0.0).to(WIDE)
        first += tl.load(to_key, mask=is_key, other=0.0).to(WIDE)
        first += tl.load(to_value, mask=is_value, other=0.0).to(WIDE)
        second = tl.load(to_query + HALF, mask=is_query, other=0.0).to(WIDE)
        second += tl.load(to_key + HALF, mask=is_key, other=0.0).to(WIDE)
        second += tl.load(to_value + HALF, mask=is_value, other=0.0).to(WIDE)
    else:
        first = tl.load(to_mixed, mask=live, other=0.0).to(WIDE)
        second = tl.load(to_mixed + HALF, mask=live, other=0.0).to(WIDE)
    c = tl.load(cos + place * HALF + col, mask=col < HALF, other=0.0)
    s = tl.load(sin + place * HALF + col, mask=col < HALF, other=0.0)
    if JOIN:
        s = -s
    turned = head <= EACH
    new_first = tl.where(turned, first * c - second * s, first)
    new_second = tl.where(turned, second * c + first * s, second)
    if JOIN:
        tl.store(to_mixed, new_first, mask=live)
        tl.store(to_mixed + HALF, new_second, mask=live)
    else:
        tl.store(to_query, new_first, mask=is_query)
        tl.store(to_query + HALF, new_second, mask=is_query)
        tl.store(to_key, new_first, mask=is_key)
        tl.store(to_key + HALF, new_second, mask=is_key)
        tl.store(to_value, new_first, mask=is_value)
        tl.store(to_value + HALF, new_second, mask=is_value)


@jit
def _label_logs_kernel(  # type: ignore[no-untyped-def]
    logits,  # [rows, DIM]
    labels,  # [rows]
    logs,  # [rows]
    kept,  # [2, rows]: the largest logit, and the logarithm of the sum of the others' shares of it
    rows,
    DIM: tl.constexpr,
    BLOCK_W: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One program for a row."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK_W)
    start = logits + row * DIM
    largest = tl.full([], -3.4e38, WIDE)  # finite: all of the first words may be excluded by -inf
    sums = tl.full([BLOCK_W], 0.0, WIDE)
    for begin in range(0, DIM, BLOCK_W):
        x = tl.load(start + begin + col, mask=begin + col < DIM, other=float("-inf")).to(WIDE)
        higher = tl.maximum(largest, tl.max(x, 0))
        sums = sums * tl.exp(largest - higher) + tl.exp(x - higher)
        largest = higher
    total = tl.log(tl.sum(sums, 0))
    own = tl.load(start + tl.load(labels + row)).to(WIDE)
    tl.store(logs + row, own - largest - total)
    tl.store(kept + row, largest)
    tl.store(kept + rows + row, total)


@jit
def _gradient_kernel(  # type: ignore[no-untyped-def]
    logits,  # [rows, DIM]
    labels,  # [rows]
    kept,  # [2, rows]
    factor,  # [rows]
    at_label,  # [rows]
    rows,
    DIM: tl.constexpr,
    BLOCK_W: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One program for BLOCK_W words of a row."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    start, mask = logits + row * DIM, col < DIM
    x = tl.load(start + col, mask=mask, other=0.0).to(WIDE)
    share = tl.exp(x - tl.load(kept + row) - tl.load(kept + rows + row))
    less = tl.where(col == tl.load(labels + row), tl.load(at_label + row), 0.0)
    tl.store(start + col, share * tl.load(factor + row) - less, mask=mask)


# ---------------------------------------------------------------------------------------------------------------------


def swiglu(x: Tensor) -> Tensor:
    """See :func:`peer_dist.kernels.dense.swiglu`."""
    out = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    _swiglu(x, None, out)
    return out


def swiglu_backward(dy: Tensor, x: Tensor) -> Tensor:
    """The gradient of ``x``."""
    dx = torch.empty_like(x)
    _swiglu(x, dy, dx)
    return dx


def _swiglu(x: Tensor, dy: Tensor | None, out: Tensor) -> None:
    dim = x.shape[-1] // 2
    block = min(TILE, triton.next_power_of_2(dim))
    launching.launch(
        _swiglu_kernel,
        (x.shape[:-1].numel(), triton.cdiv(dim, block)),
        x,
        dy,
        out,
        DIM=dim,
        BLOCK_D=block,
        WIDE=accumulator(x.dtype),
        num_warps=max(1, block // 256),
    )


def split_heads(mixed: Tensor, angles: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`peer_dist.kernels.dense.split_heads`.

    A sequence's tokens lie one after the other in memory, as attention's kernels want them.
    """
    length, batch, width = mixed.shape
    channels = angles.shape[-1]
    heads = width // channels - 2 * groups
    query, key, value = (mixed.new_empty(batch, length, n, channels) for n in (heads, groups, groups))
    _heads(mixed, query, key, value, angles, join=False)
    return query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)


def join_heads(dquery: Tensor, dkey: Tensor, dvalue: Tensor, angles: Tensor) -> Tensor:
    """The gradient of :func:`split_heads`'s ``mixed``."""
    length, batch, groups, channels = dkey.shape
    heads = dquery.shape[2] + 2 * groups
    dmixed = dquery.new_empty(length, batch, heads * channels)
    dquery, dkey, dvalue = (gradient.transpose(0, 1).contiguous() for gradient in (dquery, dkey, dvalue))
    _heads(dmixed, dquery, dkey, dvalue, angles, join=True)
    return dmixed


def _heads(mixed: Tensor, query: Tensor, key: Tensor, value: Tensor, angles: Tensor, join: bool) -> None:
    batch, length, groups, channels = key.shape
    half, each = channels // 2, query.shape[2] // groups
    block_c = triton.next_power_of_2(half)
    rows = groups * (each + 2)
    block_r = min(max(1, TILE // block_c), triton.next_power_of_2(rows))
    wide = torch.promote_types(mixed.dtype, torch.float32)
    first = angles[:, :half].to(wide)
    launching.launch(
        _heads_kernel,
        (length * batch, triton.cdiv(rows, block_r)),
        mixed,
        query,
        key,
        value,
        first.cos(),
        first.sin(),
        length,
        batch,
        groups,
        EACH=each,
        HALF=half,
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        JOIN=join,
        WIDE=accumulator(mixed.dtype),
        num_warps=max(1, block_r * block_c // 256),
    )


def label_logs(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`peer_dist.kernels.dense.label_logs`."""
    rows, words = logits.shape
    kept = logits.new_empty(2, rows, dtype=torch.promote_types(logits.dtype, torch.float32))
    logs = torch.empty_like(kept[0])
    block = min(WORDS, triton.next_power_of_2(words))
    launching.launch(
        _label_logs_kernel,
        (rows,),
        logits,
        labels.contiguous(),
        logs,
        kept,
        rows,
        DIM=words,
        BLOCK_W=block,
        WIDE=accumulator(logits.dtype),
        num_warps=max(1, block // 512),
    )
    return logs[:, None], kept


def logits_to_gradient(logits: Tensor, labels: Tensor, kept: Tensor, factor: Tensor, at_label: Tensor) -> None:
    """See :func:`peer_dist.kernels.dense.logits_to_gradient`."""
    rows, words = logits.shape
    block = min(WORDS, triton.next_power_of_2(words))
    launching.launch(
        _gradient_kernel,
        (rows, triton.cdiv(words, block)),
        logits,
        labels.contiguous(),
        kept,
        factor.contiguous(),
        at_label.contiguous(),
        rows,
        DIM=words,
        BLOCK_W=block,
        WIDE=accumulator(logits.dtype),
        num_warps=max(1, block // 512),
    )
    torch.autograd.graph.increment_version(logits)  # Triton writes where autograd does not see it
