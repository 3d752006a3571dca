"""What is used of apex and TransformerEngine, which NVIDIA's images have; docs/apex.md says why, and why no more is."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import layers

from peer_dist.config import Config

_DEVICES = ("cuda",)  # that apex has kernels for


def fuses_weight_gradients(config: Config, device: torch.device) -> bool:
    """Whether apex's kernel adds the gradients of linear layers' weights to Megatron's float32 buffers.

    Without it, the product writes a gradient of the weight's dtype, which is then read and added. There are such
    buffers with ZeRO 0 only.

    Args:
        config: of the run; ``train.fused`` and ``zero.stage`` are read.
        device: where the model is.
    """
    wanted = config.train.fused == "auto" and config.zero.stage == 0 and device.type in _DEVICES
    return wanted and layers._grad_accum_fusion_available
