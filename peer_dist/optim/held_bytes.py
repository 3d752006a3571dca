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
        far: of weights and optimizer states that lie in other memory than where the kernels compute, in host memory or
            in scratch files; those parts of them that are near are counted above.
    """

    weights: int
    gradients: int
    optimizer: int
    buckets: int = 0
    far: int = 0

    @classmethod
    def of(
        cls,
        weights: Iterable[Tensor],
        gradients: Iterable[Tensor],
        optimizer: Iterable[Tensor],
        buckets: int = 0,
        far: Iterable[Tensor] = (),
    ) -> HeldBytes:
        """The bytes of whole storages, each counted once: as far, or for the first of the others that has it."""
        seen: set[int] = set()
        away = _storages(far, seen)
        return cls(_storages(weights, seen), _storages(gradients, seen), _storages(optimizer, seen), buckets, away)

    @classmethod
    def sum(cls, parts: Iterable[HeldBytes]) -> HeldBytes:
        """The bytes of several parts that share no memory."""
        return cls(*map(sum, zip(*map(astuple, parts))))

    @property
    def total(self) -> int:
        """All bytes near the kernels."""
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
