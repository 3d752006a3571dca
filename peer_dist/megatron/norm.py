"""RMSNorm for Megatron's layer specs, whose local norm refuses sequence parallelism."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig

# Since torch 2.9 CUDA has one kernel, which computes in float32 inside; before that F.rms_norm rounds in between.
_ONE_KERNEL = hasattr(torch.ops.aten, "_fused_rms_norm_backward")


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last dimension, computed in float32 or wider.

    Args:
        config: gives the weight's dtype and whether sequence parallelism splits the activations.
        hidden_size: the last dimension.
        eps: added to the mean square.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        # as Megatron's own weights: build_model moves them
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device="cpu"))
        # Tells whoever reduces gradients that each tensor rank saw only its own tokens.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x: [..., hidden_size]``; the output has its shape and dtype."""
        if _ONE_KERNEL and x.is_cuda:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(wide), self.weight.shape, self.weight.to(wide), self.eps).to(x.dtype)
