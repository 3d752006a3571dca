"""Where a new run's weights come from: a checkpoint, a Llama model in Hugging Face's format, or Megatron's own.

Where the source has a dense feed-forward and the run a PEER layer, that layer is new and its output begins at 0: the
model begins as the source without those feed-forwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from peer_dist.checkpoints.llama import LlamaFolder
from peer_dist.checkpoints.megatron_folder import MegatronFolder
from peer_dist.checkpoints.state import restore_weights
from peer_dist.checkpoints.store import find_checkpoint, read_manifest, verify_checkpoint
from peer_dist.config import Config, ConfigError, parse_config
from peer_dist.config.schema import ModelConfig
from peer_dist.data.tokenizer import TextTokenizer
from peer_dist.kinds import DENSE, KINDS
from peer_dist.layers.sparse_layer import BeginsAtZero
from peer_dist.megatron import Parallel, sparse_layers
from peer_dist.megatron.dist_checkpoint import dense_blocks

# what two models must have in common beside their layers' kinds
_ALWAYS = (
    "num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "rope_base", "norm_eps", "tied_embeddings"
)  # fmt: skip
_DENSE = ("ffn_hidden_size", "ffn_activation", "ffn_top_k")


@dataclass(frozen=True)
class Source:
    """A model whose weights fit the run's.

    Attributes:
        foreign: None for a checkpoint of this package.
        fresh: layers (from 1) that have no weights there.
        routed: whether there are weights of what routers share.
    """

    path: Path
    foreign: LlamaFolder | MegatronFolder | None
    fresh: tuple[int, ...]
    routed: bool

    def restore(self, model: nn.ModuleList, parallel: Parallel) -> None:
        """Replace the model's weights; every rank reads what it has of them. Collective.

        Raises:
            CheckpointError: a file is damaged, or a tensor is missing or of another shape.
        """
        skip = [f"decoder.layers.{number - 1}.mlp." for number in self.fresh]
        skip += [f"tables.layer{number}." for number in self.fresh]
        skip += [] if self.routed else ["router_core."]
        if self.foreign is not None:
            _copy(self.foreign, model, tuple(skip))
        else:
            verify_checkpoint(self.path)
            restore_weights(self.path, model, parallel, tuple(skip))
        for number, layer in sparse_layers(model).items():
            if number in self.fresh:
                assert isinstance(layer, BeginsAtZero)  # its kind says so
                layer.zero_output()


def open_source(config: Config, tokenizer: TextTokenizer) -> Source:
    """What ``checkpoint.init_from`` names, found to fit; no tensor is read.

    Raises:
        CheckpointError: it is neither a checkpoint, of this package or Megatron's, nor a Llama model, or not complete.
        ConfigError: its architecture is not the run's.
    """
    path = Path(str(config.checkpoint.init_from))
    foreign: LlamaFolder | MegatronFolder | None = None
    if LlamaFolder.is_one(path):
        foreign = LlamaFolder(path)
    elif MegatronFolder.is_one(path):
        foreign = MegatronFolder(path, config.model)
    if foreign is not None:
        theirs, names = foreign.model, foreign.names
        foreign.check_vocabulary(tokenizer)
    else:
        path = find_checkpoint(path)
        theirs, names = parse_config(read_manifest(path)["config"], str(path)).model, {}
    _check_architecture(path, theirs, config.model, names)
    fresh = _fresh_layers(path, theirs, config)
    return Source(path, foreign, fresh, any(KINDS[kind].routed for kind in theirs.mlp_kinds))


@torch.no_grad()
def _copy(source: LlamaFolder | MegatronFolder, model: nn.ModuleList, skip: tuple[str, ...]) -> None:
    """What this rank has of the model, but for keys that begin with one of ``skip``.

    Rows of the padded vocabulary that the source does not have stay as they were drawn.
    """
    for key, where, memory in dense_blocks(model):
        if not key.startswith(skip):
            value = source.block(key, where)
            memory[: len(value)].copy_(value)


def _check_architecture(path: Path, theirs: ModelConfig, ours: ModelConfig, names: dict[str, str]) -> None:
    dense = any(kinds == (DENSE.name, DENSE.name) for kinds in zip(theirs.mlp_kinds, ours.mlp_kinds))
    for key in (*_ALWAYS, *(_DENSE if dense else ())):
        attribute = "query_groups" if key == "num_query_groups" else key
        there, here = getattr(theirs, attribute), getattr(ours, attribute)
        if there != here:
            raise ConfigError(
                f"checkpoint.init_from: {path} has {names.get(key, f'model.{key}')} = {there}, but the config says "
                f"model.{key} = {here}; set it to the same"
            )


def _fresh_layers(path: Path, theirs: ModelConfig, config: Config) -> tuple[int, ...]:
    kinds = list(enumerate(zip(theirs.mlp_kinds, config.model.mlp_kinds), 1))
    for number, (there, here) in kinds:
        if there != here and not (there == DENSE.name and KINDS[here].begins_at_zero):
            new = " or ".join(kind.name for kind in KINDS.values() if kind.begins_at_zero)
            raise ConfigError(
                f"checkpoint.init_from: {path} has a {there} feed-forward in layer {number}, but model.mlp says "
                f"{here}; set it to the same, or to {new} in the place of a dense one"
            )
    fresh = tuple(number for number, (there, here) in kinds if there != here)
    for pool in config.pools:
        if len({layer + 1 in fresh for layer in pool}) > 1:
            raise ConfigError(
                f"checkpoint.init_from: {path} has only some of the layers {[layer + 1 for layer in pool]}, which "
                f"share tables by {KINDS[config.model.mlp_kinds[pool[0]]].key('layers_per_pool')}; lower it"
            )
    return fresh
