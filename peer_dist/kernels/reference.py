"""The expert products in plain PyTorch, for any device and dtype: what the faster backends must equal.

Everything is built from three products over picks (token, row): ``dots``, ``mix`` and ``table_grad``. Each
half of the layer is one of them forward and the other two backward. Rows are gathered in chunks, so that
nothing of size ``[tokens, picks, dim]`` exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peer_dist.kernels.picks import Picks

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}

_SLOPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # the gradient of the input, from that of the output
    "gelu": torch.ops.aten.gelu_backward,
    "relu": lambda gradient, x: torch.ops.aten.threshold_backward(gradient, x, 0),
    "silu": torch.ops.aten.silu_backward,
}

CHUNK_ELEMENTS = 1 << 22  # gathered table elements at a time: 16 MB in float32


def wide(*tensors: Tensor) -> torch.dtype:
    """The dtype to accumulate in: at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _chunks(picks: Picks, dim: int) -> Iterator[slice]:
    step = max(1, CHUNK_ELEMENTS // max(1, dim))
    for start in range(0, picks.expert.numel(), step):
        yield slice(start, start + step)


def dots(x: Tensor, table: Tensor, picks: Picks) -> Tensor:
    """``x_t . table_e`` of each pick: ``[tokens, dim], [rows, dim] -> [picks]``, at least float32."""
    out = torch.empty(picks.expert.numel(), dtype=wide(x, table), device=x.device)
    for part in _chunks(picks, table.shape[1]):
        rows, tokens = table[picks.expert[part]], x[picks.token[part]]
        out[part] = (rows.to(out.dtype) * tokens.to(out.dtype)).sum(-1)
    return out


def mix(weight: Tensor, table: Tensor, picks: Picks, *, dtype: torch.dtype | None = None) -> Tensor:
    """``sum_i w_i table_{e_i}`` of each token: ``[picks], [rows, dim] -> [tokens, dim]``, summed in at least float32
    and given so unless ``dtype`` says otherwise.
    """
    out = torch.zeros(picks.tokens, table.shape[1], dtype=wide(weight, table), device=table.device)
    for part in _chunks(picks, table.shape[1]):
        rows = table[picks.expert[part]].to(out.dtype)
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
    """The ``top_k`` largest sums ``first[:, a] + second[:, b]`` of each row, largest first: ``[queries, n]`` twice
    -> their numbers ``a * n + b``, ``[queries, top_k]`` int64, and the sums.
    """
    (first_best, a), (second_best, b) = first.topk(top_k), second.topk(top_k)
    i, j = _candidates(top_k, first.device)
    best, position = (first_best[:, i] + second_best[:, j]).topk(top_k)
    return a.gather(1, i[position]) * first.shape[1] + b.gather(1, j[position]), best


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
        self, sums: Sequence[tuple[Tensor, Tensor]], picks: Picks, rows: int, *, dtype: torch.dtype
    ) -> list[Tensor]:
        """Per pair of a weight ``[picks]`` and ``x: [tokens, dim]`` the gradient of :func:`mix`: ``sum of w_i x_t`` of
        each row, ``[rows, dim]`` in ``dtype``, summed in at least float32.
        """
        grads = [torch.zeros(rows, x.shape[1], dtype=wide(weight, x), device=x.device) for weight, x in sums]
        for (weight, x), grad in zip(sums, grads):
            self.table_grad(weight, x, picks, grad)
        return [grad.to(dtype) for grad in grads]

    def sparse_table_grads(
        self, sums: Sequence[tuple[Tensor, Tensor]], picks: Picks, rows: int, *, dtype: torch.dtype
    ) -> tuple[Tensor, list[Tensor]]:
        """The rows picked at all, ``[touched]`` int64 ascending, and their gradients, ``[touched, dim]`` each."""
        touched, inverse = torch.unique(picks.expert, return_inverse=True)
        return touched, self.table_grads(sums, Picks(picks.offsets, inverse), touched.numel(), dtype=dtype)
