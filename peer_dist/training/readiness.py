"""All that refuses a run and can be known before its ranks meet."""

from __future__ import annotations

import os
from pathlib import Path

from peer_dist.checkpoints.manifest import MANIFEST, read_manifest, step_of
from peer_dist.checkpoints.resuming import check_resumable, data_identity
from peer_dist.checkpoints.sources import open_source
from peer_dist.checkpoints.store import CheckpointStore, is_unfinished
from peer_dist.config import Config, ConfigError, check_folders, check_world
from peer_dist.data.stream import check_data


def check_ready(config: Config, world_size: int) -> list[str]:
    """Refuse a run that could not begin, or not go on from its newest checkpoint; nothing is written.

    No tensor is read: damage inside of files of tensors is found when they are loaded.

    Returns:
        What is worth a word, though the run can begin.

    Raises:
        Mistake: ConfigError, DataError or CheckpointError, the first that there is.
    """
    check_world(config, world_size)
    check_folders(config)
    _check_apart(config)
    data = check_data(config.data, config.model.seq_length, config.train.seed)
    path = CheckpointStore(config.checkpoint.dir).look(config.checkpoint.fall_back)
    if path is not None:
        check_resumable(path, config, data_identity(config), read_manifest(path))
    elif config.checkpoint.init_from is not None:
        open_source(config, data.tokenizer)
    return data.remarks


def _check_apart(config: Config) -> None:
    """Refuse folders inside of a checkpoint, or of what will be one: with it they are replaced and deleted.

    Raises:
        ConfigError: one is.
    """
    store = Path(os.path.realpath(config.checkpoint.dir))
    for key, name in (("checkpoint.dir", config.checkpoint.dir), ("logging.dir", config.logging.dir)):
        folder = Path(os.path.realpath(name))
        for place in (folder, *folder.parents):
            named = step_of(place) is not None or is_unfinished(place)
            if named and (place.parent == store or os.path.lexists(place / MANIFEST)):
                above = key == "checkpoint.dir" and folder == place
                advice = f"to go on from it, name {Path(name).parent}" if above else "choose another folder"
                raise ConfigError(f"{key}: {name} is in the place of a checkpoint, which may be deleted; {advice}")
