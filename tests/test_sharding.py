"""The row-sharded layer on 1 to 4 ranks against the whole layer in one process, in float64."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from peer_dist import PEER
from peer_dist.sharding import RowLayout
from peer_dist.sharding.exchange import Traffic, combine, dispatch, merge_picks, plan_exchange
from tests.ranks import run_ranks

DIM = 10


def build(options, group):
    layer = PEER(DIM, seed=11, dtype=torch.float64, group=group, **options["layer"])
    with torch.no_grad():
        if options.get("one_shard"):  # every query prefers the first sub-keys, so all picks are low rows
            layer.norm.bias.view(layer.heads, -1)[:, 0] = 50.0
            layer.keys[0, :, 0] = -torch.arange(layer.keys.shape[1], dtype=torch.float64)
        for parameter in layer.norm.parameters():
            parameter += torch.linspace(-0.1, 0.1, parameter.numel(), dtype=torch.float64)
    return layer


def tokens_of(counts):
    torch.manual_seed(5)
    return [torch.randn(sum(counts), DIM, dtype=torch.float64) for _ in ("x", "dy")]


def run(layer, x, dy):
    """Two passes (statistics run), the second one's output and gradients, then evaluation mode's output."""
    layer(x)
    x = x.clone().requires_grad_()
    y = layer(x)
    (y * dy).sum().backward()
    layer.eval()
    with torch.no_grad():
        quiet = layer(x)
    dense = {name: p.grad for name, p in layer.named_parameters() if name not in ("down", "up")}
    return y.detach(), x.grad, layer.down.grad, layer.up.grad, dense, quiet


def sharded_case(rank, world_size, cases, counts):
    results = []
    for options in cases:
        x, dy = tokens_of(counts)
        layer = build(options, dist.group.WORLD)
        y, dx, ddown, dup, dense, quiet = run(layer, x.split(counts)[rank], dy.split(counts)[rank])
        for grad in dense.values():
            dist.all_reduce(grad)
        assert layer.down.shape == (len(layer.layout.rows), DIM)
        results.append((y, dx, ddown, dup, dense, quiet, layer.traffic.picks_received))
    return results


LAYERS = {
    "batch norm, uneven tables": {
        "num_experts": 49, "heads": 3, "top_k": 5, "key_dim": 6, "query_norm": "batch",
    },
    "per-head keys, sigmoid": {
        "num_experts": 64, "heads": 4, "top_k": 3, "key_dim": 4, "query_norm": "rms", "gate": "sigmoid",
        "activation": "silu", "shared_keys": False,
    },
    "tiny pool, every expert picked": {
        "num_experts": 9, "heads": 6, "top_k": 3, "key_dim": 4, "query_norm": "layer", "gate": "relu",
        "activation": "relu",
    },
}  # fmt: skip


@pytest.mark.parametrize(
    "counts",
    [[23], [11, 12], [0, 23], [9, 9, 5], [3, 0, 20], [4, 11, 1, 7], [0, 0, 23, 0]],
    ids=lambda counts: "+".join(map(str, counts)),
)
def test_sharded_equals_whole(counts):
    """Outputs and every gradient; ranks without tokens; all picks on one shard (the last case)."""
    cases = [{"layer": options} for options in LAYERS.values()]
    cases.append({"layer": LAYERS["batch norm, uneven tables"], "one_shard": True})
    ranks = run_ranks(sharded_case, len(counts), cases, counts)
    for number, options in enumerate(cases):
        want = run(build(options, None), *tokens_of(counts))
        results = [results[number] for results in ranks]
        for part in (0, 1, 2, 3, 5):
            got = torch.cat([result[part] for result in results])
            torch.testing.assert_close(got, want[part], rtol=1e-12, atol=1e-12)
        for result in results:
            assert result[4].keys() == want[4].keys()
            for key, grad in result[4].items():
                torch.testing.assert_close(grad, want[4][key], rtol=1e-12, atol=1e-12)
        if "one_shard" in options:
            assert results[0][6] > 0
            assert all(result[6] == 0 for result in results[1:])


def traffic_case(rank, world_size, counts):
    layer = build({"layer": LAYERS["batch norm, uneven tables"]}, dist.group.WORLD)
    torch.manual_seed(rank)
    picked = []
    layer.on_route = lambda indices, gates: picked.append(indices.flatten(1))
    layer(torch.randn(counts[rank], DIM, dtype=torch.float64)).sum().backward()
    starts = [RowLayout(49, dist.group.WORLD).first_row(shard) for shard in range(world_size + 1)]
    return picked[0], layer.traffic.bytes_sent, starts


def test_bytes_sent_are_those_of_the_formula():
    """Each token once per shard that it hits, each distinct pick once, both ways; the local part is free."""
    counts = [5, 9, 3]
    results = run_ranks(traffic_case, 3, counts)
    starts = results[0][2]
    tokens, picks = torch.zeros(3, 3, dtype=torch.int64), torch.zeros(3, 3, dtype=torch.int64)
    for home, (indices, _, _) in enumerate(results):
        for row in indices.tolist():
            for shard in range(3):
                hit = {e for e in row if starts[shard] <= e < starts[shard + 1]}
                tokens[home, shard] += bool(hit)
                picks[home, shard] += len(hit)
    for rank, (_, sent, _) in enumerate(results):
        others = [shard for shard in range(3) if shard != rank]
        out_tokens, out_picks = (int(table[rank, others].sum()) for table in (tokens, picks))
        in_tokens, in_picks = (int(table[others, rank].sum()) for table in (tokens, picks))
        forward = out_tokens * (DIM * 8 + 4) + out_picks * (4 + 8) + in_tokens * DIM * 8
        backward = out_tokens * DIM * 8 + in_tokens * DIM * 8 + in_picks * 8
        assert sent == forward + backward + 2 * 2 * 8  # and two counts to each other rank


def twice_case(rank, world_size):
    """The exchange alone, of a few picks; twice differentiated, it must say no rather than be wrong."""
    layout = RowLayout(9, dist.group.WORLD)
    x, gate = (torch.randn(*shape, requires_grad=True) for shape in ((4, DIM), (4, 3)))
    token, expert, merged = merge_picks(torch.randint(9, (4, 3)), gate)
    plan, order = plan_exchange(token, expert, 4, layout, Traffic())
    x_owned, gate_owned = dispatch(x, merged[order], plan)
    y = torch.randn(x_owned.shape, requires_grad=True)
    for out, source in ((x_owned, x), (gate_owned, gate), (combine(y, plan), y)):
        (grad,) = torch.autograd.grad(out.square().sum(), source, create_graph=True, retain_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward(retain_graph=True)


def test_the_exchange_is_differentiable_once():
    run_ranks(twice_case, 2)


@settings(max_examples=50, deadline=None)
@given(tokens=st.integers(0, 6), picks=st.integers(1, 12), experts=st.integers(1, 20), seed=st.integers(0, 2**20))
def test_merging_adds_gates(tokens, picks, experts, seed):
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(experts, (tokens, picks), generator=generator)
    gates = torch.rand(tokens, picks, generator=generator, dtype=torch.float64)
    token, expert, gate = merge_picks(indices, gates)
    dense = torch.zeros(tokens, experts, dtype=torch.float64).scatter_add_(1, indices, gates)
    rebuilt = torch.zeros_like(dense)
    rebuilt[token, expert] = gate
    torch.testing.assert_close(rebuilt, dense, rtol=1e-14, atol=1e-14)
    assert len({*zip(token.tolist(), expert.tolist())}) == token.numel()


def initial_tables(rank, world_size):
    layer = PEER(4, 81**2, top_k=4, seed=7, group=dist.group.WORLD)
    return layer.first_row, layer.down.detach(), layer.up.detach(), layer.state_dict()["down"].shape


def test_initial_tables_do_not_depend_on_the_sharding():
    whole = PEER(4, 81**2, top_k=4, seed=7)
    parts = run_ranks(initial_tables, 3)
    assert [part[0] for part in parts] == [0, 2187, 4374]
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), whole.down.detach(), rtol=0, atol=0)
    torch.testing.assert_close(torch.cat([part[2] for part in parts]), whole.up.detach(), rtol=0, atol=0)
