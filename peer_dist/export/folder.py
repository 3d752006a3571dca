"""``peer-dist export``: a checkpoint, whatever layout wrote it, as a folder that two readers understand."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from peer_dist.checkpoints.files import sync
from peer_dist.checkpoints.manifest import read_manifest
from peer_dist.checkpoints.store import find_checkpoint, verify_checkpoint
from peer_dist.config import Config, ConfigError, parse_config, unwritable
from peer_dist.data.documents import DataError
from peer_dist.data.tokenizer import END_OF_DOCUMENT, TextTokenizer, load_tokenizer
from peer_dist.export.joined import joined_source
from peer_dist.export.peer_model import PREFIX
from peer_dist.export.shards import DTYPES, Entry, parse_size, write_shards
from peer_dist.kinds import KINDS
from peer_dist.kinds.product_keys import PLACEMENT
from peer_dist.megatron import CheckpointError
from peer_dist.megatron.dist_checkpoint import check_tensors
from peer_dist.megatron.reader import StoredTensors
from peer_dist.reading import reading
from peer_dist.writing import no_empty_folders, why_unwritten

_BLOCK = 1 << 22  # numbers read at a time
_MODEL, _FOR_TRANSFORMERS = "peer_model.py", "modeling_peer.py"
_NOT_WEIGHTS = ("optimizer.", "revival.")  # keys of a checkpoint that only training reads
_KEYS = {
    "embedding.weight": "embedding.word_embeddings.weight",
    "output.weight": "output_layer.weight",
    "norm.weight": "decoder.final_layernorm.weight",
}
_LAYER_KEYS = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.qkv.weight": "self_attention.linear_qkv.weight",
    "attention.out.weight": "self_attention.linear_proj.weight",
    "mlp_norm.weight": "pre_mlp_layernorm.weight",
}


@dataclass(frozen=True)
class Exported:
    """Attributes: ``bytes`` of the ``tensors`` written, of the checkpoint ``path``."""

    path: Path
    step: int
    tensors: int
    bytes: int


def export(
    checkpoint: str, output: str | os.PathLike[str], dtype: str = "float32", shard_size: str = "5GB"
) -> Exported:
    """Write the model of a checkpoint (or of the newest one in a folder) into a new folder, complete or not at all.

    Tensors are read and written some rows at a time. Needs torch.distributed, of one rank.

    Args:
        dtype: of the weights; the statistics of BatchNorm and the experts' bias stay float32.
        shard_size: of a file at most, such as ``500MB``; a larger tensor has a file of its own.

    Raises:
        DataError: an option cannot be used, ``output`` exists, or it cannot be written.
        ConfigError: the model has no next-token logits.
        CheckpointError: there is no complete checkpoint, or it is damaged.
    """
    output, limit = Path(output), parse_size(shard_size)
    if dtype not in DTYPES:
        raise DataError(f"--dtype {dtype}: must be one of {', '.join(DTYPES)}")
    if os.path.lexists(output):
        raise DataError(f"--output {output}: is there already, and nothing is replaced; name a new folder")
    if problem := unwritable(output):
        raise DataError(f"--output {output}: cannot be written ({problem}); name another place")
    path = find_checkpoint(checkpoint)
    verify_checkpoint(path)
    manifest = read_manifest(path)
    config = parse_config({**manifest["config"], "parallel": {}, "zero": {}}, str(path))
    if reason := config.not_causal:
        raise ConfigError(
            f"{path}: {reason}, so that it has no next-token logits to export; train one with {reason.instead} for that"
        )
    tokenizer = load_tokenizer(str(path / "tokenizer.json"))
    settings = model_settings(config, tokenizer, dtype)
    code = joined_source({kind.name: kind.exported() for kind in config.kinds})
    entries = _entries(path, settings, code)
    unfinished = output.with_name(f".{output.name[:100]}.partial-{os.getpid()}")
    with no_empty_folders(output.parent):
        try:
            unfinished.mkdir(parents=True)
            (unfinished / _MODEL).write_text(code, encoding="utf-8")
            written = write_shards(unfinished, entries, limit)
            _write_settings(unfinished, settings)
            _write_tokenizer(unfinished, path, settings)
            shutil.copyfile(Path(__file__).with_name(_FOR_TRANSFORMERS), unfinished / _FOR_TRANSFORMERS)
            for written_path in (*unfinished.iterdir(), unfinished):
                sync(written_path)
            unfinished.rename(output)
            sync(output.parent)
        except OSError as error:
            raise DataError(f"--output {output}: {why_unwritten(error)}") from None
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return Exported(path, int(manifest["step"]), len(entries), written)


def model_settings(config: Config, tokenizer: TextTokenizer, dtype: str) -> dict[str, Any]:
    """What ``config.json`` holds: transformers' names where it has one, else those of the run's config."""
    model = config.model
    settings = {
        "model_type": "peer_dist",
        "architectures": ["PeerForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_peer.PeerConfig",
            "AutoModelForCausalLM": "modeling_peer.PeerForCausalLM",
        },
        "dtype": dtype,
        "vocab_size": tokenizer.padded_vocab_size,
        "text_vocab_size": tokenizer.vocab_size,
        "bos_token_id": tokenizer.eod,
        "eos_token_id": tokenizer.eod,
        "pad_token_id": tokenizer.eod,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.query_groups,
        "rope_theta": model.rope_base,
        "rms_norm_eps": model.norm_eps,
        "intermediate_size": model.ffn_hidden_size,
        "max_position_embeddings": model.seq_length,
        "tie_word_embeddings": model.tied_embeddings,
        "ffn_activation": model.ffn_activation,
        "ffn_top_k": model.ffn_top_k,
        "mlp": model.mlp_kinds,
    }
    sections = sorted(kind.name for kind in config.kinds if kind.section is not None)
    sections += ["router"] * any(kind.routed for kind in config.kinds)
    return {
        **settings,
        **{name: getattr(config, name).model_dump(mode="json", exclude=set(PLACEMENT)) for name in sections},
    }


def _entries(path: Path, settings: dict[str, Any], code: str) -> list[Entry]:
    """Every tensor of the model, and where the checkpoint has it.

    Args:
        code: of the model, as it is written.

    Raises:
        CheckpointError: they are not those of the checkpoint.
    """
    module = ModuleType("exported_model")
    exec(compile(code, _MODEL, "exec"), module.__dict__)  # the package's own code and that of installed kinds
    with torch.device("meta"):
        model = module.LanguageModel(settings)
    exact = {name for name, _ in model.named_buffers()}
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    keys = {name: stored_key(name, settings["mlp"]) for name in shapes}
    check_tensors(path, {keys[name]: shape for name, shape in shapes.items()})
    stored = StoredTensors(path)
    for key in sorted(stored.shapes.keys() - set(keys.values())):
        if not key.startswith(_NOT_WEIGHTS):
            raise CheckpointError(f"{key} is in the checkpoint {path}, but its config has no such part of a model")
    return [
        Entry(
            PREFIX + name,
            shape,
            "float32" if name in exact else settings["dtype"],
            partial(_rows, stored, keys[name], path),
        )
        for name, shape in shapes.items()
    ]


def _rows(stored: StoredTensors, key: str, path: Path) -> Iterator[torch.Tensor]:
    """The rows of a tensor, some at a time.

    Raises:
        CheckpointError: what is stored is not what the checkpoint says of it.
    """
    with reading(f"{path}: its {key}", CheckpointError, "what .metadata says of it"):
        yield from stored.rows(key, _BLOCK)


def stored_key(name: str, kinds: list[str]) -> str:
    """The checkpoint's key of a tensor of :class:`LanguageModel`."""
    match = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    if match is None:
        return _KEYS.get(name, name)
    number, rest = int(match[1]), match[2]
    if rest.startswith("mlp."):
        return KINDS[kinds[number]].stored_key(rest.removeprefix("mlp."), number + 1)
    if rest.startswith("router_state."):
        return f"decoder.layers.{number}.mlp.{rest}"
    return f"decoder.layers.{number}.{_LAYER_KEYS[rest]}"


def _write_settings(folder: Path, settings: dict[str, Any]) -> None:
    padding = list(range(settings["text_vocab_size"], settings["vocab_size"]))  # rows that stand for no token
    generation = {key: settings[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "config.json", settings)
    _write_json(folder / "generation_config.json", {**generation, **({"suppress_tokens": padding} if padding else {})})


def _write_tokenizer(folder: Path, path: Path, settings: dict[str, Any]) -> None:
    """As training used it; with special tokens a text begins as a document does, after an end-of-document token."""
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(
        single=f"{END_OF_DOCUMENT} $A", special_tokens=[(END_OF_DOCUMENT, settings["eos_token_id"])]
    )
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    options = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_DOCUMENT,
        "eos_token": END_OF_DOCUMENT,
        "pad_token": END_OF_DOCUMENT,
        "padding_side": "left",
        "model_max_length": settings["max_position_embeddings"],
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # spelled out in a text they are text
    }
    _write_json(folder / "tokenizer_config.json", options)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
