"""Megatron's data-parallel wrapper and its optimizer of whole parameters, for :mod:`peer_dist.engines.replicated`."""

from __future__ import annotations

from typing import Any

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch import nn

from .model import chunks_of

__all__ = ["clip_grad_by_total_norm_fp32", "wrap_data_parallel"]


def wrap_data_parallel(
    model: nn.ModuleList, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, grad_clip: float
) -> tuple[list[Any], MegatronOptimizer]:
    """The model's chunks, whose gradients add up in float32 buffers and are reduced over ranks, and AdamW over them.

    Args:
        model: from :func:`build_model`, without its shards (released).
    """
    chunks = chunks_of(model)
    config = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    wrapped = [DistributedDataParallel(chunk.config, config, chunk) for chunk in chunks]
    adam = OptimizerConfig(
        optimizer="adam",
        lr=lr,
        adam_beta1=betas[0],
        adam_beta2=betas[1],
        adam_eps=eps,
        weight_decay=weight_decay,
        clip_grad=grad_clip,
        bf16=chunks[0].config.bf16,
        params_dtype=chunks[0].config.params_dtype,
    )
    return wrapped, get_megatron_optimizer(adam, wrapped, use_gloo_process_groups=False)
