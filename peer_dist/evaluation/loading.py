"""A trained model from a checkpoint, at any number of ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from peer_dist.checkpoints.manifest import read_manifest
from peer_dist.checkpoints.state import restore_weights
from peer_dist.checkpoints.store import find_checkpoint, verify_checkpoint
from peer_dist.config import Config, ConfigError, parse_config
from peer_dist.config.schema import DataConfig
from peer_dist.data.documents import DataError
from peer_dist.data.stream import HeldOutStream, SplitStreams, check_data, open_data
from peer_dist.data.tokenizer import TextTokenizer, load_tokenizer
from peer_dist.kernels.disk import FolderError, check_folder
from peer_dist.kinds import KINDS
from peer_dist.megatron import CheckpointError, Parallel, build_model

SPLITS = ("validation", "test", "all")


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode and all that is needed to feed it."""

    model: torch.nn.ModuleList
    config: Config
    tokenizer: TextTokenizer
    parallel: Parallel
    path: Path
    step: int


@dataclass(frozen=True)
class Settings:
    """What a checkpoint says of its model, without a tensor."""

    path: Path
    step: int
    dtype: torch.dtype
    config: Config
    tokenizer: TextTokenizer


def read_settings(checkpoint: str, tensor: int = 1, pipeline: int = 1) -> Settings:
    """All that can be known of a checkpoint before ranks meet.

    Args:
        checkpoint, tensor, pipeline: as in :func:`load_model`.

    Raises:
        CheckpointError, DataError: there is no complete checkpoint, or it is damaged.
        ConfigError: its config is none of this version's, or the model cannot be divided so.
    """
    path = find_checkpoint(checkpoint)
    manifest = read_manifest(path)
    dtype = manifest.get("dtype")
    if dtype not in ("float32", "bfloat16"):
        raise CheckpointError(f"{path}: is of the dtype {dtype!r:.40}, which no run of this package has")
    tree = {**manifest["config"], "parallel": {}, "zero": {}}
    for kind in KINDS.values():  # scratch files lie where this machine has a place for them
        keys = tree.get(kind.name, {})
        if folder := keys.get("table_folder"):
            try:
                check_folder(Path(folder), 0)
            except FolderError:
                tree[kind.name] = {**keys, "table_folder": ""}
    config = parse_config(tree, str(path))
    if tensor > 1 and (_coarse(config) or config.router.kind != "linear"):
        raise ConfigError(
            f"--tensor must be 1 for {path}: coarse experts and routers with a state need sequence parallelism, which "
            "a single token cannot be split by; experts are spread over all ranks without it"
        )
    config = parse_config({**tree, "parallel": {"tensor": tensor, "pipeline": pipeline}}, str(path))
    tokenizer = load_tokenizer(str(path / "tokenizer.json"))
    return Settings(path, manifest["step"], getattr(torch, dtype), config, tokenizer)


def _coarse(config: Config) -> list[int]:
    """Numbers of coarse experts, by kind of layer."""
    return [experts.number for kind in config.kinds if (experts := kind.experts(config))]


def load_model(checkpoint: str, world_size: int, tensor: int = 1, pipeline: int = 1) -> LoadedModel:
    """Build the model of a checkpoint (or of the newest one in a folder) and load its weights.

    Needs torch.distributed; experts are spread over all ranks of a stage, whatever layout saved them, or, where the
    ranks do not divide coarse experts, over as many as do, with copies.

    Args:
        tensor, pipeline: ranks that share each layer's matrices, and stages; what is not :func:`generate
            <peer_dist.evaluation.generate.generate>` needs the whole model on every rank.

    Raises:
        CheckpointError: there is no complete checkpoint, or it is damaged.
        ConfigError: the ranks or the model cannot be divided so.
    """
    if world_size % (tensor * pipeline):
        raise ConfigError(
            f"--tensor {tensor} x --pipeline {pipeline} does not divide the {world_size} rank(s) that were started; "
            f"start a multiple of {tensor * pipeline}"
        )
    settings = read_settings(checkpoint, tensor, pipeline)
    path, config, tokenizer = settings.path, settings.config, settings.tokenizer
    verify_checkpoint(path)
    rows = math.gcd(world_size // pipeline, *_coarse(config))
    parallel = Parallel.initialize(tensor=tensor, pipeline=pipeline, expert=rows, seed=config.train.seed)
    model = build_model(config, parallel, tokenizer.padded_vocab_size, settings.dtype)
    restore_weights(path, model, parallel)
    model.eval()
    return LoadedModel(model, config, tokenizer, parallel, path, settings.step)


@dataclass(frozen=True)
class HeldOutText:
    """A split of a prepared data set.

    Attributes:
        name: of the data set, or several names with commas.
        stream: the split's sequences.
        streams: those of all splits.
    """

    name: str
    stream: HeldOutStream
    streams: SplitStreams


def check_text(settings: Settings, prefix: str | None, split: str) -> None:
    """Refuse a split or a data set that :func:`open_text` could not open, before ranks meet.

    Args:
        settings: of the checkpoint.
        prefix, split: as for :func:`open_text`.

    Raises:
        DataError: as :func:`open_text` does.
    """
    if split not in SPLITS:
        raise DataError(f"--split {split:.40}: must be one of {', '.join(SPLITS)}")
    data = _text_config(settings, prefix, split)
    checked = check_data(data, settings.config.model.seq_length, settings.config.train.seed)
    if split != "all" and not checked.sequences[split]:
        raise _no_sequence(data, split)


def _text_config(of: Settings | LoadedModel, prefix: str | None, split: str) -> DataConfig:
    """What to open for a split of a data set, in a checkpoint's own tokens."""
    changes: dict[str, object] = {"tokenizer": str(of.path / "tokenizer.json")}
    if prefix is not None:
        changes |= {"prefix": prefix, "blend": None}
    if split == "all":
        changes["split"] = "1,0,0"
    return of.config.data.model_copy(update=changes)


def _no_sequence(data: DataConfig, split: str) -> DataError:
    return DataError(
        f"{', '.join(data.weights)}: the {split} split has no whole sequence (data.split is {data.split}); evaluate "
        "another split, or --split all of another data set"
    )


def open_text(loaded: LoadedModel, prefix: str | None, split: str) -> HeldOutText:
    """A split of a prepared data set, in the model's tokens.

    Args:
        prefix: None for the data set that the checkpoint was trained on.
        split: one of :data:`SPLITS`; ``all`` takes every document of the data set.

    Raises:
        DataError: the data set cannot be read, has another tokenizer, or has no such split.
    """
    data = _text_config(loaded, prefix, split)
    streams = open_data(data, loaded.config.model.seq_length, loaded.config.train.seed)
    name = ", ".join(data.weights)
    if split == "all":
        return HeldOutText(name, HeldOutStream(streams.train.datasets), streams)
    stream = streams.validation if split == "validation" else streams.test
    if stream is None:
        raise _no_sequence(data, split)
    return HeldOutText(name, stream, streams)
