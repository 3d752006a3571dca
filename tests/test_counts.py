"""Parameters and FLOPs as they are counted, against the model that is built."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from peer_dist.config import Config
from peer_dist.kinds.cost import total
from peer_dist.megatron import Parallel, build_model, token_losses
from peer_dist.planning.counts import count
from tests.models import CASES, make

VOCAB, TOKENS = 128, (2, 16)


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
    """Parameters, and the FLOPs of a forward pass."""
    config = make(changes)
    model, counts = build_known(config, parallel), count(config, VOCAB)
    assert counts.total.parameters == sum(parameter.numel() for parameter in model.parameters())
    tokens = torch.randint(VOCAB, TOKENS)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        token_losses(model, tokens, tokens)
    assert counter.get_total_flops() == tokens.numel() * counts.total.flops


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
    assert recurrent - mlp == 2 * 8  # a few biases


def test_a_recurrent_router_adds_what_its_paper_says() -> None:
    """RMoE, 24 layers of width 1280, state 128: about 3.5 million parameters."""
    large = {"model.num_layers": 24, "model.hidden_size": 1280, "model.mlp": "moe", "router.state_size": 128}
    linear, recurrent = (
        count(make({**large, "moe.num_experts": 16, "router.kind": kind}), VOCAB).total.parameters
        for kind in ("linear", "recurrent")
    )
    assert recurrent - linear == pytest.approx(3.5e6, rel=0.05)
