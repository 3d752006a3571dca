"""What sparse layers have in common, whatever their kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias, runtime_checkable

from torch import Tensor

from peer_dist.sharding import Shard, Traffic

RouteObserver: TypeAlias = Callable[[Tensor, Tensor], None]
"""Takes the expert numbers (int64) and gates of a forward pass, both ``[tokens, heads, top_k]``, best first."""


class SparseLayer(Protocol):
    """A layer that picks some of ``num_experts`` experts (or values) for each token.

    It calls ``on_route`` in every forward pass, but recomputed ones. Tokens are in the order of the hidden states
    ``[sequence, batch]``.
    """

    num_experts: int
    traffic: Traffic
    on_route: RouteObserver | None

    def shards(self) -> dict[str, Shard]:
        """This rank's blocks of the layer's tables, by name."""

    def release_shards(self) -> None:
        """Take the shards out of the module's parameters: engines must not see them."""


@runtime_checkable
class BeginsAtZero(Protocol):
    """A layer that can be made to add nothing to the residual stream, and learn from there."""

    def zero_output(self) -> None:
        """Make the output 0 for every input."""
