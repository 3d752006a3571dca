"""What the exchange asks of the network, and who answers: :class:`AllToAll`, or :class:`Alone` in one process."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Arrival:
    """An all-to-all under way. What it reads and writes stays alive until it has been waited for.

    Attributes:
        out: what it writes.

    Args:
        out: what it writes.
        sent: what it reads.
        work: what to wait for; None if ``out`` is written already, in the order of the current stream.
    """

    def __init__(self, out: Tensor, sent: Tensor, work: dist.Work | None = None) -> None:
        self.out, self._sent, self._work = out, [sent], work
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
        out = self.out
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

    Attributes:
        sizes_on_device: whether sizes are tensors, which the host never sees: then the exchange's shapes depend on the
            number of tokens alone (:mod:`peer_dist.sharding.fixed`). If not, they are lists.
    """

    sizes_on_device = False

    @abstractmethod
    def start(self, x: Tensor, send: Any, receive: Any, group: dist.ProcessGroup | None, out: Tensor) -> Arrival:
        """Start an all-to-all.

        Args:
            x: ``[sum(send), ...]`` contiguous, what goes to each rank of the group, one after the other. With sizes on
                the device it may be longer.
            send: how many rows go to each: a sequence of int, or ``[ranks]`` int64 on the device.
            receive: how many come from each, likewise.
            group: its ranks; None for this process alone.
            out: ``[sum(receive), ...]`` contiguous, to be written; with sizes on the device as ``x``, and what is
                beyond has no meaning.
        """

    @abstractmethod
    def sum(self, value: Tensor, group: dist.ProcessGroup | None) -> None:
        """Make ``value`` the sum of the ranks' values, in place."""

    def counts(self, sent: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        """``sent [ranks, ...]``, a part for each rank -> the parts for this one, ``[ranks, ...]``, on the device."""
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=group)
        return received


class AllToAll(Transport):
    """The collectives of torch.distributed: NCCL, gloo, or whatever a group was made with."""

    def start(self, x: Tensor, send: Any, receive: Any, group: dist.ProcessGroup | None, out: Tensor) -> Arrival:
        """Asynchronous; on a GPU on NCCL's own stream."""
        work = dist.all_to_all_single(out, x, list(receive), list(send), group=group, async_op=True)
        return Arrival(out, x, work)

    def sum(self, value: Tensor, group: dist.ProcessGroup | None) -> None:
        """An all-reduce."""
        dist.all_reduce(value, group=group)


class Alone(Transport):
    """One process, which sends to itself: what the routed layer costs without a network."""

    def __init__(self, sizes_on_device: bool = False) -> None:
        self.sizes_on_device = sizes_on_device

    def start(self, x: Tensor, send: Any, receive: Any, group: dist.ProcessGroup | None, out: Tensor) -> Arrival:
        """A copy, as a network would make one; of all there is room for, with sizes on the device."""
        rows = min(len(x), len(out))
        out[:rows].copy_(x[:rows])
        return Arrival(out, x)

    def counts(self, sent: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        """A copy."""
        return sent.clone()

    def sum(self, value: Tensor, group: dist.ProcessGroup | None) -> None:
        """Nothing to do."""


class SymmetricMemory(Transport):
    """The all-to-all of torch's symmetric memory (``torch.ops.symm_mem.all_to_all_vdev``, NVSHMEM): ranks read each
    other's buffers, and sizes stay on the device. Nobody has run it on GPUs yet.

    Rows are copied into a buffer that the other ranks can read, and from one that was read into: two copies more than
    the collectives need. Everything runs on the current stream. Buffers are made at the first call of a size and kept.
    NVSHMEM makes them in all ranks of the world together, not of the group alone: so every rank must have as many
    tokens, and none may wait for another outside of these calls, as stages of a pipeline do.

    The operator reads from the other ranks after a barrier at its beginning and has none at its end. What it reads may
    be written again once the next one has begun everywhere: two sets of buffers of a size take turns.

    Raises:
        ValueError: the ranks of a group are no power of two.
        RuntimeError: there is no NVSHMEM.
    """

    sizes_on_device = True
    # A message must divide evenly over the operator's blocks for a rank. There are as many as buffers have blocks of
    # this size, and at most 64 in all: so buffers have a power of two for each rank, and rows a multiple of 64 bytes.
    _block, _row = 65536, 64

    def __init__(self) -> None:
        if not self.available():
            raise RuntimeError(
                "symmetric memory needs GPUs and an installation of torch with NVSHMEM; use all_to_all as the transport"
            )
        self._memory = _torch_memory()
        self._memory.set_backend("NVSHMEM")
        self._buffers: dict[Any, list[tuple[Tensor, ...]]] = {}

    @staticmethod
    def available() -> bool:
        """Whether this torch has what it needs, and finds it on this machine."""
        try:
            asked = getattr(_torch_memory(), "is_nvshmem_available", None)
        except ImportError:
            asked = None
        return asked is not None and asked()  # neither is in every version

    def start(self, x: Tensor, send: Any, receive: Any, group: dist.ProcessGroup | None, out: Tensor) -> Arrival:
        """Written when the current stream has done what it was given until now."""
        assert group is not None
        row_bytes = x.element_size() * x.shape[1:].numel()
        padded = -(-row_bytes // self._row) * self._row
        if padded > self._block:
            raise ValueError(f"symmetric memory serves rows of up to {self._block} bytes, not {row_bytes}")
        source, target, splits, arrived = self._take(len(x) * padded, len(out) * padded, group, x.device)
        source, target = (whole[: len(whole) // padded * padded].view(-1, padded) for whole in (source, target))
        source[: len(x), :row_bytes].copy_(_bytes_of(x, row_bytes))
        splits.copy_(send)
        torch.ops.symm_mem.all_to_all_vdev(source, target, splits, arrived, group.group_name)
        _bytes_of(out, row_bytes).copy_(target[: len(out), :row_bytes])
        return Arrival(out, x)

    def sum(self, value: Tensor, group: dist.ProcessGroup | None) -> None:
        """An all-reduce."""
        dist.all_reduce(value, group=group)

    def _take(self, source: int, target: int, group: dist.ProcessGroup, device: torch.device) -> tuple[Tensor, ...]:
        """Buffers for so many bytes to send and to receive, with the sizes sent, and those received with offsets."""
        ranks = dist.get_world_size(group)
        if ranks & (ranks - 1):
            raise ValueError(f"symmetric memory serves a power of two of ranks, not {ranks}; use all_to_all")
        sizes = tuple(
            ranks * self._block << max(0, -(-size // (ranks * self._block)) - 1).bit_length()
            for size in (source, target)
        )
        key = group.group_name, *sizes, device
        if key not in self._buffers:
            self._buffers[key] = [
                (
                    *(self._memory.empty(size, dtype=torch.uint8, device=device) for size in sizes),
                    self._memory.empty(ranks, dtype=torch.int64, device=device),
                    self._memory.empty(2, ranks, dtype=torch.int64, device=device),
                )
                for _ in range(2)
            ]
        pair = self._buffers[key]
        pair.reverse()
        return pair[0]


def _torch_memory() -> Any:
    """Torch's symmetric memory: late, because the module is torch's own, and the layer is imported without it."""
    import torch.distributed._symmetric_memory

    return torch.distributed._symmetric_memory


def _bytes_of(rows: Tensor, row_bytes: int) -> Tensor:
    """``rows`` contiguous, as ``[rows, row_bytes]`` uint8."""
    return rows.view(-1).view(torch.uint8).view(len(rows), row_bytes)


ALL_TO_ALL, ALONE = AllToAll(), Alone()

TRANSPORTS: dict[str, Callable[[], Transport]] = {"all_to_all": lambda: ALL_TO_ALL, "symmetric_memory": SymmetricMemory}
"""By their names in a config."""
