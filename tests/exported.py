"""Exported folders of small models with random weights, made in the test's own process."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

import torch

from peer_dist.checkpoints.state import weights_state
from peer_dist.checkpoints.store import CheckpointStore
from peer_dist.data.tokenizer import load_tokenizer
from peer_dist.export.folder import export
from peer_dist.megatron import build_model, forward_logits
from tests.models import make

SIZES: dict[str, Any] = {
    "model": {
        "num_layers": 3,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "ffn_hidden_size": 24,
        "seq_length": 16,
    },
    "peer": {"num_experts": 64, "heads": 2, "top_k": 3, "key_dim": 8},
    "pkm": {"num_values": 81, "heads": 2, "top_k": 5, "key_dim": 8},
    "moe": {"num_experts": 6, "top_k": 2},
    "sigma_moe": {"num_experts": 10, "expert_hidden_size": 12, "top_k": 3},
    "router": {"state_size": 8},
    "data": {"prefix": "unused"},
}


def build(changes, parallel, seed=3):
    """The training system's model, in evaluation mode, with weights that make context, picks and gates matter."""
    config = make(changes, of=SIZES)
    model = build_model(config, parallel, 384, torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            noise = torch.empty(value.shape, dtype=torch.float32).normal_(generator=generator)
            if value.ndim > 1:
                value.copy_(noise * (0.2 if "embedding" in name else 1.5 * value.shape[-1] ** -0.5))
            elif value.is_floating_point():
                value.copy_(0.3 * noise + ("norm" in name and "bias" not in name))
                if "running_var" in name:
                    value.abs_().add_(0.1)
    return config, model


def logits_of(model, tokens):
    with torch.no_grad():
        return forward_logits(model, tokens)


def exported(config, model, parallel, folder):
    """The folder of the model's exported checkpoint."""
    info = {"config": config.model_dump(mode="json"), "dtype": "float32"}
    CheckpointStore(folder / "checkpoints").save(1, weights_state(model, parallel), info, load_tokenizer("byte"))
    export(str(folder / "checkpoints"), folder / "model")
    return folder / "model"


def package_of(folder, monkeypatch) -> ModuleType:
    """The folder as a package, whose modules find each other as those do that transformers reads."""
    name = f"exported_{abs(hash(folder))}"
    package = ModuleType(name)
    package.__path__ = [str(folder)]
    monkeypatch.setitem(sys.modules, name, package)
    for module in ("peer_model", "modeling_peer"):
        if module == "peer_model" or importlib.util.find_spec("transformers"):
            monkeypatch.setitem(sys.modules, f"{name}.{module}", importlib.import_module(f"{name}.{module}"))
    return package
