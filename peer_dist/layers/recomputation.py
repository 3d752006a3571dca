"""Activation recomputation: what a layer must not do twice."""

from __future__ import annotations

import torch


def is_recomputation() -> bool:
    """Whether this forward pass runs inside a backward pass, as every kind of checkpointing runs its second one."""
    return torch._C._current_graph_task_id() != -1
