"""The files of a checkpoint: how ranks write them, put them on the disk and compute their checksums.

A checksum is the list ``[size in bytes, CRC-32]`` of a whole file.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from peer_dist.megatron import CheckpointError
from peer_dist.megatron.dist_checkpoint import Written
from peer_dist.mistake import in_words
from peer_dist.ranks.rank_zero import first_problem, from_every_rank, on_rank_zero
from peer_dist.shortage import shortage

Result = TypeVar("Result")


class FileWriter(threading.Thread):
    """A thread that writes a rank's pending files while the run goes on; it takes part in no collective call.

    Args:
        folder: of the files.
        written: what :func:`~peer_dist.megatron.dist_checkpoint.save` returned. The thread takes the pending contents
            out of it one by one, so that their memory is freed.
    """

    def __init__(self, folder: Path, written: Written) -> None:
        super().__init__(daemon=True)  # a run that fails leaves no checkpoint, and does not wait for one
        self._folder, self._files, self._checksums = folder, written.pending, written.checksums
        self._problem: str | None = None
        try:
            self.start()
        except RuntimeError:  # the system has no more threads
            self.run()

    def run(self) -> None:
        """Write every file and put it on the disk; this is the thread's work."""
        try:
            for name in list(self._files):
                content = self._files.pop(name)
                with (self._folder / name).open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                self._checksums[name] = [len(content), zlib.crc32(content)]
        except Exception as error:  # of any kind: a file that is not whole must not become part of a checkpoint
            self._problem = _not_written(error, self._folder)

    def checksums(self) -> dict[str, list[int]]:
        """Wait for the threads of all ranks, and return the checksums of all their files by name. A collective call.

        Raises:
            CheckpointError: on every rank, if one could not write.
        """
        if self.ident is not None:
            self.join()
        problem = first_problem(self._problem)
        if problem is not None:
            raise CheckpointError(problem)
        return _merged(from_every_rank(self._checksums))


def from_rank_zero(action: Callable[[], Result]) -> Result:
    """Run ``action`` on rank 0 alone, and return its result on every rank. A collective call.

    Raises:
        CheckpointError: on every rank, if the file system failed there: a rank that raised alone would keep the others
            waiting.
    """

    def act() -> Result:
        try:
            return action()
        except OSError as error:
            raise CheckpointError(_not_written(error, "checkpoint")) from error

    return on_rank_zero(act, raises=CheckpointError)


def _not_written(error: Exception, what: object) -> str:
    """A sentence about an error of the file system.

    Args:
        what: to name where the error names no file.
    """
    where, reason = getattr(error, "filename", None) or what, getattr(error, "strerror", None) or in_words(error)
    return f"{shortage(error) or f'{where}: {reason}'}; nothing complete was touched"


def checksum(path: Path) -> list[int]:
    """The checksum of one file, which is read in blocks of 16 MiB."""
    crc, size = 0, 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return [size, crc]


def sync_and_checksum(folder: Path, known: dict[str, list[int]]) -> dict[str, list[int]]:
    """Put all files of a folder on the disk, and return their checksums by name. A collective call: ranks share it.

    Args:
        known: checksums of files that are on the disk already; these are not read.

    Raises:
        CheckpointError: on every rank, if one cannot.
    """
    names = from_rank_zero(
        lambda: sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    )
    names = [name for name in names if name not in known]
    own, problem = {}, None
    try:
        for name in names[dist.get_rank() :: dist.get_world_size()]:
            sync(folder / name)
            own[name] = checksum(folder / name)
    except OSError as error:
        problem = _not_written(error, folder)
    if (problem := first_problem(problem)) is not None:
        raise CheckpointError(problem)
    return {**known, **_merged(from_every_rank(own))}


def _merged(checksums: list[dict[str, list[int]]]) -> dict[str, list[int]]:
    """The checksums that several ranks computed, as one dictionary."""
    return {name: value for own in checksums for name, value in own.items()}


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint so that no run takes it, and return its new path."""
    aside, number = path.with_name(f"{path.name}.damaged"), 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.damaged-{number}")
    path.rename(aside)
    sync(path.parent)
    return aside


def sync(path: Path) -> None:
    """Put a file, or the names in a folder, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
