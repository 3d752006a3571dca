"""Activation recomputation: what a layer must not do twice."""

from __future__ import annotations

import torch


def is_recomputation() -> bool:
    """Whether this forward pass runs inside a backward pass, as every kind of checkpointing runs its second one."""
    if torch.compiler.is_compiling():
        return False  # the compiler recomputes within its graph, without the side effects
    return torch._C._current_graph_task_id() != -1
