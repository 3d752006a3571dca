"""The seam to Megatron-core, and the only package that imports it.

Its modules make Megatron-core run where there is no GPU (:mod:`peer_dist.megatron.cpu`). They are imported on
first use: Megatron takes seconds, which preparing data should not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import CheckpointError
    from .engine import ReplicatedEngine
    from .model import (
        build_model,
        count_parameters,
        dense_output_std,
        forward_logits,
        peer_layers,
        routed_layers,
        segment_mask,
        table_owners,
        token_losses,
    )
    from .parallel import MegatronMPU, Parallel
    from .schedule import MicroBatch, run_forward_backward

_HOMES = {
    "CheckpointError": "checkpoint",
    "MegatronMPU": "parallel",
    "MicroBatch": "schedule",
    "Parallel": "parallel",
    "ReplicatedEngine": "engine",
    "build_model": "model",
    "count_parameters": "model",
    "dense_output_std": "model",
    "forward_logits": "model",
    "peer_layers": "model",
    "routed_layers": "model",
    "run_forward_backward": "schedule",
    "segment_mask": "model",
    "table_owners": "model",
    "token_losses": "model",
}

__all__ = [
    "CheckpointError",
    "MegatronMPU",
    "MicroBatch",
    "Parallel",
    "ReplicatedEngine",
    "build_model",
    "count_parameters",
    "dense_output_std",
    "forward_logits",
    "peer_layers",
    "routed_layers",
    "run_forward_backward",
    "segment_mask",
    "table_owners",
    "token_losses",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    importlib.import_module(f"{__name__}.cpu").install()
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
