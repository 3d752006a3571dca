"""Layers on the GPU against the same layers in float64 on the CPU."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.distributed as dist

from peer_dist import PEER, ProductKeyMemory
from peer_dist.sharding import ExpertGroups, GridLayout
from tests.gpu.device import DEVICE, assert_same, clear_tokens, run, waits_are_named

pytestmark = pytest.mark.gpu

PEERS = [
    {"query_norm": norm, "gate": gate, "activation": activation, "sparse_grad": sparse}
    for (norm, (gate, activation)), sparse in zip(
        itertools.product(
            ("batch", "layer", "rms", "none"), (("softmax", "gelu"), ("sigmoid", "relu"), ("relu", "silu"))
        ),
        itertools.cycle((False, True, True)),
    )
] + [
    {"shared_keys": False, "key_norm": "rms"},
    {"output_gate": True, "dense_hidden": 24},
    {"dim": 50, "query_norm": "layer"},  # rows of 200 bytes
]
MEMORIES = [
    {"query_norm": norm, "sparse_grad": sparse}
    for norm, sparse in zip(("batch", "layer", "none"), itertools.cycle((False, True)))
] + [{"query_projection": False, "query_norm": "none"}]
LAYERS = [(PEER, options) for options in PEERS] + [(ProductKeyMemory, options) for options in MEMORIES]

layers = pytest.mark.parametrize(("kind", "options"), LAYERS, ids=lambda value: getattr(value, "__name__", str(value)))


def make(kind, options, **more):
    sizes = {"dim": 96, "heads": 3, "top_k": 8, "key_dim": 32, "seed": 1}
    number = "num_experts" if kind is PEER else "num_values"
    options = {number: more.pop("experts", 32**2), **options, **more}
    return kind(**{**sizes, **options}).double()


def tokens(layer, count, margin=1e-5):
    generator = torch.Generator().manual_seed(0)
    x = clear_tokens(layer, torch.randn(count, layer.dim, generator=generator, dtype=torch.float64), margin)
    return x, torch.randn(x.shape, generator=generator, dtype=torch.float64)


@layers
def test_float32(kind, options):
    """Outputs and every gradient."""
    layer = make(kind, options)
    x, dy = tokens(layer, 257)
    on_device = copy.deepcopy(layer).float().to(DEVICE)
    assert_same(run(on_device, x.float().to(DEVICE), dy.float().to(DEVICE)), run(layer, x, dy), 2e-5)


COARSE = {
    "heads": 2,
    "top_k": 2,
    "experts": 8**2,
}  # few picks, which rounding does not move
ROUNDED = [
    (PEER, {"query_norm": "layer"}), (PEER, {"query_norm": "batch"}), (ProductKeyMemory, {"query_norm": "rms"}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "options"), ROUNDED, ids=str)
def test_bfloat16(kind, options):
    """What is rounded: weights, x, queries, y and gradients. Table gradients add up in float32."""
    layer = make(kind, options, **COARSE)
    layer = layer.bfloat16().double()  # the very weights
    x, dy = tokens(layer, 600, margin=0.02)
    x, dy = x.bfloat16().double(), dy.bfloat16().double()
    on_device = copy.deepcopy(layer).bfloat16().to(DEVICE)
    got = run(on_device, x.bfloat16().to(DEVICE), dy.bfloat16().to(DEVICE))
    want = run(layer, x, dy)
    assert {tensor.dtype for tensor in got} == {torch.bfloat16}
    assert_same(got[:1], want[:1], 1e-2)
    assert_same(got, want, 3e-2)


@pytest.mark.parametrize(("kind", "options"), [*ROUNDED, (PEER, {"output_gate": True, "dense_hidden": 24})], ids=str)
def test_autocast(kind, options):
    """Queries and dense blocks in bfloat16, the experts in the tables' float32."""
    layer = make(kind, options, **COARSE)
    x, dy = tokens(layer, 600, margin=0.02)
    on_device = copy.deepcopy(layer).float().to(DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        y = on_device(on_x := x.float().to(DEVICE).requires_grad_())
    got = [y, *torch.autograd.grad(y, [on_x, *on_device.parameters()], dy.to(DEVICE, y.dtype))]
    assert_same(got, run(layer, x, dy), 3e-2)


COMPILED = ("cuda", *ROUNDED[0])


@pytest.mark.parametrize(("kind", "options"), ROUNDED, ids=str)
def test_compiled(kind, options):
    """``torch.compile``, a layer by Inductor where there is a GPU: the same as without."""
    layer = make(kind, options)
    x, dy = (value.float().to(DEVICE) for value in tokens(layer, 65))
    layer = layer.float().to(DEVICE)
    want = run(layer, x, dy)
    # Inductor takes a while for each; one is enough
    backend = "inductor" if (DEVICE.type, kind, options) == COMPILED else "aot_eager"
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for _ in range(2):
        x_grad = x.clone().requires_grad_()
        y = compiled(x_grad)
        got = [y, *torch.autograd.grad(y, [x_grad, *layer.parameters()], dy)]
    assert_same(got, want, 1e-5)


@layers
def test_two_runs_give_the_same_bits(kind, options):
    layer = make(kind, options).float().to(DEVICE)
    x, dy = (torch.randn(300, layer.dim, device=DEVICE) for _ in range(2))
    for first, again in zip(run(layer, x, dy), run(layer, x, dy)):
        first, again = (value.to_dense() if value.is_sparse else value for value in (first, again))
        assert first.equal(again)


@pytest.fixture
def alone(parallel, monkeypatch):
    """A grid of one rank, whose tokens take the exchange all the same."""
    monkeypatch.setattr(GridLayout, "spread", property(lambda layout: layout.groups is not None))
    return ExpertGroups.over(dist.group.WORLD)


EXCHANGED = [*PEERS[:6], *PEERS[-2:]]


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("options", EXCHANGED, ids=str)
def test_exchange_with_oneself(options, chunks, alone):
    """Forward and backward, in parts, with the plan on the device."""
    layer = make(PEER, options)
    x, dy = tokens(layer, 100)
    spread = make(PEER, options, group=alone, dispatch_chunks=chunks).float().to(DEVICE)
    spread.load_state_dict(layer.state_dict())
    assert_same(run(spread, x.float().to(DEVICE), dy.float().to(DEVICE)), run(layer, x, dy), 2e-5)
    assert spread.traffic.tokens == spread.traffic.tokens_received == len(x)
    first, again = (run(spread, x.float().to(DEVICE), dy.float().to(DEVICE)) for _ in range(2))
    assert all(a.to_dense().equal(b.to_dense()) if a.is_sparse else a.equal(b) for a, b in zip(first, again))


@pytest.mark.parametrize("options", MEMORIES, ids=str)
def test_values_exchanged_with_oneself(options, alone):
    layer = make(ProductKeyMemory, options)
    x, dy = tokens(layer, 100)
    spread = make(ProductKeyMemory, options, group=alone).float().to(DEVICE)
    spread.load_state_dict(layer.state_dict())
    assert_same(run(spread, x.float().to(DEVICE), dy.float().to(DEVICE)), run(layer, x, dy), 2e-5)


@pytest.mark.parametrize("exchanged", [False, True])
@pytest.mark.parametrize("recomputed", [False, True])
@layers
def test_waits_for_the_device_have_a_name(kind, options, exchanged, recomputed, request, monkeypatch):
    """The sizes of what is exchanged, in each forward pass, and the rows of a sparse gradient."""
    group = {"group": request.getfixturevalue("alone")} if exchanged else {}
    layer = make(kind, options, **group).float().to(DEVICE)
    x, dy = (torch.randn(64, layer.dim, device=DEVICE) for _ in range(2))

    def step():
        leaf = x.clone().requires_grad_()
        y = torch.utils.checkpoint.checkpoint(layer, leaf, use_reentrant=False) if recomputed else layer(leaf)
        return torch.autograd.grad(y, [leaf, *layer.parameters()], dy)

    step()  # kernels are compiled, small tables are made
    with waits_are_named(monkeypatch) as met:
        step()
    expected = ["sizes of what is exchanged"] * (exchanged * (1 + recomputed))
    expected += ["number of rows that a sparse gradient has"] * (options.get("sparse_grad", False) * 1)
    if DEVICE.type == "cuda":
        assert sorted(met) == sorted(expected)
    else:  # the CPU's kernels find these rows another way
        assert met == [name for name in expected if name.startswith("sizes")]
