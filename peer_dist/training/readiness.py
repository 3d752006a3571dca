"""All that refuses a run and can be known before its ranks meet."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from peer_dist.checkpoints.manifest import read_manifest
from peer_dist.checkpoints.resuming import check_resumable, data_identity
from peer_dist.checkpoints.sources import open_source
from peer_dist.checkpoints.store import CheckpointStore
from peer_dist.config import Config, check_folders, check_world
from peer_dist.data.prepare import read_prepared
from peer_dist.data.stream import open_tokenizer


def check_ready(config: Config, world_size: int) -> None:
    """Refuse a run that could not begin, or not go on from its newest checkpoint; nothing is written.

    No tensor is read: damage inside of files of tensors is found when they are loaded.

    Raises:
        Mistake: ConfigError, DataError or CheckpointError, the first that there is.
    """
    check_world(config, world_size)
    check_folders(config)
    # data
    for prefix in config.data.weights:
        read_prepared(prefix)
    tokenizer = open_tokenizer(config.data)
    # weights
    path = CheckpointStore(config.checkpoint.dir).look(config.checkpoint.fall_back)
    if path is not None:
        check_resumable(path, config, data_identity(config), read_manifest(path))
    elif config.checkpoint.init_from is not None:
        open_source(config, tokenizer)


@contextlib.contextmanager
def no_empty_folders(*folders: str) -> Iterator[None]:
    """A context that removes the folders which were made in it, if it ends by an error and nothing is in them."""
    made = [place for folder in folders for place in _missing(Path(folder).absolute())]
    try:
        yield
    except BaseException:
        for place in sorted(set(made), key=lambda place: -len(place.parts)):  # what is inside first
            with contextlib.suppress(OSError):
                place.rmdir()  # which refuses one that is not empty
        raise


def _missing(folder: Path) -> list[Path]:
    """The folder and those above it, as far as they are not there."""
    return [place for place in (folder, *folder.parents) if not place.exists()]
