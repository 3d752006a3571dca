"""The step of a table's optimizer on GPUs: the definition, and the bytes it moves, are in
:mod:`peer_dist.kernels.updates`.

A program owns some whole rows, so that a row's mean comes from the registers that its gradient is in anyway. Rows wider
than :data:`MAX_BLOCK_D` are taken in pieces, and their gradients read again for it, out of the caches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from peer_dist.kernels.rounding import Rounding
from peer_dist.kernels.triton import launching
from peer_dist.kernels.triton.experts import RunSums, numbers, scaled, sum_run
from peer_dist.kernels.triton.launching import jit, tl, triton

TILE = 1024
"""Elements of a program of few columns, 8 a thread: with 40 registers or so, 1024 threads or more of a multiprocessor
have 16 to 28 bytes an element in flight, over 100 KB; 3.35 TB/s over 132 multiprocessors at 1 us need 25."""

MAX_BLOCK_D = 4096
"""Columns that one program holds: 8 a thread, 16 warps."""

# ---------------------------------------------------------------------------------------------------------------------
# Kernels. Pointers are to contiguous tensors. They are compiled without fused multiply-adds, and divide and take roots
# rounded to the nearest, for the bits of the definition.


@jit
def _tile(source, row, cols, live, DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows and columns of a table, in float32; zeros outside."""
    mask = live[:, None] & (cols < DIM)[None, :]
    return tl.load(source + row[:, None] * DIM + cols[None, :], mask=mask, other=0.0).to(tl.float32)


@jit
def _draws(key, row, column):  # type: ignore[no-untyped-def]
    """16 random bits for each place, as in :mod:`peer_dist.kernels.rounding`; rows and columns are broadcast."""
    word = ((row.to(tl.uint64) << 32) + (column // 4).to(tl.uint64)) * 0x9E3779B97F4A7C15
    word += key.to(tl.uint64)
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB
    word = word ^ (word >> 31)
    return (word >> (16 * (column % 4)).to(tl.uint64)).to(tl.uint32) & 0xFFFF


@jit
def _bfloat16(value, draws):  # type: ignore[no-untyped-def]
    """The bfloat16 that is the upper half of a float32, ``draws`` added to the lower one, which may carry; None: to the
    nearest, ties to even.
    """
    bits = value.to(tl.uint32, bitcast=True)
    added = 0x7FFF + ((bits >> 16) & 1) if draws is None else draws
    upper = tl.where(value == value, (bits + added) >> 16, 0x7FC0)
    return upper.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@jit
def _change(square, unbiased, eps, rate):  # type: ignore[no-untyped-def]
    """By what a moment is multiplied, for a second moment."""
    return tl.div_rn(rate + tl.zeros_like(square), tl.sqrt_rn(unbiased * square) + eps)


@jit
def _row_scales(most, E4M3: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scales of rows of eight bits by the bits of their largest magnitudes, and what their elements are multiplied by;
    NaN and 0 of rows that are not finite.

    The largest code is 448 = 1.75 * 2**8 or 127 = 1.984375 * 2**6: a fraction beyond these carries into the exponent.
    """
    if E4M3:
        exponent = ((most + (0x7FFFFF - 0x600000)) >> 23) - (127 + 8)
    else:
        exponent = ((most + (0x7FFFFF - 0x7E0000)) >> 23) - (127 + 6)
    exponent = tl.where(most == 0, -1, tl.maximum(exponent, -100))
    finite = most < 0x7F800000
    scale = tl.where(finite, (127 + exponent) << 23, 0x7FC00000).to(tl.float32, bitcast=True)
    return scale, tl.where(finite, (127 - exponent) << 23, 0).to(tl.float32, bitcast=True)


@jit
def _codes(value, inverse, draws, E4M3: tl.constexpr):  # type: ignore[no-untyped-def]
    """The codes of numbers, rounded at random, as in :func:`peer_dist.kernels.eight_bit.quantised`."""
    bits = value.to(tl.int32, bitcast=True)
    magnitude = tl.where(inverse == 0.0, 0.0, tl.abs(value) * inverse)
    share = draws.to(tl.float32) * 0.0000152587890625  # 2**-16
    if E4M3:  # steps of three bits after the leading one; below 2**-6 as many as there
        exponent = tl.maximum((magnitude.to(tl.int32, bitcast=True) >> 23) - 130, -9)
        places = tl.floor(magnitude * ((127 - exponent) << 23).to(tl.float32, bitcast=True) + share).to(tl.int32)
        # 8 places and more have an exponent of their own, 16 the next one
        return (((exponent + 9) << 3) + places + ((bits >> 24) & 0x80)).to(tl.uint8)
    else:
        places = tl.floor(magnitude + share).to(tl.int32)
        return tl.where(bits < 0, -places, places).to(tl.int8)


@jit
def _stepped(  # type: ignore[no-untyped-def]
    g,  # float32
    old,  # the weights, float32
    at,  # where these elements are
    mask,
    change,  # of a row; without meaning where there is exp_avg_sq
    exp_avg,
    exp_avg_sq,
    scale,
    decay,
    first,
    rest_first,
    second,
    rest_second,
    unbiased,
    eps,
    rate,
    KEEP: tl.constexpr,
):
    """The new weights of some elements, float32; with KEEP their moments are written."""
    g = scale * g
    moment = g
    if exp_avg is not None:
        moment = first * tl.load(exp_avg + at, mask=mask, other=0.0) + rest_first * g
        if KEEP:
            tl.store(exp_avg + at, moment, mask=mask)
    if exp_avg_sq is not None:
        square = second * tl.load(exp_avg_sq + at, mask=mask, other=0.0) + rest_second * g * g
        if KEEP:
            tl.store(exp_avg_sq + at, square, mask=mask)
        change = _change(square, unbiased, eps, rate)
    return decay * old - change * moment


@jit
def _step(  # type: ignore[no-untyped-def]
    g,  # float32
    row,  # of g's shape, or broadcast to it
    called,  # what the rows are called where they are rounded
    col,
    mask,
    change,
    weight,
    table,
    exp_avg,
    exp_avg_sq,
    scale,
    decay,
    first,
    rest_first,
    second,
    rest_second,
    unbiased,
    eps,
    rate,
    key,
    first_row,
    first_column,
    DIM: tl.constexpr,
    AT_RANDOM: tl.constexpr,
):
    """Step some elements of a table with their gradients; a kernel's own parameters are as in _update_kernel."""
    at = row * DIM + col
    old = tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)
    new = _stepped(
        g, old, at, mask, change, exp_avg, exp_avg_sq,
        scale, decay, first, rest_first, second, rest_second, unbiased, eps, rate, True,
    )  # fmt: skip
    if AT_RANDOM:
        draws = _draws(key, first_row + called, (first_column + col).to(tl.int32))
        tl.store(weight + at, _bfloat16(new, draws), mask=mask)
    else:
        tl.store(weight + at, new, mask=mask)
    if table is not None:
        low = _bfloat16(new, None) if table.dtype.element_ty == tl.bfloat16 else new.to(table.dtype.element_ty)
        tl.store(table + at, low, mask=mask)


@jit
def _change_of_rows(  # type: ignore[no-untyped-def]
    raw,  # [BLOCK_R, BLOCK_D]: the gradients, where a program holds all columns
    grad,
    place,
    row,
    live,
    squares,
    row_sq,
    scale,
    second,
    rest_second,
    unbiased,
    eps,
    rate,
    mean,
    DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """By what the moments of rows are multiplied, ``[BLOCK_R, 1]``; their own second moments are stepped."""
    if squares is not None:
        total = tl.load(squares + place, mask=live, other=0.0)
    elif BLOCK_D >= DIM:
        total = tl.sum(raw * raw, 1)
    else:
        sums = tl.full([BLOCK_R, BLOCK_D], 0.0, tl.float32)
        for begin in range(0, DIM, BLOCK_D):
            piece = _tile(grad, place, begin + tl.arange(0, BLOCK_D), live, DIM)
            sums += piece * piece
        total = tl.sum(sums, 1)
    average = tl.load(row_sq + row, mask=live, other=0.0)
    average = second * average + rest_second * (total * scale * mean)
    tl.store(row_sq + row, average, mask=live)
    return _change(average, unbiased, eps, rate)[:, None]


@jit
def _update_kernel(  # type: ignore[no-untyped-def]
    grad,  # [touched, DIM]
    rows,  # [touched], or None: all
    called,  # [touched]: what the rows are called where they are rounded, or None: what they are
    squares,  # [touched], or None: taken here
    weights,  # [rows, DIM]: float32, or bfloat16 to be rounded at random
    table,  # [rows, DIM]: gets the rounding of float32 weights; None without
    exp_avg,  # [rows, DIM], or None
    exp_avg_sq,  # [rows, DIM], or None
    row_sq,  # [rows], or None
    touched,
    scale,
    decay,
    first,
    rest_first,
    second,
    rest_second,
    unbiased,
    eps,
    rate,
    mean,
    key,  # of the random bits; where the table begins in the whole one
    first_row,
    first_column,
    DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    AT_RANDOM: tl.constexpr,
):
    """One program for BLOCK_R rows, in pieces of BLOCK_D columns."""
    place = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = place < touched
    row = place if rows is None else tl.load(rows + place, mask=live, other=0)
    name = row if called is None else tl.load(called + place, mask=live, other=0)
    cols = tl.arange(0, BLOCK_D)
    change = 0.0
    raw = _tile(grad, place, cols, live, DIM) if BLOCK_D >= DIM else None
    if row_sq is not None:
        change = _change_of_rows(
            raw, grad, place, row, live, squares, row_sq, scale, second, rest_second, unbiased, eps, rate, mean,
            DIM, BLOCK_R, BLOCK_D,
        )  # fmt: skip
    for begin in range(0, DIM, BLOCK_D):
        col = begin + cols
        mask = live[:, None] & (col < DIM)[None, :]
        g = raw if BLOCK_D >= DIM else _tile(grad, place, col, live, DIM)
        _step(
            g, row[:, None], name[:, None], col[None, :], mask, change, weights, table, exp_avg, exp_avg_sq,
            scale, decay, first, rest_first, second, rest_second, unbiased, eps, rate,
            key, first_row, first_column, DIM, AT_RANDOM,
        )  # fmt: skip


@jit
def _update_eight_bit_kernel(  # type: ignore[no-untyped-def]
    grad,  # as in _update_kernel
    rows,
    called,
    squares,
    codes,  # [rows, DIM]: int8, or uint8 with the bits of float8_e4m3fn
    scales,  # [rows]
    exp_avg,
    exp_avg_sq,
    row_sq,
    touched,
    scale,
    decay,
    first,
    rest_first,
    second,
    rest_second,
    unbiased,
    eps,
    rate,
    mean,
    key,
    first_row,
    first_column,
    DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program for BLOCK_R rows. Where they are wider than BLOCK_D, all is computed twice: for a row's scale its new
    weights are taken piece by piece, and once more, out of the caches, to be rounded under it.
    """
    E4M3: tl.constexpr = codes.dtype.element_ty == tl.uint8
    place = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = place < touched
    row = place if rows is None else tl.load(rows + place, mask=live, other=0)
    name = row if called is None else tl.load(called + place, mask=live, other=0)
    name = first_row + name[:, None]
    cols = tl.arange(0, BLOCK_D)
    start = row[:, None] * DIM
    unit = scaled(1.0, codes, scales, row, live, tl.float32)[:, None]
    change = 0.0
    raw = _tile(grad, place, cols, live, DIM) if BLOCK_D >= DIM else None
    if row_sq is not None:
        change = _change_of_rows(
            raw, grad, place, row, live, squares, row_sq, scale, second, rest_second, unbiased, eps, rate, mean,
            DIM, BLOCK_R, BLOCK_D,
        )  # fmt: skip
    if BLOCK_D >= DIM:
        at, mask = start + cols[None, :], live[:, None] & (cols < DIM)[None, :]
        old = numbers(tl.load(codes + at, mask=mask, other=0), tl.float32) * unit
        new = _stepped(
            raw, old, at, mask, change, exp_avg, exp_avg_sq,
            scale, decay, first, rest_first, second, rest_second, unbiased, eps, rate, True,
        )  # fmt: skip
        most = tl.max(tl.where(mask, new.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0), 1)
        new_scale, inverse = _row_scales(most, E4M3)
        draws = _draws(key, name, (first_column + cols[None, :]).to(tl.int32))
        tl.store(codes + at, _codes(new, inverse[:, None], draws, E4M3), mask=mask)
    else:
        largest = tl.full([BLOCK_R, BLOCK_D], 0, tl.int32)
        for begin in range(0, DIM, BLOCK_D):
            col = begin + cols
            at, mask = start + col[None, :], live[:, None] & (col < DIM)[None, :]
            old = numbers(tl.load(codes + at, mask=mask, other=0), tl.float32) * unit
            new = _stepped(
                _tile(grad, place, col, live, DIM), old, at, mask, change, exp_avg, exp_avg_sq,
                scale, decay, first, rest_first, second, rest_second, unbiased, eps, rate, False,
            )  # fmt: skip
            largest = tl.maximum(largest, tl.where(mask, new.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0))
        new_scale, inverse = _row_scales(tl.max(largest, 1), E4M3)
        for begin in range(0, DIM, BLOCK_D):
            col = begin + cols
            at, mask = start + col[None, :], live[:, None] & (col < DIM)[None, :]
            old = numbers(tl.load(codes + at, mask=mask, other=0), tl.float32) * unit
            new = _stepped(
                _tile(grad, place, col, live, DIM), old, at, mask, change, exp_avg, exp_avg_sq,
                scale, decay, first, rest_first, second, rest_second, unbiased, eps, rate, True,
            )  # fmt: skip
            draws = _draws(key, name, (first_column + col[None, :]).to(tl.int32))
            tl.store(codes + at, _codes(new, inverse[:, None], draws, E4M3), mask=mask)
    tl.store(scales + row, new_scale, mask=live)


@jit
def _squares_kernel(  # type: ignore[no-untyped-def]
    grad,  # [touched, DIM]
    out,  # [touched]
    touched,
    DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program for BLOCK_R rows, in pieces of BLOCK_D columns."""
    place = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = place < touched
    cols = tl.arange(0, BLOCK_D)
    sums = tl.full([BLOCK_R, BLOCK_D], 0.0, tl.float32)
    for begin in range(0, DIM, BLOCK_D):
        piece = _tile(grad, place, begin + cols, live, DIM)
        sums += piece * piece
    tl.store(out + place, tl.sum(sums, 1), mask=live)


@jit
def _run_squares_kernel(  # type: ignore[no-untyped-def]
    order,  # as in experts._runs_kernel, down to partial_up
    token,
    dpre,
    hidden,
    x,
    dy,
    bounds,
    partial_down,
    partial_up,
    down_squares,  # [slices, runs]
    up_squares,  # [slices, runs], or None
    runs,
    each,
    size,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """One program for ``each`` runs, one after the other, and a slice of the columns."""
    first = tl.program_id(0).to(tl.int64) * each
    part = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    for run in range(first, tl.minimum(first + each, runs)):
        start = tl.load(bounds + run).to(tl.int64)
        stop = tl.load(bounds + run + 1).to(tl.int64)
        down, up = sum_run(
            start, stop, order, token, dpre, hidden, x, dy, partial_down, partial_up, size, cols,
            DIM, BLOCK_D, BLOCK_K, ACC,
        )  # fmt: skip
        inside = cols < DIM  # beyond it a weight that is not finite makes NaN of zeros
        g = tl.where(inside, down.to(DTYPE).to(tl.float32), 0.0)
        tl.store(down_squares + part * runs + run, tl.sum(g * g, 0))
        if hidden is not None:
            g = tl.where(inside, up.to(DTYPE).to(tl.float32), 0.0)
            tl.store(up_squares + part * runs + run, tl.sum(g * g, 0))


@jit
def _update_runs_kernel(  # type: ignore[no-untyped-def]
    order,  # as in experts._runs_kernel, of one table
    token,
    dpre,
    x,
    bounds,
    partial_down,
    squares,  # [runs], from then on as in _update_kernel; runs are rows of the table
    weights,
    table,
    exp_avg,
    exp_avg_sq,
    row_sq,
    new_row_sq,  # [runs]: row_sq itself, where there is one slice of the columns
    runs,
    each,
    size,
    scale,
    decay,
    first,
    rest_first,
    second,
    rest_second,
    unbiased,
    eps,
    rate,
    mean,
    key,
    first_row,
    first_column,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
    AT_RANDOM: tl.constexpr,
):
    """One program for ``each`` runs, one after the other, and a slice of the columns."""
    begin = tl.program_id(0).to(tl.int64) * each
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    for run in range(begin, tl.minimum(begin + each, runs)):
        start = tl.load(bounds + run).to(tl.int64)
        stop = tl.load(bounds + run + 1).to(tl.int64)
        if stop > start:
            sums, _ = sum_run(
                start, stop, order, token, dpre, None, x, None, partial_down, None, size, cols,
                DIM, BLOCK_D, BLOCK_K, ACC,
            )  # fmt: skip
            g = sums.to(weights.dtype.element_ty if table is None else table.dtype.element_ty).to(tl.float32)
            change = 0.0
            if row_sq is not None:
                row = run + tl.arange(0, 1)
                average = second * tl.load(row_sq + row) + rest_second * (tl.load(squares + row) * scale * mean)
                if tl.program_id(1) == 0:
                    tl.store(new_row_sq + row, average)
                change = _change(average, unbiased, eps, rate)
            _step(
                g, run, run, cols, cols < DIM, change, weights, table, exp_avg, exp_avg_sq,
                scale, decay, first, rest_first, second, rest_second, unbiased, eps, rate,
                key, first_row, first_column, DIM, AT_RANDOM,
            )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------


def update_rows(
    step: Sequence[float],
    grad: Tensor,
    table: Tensor,
    moments: Mapping[str, Tensor],
    master: Tensor | None,
    rows: Tensor | None,
    squares: Tensor | None,
    rounding: Rounding | None,
    scales: Tensor | None = None,
    called: Tensor | None = None,
) -> None:
    """See :func:`peer_dist.kernels.updates.update_rows`. One launch; nothing is asked of the host."""
    blocks = _blocks(grad.shape[1])
    given = moments.get("exp_avg"), moments.get("exp_avg_sq"), moments.get("row_sq"), len(grad), *map(float, step)
    constants = {"DIM": grad.shape[1], "enable_fp_fusion": False, **blocks}
    grid = (triton.cdiv(len(grad), blocks["BLOCK_R"]),)
    kernel: Any = _update_kernel
    held: tuple[Tensor, Tensor | None] = (table, None) if master is None else (master, table)
    if scales is None:
        constants["AT_RANDOM"] = rounding is not None
    else:
        kernel, held = _update_eight_bit_kernel, (table, scales)
    launching.launch(kernel, grid, grad, rows, called, squares, *held, *given, *(rounding or (0, 0, 0)), **constants)


def run_squares(sums: RunSums, dtype: torch.dtype) -> list[Tensor]:
    """The sums of the squares of each row of the gradients that ``sums`` would be, written in ``dtype``.

    Returns:
        ``[rows]`` float32 of each table.
    """
    out: list[Tensor | None] = [
        None if x is None else torch.empty(sums.slices, sums.runs, dtype=torch.float32, device=x.device)
        for x in sums.xs
    ]
    operands = sums.picks.pick, sums.picks.token, *sums.weights, *sums.xs, sums.bounds, *sums.partial
    args = *operands, *out, sums.runs, sums.each, sums.size
    launching.launch(_run_squares_kernel, sums.grid, *args, DTYPE=launching.element(dtype), **sums.constants)
    return [squares[0] if sums.slices == 1 else squares.sum(0) for squares in out if squares is not None]


def update_runs(
    step: Sequence[float],
    sums: RunSums,
    which: int,
    squares: Tensor,
    table: Tensor,
    moments: Mapping[str, Tensor],
    master: Tensor | None,
    rounding: Rounding | None,
) -> None:
    """:func:`update_rows` of the rows with picks, by gradients that are nowhere in memory.

    Args:
        sums: of a whole table, or of two.
        which: of the two; 0 or 1.
        squares: ``[rows]``, from :func:`run_squares`.
    """
    row_sq = moments.get("row_sq")
    # another slice of the columns may read what one has written
    new_row_sq = row_sq if row_sq is None or sums.slices == 1 else row_sq.clone()
    launching.launch(
        _update_runs_kernel,
        sums.grid,
        sums.picks.pick,
        sums.picks.token,
        sums.weights[which],
        sums.xs[which],
        sums.bounds,
        sums.partial[which],
        None if row_sq is None else squares,
        table if master is None else master,
        None if master is None else table,
        moments.get("exp_avg"),
        moments.get("exp_avg_sq"),
        row_sq,
        new_row_sq,
        sums.runs,
        sums.each,
        sums.size,
        *map(float, step),
        *(rounding or (0, 0, 0)),
        AT_RANDOM=rounding is not None,
        **sums.constants,
    )
    if row_sq is not None and new_row_sq is not None and new_row_sq is not row_sq:
        row_sq.copy_(new_row_sq)


def row_squares(grad: Tensor) -> Tensor:
    """See :func:`peer_dist.kernels.updates.row_squares`."""
    out = torch.empty(len(grad), dtype=torch.float32, device=grad.device)
    blocks = _blocks(grad.shape[1])
    grid = (triton.cdiv(len(grad), blocks["BLOCK_R"]),)
    launching.launch(_squares_kernel, grid, grad, out, len(grad), DIM=grad.shape[1], **blocks)
    return out


def _blocks(dim: int) -> dict[str, int]:
    """Rows and columns of a program's tile, and its warps."""
    block_d = min(triton.next_power_of_2(dim), MAX_BLOCK_D)
    block_r = max(1, TILE // block_d)
    warps = min(16, max(1, block_r * block_d // 256))
    return {"BLOCK_R": block_r, "BLOCK_D": block_d, "num_warps": warps}
