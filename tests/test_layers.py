"""PEER against its definition written out, in float64."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peer_dist import PEER
from peer_dist.layers import activation_second_moment, load_peer_pytorch, product_keys
from peer_dist.layers.product_keys import retrieve
from tests.definitions import ACTIVATIONS, GATES, all_scores


def plain_peer(layer, x, query_norm):
    query = (x @ layer.query.weight.T).unflatten(-1, (layer.heads, layer.key_dim))
    if query_norm == "batch":
        flat = query.flatten(1)
        flat = (flat - flat.mean(0)) / torch.sqrt(flat.var(0, unbiased=False) + 1e-5)
        query = (flat * layer.norm.weight + layer.norm.bias).view_as(query)
    elif query_norm == "layer":
        query = (query - query.mean(-1, keepdim=True)) / torch.sqrt(query.var(-1, unbiased=False, keepdim=True) + 1e-5)
        query = query * layer.norm.weight.view(layer.heads, -1) + layer.norm.bias.view(layer.heads, -1)
    elif query_norm == "rms":
        query = query / torch.sqrt(query.square().mean(-1, keepdim=True) + 1e-5)
        query = query * layer.norm.weight.view(layer.heads, -1)
    keys = layer.keys
    if layer.key_norm is not None:
        norm = layer.key_norm.norm
        center = keys - keys.mean(-1, keepdim=True) * (norm.bias is not None)
        keys = center / torch.sqrt(center.square().mean(-1, keepdim=True) + 1e-5)
        shape = (*keys.shape[:-2], 1, -1)
        keys = keys * norm.weight.view(shape) + (0 if norm.bias is None else norm.bias.view(shape))
    scores, expert = all_scores(query, keys).topk(layer.top_k, dim=-1)
    hidden = ACTIVATIONS[layer.activation](torch.einsum("td,thkd->thk", x, layer.down[expert]))
    y = torch.einsum("thk,thkd->td", GATES[layer.gate](scores) * hidden, layer.up[expert])
    if layer.dense_hidden:
        y = y + ACTIVATIONS[layer.activation](x @ layer.dense_in.weight.T) @ layer.dense_out.weight.T
    if layer.output_gate:
        gate = x @ layer.gate_in.weight.T
        y = (y * gate / (1 + torch.exp(-gate))) @ layer.gate_out.weight.T
    return y


@pytest.mark.parametrize(
    ("query_norm", "gate", "activation", "shared"),
    list(itertools.product(["batch", "layer", "rms", "none"], GATES, ACTIVATIONS, [True, False])),
)
def test_layer_and_every_gradient(query_norm, gate, activation, shared):
    torch.manual_seed(1)
    layer = PEER(
        11, 49, heads=5, top_k=4, key_dim=6, query_norm=query_norm, gate=gate, activation=activation,
        shared_keys=shared, output_gate=activation == "silu", dense_hidden=7 * (gate == "softmax"),
        key_norm={"gelu": "none", "relu": "layer", "silu": "rms"}[activation], dtype=torch.float64,
    )  # fmt: skip
    for parameter in [*layer.norm.parameters(), *(layer.key_norm.parameters() if layer.key_norm else ())]:
        torch.nn.init.uniform_(parameter, 0.5, 1.5)
    x = torch.randn(3, 7, 11, dtype=torch.float64, requires_grad=True)
    picked = []
    layer.on_route = lambda indices, gates: picked.append(indices)
    y = layer(x)
    want = plain_peer(layer, x.reshape(-1, 11), query_norm).view_as(x)
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    rows = picked[0].flatten(1).sort(dim=1).values
    assert (rows[:, 1:] == rows[:, :-1]).any(), "the case must have one expert picked by two heads"
    inputs = [x, *layer.parameters()]
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, inputs, dy)
    expected = torch.autograd.grad(want, inputs, dy)
    for g, e in zip(got, expected):
        torch.testing.assert_close(g, e, rtol=1e-10, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 20), tokens=st.integers(0, 9), heads=st.integers(1, 4), half=st.integers(1, 8),
    shared=st.booleans(), seed=st.integers(0, 2**20), data=st.data(),
)  # fmt: skip
def test_retrieval_is_exact(n, tokens, heads, half, shared, seed, data):
    top_k = data.draw(st.integers(1, n))
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(tokens, heads, 2 * half, generator=generator, dtype=torch.float64)
    shape = (2, n, half) if shared else (heads, 2, n, half)
    keys = torch.randn(shape, generator=generator, dtype=torch.float64)
    indices, scores = retrieve(query, keys, top_k)
    every = all_scores(query, keys)
    want, _ = every.topk(top_k, dim=-1)
    torch.testing.assert_close(scores, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(every.gather(-1, indices), scores, rtol=1e-12, atol=1e-12)
    distinct = indices.sort(dim=-1).values
    assert (distinct[..., 1:] != distinct[..., :-1]).all()


@pytest.mark.parametrize("query_norm", ["batch", "rms", "none"])
@pytest.mark.parametrize("shared", [True, False])
def test_retrieval_in_chunks(query_norm, shared, monkeypatch):
    """Several chunks, the last one short: every gradient is that of the scores written out; a frozen key is none."""
    torch.manual_seed(3)
    monkeypatch.setattr(product_keys, "CHUNK_TOKENS", {"cpu": 16})
    layer = PEER(9, 100, heads=3, top_k=5, key_dim=6, query_norm=query_norm, shared_keys=shared, dtype=torch.float64)
    for tokens in (0, 2, 16, 53):
        x = torch.randn(tokens, 9, dtype=torch.float64, requires_grad=True)
        leaves = [x, *layer.parameters()]
        y = layer(x)
        got = torch.autograd.grad(y.square().sum(), leaves)
        if tokens > 1:
            want = plain_peer(layer, x, query_norm)
            torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
            for g, w in zip(got, torch.autograd.grad(want.square().sum(), leaves)):
                torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-11)
    for frozen in (layer.keys, layer.query.weight, *layer.norm.parameters()):
        frozen.requires_grad_(False)
        x.grad = None
        layer.zero_grad()
        layer(x).square().sum().backward()
        assert frozen.grad is None
        assert x.grad.isfinite().all()


def test_scores_of_all_tokens_are_never_held():
    layer = PEER(16, 256**2, heads=4, top_k=4, key_dim=8, query_norm="none")
    x = torch.randn(2000, 16, requires_grad=True)
    with torch.profiler.profile(profile_memory=True) as profile:
        retrieved = layer._retrieve(x)[1]
        retrieved.sum().backward()
    assert max(event.self_cpu_memory_usage for event in profile.events()) < 2000 * 4 * 2 * 256 * 4 / 4


def test_batch_norm_like_torch():
    """Running statistics, evaluation mode and the affine map are those of torch's BatchNorm1d."""
    torch.manual_seed(0)
    layer = PEER(8, 16, heads=2, top_k=2, key_dim=4, dtype=torch.float64)
    twin = torch.nn.BatchNorm1d(8, dtype=torch.float64)
    for _ in range(3):
        query = torch.randn(13, 2, 4, dtype=torch.float64)
        torch.testing.assert_close(layer.norm(query), twin(query.flatten(1)).view_as(query), rtol=1e-9, atol=1e-9)
    layer.norm.eval(), twin.eval()
    query = torch.randn(5, 2, 4, dtype=torch.float64)
    torch.testing.assert_close(layer.norm(query), twin(query.flatten(1)).view_as(query), rtol=1e-6, atol=1e-6)
    layer.bfloat16()
    assert layer.norm.running_var.dtype == torch.float64, "running statistics are never rounded"


def test_batch_norm_and_scores_in_bfloat16():
    """Statistics are those of float32 arithmetic, the output is its rounding; scores leave as float32."""
    torch.manual_seed(0)
    layer = PEER(8, 64, heads=2, top_k=3, key_dim=4)
    exact = copy.deepcopy(layer.norm)
    layer.bfloat16()
    query = (3 + torch.randn(4096, 2, 4)).bfloat16()
    got, want = layer.norm(query), exact(query.float())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=2**-8, atol=1e-4)
    torch.testing.assert_close(layer.norm.running_mean, exact.running_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.norm.running_var, exact.running_var, rtol=1e-5, atol=1e-6)
    scores = retrieve(got, layer.keys, 3)[1]
    assert scores.dtype == torch.float32
    best = all_scores(got.double(), layer.keys.double()).topk(3, dim=-1).values
    torch.testing.assert_close(scores.double(), best, rtol=1e-6, atol=1e-6)  # not those of a bfloat16 product


def test_batch_norm_does_not_learn_what_is_not_finite():
    """Infinite or undefined statistics of a feature leave its running ones as they were; the others go on."""
    norm = PEER(8, 16, heads=2, top_k=2, key_dim=4).norm
    for bad in (math.nan, math.inf, 1e30):  # of the last one only the variance is infinite
        before = torch.stack([norm.running_mean, norm.running_var])
        query = torch.randn(13, 2, 4)
        query[5, 1, 2] = bad
        norm(query)
        unchanged = torch.stack([norm.running_mean, norm.running_var]) == before
        assert unchanged.tolist() == [[False] * 6 + [True, False]] * 2, bad


def test_initial_queries_and_keys():
    """Query weights of variance 1/dim; keys uniform within +-1/sqrt(key_dim / 2)."""
    layer = PEER(96, 64**2, heads=4, top_k=4, key_dim=32, seed=1)
    assert float(layer.query.weight.detach().std()) == pytest.approx(96**-0.5, rel=0.03)
    bound = 16**-0.5
    assert 0.99 * bound < float(layer.keys.detach().abs().max()) <= bound
    assert float(layer.keys.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.03)


@pytest.mark.parametrize("query_norm", ["batch", "layer", "rms"])
def test_reset_parameters_is_a_new_layer(query_norm):
    """Whatever the layer went through, it equals one that was just made with the seed; its norm too."""
    layer, new = (PEER(8, 16, heads=2, top_k=2, key_dim=4, query_norm=query_norm, seed=seed) for seed in (1, 2))
    layer(torch.randn(13, 8))
    for parameter in layer.parameters():
        torch.nn.init.uniform_(parameter, 2, 3)
    layer.reset_parameters(seed=2)
    want = new.state_dict()
    assert all(torch.equal(value, want[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("dense_hidden", [0, 200])
@pytest.mark.parametrize("gate", list(GATES))
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_output_variance_at_the_start(gate, activation, dense_hidden):
    for output_std in (None, 0.3):
        layer = PEER(64, 64**2, heads=4, top_k=8, key_dim=32, gate=gate, activation=activation, seed=3,
                     output_std=output_std, output_gate=gate == "sigmoid", dense_hidden=dense_hidden)  # fmt: skip
        y = layer(torch.randn(2000, 64))
        want = output_std or math.sqrt(activation_second_moment(ACTIVATIONS[activation]))
        assert float(y.detach().std()) == pytest.approx(want, rel=0.1)


def test_a_dense_block_moves_no_other_weight():
    """But ``up``, by the factor that leaves it half of the variance."""
    options = {"heads": 3, "top_k": 2, "key_dim": 4, "output_gate": True, "seed": 5}
    plain, beside = PEER(12, 25, **options).state_dict(), PEER(12, 25, **options, dense_hidden=9).state_dict()
    assert tuple(beside.pop("dense_in.weight").shape) == (9, 12)
    assert tuple(beside.pop("dense_out.weight").shape) == (12, 9)
    torch.testing.assert_close(beside.pop("up"), plain.pop("up") * math.sqrt(0.5))
    assert beside.keys() == plain.keys()
    assert all(torch.equal(value, plain[name]) for name, value in beside.items())


def shared_pair(seed, **options):
    options = {"heads": 2, "top_k": 3, "key_dim": 4, "query_norm": "layer", "dtype": torch.float64} | options
    first = PEER(8, 25, **options, seed=seed)
    return torch.nn.ModuleList([first, PEER(8, 25, **options, seed=seed + 1, tables_of=first)])


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("released", [False, True])
def test_shared_tables_and_their_gradients(sparse, released):
    """Each layer has its own way to the experts; both layers' gradients add up in the one pair of tables."""
    first, second = layers = shared_pair(3, sparse_grad=sparse, dense_hidden=5)
    tables = [first.down, first.up]
    names = [name for name, _ in layers.named_parameters()]
    assert names.count("0.down") == 1
    assert not {"1.down", "1.up"} & {*names}
    assert not torch.equal(first.keys, second.keys)
    if released:
        for layer in layers:
            layer.release_shards()
        assert not [name for name, _ in layers.named_parameters() if "down" in name or "up" in name]
    assert second.down is tables[0]
    assert second.up is tables[1]
    x = torch.randn(9, 8, dtype=torch.float64, requires_grad=True)
    inputs = [x, *tables, first.keys, second.keys, second.dense_in.weight]
    second(x + first(x)).square().sum().backward()
    want = plain_peer(second, x + plain_peer(first, x, "layer"), "layer").square().sum()
    for leaf, expected in zip(inputs, torch.autograd.grad(want, inputs)):
        got = leaf.grad.to_dense() if leaf.grad.is_sparse else leaf.grad
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    assert tables[0].grad.is_sparse is sparse


def test_shared_tables_are_saved_and_loaded():
    saved, other = shared_pair(3), shared_pair(7)
    state = saved.state_dict()
    assert state["0.down"].data_ptr() == state["1.down"].data_ptr()
    other.load_state_dict(state)
    x = torch.randn(9, 8, dtype=torch.float64)
    for layer, twin in zip(saved, other):
        assert torch.equal(layer(x), twin(x))
    assert other[0].down is other[1].down
    copied = copy.deepcopy(saved)
    assert copied[0].up is copied[1].up is not saved[0].up


def test_a_layer_does_not_draw_another_layers_tables():
    first, second = shared_pair(3)
    before = first.down.clone(), first.up.clone(), second.keys.clone()
    second.reset_parameters(seed=9)
    assert torch.equal(first.down, before[0])
    assert torch.equal(first.up, before[1])
    assert not torch.equal(second.keys, before[2])
    assert torch.equal(second.keys, PEER(8, 25, heads=2, top_k=3, key_dim=4, dtype=torch.float64, seed=9).keys)


@pytest.mark.parametrize(
    ("dim", "options", "word"),
    [
        (8, {"num_experts": 36}, "the same num_experts: 25 there, 36 here"),
        (9, {}, "the same dim: 8 there, 9 here"),
        (8, {"table_dtype": torch.bfloat16}, r"the same table_dtype: torch.float64 there, torch.bfloat16 here"),
    ],
)
def test_tables_that_do_not_fit_are_not_shared(dim, options, word):
    with pytest.raises(ValueError, match=word):
        PEER(dim, **{"num_experts": 25, "heads": 2, "top_k": 3, "key_dim": 4} | options, tables_of=shared_pair(3)[0])


def test_state_dict_names_and_shapes():
    shared = PEER(12, 25, heads=3, top_k=2, key_dim=4)
    assert {name: tuple(value.shape) for name, value in shared.state_dict().items()} == {
        "query.weight": (12, 12), "keys": (2, 5, 2), "down": (25, 12), "up": (25, 12),
        "norm.weight": (12,), "norm.bias": (12,), "norm.running_mean": (12,), "norm.running_var": (12,),
    }  # fmt: skip
    assert PEER(12, 25, heads=3, top_k=2, key_dim=4, shared_keys=False).keys.shape == (3, 2, 5, 2)


def test_released_tables_are_no_parameters_but_still_train():
    layer = PEER(6, 16, heads=2, top_k=2, key_dim=4, dtype=torch.float64)
    x = torch.randn(9, 6, dtype=torch.float64)
    before = layer(x)
    layer.release_shards()
    assert {name for name, _ in layer.named_parameters()} == {
        "query.weight",
        "keys",
        "norm.weight",
        "norm.bias",
    }
    torch.testing.assert_close(layer(x), before, rtol=0, atol=0)
    layer(x).sum().backward()
    assert layer.down.grad is not None
    assert layer.up.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"num_experts": 1000}, "square"),
        ({"num_experts": 16, "top_k": 5}, "top_k"),
        ({"num_experts": 16, "top_k": 0}, "top_k"),
        ({"key_dim": 7}, "even"),
        ({"gate": "tanh"}, "gate must be one of softmax, sigmoid, relu"),
        ({"query_norm": "group"}, "query_norm must be one of"),
        ({"activation": "elu"}, "activation must be one of"),
        ({"dense_hidden": -1}, "dense_hidden must be at least 0"),
        ({"dispatch_chunks": 0}, "dispatch_chunks must be at least 1"),
    ],
)
def test_impossible_options_are_refused(options, word):
    with pytest.raises(ValueError, match=word):
        PEER(8, **{"num_experts": 64, "top_k": 4, **options})


def test_initial_tables_depend_on_the_seed():
    """And on nothing drawn before; that they do not depend on the sharding is in test_sharding."""
    first, second = PEER(4, 81**2, top_k=4, seed=7), PEER(4, 81**2, top_k=4, seed=7)
    torch.testing.assert_close(first.up, second.up, rtol=0, atol=0)
    assert not torch.equal(first.up[:4096], PEER(4, 81**2, top_k=4, seed=8).up[:4096])


@pytest.mark.parametrize(
    "options",
    [
        {"num_experts_per_head": 4, "non_competing_scores": False},
        {"num_experts_per_head": 4, "product_key_topk": 5},  # one expert per head
        {"num_experts_per_head": 3, "non_competing_scores": False, "dim_key": 3, "activation": torch.nn.SiLU},
    ],
)
def test_weights_of_peer_pytorch(options):
    theirs = pytest.importorskip("PEER_pytorch").PEER(8, heads=3, num_experts=49, **options).double()
    torch.nn.init.normal_(theirs.keys)
    options = {key: value for key, value in options.items() if key != "dim_key"}
    if "activation" in options:
        options["activation"] = "silu"
    ours = load_peer_pytorch(theirs.state_dict(), **options)
    x = torch.randn(2, 30, 8, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)


def test_weights_that_are_no_peer_layer():
    PEER_pytorch = pytest.importorskip("PEER_pytorch")

    def refused(word, loading=None, **options):
        with pytest.raises(ValueError, match=word):
            load_peer_pytorch(PEER_pytorch.PEER(8, heads=2, num_experts=256, **options).state_dict(), **(loading or {}))

    refused("norm.gamma: PEER does not normalise its input", pre_rmsnorm=True)
    refused("has 512 experts for 256 keys", separate_embed_per_head=True)
    refused(r"product_key_topk \(5\) is less", {"product_key_topk": 5, "non_competing_scores": False})
    with pytest.raises(ValueError, match=r"keys, to_queries\.0\.weight: missing or unknown"):
        load_peer_pytorch({"weight_down_embed.weight": torch.zeros(4, 2), "weight_up_embed.weight": torch.zeros(4, 2)})
