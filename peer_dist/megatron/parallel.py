"""Who this rank is: Megatron's process groups, asked for once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from peer_dist.sharding import ExpertGroups
from peer_dist.sharding.transport import TRANSPORTS
from peer_dist.sharding.wire import WIRES


class MegatronMPU:
    """Megatron's groups as the ``mpu`` object that DeepSpeed asks; the rest is parallel_state's own."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(parallel_state, name)

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """Tensor x pipeline ranks: the group over which a gradient norm becomes global."""
        return parallel_state.get_model_parallel_group()

    def get_model_parallel_world_size(self) -> int:
        """Ranks of that group."""
        return dist.get_world_size(self.get_model_parallel_group())

    def get_model_parallel_rank(self) -> int:
        """This rank's place in that group."""
        return dist.get_rank(self.get_model_parallel_group())

    def get_data_parallel_group_ranks(self) -> list[int]:
        """The ranks that read different sequences for the same part of the model."""
        return dist.get_process_group_ranks(parallel_state.get_data_parallel_group())


@dataclass(frozen=True)
class Parallel:
    """The rank's place in every group. Build it with :meth:`initialize`.

    A group's size and rank come from the group, so that they cannot disagree with it. The ranks of
    ``experts`` hold one copy of the tables, a shard per rank; the expert data group holds the copies of one shard.
    """

    rank: int
    world_size: int
    device: torch.device
    tensor_group: dist.ProcessGroup
    pipeline_group: dist.ProcessGroup
    data_parallel_group: dist.ProcessGroup
    token_group: dist.ProcessGroup  # tensor x data: the ranks of a stage, which share its tokens
    virtual_pipeline_size: int
    experts: ExpertGroups
    expert_data_group: dist.ProcessGroup

    @classmethod
    def initialize(
        cls,
        tensor: int = 1,
        pipeline: int = 1,
        virtual_pipeline: int = 1,
        expert: int = 1,
        expert_tensor: int = 1,
        wire: str | None = None,
        transport: str = "all_to_all",
        seed: int = 1234,
        device: torch.device | None = None,
    ) -> Parallel:
        """Build Megatron's groups; a collective call.

        torch.distributed must be initialised and, on GPUs, ``torch.cuda.set_device`` called. Ranks that the
        arguments leave over replicate the model. ``wire`` is one of :data:`peer_dist.sharding.wire.WIRES`, in whose
        form tokens travel, and ``transport`` one of :data:`peer_dist.sharding.transport.TRANSPORTS`. ``seed`` starts
        dropout's random streams, which differ between data-parallel ranks and stages; weights have seeds of their own
        (:func:`build_model`).
        ``device`` is where the model will be: by default the current GPU, or the CPU where there is none; on ``meta``
        it has shapes and no memory.

        Raises:
            RuntimeError: torch.distributed is not initialised, or the groups exist already.
            ValueError: the sizes do not divide the number of ranks.
        """
        if not dist.is_initialized():
            raise RuntimeError("Parallel.initialize needs torch.distributed.init_process_group first")
        if parallel_state.model_parallel_is_initialized():
            raise RuntimeError("Megatron's groups exist already: call Parallel.destroy first")
        world_size = dist.get_world_size()
        for names, size in (
            ("tensor x pipeline", tensor * pipeline),
            ("expert x expert_tensor x pipeline", expert * expert_tensor * pipeline),
        ):
            if world_size % size:
                raise ValueError(f"{names} ({size}) must divide the number of ranks ({world_size})")
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            virtual_pipeline_model_parallel_size=virtual_pipeline if virtual_pipeline > 1 else None,
            expert_model_parallel_size=expert,
            expert_tensor_parallel_size=expert_tensor,
            create_gloo_process_groups=False,
        )
        # Groups of the same ranks are one here: NCCL would have a communicator for each.
        rows = domain = parallel_state.get_expert_tensor_and_model_parallel_group()
        columns = None
        if expert_tensor > 1:
            rows = parallel_state.get_expert_model_parallel_group()
            columns = parallel_state.get_expert_tensor_parallel_group()
        token_group = data_parallel_group = parallel_state.get_data_parallel_group()
        if tensor > 1:
            token_group = parallel_state.get_tensor_and_data_parallel_group()
        parallel = cls(
            rank=dist.get_rank(),
            world_size=world_size,
            device=device or _own_device(),
            tensor_group=parallel_state.get_tensor_model_parallel_group(),
            pipeline_group=parallel_state.get_pipeline_model_parallel_group(),
            data_parallel_group=data_parallel_group,
            token_group=token_group,
            virtual_pipeline_size=virtual_pipeline,
            experts=ExpertGroups(domain, rows, columns, WIRES[wire], TRANSPORTS[transport]()),
            expert_data_group=parallel_state.get_expert_data_parallel_group(),
        )
        parallel.seed_step(seed, 0)
        return parallel

    def seed_step(self, seed: int, step: int) -> None:
        """Start dropout's random streams of a step: functions of seed, step and place, so never saved."""
        # Far apart, because Megatron adds the tensor rank for the streams that differ between those; and none
        # of them `seed` itself, from which weights are drawn.
        stream = 1 + self.data_parallel_rank * self.pipeline_size + self.pipeline_rank
        mixed = (seed + 1_000_003 * step + 10_000_019 * stream) % 2**31
        tensor_parallel.model_parallel_cuda_manual_seed(mixed, force_reset_rng=True)

    def destroy(self) -> None:
        """End Megatron's groups, so that others can be built in this process. A collective call."""
        # Megatron itself only forgets them: each would keep its threads, and with nccl memory of the GPU
        groups = dict.fromkeys(value for value in vars(parallel_state).values() if isinstance(value, dist.ProcessGroup))
        parallel_state.destroy_model_parallel()
        for group in groups:
            if group is not dist.group.WORLD:
                dist.destroy_process_group(group)

    @property
    def mpu(self) -> MegatronMPU:
        """What ``deepspeed.initialize(mpu=...)`` takes."""
        return MegatronMPU()

    @property
    def tensor_size(self) -> int:
        """Tensor-parallel ranks."""
        return self.tensor_group.size()

    @property
    def pipeline_size(self) -> int:
        """Pipeline stages."""
        return self.pipeline_group.size()

    @property
    def pipeline_rank(self) -> int:
        """This rank's stage, from 0."""
        return self.pipeline_group.rank()

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank has the first layers."""
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank has the last layers."""
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def data_parallel_size(self) -> int:
        """Data-parallel ranks of a stage."""
        return self.data_parallel_group.size()

    @property
    def data_parallel_rank(self) -> int:
        """This rank's place among them."""
        return self.data_parallel_group.rank()

    @property
    def counts_losses(self) -> bool:
        """Whether this rank's losses count in sums over all ranks: of the last stage's, one tensor rank's do."""
        return self.is_last_stage and not self.tensor_group.rank()

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """On every rank, the sum over data-parallel ranks of what the last stage has. Collective; in place."""
        if not self.counts_losses:
            value.zero_()
        dist.all_reduce(value)
        return value

    def from_last_rank(self, value: torch.Tensor) -> torch.Tensor:
        """On every rank, what the last one has, which is on the last stage. Collective; in place."""
        dist.broadcast(value, src=self.world_size - 1)
        return value

    @property
    def expert_size(self) -> int:
        """Row shards of the tables."""
        return self.experts.rows.size()

    @property
    def expert_data_size(self) -> int:
        """Copies of this rank's shards of the tables."""
        return self.expert_data_group.size()

    @property
    def expert_data_rank(self) -> int:
        """Which of these copies this rank has."""
        return self.expert_data_group.rank()


def _own_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
