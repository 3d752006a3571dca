"""All that refuses a run and can be known before its ranks meet."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import torch

from peer_dist.checkpoints.manifest import MANIFEST, read_manifest, step_of
from peer_dist.checkpoints.resuming import check_resumable, data_identity
from peer_dist.checkpoints.sources import open_source
from peer_dist.checkpoints.store import CheckpointStore, is_unfinished
from peer_dist.config import Config, ConfigError, check_folders, check_world
from peer_dist.data.stream import check_data
from peer_dist.kernels import disk
from peer_dist.kinds.cost import FLOAT
from peer_dist.kinds.kind import Kind
from peer_dist.machine import most_memory, nearest_existing
from peer_dist.measures.metrics import EVENTS, IMAGES, METRICS


def check_ready(config: Config, world_size: int, local_world_size: int = 1) -> list[str]:
    """Refuse a run that could not begin, or not go on from its newest checkpoint; nothing is written.

    No tensor is read: damage inside of files of tensors is found when they are loaded.

    Returns:
        What is worth a word, though the run can begin.

    Raises:
        Mistake: ConfigError, DataError or CheckpointError, the first that there is.
    """
    check_world(config, world_size)
    check_folders(config)
    _check_room(config, world_size, local_world_size)
    _check_apart(config)
    data = check_data(config.data, config.model.seq_length, config.train.seed)
    path = CheckpointStore(config.checkpoint.dir).look(config.checkpoint.fall_back)
    if path is not None:
        check_resumable(path, config, data_identity(config), read_manifest(path))
    elif config.checkpoint.init_from is not None:
        open_source(config, data.tokenizer)
    return data.remarks


def _check_room(config: Config, world_size: int, local_world_size: int) -> None:
    """Refuse tables for which this machine has no room: in its memory, or in folders of scratch files.

    Raises:
        ConfigError: they cannot be in its memory, whatever else is there.
        FolderError: a folder cannot hold them.
    """
    for kind in config.kinds:
        tables = kind.tables(config)
        if tables is None or tables.memory == "disk" or (tables.memory == "device" and torch.cuda.is_available()):
            continue
        size, most = local_world_size * _table_bytes(config, kind, world_size), most_memory()
        if size > most:
            raise ConfigError(
                f"{kind.key('table_memory')}: {tables.memory} would have tables and the states of their optimizer, "
                f"{size / 1e9:.1f} GB, in memory, but processes may have {most / 1e9:.1f} GB here; set it to disk, "
                "which needs table_optimizer.lazy true, or use more machines"
            )
    needed: dict[Path, int] = {}
    keys: dict[Path, str] = {}
    for kind in config.kinds:
        tables = kind.tables(config)
        if tables is not None and tables.memory == "disk":
            folder = kind.keys(config).table_folder
            place = Path(folder) if folder else disk.default_folder()
            needed[place] = needed.get(place, 0) + local_world_size * _table_bytes(config, kind, world_size)
            keys.setdefault(place, kind.key("table_folder"))
    disks = {place: os.stat(nearest_existing(place)).st_dev for place in needed}
    for place, key in keys.items():
        together = sum(size for other, size in needed.items() if disks[other] == disks[place])
        disk.check_folder(place, together, key)


def _table_bytes(config: Config, kind: Kind, world_size: int) -> int:
    """Bytes of a rank's tables of a kind and of the states of their optimizer, where most layers have them."""
    tables, parallel, rule = kind.tables(config), config.parallel, config.table_optimizer
    assert tables is not None
    columns = -(-config.model.hidden_size // parallel.expert_tensor)
    pools = Counter(config.stage_of(pool[0]) for pool in config.pools if kind is config.kind_of(pool[0]))
    rows = -(-tables.rows // parallel.expert_rows(world_size))
    element = tables.itemsize + FLOAT * (rule.moments[0] + rule.keeps_masters(tables.itemsize))
    return max(pools.values()) * len(tables.names) * rows * columns * element


def _check_apart(config: Config) -> None:
    """Refuse folders of which a run, this one or another, would remove one with what is in it.

    Raises:
        ConfigError: one lies in a checkpoint, or checkpoints would lie where the logs are.
    """
    checkpoints, logs = (Path(os.path.realpath(name)) for name in (config.checkpoint.dir, config.logging.dir))
    for key, name, folder, instead in (
        ("checkpoint.dir", config.checkpoint.dir, checkpoints, "the folder above it to go on from it, or another one"),
        ("logging.dir", config.logging.dir, logs, "another folder"),
    ):
        for place in (folder, *folder.parents):
            named = step_of(place) is not None or is_unfinished(place)
            if named and (place.parent == checkpoints or os.path.lexists(place / MANIFEST)):
                raise ConfigError(
                    f"{key}: {name} lies in the checkpoint {place.name}, which is deleted when there are newer ones; "
                    f"name {instead}"
                )
    if logs in checkpoints.parents and (part := checkpoints.relative_to(logs).parts[0]) in (METRICS, EVENTS, IMAGES):
        raise ConfigError(
            f"checkpoint.dir: {config.checkpoint.dir} lies in {part} of logging.dir ({config.logging.dir}), which the "
            "logs need; name another folder"
        )
