"""What a rank's parameters and the states of their optimizer take."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank.

    Attributes:
        weights: of the parameters that the rank has, or of its part of them, padding included.
        gradients: as they are when the last backward pass of a step ends; sparse ones, of lazy optimizers, left out.
        optimizer: masters and moments that share no memory with the weights. With ``zero.offload`` those of the dense
            part are in host memory.
        buckets: in which gradients are reduced; ZeRO-1 and 2 have them only while they do that.
    """

    weights: int
    gradients: int
    optimizer: int
    buckets: int = 0

    @classmethod
    def of(cls, weights: Iterable[Tensor], gradients: int, optimizer: Iterable[Tensor], buckets: int = 0) -> Memory:
        """Whole storages are counted, each once."""
        sizes = _storages(weights)
        states = {storage: size for storage, size in _storages(optimizer).items() if storage not in sizes}
        return cls(sum(sizes.values()), gradients, sum(states.values()), buckets)

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.buckets


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """The bytes of each storage under them, by what tells it apart (on meta it has no address)."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage._cdata: storage.nbytes() for storage in storages}
