"""Builds the parts of a run that its config describes: the groups of ranks, the dtype and the engine."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from peer_dist.config import Config, ConfigError
from peer_dist.engines import DenseAdam, Engine
from peer_dist.engines.replicated import ReplicatedEngine
from peer_dist.engines.zero import ZeroEngine
from peer_dist.megatron import Parallel, shards_of
from peer_dist.optim import TableOptimizer, TableRule
from peer_dist.sharding.transport import SymmetricMemory


def join_groups(config: Config, device: torch.device | None = None) -> Parallel:
    """Make Megatron's groups of ranks in the config's layout. A collective call.

    Args:
        config: the run's config.
        device: this rank's device; see :meth:`peer_dist.megatron.Parallel.initialize`.

    Raises:
        ConfigError: the transport is none that these machines have.
    """
    if config.parallel.transport == "symmetric_memory" and not SymmetricMemory.available():
        raise ConfigError(
            "parallel.transport: symmetric_memory needs GPUs and an installation of torch with NVSHMEM, which are not "
            "here; set it to all_to_all"
        )
    layout = config.parallel.model_dump(exclude={"sequence", "batch_p2p"})
    layout["expert"] = config.parallel.expert_rows(dist.get_world_size())
    return Parallel.initialize(**layout, seed=config.train.seed, device=device)


def dtype_of(config: Config, device_type: str) -> torch.dtype:
    """The dtype of dense parameters and activations on a device of this type."""
    if config.train.precision == "auto":
        return torch.bfloat16 if device_type == "cuda" else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[config.train.precision]


def make_engine(config: Config, model: nn.ModuleList, parallel: Parallel, dtype: torch.dtype) -> Engine:
    """Make the engine that updates the model's parameters. A collective call.

    Args:
        config: the run's config.
        model: from :func:`peer_dist.megatron.build_model`, its shards released.
        parallel: from :func:`join_groups`.
        dtype: the dtype that the model was built with.
    """
    shards, table, dense = shards_of(model), config.table_optimizer, config.optimizer
    copies, data_parallel = parallel.expert_data_group, parallel.data_parallel_size
    tables = TableOptimizer(
        {name: shard.parameter for name, shard in shards.items() if shard.table},
        TableRule(
            table.name,
            table.lr,
            table.betas,
            table.eps,
            table.weight_decay,
            table.lazy,
            config.train.seed if table.stochastic_rounding else None,
        ),
        config.model.hidden_size,
        columns=parallel.experts.columns,
        copies=copies,
        data_parallel_size=data_parallel,
        offsets={name: shard.offset for name, shard in shards.items()},
        one_pass=config.train.global_batch_size == config.train.micro_batch_size * data_parallel
        and all(len(pool) == 1 for pool in config.pools),
    )
    experts = None
    if any(kind.experts(config) for kind in config.kinds):
        experts = TableOptimizer(
            {name: shard.parameter for name, shard in shards.items() if not shard.table},
            TableRule("adam", dense.lr, dense.betas, dense.eps, dense.weight_decay),
            config.model.hidden_size,
            copies=copies,
            data_parallel_size=data_parallel,
        )
    adam = DenseAdam(dense.lr, dense.betas, dense.eps, dense.weight_decay, dense.grad_clip)
    if config.zero.stage == 0:
        return ReplicatedEngine(model, tables, experts, adam, parallel)
    return ZeroEngine(
        model,
        tables,
        experts,
        adam,
        stage=config.zero.stage,
        offload=config.zero.offload,
        mpu=parallel.mpu,
        dtype=dtype,
    )
