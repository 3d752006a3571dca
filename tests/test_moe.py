"""Coarse experts and their routers against their definitions written out, in float64."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.moe import token_dispatcher
from torch import Tensor, nn

from peer_dist.config import Config, ConfigError
from peer_dist.layers.recurrence import RouterCore
from peer_dist.layers.router import LinearLogits, Router, Rule
from peer_dist.megatron import Parallel, build_model, moe, run_forward_backward, shards_of, sparse_layers
from peer_dist.megatron.feed_forward import sparse_mlps
from tests.models import VOCAB, make_batch, make_config
from tests.ranks import run_ranks
from tests.runs import assert_learns_and_resumes_bit_for_bit, metrics_of, run_to_the_end, with_keys

SCALE = 0.7


def make(parallel: Parallel, mlp: list[str], dtype: torch.dtype = torch.float64, **sections: Any) -> nn.ModuleList:
    tree = make_config(mlp=mlp, num_layers=len(mlp), **sections.pop("model", {})).model_dump()
    config = Config.model_validate({**tree, **sections})
    return build_model(config, parallel, VOCAB, dtype)


def chosen(scores: Tensor, top_k: int) -> Tensor:
    """0 or 1 for each expert of each token."""
    return (scores >= scores.topk(top_k, -1).values[..., -1:]).double()


def mixture(layer: Any, x: Tensor, gates: Tensor) -> Tensor:
    """Every expert of every token, weighted."""
    total = torch.zeros_like(x)
    for expert, weight in zip(layer.experts.local_experts, gates.unbind(-1), strict=True):
        hidden = x @ expert.linear_fc1.weight.T
        if expert.config.gated_linear_unit:
            gate, value = hidden.chunk(2, -1)
            hidden = F.silu(gate) * value
        else:
            hidden = hidden.relu()
        total = total + weight[..., None] * (hidden @ expert.linear_fc2.weight.T)
    return total


def plain_moe(layer: Any, x: Tensor, logits: Tensor, section: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Output and the sum of the weighted losses."""
    experts, top_k = logits.shape[-1], section.get("top_k", 2)
    scores = logits.sigmoid() if section.get("score") == "sigmoid" else logits.softmax(-1)
    by_scores = chosen(scores, top_k)
    picked = chosen(scores + layer.router.expert_bias, top_k) if section.get("expert_bias") else by_scores
    balance = section.get("balance_loss", 0.01)
    if section.get("routing") == "expert_choice":
        picked = chosen(scores.transpose(0, 2), max(1, len(x) * top_k // experts)).transpose(0, 2)
        balance = 0.0
    gates = scores * picked
    if section.get("normalize", True) and section.get("routing") != "expert_choice":
        gates = gates / gates.sum(-1, keepdim=True)
    share = by_scores.mean((0, 1)) / top_k
    probability = (scores / scores.sum(-1, keepdim=True)).mean((0, 1))
    loss = balance * experts * (share * probability).sum()
    return mixture(layer, x, gates), loss + section.get("z_loss", 0.0) * logits.logsumexp(-1).square().mean()


def assert_same(layer: Any, x: Tensor, out: Tensor, want: tuple[Tensor, Tensor], *also: Tensor) -> None:
    """Output, and gradients of input, weights and others, of a weighted sum and the losses."""
    weight, wanted = torch.randn_like(out), [x, *also, *layer.parameters()]
    got = torch.autograd.grad((out * weight).sum(), wanted, retain_graph=True, materialize_grads=True)
    loss = (want[0] * weight).sum() + SCALE * want[1]
    expected = torch.autograd.grad(loss, wanted, materialize_grads=True)
    torch.testing.assert_close(out, want[0])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


MOE: list[dict[str, Any]] = [
    {"balance_loss": 0.5},
    {"top_k": 3, "normalize": False, "z_loss": 0.3},
    {"top_k": 1, "normalize": False, "expert_hidden_size": 20},
    {"score": "sigmoid", "balance_loss": 0.2},
    {"score": "sigmoid", "normalize": False, "balance_loss": 0.0},
    {"score": "sigmoid", "expert_bias": True, "balance_loss": 0.2},
    {"routing": "expert_choice", "balance_loss": 0.5, "z_loss": 0.1},
    {"routing": "expert_choice", "num_experts": 5, "top_k": 3, "score": "sigmoid"},
]


@pytest.mark.parametrize("section", MOE, ids=str)
def test_moe_is_its_definition(parallel: Parallel, section: dict[str, Any]) -> None:
    layer: Any = sparse_layers(make(parallel, ["dense", "moe"], moe=section))[2]
    nn.init.normal_(layer.router.logits.weight)
    layer.router.loss_scale = SCALE
    if section.get("expert_bias"):
        layer.router.expert_bias.copy_(torch.linspace(-0.5, 0.5, 8))
    x = torch.randn(16, 3, 32, dtype=torch.float64, requires_grad=True)
    logits = x @ layer.router.logits.weight.T
    assert_same(layer, x, layer(x, x), plain_moe(layer, x, logits, section))


@pytest.mark.parametrize("section", [MOE[0], MOE[1], MOE[-1]], ids=str)
def test_moe_as_on_cuda(parallel: Parallel, monkeypatch: pytest.MonkeyPatch, section: dict[str, Any]) -> None:
    """Where a token's experts are added up by atomics, torch's strict flag is on, there and in the gradient's sum."""
    strict: list[bool] = []

    def unpermute(*args: Any, **options: Any) -> Tensor:
        strict.append(torch.are_deterministic_algorithms_enabled())
        return megatrons(*args, **options)

    megatrons = token_dispatcher.unpermute
    monkeypatch.setattr(token_dispatcher, "unpermute", unpermute)
    monkeypatch.setattr(moe, "varies", lambda device: True)
    test_moe_is_its_definition(parallel, section)
    assert strict == [section is not MOE[0]]
    assert not torch.are_deterministic_algorithms_enabled()


def test_cosine_router(parallel: Parallel) -> None:
    layer: Any = sparse_layers(make(parallel, ["dense", "moe"], router={"kind": "cosine", "state_size": 6}))[2]
    layer.router.loss_scale = SCALE
    part = layer.router.logits
    nn.init.constant_(part.log_temperature, math.log(0.2))
    x = torch.randn(16, 3, 32, dtype=torch.float64, requires_grad=True)
    projected = x @ part.projection.T
    dots = projected @ part.weight.T
    cosines = dots / projected.norm(dim=-1, keepdim=True) / part.weight.norm(dim=-1)
    assert_same(layer, x, layer(x, x), plain_moe(layer, x, cosines / part.log_temperature.exp(), {}))


@contextlib.contextmanager
def same_draws() -> Iterator[None]:
    """Dropout's tracked stream is as before, afterwards."""
    states = get_cuda_rng_tracker().get_states()
    yield
    get_cuda_rng_tracker().set_states(states)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_sigma_moe_is_its_definition(parallel: Parallel, dropout: float) -> None:
    section = {"num_experts": 6, "expert_hidden_size": 12, "top_k": 2, "entropy_loss": 0.4, "expert_dropout": dropout}
    layer: Any = sparse_layers(make(parallel, ["dense", "sigma_moe"], sigma_moe=section))[2]
    layer.router.loss_scale = SCALE
    x = torch.randn(16, 3, 32, dtype=torch.float64, requires_grad=True)
    with same_draws():
        out = layer(x, x)
    with get_cuda_rng_tracker().fork():
        kept = torch.rand(16, 3, 6, dtype=torch.float64) >= dropout
    assert 0.5 * dropout <= 1 - kept.double().mean() <= 1.5 * dropout
    logits = x @ layer.router.logits.weight.T
    scores = logits.sigmoid() * kept
    best = scores.topk(2, -1).indices
    gates = torch.zeros_like(scores).scatter(-1, best, scores.gather(-1, best))
    p = logits.softmax(-1).mean((0, 1))
    want = mixture(layer, x, gates), 0.4 * (p * p.log()).sum()
    assert_same(layer, x, out, want)
    assert float(layer.router.losses["entropy_loss"]) == pytest.approx(float(want[1].detach()) / 0.4)
    layer.eval()
    scores = logits.sigmoid()
    torch.testing.assert_close(layer(x, x), mixture(layer, x, scores * chosen(scores, 2)))


def test_sigma_moe_starts_as_a_dense_layer_as_wide(parallel: Parallel) -> None:
    """std(W1) = sqrt(2 / (d layers)), std(W2) = sqrt(2 / (N_E G layers)); rows of W3 of one norm."""
    section = {"num_experts": 8, "expert_hidden_size": 128}
    layer: Any = sparse_layers(make(parallel, ["dense", "sigma_moe"], sigma_moe=section))[2]
    for expert in layer.experts.local_experts:
        assert float(expert.linear_fc1.weight.std()) == pytest.approx(math.sqrt(2 / (32 * 2)), rel=0.05)
        assert float(expert.linear_fc2.weight.std()) == pytest.approx(math.sqrt(2 / (8 * 128 * 2)), rel=0.05)
    norms = layer.router.logits.weight.norm(dim=1)
    torch.testing.assert_close(norms, norms[:1].expand(8))
    assert float(norms[0]) == pytest.approx(math.sqrt(2 / 2), rel=0.2)


@pytest.mark.parametrize("section", MOE[:4], ids=str)
def test_router_is_megatrons(parallel: Parallel, section: dict[str, Any]) -> None:
    """Its TopKRouter, where that has the rule: gates, picks and the gradient of the losses."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, get_default_pg_collection
    from megatron.core.transformer.moe.router import TopKRouter

    layer: Any = sparse_layers(make(parallel, ["dense", "moe"], torch.float32, moe=section))[2]
    config = dataclasses.replace(
        layer.config,
        moe_router_pre_softmax=not section.get("normalize", True),
        moe_router_score_function=section.get("score", "softmax"),
        moe_router_load_balancing_type="global_aux_loss",
        moe_aux_loss_coeff=section.get("balance_loss", 0.01),
        moe_z_loss_coeff=section.get("z_loss"),
        calculate_per_token_loss=False,
    )
    theirs = TopKRouter(config, get_default_pg_collection())
    theirs.set_layer_number(1)
    logits = torch.randn(16, 3, layer.num_experts, requires_grad=True)
    layer.router.logits, layer.router.loss_scale = nn.Identity(), SCALE
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(SCALE))
    (gates, picked), (probabilities, routing_map) = layer.router(logits), theirs.routing(logits)
    assert torch.equal(picked, routing_map)
    torch.testing.assert_close(gates, probabilities)
    weight = torch.randn_like(gates)
    ours, megatrons = (torch.autograd.grad((each * weight).sum(), logits)[0] for each in (gates, probabilities))
    torch.testing.assert_close(ours, megatrons)


@pytest.mark.parametrize("applied", [True, False])
def test_bias_moves_towards_even_loads(applied: bool) -> None:
    """By its rate, down for experts above the mean of the step's loads; not where the step was left out."""
    router = Router(LinearLogits(4, 3, 1.0), 3, Rule(1, "sigmoid", normalize=False, bias_rate=0.25))
    with torch.no_grad():
        router.logits.weight.copy_(torch.eye(4)[:3])
    tokens = 4 * torch.eye(4)[[0, 0, 0, 1, 1, 2]]
    for part in tokens.split(3):  # two micro-batches
        router(part[:, None])
    with torch.no_grad():
        router(tokens[:, None])  # evaluation does not count
    router.end_step(applied)
    assert router.expert_bias.tolist() == ([-0.25, 0.0, 0.25] if applied else [0.0, 0.0, 0.0])
    assert not router.loads.any()
    router.bfloat16()
    assert router.expert_bias.dtype == torch.float32


@pytest.mark.parametrize(("activation", "top_k"), [("gelu", 5), ("swiglu", 9), ("swiglu", 64)])
def test_dense_top_k_keeps_the_largest_hidden_units(parallel: Parallel, activation: str, top_k: int) -> None:
    model = make(parallel, ["dense", "dense"], model={"ffn_activation": activation, "ffn_top_k": top_k})
    mlp = model[0].decoder.layers[0].mlp
    x = torch.randn(16, 3, 32, dtype=torch.float64, requires_grad=True)
    hidden = x @ mlp.linear_fc1.weight.T
    if activation == "swiglu":
        gate, value = hidden.chunk(2, -1)
        hidden = F.silu(gate) * value
    else:
        hidden = F.gelu(hidden)
    want = (hidden * chosen(hidden, top_k)) @ mlp.linear_fc2.weight.T
    assert_same(mlp, x, mlp(x)[0], (want, torch.zeros(())))


# ---------------------------------------------------------------- routers with a state


def plain_core(core: RouterCore, x: Tensor, state: Tensor) -> Tensor:
    """Cho et al.'s gated unit in torch's convention, or the perceptron."""
    if not core.recurrent:
        first, _, second = core.cell
        return F.gelu(x @ first.weight.T + first.bias) @ second.weight.T + second.bias
    cell = core.cell
    ours, theirs = x @ cell.weight_ih.T + cell.bias_ih, state @ cell.weight_hh.T + cell.bias_hh
    (r, z, n), (r_state, z_state, n_state) = ours.chunk(3, -1), theirs.chunk(3, -1)
    z, new = torch.sigmoid(z + z_state), torch.tanh(n + torch.sigmoid(r + r_state) * n_state)
    return (1 - z) * new + z * state


@pytest.mark.parametrize(
    "router",
    [
        {"kind": "recurrent"},
        {"kind": "recurrent", "passing": "detached"},
        {"kind": "recurrent", "passing": "none"},
        {"kind": "recurrent", "shared_projector": True},
        {"kind": "mlp"},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["moe", "sigma_moe"])
def test_routers_over_three_layers(parallel: Parallel, kind: str, router: dict[str, Any]) -> None:
    """The last layer's output from the inputs of all three, as transformer layers hand the state on."""
    sections = {"moe": {"balance_loss": 0.5}, "sigma_moe": {"num_experts": 6, "expert_hidden_size": 12, "top_k": 2}}
    model = make(parallel, [kind] * 3, router={"state_size": 5, **router}, **sections)
    core, mlps = model[0].router_core, list(sparse_mlps(model).values())
    inputs = [torch.randn(16, 3, 32, dtype=torch.float64, requires_grad=True) for _ in mlps]
    state = want = torch.zeros(16, 3, 5, dtype=torch.float64)
    for mlp, x in zip(mlps, inputs, strict=True):
        nn.init.normal_(mlp.layer.router.logits.weight)
        mlp.layer.router.loss_scale = SCALE
        mlp.state = state
        out, _ = mlp(x)
        state = mlp.state
        project = core.projection if core.projection is not None else mlp.router_state.projection
        passed = {"none": torch.zeros_like(want), "detached": want.detach()}.get(router.get("passing", "full"), want)
        want = plain_core(core, x @ project.weight.T, passed)
    torch.testing.assert_close(state, want)
    layer = mlps[-1].layer
    logits = want @ layer.router.logits.weight.T
    if kind == "moe":
        expected = plain_moe(layer, inputs[-1], logits, sections["moe"])
    else:
        p = logits.softmax(-1).mean((0, 1))
        gates = logits.sigmoid() * chosen(logits, 2)
        expected = mixture(layer, inputs[-1], gates), 1e-3 * (p * p.log()).sum()
    assert_same(layer, inputs[-1], out, expected, *inputs[:2], *core.parameters())
    first = torch.autograd.grad(out.square().sum(), inputs[0], allow_unused=True)[0]
    flows = router["kind"] == "recurrent" and router.get("passing", "full") == "full"
    assert (first is not None and bool(first.any())) is flows


def test_the_state_goes_through_the_model(parallel: Parallel) -> None:
    """Past a dense layer too; the gradient of the first layer's projection is another where it is cut off."""

    def gradient(passing: str) -> tuple[float, Tensor]:
        router = {"kind": "recurrent", "state_size": 5, "passing": passing}
        model = make(parallel, ["moe", "dense", "moe"], router=router)
        for mlp in sparse_mlps(model).values():
            nn.init.constant_(mlp.layer.router.logits.weight, 0.0)
            mlp.layer.router.logits.weight.data[::3] = 1.0
        loss = run_forward_backward(model, [make_batch()], 0.1)
        return float(loss), sparse_mlps(model)[1].router_state.projection.weight.grad

    (full, with_later), (detached, own), (none, _) = map(gradient, ("full", "detached", "none"))
    assert full == detached != none
    assert not torch.allclose(with_later, own, rtol=1e-3)


# ---------------------------------------------------------------- runs

EXPERTS = {"model": {"mlp": ["moe", "dense", "moe"]}, "moe": {"num_experts": 4, "expert_hidden_size": 24}}


def test_losses_are_means_over_micro_batches(parallel: Parallel) -> None:
    """Two passes over one batch differentiate the model's loss twice and the routers' once."""

    def run(passes: int, scale: float, balance: float) -> Tensor:
        model = make(parallel, ["dense", "moe"], moe={"balance_loss": balance, "z_loss": balance})
        run_forward_backward(model, [make_batch()] * passes, scale)
        return sparse_layers(model)[2].router.logits.weight.grad  # type: ignore[attr-defined]

    extra = run(1, 0.1, 5.0) - run(1, 0.1, 0.0)
    torch.testing.assert_close(run(2, 0.1, 5.0) - run(2, 0.1, 0.0), extra)
    assert float(extra.norm()) > 1e-3


def weights(rank: int, world_size: int, expert: int) -> dict[str, Tensor]:
    parallel = Parallel.initialize(expert=expert)
    model = make(parallel, ["moe", "sigma_moe"], torch.float32)
    return {name: shard.parameter.detach() for name, shard in shards_of(model).items()}


def test_experts_do_not_depend_on_the_layout() -> None:
    (one,) = run_ranks(weights, 1, 1)
    ranks = run_ranks(weights, 2, 2)
    assert {**ranks[0], **ranks[1]}.keys() == one.keys()
    assert not ranks[0].keys() & ranks[1].keys()
    for name, value in [*ranks[0].items(), *ranks[1].items()]:
        assert torch.equal(value, one[name]), name


def sent(rank: int, world_size: int) -> tuple[dict[str, int], int, int]:
    """Bytes by what is sent, picks of other ranks' experts, and all picks received."""
    parallel = Parallel.initialize(expert=world_size)
    layer: Any = sparse_layers(make(parallel, ["dense", "moe"], torch.float32))[2]
    routes: list[tuple[Tensor, Tensor]] = []
    layer.on_route = lambda *picks: routes.append(picks)
    x = torch.randn(16, 3, 32, generator=torch.Generator().manual_seed(rank))
    layer(x, x)
    ((indices, gates),) = routes
    assert indices.shape == gates.shape == (48, 1, 2)
    torch.testing.assert_close(gates.sum(-1), torch.ones(48, 1))
    assert bool((gates[..., 0] >= gates[..., 1]).all())
    return dict(layer.traffic.sent), int((indices // 4 != rank).sum()), layer.traffic.picks_received


def test_traffic_and_routes() -> None:
    """A row and a float32 weight for each pick of another rank's expert, and a row back; gradients as much."""
    (first, away, received), (second, back, also) = run_ranks(sent, 2)
    for counted, out, home in ((first, away, back), (second, back, away)):
        row = 32 * 4
        want = {
            "x": out * row,
            "gates": out * 4,
            "y": home * row,
            "dy": out * row,
            "dx": home * row,
            "dgates": home * 4,
        }
        assert counted == want
    assert received + also == 2 * 48 * 2
    assert received == 96 - away + back


@pytest.mark.parametrize(
    "sections",
    [
        {**EXPERTS, "moe": {**EXPERTS["moe"], "score": "sigmoid", "expert_bias": True, "expert_bias_rate": 0.02}},
        pytest.param(
            {
                "model": {"mlp": "sigma_moe"},
                "sigma_moe": {"num_experts": 4, "expert_hidden_size": 16, "top_k": 2, "expert_dropout": 0.2},
                "zero": {"stage": 3},
                "train": {"precision": "bf16"},
            },
            marks=pytest.mark.slow,
        ),
    ],
    ids=["expert bias", "expert dropout, bf16, ZeRO 3"],
)
def test_resumes_bit_for_bit(small: dict[str, Any], tmp_path: Path, sections: dict[str, Any]) -> None:
    assert_learns_and_resumes_bit_for_bit(with_keys(small, parallel={"expert": 2}, **sections), tmp_path)


def held_out(rank: int, world_size: int, folder: str) -> tuple[int, float]:
    """Row shards at which a checkpoint is loaded, and its loss."""
    from peer_dist.evaluation.generate import generate
    from peer_dist.evaluation.loading import load_model
    from peer_dist.megatron import token_losses

    loaded = load_model(folder, world_size)
    if loaded.config.moe.routing == "expert_choice":
        with pytest.raises(ConfigError, match=r"its experts choose tokens .* train one with token_choice"):
            next(generate(loaded, ["a"], 3))
    tokens = torch.arange(64).view(2, 32)
    with torch.no_grad():
        return loaded.parallel.expert_size, float(token_losses(loaded.model, tokens, tokens.roll(-1, 1)).mean())


@pytest.mark.parametrize("routing", ["token_choice", "expert_choice"])
def test_loads_at_any_number_of_ranks(small: dict[str, Any], routing: str) -> None:
    """Experts that the ranks do not divide have copies; text is not drawn where later tokens count."""
    small = with_keys(small, **EXPERTS, parallel={"expert": 4}, train={"steps": 2})
    small["moe"] |= {"routing": routing, "z_loss": 1e-3}
    run_ranks(run_to_the_end, 4, small)
    assert metrics_of(small)[-1]["experts/layer1_z_loss"] == pytest.approx(math.log(4) ** 2, rel=0.3)
    results = {world: run_ranks(held_out, world, small["checkpoint"]["dir"]) for world in (1, 2, 3)}
    assert {world: ranks[0][0] for world, ranks in results.items()} == {1: 1, 2: 2, 3: 1}
    for ranks in results.values():
        for _, loss in ranks:
            assert loss == pytest.approx(results[1][0][1], rel=1e-5)
