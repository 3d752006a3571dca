"""A run's checkpoints: each complete or absent, verified on load, the newest kept.

A checkpoint is the folder ``step-00000123``: Megatron's sharded tensors (model, expert tables, both
optimizers), ``tokenizer.json`` and ``manifest.json``, which holds the step, the data position, the config,
the versions, and the size and checksum of every other file. It is written under a name that starts with a dot
and renamed when every byte is on disk. One that was damaged later is refused by name, and never deleted. The
schedule, the data order and the random streams are functions of the step and the seed, so these two are all
there is to save of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from peer_dist.config import Config
from peer_dist.config.schema import MLP_SECTIONS
from peer_dist.data.prepare import read_prepared
from peer_dist.megatron import CheckpointError, Parallel, shards_of
from peer_dist.megatron.checkpoint import (
    Reading,
    Sharded,
    State,
    Written,
    dense_sharded_state,
    held_once,
    is_copy,
    load,
    save,
    table_shard,
    unfilled,
)
from peer_dist.optim import PARTS, Engine
from peer_dist.training.revival import Revival

MANIFEST = "manifest.json"
Result = TypeVar("Result")
# of a manifest written before it had a checksum of its own
_BEFORE_CHECKSUMS = {"step", "updates", "sequences", "config", "data", "dtype", "versions", "files"}
_NAME = re.compile(r"step-(\d{8,})")


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


class DamagedError(CheckpointError):
    """A file of a checkpoint is missing, or not what was written; the message names it. The same on every rank."""


class CheckpointStore:
    """The checkpoints of one run, in one folder."""

    def __init__(self, folder: str | os.PathLike[str], keep: int = 2) -> None:
        self.folder, self.keep = Path(folder), keep
        self._unfinished: _Unfinished | None = None

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        if not self.folder.is_dir():
            return []
        found = (_NAME.fullmatch(entry.name) for entry in self.folder.iterdir() if (entry / MANIFEST).is_file())
        return sorted(int(match.group(1)) for match in found if match)

    def agreed_steps(self) -> list[int]:
        """:meth:`steps` as rank 0 sees them: on a network file system others may see an older listing."""
        return _from_rank_zero(self.steps)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def newest(self, fall_back: bool, say: Callable[[str], None]) -> int | None:
        """The step to go on from, its checkpoint verified; None if there is none. A collective call.

        Args:
            fall_back: set a damaged one aside, as ``step-NNNNNNNN.damaged``, and take the newest that is intact.
            say: told of it, on every rank.

        Raises:
            DamagedError: the newest is damaged, and ``fall_back`` is not set or no other is there.
        """
        while steps := _from_rank_zero(self.candidates):
            path = self.path(steps[-1])
            damage = _damage(path)
            if damage is None:
                return steps[-1]
            if len(steps) == 1:
                raise DamagedError(
                    f"{damage}; {self.folder} has no other checkpoint: restore the file, or choose another "
                    "checkpoint.dir"
                )
            if not fall_back:
                raise DamagedError(
                    f"{damage}; restore the file, or go on from {self.path(steps[-2]).name} with "
                    f"checkpoint.fall_back=true, which keeps this one as {path.name}.damaged"
                )
            kept = _from_rank_zero(partial(_set_aside, path))
            say(f"{damage}; it is kept as {kept}, and the run goes on from the newest that is intact")
        return None

    def candidates(self) -> list[int]:
        """:meth:`steps`, and newer ones that have lost their manifest: without it no folder gets its name."""
        complete = self.steps()
        if not self.folder.is_dir():
            return complete
        found = (
            _NAME.fullmatch(entry.name) for entry in self.folder.iterdir() if entry.is_dir() and any(entry.iterdir())
        )
        return complete + sorted(
            int(match.group(1)) for match in found if match and int(match.group(1)) > max(complete, default=-1)
        )

    def save(self, step: int, state: State, info: dict[str, Any], tokenizer: Any, wait: bool = True) -> Path:
        """Write a checkpoint; all ranks call it.

        It returns when the checkpoint is complete or, without ``wait``, as soon as the state may change: a thread of
        each rank writes a copy of its tensors, and :meth:`finish` makes it a checkpoint.

        Raises:
            CheckpointError: it could not be written; no complete checkpoint was touched.
        """
        self.finish()
        partial = self.folder / f".step-{step:08d}.partial"

        def begin() -> None:
            for left in self.folder.glob(".step-*"):  # by runs that were killed
                shutil.rmtree(left, ignore_errors=True)
            partial.mkdir(parents=True)

        _from_rank_zero(begin)
        written = save(state, partial, in_memory=not wait)
        _from_rank_zero(lambda: tokenizer.save(partial / "tokenizer.json"))
        self._unfinished = _Unfinished(partial, self.path(step), {"step": step, **info}, _Writer(partial, written))
        if wait:
            self.finish()
        return self.path(step)

    @property
    def unfinished(self) -> bool:
        """Whether :meth:`finish` has something to do; the same on every rank."""
        return self._unfinished is not None

    @property
    def writing(self) -> bool:
        """Whether this rank's thread is at work."""
        return self._unfinished is not None and self._unfinished.writer.is_alive()

    def finish(self) -> None:
        """Wait for the save under way, if there is one, and make it a checkpoint; all ranks call it.

        Raises:
            CheckpointError: as :meth:`save` does.
        """
        if self._unfinished is None:
            return
        save, self._unfinished = self._unfinished, None
        files = _checksums(save.partial, save.writer.written())

        def complete() -> None:
            manifest = {**save.info, "files": files}
            with (save.partial / MANIFEST).open("w", encoding="utf-8") as file:
                json.dump({**manifest, "checksum": _manifest_checksum(manifest)}, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            sync(save.partial)
            if save.final.exists():  # not complete, or it would have been resumed from
                _set_aside(save.final)
            save.partial.rename(save.final)
            sync(self.folder)
            for old in self.steps()[: -self.keep]:
                going = self.folder / f".{self.path(old).name}.old"  # half deleted it would look damaged
                with contextlib.suppress(OSError):
                    self.path(old).rename(going)
                    shutil.rmtree(going)

        _from_rank_zero(complete)


class _Writer(threading.Thread):
    """Writes files to the disk, with their checksums, while the run goes on; it takes part in no collective call."""

    def __init__(self, folder: Path, written: Written) -> None:
        super().__init__(daemon=True)  # a run that fails leaves no checkpoint, and does not wait for one
        self._folder, self._files, self._checksums = folder, written.pending, written.checksums
        self._problem: str | None = None
        self.start()

    def run(self) -> None:
        try:
            for name in list(self._files):
                content = self._files.pop(name)
                with (self._folder / name).open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                self._checksums[name] = [len(content), zlib.crc32(content)]
        except OSError as error:
            self._problem = f"{error.filename or self._folder}: {error.strerror or error}"

    def written(self) -> dict[str, list[int]]:
        """Wait; all ranks' files with size and CRC-32. A collective call.

        Raises:
            CheckpointError: on every rank, if one could not write.
        """
        self.join()
        everyone: list[tuple[dict[str, list[int]], str | None]] = [({}, None)] * dist.get_world_size()
        dist.all_gather_object(everyone, (self._checksums, self._problem))
        for _, problem in everyone:
            if problem is not None:
                raise CheckpointError(f"{problem}; nothing complete was touched")
        return {name: value for files, _ in everyone for name, value in files.items()}


@dataclass(frozen=True)
class _Unfinished:
    """A save whose files may not all be there yet."""

    partial: Path
    final: Path
    info: dict[str, Any]
    writer: _Writer


def _from_rank_zero(action: Callable[[], Result]) -> Result:
    """What ``action`` gives on rank 0, which alone does it, on every rank.

    Raises:
        CheckpointError: on every rank, where it failed: one that left alone would keep the others waiting.
    """
    told: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            told = [action(), None]
        except OSError as error:
            told = [None, f"{error.filename or 'checkpoint'}: {error.strerror or error}; nothing complete was touched"]
    dist.broadcast_object_list(told)
    result, problem = told
    if problem is not None:
        raise CheckpointError(problem)
    return result


def read_manifest(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself.

    Raises:
        CheckpointError: ``path`` is no complete checkpoint.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        known = manifest.pop("checksum", None)
        if known != _manifest_checksum(manifest) and (known is not None or manifest.keys() != _BEFORE_CHECKSUMS):
            raise ValueError("its checksum is not its own")
        return {"step": int(manifest["step"]), **manifest}
    except FileNotFoundError:
        raise DamagedError(f"{path / MANIFEST}: is missing; without it {path} is no complete checkpoint") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{path / MANIFEST}: is damaged ({error})") from None


def find_checkpoint(path: str | os.PathLike[str]) -> Path:
    """``path`` itself if it is a checkpoint, else the newest one in that folder.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        return path
    store = CheckpointStore(path)
    steps = store.candidates()
    if not steps:
        raise CheckpointError(f"{path}: holds no complete checkpoint (a folder step-NNNNNNNN with {MANIFEST})")
    return store.path(steps[-1])


def verify_checkpoint(path: Path) -> None:
    """Compare every file with the manifest; ranks share the reading.

    Raises:
        DamagedError: on every rank, naming the first file that is missing or damaged.
    """
    damage = _damage(path)
    if damage is not None:
        step = _NAME.fullmatch(path.name)
        others = _from_rank_zero(CheckpointStore(path.parent).steps)
        older = [other for other in others if step is not None and other < int(step.group(1))]
        instead = f", or name {CheckpointStore(path.parent).path(older[-1])}, the one before it" if older else ""
        raise DamagedError(f"{damage}; restore the file{instead}")


def _damage(path: Path) -> str | None:
    """The first file of a checkpoint that is missing or damaged, in a sentence. A collective call."""
    try:
        expected: dict[str, list[int]] = read_manifest(path)["files"]
        problems = []
    except DamagedError as error:  # perhaps on this rank alone: the others are told below
        expected, problems = {}, [str(error)]
    problems += [
        f"{path / name}: is missing"
        if not (path / name).is_file()
        else f"{path / name}: is damaged (its size or checksum is not the manifest's)"
        for name in sorted(expected)[dist.get_rank() :: dist.get_world_size()]
        if not (path / name).is_file() or _checksum(path / name) != expected[name]
    ]
    everyone: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, problems)
    return min((problem for rank in everyone for problem in rank), default=None)


def data_identity(config: Config) -> list[list[Any]]:
    """What the data are, wherever they lie: the fingerprint and the weight of each data set, in order."""
    return [[read_prepared(prefix).fingerprint, weight] for prefix, weight in config.data.weights.items()]


def check_resumable(path: Path, config: Config, identity: list[list[Any]], manifest: dict[str, Any]) -> None:
    """Refuse to go on with another model, other data or another order of them.

    Args:
        identity: :func:`data_identity` of the run.

    Raises:
        CheckpointError: naming the first key that differs.
    """
    saved, wanted = manifest["config"], config.model_dump(mode="json")
    keys = [(section, key) for section in ("model", *MLP_SECTIONS) for key in wanted[section]]
    keys.remove(("peer", "dispatch_chunks"))  # when things travel, not what is computed
    keys += [("data", "split"), ("table_optimizer", "name"), ("table_optimizer", "stochastic_rounding")]
    keys += [("train", "seed"), ("train", "global_batch_size")]
    for section, key in keys:
        field = type(getattr(config, section)).model_fields[key]
        before = saved.get(section, {}).get(key, field.get_default())  # an older version did not have it
        if before != wanted[section][key]:
            raise CheckpointError(
                f"{path}: was made with {section}.{key} = {before}, but the config says {wanted[section][key]}; set it "
                "back, choose another checkpoint.dir, or start from its weights with checkpoint.init_from"
            )

    if manifest["data"] != identity:
        raise CheckpointError(
            f"{path}: was made from other data than {', '.join(config.data.weights)} holds now (or with other "
            "weights); name the same prepared files, or start from its weights with checkpoint.init_from"
        )


def _checksum(path: Path) -> list[int]:
    value, size = 0, 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            value, size = zlib.crc32(block, value), size + len(block)
    return [size, value]


def _checksums(folder: Path, known: dict[str, list[int]]) -> dict[str, list[int]]:
    """File name to size and CRC-32, of all files, read by all ranks in shares; made durable on the way.

    Args:
        known: files that are durable already.
    """
    names = _from_rank_zero(
        lambda: sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    )
    names = [name for name in names if name not in known]
    mine = {}
    for name in names[dist.get_rank() :: dist.get_world_size()]:
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
        mine[name] = _checksum(folder / name)
    everyone: list[dict[str, list[int]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine)
    return {**known, **{name: value for rank in everyone for name, value in rank.items()}}


def _manifest_checksum(manifest: dict[str, Any]) -> int:
    """CRC-32 of what a manifest says, however it is laid out in the file."""
    return zlib.crc32(json.dumps(manifest, sort_keys=True).encode())


def _set_aside(path: Path) -> Path:
    """Keep a damaged checkpoint under a name that no run takes; which one."""
    kept, number = path.with_name(f"{path.name}.damaged"), 1
    while kept.exists():
        number += 1
        kept = path.with_name(f"{path.name}.damaged-{number}")
    path.rename(kept)
    sync(path.parent)
    return kept


def sync(path: Path) -> None:
    """Put a file, or a folder's names, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
