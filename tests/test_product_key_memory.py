"""Product-key memory: the layer against its definition written out, and on grids of ranks against the whole layer."""

import itertools

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from peer_dist import ProductKeyMemory
from peer_dist.sharding import ExpertGroups
from peer_dist.sharding.cost import exchange_bytes, exchange_pairs
from tests.definitions import GATES, all_scores
from tests.ranks import run_ranks
from tests.shards import dense_grads, tokens_of, whole_table

DIM = 10
UNPROJECTED = {"query_projection": False, "query_norm": "none", "gate": "relu", "init": "dense", "num_layers": 2}


def plain_memory(layer, x):
    query = x[:, None].expand(-1, layer.heads, -1)
    if layer.query is not None:
        query = layer.norm((x @ layer.query.weight.T).unflatten(-1, (layer.heads, layer.key_dim)))
    scores, value = all_scores(query, layer.keys).topk(layer.top_k, dim=-1)
    return torch.einsum("thk,thkd->td", GATES[layer.gate](scores), layer.values[value])


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        *({"gate": gate, "shared_keys": shared} for gate, shared in itertools.product(GATES, [True, False])),
        *({"query_norm": norm} for norm in ("layer", "rms", "none")),
        UNPROJECTED,
        UNPROJECTED | {"gate": "softmax"},
    ],
    ids=str,
)
def test_layer_and_every_gradient(options, sparse):
    torch.manual_seed(1)
    layer = ProductKeyMemory(DIM, 49, 5, 4, 6, **options, sparse_grad=sparse, dtype=torch.float64)
    x = torch.randn(3, 7, DIM, dtype=torch.float64, requires_grad=True)
    picked = []
    layer.on_route = lambda indices, gates: picked.append((indices, gates))
    y = layer(x)
    assert picked[0][0].shape == picked[0][1].shape == (21, 5, 4)
    rows = picked[0][0].flatten(1).sort(dim=1).values
    assert (rows[:, 1:] == rows[:, :-1]).any(), "the case must have one value picked by two heads"
    want = plain_memory(layer, x.reshape(-1, DIM)).view_as(x)
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    inputs = [x, *layer.parameters()]
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, inputs, dy)
    assert [grad.is_sparse for grad in got].count(True) == sparse
    for g, e in zip(dense_grads(got), torch.autograd.grad(want, inputs, dy)):
        torch.testing.assert_close(g, e, rtol=1e-10, atol=1e-12)


def test_initial_weights():
    """Of the whole, whatever a shard has: each as the class says."""
    lample = ProductKeyMemory(64, 64**2, 4, 8, 32, seed=1)
    dense = ProductKeyMemory(64, 64**2, 4, 8, **UNPROJECTED, seed=1)
    for tensor, std in (
        (lample.values, 64**-0.5),
        (lample.keys, (16 * 3) ** -0.5),
        (lample.query.weight, 64**-0.5),
        (dense.values, (2 / (64**2 * 2)) ** 0.5),
        (dense.keys, (2 / (64 * 2)) ** 0.5),
    ):
        assert float(tensor.detach().std()) == pytest.approx(std, rel=0.03)
    assert float(lample.keys.detach().abs().max()) <= 16**-0.5 < float(dense.keys.detach().abs().max())


def test_state_dict_and_released_values():
    layer = ProductKeyMemory(12, 25, heads=3, top_k=2, key_dim=4)
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == {
        "query.weight": (12, 12), "keys": (3, 2, 5, 2), "values": (25, 12),
        "norm.weight": (12,), "norm.bias": (12,), "norm.running_mean": (12,), "norm.running_var": (12,),
    }  # fmt: skip
    layer.release_shards()
    assert {name for name, _ in layer.named_parameters()} == {"query.weight", "keys", "norm.weight", "norm.bias"}
    assert layer.shards()["values"].parameter is layer.values
    bare = ProductKeyMemory(12, 25, heads=3, top_k=2, **UNPROJECTED)
    assert {name: tuple(value.shape) for name, value in bare.state_dict().items()} == {
        "keys": (3, 2, 5, 6), "values": (25, 12)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"num_values": 1000}, "num_values must be the square"),
        ({"num_values": 16, "top_k": 5}, r"top_k must be between 1 and sqrt\(num_values\) = 4, not 5"),
        ({"init": "zero"}, "init must be one of memory, dense"),
        ({"query_projection": False}, "query_norm must be none and shared_keys false, not 'batch' and False"),
        (UNPROJECTED | {"shared_keys": True}, "query_norm must be none and shared_keys false, not 'none' and True"),
    ],
)
def test_impossible_options_are_refused(options, word):
    with pytest.raises(ValueError, match=word):
        ProductKeyMemory(8, **{"num_values": 64, "top_k": 4, **options})


LAYERS = [
    {"num_values": 49, "heads": 3, "top_k": 5, "key_dim": 6},
    {"num_values": 25, "heads": 4, "top_k": 3, **UNPROJECTED, "sparse_grad": True},
    {"num_values": 9, "heads": 6, "top_k": 3, "key_dim": 4, "gate": "sigmoid", "query_norm": "rms"},
]


def run(layer, x, dy, recompute=None):
    x = x.clone().requires_grad_()
    y = layer(x) if recompute is None else checkpoint(layer, x, use_reentrant=recompute)
    (y * dy).sum().backward()
    rest = {name: p.grad for name, p in layer.named_parameters() if name != "values"}
    return y.detach(), x.grad, *dense_grads([layer.values.grad]), rest


def sharded_case(rank, world_size, counts, columns):
    groups = ExpertGroups.over(dist.group.WORLD, columns)
    results = []
    for options, recompute in itertools.product(LAYERS, (None, False, True)):
        layer = ProductKeyMemory(DIM, **options, seed=11, dtype=torch.float64, group=groups)
        x, dy = (part.split(counts)[rank] for part in tokens_of(counts, DIM))
        *parts, rest = run(layer, x, dy, recompute)
        for grad in rest.values():
            dist.all_reduce(grad)
        assert layer.values.shape == (len(layer.layout.rows), len(layer.layout.columns))
        results.append((*parts, rest))
    return results


@pytest.mark.parametrize(
    ("counts", "columns"),
    [([23], 1), ([11, 12], 1), ([0, 23], 2), ([3, 0, 20], 1), ([9, 0, 5], 3), ([4, 11, 1, 7], 2), ([0, 0, 23, 0], 2)],
    ids=str,
)
def test_sharded_equals_whole(counts, columns):
    """Outputs and every gradient, recomputed or not; ranks without tokens; uneven rows and columns."""
    ranks = run_ranks(sharded_case, len(counts), counts, columns)
    for number, (options, _) in enumerate(itertools.product(LAYERS, range(3))):
        layer = ProductKeyMemory(DIM, **options, seed=11, dtype=torch.float64)
        want = run(layer, *tokens_of(counts, DIM))
        results = [results[number] for results in ranks]
        for part in range(3):
            parts = [result[part] for result in results]
            got = whole_table(parts, columns) if part == 2 else torch.cat(parts)
            torch.testing.assert_close(got, want[part], rtol=1e-12, atol=1e-12)
        for result in results:
            assert result[3].keys() == want[3].keys()
            for name, grad in result[3].items():
                torch.testing.assert_close(grad, want[3][name], rtol=1e-12, atol=1e-12)


def traffic_case(rank, world_size, columns):
    """In bfloat16 under float32 gates: what the formula says, and what was sent, sizes of messages apart."""
    groups = ExpertGroups.over(dist.group.WORLD, columns)
    layer = ProductKeyMemory(DIM, 49, 3, 5, 6, seed=2, group=groups, dtype=torch.bfloat16)
    picked = []
    layer.on_route = lambda indices, gates: picked.append(indices.flatten(1))
    x = torch.randn(7 * rank + 2, DIM, dtype=torch.bfloat16)
    y = layer(x)
    forward = layer.traffic.sent.copy()
    y.sum().backward()
    rows = world_size // columns
    cost = exchange_bytes(picked[0], 49, DIM, rows, columns, home=rank, values=True)
    pairs = exchange_pairs(picked[0], 49, DIM, rows, columns, home=rank, values=True)
    assert 0 <= cost.total - int(pairs.sum()) <= world_size  # rings
    counts = 2 * 8 * (rows - 1 + (columns - 1) * rows)
    backward = layer.traffic.sent - forward
    assert not {"x", "dx", "dots"} & {*layer.traffic.sent}
    return (
        cost.forward + cost.column_forward,
        forward.total() - counts,
        cost.backward + cost.column_backward,
        backward.total(),
    )


@pytest.mark.parametrize(("world_size", "columns"), [(1, 1), (3, 1), (3, 3), (4, 2)])
def test_bytes_sent_are_those_of_the_formula(world_size, columns):
    forward, sent, backward, sent_back = (sum(each) for each in zip(*run_ranks(traffic_case, world_size, columns)))
    assert forward == sent
    assert 0 <= backward - sent_back <= 2 * world_size  # the last byte of a ring's part, per rank
    assert (backward > 0) == (forward > 0) == (world_size > 1)


def initial_values(rank, world_size, columns):
    groups = ExpertGroups.over(dist.group.WORLD, columns)
    return ProductKeyMemory(5, 81**2, top_k=4, seed=7, group=groups).values.detach()


@pytest.mark.parametrize("columns", [1, 3])
def test_initial_values_do_not_depend_on_the_sharding(columns):
    got = whole_table(run_ranks(initial_values, 3, columns), columns)
    assert torch.equal(got, ProductKeyMemory(5, 81**2, top_k=4, seed=7).values)
