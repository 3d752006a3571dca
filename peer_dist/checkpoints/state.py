"""What a checkpoint holds of a model and its engine, as sharded tensors, and how it is put back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from peer_dist.engines import PARTS, Engine
from peer_dist.engines.revival import Revival
from peer_dist.megatron import Parallel, shards_of
from peer_dist.megatron.dist_checkpoint import (
    Reading,
    Sharded,
    State,
    dense_sharded_state,
    held_once,
    is_copy,
    load,
    table_shard,
    unfilled,
)


def weights_state(model: Any, parallel: Parallel) -> State:
    """The model's parameters, buffers and shards, as sharded tensors over their own memory."""
    tables = {
        name: table_shard(
            f"tables.{name}", shard.parameter.detach(), shard.offset, shard.shape, parallel.expert_data_rank
        )
        for name, shard in shards_of(model).items()
    }
    return {"model": dense_sharded_state(model), "tables": tables}


def run_state(model: Any, engine: Engine, parallel: Parallel, revival: Revival | None = None) -> State:
    """Everything that training goes on from. A collective call.

    The engine puts together one dense tensor after the other, and the data parallel ranks keep an even share of them
    each, in host memory: what they write.
    """
    state, trained = _state_in_place(model, engine, parallel, revival)
    state["optimizer"] = {}
    given = [0] * parallel.data_parallel_size
    for name, part, value in engine.dense_state():
        param, writer = trained[name], given.index(min(given))
        given[writer] += value.nbytes
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
    """What this rank has the whole of, over its own memory, and, without memory, the engine's parameters, by name."""
    with engine.whole_shapes():
        state = weights_state(model, parallel)
        params = {name: state["model"].pop(name) for name in engine.parameters}
        trained = {name: unfilled(param, param.key, param.data.dtype) for name, param in params.items()}
    shards = shards_of(model)
    state["table_optimizer"] = {}
    for name, part, value in _shard_states(engine):
        shard, copy = shards[name], parallel.expert_data_rank
        if value.dim() == 1 and shard.column_shard:  # a number a row: every column shard has it
            copy += parallel.world_size
        offset, shape = shard.offset[: value.dim()], shard.shape[: value.dim()]
        key = f"optimizer.{part}.tables.{name}"
        state["table_optimizer"][f"{name}.{part}"] = table_shard(key, value, offset, shape, copy)
    state["revival"] = {
        name: table_shard(f"revival.{name}", use, (0, 0, 0), tuple(use.shape), parallel.token_group.rank())
        for name, use in (revival.state() if revival is not None else ())
    }
    return state, trained


def _optimizer_key(param: Sharded, part: str) -> str:
    return f"optimizer.{part}.{param.key}"


def _shard_states(engine: Engine) -> Iterator[tuple[str, str, torch.Tensor]]:
    for optimizer in engine.shard_optimizers:
        yield from optimizer.state()


@torch.no_grad()
def restore_weights(path: Path, model: Any, parallel: Parallel, skip: tuple[str, ...] = ()) -> None:
    """Replace the model's weights by a checkpoint's; its optimizers are not read.

    Args:
        skip: beginnings of keys that are left as they are.
    """
    state = {
        part: {name: value for name, value in values.items() if not value.key.startswith(skip)}
        for part, values in weights_state(model, parallel).items()
    }
    _copy_weights(load(state, path, partial=True), model)


@torch.no_grad()
def restore_run(
    path: Path, model: Any, engine: Engine, parallel: Parallel, step: int, revival: Revival | None = None
) -> None:
    """Continue from a checkpoint: weights, tables, both optimizers, and what the next revival decides by."""
    state, trained = _state_in_place(model, engine, parallel, revival)
    dense = {
        (name, part): unfilled(param, _optimizer_key(param, part), torch.float32)
        for name, param in trained.items()
        for part in PARTS
    }
    reading = Reading({**state, "trained": trained, "optimizer": dense}, path)
    loaded = reading.read(state)
    _copy_weights(loaded, model)
    for name, part, value in _shard_states(engine):
        _copy(value, loaded["table_optimizer"][f"{name}.{part}"])
    for name, use in revival.state() if revival is not None else ():
        _copy(use, loaded["revival"][name])
    for (name, part), value in reading.stream(dense, parallel.device):  # a parameter comes as its master
        engine.load_dense_state(name, part, value)
    engine.steps = step


def _copy(target: torch.Tensor, value: torch.Tensor) -> None:
    if target.data_ptr() != value.data_ptr():
        target.copy_(value)


def _copy_weights(loaded: State, model: Any) -> None:
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, value in loaded["model"].items():
        _copy(own[name], value)
    shards = shards_of(model)
    for name, value in loaded["tables"].items():
        _copy(shards[name].parameter, value)
