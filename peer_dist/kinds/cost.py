"""Parameters and FLOPs of parts of a model.

FLOPs are those of matrix products, two per multiply-add, as ``torch.utils.flop_counter`` counts them; norms,
activations, softmax, top-k, gathers and embedding look-ups count nothing. Rows that a kernel of ours multiplies count
as the products that they stand for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

FLOAT = 4  # bytes of a float32
SHARDED_PARTS = ("experts", "values")  # the parts whose parameters are divided over expert ranks


@dataclass(frozen=True)
class Cost:
    """What one part of a model, or several of them, have and do."""

    parameters: int = 0
    """Trained numbers; what layers share is counted in the first of them."""
    active: int = 0
    """Those of them that one token's forward pass reads (of tables that layers share, what each layer reads)."""
    flops: int = 0
    """Per token, forward."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.parameters + other.parameters, self.active + other.active, self.flops + other.flops)


Parts = Mapping[str, Cost]
Shape = tuple[int, ...]


def matrix(inputs: int, outputs: int) -> Cost:
    """The cost of a matrix product without a bias."""
    return Cost(inputs * outputs, inputs * outputs, 2 * inputs * outputs)


def vectors(numbers: int) -> Cost:
    """The cost of weights or biases that are applied element by element."""
    return Cost(numbers, numbers)


def merged(several: Iterable[Parts]) -> Parts:
    """Parts of the same name added up, in the order of their first appearance."""
    sums: dict[str, Cost] = {}
    for parts in several:
        for name, cost in parts.items():
            sums[name] = sums.get(name, Cost()) + cost
    return sums


def total(parts: Parts) -> Cost:
    """All parts added up."""
    return sum(parts.values(), Cost())
