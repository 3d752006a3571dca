"""Calls by which ranks share results and errors, so that all of them go on or all of them raise the same error.

A rank that raises alone leaves the others waiting in their next collective call. So whatever one rank alone does or
learns (mostly from the file system) is sent to all before any of them goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

Value = TypeVar("Value")


def on_rank_zero(action: Callable[[], Value], raises: type[Exception]) -> Value:
    """Call ``action`` on rank 0 alone, and return its result on every rank. A collective call.

    Without a process group this process is rank 0.

    Args:
        action: what rank 0 does; its result must be one that can be pickled.
        raises: the error by which ``action`` says that it failed. It must be made from its message alone.

    Raises:
        Exception: ``raises``, on every rank with the same message, if ``action`` raised it. Any other error is a
            mistake in the program: it ends rank 0, and the watchdog the others.
    """
    grouped = dist.is_available() and dist.is_initialized()
    outcome: list[Any] = [None, None]
    cause = None
    if not grouped or dist.get_rank() == 0:
        try:
            outcome = [action(), None]
        except raises as error:
            outcome, cause = [None, str(error)], error
    if grouped:
        dist.broadcast_object_list(outcome)
    result, problem = outcome
    if problem is not None:
        raise raises(problem) from cause
    return result


def from_every_rank(value: Value, group: dist.ProcessGroup | None = None) -> list[Value]:
    """The ``value`` of each rank of ``group`` (default: all ranks), in the order of the ranks. A collective call.

    Args:
        value: this rank's; it can be pickled.
    """
    values: list[Value] = [value] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def first_problem(problem: str | None) -> str | None:
    """The problem of the lowest rank that has one, on every rank; None if no rank has one. A collective call."""
    return next((other for other in from_every_rank(problem) if other is not None), None)
