"""What a rank's parameters, their gradients and the states of their optimizer take."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass

from torch import Tensor

BUCKET = 500_000_000
"""Elements of the bucket that ZeRO reduces gradients in, at most: DeepSpeed's default."""


@dataclass(frozen=True)
class HeldBytes:
    """Bytes on one rank.

    Attributes:
        weights: of the parameters that the rank has, or of its part of them, padding included.
        gradients: as they are at the moment: the most in a step when its last backward pass has ended.
        optimizer: masters and moments that share no memory with the weights; counts of steps are left out. With
            ``zero.offload`` those of the dense part are in host memory.
        buckets: in which gradients are reduced; ZeRO-1 and 2 have them only while they do that.
    """

    weights: int
    gradients: int
    optimizer: int
    buckets: int = 0

    @classmethod
    def of(
        cls, weights: Iterable[Tensor], gradients: Iterable[Tensor], optimizer: Iterable[Tensor], buckets: int = 0
    ) -> HeldBytes:
        """Whole storages are counted, each once, for the first of the three that has it."""
        seen: set[int] = set()
        return cls(_storages(weights, seen), _storages(gradients, seen), _storages(optimizer, seen), buckets)

    @classmethod
    def sum(cls, parts: Iterable[HeldBytes]) -> HeldBytes:
        """The bytes of several parts that share no memory."""
        weights, gradients, optimizer, buckets = zip(*map(astuple, parts))
        return cls(sum(weights), sum(gradients), sum(optimizer), sum(buckets))

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.buckets


def _storages(tensors: Iterable[Tensor], seen: set[int]) -> int:
    """The bytes of storages that were not ``seen``, which they are added to."""
    dense = (part for each in tensors for part in ((each._indices(), each._values()) if each.is_sparse else (each,)))
    # told apart by what holds them: on meta they have no address
    found = {each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in dense if each.dim()}
    new = found.keys() - seen
    seen |= new
    return sum(found[storage] for storage in new)
