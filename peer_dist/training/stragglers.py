"""Which rank holds up the others: each one's own work, what it spends waiting left out."""

from __future__ import annotations

import socket
import statistics

import torch
import torch.distributed as dist

from peer_dist.megatron import Parallel
from peer_dist.ranks.rank_zero import from_every_rank

SLOW = 1.5  # times the median
_OWN = ("experts", "attention")  # spans without a collective call inside


class Stragglers:
    """Compares ranks over a window of steps. Construction is a collective call.

    A rank that waits for a slow one takes as long over a step as that one does, so only what it computes by itself
    counts: its experts' products and its attention. Ranks are compared within their pipeline stage, since stages
    have layers of different kinds.
    """

    def __init__(self, parallel: Parallel, columns: bool) -> None:
        self._device = parallel.device
        # Slices of columns add up their dot products in the middle of the experts' work.
        self._own = _OWN[1:] if columns else _OWN
        self._peers = from_every_rank((socket.gethostname(), parallel.pipeline_rank))
        self._steps: list[float] = []
        self._slow: set[int] = set()  # in the last window
        self._named: set[int] = set()

    def add(self, spent: dict[str, float]) -> None:
        """One step of this rank: seconds per span."""
        self._steps.append(sum(spent.get(name, 0.0) for name in self._own))

    def report(self) -> tuple[float, list[str]]:
        """The largest ratio of a rank to its stage's median since the last call, and a line for each rank that is slow
        for the second time in a row, unless that was told. A collective call."""
        # The median: one hiccup of the machine is no slow rank.
        own = statistics.median(self._steps) if self._steps else 0.0
        self._steps.clear()
        mine = torch.tensor([own], dtype=torch.float32, device=self._device)
        everyone = torch.empty(len(self._peers), dtype=torch.float32, device=self._device)
        dist.all_gather_into_tensor(everyone, mine)
        seconds = everyone.tolist()
        largest, slow = 1.0, {}
        for stage in {stage for _, stage in self._peers}:
            ranks = [rank for rank, peer in enumerate(self._peers) if peer[1] == stage]
            # The lower of two middle ones: of two ranks, the slow one is not half of its own yardstick.
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
