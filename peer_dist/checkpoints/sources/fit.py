"""Whether a run can start from a model: the same architecture, except for dense layers that others replace."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from peer_dist.config import Config, ConfigError
from peer_dist.config.schema import ModelConfig
from peer_dist.kinds import DENSE, KINDS

# what two models must have in common whatever their layers' kinds, and where both have dense layers
_ALWAYS = (
    "num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "rope_base", "norm_eps", "tied_embeddings"
)  # fmt: skip
_DENSE = ("ffn_hidden_size", "ffn_activation", "ffn_top_k")


def check_architecture(path: Path, theirs: ModelConfig, ours: ModelConfig, names: Mapping[str, str]) -> None:
    """Refuse a source whose architecture differs from the run's, whatever the kinds of their layers.

    Args:
        path: of the source, for the message.
        theirs: the source's model.
        ours: the run's model.
        names: what the source calls keys of the model, where it has another name.

    Raises:
        ConfigError: naming the first key that differs, with both values.
    """
    dense = any(kinds == (DENSE.name, DENSE.name) for kinds in zip(theirs.mlp_kinds, ours.mlp_kinds))
    for key in (*_ALWAYS, *(_DENSE if dense else ())):
        attribute = "query_groups" if key == "num_query_groups" else key
        their_value, our_value = getattr(theirs, attribute), getattr(ours, attribute)
        if their_value != our_value:
            raise ConfigError(
                f"checkpoint.init_from: {path} has {names.get(key, f'model.{key}')} = {their_value}, but the config "
                f"says model.{key} = {our_value}; set it to the same"
            )


def fresh_layers(path: Path, theirs: ModelConfig, config: Config) -> tuple[int, ...]:
    """The run's layers, numbered from 1, that stand where the source has dense ones and so begin without weights.

    Args:
        path: of the source, for the message.
        theirs: the source's model.
        config: of the run.

    Raises:
        ConfigError: a layer is of a kind that cannot stand in place of the source's, or only some of the layers that
            share tables have weights.
    """
    kinds = list(enumerate(zip(theirs.mlp_kinds, config.model.mlp_kinds), 1))
    for number, (their_kind, our_kind) in kinds:
        if their_kind != our_kind and not (their_kind == DENSE.name and KINDS[our_kind].begins_at_zero):
            new = " or ".join(kind.name for kind in KINDS.values() if kind.begins_at_zero)
            raise ConfigError(
                f"checkpoint.init_from: {path} has a {their_kind} feed-forward in layer {number}, but model.mlp says "
                f"{our_kind}; set it to the same, or to {new} in the place of a dense one"
            )
    fresh = tuple(number for number, (their_kind, our_kind) in kinds if their_kind != our_kind)
    for pool in config.pools:
        if len({layer + 1 in fresh for layer in pool}) > 1:
            raise ConfigError(
                f"checkpoint.init_from: {path} has only some of the layers {[layer + 1 for layer in pool]}, which "
                f"share tables by {KINDS[config.model.mlp_kinds[pool[0]]].key('layers_per_pool')}; lower it"
            )
    return fresh
