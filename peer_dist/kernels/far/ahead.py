"""What a step will need from a disk, read while the backward pass goes on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peer_dist.kernels import disk
from peer_dist.kernels.allocation import gradient_memory
from peer_dist.kernels.far.background import Job


@dataclass
class _Progress:
    ready: int = 0
    stopped: bool = False


class Ahead:
    """The optimizer's states of the first of some rows, as many as fit, as far as they were read before the step began.

    They are read by the thread that also steps, so that the step finds it done or stopped. An error ends it; the step
    meets the same one where it reads the rest.

    Args:
        tables: of each table of a pool what lies on a disk beside what kernels read, ``[rows, columns]`` each, by name.
        rows: ``[n]`` int64 ascending, near the kernels.
        most: bytes.
        block: rows that are read at a time, as many as are stepped at a time.
        device: of the kernels.
    """

    def __init__(
        self, tables: Sequence[Mapping[str, Tensor]], rows: Tensor, most: int, block: int, device: torch.device
    ) -> None:
        width = sum(far.shape[1] * far.element_size() for parts in tables for far in parts.values())
        fit = most // max(width, 1)
        count = len(rows) if len(rows) <= fit else fit // block * block
        self._parts = [
            {part: gradient_memory(count, far.shape[1], far.dtype) for part, far in parts.items()} for parts in tables
        ]
        self._progress = progress = _Progress()
        into = self._parts  # the thread does not refer to this object, which refers to its job

        def read() -> None:
            numbers = rows[:count].to("cpu")
            for begin in range(0, count, block):
                some = numbers[begin : begin + block]
                for parts, near in zip(tables, into):
                    for part, far in parts.items():
                        if progress.stopped:
                            return
                        disk.read_rows(far, some, near[part][begin : begin + len(some)])
                progress.ready = begin + len(some)

        self._job = Job(read, device)

    @property
    def ready(self) -> int:
        """How many of the rows were read."""
        return self._progress.ready

    def stop(self) -> None:
        """Read no more than what is being read."""
        self._progress.stopped = True

    def drop(self) -> None:
        """Have nothing under way that reads."""
        self.stop()
        self._job.settle()

    def take(self, number: int, part: str, begin: int, end: int) -> Tensor | None:
        """A table's part of these of the rows, to be written over; None if not all of them were read."""
        values = self._parts[number].get(part)
        return values[begin:end] if values is not None and end <= self.ready else None

    def tensors(self) -> Iterator[Tensor]:
        """The memory that it has."""
        for parts in self._parts:
            yield from parts.values()
