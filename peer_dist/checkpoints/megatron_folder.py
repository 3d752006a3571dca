"""Checkpoints of Megatron-core's GPT models, as its ``dist_checkpointing`` writes them (``torch_dist``)."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from peer_dist.config import ConfigError
from peer_dist.config.schema import ModelConfig
from peer_dist.data.tokenizer import TextTokenizer
from peer_dist.megatron import CheckpointError
from peer_dist.megatron.reader import StoredTensors

_LATEST = "latest_checkpointed_iteration.txt"
_WORDS = "embedding.word_embeddings.weight"
_HEAD = "output_layer.weight"
# of a layer, ours to what TransformerEngine's layers call the same, which keep norms with the matrix that follows
_LAYER = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "self_attention.linear_qkv.weight": None,
    "self_attention.linear_proj.weight": None,
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    "mlp.linear_fc1.weight": None,
    "mlp.linear_fc2.weight": None,
}
_OUTSIDE = (_WORDS, "decoder.final_layernorm.weight", _HEAD)


class MegatronFolder:
    """A folder of one, or the newest of a run of Megatron-LM. Nothing in it is run: arguments are not read.

    So what shapes do not tell (heads, the base of rotary positions, the norm's epsilon) is taken to be as in the run's
    config.

    Attributes:
        model: the model section of a config of the same architecture, as far as shapes tell it.
        names: its keys that have another name there; none.

    Raises:
        CheckpointError: a file is missing or cannot be read.
        ConfigError: it has what our models have not.
    """

    names: ClassVar[dict[str, str]] = {}

    def __init__(self, path: Path, ours: ModelConfig) -> None:
        self.path = _newest(path)
        try:
            self._tensors = StoredTensors(self.path, others=True)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{self.path}: cannot be read as a checkpoint of Megatron-core ({error})") from None
        self._shapes = self._tensors.shapes
        self._layers = self._count_layers()
        if not self._layers:
            raise CheckpointError(f"{self.path}: has no tensor decoder.layers...; name a GPT model of Megatron-core")
        self._refuse_what_differs()
        self.model = self._architecture(ours)

    @staticmethod
    def is_one(path: Path) -> bool:
        return (path / _LATEST).is_file() or ((path / ".metadata").is_file() and not (path / "manifest.json").is_file())

    def check_vocabulary(self, tokenizer: TextTokenizer) -> None:
        """Refuse a tokenizer of more tokens than the embedding has rows; what they stand for is not written there.

        Raises:
            ConfigError: it has more.
        """
        rows = self._shapes[_WORDS][0]
        if tokenizer.vocab_size > rows:
            raise ConfigError(
                f"checkpoint.init_from: {self.path} has {rows} rows of embedding, but the data's tokenizer "
                f"{tokenizer.name} has {tokenizer.vocab_size} tokens; prepare the data with the model's tokenizer"
            )

    def block(self, key: str, where: tuple[slice, ...]) -> Tensor:
        """A part of what our models call ``key``; of rows beyond the vocabulary nothing.

        Raises:
            CheckpointError: a file is damaged.
        """
        stored, place = self._find(key)
        wanted = [*place, *where]
        if key in (_WORDS, _HEAD):
            rows = self._shapes[stored][0]
            wanted[0] = slice(min(where[0].start, rows), min(where[0].stop, rows))
        try:
            return self._tensors.part(stored, wanted)[(0,) * len(place)]
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{self.path}: its {stored} cannot be read ({error})") from None

    def _find(self, key: str) -> tuple[str, tuple[slice, ...]]:
        """What it is called there, and where in it the layer is, if all layers' are one tensor."""
        match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", key)
        if match is None:
            return key, ()
        number, name = int(match[1]), match[2]
        for each in filter(None, (name, _LAYER[name])):
            if f"decoder.layers.{number}.{each}" in self._shapes:
                return f"decoder.layers.{number}.{each}", ()
            if f"decoder.layers.{each}" in self._shapes:
                return f"decoder.layers.{each}", (slice(number, number + 1),)
        raise CheckpointError(f"{self.path}: the tensor {key} is missing")

    def _count_layers(self) -> int:
        numbers = [int(match[1]) for key in self._shapes if (match := re.match(r"decoder\.layers\.(\d+)\.", key))]
        stacked = [shape[0] for key, shape in self._shapes.items() if re.match(r"decoder\.layers\.[a-z]", key)]
        return max([*(number + 1 for number in numbers), *stacked], default=0)

    def _refuse_what_differs(self) -> None:
        known = {*_LAYER, *_LAYER.values()}
        for key in self._shapes:
            if not key.startswith(("decoder.", "embedding.", "output_layer.", "mtp.")) or "_extra_state" in key:
                continue  # the optimizer's, random states
            name = re.sub(r"^decoder\.layers\.(\d+\.)?", "", key)
            if name not in known and key not in _OUTSIDE:
                raise ConfigError(
                    f"checkpoint.init_from: {self.path} has the tensor {key}, which models of this package have not "
                    "(they have RMSNorm, rotary positions, dense feed-forwards, and no biases); take another model"
                )
        wanted = [*_OUTSIDE[:2], *(f"decoder.layers.{n}.{name}" for n in range(self._layers) for name in _LAYER)]
        for key in wanted:
            stored, _ = self._find(key)
            if stored not in self._shapes:
                raise CheckpointError(f"{self.path}: the tensor {key} is missing")

    def _shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor of this name in the first layer."""
        stored, place = self._find(f"decoder.layers.0.{name}")
        return self._shapes[stored][len(place) :]

    def _architecture(self, ours: ModelConfig) -> ModelConfig:
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
    if not (path / _LATEST).is_file():
        return path
    text = (path / _LATEST).read_text(encoding="utf-8").strip()
    newest = path / (f"iter_{int(text):07d}" if text.isdecimal() else text)
    if not (newest / ".metadata").is_file():
        raise CheckpointError(
            f"{newest}: has no .metadata: is not of Megatron's format torch_dist; save it with --ckpt-format torch_dist"
        )
    return newest
