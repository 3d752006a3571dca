"""The step of a table's optimizer: gradient, weight and moments are read once and written once.

For an element with gradient ``g``, weight ``w``, moments ``m`` and ``v``, or a row's one ``v``, and the numbers of
:class:`Step`::

    g = scale g
    v = second v + (rest_second g) g                         each element's own
    v = second v + rest_second (sum of g^2 scale mean)       or a row's, of its gradients before they are scaled
    m = first m + rest_first g                               where there is one; g otherwise
    w = decay w - (rate / (sqrt(unbiased v) + eps)) m

Every operation is rounded to float32 by itself, in this order, so that the C library, Triton and plain PyTorch give the
same bits, whatever the layout and the number of columns. The sum over a row alone has an order of its own in each.

Bytes an element through memory, with gradients in the table's dtype or bfloat16 (a row's own numbers are less than 0.1
each, and the random bits are computed where they are used):

===============  =====================  ==============================  ========================  =====================
kind             float32 table          bfloat16 table and master       bfloat16, at random       eight bits, at random
===============  =====================  ==============================  ========================  =====================
adam             28: g 4, w m v 8 each  28: g 2, w m v 8 each, table 2  22: g 2, w 4, m v 8 each  20: g w 2, m v 8 each
rowwise_adam     20: g 4, w m 8 each    20: g 2, w m 8 each, table 2    14: g 2, w 4, m 8         12: g w 2 each, m 8
rowwise_adagrad  12: g 4, w 8           12: g 2, w 8, table 2           6: g 2, w 4               4: g w 2 each
===============  =====================  ==============================  ========================  =====================

A row of eight bits (:mod:`peer_dist.kernels.eight_bit`) is decoded to float32 and stepped so; then its new scale is
found from its largest element, and it is rounded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peer_dist.kernels import native
from peer_dist.kernels.eight_bit import dequantised, gradient_dtype, is_eight_bit, quantised
from peer_dist.kernels.rounding import Rounding, random_bits, round_stochastically

BLOCK = 1 << 18  # elements that plain PyTorch takes at a time: its temporaries stay in a CPU's cache


class Step(NamedTuple):
    """The numbers of a step, as the module's text uses them; each is rounded to float32 once."""

    scale: float
    decay: float
    first: float
    rest_first: float
    second: float
    rest_second: float
    unbiased: float
    eps: float
    rate: float
    mean: float

    @classmethod
    def of(
        cls,
        kind: str,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        *,
        count: int,
        scale: float,
        dim: int,
        lazy: bool = False,
    ) -> Step:
        """The numbers of an optimizer's step.

        Args:
            kind: ``adam``, ``rowwise_adam`` or ``rowwise_adagrad``, which has no betas.
            lr: learning rate.
            betas: decay of the first and the second moment.
            eps: added to the root of the second moment.
            weight_decay: decoupled decay.
            count: number of the step, from 1.
            scale: what gradients are multiplied by.
            dim: columns of the whole table, which a row's mean is over.
            lazy: ``adam`` adds ``eps`` before it corrects the second moment's bias, as SparseAdam does.
        """
        decay, mean = 1 - lr * weight_decay, scale / dim
        if kind == "rowwise_adagrad":
            return cls(scale, decay, 0.0, 1.0, 1.0, 1.0, 1.0, eps, lr, mean)
        first, second = betas
        correction = 1 - second**count
        if lazy and kind == "adam":
            eps /= math.sqrt(correction)
        rate = lr / (1 - first**count)
        return cls(scale, decay, first, 1 - first, second, 1 - second, 1 / correction, eps, rate, mean)


def update_rows(
    step: Step,
    grad: Tensor,
    table: Tensor,
    moments: Mapping[str, Tensor],
    *,
    master: Tensor | None = None,
    rows: Tensor | None = None,
    squares: Tensor | None = None,
    rounding: Rounding | None = None,
    scales: Tensor | None = None,
    numbers: Tensor | None = None,
) -> None:
    """Step rows of a table in place, with their moments.

    Args:
        step: its numbers.
        grad: ``[touched, columns]``, the gradients of these rows.
        table: ``[rows, columns]``: the weights in float32; or the rounding of ``master``; or, with ``rounding``, the
            weights in bfloat16, or the codes of weights of eight bits.
        moments: float32, as the kind has them: ``exp_avg`` and ``exp_avg_sq`` ``[rows, columns]``, ``row_sq``
            ``[rows]``.
        master: ``[rows, columns]`` float32, the weights of a table of another dtype.
        rows: ``[touched]`` int64, ascending, each once; None: all.
        squares: ``[touched]`` float32, the sums of the whole rows' squared gradients, where the table has some of their
            columns; None: all columns are here.
        rounding: of the new weights, stochastically.
        scales: ``[rows]`` float32, of a table of eight bits (:mod:`peer_dist.kernels.eight_bit`), which ``rounding``
            must come with: each row stepped has a new one.
        numbers: ``[touched]`` int64, what the rows are called in the shard where they are rounded: say the slots of a
            cache are, as tensors, other rows than those they hold. None: ``rows``.

    Raises:
        ValueError: a table of eight bits without scales, or without rounding.
        IndexError: on a CPU, rows that do not ascend or lead out of the table.
    """
    if is_eight_bit(table) and (scales is None or rounding is None):
        raise ValueError("a table of eight bits is stepped with its scales, and rounded stochastically: give both")
    grad = grad.contiguous()
    backend(grad, table).update_rows(step, grad, table, moments, master, rows, squares, rounding, scales, numbers)
    torch.autograd.graph.increment_version(table)  # C and Triton write where autograd does not see it


def row_squares(grad: Tensor) -> Tensor:
    """The sum of the squares of each row, ``[rows, columns] -> [rows]`` float32, in one reading pass."""
    grad = grad.contiguous()
    squares: Tensor = backend(grad).row_squares(grad)
    return squares


def backend(grad: Tensor, *tables: Tensor) -> Any:
    """What steps tables with such gradients: Triton on GPUs, the C library on CPUs, plain PyTorch otherwise."""
    if not all(table.is_contiguous() for table in tables):
        return Plain
    if grad.is_cuda:
        from peer_dist.kernels import triton  # late: importing it takes a while, and needs a GPU to be of use

        there = all(table.is_cuda for table in tables)
        numbers = [table for table in tables if not is_eight_bit(table)]  # the codes of others have its columns
        return triton.updates if there and triton.available(grad, *numbers) else Plain
    served = all(table.device.type == "cpu" and gradient_dtype(table) == grad.dtype for table in tables)
    return native if served and native.available(grad) else Plain


class Plain:
    """The definition, in plain PyTorch, for any device and dtype. Nothing here leaves torch a choice of roundings."""

    @staticmethod
    def update_rows(
        step: Step,
        grad: Tensor,
        table: Tensor,
        moments: Mapping[str, Tensor],
        master: Tensor | None,
        rows: Tensor | None,
        squares: Tensor | None,
        rounding: Rounding | None,
        scales: Tensor | None = None,
        numbers: Tensor | None = None,
    ) -> None:
        """See :func:`update_rows`."""
        weights = table if master is None else master
        for block in _blocks(grad):
            which: Any = block if rows is None else rows[block]
            g = grad[block].float() * step.scale
            rate: Tensor | None = None
            if "row_sq" in moments:
                total = _squares(grad[block]) if squares is None else squares[block]
                square = moments["row_sq"][which] * step.second + total * step.scale * step.mean * step.rest_second
                moments["row_sq"][which] = square
                rate = _rate(step, square)[:, None]
            if "exp_avg_sq" in moments:
                square = moments["exp_avg_sq"][which] * step.second + g * step.rest_second * g
                moments["exp_avg_sq"][which] = square
                rate = _rate(step, square)
            if "exp_avg" in moments:
                g = moments["exp_avg"][which] * step.first + g * step.rest_first
                moments["exp_avg"][which] = g
            assert rate is not None
            weight = weights[which].float() if scales is None else dequantised(table[which], scales[which])
            weight = weight * step.decay - rate * g
            if master is not None:
                master[which] = weight
            if rounding is not None:
                called = rows if numbers is None else numbers
                if called is None:
                    called = torch.arange(block.start, block.stop, dtype=torch.int64, device=grad.device)
                else:
                    called = called[block]
                columns = range(rounding.column, rounding.column + table.shape[1])
                bits = random_bits(rounding.key, called + rounding.row, columns)
                if scales is None:
                    table[which] = round_stochastically(weight, bits)
                else:
                    table[which], scales[which] = quantised(weight, table.dtype, bits)
            else:
                table[which] = weight.to(table.dtype)

    @staticmethod
    def row_squares(grad: Tensor) -> Tensor:
        """See :func:`row_squares`."""
        sums = [_squares(grad[block]) for block in _blocks(grad)]
        return torch.cat(sums) if sums else torch.zeros(len(grad), dtype=torch.float32, device=grad.device)


def _blocks(grad: Tensor) -> list[slice]:
    """Rows that are taken at a time."""
    size = max(1, BLOCK // max(1, grad.shape[1]))
    return [slice(begin, min(begin + size, len(grad))) for begin in range(0, len(grad), size)]


def _squares(grad: Tensor) -> Tensor:
    return grad.float().square().sum(1)


def _rate(step: Step, square: Tensor) -> Tensor:
    """By what the moment is multiplied. Torch's float32 roots are an ulp off at times, and a number divided by a tensor
    may be its reciprocal's multiple.
    """
    root = (square * step.unbiased).double().sqrt().float() + step.eps
    return torch.full_like(root, step.rate) / root
