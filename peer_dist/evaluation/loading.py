"""A trained model from a checkpoint, at any number of ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from peer_dist.config import Config, parse_config
from peer_dist.data.tokenizer import TextTokenizer, load_tokenizer
from peer_dist.megatron import CheckpointError, Parallel, build_model
from peer_dist.training.checkpoints import find_checkpoint, read_manifest, restore_weights, verify_checkpoint


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode and all that is needed to feed it."""

    model: torch.nn.ModuleList
    config: Config
    tokenizer: TextTokenizer
    parallel: Parallel
    path: Path
    step: int


def load_model(checkpoint: str, world_size: int) -> LoadedModel:
    """Build the model of a checkpoint (or of the newest one in a folder) and load its weights.

    Needs torch.distributed; experts are spread over all ranks, whatever layout saved them, or, where the ranks do not
    divide coarse experts, over as many as do, with copies.

    Raises:
        CheckpointError: there is no complete checkpoint, or it is damaged.
    """
    path = find_checkpoint(checkpoint)
    verify_checkpoint(path)
    manifest = read_manifest(path)
    if manifest["dtype"] not in ("float32", "bfloat16"):
        raise CheckpointError(f"{path}: is of the dtype {manifest['dtype']!r}, which no run of this package has")
    tree = manifest["config"]
    tree["parallel"], tree["zero"] = {}, {}
    config = parse_config(tree, str(path))
    counts = {"moe": config.moe.num_experts, "sigma_moe": config.sigma_moe.num_experts}
    rows = math.gcd(world_size, *(counts[kind] for kind in config.model.mlp_kinds if kind in counts))
    parallel = Parallel.initialize(expert=rows, seed=config.train.seed)
    tokenizer = load_tokenizer(str(path / "tokenizer.json"))
    model = build_model(config, parallel, tokenizer.padded_vocab_size, getattr(torch, manifest["dtype"]))
    restore_weights(path, model, parallel)
    model.eval()
    return LoadedModel(model, config, tokenizer, parallel, path, manifest["step"])
