"""Every key that describes a model, changed from its default: the exported model computes what the key says."""

from __future__ import annotations

import json
from typing import Any, Literal, get_args, get_origin

import pytest
import torch

from peer_dist.config import Config, ConfigError
from peer_dist.kernels.eight_bit import CODES
from peer_dist.kinds import KINDS
from peer_dist.kinds.product_keys import PLACEMENT
from tests.exported import build, exported, logits_of, package_of

ALL_KINDS = ["peer", "dense", "pkm", "moe", "sigma_moe"]
# what a section's keys are tried on
MODELS: dict[str, dict[str, Any]] = {
    "model": {"model.mlp": ["dense", "peer", "dense"]},
    "peer": {"model.mlp": ["peer", "dense", "peer"]},
    "pkm": {"model.mlp": ["pkm", "dense", "pkm"]},
    "moe": {"model.mlp": ["moe", "dense", "moe"]},
    "sigma_moe": {"model.mlp": ["sigma_moe", "dense", "sigma_moe"]},
    "router": {"model.mlp": ["peer", "moe", "sigma_moe"], "router.kind": "recurrent"},
}
LAZY = {"table_optimizer.lazy": True}
# by key: its other values, and other keys without which they would mean nothing
CHANGES: dict[str, list[tuple[Any, dict[str, Any]]]] = {
    "model.num_layers": [(2, {"model.mlp": "peer"})],
    "model.hidden_size": [(48, {})],
    "model.num_attention_heads": [(8, {})],
    "model.num_query_groups": [(1, {}), (2, {"model.num_attention_heads": 4})],
    "model.rope_base": [(50.0, {})],
    "model.norm_eps": [(0.1, {})],
    "model.ffn_hidden_size": [(40, {})],
    "model.ffn_activation": [("gelu", {}), ("gelu", {"model.mlp": "moe"})],
    "model.ffn_top_k": [(7, {}), (7, {"model.ffn_activation": "gelu"})],
    "model.seq_length": [(24, {})],
    "model.mlp": [(ALL_KINDS, {"model.num_layers": 5})],
    "model.tied_embeddings": [(False, {})],
    "model.dropout": [(0.3, {})],
    "peer.num_experts": [(100, {})],
    "peer.heads": [(3, {})],
    "peer.top_k": [(5, {})],
    "peer.key_dim": [(12, {})],
    "peer.query_norm": [("layer", {}), ("rms", {}), ("none", {})],
    "peer.gate": [("sigmoid", {}), ("relu", {})],
    "peer.activation": [("relu", {}), ("silu", {}), ("silu", {"peer.dense_hidden": 12})],
    "peer.shared_keys": [(False, {})],
    "peer.key_norm": [("layer", {}), ("rms", {}), ("rms", {"peer.shared_keys": False})],
    "peer.output_gate": [(True, {}), (True, {"peer.dense_hidden": 12})],
    "peer.dense_hidden": [(12, {})],
    "peer.dispatch_chunks": [(3, {})],
    "peer.layers_per_pool": [(2, {})],
    "peer.revive_interval": [(5, {})],
    "peer.table_dtype": [("bfloat16", {})],  # those of eight bits: tests/test_tiers.py
    "peer.table_memory": [("host", LAZY), ("disk", LAZY)],
    "peer.table_cache_gb": [(0.0, {})],
    "peer.table_folder": [("elsewhere", {})],
    "peer.table_resident_gb": [(2.0, {})],
    "peer.table_fetch": [("copied", {})],
    "pkm.num_values": [(100, {})],
    "pkm.heads": [(3, {})],
    "pkm.top_k": [(3, {})],
    "pkm.key_dim": [(12, {})],
    "pkm.query_norm": [("layer", {}), ("rms", {}), ("none", {})],
    "pkm.query_projection": [(False, {"pkm.query_norm": "none"})],
    "pkm.gate": [("sigmoid", {}), ("relu", {})],
    "pkm.shared_keys": [(True, {})],
    "pkm.init": [("dense", {})],
    "pkm.table_dtype": [("bfloat16", {})],  # those of eight bits: tests/test_tiers.py
    "pkm.table_memory": [("host", LAZY), ("disk", LAZY)],
    "pkm.table_cache_gb": [(0.0, {})],
    "pkm.table_folder": [("elsewhere", {})],
    "pkm.table_resident_gb": [(2.0, {})],
    "pkm.table_fetch": [("copied", {})],
    "moe.num_experts": [(5, {})],
    "moe.expert_hidden_size": [(20, {})],
    "moe.top_k": [(3, {})],
    "moe.routing": [("expert_choice", {})],
    "moe.score": [("sigmoid", {})],
    "moe.normalize": [(False, {}), (False, {"moe.score": "sigmoid"})],
    "moe.balance_loss": [(0.5, {})],
    "moe.z_loss": [(0.5, {})],
    "moe.expert_bias": [(True, {"moe.score": "sigmoid"})],
    "moe.expert_bias_rate": [(0.5, {})],
    "sigma_moe.num_experts": [(7, {})],
    "sigma_moe.expert_hidden_size": [(20, {})],
    "sigma_moe.top_k": [(2, {})],
    "sigma_moe.entropy_loss": [(0.5, {})],
    "sigma_moe.expert_dropout": [(0.5, {})],
    "router.kind": [("recurrent", {}), ("mlp", {}), ("cosine", {"model.mlp": ["moe", "sigma_moe", "dense"]})],
    "router.state_size": [(12, {}), (12, {"router.kind": "cosine", "model.mlp": "moe"})],
    "router.passing": [("detached", {}), ("none", {})],
    "router.shared_projector": [(True, {}), (True, {"router.kind": "mlp"})],
}
# values that cannot change what a trained model computes of the same weights
WITHOUT_EFFECT = {
    "model.seq_length": "how long training's sequences are; the exported model's window for generation",
    "model.dropout": "acts in training",
    "peer.dispatch_chunks": "when things travel, not what is computed",
    "peer.revive_interval": "changes weights in training",
    "pkm.init": "of the first weights",
    **{f"{kind}.{key}": "where tables lie, and how they come" for kind in ("peer", "pkm") for key in PLACEMENT},
    "moe.balance_loss": "a loss of training",
    "moe.z_loss": "a loss of training",
    "moe.expert_bias_rate": "changes the bias in training",
    "sigma_moe.entropy_loss": "a loss of training",
    "sigma_moe.expert_dropout": "acts in training",
    "router.passing detached": "of the gradient",
}
ROUNDED = {"peer.table_dtype", "pkm.table_dtype"}  # the weights are those of the default, rounded
REFUSED = {"moe.routing"}


def schema() -> dict[str, Any]:
    """Every key of ``model``, of the kinds' sections and of ``router``, with its field."""
    names = ["model", *(kind.name for kind in KINDS.values() if kind.section is not None), "router"]
    return {
        f"{name}.{key}": field
        for name in names
        for key, field in Config.model_fields[name].annotation.model_fields.items()
    }


def test_no_key_is_left_out():
    """A new key, or a new word for an old one, needs a case."""
    fields = schema()
    assert sorted(CHANGES) == sorted(fields)
    for key, field in fields.items():
        tried = [value for value, _ in CHANGES[key]]
        assert field.default not in tried, key
        if get_origin(field.annotation) is Literal:
            words = set(get_args(field.annotation)) - set(CODES)
            assert {*tried, field.default} == words, key


CASES = [(key, value, others) for key, changes in CHANGES.items() for value, others in changes if key not in REFUSED]


@pytest.mark.parametrize(("key", "value", "others"), CASES, ids=lambda value: str(value).replace(" ", ""))
def test_a_key_is_carried(key, value, others, parallel, tmp_path, monkeypatch):
    section = key.partition(".")[0]
    base = {**MODELS[section], **others}
    base.pop(key, None)
    config, model = build({**base, key: value}, parallel)
    tokens = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(7))
    wanted = logits_of(model, tokens)
    assert wanted.std() > 0.1

    _, plain = build(base, parallel)
    same = {name: tensor.shape for name, tensor in plain.state_dict().items() if isinstance(tensor, torch.Tensor)}
    if same == {name: tensor.shape for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}:
        difference = (logits_of(plain, tokens) - wanted).abs().max()
        if key in WITHOUT_EFFECT or f"{key} {value}" in WITHOUT_EFFECT:
            assert difference == 0
        elif key not in ROUNDED:
            assert difference > 1e-3  # so that an export that loses the key is found
    else:
        assert key not in WITHOUT_EFFECT

    folder = exported(config, model, parallel, tmp_path)
    package = package_of(folder, monkeypatch)
    with torch.no_grad():
        alone = package.peer_model.LanguageModel.load(folder)
        assert (alone(tokens) - wanted).abs().max() < 1e-5
        if hasattr(package, "modeling_peer"):
            theirs = package.modeling_peer.PeerForCausalLM.from_pretrained(folder)
            assert (theirs(tokens).logits - wanted).abs().max() < 1e-5
    if key == "model.seq_length":
        assert json.loads((folder / "config.json").read_text())["max_position_embeddings"] == value


def test_a_model_that_is_not_causal_is_refused(parallel, tmp_path):
    config, model = build({**MODELS["moe"], "moe.routing": "expert_choice"}, parallel)
    with pytest.raises(ConfigError, match="its experts choose tokens"):
        exported(config, model, parallel, tmp_path)
