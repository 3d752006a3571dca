"""Sums of gradients that are no data parallelism's: over tensor ranks, and between the two ends of the pipeline."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn


def finalize_gradients(chunks: list[Any], *_: Any, **__: Any) -> None:
    """Called by the schedule once a step, after the last backward pass and before the data-parallel reduction.

    - Parameters marked ``sequence_parallel`` are whole on every tensor rank, each of which saw its own tokens only.
    - A tied embedding has a copy on the first and on the last stage.
    - What all routers share has a copy in each chunk of each stage.
    """
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        marked = [p for chunk in chunks for p in chunk.parameters() if getattr(p, "sequence_parallel", False)]
        _sum_over(parallel_state.get_tensor_model_parallel_group(), marked)
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        # pre_process and post_process: the chunks with the embedding and with the output layer
        tied = [c for c in chunks if c.share_embeddings_and_output_weights and (c.pre_process or c.post_process)]
        _sum_over(parallel_state.get_embedding_group(False), [c.shared_embedding_or_output_weight() for c in tied])
        cores = [list(chunk.router_core.parameters()) for chunk in chunks if hasattr(chunk, "router_core")]
        for copies in zip(*cores):  # of one parameter, on this rank
            total = torch.stack([_grad(copy) for copy in copies]).sum(0)
            for copy in copies:
                _grad(copy).copy_(total)
        _sum_over(parallel_state.get_pipeline_model_parallel_group(), [copy for copies in cores for copy in copies])


def _sum_over(group: dist.ProcessGroup | None, parameters: Iterable[nn.Parameter]) -> None:
    """All-reduce the gradients as one message."""
    grads = [_grad(p) for p in parameters]
    if not grads:
        return
    flat = torch._utils._flatten_dense_tensors(grads)
    dist.all_reduce(flat, group=group)
    for grad, total in zip(grads, torch._utils._unflatten_dense_tensors(flat, grads)):
        grad.copy_(total)


def _grad(parameter: nn.Parameter) -> Tensor:
    """Where this step's gradient is: in Megatron's DDP buffer, if there is one."""
    if hasattr(parameter, "main_grad"):
        return parameter.main_grad
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
