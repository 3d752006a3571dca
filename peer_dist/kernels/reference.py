"""The expert products in plain PyTorch, for any device and dtype: what the faster backends must equal.

Everything is built from three products over picks (token, row): ``dots``, ``mix`` and ``table_grad``. Each
half of the layer is one of them forward and the other two backward. Rows are gathered in chunks, so that
nothing of size ``[tokens, picks, dim]`` exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peer_dist.kernels.eight_bit import EightBit, dequantised
from peer_dist.kernels.picks import Picks

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}

_SLOPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # the gradient of the input, from that of the output
    "gelu": torch.ops.aten.gelu_backward,
    "relu": lambda gradient, x: torch.ops.aten.threshold_backward(gradient, x, 0),
    "silu": torch.ops.aten.silu_backward,
}

CHUNK_ELEMENTS = 1 << 22  # gathered table elements at a time: 16 MB in float32


def wide(*tensors: Tensor | EightBit) -> torch.dtype:
    """The dtype to accumulate in: at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        if not isinstance(tensor, EightBit):
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _width(table: Tensor | EightBit) -> int:
    return (table.codes if isinstance(table, EightBit) else table).shape[1]


def _rows(table: Tensor | EightBit, numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of a table, ``[picks, dim]`` in ``dtype``."""
    if isinstance(table, EightBit):
        return dequantised(table.codes[numbers], table.scales[numbers]).to(dtype)
    return table[numbers].to(dtype)


def _chunks(picks: Picks, dim: int) -> Iterator[slice]:
    step = max(1, CHUNK_ELEMENTS // max(1, dim))
    for start in range(0, picks.expert.numel(), step):
        yield slice(start, start + step)


def dots(x: Tensor, table: Tensor | EightBit, picks: Picks) -> Tensor:
    """``x_t . table_e`` of each pick: ``[tokens, dim], [rows, dim] -> [picks]``, at least float32."""
    out = torch.empty(picks.expert.numel(), dtype=wide(x, table), device=x.device)
    for part in _chunks(picks, _width(table)):
        rows, tokens = _rows(table, picks.expert[part], out.dtype), x[picks.token[part]]
        out[part] = (rows * tokens.to(out.dtype)).sum(-1)
    return out


def mix(weight: Tensor, table: Tensor | EightBit, picks: Picks, *, dtype: torch.dtype | None = None) -> Tensor:
    """``sum_i w_i table_{e_i}`` of each token: ``[picks], [rows, dim] -> [tokens, dim]``, summed in at least float32
    and given so unless ``dtype`` says otherwise.
    """
    out = torch.zeros(picks.tokens, _width(table), dtype=wide(weight, table), device=weight.device)
    for part in _chunks(picks, _width(table)):
        rows = _rows(table, picks.expert[part], out.dtype)
        out.index_add_(0, picks.token[part], rows * weight[part, None].to(out.dtype))
    return out.to(dtype or out.dtype)


def table_grad(weight: Tensor, x: Tensor, picks: Picks, out: Tensor) -> None:
    """``out_e += sum over picks of row e of w_i x_t``; ``weight``: ``[picks]``, ``x``: ``[tokens, dim]``,
    ``out``: ``[rows, dim]`` in at least float32.
    """
    for part in _chunks(picks, x.shape[1]):
        tokens = x[picks.token[part]].to(out.dtype)
        out.index_add_(0, picks.expert[part], tokens * weight[part, None].to(out.dtype))


@lru_cache(maxsize=64)
def _candidates(top_k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The pairs (i, j) of ranks that can be among the ``top_k`` largest sums: ``(i + 1) * (j + 1) <= top_k``.

    Every pair (i', j') with i' <= i and j' <= j scores at least as much, and there are (i + 1)(j + 1) of them.
    For 16 this leaves 50 of 256.
    """
    pairs = [(i, j) for i in range(top_k) for j in range(top_k) if (i + 1) * (j + 1) <= top_k]
    with torch.inference_mode(False):  # the cached tensors also serve training later
        first, second = torch.tensor(pairs, dtype=torch.int64, device=device).unbind(1)
    return first, second


def top_pairs(first: Tensor, second: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The ``top_k`` largest sums ``first[:, a] + second[:, b]`` of each row, largest first.

    NaN counts as largest, and zeros of either sign are equal. Backends that sort by themselves take the lower number
    first among equal scores of a half, and among equal sums the one whose first score ranks higher, then whose second
    does. Here equals come as ``torch.topk`` leaves them, which names no order.

    Args:
        first, second: ``[queries, n]``.
        top_k: at most ``n``.

    Returns:
        Their numbers ``a * n + b``, ``[queries, top_k]`` int64, and the sums, ``[queries, top_k]``.
    """
    (first_best, a), (second_best, b) = first.topk(top_k), second.topk(top_k)
    i, j = _candidates(top_k, first.device)
    best, position = (first_best[:, i] + second_best[:, j]).topk(top_k)
    return a.gather(1, i[position]) * first.shape[1] + b.gather(1, j[position]), best


def search(
    queries: Iterable[Tensor],
    keys: Tensor,
    numbers: Tensor,
    scores: Tensor,
    top_pairs: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]] = top_pairs,
) -> None:
    """See :func:`peer_dist.kernels.search`: one head of a chunk at a time, whose scores may stay in cache."""
    heads, top_k = scores.shape[1:]
    # wide before the product, which would else round scores to bfloat16 and make ties of neighbours
    per_head = keys.to(scores.dtype).expand(heads, *keys.shape[-3:]).transpose(-1, -2)  # [heads, 2, key_dim / 2, n]
    products = scores.new_empty(0)  # one memory for the scores of all chunks
    begin = 0
    for query in queries:
        part = slice(begin, begin + len(query))
        halves = query.to(scores.dtype).unflatten(-1, (2, -1)).permute(1, 2, 0, 3)  # [heads, 2, tokens, key_dim / 2]
        products.resize_(2, len(query), keys.shape[-2])
        for head in range(heads):
            first, second = torch.bmm(halves[head], per_head[head], out=products)
            numbers[part, head], scores[part, head] = top_pairs(first, second, top_k)
        begin += len(query)


def search_backward(
    mix: Callable[[Tensor, Tensor, Picks], Tensor],
    table_grad: Callable[[Tensor, Tensor, Picks, Tensor], None],
    dscores: Tensor,
    numbers: Tensor,
    query: Tensor,
    keys: Tensor,
    dkeys: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """See :func:`peer_dist.kernels.search_backward`: sums over the picked sub-keys, by a backend's two products."""
    n, half = keys.shape[-2:]
    table = keys.reshape(-1, half)
    sets = torch.arange(len(table) // n, dtype=torch.int64, device=keys.device).view(-1, 2, 1)  # [heads or 1, 2, 1]
    rows = torch.stack([numbers // n, numbers % n], 2).add_(sets * n)  # [tokens, heads, 2, top_k]
    picks = Picks.even(rows.flatten(0, 2))
    dpicked = dscores[:, :, None].expand_as(rows).flatten()
    table_grad(dpicked, query.reshape(-1, half), picks, dkeys.view_as(table))
    return mix(dpicked, table, picks).view_as(query).to(dtype)


def by_halves(
    ops: Any,
    x: Tensor,
    picks: Picks,
    gate: Tensor,
    down: Tensor,
    up: Tensor,
    activation: str,
    sum_columns: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """A backend's ``forward`` (see :class:`Composed`) out of its ``dots`` and ``mix``; between them ``sum_columns``
    may add up the partial dots of column slices.
    """
    pre = ops.dots(x, down, picks)
    if sum_columns is not None:
        pre = sum_columns(pre)
    return ops.mix(ACTIVATIONS[activation](pre) * gate.to(pre.dtype), up, picks), pre


def backward_by_halves(
    ops: Any,
    dy: Tensor,
    picks: Picks,
    pre: Tensor,
    gate: Tensor,
    down: Tensor,
    up: Tensor,
    activation: str,
    sum_columns: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A backend's ``backward`` (see :class:`Composed`) out of its ``dots`` and ``mix``; ``sum_columns`` as above."""
    dhidden = ops.dots(dy, up, picks)
    if sum_columns is not None:
        dhidden = sum_columns(dhidden)
    dgate, dpre, hidden = gated(pre, gate, dhidden, activation)
    return ops.mix(dpre, down, picks), dgate, dpre, hidden


def gated(pre: Tensor, gate: Tensor, dhidden: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """``dgate``, ``dpre`` and ``hidden`` of ``hidden = act(pre) * gate``, ``[picks]`` each, in ``pre``'s dtype."""
    activated, gate, dhidden = ACTIVATIONS[activation](pre), gate.to(pre.dtype), dhidden.to(pre.dtype)
    return dhidden * activated, _SLOPES[activation](dhidden * gate, pre), activated * gate


class Composed:
    """A backend's whole operations out of its three products.

    Args:
        products: a module with ``dots``, ``mix`` and ``table_grad`` as here.
    """

    def __init__(self, products: ModuleType | Any) -> None:
        self.dots, self.mix, self.table_grad = products.dots, products.mix, products.table_grad

    search = staticmethod(search)

    def search_backward(
        self, dscores: Tensor, numbers: Tensor, query: Tensor, keys: Tensor, dkeys: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """See :func:`peer_dist.kernels.search_backward`."""
        return search_backward(self.mix, self.table_grad, dscores, numbers, query, keys, dkeys, dtype)

    def forward(
        self, x: Tensor, picks: Picks, gate: Tensor, down: Tensor, up: Tensor, activation: str
    ) -> tuple[Tensor, Tensor]:
        """The layer's output ``[tokens, dim]`` and its pre-activations ``x_t . down_e``, ``[picks]``, both in
        at least float32. ``gate``: ``[picks]``.
        """
        return by_halves(self, x, picks, gate, down, up, activation)

    def backward(
        self, dy: Tensor, x: Tensor, picks: Picks, pre: Tensor, gate: Tensor, down: Tensor, up: Tensor, activation: str
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``dx [tokens, dim]``, and per pick ``dgate``, ``dpre`` and ``hidden`` (the gated activation), which
        the tables' gradients need; in at least float32. ``dy, x``: ``[tokens, dim]``.
        """
        return backward_by_halves(self, dy, picks, pre, gate, down, up, activation)

    def table_grads(
        self,
        sums: Sequence[tuple[Tensor, Tensor]],
        picks: Picks,
        rows: int,
        *,
        dtype: torch.dtype,
        out: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """Per pair of a weight ``[picks]`` and ``x: [tokens, dim]`` the gradient of :func:`mix`: ``sum of w_i x_t`` of
        each row, ``[rows, dim]`` in ``dtype``, summed in at least float32; ``out``: added to these instead.
        """
        grads = [torch.zeros(rows, x.shape[1], dtype=wide(weight, x), device=x.device) for weight, x in sums]
        for (weight, x), grad in zip(sums, grads):
            self.table_grad(weight, x, picks, grad)
        if out is not None:
            return [there.add_(grad) for there, grad in zip(out, grads)]
        return [grad.to(dtype) for grad in grads]

    def sparse_table_grads(
        self, sums: Sequence[tuple[Tensor, Tensor]], picks: Picks, rows: int, *, dtype: torch.dtype
    ) -> tuple[Tensor, list[Tensor]]:
        """The rows picked at all, ``[touched]`` int64 ascending, and their gradients, ``[touched, dim]`` each."""
        touched, inverse = torch.unique(picks.expert, return_inverse=True)
        return touched, self.table_grads(sums, Picks(picks.offsets, inverse), touched.numel(), dtype=dtype)
