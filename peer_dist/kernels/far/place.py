"""Where the rows of tables lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from peer_dist.kernels import disk
from peer_dist.kernels.allocation import host_zeros


@dataclass(frozen=True)
class Place:
    """Where the rows of tables lie, and where they are computed with.

    Attributes:
        memory: ``host`` or ``disk``.
        device: of the kernels.
        cache_bytes: of memory near the kernels in which rows are kept that are picked often, for the tables of one
            layer and the states of their optimizer.
        folder: of scratch files on a local disk; None: :func:`peer_dist.kernels.disk.default_folder`.
        resident_bytes: of these files that the process keeps in memory, beside the cache, at most.
        fetch: how rows in host memory come to a GPU: ``direct``, read by a kernel over the bus; or ``copied``, put
            together by the CPU and sent in one piece, as those of a disk are in any case.
    """

    memory: str
    device: torch.device
    cache_bytes: int
    folder: Path | None = None
    resident_bytes: int = 1 << 30
    fetch: str = "direct"

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of rows there, filled with zeros; of the CPU for torch. Numbers that a row has one of, ``[rows]``,
        are in host memory always: on a disk they would cost a request each.

        Raises:
            OSError: the disk has no room for it, or the folder takes no file.
        """
        if self.memory == "disk" and len(shape) > 1:
            disk.let_resident(self.resident_bytes)
            return disk.mapped(shape, dtype, self.folder or disk.default_folder())
        return host_zeros(shape, dtype, pinned=self.device.type == "cuda")
