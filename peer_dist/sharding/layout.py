"""Who owns which expert."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class RowLayout:
    """Contiguous row shards of ``num_experts`` rows over ``shards`` ranks; sizes differ by at most one.

    Attributes:
        group: the process group of the owners, in shard order; None for one process.
    """

    num_experts: int
    group: dist.ProcessGroup | None = None

    @property
    def shards(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def shard(self) -> int:
        """This rank's shard number."""
        return 0 if self.group is None else dist.get_rank(self.group)

    def first_row(self, shard: int) -> int:
        """The first global row of a shard; of ``shards`` itself, ``num_experts``."""
        return self.num_experts * shard // self.shards

    @property
    def rows(self) -> range:
        """This rank's global rows."""
        return range(self.first_row(self.shard), self.first_row(self.shard + 1))

    def first_rows(self, device: torch.device) -> Tensor:
        """``[shards]`` int64: the first global row of every shard."""
        return torch.tensor([self.first_row(shard) for shard in range(self.shards)], device=device)
