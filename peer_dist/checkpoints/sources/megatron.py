"""Checkpoints of Megatron-core's GPT models, as its ``dist_checkpointing`` writes them (``torch_dist``)."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from peer_dist.checkpoints.manifest import MANIFEST, step_of
from peer_dist.checkpoints.sources.foreign_model import ForeignModel
from peer_dist.config import ConfigError
from peer_dist.config.schema import ModelConfig
from peer_dist.data.tokenizer import TextTokenizer
from peer_dist.megatron import CheckpointError
from peer_dist.megatron.reader import StoredTensors
from peer_dist.reading import read_text, reading

_ADVICE = "copy the checkpoint again, or name another one in checkpoint.init_from"
_MOST_LAYERS = 100_000
_LATEST = "latest_checkpointed_iteration.txt"
_EMBEDDING = "embedding.word_embeddings.weight"
_HEAD = "output_layer.weight"
# our name of a layer's tensor: its other name in TransformerEngine's layers, which keep a norm with the next matrix
_LAYER = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "self_attention.linear_qkv.weight": None,
    "self_attention.linear_proj.weight": None,
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    "mlp.linear_fc1.weight": None,
    "mlp.linear_fc2.weight": None,
}
_OUTSIDE_LAYERS = (_EMBEDDING, "decoder.final_layernorm.weight", _HEAD)


class MegatronFolder(ForeignModel):
    """One such checkpoint, or the newest one of a run of Megatron-LM.

    Nothing in it is run, so its arguments are not read. Whatever shapes do not show (heads, the base of rotary
    positions, the norm's epsilon) is taken from the run's config.

    Args:
        path: of the checkpoint, or of the run's folder.
        ours: the run's model.

    Raises:
        CheckpointError: a file is missing or cannot be read.
        ConfigError: the model has something that models of this package do not have.
    """

    names: ClassVar[Mapping[str, str]] = {}  # its tensors have our keys

    def __init__(self, path: Path, ours: ModelConfig) -> None:
        self.path = _newest(path)
        with reading(self.path, CheckpointError, "a checkpoint of a GPT model of Megatron-core", _ADVICE):
            self._tensors = StoredTensors(self.path, others=True)
            self._shapes = self._tensors.shapes
            self._layers = self._count_layers()
            if not self._layers:
                raise CheckpointError(
                    f"{self.path}: has no tensor decoder.layers...; name a GPT model of Megatron-core"
                )
            self._refuse_what_differs()
            self.model = self._architecture(ours)

    @staticmethod
    def recognizes(path: Path) -> bool:
        """Whether the folder is a run's of Megatron-LM, or a ``torch_dist`` checkpoint that is not one of ours."""
        ours = os.path.isfile(path / MANIFEST) or step_of(path) is not None  # which may have lost its manifest
        return os.path.isfile(path / _LATEST) or (os.path.isfile(path / ".metadata") and not ours)

    def check_vocabulary(self, tokenizer: TextTokenizer) -> None:
        """Refuse a tokenizer with more tokens than the embedding has rows; the tokens themselves are not stored.

        Raises:
            ConfigError: it has more.
        """
        rows = self._shapes[_EMBEDDING][0]
        if tokenizer.vocab_size > rows:
            raise ConfigError(
                f"checkpoint.init_from: {self.path} has {rows} rows of embedding, but the data's tokenizer "
                f"{tokenizer.name} has {tokenizer.vocab_size} tokens; prepare the data with the model's tokenizer"
            )

    def block(self, key: str, where: tuple[slice, ...]) -> Tensor:
        """Read a block of the tensor ``key``: see :class:`ForeignModel`."""
        stored, layer = self._locate(key)
        slices = [*layer, *where]
        if key in (_EMBEDDING, _HEAD):
            rows = self._shapes[stored][0]
            slices[0] = slice(min(where[0].start, rows), min(where[0].stop, rows))
        with reading(f"{self.path}: its {stored}", CheckpointError, "what .metadata says of it", _ADVICE):
            return self._tensors.part(stored, slices)[(0,) * len(layer)]

    def _locate(self, key: str) -> tuple[str, tuple[slice, ...]]:
        """The stored tensor that has our ``key``, and the layer's place in it, if it holds all layers.

        Raises:
            CheckpointError: a layer's tensor is missing.
        """
        match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", key)
        if match is None:
            return key, ()
        number, name = int(match[1]), match[2]
        for stored_name in filter(None, (name, _LAYER[name])):
            if f"decoder.layers.{number}.{stored_name}" in self._shapes:
                return f"decoder.layers.{number}.{stored_name}", ()
            if f"decoder.layers.{stored_name}" in self._shapes:
                return f"decoder.layers.{stored_name}", (slice(number, number + 1),)
        raise CheckpointError(f"{self.path}: the tensor {key} is missing")

    def _count_layers(self) -> int:
        """The number of layers, each with tensors of its own or all in one; 0 if there is no tensor of a layer.

        Raises:
            CheckpointError: there are absurdly many.
        """
        numbers = [
            int(match[1]) for key in self._shapes if (match := re.match(r"decoder\.layers\.([0-9]{1,9})\.", key))
        ]
        stacked = [shape[0] for key, shape in self._shapes.items() if re.match(r"decoder\.layers\.[a-z]", key)]
        layers = max([*(number + 1 for number in numbers), *stacked], default=0)
        if layers > _MOST_LAYERS:
            raise CheckpointError(f"{self.path}: has {layers} layers, which no model has; {_ADVICE}")
        return layers

    def _refuse_what_differs(self) -> None:
        """Refuse a model that has other tensors than ours.

        Raises:
            ConfigError: a tensor has no counterpart in our models.
            CheckpointError: a tensor of ours is missing.
        """
        known = {*_LAYER, *_LAYER.values()}
        for key in self._shapes:
            if not key.startswith(("decoder.", "embedding.", "output_layer.", "mtp.")) or "_extra_state" in key:
                continue  # of the optimizer, or of random states
            name = re.sub(r"^decoder\.layers\.(\d+\.)?", "", key)
            if name not in known and key not in _OUTSIDE_LAYERS:
                raise ConfigError(
                    f"checkpoint.init_from: {self.path} has the tensor {key}, which models of this package have not "
                    "(they have RMSNorm, rotary positions, dense feed-forwards, and no biases); take another model"
                )
        wanted = [*_OUTSIDE_LAYERS[:2], *(f"decoder.layers.{n}.{name}" for n in range(self._layers) for name in _LAYER)]
        for key in wanted:
            stored, _ = self._locate(key)
            if stored not in self._shapes:
                raise CheckpointError(f"{self.path}: the tensor {key} is missing")

    def _shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor of the first layer."""
        stored, layer = self._locate(f"decoder.layers.0.{name}")
        return self._shapes[stored][len(layer) :]

    def _architecture(self, ours: ModelConfig) -> ModelConfig:
        """The run's model, with the sizes that the stored shapes show.

        Raises:
            ConfigError: the run's number of heads does not fit the shapes.
        """
        d, hidden = self._shape("mlp.linear_fc2.weight")
        width = d // ours.num_attention_heads
        groups, rest = divmod(self._shape("self_attention.linear_qkv.weight")[0] - d, 2 * max(width, 1))
        if rest or not groups:
            raise ConfigError(
                f"checkpoint.init_from: the queries, keys and values of {self.path} are "
                f"{self._shape('self_attention.linear_qkv.weight')}, which model.num_attention_heads = "
                f"{ours.num_attention_heads} does not give; set it to the model's"
            )
        gated = self._shape("mlp.linear_fc1.weight")[0] == 2 * hidden
        return ours.model_copy(
            update={
                "num_layers": self._layers,
                "hidden_size": d,
                "num_query_groups": groups,
                "ffn_hidden_size": hidden,
                "ffn_activation": "swiglu" if gated else "gelu",
                "tied_embeddings": _HEAD not in self._shapes,
            }
        )


def _newest(path: Path) -> Path:
    """The newest checkpoint of a run of Megatron-LM; ``path`` itself if it is no run's folder.

    Raises:
        CheckpointError: the checkpoint is missing, or of another format than ``torch_dist``.
    """
    if not os.path.isfile(path / _LATEST):
        return path
    text = read_text(path / _LATEST, CheckpointError, _ADVICE, most=1000).strip()
    if not re.fullmatch(r"[A-Za-z0-9][\w-]{0,60}", text):
        raise CheckpointError(f"{path / _LATEST}: holds neither a number nor a name of a checkpoint; {_ADVICE}")
    newest = path / (f"iter_{int(text):07d}" if text.isdecimal() else text)
    if not os.path.isfile(newest / ".metadata"):
        raise CheckpointError(
            f"{newest}: has no .metadata: is not of Megatron's format torch_dist; save it with --ckpt-format torch_dist"
        )
    return newest
