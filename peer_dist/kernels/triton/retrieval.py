"""Retrieval on GPUs, in Triton: scores stay in registers, sums are float32, nothing is atomic.

**Forward.** A program takes a block of tokens, and one head and half of their queries. It multiplies them by a tile of
sub-keys after the other and keeps the ``k`` best scores so far, sorted, as integers that hold a score and its place. A
tile's scores are sorted in runs of ``k``, of which the better half remains until one run is left (a bitonic top-k). It
is merged into what was kept. A second kernel adds up the pairs of both halves that can matter and sorts them likewise.
It is one of its own because the halves share nothing: they are programs apart, twice as many with half the registers.
Between the two kernels pass 8 bytes for each half and pick.

**Backward.** The gradients of ``k`` scores, spread over the ``n`` sub-keys, are a matrix with mostly zeros. A program
makes a tile of it at a time, by comparing picks with columns, and multiplies it by the queries. This gives the gradient
of the sub-keys without sorting picks. That of the queries gathers sub-keys, which stay in L2.

Counted for ``T`` tokens, ``h`` heads, halves of ``d = key_dim / 2`` columns of ``b`` bytes:

==============  =======================================================  ==============================================
function        through memory                                           through L2, and operations
==============  =======================================================  ==============================================
``search``      ``2 T h d b + 2 h n d b + T h k (12 + 2 x 16)``          ``2 T h d b n / 32 + 2 T h n d b / 128``;
                                                                         ``4 T h n d`` FLOP, and for each of ``2 T h n``
                                                                         scores ``log k (log k + 1) / 2`` and some 4
                                                                         exchanges of 64-bit integers
``dquery``      ``T h k 12 + 2 T h d b_grad``                            ``2 T h k d b``; ``4 T h k d`` FLOP
``dkeys``       ``2 T h d b + T h k 12 + 2 h n d (4 + 4)``               ``(T h k 12 d / 256 + 2 T h d b) n / 64``;
                                                                         ``8 T h n d`` FLOP for bfloat16 queries, and
                                                                         ``2 T h n k d / 256`` comparisons
==============  =======================================================  ==============================================
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from peer_dist.kernels import reference
from peer_dist.kernels.triton import experts, launching
from peer_dist.kernels.triton.launching import jit, tl, triton

MOST_TOP_K = 64
"""Picks of a head that a program can keep in registers."""

TILE = 32
"""Sub-keys whose scores are sorted at a time, or ``k`` if that is more."""

KEY_GRAD_PROGRAMS = 512
"""Programs that the sub-keys' gradient is spread over, if need be by parts of the tokens: two to four for each
multiprocessor."""

KEY_GRAD_TOKENS = 1024
"""The fewest tokens worth a part of their own."""

# ---------------------------------------------------------------------------------------------------------------------
# Scores and places as integers, and their sorting. Tensors are [rows, power of two].


@jit
def _packed(value, place):  # type: ignore[no-untyped-def]
    """Integers in the order of the floats, NaN above all and both zeros equal, and of equals the lower place first."""
    bits = value.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, -2147483648 - bits, bits)
    ordered = tl.where(value != value, 2147483647, ordered)
    return (ordered.to(tl.int64) << 32) | (4294967295 - place.to(tl.int64))


@jit
def _value(packed):  # type: ignore[no-untyped-def]
    ordered = (packed >> 32).to(tl.int32)
    return tl.where(ordered < 0, -2147483648 - ordered, ordered).to(tl.float32, bitcast=True)


@jit
def _place(packed):  # type: ignore[no-untyped-def]
    return 4294967295 - (packed & 4294967295)


@jit
def _exchange(x, STRIDE: tl.constexpr, RUN: tl.constexpr, ORDER: tl.constexpr):  # type: ignore[no-untyped-def]
    """Order the pairs of places STRIDE apart. ORDER: "down", "up", or "turns" for runs of RUN that go down and up."""
    if ORDER == "turns":
        pairs = tl.reshape(x, [x.numel // (2 * RUN), 2, RUN // (2 * STRIDE), 2, STRIDE])
        upper = tl.reshape(tl.arange(0, 2), [1, 2, 1, 1, 1]) ^ tl.reshape(tl.arange(0, 2), [1, 1, 1, 2, 1])
    else:
        pairs = tl.reshape(x, [1, 1, x.numel // (2 * STRIDE), 2, STRIDE])
        upper = tl.reshape(tl.arange(0, 2), [1, 1, 1, 2, 1])
        if ORDER == "up":
            upper = upper ^ 1
    other = tl.sum(pairs, 3, keep_dims=True) - pairs  # may wrap around, and back
    return tl.reshape(tl.where((pairs < other) == (upper == 0), other, pairs), x.shape)


@jit
def _merged(x, LOG: tl.constexpr, ORDER: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sort runs of 2 ** LOG that go up and then down, or down and then up."""
    for step in tl.static_range(LOG):
        x = _exchange(x, 1 << (LOG - 1 - step), 1 << LOG, ORDER)
    return x


@jit
def _largest(x, LOG_K: tl.constexpr, LOG_N: tl.constexpr, ORDER: tl.constexpr):  # type: ignore[no-untyped-def]
    """The 2 ** LOG_K largest of each row of ``x [rows, 2 ** LOG_N]``, sorted."""
    for log in tl.static_range(1, LOG_K + 1):
        x = _merged(x, log, "turns" if log < LOG_N else ORDER)
    for log in tl.static_range(LOG_K + 1, LOG_N + 1):  # the larger of two runs, place by place, are the largest of both
        runs = tl.reshape(x, [x.numel // (2 << LOG_K), 2, 1 << LOG_K])
        x = tl.reshape(tl.max(runs, 1), [x.shape[0], x.shape[1] // 2])
        x = _merged(x, LOG_K, "turns" if log < LOG_N else ORDER)
    return x


# ---------------------------------------------------------------------------------------------------------------------
# Kernels. A part of a query is one half of one head's: number 2 * head + half.


@jit
def _halves_kernel(  # type: ignore[no-untyped-def]
    query,  # [tokens, HEADS, 2, HALF]
    keys,  # [HEADS, 2, N, HALF], or [2, N, HALF] if SHARED
    best,  # [tokens, HEADS, 2, 2 ** LOG_K]: packed scores and sub-keys, the best first
    tokens,
    HEADS: tl.constexpr,
    N: tl.constexpr,
    HALF: tl.constexpr,
    SHARED: tl.constexpr,
    LOG_K: tl.constexpr,
    LOG_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """One program for a block of tokens and a part: the best sub-keys, over tiles of 2 ** LOG_N of them."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    live = (token < tokens)[:, None]
    part = tl.program_id(1)
    row = token * (2 * HEADS) + part
    table = keys + (part % 2 if SHARED else part).to(tl.int64) * (N * HALF)
    top = tl.full([BLOCK_T, 1 << LOG_K], -9223372036854775808, tl.int64)
    for begin in range(0, N, 1 << LOG_N):
        key = (begin + tl.arange(0, 1 << LOG_N))[None, :]
        scores = tl.full([BLOCK_T, 1 << LOG_N], 0.0, tl.float32)
        for first in range(0, HALF, BLOCK_D):
            col = first + tl.arange(0, BLOCK_D)
            inside = col < HALF
            q = tl.load(query + row[:, None] * HALF + col[None, :], mask=live & inside[None, :], other=0.0)
            k = tl.load(table + key * HALF + col[:, None], mask=(key < N) & inside[:, None], other=0.0)
            scores = tl.dot(q.to(DTYPE), k.to(DTYPE), scores, input_precision="ieee")
        tile = tl.where(key < N, _packed(scores, key), -9223372036854775808)
        top = _merged(tl.maximum(top, _largest(tile, LOG_K, LOG_N, "up")), LOG_K, "down")
    tl.store(best + (row[:, None] << LOG_K) + tl.arange(0, 1 << LOG_K)[None, :], top, mask=live)


@jit
def _ranks(pair, TOP_K: tl.constexpr):  # type: ignore[no-untyped-def]
    """The ranks ``i, j`` of pairs with ``(i + 1) * (j + 1) <= TOP_K``, numbered in the order of ``i``, then ``j``."""
    i = pair * 0
    j = pair
    begin = 0
    for rank in tl.static_range(1, TOP_K):
        begin += TOP_K // rank
        i = tl.where(pair >= begin, rank, i)
        j = tl.where(pair >= begin, pair - begin, j)
    return i, j


@jit
def _pairs_kernel(  # type: ignore[no-untyped-def]
    best,  # [rows, 2, 2 ** LOG_K]: of each token and head
    number,  # [rows, TOP_K]
    score,  # [rows, TOP_K]
    rows,
    N: tl.constexpr,
    TOP_K: tl.constexpr,
    PAIRS: tl.constexpr,
    LOG_K: tl.constexpr,
    LOG_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One program for BLOCK_R rows: the best of their PAIRS pairs that can matter, at most 2 ** LOG_N."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = (row < rows)[:, None]
    first = best + (row[:, None] << (LOG_K + 1))
    second = first + (1 << LOG_K)
    pair = tl.arange(0, 1 << LOG_N)
    i, j = _ranks(pair, TOP_K)
    mask = live & (pair < PAIRS)[None, :]
    sums = _value(tl.load(first + i[None, :], mask=mask, other=0)) + _value(
        tl.load(second + j[None, :], mask=mask, other=0)
    )
    packed = tl.where((pair < PAIRS)[None, :], _packed(sums, pair[None, :]), -9223372036854775808)
    top = _largest(packed, LOG_K, LOG_N, "down")
    rank = tl.arange(0, 1 << LOG_K)[None, :]
    mask = live & (rank < TOP_K)
    i, j = _ranks(_place(top).to(tl.int32), TOP_K)
    a = _place(tl.load(first + i, mask=mask, other=0))
    b = _place(tl.load(second + j, mask=mask, other=0))
    tl.store(number + row[:, None] * TOP_K + rank, a * N + b, mask=mask)
    tl.store(score + row[:, None] * TOP_K + rank, _value(top), mask=mask)


@jit
def _sub_key(number, part, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sub-key of a product key's number that is of this part of the query."""
    if N * N <= 2147483647:
        number = number.to(tl.int32)
    return tl.where(part % 2 == 0, number // N, number % N).to(tl.int32)


@jit
def _query_grad_kernel(  # type: ignore[no-untyped-def]
    dscores,  # [tokens, HEADS, TOP_K]
    number,  # [tokens, HEADS, TOP_K]
    keys,  # [HEADS, 2, N, HALF], or [2, N, HALF] if SHARED
    dquery,  # [tokens, HEADS, 2, HALF]
    tokens,
    HEADS: tl.constexpr,
    N: tl.constexpr,
    HALF: tl.constexpr,
    SHARED: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program for a block of tokens, a part and a slice of its columns."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    live = token < tokens
    part = tl.program_id(1)
    col = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = live[:, None] & (col < HALF)[None, :]
    table = keys + (part % 2 if SHARED else part).to(tl.int64) * (N * HALF)
    pick = (token * HEADS + part // 2) * TOP_K
    acc = tl.full([BLOCK_T, BLOCK_D], 0.0, tl.float32)
    for rank in range(TOP_K):
        weight = tl.load(dscores + pick + rank, mask=live, other=0.0)
        key = _sub_key(tl.load(number + pick + rank, mask=live, other=0), part, N)
        rows = tl.load(table + key.to(tl.int64)[:, None] * HALF + col[None, :], mask=mask, other=0.0)
        acc += rows.to(tl.float32) * weight[:, None]
    tl.store(dquery + (token * (2 * HEADS) + part)[:, None] * HALF + col[None, :], acc, mask=mask)


@jit
def _key_grad_kernel(  # type: ignore[no-untyped-def]
    dscores,  # [tokens, HEADS, TOP_K]
    number,  # [tokens, HEADS, TOP_K]
    query,  # [tokens, HEADS, 2, HALF]
    partial,  # [parts of the tokens, HEADS, 2, N, HALF]
    tokens,
    size,  # tokens of a part
    HEADS: tl.constexpr,
    N: tl.constexpr,
    HALF: tl.constexpr,
    TOP_K: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DTYPE: tl.constexpr,
    HALVED: tl.constexpr,
):
    """One program for a block of sub-keys, a slice of the columns, a part of the query and some of the tokens.

    HALVED: float32 weights are multiplied as the sum of two bfloat16 numbers.
    """
    key = tl.program_id(0) // SLICES * BLOCK_N + tl.arange(0, BLOCK_N)
    col = tl.program_id(0) % SLICES * BLOCK_D + tl.arange(0, BLOCK_D)
    part = tl.program_id(1)
    begin = tl.program_id(2) * size
    stop = tl.minimum(begin + size, tokens)
    acc = tl.full([BLOCK_N, BLOCK_D], 0.0, tl.float32)
    for at in range(begin, stop, BLOCK_T):
        token = (at + tl.arange(0, BLOCK_T)).to(tl.int64)
        live = token < stop
        pick = (token * HEADS + part // 2) * TOP_K
        weights = tl.full([BLOCK_N, BLOCK_T], 0.0, tl.float32)
        for rank in range(TOP_K):
            weight = tl.load(dscores + pick + rank, mask=live, other=0.0)
            picked = _sub_key(tl.load(number + pick + rank, mask=live, other=0), part, N)
            weights += tl.where(key[:, None] == picked[None, :], weight[None, :], 0.0)
        row = token * (2 * HEADS) + part
        mask = live[:, None] & (col < HALF)[None, :]
        q = tl.load(query + row[:, None] * HALF + col[None, :], mask=mask, other=0.0).to(DTYPE)
        if HALVED:
            high = weights.to(tl.bfloat16)
            low = (weights - high.to(tl.float32)).to(tl.bfloat16)
            acc = tl.dot(high.to(DTYPE), q, acc)
            acc = tl.dot(low.to(DTYPE), q, acc)
        else:
            acc = tl.dot(weights, q, acc, input_precision="tf32x3")
    row = (tl.program_id(2).to(tl.int64) * (2 * HEADS) + part) * N + key
    mask = (key < N)[:, None] & (col < HALF)[None, :]
    tl.store(partial + row[:, None] * HALF + col[None, :], acc, mask=mask)


# ---------------------------------------------------------------------------------------------------------------------
# Launches.


def _log(count: int) -> int:
    """The logarithm of the next power of two, at least 1."""
    return max(1, (count - 1).bit_length())


def _block(columns: int, most: int) -> int:
    """Columns of a tile, a power of two: as many as there are, but 16 at least and ``most`` at most."""
    return min(most, max(16, 1 << _log(columns)))


def search(queries: Iterable[Tensor], keys: Tensor, numbers: Tensor, scores: Tensor) -> None:
    """See :func:`peer_dist.kernels.search`. Products of 16-bit numbers are exact, those of float32 ones float32.

    Served are up to :data:`MOST_TOP_K` picks in float32; what is float64 is searched as on any device.
    """
    if scores.dtype != torch.float32 or scores.shape[-1] > MOST_TOP_K:
        reference.search(queries, keys, numbers, scores)
        return
    keys, begin = keys.contiguous(), 0
    for query in queries:
        part = slice(begin, begin + len(query))
        _search(query.contiguous(), keys, numbers[part], scores[part])
        begin += len(query)


def _search(query: Tensor, keys: Tensor, numbers: Tensor, scores: Tensor) -> None:
    tokens, heads, top_k = scores.shape
    n, half = keys.shape[-2:]
    low = query.dtype == keys.dtype and query.dtype.itemsize == 2
    dtype = _multiplied(query.dtype) if low else tl.float32
    log_k = _log(top_k)
    log_n = max(log_k, _log(TILE))
    # On Ampere a warp has whole rows of tiles so tall: no run of scores is spread over warps, which would exchange by
    # shared memory. Two programs fit a multiprocessor; for a third one ptxas would spill.
    block_t = (128 if low else 64) * TILE >> log_n
    columns = _block(half, 32 if low else 16)
    best = torch.empty(tokens, heads, 2, 1 << log_k, dtype=torch.int64, device=query.device)
    sizes = {"HEADS": heads, "N": n, "HALF": half, "SHARED": keys.dim() == 3, "LOG_K": log_k, "LOG_N": log_n}
    launching.launch(
        _halves_kernel,
        (triton.cdiv(tokens, block_t), 2 * heads),
        *(query, keys, best, tokens),
        **sizes,
        BLOCK_T=block_t,
        BLOCK_D=columns,
        DTYPE=dtype,
        num_warps=4,
        maxnreg=255,
    )
    pairs = sum(top_k // rank for rank in range(1, top_k + 1))
    log_pairs = max(log_k, _log(pairs))
    block_r = max(1, 2048 >> log_pairs)
    launching.launch(
        _pairs_kernel,
        (triton.cdiv(tokens * heads, block_r),),
        *(best, numbers, scores, tokens * heads),
        **{"N": n, "TOP_K": top_k, "PAIRS": pairs, "LOG_K": log_k, "LOG_N": log_pairs},
        BLOCK_R=block_r,
        num_warps=4,
    )


def _multiplied(dtype: torch.dtype) -> object:
    """Triton's dtype of factors. Its interpreter would multiply bfloat16 as the integers that it keeps them in."""
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype] if not launching.INTERPRETED else tl.float32


def search_backward(
    dscores: Tensor, numbers: Tensor, query: Tensor, keys: Tensor, dkeys: Tensor, dtype: torch.dtype
) -> Tensor:
    """See :func:`peer_dist.kernels.search_backward`.

    Sums are float32. In the sub-keys' gradient each of ``dscores`` counts as the sum of two bfloat16 numbers where
    queries are bfloat16, off by at most ``2 ** -17`` of it. Else a product is three of TF32, off by about ``2 ** -18``;
    the interpreter multiplies float32 instead, so that no test here has seen this.
    It is a product with zeros: a query that is not finite leaves no gradient finite, whatever it picked.
    """
    if dscores.dtype != torch.float32 or torch.float64 in (query.dtype, keys.dtype):
        products = experts.mix, experts.table_grad
        return reference.search_backward(*products, dscores, numbers, query, keys, dkeys, dtype)
    dscores, numbers, query, keys = (tensor.contiguous() for tensor in (dscores, numbers, query, keys))
    tokens, heads, top_k = dscores.shape
    n, half = keys.shape[-2:]
    sizes = {"HEADS": heads, "N": n, "HALF": half, "TOP_K": top_k}
    dquery = torch.empty(query.shape, dtype=dtype, device=query.device)
    columns = _block(half, 512)
    block_t = 2048 // columns
    launching.launch(
        _query_grad_kernel,
        (triton.cdiv(tokens, block_t), 2 * heads, triton.cdiv(half, columns)),
        *(dscores, numbers, keys, dquery, tokens),
        **sizes,
        SHARED=keys.dim() == 3,
        BLOCK_T=block_t,
        BLOCK_D=columns,
        num_warps=4,
    )
    low = query.dtype == torch.bfloat16
    block_n, columns = 64, _block(half, 256 if low else 64)
    slices = triton.cdiv(half, columns)
    blocks = triton.cdiv(n, block_n) * slices
    parts = max(1, min(tokens // KEY_GRAD_TOKENS, KEY_GRAD_PROGRAMS // (2 * heads * blocks)))
    partial = torch.empty(parts, heads, 2, n, half, dtype=torch.float32, device=query.device)
    launching.launch(
        _key_grad_kernel,
        (blocks, 2 * heads, parts),
        *(dscores, numbers, query, partial, tokens, triton.cdiv(tokens, parts)),
        **sizes,
        SLICES=slices,
        BLOCK_T=32,
        BLOCK_N=block_n,
        BLOCK_D=columns,
        DTYPE=_multiplied(query.dtype) if low else tl.float32,
        HALVED=low,
        num_warps=8 if columns > 128 else 4,
    )
    dkeys += partial.flatten(0, 1).sum(0) if keys.dim() == 3 else partial.sum(0)
    return dquery
