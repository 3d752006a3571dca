"""The memory that a rank's parameters, their gradients and the states of their optimizer take."""

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
        """The bytes of whole storages, each counted once, for the first of the three arguments that has it."""
        seen: set[int] = set()
        return cls(_storages(weights, seen), _storages(gradients, seen), _storages(optimizer, seen), buckets)

    @classmethod
    def sum(cls, parts: Iterable[HeldBytes]) -> HeldBytes:
        """The bytes of several parts that share no memory."""
        weights, gradients, optimizer, buckets = zip(*map(astuple, parts))
        return cls(sum(weights), sum(gradients), sum(optimizer), sum(buckets))

    @property
    def total(self) -> int:
        """All bytes."""
        return self.weights + self.gradients + self.optimizer + self.buckets


def _storages(tensors: Iterable[Tensor], seen: set[int]) -> int:
    """The bytes of storages that were not ``seen``, which they are added to."""
    dense = (
        part
        for tensor in tensors
        for part in ((tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,))
    )
    # storages are known by their objects: on meta they have no address
    sizes = {part.untyped_storage()._cdata: part.untyped_storage().nbytes() for part in dense if part.dim()}
    new = sizes.keys() - seen
    seen |= new
    return sum(sizes[storage] for storage in new)
