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
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from peer_dist.config import Config
from peer_dist.data.prepare import read_prepared
from peer_dist.kinds import KINDS
from peer_dist.megatron import CheckpointError
from peer_dist.megatron.dist_checkpoint import State, Written, save
from peer_dist.ranks.rank_zero import first_problem, from_every_rank, on_rank_zero

MANIFEST = "manifest.json"
Result = TypeVar("Result")
# of a manifest written before it had a checksum of its own
_BEFORE_CHECKSUMS = {"step", "updates", "sequences", "config", "data", "dtype", "versions", "files"}
_FORMER_KEYS = (("parallel", "context"),)  # of the config in manifests of earlier versions; it had one value, 1
_NAME = re.compile(r"step-(\d{8,})")


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
        problem = first_problem(self._problem)
        if problem is not None:
            raise CheckpointError(f"{problem}; nothing complete was touched")
        return {name: value for files in from_every_rank(self._checksums) for name, value in files.items()}


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

    def act() -> Result:
        try:
            return action()
        except OSError as error:
            where, why = error.filename or "checkpoint", error.strerror or error
            raise CheckpointError(f"{where}: {why}; nothing complete was touched") from error

    return on_rank_zero(act, raises=CheckpointError)


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
        for section, key in _FORMER_KEYS:
            manifest["config"].get(section, {}).pop(key, None)
        return {"step": int(manifest["step"]), **manifest}
    except FileNotFoundError:
        raise DamagedError(f"{path / MANIFEST}: is missing; without it {path} is no complete checkpoint") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
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
    return min((problem for found in from_every_rank(problems) for problem in found), default=None)


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
    keys = [(section, key) for section in ("model", "router") for key in wanted[section]]
    for kind in KINDS.values():
        if kind.section is not None:
            keys += [(kind.name, key) for key in wanted[kind.name] if key not in kind.resumable]
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
    return {**known, **{name: value for files in from_every_rank(mine) for name, value in files.items()}}


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
