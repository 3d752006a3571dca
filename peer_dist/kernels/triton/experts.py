"""The expert products on GPUs, in Triton: every table row is read where it lies, sums are float32, nothing is atomic.

Bytes through device memory against the least possible, for ``T`` tokens, ``P`` picks, ``N`` rows, ``d`` columns of
``b`` bytes and ``r = P / N`` picks a row; ``n`` of the rows are touched (``n <= min(P, N)``):

=====================  =====================================================  ==================================
function               moves                                                  floor
=====================  =====================================================  ==================================
``forward``            ``2 P d b + 2 T d b + P (8 id + gate + 4 pre)``        ``2 n d b + 2 T d b``: the same for
                                                                              r << 1, ``1 / r`` of it for r > 1
``forward``, by        ``2 n d b + 2 T d b + P (4 order + 4 token + 4 id + 4  as above; but ``2 P d b`` still pass
expert                 pre + 12 activation) + slices P 12`` (+ one sort)      through L2, which binds
``backward``           as ``forward``, ``+ P (8 + gate)``                     as ``forward``
``table_grads``        ``2 n d b_grad + 2 T d b + P (4 order + 4 token + 8    ``2 n d b_grad + 2 T d b``
                       weights) + N 4``; dense and new: N for the first n
=====================  =====================================================  ==================================

At T = 8192, 128 picks, N = 1024^2, d = 1024, bf16 (r = 1, n = 0.63 N), GB: forward 4.34, backward 4.35 and table
gradients 2.8 sparse or 4.4 dense (5.5 and 8.7 with float32 values): all of the backward is 1.65 or 2.0 (2.3 and 3.0)
forwards, besides the sort. Numbers and gates of the picks are below 1% of either.

**Token-major or by expert.** Token-major, a program owns a token and reads the picked rows of both tables once: per
pick ``2 d b`` = 4096 bytes at the sizes above, whatever r is, as long as the tables are much larger than L2. Where
rows repeat, the other order turns these reads into L2 hits. The dots go through the picks sorted by expert, so that a
row comes from memory once and the tokens' x from L2; the mix stays token-major (each y has one writer, hence no
atomics) but goes through the columns slice by slice, narrow enough for the whole slice of the table to stay in L2.
Bytes per pick at d = 1024, bf16, T = 8192, on an H100 (the sort, about 150, is shared with the table gradients and left
out)::

    picks a row   token-major   rows     x, y   numbers   slices of the mix   by expert, sum
    1             4142          4096     32     28        64 x 12 (no: 32-byte slices)
    2             4142          2048     32     28        32 x 12             2492
    4             4142          1024     32     28        16 x 12             1276
    8             4142          512      32     28        8 x 12              668
    32            4142          128      32     28        2 x 12              212

At 4 picks a row it moves about a third, and L2 (some twice as fast as memory) is what binds: 4096 bytes a pick pass
through it either way, so that more picks a row cannot gain much. Hence :data:`EXPERT_MAJOR`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from peer_dist.kernels.eight_bit import EightBit
from peer_dist.kernels.picks import ByExpert, Picks
from peer_dist.kernels.reference import ACTIVATIONS, gated, wide
from peer_dist.kernels.triton import launching
from peer_dist.kernels.triton.launching import accumulator, jit, tl, triton

EXPERT_MAJOR = 4.0
"""Picks per row of the table from which picks are taken by expert instead of by token (bytes counted above)."""

L2_SHARE = 0.7
"""Of a GPU's L2 (40 MB on an A100, 50 on an H100), what may be expected to stay there while results are written past
it: on an H100 all of x and dy of 8192 tokens of 1024 in 16 bits, 33.6 MB."""

NARROWEST = 64
"""Bytes of the narrowest column slice worth gathering: two sectors."""

MAX_BLOCK_D = 4096
"""Columns that one program holds: 16 a thread, 8 warps. Wider rows are taken in pieces by the separate halves."""

TILE_BYTES = 128
"""Bytes of table rows that a thread has in flight: 4 KB a warp. The 16 warps or more that fit a multiprocessor at up to
128 registers have 64 KB in flight; 3.35 TB/s over 132 multiprocessors at 1 us need 25."""

GRAD_TILE_BYTES = 32
"""The same for the table gradients, whose programs often meet a single pick and whose reads hit L2. They hold 8 columns
a thread of two sums; 16 made ptxas spill a few bytes at some dims on sm_80."""

MAX_GRAD_BLOCK_D = 2048
"""Columns of a program of the table gradients, where no sum runs over columns: 8 warps."""

PIECE = 256
"""Picks of a piece. A run, the picks of one expert, that fills whole pieces is summed piece by piece, so that no
program sums more than two of them (it takes some 0.3 us for each pick)."""

MAX_PIECES = 4096
"""About the most pieces there are (pieces grow with the picks), which bounds the memory of their partial sums."""

RUNS = 8
"""The most runs that one program takes, one after the other: their bounds, and their tokens where they have a pick
each, are one sector of 32 bytes, which the first of them waits for."""

# ---------------------------------------------------------------------------------------------------------------------
# Kernels. Pointers are to contiguous tensors. Numbers of rows, tokens and picks, however read, are int64 in them:
# tables pass 2^31 elements.


@jit
def _activation(a, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    if KIND == "gelu":
        return 0.5 * a * (1.0 + tl.erf(a * 0.7071067811865476))
    elif KIND == "silu":
        return a / (1.0 + tl.exp(-a))
    else:
        return tl.where(a <= 0.0, 0.0, a)  # lets NaN through


@jit
def _activation_slope(a, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    if KIND == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * a * a)
        return 0.5 * (1.0 + tl.erf(a * 0.7071067811865476)) + a * density
    elif KIND == "silu":
        sigmoid = 1.0 / (1.0 + tl.exp(-a))
        return sigmoid * (1.0 + a * (1.0 - sigmoid))
    else:
        return tl.where(a <= 0.0, 0.0, 1.0)


@jit
def numbers(codes, ACC: tl.constexpr):  # type: ignore[no-untyped-def]
    """A table's elements as they are summed, in ACC: as they are, or of eight bits without their row's scale.

    float8_e4m3fn has the sign, exponent and fraction of float16 with fewer bits, so that its bits in these places are
    2**-8 of it, numbers below 2**-6 included, on GPUs that do not know the format too; :func:`scaled` makes up for it.
    """
    if codes.dtype == tl.uint8:
        bits = ((codes.to(tl.uint16) << 8).to(tl.int16, bitcast=True) >> 1) & -0x4001
        return bits.to(tl.int16).to(tl.float16, bitcast=True).to(ACC)
    else:
        return codes.to(ACC)


@jit
def scaled(value, table, scales, row, live, ACC: tl.constexpr):  # type: ignore[no-untyped-def]
    """A number for each row, times what :func:`numbers` of the rows are still to be multiplied by."""
    if table.dtype.element_ty == tl.uint8:
        value *= 256.0
    return value * tl.load(scales + row, mask=live, other=0.0).to(ACC)


@jit
def _token_kernel(  # type: ignore[no-untyped-def]
    x,  # [tokens, DIM]: x, or dy backward
    offsets,  # [tokens + 1]
    expert,  # [picks]
    gate,  # [picks]
    first_table,  # [rows, DIM]: down, or up backward
    second_table,  # [rows, DIM]: up, or down backward
    first_scales,  # [rows], or None: the tables do not have eight bits
    second_scales,  # [rows], or None
    pre,  # [picks]: written, or read backward
    out,  # [tokens, DIM]: y, or dx backward
    dgate,  # [picks], backward only, like those below
    dpre,
    hidden,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    KIND: tl.constexpr,
    BACKWARD: tl.constexpr,
    ACC: tl.constexpr,
):
    """One program a token: ``out = sum_i f(x . first_i) second_i`` over tiles of BLOCK_K picks, both rows read once."""
    token = tl.program_id(0).to(tl.int64)
    start = tl.load(offsets + token)
    stop = tl.load(offsets + token + 1)
    cols = tl.arange(0, BLOCK_D)
    inside = cols < DIM
    x_row = tl.load(x + token * DIM + cols, mask=inside, other=0.0).to(ACC)
    acc = tl.full([BLOCK_D], 0.0, ACC)
    for tile in range(start, stop, BLOCK_K):
        pick = tile + tl.arange(0, BLOCK_K)
        live = pick < stop
        row = tl.load(expert + pick, mask=live, other=0)
        at = row[:, None] * DIM + cols[None, :]
        mask = live[:, None] & inside[None, :]
        first = tl.load(first_table + at, mask=mask, other=0.0)
        second = tl.load(second_table + at, mask=mask, other=0.0)  # in flight with the first: needed only below
        g = tl.load(gate + pick, mask=live, other=0.0).to(ACC)
        dot = tl.sum(numbers(first, ACC) * x_row[None, :], 1)
        if first_scales is not None:
            dot = scaled(dot, first_table, first_scales, row, live, ACC)
        if BACKWARD:
            a = tl.load(pre + pick, mask=live, other=0.0)
            act = _activation(a, KIND)
            factor = dot * g * _activation_slope(a, KIND)
            tl.store(dgate + pick, dot * act, mask=live)
            tl.store(dpre + pick, factor, mask=live)
            tl.store(hidden + pick, act * g, mask=live)
        else:
            tl.store(pre + pick, dot, mask=live)
            factor = _activation(dot, KIND) * g
        if second_scales is not None:
            factor = scaled(factor, second_table, second_scales, row, live, ACC)
        acc += tl.sum(numbers(second, ACC) * factor[:, None], 0)
    tl.store(out + token * DIM + cols, acc, mask=inside)


@jit
def _dots_kernel(  # type: ignore[no-untyped-def]
    x,  # [tokens, DIM]
    table,  # [rows, DIM]
    scales,  # [rows], or None: the table does not have eight bits
    token,  # [picks]: in the order that they are taken in, as is expert
    expert,  # [picks]
    order,  # [picks]: which pick is taken where, or None: in their own order
    out,  # [slices, picks]
    picks,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,  # columns of a slice
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
):
    """One program for BLOCK_K picks and a slice of the columns; neighbours share x (or, by expert, the table's row)."""
    place = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    live = place < picks
    row = tl.load(expert + place, mask=live, other=0).to(tl.int64)
    source = tl.load(token + place, mask=live, other=0).to(tl.int64)
    there = live & (row >= 0)  # else it is no pick, and has no token
    part = tl.program_id(1)
    dot = tl.full([BLOCK_K], 0.0, ACC)
    for begin in range(0, WIDTH, BLOCK_D):
        col = begin + tl.arange(0, BLOCK_D)
        cols = part * WIDTH + col
        mask = there[:, None] & ((col < WIDTH) & (cols < DIM))[None, :]
        rows = tl.load(table + row[:, None] * DIM + cols[None, :], mask=mask, other=0.0)
        values = tl.load(x + source[:, None] * DIM + cols[None, :], mask=mask, other=0.0)
        dot += tl.sum(numbers(rows, ACC) * values.to(ACC), 1)
    if scales is not None:
        dot = scaled(dot, table, scales, row, there, ACC)
    pick = place if order is None else tl.load(order + place, mask=live, other=0)
    tl.store(out + part.to(tl.int64) * picks + pick, dot, mask=live)


@jit
def _mix_kernel(  # type: ignore[no-untyped-def]
    weight,  # [picks]
    table,  # [rows, DIM]
    scales,  # [rows], or None: the table does not have eight bits
    offsets,  # [tokens + 1]
    expert,  # [picks]
    out,  # [tokens, DIM]
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
):
    """One program for a token and a slice of the columns. Programs of one slice run together: their rows meet in L2."""
    token = tl.program_id(0).to(tl.int64)
    start = tl.load(offsets + token)
    stop = tl.load(offsets + token + 1)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = cols < DIM
    acc = tl.full([BLOCK_D], 0.0, ACC)
    for tile in range(start, stop, BLOCK_K):
        pick = tile + tl.arange(0, BLOCK_K)
        live = pick < stop
        row = tl.load(expert + pick, mask=live, other=0)
        mask = live[:, None] & inside[None, :]
        rows = tl.load(table + row[:, None] * DIM + cols[None, :], mask=mask, other=0.0)
        w = tl.load(weight + pick, mask=live, other=0.0).to(ACC)
        if scales is not None:
            w = scaled(w, table, scales, row, live, ACC)
        acc += tl.sum(numbers(rows, ACC) * w[:, None], 0)
    tl.store(out + token * DIM + cols, acc, mask=inside, eviction_policy="evict_first")


@jit
def _sum_places(  # type: ignore[no-untyped-def]
    start,
    stop,
    order,
    token,
    dpre,
    hidden,
    x,
    dy,
    cols,
    hole,
    skipped,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
):
    """``sum dpre_i x_i, sum hidden_i dy_i`` over the picks at places from ``start`` to ``stop``, without the
    ``skipped`` ones from ``hole`` on; the first sum alone without ``hidden``.
    """
    inside = cols < DIM
    down = tl.full([BLOCK_D], 0.0, ACC)
    up = tl.full([BLOCK_D], 0.0, ACC)
    for tile in range(start, stop - skipped, BLOCK_K):
        place = tile + tl.arange(0, BLOCK_K)
        place = tl.where(place < hole, place, place + skipped)
        live = place < stop
        source = tl.load(token + place, mask=live, other=0).to(tl.int64)
        pick = tl.load(order + place, mask=live, other=0)
        at = source[:, None] * DIM + cols[None, :]
        mask = live[:, None] & inside[None, :]
        x_rows = tl.load(x + at, mask=mask, other=0.0)
        to_down = tl.load(dpre + pick, mask=live, other=0.0).to(ACC)
        if hidden is not None:
            to_up = tl.load(hidden + pick, mask=live, other=0.0).to(ACC)
            dy_rows = tl.load(dy + at, mask=mask, other=0.0)
            up += tl.sum(dy_rows.to(ACC) * to_up[:, None], 0)
        down += tl.sum(x_rows.to(ACC) * to_down[:, None], 0)
    return down, up


@jit
def sum_run(  # type: ignore[no-untyped-def]
    start,  # of the run
    stop,
    order,
    token,
    dpre,
    hidden,
    x,
    dy,
    partial_down,  # [pieces, DIM]: from _pieces_kernel, or None: there are too few picks for a piece
    partial_up,
    size,
    cols,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
):
    """The sums of a run, ``[BLOCK_D]`` each: of the picks in no whole piece of it, and then of its pieces in order."""
    if partial_down is None:
        down, up = _sum_places(
            start, stop, order, token, dpre, hidden, x, dy, cols, stop, 0, DIM, BLOCK_D, BLOCK_K, ACC
        )
    else:
        piece = (start + size - 1) // size
        last = tl.maximum(stop // size, piece)
        hole = piece * size
        skipped = (last - piece) * size
        down, up = _sum_places(
            start, stop, order, token, dpre, hidden, x, dy, cols, hole, skipped, DIM, BLOCK_D, BLOCK_K, ACC
        )
        for each in range(piece, last):
            at = each * DIM + cols
            down += tl.load(partial_down + at, mask=cols < DIM, other=0.0)
            if hidden is not None:
                up += tl.load(partial_up + at, mask=cols < DIM, other=0.0)
    return down, up


@jit
def _pieces_kernel(  # type: ignore[no-untyped-def]
    order,  # [picks]: the pick at each place of the order by expert
    token,  # [picks]: its token
    expert,  # [picks]: its expert
    dpre,  # [picks]
    hidden,  # [picks], or None: there is one table only, and neither dy nor dup
    x,  # [tokens, DIM]
    dy,  # [tokens, DIM]
    partial_down,  # [pieces, DIM]
    partial_up,  # [pieces, DIM]
    size,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
):
    """One program for ``size`` places, if their picks are all of one expert, and a slice of the columns."""
    piece = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    start = piece * size
    stop = start + size
    first = tl.load(expert + start)
    if (first == tl.load(expert + stop - 1)) & (first >= 0):
        down, up = _sum_places(
            start, stop, order, token, dpre, hidden, x, dy, cols, stop, 0, DIM, BLOCK_D, BLOCK_K, ACC
        )
        at = piece * DIM + cols
        tl.store(partial_down + at, down, mask=cols < DIM)
        if hidden is not None:
            tl.store(partial_up + at, up, mask=cols < DIM)


@jit
def _runs_kernel(  # type: ignore[no-untyped-def]
    order,
    token,
    dpre,
    hidden,
    x,
    dy,
    bounds,  # [runs + 1]: the places where the runs begin
    partial_down,
    partial_up,
    ddown,  # [runs, DIM]
    dup,  # [runs, DIM]
    runs,
    each,  # runs of a program
    size,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ADD: tl.constexpr,
    ACC: tl.constexpr,
):
    """One program for ``each`` runs, one after the other, and a slice of the columns: the only writer of those."""
    first = tl.program_id(0).to(tl.int64) * each
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = cols < DIM
    for run in range(first, tl.minimum(first + each, runs)):
        start = tl.load(bounds + run).to(tl.int64)
        stop = tl.load(bounds + run + 1).to(tl.int64)
        if stop > start or not ADD:  # an untouched row of a new gradient is still to be zeroed
            down, up = sum_run(
                start, stop, order, token, dpre, hidden, x, dy, partial_down, partial_up, size, cols,
                DIM, BLOCK_D, BLOCK_K, ACC,
            )  # fmt: skip
            at = run * DIM + cols
            if ADD:
                down += tl.load(ddown + at, mask=inside, other=0.0).to(ACC)
                if hidden is not None:
                    up += tl.load(dup + at, mask=inside, other=0.0).to(ACC)
            tl.store(ddown + at, down, mask=inside, eviction_policy="evict_first")
            if hidden is not None:
                tl.store(dup + at, up, mask=inside, eviction_policy="evict_first")


# ---------------------------------------------------------------------------------------------------------------------
# Launches.


def _rows(x: Tensor) -> Tensor:
    """``x`` contiguous and from a multiple of 16 bytes on, as new memory is.

    A part of the tokens begins elsewhere where a row is no such multiple: a kernel would be compiled once more for it.
    """
    x = x.contiguous()
    return x if x.storage_offset() * x.element_size() % 16 == 0 else x.clone()


def _tile(width: int, itemsize: int, tile_bytes: int = TILE_BYTES, columns: int = 16) -> dict[str, int]:
    """Block sizes and warps for rows of ``width`` columns: at most ``columns`` of them a thread, 16-byte loads."""
    block_d = min(MAX_BLOCK_D, max(16, triton.next_power_of_2(width)))
    num_warps = min(8, max(1, block_d // (32 * columns)))
    # of eight bits no more elements than of sixteen: their float32 numbers would take too many registers
    block_k = num_warps * 32 * tile_bytes // (block_d * max(2, itemsize))
    return {"BLOCK_D": block_d, "BLOCK_K": min(32, max(1, block_k)), "num_warps": num_warps}


def _l2_bytes(device: torch.device) -> int:
    """What may be expected to stay in a device's L2; an H100's where there is none."""
    size = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 50 << 20
    return int(L2_SHARE * size)


def _resident(x: Tensor, rows: int) -> int:
    """Columns of a slice of ``rows`` rows like ``x``'s that stays in L2: all if they do, 0 if none wide enough does."""
    dim, itemsize = x.shape[1], x.element_size()
    width = _l2_bytes(x.device) // (max(1, rows) * itemsize)
    if width >= dim:
        return dim
    return 0 if width * itemsize < NARROWEST else 1 << (width.bit_length() - 1)


def _repeats(table: Tensor, picks: Picks) -> bool:
    """Whether picks of one row are worth meeting: there are many a row, and the table does not stay in L2 anyway."""
    rows, dim = table.shape
    return picks.expert.numel() >= EXPERT_MAJOR * rows and _resident(table, rows) < dim


def _parts(table: Tensor | EightBit) -> tuple[Tensor, Tensor | None]:
    """What is read of a table: its elements ``[rows, dim]``, and the scales ``[rows]`` of one of eight bits."""
    return (table.codes, table.scales) if isinstance(table, EightBit) else (table, None)


def dots(x: Tensor, table: Tensor | EightBit, picks: Picks) -> Tensor:
    """``x_t . table_e`` of each pick: ``[tokens, dim], [rows, dim] -> [picks]`` in float32 (float64 for float64).

    Raises:
        ValueError: ``table`` is not contiguous.
    """
    count, dtype = picks.expert.numel(), wide(x, table)
    table, scales = _parts(table)
    dim = table.shape[1]
    if _repeats(table, picks) and (width := _resident(x, picks.tokens)):
        ordered = picks.by_expert
        token, expert, order = ordered.token, ordered.expert, ordered.pick
    else:
        token, expert, order, width = picks.token, picks.expert, None, dim
    tile = _tile(width, max(x.element_size(), table.element_size()))
    slices = triton.cdiv(dim, width)
    out = torch.empty(slices, count, dtype=dtype, device=x.device)
    grid = (triton.cdiv(count, tile["BLOCK_K"]), slices)
    args = _rows(x), table, scales, token, expert, order, out, count
    launching.launch(_dots_kernel, grid, *args, DIM=dim, WIDTH=width, ACC=accumulator(dtype), **tile)
    return out[0] if slices == 1 else out.sum(0)


def mix(weight: Tensor, table: Tensor | EightBit, picks: Picks, *, dtype: torch.dtype | None = None) -> Tensor:
    """``sum_i w_i table_{e_i}`` of each token: ``[picks], [rows, dim] -> [tokens, dim]``.

    Sums are float32 (float64 for float64), and so is the result unless ``dtype`` says otherwise.

    Raises:
        ValueError: ``table`` is not contiguous.
    """
    sums = wide(weight, table)
    table, scales = _parts(table)
    dim = table.shape[1]
    out = torch.empty(picks.tokens, dim, dtype=dtype or sums, device=table.device)
    width = _resident(table, table.shape[0]) if _repeats(table, picks) else dim
    tile = _tile(width or dim, table.element_size())
    grid = (picks.tokens, triton.cdiv(dim, tile["BLOCK_D"]))
    args = weight.contiguous(), table, scales, picks.offsets, picks.expert, out
    launching.launch(_mix_kernel, grid, *args, DIM=dim, ACC=accumulator(sums), **tile)
    return out


def _fused(x: Tensor, table: Tensor | EightBit, picks: Picks, activation: str) -> bool:
    """Whether the token-major kernel serves; else the halves do, one after the other."""
    table, _ = _parts(table)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, not {activation!r}")
    expert_major = _repeats(table, picks) and _resident(x, picks.tokens) and _resident(table, table.shape[0])
    return x.shape[1] <= MAX_BLOCK_D and not expert_major


def forward(
    x: Tensor, picks: Picks, gate: Tensor, down: Tensor | EightBit, up: Tensor | EightBit, activation: str
) -> tuple[Tensor, Tensor]:
    """``y_t = sum_i gate_i * act(x_t . down_{e_i}) * up_{e_i}`` over the picks of each token.

    Args:
        x: ``[tokens, dim]``.
        picks: the rows that each token reads.
        gate: ``[picks]``.
        down, up: ``[rows, dim]``, of one dtype.
        activation: "gelu" (exact), "relu" or "silu".

    Returns:
        y ``[tokens, dim]`` in ``x``'s dtype, and for :func:`backward` pre ``[picks]`` (the dots with ``down``)
        in float32 (float64 where an input is).

    Raises:
        ValueError: an unknown activation, or a table that is not contiguous.
    """
    if not _fused(x, down, picks, activation):
        pre = dots(x, down, picks)
        return mix(ACTIVATIONS[activation](pre) * gate.to(pre.dtype), up, picks, dtype=x.dtype), pre
    dtype = wide(x, down, up, gate)
    pre = torch.empty(picks.expert.numel(), dtype=dtype, device=x.device)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    (down, down_scales), (up, up_scales) = _parts(down), _parts(up)
    tables = down, up, down_scales, up_scales
    args = _rows(x), picks.offsets, picks.expert, gate.contiguous(), *tables, pre, y, None, None, None
    constants = {"DIM": x.shape[1], "KIND": activation, "BACKWARD": False, "ACC": accumulator(dtype)}
    launching.launch(_token_kernel, (picks.tokens,), *args, **constants, **_tile(x.shape[1], down.element_size()))
    return y, pre


def backward(
    dy: Tensor,
    x: Tensor,
    picks: Picks,
    pre: Tensor,
    gate: Tensor,
    down: Tensor | EightBit,
    up: Tensor | EightBit,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of :func:`forward` but those of the tables, for which it returns what :func:`table_grads` needs.

    Args:
        dy: ``[tokens, dim]``.
        x, picks, gate, down, up, activation: as given to :func:`forward`.
        pre: ``[picks]``, from :func:`forward`.

    Returns:
        dx ``[tokens, dim]`` in ``x``'s dtype, dgate ``[picks]`` in ``gate``'s, and in ``pre``'s dtype dpre
        ``[picks]`` and hidden ``[picks]``, the activations times the gates.

    Raises:
        ValueError: an unknown activation, or a table that is not contiguous.
    """
    if not _fused(x, down, picks, activation):
        dgate, dpre, hidden = gated(pre, gate, dots(dy, up, picks), activation)
        return mix(dpre, down, picks, dtype=x.dtype), dgate.to(gate.dtype), dpre, hidden
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dpre, hidden = torch.empty_like(pre), torch.empty_like(pre)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    (down, down_scales), (up, up_scales) = _parts(down), _parts(up)
    tables = up, down, up_scales, down_scales
    args = _rows(dy), picks.offsets, picks.expert, gate.contiguous(), *tables, pre, dx, dgate, dpre, hidden
    constants = {"DIM": x.shape[1], "KIND": activation, "BACKWARD": True, "ACC": accumulator(pre.dtype)}
    launching.launch(_token_kernel, (picks.tokens,), *args, **constants, **_tile(x.shape[1], down.element_size()))
    return dx, dgate, dpre, hidden


def table_grads(
    sums: Sequence[tuple[Tensor, Tensor]],
    picks: Picks,
    rows: int,
    *,
    out: Sequence[Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """``sum w_i x_t`` over the picks of each row, dense, for one or two pairs of ``w`` and ``x``.

    Each row is written once, by one program, in a fixed order of the sum: two runs give the same bits. Needs no
    synchronisation with the host.

    Args:
        sums: of each table the weights ``[picks]``, say dpre or hidden from :func:`backward`, and ``[tokens, dim]``.
        picks: the rows that each token read.
        rows: how many rows the tables have.
        out: ``[rows, dim]`` for each, of one dtype, to be added to in place: rows that no token read are neither read
            nor written.
        dtype: of new gradients; float32 (float64 for float64) by default.

    Returns:
        ``[rows, dim]`` for each: ``out``, or new tensors.

    Raises:
        ValueError: ``out`` is not contiguous or not of this shape.
    """
    bounds, shape = _bounds(picks, rows), (rows, sums[0][1].shape[1])
    grads = _new_grads(sums, rows, dtype) if out is None else list(out)
    if any(grad.shape != shape for grad in grads):
        raise ValueError(f"out must be {list(shape)}, not {' and '.join(str(tuple(grad.shape)) for grad in grads)}")
    _run_sums(RunSums.of(sums, picks, bounds), grads, add=out is not None)
    return grads


def _new_grads(sums: Sequence[tuple[Tensor, Tensor]], rows: int, dtype: torch.dtype | None) -> list[Tensor]:
    dtype = dtype or wide(*(x for _, x in sums))
    return [torch.empty(rows, x.shape[1], dtype=dtype, device=x.device) for _, x in sums]


def table_grad(weight: Tensor, x: Tensor, picks: Picks, out: Tensor) -> None:
    """``out_e += sum w_i x_t`` over the picks of row e: :func:`table_grads` of one table."""
    _run_sums(RunSums.of([(weight, x)], picks, _bounds(picks, out.shape[0])), [out], add=True)


def _bounds(picks: Picks, rows: int) -> Tensor:
    """``[rows + 1]`` int32: the places by expert where the picks of each row begin, and their end; of all rows."""
    numbers = torch.arange(rows + 1, dtype=torch.int32, device=picks.expert.device)
    return torch.searchsorted(picks.by_expert.expert, numbers, out_int32=True)


def sparse_table_grads(
    sums: Sequence[tuple[Tensor, Tensor]], picks: Picks, rows: int, *, dtype: torch.dtype | None = None
) -> tuple[Tensor, list[Tensor]]:
    """:func:`table_grads` of the touched rows alone. Waits for their number.

    Returns:
        The touched rows ``[n]`` int64, ascending, and their rows of each gradient, ``[n, dim]`` in ``dtype``.
    """
    touched, bounds = picks.segments
    grads = _new_grads(sums, touched.numel(), dtype)
    _run_sums(RunSums.of(sums, picks, bounds), grads, add=False)
    return touched, grads


def run_sums(sums: Sequence[tuple[Tensor, Tensor]], picks: Picks, rows: int) -> RunSums:
    """The sums that :func:`table_grads` would write, of all rows, for kernels that take them in registers."""
    return RunSums.of(sums, picks, _bounds(picks, rows))


@dataclass(frozen=True)
class RunSums:
    """The operands of the gradients of one table, or of two that the same picks read, run by run.

    A run is the picks of one row in the order by expert. Row ``i`` of each gradient is the sum over run ``i``. What is
    of the second table is None where there is one table only.

    Attributes:
        picks: by expert.
        weights: ``[picks]`` of each table, what its sum is weighted by.
        xs: ``[tokens, dim]`` of each table, what is summed.
        bounds: ``[runs + 1]`` int32, the places where runs begin.
    """

    picks: ByExpert
    weights: tuple[Tensor, Tensor | None]
    xs: tuple[Tensor, Tensor | None]
    bounds: Tensor

    @classmethod
    def of(cls, sums: Sequence[tuple[Tensor, Tensor]], picks: Picks, bounds: Tensor) -> RunSums:
        """The operands from what :func:`table_grads` takes."""
        first, second = sums[0], sums[1] if len(sums) == 2 else None
        return cls(
            picks.by_expert,
            (first[0].contiguous(), None if second is None else second[0].contiguous()),
            (_rows(first[1]), None if second is None else _rows(second[1])),
            bounds,
        )

    @property
    def runs(self) -> int:
        """How many runs there are."""
        return self.bounds.numel() - 1

    @property
    def dim(self) -> int:
        """Columns of a sum."""
        return self.xs[0].shape[1]

    @property
    def slices(self) -> int:
        """Slices of columns that programs take."""
        return int(triton.cdiv(self.dim, self.constants["BLOCK_D"]))

    @property
    def size(self) -> int:
        """Picks of a piece."""
        return max(PIECE, int(triton.next_power_of_2(self.picks.pick.numel() // MAX_PIECES)))

    @property
    def each(self) -> int:
        """Runs of a program."""
        return max(1, min(RUNS, RUNS * self.runs // max(1, self.picks.pick.numel())))

    @property
    def grid(self) -> tuple[int, int]:
        """Programs for all runs and all columns."""
        return int(triton.cdiv(self.runs, self.each)), self.slices

    @cached_property
    def constants(self) -> dict[str, Any]:
        """What kernels are compiled for. Columns go slice by slice where all of x and dy would not stay in L2.

        Fused multiply-adds gain nothing here, and without them every kernel that takes a sum takes the same.
        """
        sources = [x for x in self.xs if x is not None]
        widest = max(sources, key=Tensor.element_size)
        width = min(MAX_GRAD_BLOCK_D, _resident(widest, len(sources) * len(widest)) or self.dim)
        # of one table twice the rows at once: as many bytes as of two, and with fewer ptxas spills some registers
        tile = _tile(width, widest.element_size(), GRAD_TILE_BYTES * 2 // len(sources), columns=8)
        dtype = wide(*sources, self.weights[0])
        return {"DIM": self.dim, "ACC": accumulator(dtype), "enable_fp_fusion": False, **tile}

    @cached_property
    def partial(self) -> tuple[Tensor | None, Tensor | None]:
        """The sums of whole pieces, ``[pieces, dim]`` of each table; None where there are too few picks for a piece.

        An expert that very many tokens picked is summed piece by piece first. Pieces lie at multiples of their size,
        so that nothing needs to be worked out of them: a program finds that its piece is of one expert, or ends.
        """
        pieces = self.picks.pick.numel() // self.size
        if not pieces:
            return None, None
        dtype = wide(*(x for x in self.xs if x is not None), self.weights[0])
        down = torch.empty(pieces, self.dim, dtype=dtype, device=self.xs[0].device)
        up = None if self.xs[1] is None else torch.empty_like(down)
        numbers = self.picks.pick, self.picks.token, self.picks.expert
        args = *numbers, *self.weights, *self.xs, down, up, self.size
        launching.launch(_pieces_kernel, (pieces, self.slices), *args, **self.constants)
        return down, up


def _run_sums(sums: RunSums, grads: Sequence[Tensor], add: bool) -> None:
    """Write the gradients, or ``add`` to them."""
    operands = sums.picks.pick, sums.picks.token, *sums.weights, *sums.xs, sums.bounds, *sums.partial
    args = *operands, grads[0], grads[1] if len(grads) == 2 else None, sums.runs, sums.each, sums.size
    launching.launch(_runs_kernel, sums.grid, *args, ADD=add, **sums.constants)
