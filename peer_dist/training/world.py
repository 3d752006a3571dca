"""Joining the other ranks: from torchrun's variables, or alone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


class WorldError(RuntimeError):
    """The ranks that were started do not fit the machine; the message says what to change."""


@dataclass(frozen=True)
class World:
    """This process among those that were started together."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @classmethod
    def from_environment(cls) -> World:
        """As torchrun says, else a world of one.

        Raises:
            WorldError: several processes were started by something else, and each would be a world of its own.
        """
        if "RANK" not in os.environ:
            for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"):
                if int(os.environ.get(name, "1")) > 1:
                    raise WorldError(
                        f"{os.environ[name]} processes were started ({name}) but not by torchrun, the only launcher "
                        "understood so far; start one torchrun per node"
                    )
            return cls(0, 1, 0, 1)
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        return cls(rank, size, int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1)))

    def join(self) -> None:
        """Choose the device and start torch.distributed: nccl with a GPU per rank, gloo without GPUs.

        Raises:
            WorldError: fewer GPUs than ranks on this machine.
        """
        # without it Megatron's sums over tensor ranks do not overlap its products; read when CUDA starts
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        if torch.cuda.is_available():
            gpus = torch.cuda.device_count()
            if self.local_rank >= gpus:
                raise WorldError(
                    f"rank {self.rank}: {self.local_world_size} ranks were started on a machine with {gpus} GPU(s); "
                    "start one rank per GPU, or hide the GPUs with CUDA_VISIBLE_DEVICES="
                )
            torch.cuda.set_device(self.local_rank)
            backend = "nccl"
        else:
            backend = "gloo"
            if self.local_world_size > 1 and os.environ.get("OMP_NUM_THREADS") == "1":
                # torchrun sets it, whatever the machine has
                torch.set_num_threads(max(1, _cores() // self.local_world_size))
        if self.world_size == 1 and "RANK" not in os.environ:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        else:
            # long enough for rank 0 to index a large data set while the others wait
            dist.init_process_group(backend, timeout=timedelta(minutes=30))

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        """:meth:`join`, and leave at the end."""
        self.join()
        try:
            yield
        finally:
            dist.destroy_process_group()


def _cores() -> int:
    """Those that this process may use; not every system says."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
