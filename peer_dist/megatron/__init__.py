"""The seam to Megatron-core, and the only package that imports it.

Its modules make Megatron-core run where there is no GPU (:mod:`peer_dist.megatron.cpu`). They are imported on
first use: Megatron takes seconds, which preparing data should not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data_parallel import wrap_data_parallel
    from .decoding import Decoder
    from .dist_checkpoint import CheckpointError
    from .documents import pack_documents
    from .feed_forward import dense_output_std
    from .fused import fuses_weight_gradients
    from .model import (
        build_model,
        count_parameters,
        forward_logits,
        peer_layers,
        routers,
        shards_of,
        sparse_layers,
        token_losses,
    )
    from .parallel import MegatronMPU, Parallel
    from .schedule import MicroBatch, run_forward_backward

_HOMES = {
    "CheckpointError": "dist_checkpoint",
    "Decoder": "decoding",
    "MegatronMPU": "parallel",
    "MicroBatch": "schedule",
    "Parallel": "parallel",
    "build_model": "model",
    "count_parameters": "model",
    "dense_output_std": "feed_forward",
    "forward_logits": "model",
    "fuses_weight_gradients": "fused",
    "pack_documents": "documents",
    "peer_layers": "model",
    "routers": "model",
    "run_forward_backward": "schedule",
    "shards_of": "model",
    "sparse_layers": "model",
    "token_losses": "model",
    "wrap_data_parallel": "data_parallel",
}

__all__ = [
    "CheckpointError",
    "Decoder",
    "MegatronMPU",
    "MicroBatch",
    "Parallel",
    "build_model",
    "count_parameters",
    "dense_output_std",
    "forward_logits",
    "fuses_weight_gradients",
    "pack_documents",
    "peer_layers",
    "routers",
    "run_forward_backward",
    "shards_of",
    "sparse_layers",
    "token_losses",
    "wrap_data_parallel",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    importlib.import_module(f"{__name__}.cpu").install()
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
