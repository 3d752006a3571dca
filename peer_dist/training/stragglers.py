"""Finds ranks that hold up the others, by the time of their own work without waiting."""

from __future__ import annotations

import socket
import statistics

import torch
import torch.distributed as dist

from peer_dist.megatron import Parallel
from peer_dist.ranks.rank_zero import from_every_rank

SLOW = 1.5  # a rank that takes this many times the median is slow
_OWN = ("experts", "attention")  # spans without a collective call inside


class Stragglers:
    """Compares the ranks' times over a window of steps. All ranks construct it together.

    A rank that waits for a slow one takes as long over a step as that one does, so only what it computes by itself
    counts: its experts' products and its attention. Ranks are compared within their pipeline stage, since stages
    have layers of different kinds.

    Args:
        columns: whether the experts' tables are sharded by columns too.
    """

    def __init__(self, parallel: Parallel, columns: bool) -> None:
        self._device = parallel.device
        # with column shards the experts' span has a collective inside, which adds up partial dot products
        self._own = _OWN[1:] if columns else _OWN
        self._peers = from_every_rank((socket.gethostname(), parallel.pipeline_rank))
        self._steps: list[float] = []
        self._slow: set[int] = set()  # ranks that were slow in the last window
        self._named: set[int] = set()  # ranks that have been reported, and have been slow ever since

    def add(self, spent: dict[str, float]) -> None:
        """Add one step of this rank: seconds by span."""
        self._steps.append(sum(spent.get(name, 0.0) for name in self._own))

    def report(self) -> tuple[float, list[str]]:
        """Compare the ranks' median times since the last call. A collective call.

        Returns:
            The largest ratio of a rank's time to the median of its pipeline stage, at least 1; and a line for each rank
            that is slow for the second time in a row and has not been reported for that.
        """
        # the median of the steps: one hiccup of the machine makes no rank slow
        own = statistics.median(self._steps) if self._steps else 0.0
        self._steps.clear()
        mine = torch.tensor([own], dtype=torch.float32, device=self._device)
        everyone = torch.empty(len(self._peers), dtype=torch.float32, device=self._device)
        dist.all_gather_into_tensor(everyone, mine)
        seconds = everyone.tolist()
        largest, slow = 1.0, {}
        for stage in {stage for _, stage in self._peers}:
            ranks = [rank for rank, peer in enumerate(self._peers) if peer[1] == stage]
            # median_low: of two ranks the slow one is compared with the fast one, not with the mean of both
            usual = statistics.median_low([seconds[rank] for rank in ranks])
            for rank in ranks:
                ratio = seconds[rank] / usual if usual > 0 else 1.0
                largest = max(largest, ratio)
                if ratio > SLOW:
                    slow[rank] = ratio
        lines = [
            f"slow rank: {rank} on {self._peers[rank][0]} computes {ratio:.1f} times as long as the others "
            f"({seconds[rank] * 1e3:.1f} ms a step)"
            for rank, ratio in sorted(slow.items())
            if rank in self._slow - self._named
        ]
        self._named = (self._named | self._slow) & set(slow)
        self._slow = set(slow)
        return largest, lines
