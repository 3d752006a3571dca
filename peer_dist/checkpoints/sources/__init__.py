"""Where a new run's weights come from: a checkpoint of this package, or a model of another format.

There is one module per format: Llama models as Hugging Face's transformers writes them, and Megatron-core's own
checkpoints. Where the source has a dense feed-forward and the run a PEER layer, that layer is new and its output begins
at 0: the model begins as the source without those feed-forwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from peer_dist.checkpoints.manifest import read_manifest
from peer_dist.checkpoints.sources.fit import check_architecture, fresh_layers
from peer_dist.checkpoints.sources.foreign_model import ForeignModel
from peer_dist.checkpoints.sources.llama import LlamaFolder
from peer_dist.checkpoints.sources.megatron import MegatronFolder
from peer_dist.checkpoints.state import restore_weights
from peer_dist.checkpoints.store import find_checkpoint, verify_checkpoint
from peer_dist.config import Config, ConfigError, parse_config
from peer_dist.config.schema import ModelConfig
from peer_dist.data.tokenizer import TextTokenizer, load_tokenizer
from peer_dist.kinds import KINDS
from peer_dist.layers.sparse_layer import BeginsAtZero
from peer_dist.megatron import Parallel, sparse_layers
from peer_dist.megatron.dist_checkpoint import dense_blocks


@dataclass(frozen=True)
class Source:
    """A model whose weights fit the run's.

    Attributes:
        path: of the model.
        foreign: the model, if it is of another format; None for a checkpoint of this package.
        fresh: layers, numbered from 1, that have no weights there.
        routed: whether there are weights of the state that routers share.
    """

    path: Path
    foreign: ForeignModel | None
    fresh: tuple[int, ...]
    routed: bool

    def restore(self, model: nn.ModuleList, parallel: Parallel) -> None:
        """Replace the model's weights; every rank reads what it has of them. A collective call.

        Raises:
            CheckpointError: a file is damaged, or a tensor is missing or of another shape.
        """
        skip = [f"decoder.layers.{number - 1}.mlp." for number in self.fresh]
        skip += [f"tables.layer{number}." for number in self.fresh]
        skip += [] if self.routed else ["router_core."]
        if self.foreign is not None:
            _copy_blocks(self.foreign, model, tuple(skip))
        else:
            verify_checkpoint(self.path)
            restore_weights(self.path, model, parallel, tuple(skip))
        for number, layer in sparse_layers(model).items():
            if number in self.fresh:
                assert isinstance(layer, BeginsAtZero)  # its kind says so
                layer.zero_output()


def open_source(config: Config, tokenizer: TextTokenizer) -> Source:
    """The model that ``checkpoint.init_from`` names, checked to fit the run; no tensor is read.

    Raises:
        CheckpointError: it is neither a checkpoint, of this package or Megatron's, nor a Llama model, or not complete.
        ConfigError: its architecture or its vocabulary is not the run's.
        DataError: its tokenizer cannot be read.
    """
    path = Path(str(config.checkpoint.init_from))
    foreign = _open_foreign(path, config.model)
    if foreign is not None:
        theirs, names = foreign.model, foreign.names
        foreign.check_vocabulary(tokenizer)
    else:
        path = find_checkpoint(path)
        theirs, names = parse_config(read_manifest(path)["config"], str(path)).model, {}
        rows = load_tokenizer(str(path / "tokenizer.json")).padded_vocab_size
        if rows != tokenizer.padded_vocab_size:
            raise ConfigError(
                f"checkpoint.init_from: {path} has {rows} rows of embedding, but the data's tokenizer {tokenizer.name} "
                f"gives {tokenizer.padded_vocab_size}; prepare the data with {path / 'tokenizer.json'}"
            )
    check_architecture(path, theirs, config.model, names)
    fresh = fresh_layers(path, theirs, config)
    return Source(path, foreign, fresh, any(KINDS[kind].routed for kind in theirs.mlp_kinds))


def _open_foreign(path: Path, ours: ModelConfig) -> ForeignModel | None:
    """The model of another format that is in a folder; None if it looks like none of them.

    Args:
        ours: the run's model.
    """
    if LlamaFolder.recognizes(path):
        return LlamaFolder(path)
    if MegatronFolder.recognizes(path):
        return MegatronFolder(path, ours)
    return None


@torch.no_grad()
def _copy_blocks(source: ForeignModel, model: nn.ModuleList, skip: tuple[str, ...]) -> None:
    """Fill this rank's blocks of the model's dense tensors from a source of another format.

    Rows of the padded vocabulary that the source does not have stay as they were drawn.

    Args:
        skip: beginnings of keys that are left as they are.
    """
    for key, where, memory in dense_blocks(model):
        if not key.startswith(skip):
            block = source.block(key, where)
            memory[: len(block)].copy_(block)
