"""Megatron's data-parallel wrapper and its optimizer of whole parameters, for :mod:`peer_dist.engines.replicated`."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from torch import nn

from .model import chunks_of


def wrap_data_parallel(
    model: nn.ModuleList, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> tuple[list[Any], MegatronOptimizer]:
    """The model's chunks, whose gradients add up in float32 buffers and are reduced over ranks, and AdamW over them.

    The optimizer's ``optimizer`` is torch's AdamW, whichever Adam Megatron has found.

    Args:
        model: from :func:`build_model`, without its shards (released).
    """
    chunks = chunks_of(model)
    config = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    wrapped = [DistributedDataParallel(chunk.config, config, chunk) for chunk in chunks]
    settings = OptimizerConfig(
        optimizer="adam", lr=lr, bf16=chunks[0].config.bf16, params_dtype=chunks[0].config.params_dtype
    )
    (optimizer,) = get_megatron_optimizer(settings, wrapped, use_gloo_process_groups=False).chained_optimizers
    groups = [
        # Megatron leaves wd_mult to its scheduler, which is not used here
        {"params": group["params"], "weight_decay": weight_decay * group.get("wd_mult", 1.0)}
        for group in optimizer.param_groups
    ]
    optimizer.optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
    return wrapped, optimizer
