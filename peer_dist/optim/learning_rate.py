"""The learning rate over a run."""

from __future__ import annotations

import math


def learning_rate_factor(step: int, warmup_steps: int, decay_steps: int, min_ratio: float) -> float:
    """Share of the peak learning rate for step ``step`` (from 0): linear warm-up, cosine, then the floor.

    It does not know how long the run is, so that a longer run has the same schedule.

    Args:
        step: number of the step, from 0.
        warmup_steps: steps of the linear warm-up; 0 for none.
        decay_steps: the step at which the cosine ends; more than ``warmup_steps``.
        min_ratio: the floor, from 0 to 1.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / (decay_steps - warmup_steps))
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
