"""A run's checkpoints: each complete or absent, verified before it is loaded, the newest ones kept.

A checkpoint is the folder ``step-00000123``: Megatron's sharded tensors (model, expert tables, both optimizers),
``tokenizer.json`` and the manifest (:mod:`peer_dist.checkpoints.manifest`). It is written under a name that starts
with a dot and renamed when every byte is on the disk. One that was damaged later is refused by name, and never deleted.
The schedule, the data order and the random streams are functions of the step and the seed, so these two are all there
is to save of them.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from peer_dist.checkpoints.files import FileWriter, checksum, from_rank_zero, set_aside, sync, sync_and_checksum
from peer_dist.checkpoints.manifest import (
    MANIFEST,
    DamagedError,
    read_manifest,
    step_name,
    step_of,
    write_manifest,
)
from peer_dist.megatron import CheckpointError
from peer_dist.megatron.dist_checkpoint import State, save
from peer_dist.mistake import in_words
from peer_dist.ranks.rank_zero import from_every_rank
from peer_dist.reading import check_regular, reading
from peer_dist.shortage import shortage

_SMALL = 1 << 20  # bytes of a file that is read before ranks meet
_PARTIAL, _OLD = ".partial", ".old"  # behind a dot and the name of a checkpoint that is being written or deleted


class CheckpointStore:
    """The checkpoints of one run, in one folder.

    Args:
        folder: of the run's checkpoints; it need not exist.
        keep: number of complete checkpoints that are kept, the newest.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 2) -> None:
        self.folder, self.keep = Path(folder), keep
        self._unfinished: _Unfinished | None = None

    def steps(self) -> list[int]:
        """The steps that have a complete checkpoint, ascending: a folder whose manifest is of the step in its name."""
        return sorted(step for step, path in self._named() if _is_complete(path))

    def agreed_steps(self) -> list[int]:
        """:meth:`steps` as rank 0 sees them: on a network file system others may see an older listing.

        A collective call.
        """
        return from_rank_zero(self.steps)

    def candidates(self) -> list[int]:
        """:meth:`steps`, and newer ones that are not complete: no folder gets its name before it is.

        Raises:
            OSError: the folder cannot be read.
        """
        complete = self.steps()
        newest = max(complete, default=-1)
        return complete + sorted(
            step for step, path in self._named() if step > newest and path.is_dir() and any(path.iterdir())
        )

    def path(self, step: int) -> Path:
        """The folder of a step's checkpoint, which need not exist."""
        return self.folder / step_name(step)

    def look(self, fall_back: bool) -> Path | None:
        """The checkpoint that :meth:`newest` would take, by what shows without reading large files; None if none is.

        Nothing is renamed, and it is no collective call.

        Raises:
            DamagedError: as :meth:`newest` does.
            CheckpointError: the folder cannot be read.
        """
        with reading(self.folder, CheckpointError, advice="choose another checkpoint.dir"):
            steps = self.candidates()
            while steps:
                damage = visible_damage(self.path(steps[-1]))
                if damage is None:
                    return self.path(steps[-1])
                self._refuse(damage, steps, fall_back)
                steps.pop()
        return None

    def _refuse(self, damage: DamagedError, steps: list[int], fall_back: bool) -> None:
        """Refuse the newest of ``steps``, which is damaged, unless another may be taken.

        Raises:
            DamagedError: none may be.
        """
        if len(steps) == 1:
            raise DamagedError(
                f"{damage}; {self.folder} has no other checkpoint: {damage.mend}, or choose another checkpoint.dir"
            )
        if not fall_back:
            name, before = self.path(steps[-1]).name, self.path(steps[-2]).name
            raise DamagedError(
                f"{damage}; {damage.mend}, or go on from {before} with checkpoint.fall_back=true, which keeps this one "
                f"as {name}.damaged"
            )

    def newest(self, fall_back: bool, say: Callable[[str], None]) -> int | None:
        """The step to go on from, its checkpoint verified; None if there is none. A collective call.

        Args:
            fall_back: set a damaged one aside, as ``step-NNNNNNNN.damaged``, and take the newest that is intact.
            say: called on every rank with a sentence, if one was set aside.

        Raises:
            DamagedError: the newest is damaged, and ``fall_back`` is not set or there is no other.
        """
        while steps := from_rank_zero(self.candidates):
            path = self.path(steps[-1])
            damage = _first_damage(path)
            if damage is None:
                return steps[-1]
            self._refuse(damage, steps, fall_back)
            aside = from_rank_zero(partial(set_aside, path))
            say(f"{damage}; it is kept as {aside}, and the run goes on from the newest that is intact")
        return None

    def save(self, step: int, state: State, info: dict[str, Any], tokenizer: Any, wait: bool = True) -> Path:
        """Write a checkpoint, and return its path. A collective call.

        It returns when the checkpoint is complete or, without ``wait``, as soon as the state may change: a thread of
        each rank writes a copy of its tensors, and :meth:`finish` makes it a checkpoint.

        Args:
            state: what is saved, as sharded tensors.
            info: what the manifest says beside the step and the files.
            tokenizer: its ``save`` writes a file.

        Raises:
            CheckpointError: it could not be written; no complete checkpoint was touched.
        """
        self.finish()
        hidden = self.folder / f".{step_name(step)}{_PARTIAL}"

        def begin() -> None:
            for leftover in self.folder.glob(".*"):  # by runs that were killed
                if is_unfinished(leftover):
                    shutil.rmtree(leftover, ignore_errors=True)
            hidden.mkdir(parents=True)

        from_rank_zero(begin)
        with _removed_if_it_fails(hidden):
            written = save(state, hidden, in_memory=not wait)
            from_rank_zero(lambda: tokenizer.save(hidden / "tokenizer.json"))
        self._unfinished = _Unfinished(hidden, self.path(step), {"step": step, **info}, FileWriter(hidden, written))
        if wait:
            self.finish()
        return self.path(step)

    @property
    def unfinished(self) -> bool:
        """Whether :meth:`finish` has something to do; the same on every rank."""
        return self._unfinished is not None

    @property
    def writing(self) -> bool:
        """Whether this rank's thread still writes."""
        return self._unfinished is not None and self._unfinished.writer.is_alive()

    def finish(self) -> None:
        """Wait for the save under way, if there is one, and make it a checkpoint. A collective call.

        Raises:
            CheckpointError: as :meth:`save` does.
        """
        if self._unfinished is None:
            return
        unfinished, self._unfinished = self._unfinished, None

        def complete(files: dict[str, list[int]]) -> None:
            write_manifest(unfinished.hidden, {**unfinished.info, "files": files})
            sync(unfinished.hidden)
            if unfinished.final.exists():  # not complete, or it would have been resumed from
                set_aside(unfinished.final)
            unfinished.hidden.rename(unfinished.final)
            sync(self.folder)
            with contextlib.suppress(CheckpointError):  # the next save does it
                self._delete_oldest()

        with _removed_if_it_fails(unfinished.hidden):
            checksums = sync_and_checksum(unfinished.hidden, unfinished.writer.checksums())
            from_rank_zero(partial(complete, checksums))

    def _delete_oldest(self) -> None:
        """Delete all complete checkpoints but the newest ``keep``."""
        for step in self.steps()[: -self.keep]:
            path = self.path(step)
            renamed = self.folder / f".{path.name}{_OLD}"  # half deleted it would look damaged
            with contextlib.suppress(OSError):
                path.rename(renamed)
                shutil.rmtree(renamed)

    def _named(self) -> Iterator[tuple[int, Path]]:
        """Step and path of all that has a checkpoint's name, complete or not."""
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                step = step_of(path)
                if step is not None:
                    yield step, path


def is_unfinished(path: Path) -> bool:
    """Whether a folder has the name of a checkpoint that is being written or deleted."""
    return path.name[:1] == "." and path.suffix in (_PARTIAL, _OLD) and step_of(Path(path.stem[1:])) is not None


@contextlib.contextmanager
def _removed_if_it_fails(hidden: Path) -> Iterator[None]:
    """A context of all ranks in which a save that fails on every rank leaves nothing: it may be what fills the disk."""
    try:
        yield
    except CheckpointError:
        if dist.get_rank() == 0:
            shutil.rmtree(hidden, ignore_errors=True)
        raise


def _is_complete(path: Path) -> bool:
    try:
        read_manifest(path)
    except DamagedError:
        return False
    return True


@dataclass(frozen=True)
class _Unfinished:
    """A save whose files may not all be there yet.

    Attributes:
        hidden: the folder that is written.
        final: its name when it is complete.
        info: the manifest, without the files.
        writer: of this rank.
    """

    hidden: Path
    final: Path
    info: dict[str, Any]
    writer: FileWriter


def find_checkpoint(path: str | os.PathLike[str]) -> Path:
    """``path`` itself if it is a checkpoint, else the newest one in that folder or in its folder ``checkpoints``.

    What shows of damage without reading large files is found.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = Path(path)
    with reading(path, CheckpointError, advice="name a checkpoint, or a folder of them"):
        found = _newest_in(path) if path.exists() else None
        if found is None:
            why = f"a folder step-NNNNNNNN with {MANIFEST}" if path.exists() else "there is nothing of that name"
            raise CheckpointError(
                f"{path}: holds no complete checkpoint ({why}); name a checkpoint, or a folder of them"
            )
        damage = visible_damage(found)
    if damage is not None:
        raise DamagedError(f"{damage}; {damage.mend}{_instead_of(found)}")
    return found


def _newest_in(path: Path) -> Path | None:
    """The checkpoint that a path means, complete or not; None if there is none."""
    if (path / MANIFEST).is_file() or step_of(path) is not None or (path / ".metadata").is_file():
        return path
    for folder in (path, path / "checkpoints"):
        store = CheckpointStore(folder)
        if steps := store.candidates():
            return store.path(steps[-1])
    return None


def verify_checkpoint(path: Path) -> None:
    """Compare every file with the manifest. A collective call: ranks share the reading.

    Raises:
        DamagedError: on every rank, naming the first file that is missing or damaged.
    """
    damage = _first_damage(path)
    if damage is not None:
        raise DamagedError(f"{damage}; {damage.mend}{from_rank_zero(partial(_instead_of, path))}")


def _instead_of(path: Path) -> str:
    """What else there is in place of a damaged checkpoint, as the end of a sentence."""
    store, step = CheckpointStore(path.parent), step_of(path)
    older = [other for other in store.steps() if step is not None and other < step]
    return f", or name {store.path(older[-1])}, the one before it" if older else ""


def visible_damage(path: Path) -> DamagedError | None:
    """What is wrong with a checkpoint, as far as it shows without reading tensors; None if nothing.

    Each rank can ask for itself, before ranks meet.
    """
    try:
        files = read_manifest(path)["files"]
    except DamagedError as error:
        return error
    for name in sorted(files):
        if damage := _damage(path / name, files[name], 0 if name.endswith(".distcp") else _SMALL):
            return DamagedError(damage)
    return None


def _damage(file: Path, expected: list[int], most: float) -> str | None:
    """What is wrong with a file of a checkpoint; of one that is larger than ``most`` the size alone is compared.

    Args:
        expected: its size and checksum.
        most: bytes of a file that is read.

    Raises:
        CheckpointError: this process runs short of something, so that it cannot say.
    """
    try:
        if not os.path.lexists(file):
            return f"{file}: is missing"
        check_regular(file)  # or a link to one, by which hubs and annexes keep large files
        if file.stat().st_size != expected[0] or (expected[0] <= most and checksum(file) != expected):
            return f"{file}: is damaged (its size or checksum is not the manifest's)"
    except OSError as error:
        if short := shortage(error):  # of this process: the file may be sound
            raise CheckpointError(f"{file}: cannot be read now ({short})") from None
        return f"{file}: cannot be read ({error.strerror or in_words(error)})"
    return None


def _first_damage(path: Path) -> DamagedError | None:
    """What is wrong with the first file of a checkpoint that is missing or damaged; None if all are intact.

    The same on every rank. A collective call.

    Raises:
        CheckpointError: on every rank, if one runs short of something, so that it cannot say.
    """
    problems: list[tuple[int, str, str]] = []  # perhaps of this rank alone: the others hear of it below
    try:
        files = read_manifest(path)["files"]
        for name in sorted(files)[dist.get_rank() :: dist.get_world_size()]:
            damage = _damage(path / name, files[name], math.inf)
            if damage is not None:
                problems.append((1, damage, "restore the file"))
    except DamagedError as error:
        problems.append((1, str(error), error.mend))
    except CheckpointError as error:
        problems.append((0, str(error), ""))
    first = min((problem for of_rank in from_every_rank(problems) for problem in of_rank), default=None)
    if first is None:
        return None
    damaged, text, mend = first
    if not damaged:
        raise CheckpointError(text)
    return DamagedError(text, mend)
