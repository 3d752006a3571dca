"""peer_dist: distributed expert-parallel training of PEER, a Mixture of a Million Experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peer_dist.layers import PEER, ProductKeyMemory

__version__ = "0.1.0"
__all__ = ["PEER", "ProductKeyMemory", "__version__"]


def __getattr__(name: str) -> Any:
    # Late, so that `peer-dist --help` does not wait for torch.
    if name in ("PEER", "ProductKeyMemory"):
        from peer_dist import layers

        return getattr(layers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
