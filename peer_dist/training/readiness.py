"""All that refuses a run and can be known before its ranks meet."""

from __future__ import annotations

from peer_dist.checkpoints.manifest import read_manifest
from peer_dist.checkpoints.resuming import check_resumable, data_identity
from peer_dist.checkpoints.sources import open_source
from peer_dist.checkpoints.store import CheckpointStore
from peer_dist.config import Config, check_world
from peer_dist.data.prepare import read_prepared
from peer_dist.data.stream import open_tokenizer


def check_ready(config: Config, world_size: int) -> None:
    """Refuse a run that could not begin, or not go on from its newest checkpoint; nothing is written.

    Raises:
        Mistake: ConfigError, DataError or CheckpointError, the first that there is.
    """
    check_world(config, world_size)
    for prefix in config.data.weights:
        read_prepared(prefix)
    tokenizer = open_tokenizer(config.data)
    store = CheckpointStore(config.checkpoint.dir)
    steps = store.candidates()
    if steps:
        path = store.path(steps[-1])
        check_resumable(path, config, data_identity(config), read_manifest(path))
    elif config.checkpoint.init_from is not None:
        open_source(config, tokenizer)
