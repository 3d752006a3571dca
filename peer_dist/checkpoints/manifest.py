"""``manifest.json``: what a checkpoint says of itself. A folder without it is no complete checkpoint.

It holds the step, the data position, the config, the versions, the checksum of every other file
(:mod:`peer_dist.checkpoints.files`) and one of its own content.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

from peer_dist.megatron import CheckpointError

MANIFEST = "manifest.json"
# the keys of a manifest written before it had a checksum of its own
_KEYS_BEFORE_CHECKSUM = {"step", "updates", "sequences", "config", "data", "dtype", "versions", "files"}
_FORMER_KEYS = (("parallel", "context"),)  # of the config in manifests of earlier versions; it had one value, 1


class DamagedError(CheckpointError):
    """A file of a checkpoint is missing, or not what was written; the message names it. The same on every rank."""


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
        DamagedError: on this rank, if the manifest is missing or damaged.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        stored = manifest.pop("checksum", None)
        older = stored is None and manifest.keys() == _KEYS_BEFORE_CHECKSUM
        if not older and stored != _content_checksum(manifest):
            raise ValueError("its checksum is not its own")
        for section, key in _FORMER_KEYS:
            manifest["config"].get(section, {}).pop(key, None)
        return {"step": int(manifest["step"]), **manifest}
    except FileNotFoundError:
        raise DamagedError(f"{path / MANIFEST}: is missing; without it {path} is no complete checkpoint") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{path / MANIFEST}: is damaged ({error})") from None


def _content_checksum(manifest: dict[str, Any]) -> int:
    """The CRC-32 of a manifest's content, whatever its layout in the file."""
    return zlib.crc32(json.dumps(manifest, sort_keys=True).encode())
