"""Whether a run may go on from a checkpoint: it must have the checkpoint's model, its data and their order."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from peer_dist.config import Config
from peer_dist.data.documents import DataError
from peer_dist.data.prepare import content_digests, read_prepared
from peer_dist.kinds import KINDS
from peer_dist.megatron import CheckpointError
from peer_dist.mistake import in_words
from peer_dist.ranks.rank_zero import on_rank_zero


def data_identity(config: Config) -> list[list[Any]]:
    """What the data are, wherever their files lie, as rank 0 reads them. A collective call in a process group.

    Returns:
        For each data set, in order: its fingerprint, its weight, and a digest of what its files hold now, the tokenizer
        among them.

    Raises:
        DataError: prepared files are missing or damaged.
    """

    def identity() -> list[list[Any]]:
        sets = []
        for prefix, weight in config.data.weights.items():
            summary = read_prepared(prefix)
            digests = json.dumps(content_digests(prefix, summary), sort_keys=True)
            sets.append([summary.fingerprint, weight, hashlib.sha256(digests.encode()).hexdigest()])
        return sets

    return on_rank_zero(identity, raises=DataError)


def _same_data(saved: Any, identity: list[list[Any]]) -> bool:
    """Whether a manifest's data are these. Earlier versions wrote no digests."""
    if not isinstance(saved, list) or len(saved) != len(identity):
        return False
    return all(isinstance(was, list) and len(was) >= 2 and was == now[: len(was)] for was, now in zip(saved, identity))


def check_resumable(path: Path, config: Config, identity: list[list[Any]], manifest: dict[str, Any]) -> None:
    """Refuse to go on with another model, other data or another order of them.

    Args:
        path: of the checkpoint, for the message.
        config: of the run.
        identity: :func:`data_identity` of the run.
        manifest: of the checkpoint.

    Raises:
        CheckpointError: naming the first key that differs.
    """
    saved, wanted = manifest["config"], config.model_dump(mode="json")
    for section, key in _fixed_keys(wanted):
        field = type(getattr(config, section)).model_fields[key]
        before = saved.get(section, {}).get(key, field.get_default())  # an older version did not have it
        if before != wanted[section][key]:
            raise CheckpointError(
                f"{path}: was made with {section}.{key} = {in_words(str(before))}, but the config says "
                f"{in_words(str(wanted[section][key]))}; set it back, choose another checkpoint.dir, or start "
                "from its weights with checkpoint.init_from"
            )

    if not _same_data(manifest.get("data"), identity):
        raise CheckpointError(
            f"{path}: was made from other data than {', '.join(config.data.weights)} holds now (or with other "
            "weights, or another tokenizer); name the same prepared files, or start from its weights with "
            "checkpoint.init_from"
        )


def _fixed_keys(tree: dict[str, Any]) -> list[tuple[str, str]]:
    """Section and name of each key of the config ``tree`` that must not change when a run is resumed."""
    keys = [(section, key) for section in ("model", "router") for key in tree[section]]
    for kind in KINDS.values():
        if kind.section is not None:
            keys += [(kind.name, key) for key in tree[kind.name] if key not in kind.resumable]
    keys += [("data", "split"), ("table_optimizer", "name"), ("table_optimizer", "stochastic_rounding")]
    return [*keys, ("train", "seed"), ("train", "global_batch_size")]
