"""Activation recomputation: what a layer must not do twice."""

from __future__ import annotations

import torch
from torch import Tensor

from peer_dist.kernels import operator


def is_recomputation() -> bool:
    """Whether this forward pass runs inside a backward pass, as every kind of checkpointing runs its second one.

    False while torch's compiler looks on, whose graph may serve either pass: see :func:`in_first_pass`.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


@operator("in_first_pass(Tensor x) -> Tensor", fake=lambda x: torch.empty((), dtype=torch.bool, device=x.device))
def in_first_pass(x: Tensor) -> Tensor:
    """Whether the pass is no recomputation, asked when the graph runs: a bool ``[]`` on ``x``'s device."""
    return torch.full((), torch._C._current_graph_task_id() == -1, dtype=torch.bool, device=x.device)
