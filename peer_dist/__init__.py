"""peer_dist: distributed expert-parallel training of PEER, a Mixture of a Million Experts."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peer_dist.layers import PEER, ProductKeyMemory
    from peer_dist.sharding import clip_grad_norm_, exempt_tables

__version__ = "0.1.0"
__all__ = ["PEER", "ProductKeyMemory", "__version__", "clip_grad_norm_", "exempt_tables"]

_HOMES = {"PEER": "layers", "ProductKeyMemory": "layers", "clip_grad_norm_": "sharding", "exempt_tables": "sharding"}


def __getattr__(name: str) -> Any:
    # Late, so that `peer-dist --help` does not wait for torch.
    if name in _HOMES:
        return getattr(importlib.import_module(f"peer_dist.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
