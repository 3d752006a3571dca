"""Small models of every kind of layer, as configs, and a batch of tokens."""

from __future__ import annotations

from typing import Any

import torch

from peer_dist.config import Config, parse_config

VOCAB, EOD, SEQ = 64, 0, 16

SMALL: dict[str, Any] = {
    "model": {"num_layers": 3, "hidden_size": 32, "num_attention_heads": 2, "ffn_hidden_size": 48, "seq_length": 16},
    # tables of another dtype than the activations: only the plain backend, which the counter sees through, takes them
    "peer": {"num_experts": 64, "heads": 2, "top_k": 3, "key_dim": 8, "table_dtype": "bfloat16"},
    "pkm": {"num_values": 81, "heads": 2, "top_k": 5, "key_dim": 8, "table_dtype": "bfloat16"},
    "moe": {"num_experts": 6, "top_k": 2},
    "sigma_moe": {"num_experts": 10, "expert_hidden_size": 12, "top_k": 3},
    "router": {"state_size": 8},
    "data": {"prefix": "unused"},
}


def make(changes: dict[str, Any], of: dict[str, Any] = SMALL) -> Config:
    """The config ``of``, with keys such as `peer.heads` changed."""
    tree = {section: dict(keys) for section, keys in of.items()}
    for key, value in changes.items():
        section, name = key.split(".")
        tree.setdefault(section, {})[name] = value
    return parse_config(tree, "test")


ROUTERS = ({"router.kind": "recurrent"}, {"router.kind": "recurrent", "router.shared_projector": True},
           {"router.kind": "mlp"}, {"router.kind": "cosine"})  # fmt: skip
EVERY_PEER_KEY = {
    "peer.shared_keys": False, "peer.query_norm": "layer", "peer.key_norm": "rms", "peer.output_gate": True,
    "peer.dense_hidden": 20, "peer.layers_per_pool": 2,
}  # fmt: skip
CASES = [
    {},
    {"model.ffn_activation": "gelu", "model.tied_embeddings": False},
    {"model.ffn_top_k": 7},
    {"model.num_query_groups": 1},
    {"model.mlp": ["dense", "peer", "dense"]},
    {"model.mlp": "peer", **EVERY_PEER_KEY},
    {"model.mlp": "peer", "peer.query_norm": "rms", "peer.key_norm": "layer"},
    {"model.mlp": ["moe", "dense", "moe"]},
    {"model.mlp": "moe", "moe.expert_hidden_size": 20, "model.ffn_activation": "gelu"},
    {"model.mlp": ["dense", "pkm", "dense"]},
    {"model.mlp": "pkm", "pkm.query_projection": False, "pkm.query_norm": "none"},
    {"model.mlp": "pkm", "pkm.shared_keys": True, "pkm.query_norm": "rms"},
    {"model.mlp": "sigma_moe"},
    *({"model.mlp": "sigma_moe", **router} for router in ROUTERS),
    *({"model.mlp": "moe", **router} for router in ROUTERS),
    *({"model.mlp": ["peer", "dense", "peer"], **router} for router in ROUTERS[:3]),
]


def make_config(peer: dict[str, Any] | None = None, **model: Any) -> Config:
    sizes = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "ffn_hidden_size": 64,
        "seq_length": SEQ,
    }
    return Config.model_validate(
        {
            "model": {**sizes, "mlp": ["dense", "peer"], **model},
            "peer": {"num_experts": 64, "heads": 2, "top_k": 4, "key_dim": 8, **(peer or {})},
            "data": {"prefix": "unused"},
        }
    )


def make_batch(seed: int = 0, size: int = 2) -> dict[str, torch.Tensor | None]:
    from peer_dist.megatron import pack_documents

    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, VOCAB, (size, SEQ), generator=generator)
    tokens[0, 5] = EOD
    mask = (torch.rand(size, SEQ, generator=generator) > 0.2).float()
    return {
        "tokens": tokens,
        "labels": tokens.roll(-1, 1),
        "loss_mask": mask,
        "documents": pack_documents(tokens, EOD),
    }
