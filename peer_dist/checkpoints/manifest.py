"""``manifest.json``: what a checkpoint says of itself. A folder without it is no complete checkpoint.

It holds the step, the data position, the config, the versions, the checksum of every other file
(:mod:`peer_dist.checkpoints.files`) and one of its own content.
"""

from __future__ import annotations

import json
import math
import os
import re
import zlib
from pathlib import Path
from typing import Any

from peer_dist.megatron import CheckpointError
from peer_dist.mistake import Mistake
from peer_dist.reading import check_regular, read_object, reading
from peer_dist.shortage import shortage

MANIFEST = "manifest.json"
_NAME = re.compile(r"step-([0-9]{8,})")
# the keys of a manifest written before it had a checksum of its own
_KEYS_BEFORE_CHECKSUM = {"step", "updates", "sequences", "config", "data", "dtype", "versions", "files"}
_FORMER_KEYS = (("parallel", "context"),)  # of the config in manifests of earlier versions; it had one value, 1


class DamagedError(CheckpointError):
    """A file of a checkpoint is missing, or not what was written; the message names it.

    Attributes:
        mend: what to do, as a part of a sentence; the message of :func:`read_manifest` is without it.
    """

    def __init__(self, message: str, mend: str = "restore the file") -> None:
        super().__init__(message)
        self.mend = mend


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest, with its checksum, into a checkpoint's folder, and put it on the disk.

    Raises:
        OSError: it cannot be written.
    """
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump({**manifest, "checksum": _content_checksum(manifest)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint ``path``, without its checksum and keys that are gone from the config.

    Raises:
        DamagedError: on this rank, if the manifest is missing, damaged, or not that of the folder's name.
        CheckpointError: this process has too little memory, or too many open files, to read it.
    """
    file = path / MANIFEST
    if not os.path.lexists(file):
        raise DamagedError(f"{file}: is missing; without it {path} is no complete checkpoint")
    try:
        check_regular(file)
        manifest = _parsed(read_object(file, _Damaged))
    except (_Damaged, OSError) as error:
        if short := shortage(error):  # of this process: the file may be sound
            raise CheckpointError(f"{file}: cannot be read now ({short})") from None
        reason = error.strerror if isinstance(error, OSError) else str(error).removeprefix(f"{file}: ")
        raise DamagedError(f"{file}: is damaged ({reason})") from None
    step = step_of(path)
    if step is not None and step != manifest["step"]:
        own = step_name(manifest["step"])
        raise DamagedError(
            f"{path}: is named as the checkpoint of step {step}, but its {MANIFEST} says step {manifest['step']}",
            "remove this copy of it" if path.with_name(own).exists() else f"rename it back to {own}, or remove it",
        )
    return manifest


def step_name(step: int) -> str:
    """The name of the folder of a step's checkpoint."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """The step in a checkpoint's name; None if it is no such name."""
    match = _NAME.fullmatch(path.name)
    if match is None or step_name(int(match.group(1))) != path.name:
        return None
    return int(match.group(1))


class _Damaged(Mistake):
    """What is wrong with a manifest, without its name."""


def _parsed(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest, each of its values of the type that it is written with.

    Raises:
        _Damaged: it is none.
    """
    stored = manifest.pop("checksum", None)
    older = stored is None and manifest.keys() == _KEYS_BEFORE_CHECKSUM
    with reading("it", _Damaged, "a manifest"):
        if not older and stored != _content_checksum(manifest):
            raise _Damaged("its checksum is not its own")
    for key in ("step", "config", "files"):
        if key not in manifest:
            raise _Damaged(f"it has no {key}")
    for key in ("step", "updates", "sequences"):
        if key in manifest and not _is_count(manifest[key]):
            raise _Damaged(f"its {key} is no whole number from 0 on")
    if manifest.get("updates", 0) > manifest["step"]:
        raise _Damaged("it counts more updates than steps")
    for key in ("config", "files", "guard", "versions"):
        if not isinstance(manifest.get(key, {}), dict):
            raise _Damaged(f"its {key} is no object")
    for section, keys in manifest["config"].items():
        if not isinstance(keys, dict) or not all(name.isprintable() for name in (section, *keys)):
            raise _Damaged("its config is none")
    if not isinstance(manifest.get("dtype", ""), str):
        raise _Damaged("its dtype is no name")
    for name, value in manifest["files"].items():
        if name in ("", ".", "..") or "/" in name or "\\" in name or not name.isprintable():
            raise _Damaged(f"it names {name!r:.80}, which is no file of a checkpoint")
        if not (isinstance(value, list) and len(value) == 2 and all(map(_is_count, value))):
            raise _Damaged(f"it has no size and checksum of {name}")
    _check_guard(manifest.get("guard", {}))
    for section, key in _FORMER_KEYS:
        manifest["config"].get(section, {}).pop(key, None)
    return manifest


def _check_guard(guard: dict[str, Any]) -> None:
    """Refuse counts of skipped steps that are none.

    Raises:
        _Damaged: they are none.
    """
    losses = guard.get("losses", [])
    if not all(_is_count(guard.get(key, 0)) for key in ("not_finite", "spikes", "in_a_row")):
        raise _Damaged("its guard has counts that are no whole numbers from 0 on")
    if not isinstance(losses, list) or not all(type(loss) in (int, float) and abs(loss) < math.inf for loss in losses):
        raise _Damaged("its guard's losses are no list of numbers")


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _content_checksum(manifest: dict[str, Any]) -> int:
    """The CRC-32 of a manifest's content, whatever its layout in the file."""
    return zlib.crc32(json.dumps(manifest, sort_keys=True).encode())
