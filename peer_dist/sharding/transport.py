"""What the exchange asks of the network, and who answers: :class:`AllToAll`, or :class:`Alone` in one process."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class Arrival:
    """An all-to-all under way. What it reads and writes stays alive until it has been waited for.

    Args:
        out: what it writes.
        sent: what it reads.
        work: what to wait for; None if ``out`` is written already, in the order of the current stream.
    """

    def __init__(self, out: Tensor, sent: Tensor, work: dist.Work | None = None) -> None:
        self._out, self._sent, self._work = out, [sent], work
        self._then: list[Callable[[Tensor], Tensor]] = []

    def then(self, change: Callable[[Tensor], Tensor]) -> Arrival:
        """Itself, of which :meth:`wait` gives what ``change`` makes of the rows received."""
        self._then.append(change)
        return self

    def wait(self) -> Tensor:
        """The rows received, ``[rows, ...]`` in order of the ranks that sent them; once.

        On a CPU the host waits for them; on a GPU the current stream does.
        """
        if self._work is not None:
            self._work.wait()
        self._sent.clear()
        out = self._out
        while self._then:
            out = self._then.pop(0)(out)
        return out


class Transport(ABC):
    """What the exchange asks of the network.

    All ranks of a group make the same calls in the same order. An implementation owes:

    - the order: what arrives lies in order of the ranks that sent it, and as each of them had it, bit for bit;
    - the overlap: :meth:`start` and what runs before :meth:`Arrival.wait` may run at the same time. It need not wait
      for the device, and ``wait`` is of the stream that is current then;
    - that nothing that was given to :meth:`start` is written before the wait, and ``out`` is not read before it;
    - ranks and messages of any size, none included.

    Another library (DeepEP, say) comes in as one more of these.
    """

    @abstractmethod
    def start(
        self, x: Tensor, send: Sequence[int], receive: Sequence[int], group: dist.ProcessGroup | None, out: Tensor
    ) -> Arrival:
        """Start an all-to-all.

        Args:
            x: ``[sum(send), ...]`` contiguous, what goes to each rank of the group, one after the other.
            send: how many rows go to each.
            receive: how many come from each.
            group: its ranks; None for this process alone.
            out: ``[sum(receive), ...]`` contiguous, to be written.
        """

    @abstractmethod
    def sum(self, value: Tensor, group: dist.ProcessGroup | None) -> None:
        """Make ``value`` the sum of the ranks' values, in place."""

    def counts(self, sent: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        """``sent [ranks, ...]``, a part for each rank -> the parts for this one, ``[ranks, ...]``, on the device."""
        sizes = [1] * len(sent)
        return self.start(sent.contiguous(), sizes, sizes, group, torch.empty_like(sent)).wait()


class AllToAll(Transport):
    """The collectives of torch.distributed: NCCL, gloo, or whatever a group was made with."""

    def start(
        self, x: Tensor, send: Sequence[int], receive: Sequence[int], group: dist.ProcessGroup | None, out: Tensor
    ) -> Arrival:
        """Asynchronous; on a GPU on NCCL's own stream."""
        work = dist.all_to_all_single(out, x, list(receive), list(send), group=group, async_op=True)
        return Arrival(out, x, work)

    def sum(self, value: Tensor, group: dist.ProcessGroup | None) -> None:
        """An all-reduce."""
        dist.all_reduce(value, group=group)


class Alone(Transport):
    """One process, which sends to itself: what the routed layer costs without a network."""

    def start(
        self, x: Tensor, send: Sequence[int], receive: Sequence[int], group: dist.ProcessGroup | None, out: Tensor
    ) -> Arrival:
        """A copy, as a network would make one."""
        return Arrival(out.copy_(x), x)

    def sum(self, value: Tensor, group: dist.ProcessGroup | None) -> None:
        """Nothing to do."""


ALL_TO_ALL, ALONE = AllToAll(), Alone()
