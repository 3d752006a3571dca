"""Counts against the model that is built, and partners of equal cost."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from peer_dist.config import Config, parse_config
from peer_dist.megatron import Parallel, build_model, token_losses
from peer_dist.planning.counts import count, mlp_router_hidden, total

VOCAB, TOKENS = 128, (2, 16)

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


@pytest.fixture(scope="module")
def parallel() -> Iterator[Parallel]:
    """Megatron's groups of one rank, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        groups = Parallel.initialize()
        yield groups
        groups.destroy()
        dist.destroy_process_group()


def build(config: Config, parallel: Parallel) -> torch.nn.ModuleList:
    return build_model(config, parallel, VOCAB, torch.float64)


def build_known(config: Config, parallel: Parallel) -> torch.nn.ModuleList:
    """The model; skips where the builder makes the same of a kind of layer or router that it does not know."""

    def shapes(model: torch.nn.ModuleList) -> dict[str, torch.Size]:
        return {name: parameter.shape for name, parameter in model.named_parameters()}

    model = build(config, parallel)
    for key, plain in (("model.mlp", "dense"), ("router.kind", "linear")):
        section, name = key.split(".")
        asked = getattr(getattr(config, section), name)
        if asked != plain:
            without = make({key: plain}, config.model_dump())
            if shapes(build(without, parallel)) == shapes(model):
                pytest.skip(f"build_model makes {key}: {plain} of {asked}")
    return model


@pytest.mark.parametrize("changes", CASES, ids=str)
def test_counts_are_those_of_the_model(parallel: Parallel, changes: dict[str, Any]) -> None:
    """Parameters, and the FLOPs of a forward pass but those of kernels of our own."""
    config = make(changes)
    model, counts = build_known(config, parallel), count(config, VOCAB)
    assert counts.total.parameters == sum(parameter.numel() for parameter in model.parameters())
    tokens = torch.randint(VOCAB, TOKENS)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        token_losses(model, tokens, tokens)
    unseen = [
        parts[name].flops
        for kind, name in (("peer", "experts"), ("pkm", "values"))
        for parts in (layer.feed_forward for layer in counts.layers if layer.kind == kind)
    ]
    assert counter.get_total_flops() == tokens.numel() * (counts.total.flops - sum(unseen))


def test_training_counts_three_times_the_forward_pass(parallel: Parallel) -> None:
    config = make({})
    tokens = torch.randint(VOCAB, TOKENS)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        token_losses(build(config, parallel), tokens, tokens).mean().backward()
    assert counter.get_total_flops() == tokens.numel() * count(config, VOCAB).train_flops_per_token


def test_retrieval_costs_more_than_the_experts() -> None:
    """The paper's sizes: of a token's FLOPs the experts are the smaller part, of the parameters nearly all."""
    peer = {"peer.num_experts": 1024**2, "peer.heads": 8, "peer.top_k": 16, "peer.key_dim": 128}
    config = make({"model.hidden_size": 1024, "model.mlp": "peer", **peer})
    parts = count(config, VOCAB).layers[0].feed_forward
    assert parts["query"].flops + parts["keys"].flops == 4_194_304
    assert parts["experts"].flops == 524_288
    assert parts["experts"].parameters == 2**31
    assert parts["experts"].active == 2 * 128 * 1024


def test_a_token_reads_a_part_of_the_parameters() -> None:
    dense = total(count(make({}), VOCAB).layers[0].feed_forward)
    kept = total(count(make({"model.ffn_top_k": 7}), VOCAB).layers[0].feed_forward)
    assert (dense.active, kept.active) == (3 * 32 * 48, 2 * 32 * 48 + 7 * 32)
    assert kept.flops == dense.flops
    untied = count(make({"model.tied_embeddings": False}), VOCAB)
    assert untied.outside["embedding"].active == 32
    moe = count(make({"model.mlp": "moe"}), VOCAB).layers[0].feed_forward
    assert moe["experts"].active * 6 == moe["experts"].parameters * 2


def test_causal_attention_is_half() -> None:
    """Position t sees t pairs: the mean over a sequence of s is (s + 1) / 2."""
    counts, pairs = count(make({}), VOCAB), sum(range(1, 17)) / 16
    assert counts.causal_attention_flops == 3 * 4 * 32 * pairs
    assert counts.parts["attention_scores"].flops == 3 * 4 * 32 * 16


@pytest.mark.parametrize("kinds", ["moe", ["peer", "dense", "sigma_moe"]], ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_mlp_routers_are_as_large_as_recurrent_ones(kinds: str | list[str], shared: bool) -> None:
    asked = {"model.mlp": kinds, "router.shared_projector": shared}
    recurrent, mlp = (
        count(make({**asked, "router.kind": kind}), VOCAB).total.parameters for kind in ("recurrent", "mlp")
    )
    config = make({**asked, "router.kind": "mlp"})
    unit = (count(config, VOCAB).parts["projector"] + count(config, VOCAB).parts["router"]).parameters
    assert 2 * abs(recurrent - mlp) <= unit / mlp_router_hidden(config)


def test_a_recurrent_router_adds_what_its_paper_says() -> None:
    """RMoE, 24 layers of width 1280, state 128: about 3.5 million parameters."""
    large = {"model.num_layers": 24, "model.hidden_size": 1280, "model.mlp": "moe", "router.state_size": 128}
    linear, recurrent = (
        count(make({**large, "moe.num_experts": 16, "router.kind": kind}), VOCAB).total.parameters
        for kind in ("linear", "recurrent")
    )
    assert recurrent - linear == pytest.approx(3.5e6, rel=0.05)
