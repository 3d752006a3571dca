"""What layers with experts have in common, whatever their kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias, runtime_checkable

from torch import Tensor

RouteObserver: TypeAlias = Callable[[Tensor, Tensor], None]
"""Takes the expert numbers (int64) and gates of a forward pass, both ``[tokens, heads, top_k]``, best first."""


@runtime_checkable
class RoutedLayer(Protocol):
    """A layer that sends each token to a few of its experts, and tells ``on_route`` of every forward pass.

    Not of recomputed ones. Tokens are in the order of the hidden states ``[sequence, batch]``.
    """

    num_experts: int
    on_route: RouteObserver | None
