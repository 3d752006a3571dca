"""A model and its engine as the sharded tensors that a checkpoint holds, and how they are restored from one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from peer_dist.engines import PARTS, Engine
from peer_dist.engines.revival import Revival
from peer_dist.kernels.far import far_rows_of
from peer_dist.megatron import Parallel, shards_of
from peer_dist.megatron.dist_checkpoint import (
    Reading,
    Sharded,
    State,
    blocks_of,
    dense_sharded_state,
    held_once,
    is_copy,
    table_shard,
    unfilled,
)
from peer_dist.sharding.held import flush, write_values


def weights_state(model: Any, parallel: Parallel) -> State:
    """The model's parameters, buffers and shards, as sharded tensors that share their memory.

    Tables of eight bits have none of their own there: they are written, and read by :func:`_read_codes`, in blocks.
    """
    tables: State = {}
    for name, shard in shards_of(model).items():
        flush(shard.parameter)
        tables[name] = table_shard(
            f"tables.{name}",
            shard.parameter,
            shard.offset,
            shard.shape,
            parallel.expert_data_rank,
            far_rows_of(shard.parameter) is not None,
        )
    return {"model": dense_sharded_state(model), "tables": tables}


def run_state(model: Any, engine: Engine, parallel: Parallel, revival: Revival | None = None) -> State:
    """Everything that training goes on from, as sharded tensors. A collective call.

    The engine gathers one tensor of the dense optimizer after the other, and each data parallel rank keeps an even
    share of them in host memory: those that it writes.
    """
    state, trained = _state_in_place(model, engine, parallel, revival)
    state["optimizer"] = {}
    loads = [0] * parallel.data_parallel_size  # bytes that each data parallel rank writes
    for name, part, value in engine.dense_state():
        param, writer = trained[name], loads.index(min(loads))
        loads[writer] += value.nbytes
        if writer != parallel.data_parallel_rank or is_copy(param):
            continue
        value = value.cpu()
        state["optimizer"][f"{name}.{part}"] = held_once(param, value, _optimizer_key(param, part))
        if part == "master":
            state["model"][name] = held_once(param, value.to(param.data.dtype), param.key)
    return state


def _state_in_place(
    model: Any, engine: Engine, parallel: Parallel, revival: Revival | None
) -> tuple[State, dict[str, Sharded]]:
    """The part of the state whose memory lies on this rank, and the engine's parameters by name, without memory."""
    with engine.whole_shapes():
        state = weights_state(model, parallel)
        params = {name: state["model"].pop(name) for name in engine.parameters}
        trained = {name: unfilled(param, param.key, param.data.dtype) for name, param in params.items()}
    shards = shards_of(model)
    state["table_optimizer"] = {}
    for name, part, value in _shard_states(engine):
        shard, copy = shards[name], parallel.expert_data_rank
        if value.dim() == 1 and shard.column_shard:  # one number per row: every column shard has it
            copy += parallel.world_size
        offset, shape = shard.offset[: value.dim()], shard.shape[: value.dim()]
        key = f"optimizer.{part}.tables.{name}"
        far = far_rows_of(shard.parameter) is not None
        state["table_optimizer"][f"{name}.{part}"] = table_shard(key, value, offset, shape, copy, far)
    state["revival"] = {
        name: table_shard(f"revival.{name}", use, (0, 0, 0), tuple(use.shape), parallel.token_group.rank())
        for name, use in (revival.state() if revival is not None else ())
    }
    return state, trained


def _optimizer_key(param: Sharded, part: str) -> str:
    """The key in the checkpoint of a parameter's master weights or one of its moments."""
    return f"optimizer.{part}.{param.key}"


def _shard_states(engine: Engine) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Name of the shard, part of the state, and its tensor, for all of the tables' optimizers."""
    for optimizer in engine.shard_optimizers:
        yield from optimizer.state()


@torch.no_grad()
def restore_weights(path: Path, model: Any, parallel: Parallel, skip: tuple[str, ...] = ()) -> None:
    """Replace the model's weights by a checkpoint's; optimizers are not read. A collective call.

    Args:
        path: of the checkpoint, written in any layout.
        skip: beginnings of keys that are left as they are.

    Raises:
        CheckpointError: on every rank, if a tensor is missing or of another shape, or a file is damaged.
    """
    state = {
        part: {name: value for name, value in values.items() if not value.key.startswith(skip)}
        for part, values in weights_state(model, parallel).items()
    }
    reading = Reading(state, path, partial=True)
    _copy_weights(reading.read(_in_place(state)), model)
    _read_codes(reading, state, model)


@torch.no_grad()
def restore_run(
    path: Path, model: Any, engine: Engine, parallel: Parallel, step: int, revival: Revival | None = None
) -> None:
    """Load weights, tables, both optimizers, and what the next revival decides by. A collective call.

    Args:
        path: of the checkpoint, written in any layout.
        step: number of updates that were applied before the checkpoint, which the engine continues to count.

    Raises:
        CheckpointError: on every rank, if a tensor is missing, unknown or of another shape, or a file is damaged.
    """
    state, trained = _state_in_place(model, engine, parallel, revival)
    dense = {
        (name, part): unfilled(param, _optimizer_key(param, part), torch.float32)
        for name, param in trained.items()
        for part in PARTS
    }
    reading = Reading({**state, "trained": trained, "optimizer": dense}, path)
    loaded = reading.read(_in_place(state))
    _copy_weights(loaded, model)
    _read_codes(reading, state, model)
    for name, part, value in _shard_states(engine):
        _copy(value, loaded["table_optimizer"][f"{name}.{part}"])
    for name, use in revival.state() if revival is not None else ():
        _copy(use, loaded["revival"][name])
    for (name, part), value in reading.stream(dense, parallel.device):  # a parameter comes as its master
        engine.load_dense_state(name, part, value)
    engine.steps = step


def _in_place(state: State) -> State:
    """The part of a state that is read into the memory of its tensors."""
    return {**state, "tables": {name: shard for name, shard in state["tables"].items() if shard.codes is None}}


def _read_codes(reading: Reading, state: State, model: Any) -> None:
    """Read the tables of eight bits, and round them to the nearest, a block of rows at a time. A collective call."""
    shards = shards_of(model)
    part: dict[tuple[str, int], Sharded] = {}
    for name, table in state["tables"].items():
        if table.codes is not None:
            whole = dataclasses.replace(table, data=table.data.float(), dtype=torch.float32, codes=None)
            part |= {(name, rows.start or 0): block for rows, block in blocks_of(whole)}
    for (name, begin), values in reading.stream(part, torch.device("cpu")):
        write_values(shards[name].parameter, slice(begin, begin + len(values)), values)


def _copy(target: torch.Tensor, value: torch.Tensor) -> None:
    """Copy a loaded value, unless it was read into the target's memory."""
    if target.data_ptr() != value.data_ptr():
        target.copy_(value)


def _copy_weights(loaded: State, model: Any) -> None:
    """Copy the loaded parameters, buffers and table shards into the model."""
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, value in loaded["model"].items():
        _copy(own[name], value)
    shards = shards_of(model)
    for name, value in loaded["tables"].items():
        _copy(shards[name].parameter, value)
