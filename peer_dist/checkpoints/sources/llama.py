"""Llama models as Hugging Face's transformers writes them: ``config.json`` and safetensors."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor

from peer_dist.checkpoints.sources.foreign_model import ForeignModel
from peer_dist.config import ConfigError
from peer_dist.config.load import sentence
from peer_dist.config.schema import ModelConfig
from peer_dist.data.tokenizer import TextTokenizer
from peer_dist.megatron import CheckpointError
from peer_dist.mistake import in_words
from peer_dist.reading import check_regular, read_object, reading

_ADVICE = "copy the model again, or name another one in checkpoint.init_from"
_MOST = 1 << 31  # what no size of a model reaches
# our key: theirs, and its value where config.json does not have it
_KEYS: dict[str, tuple[str, Any]] = {
    "num_layers": ("num_hidden_layers", None),
    "hidden_size": ("hidden_size", None),
    "num_attention_heads": ("num_attention_heads", None),
    "num_query_groups": ("num_key_value_heads", None),
    "ffn_hidden_size": ("intermediate_size", None),
    "rope_base": ("rope_theta", 10000.0),
    "norm_eps": ("rms_norm_eps", 1e-6),
    "tied_embeddings": ("tie_word_embeddings", False),
}
_REQUIRED = ("vocab_size", "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
# keys that our models have no counterpart of, and the one value that they stand for
_FIXED: dict[str, Any] = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "quantization_config": None}

_OUTSIDE_LAYERS = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
_LAYER = {  # where there are several, LlamaFolder.block puts them together
    "input_layernorm.weight": ("input_layernorm",),
    "self_attention.linear_qkv.weight": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention.linear_proj.weight": ("self_attn.o_proj",),
    "pre_mlp_layernorm.weight": ("post_attention_layernorm",),
    "mlp.linear_fc1.weight": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.linear_fc2.weight": ("mlp.down_proj",),
}


class LlamaFolder(ForeignModel):
    """A folder with one such model; ``names`` are the keys of ``config.json``.

    Raises:
        CheckpointError: a file is missing or cannot be read.
        ConfigError: the model has something that models of this package do not have.
    """

    names: ClassVar[Mapping[str, str]] = {ours: theirs for ours, (theirs, _) in _KEYS.items()}

    def __init__(self, path: Path) -> None:
        self.path = path
        file = path / "config.json"
        tree = read_object(file, CheckpointError, _ADVICE)
        for key in ("rope_parameters", "rope_scaling"):
            if not isinstance(tree.get(key) or {}, dict):
                raise CheckpointError(f"{file}: its {key} is no object; {_ADVICE}")
        tree = {**(tree.get("rope_parameters") or {}), **tree}  # where transformers 5 has rope_theta
        for key in _REQUIRED:
            if type(tree.get(key)) is not int or not 0 < tree[key] < _MOST:
                raise CheckpointError(f"{file}: has no {key}, or not as a whole number from 1 on; {_ADVICE}")
        self._refuse_what_differs(tree)
        values = {ours: tree.get(theirs, default) for ours, (theirs, default) in _KEYS.items()}
        try:
            self.model = ModelConfig.model_validate({**values, "ffn_activation": "swiglu"})
        except ValidationError as error:
            raise ConfigError(sentence(error, str(path / "config.json"), {}, ModelConfig)) from None
        self._vocab_size: int = tree["vocab_size"]
        self._files = self._find_tensors()

    @staticmethod
    def recognizes(path: Path) -> bool:
        """Whether the folder has a ``config.json``."""
        return os.path.isfile(path / "config.json")

    def check_vocabulary(self, tokenizer: TextTokenizer) -> None:
        """Refuse a tokenizer whose ids stand for other tokens than the model's.

        Where there is a ``tokenizer.json``, tokens are compared; the end-of-document token may have another name in it.

        Raises:
            ConfigError: the number of tokens or one of them differs.
        """
        if not tokenizer.vocab_size <= self._vocab_size <= tokenizer.padded_vocab_size:
            raise ConfigError(
                f"checkpoint.init_from: {self.path} has vocab_size = {self._vocab_size}, but the data's tokenizer "
                f"{tokenizer.name} has {tokenizer.vocab_size} tokens (padded to {tokenizer.padded_vocab_size}); "
                "prepare the data with the model's tokenizer"
            )
        file = self.path / "tokenizer.json"
        if not os.path.isfile(file):
            return
        with reading(file, CheckpointError, "a tokenizer.json of Hugging Face tokenizers", _ADVICE):
            check_regular(file)
            theirs = {number: token for token, number in Tokenizer.from_file(str(file)).get_vocab().items()}
        for token, number in sorted(tokenizer.vocabulary.items(), key=lambda item: item[1]):
            if number != tokenizer.eod and theirs.get(number, token) != token:
                raise ConfigError(
                    f"checkpoint.init_from: in {file} the token {number} is {theirs[number]!r}, but {token!r} in the "
                    f"data's tokenizer {tokenizer.name}; prepare the data with the model's tokenizer"
                )

    def block(self, key: str, where: tuple[slice, ...]) -> Tensor:
        """Read a block of the tensor ``key``, which may be several tensors here: see :class:`ForeignModel`."""
        if key in _OUTSIDE_LAYERS:
            return self._read(_OUTSIDE_LAYERS[key], where)
        match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", key)
        assert match is not None, key
        names = [f"model.layers.{match.group(1)}.{name}.weight" for name in _LAYER[match.group(2)]]
        if len(names) == 1:
            return self._read(names[0], where)
        rows = where[0]
        if len(names) == 2:  # the gate's matrix above the other; a block lies within one of them
            hidden = self.model.ffn_hidden_size
            matrix, begin = divmod(rows.start, hidden)
            return self._read(names[matrix], (slice(begin, begin + rows.stop - rows.start),))
        # of each group the rows of its queries, then those of its key and its value
        width, groups = self.model.hidden_size // self.model.num_attention_heads, self.model.query_groups
        heads = [self.model.num_attention_heads // groups, 1, 1]
        first, last = (edge // (sum(heads) * width) for edge in (rows.start, rows.stop))
        parts = [
            self._read(name, (slice(first * size * width, last * size * width),)).unflatten(0, (last - first, -1))
            for name, size in zip(names, heads)
        ]
        return torch.cat(parts, 1).flatten(0, 1)

    def _read(self, name: str, where: tuple[slice, ...]) -> Tensor:
        path = self._files[name]
        with reading(path, CheckpointError, "what it was when the run began", _ADVICE), safe_open(path, "pt") as file:
            part: Tensor = file.get_slice(name)[where]
        return part

    def _shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The names and shapes that the architecture's tensors must have."""
        model, d = self.model, self.model.hidden_size
        keys = d // model.num_attention_heads * model.query_groups
        layer = {
            "input_layernorm": (d,),
            "self_attn.q_proj": (d, d),
            "self_attn.k_proj": (keys, d),
            "self_attn.v_proj": (keys, d),
            "self_attn.o_proj": (d, d),
            "post_attention_layernorm": (d,),
            "mlp.gate_proj": (model.ffn_hidden_size, d),
            "mlp.up_proj": (model.ffn_hidden_size, d),
            "mlp.down_proj": (d, model.ffn_hidden_size),
        }
        yield "model.embed_tokens.weight", (self._vocab_size, d)
        yield "model.norm.weight", (d,)
        if not model.tied_embeddings:
            yield "lm_head.weight", (self._vocab_size, d)
        for number in range(model.num_layers):
            for name, shape in layer.items():
                yield f"model.layers.{number}.{name}.weight", shape

    def _find_tensors(self) -> dict[str, Path]:
        """The file of each tensor, by the tensor's name. The header of every file is read, to refuse what is wrong now.

        Raises:
            CheckpointError: a file cannot be read, or a tensor is missing, of another shape, or packed.
        """
        files: dict[str, Path] = {}
        stored: dict[str, tuple[tuple[int, ...], str]] = {}
        for name in self._listed():
            path = self.path / name
            try:
                check_regular(path)
                with safe_open(path, framework="pt") as file:
                    for tensor in [*file.keys()]:
                        part = file.get_slice(tensor)
                        stored[tensor], files[tensor] = (tuple(part.get_shape()), part.get_dtype()), path
            except (OSError, SafetensorError) as error:
                reason = in_words(getattr(error, "strerror", None) or error)
                raise CheckpointError(f"{path}: cannot be read as safetensors ({reason}); {_ADVICE}") from None
        for tensor, shape in self._shapes():
            there, dtype = stored.get(tensor, ("missing", ""))
            if there != shape:
                raise CheckpointError(f"{self.path}: the tensor {tensor} is {there}, but by config.json {shape}")
            if dtype not in ("F64", "F32", "F16", "BF16"):
                raise CheckpointError(
                    f"{self.path}: the tensor {tensor} holds {dtype}, not numbers of floating point; take a model "
                    "that is not quantized"
                )
        return files

    def _listed(self) -> list[str]:
        """The names of the files with tensors.

        Raises:
            CheckpointError: the index cannot be read, or names a file elsewhere.
        """
        index = self.path / "model.safetensors.index.json"
        if not os.path.lexists(index):
            return ["model.safetensors"]
        homes = read_object(index, CheckpointError, _ADVICE).get("weight_map")
        if not isinstance(homes, dict) or not homes:
            raise CheckpointError(f"{index}: has no weight_map from tensors to files; {_ADVICE}")
        for name in homes.values():
            if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,200}", name):
                raise CheckpointError(f"{index}: names {name!r:.80}, which is no file of this folder; {_ADVICE}")
        return sorted(set(homes.values()))

    def _refuse_what_differs(self, tree: dict[str, Any]) -> None:
        """Refuse a ``config.json`` of a model that is computed otherwise than ours.

        Raises:
            ConfigError: naming the first key that says so.
        """
        scaling = {**(tree.get("rope_scaling") or {}), **tree}
        values = {  # of each key the value there, and the only one that is accepted
            "model_type": (tree.get("model_type"), "llama"),
            "rope_type": (scaling.get("rope_type", scaling.get("type", "default")), "default"),
            **{key: (tree.get(key, wanted), wanted) for key, wanted in _FIXED.items()},
        }
        if tree.get("head_dim") is not None:
            values["head_dim"] = (tree["head_dim"], tree["hidden_size"] // tree["num_attention_heads"])
        for key, (value, wanted) in values.items():
            if value != wanted:
                raise ConfigError(
                    f"checkpoint.init_from: {self.path / 'config.json'} has {key} = {in_words(str(value), 80)}, but "
                    f"models of this package have {wanted}; take another model"
                )
