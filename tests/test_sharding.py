"""The layer on grids of row and column shards against the whole layer in one process, in float64."""

from collections import Counter
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from peer_dist import PEER
from peer_dist.sharding import ExpertGroups, GridLayout, dispatch, routed_experts
from peer_dist.sharding.cost import exchange_bytes, exchange_pairs
from peer_dist.sharding.exchange import ExchangePlan, MergedPicks, Part, Traffic
from peer_dist.sharding.wire import WIRES
from tests.gpu.device import DEVICE
from tests.ranks import run_ranks
from tests.shards import assert_as_whole, dense_grads, tokens_of, whole_table

DIM = 10


def build(options, group):
    layer = PEER(seed=11, dtype=torch.float64, group=group, device="cpu", **({"dim": DIM} | options["layer"]))
    with torch.no_grad():
        if options.get("one_shard"):  # every query prefers the first sub-keys, so all picks are low rows
            layer.norm.bias.view(layer.heads, -1)[:, 0] = 50.0
            layer.keys[..., 0, :, 0] = -torch.arange(layer.keys.shape[-2], dtype=torch.float64)
        for parameter in layer.norm.parameters():
            parameter += torch.linspace(-0.1, 0.1, parameter.numel(), dtype=torch.float64)
    return layer.to(DEVICE)


def run(layer, x, dy):
    """Two passes (statistics run), the second one's output and gradients, then evaluation mode's output."""
    x, dy = x.to(DEVICE), dy.to(DEVICE)
    layer(x)
    x = x.clone().requires_grad_()
    y = layer(x)
    (y * dy).sum().backward()
    layer.eval()
    with torch.no_grad():
        quiet = layer(x)
    dense = {name: p.grad for name, p in layer.named_parameters() if name not in ("down", "up")}
    return y.detach(), x.grad, layer.down.grad, layer.up.grad, dense, quiet


def sharded_case(rank, world_size, cases, counts, columns):
    groups = ExpertGroups.over(dist.group.WORLD, columns)
    results = []
    for options in cases:
        x, dy = tokens_of(counts)
        layer = build(options, groups)
        y, dx, ddown, dup, dense, quiet = run(layer, x.split(counts)[rank], dy.split(counts)[rank])
        for grad in dense.values():
            dist.all_reduce(grad)
        assert layer.down.shape == (len(layer.layout.rows), len(layer.layout.columns))
        results.append((y, dx, ddown, dup, dense, quiet, layer.traffic.picks_received))
    return results


LAYERS = {
    "batch norm, uneven tables": {
        "num_experts": 49, "heads": 3, "top_k": 5, "key_dim": 6, "query_norm": "batch",
    },
    "per-head keys, sigmoid": {
        "num_experts": 64, "heads": 4, "top_k": 3, "key_dim": 4, "query_norm": "rms", "gate": "sigmoid",
        "activation": "silu", "shared_keys": False, "output_gate": True,
    },
    "tiny pool, every expert picked": {
        "num_experts": 9, "heads": 6, "top_k": 3, "key_dim": 4, "query_norm": "layer", "gate": "relu",
        "activation": "relu",
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("counts", "columns"),
    [
        ([23], 1), ([11, 12], 1), ([0, 23], 1), ([9, 9, 5], 1), ([3, 0, 20], 1), ([4, 11, 1, 7], 1), ([0, 0, 23, 0], 1),
        ([11, 12], 2), ([0, 23], 2), ([9, 0, 5], 3), ([4, 11, 1, 7], 2), ([4, 0, 12, 7], 4),
        ([0, 0, 23, 0], 2), ([3, 5, 0, 8, 1, 6], 2), ([3, 5, 0, 8, 1, 6], 3),
    ],
    ids=str,
)  # fmt: skip
def test_sharded_equals_whole(counts, columns):
    """Outputs and every gradient; ranks without tokens; uneven slices; all picks on one shard (the last case)."""
    cases = [{"layer": options} for options in LAYERS.values()]
    cases.append({"layer": LAYERS["batch norm, uneven tables"], "one_shard": True})
    ranks = run_ranks(sharded_case, len(counts), cases, counts, columns)
    for number, options in enumerate(cases):
        want = run(build(options, None), *tokens_of(counts))
        results = [results[number] for results in ranks]
        assert_as_whole(results, want, columns, 1e-12)
        if "one_shard" in options:
            assert all(result[6] > 0 for result in results[:columns])
            assert all(result[6] == 0 for result in results[columns:])


def random_case(world_size, number, generator):
    """A layout, sizes, tokens of each rank, parts in which they travel (more than tokens, at times) and a skew."""

    def draw(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    grids = [size for size in range(1, world_size + 1) if world_size % size == 0]
    columns = grids[number % len(grids)]
    n = draw(1, 2, 3, 5, 8, 11)
    top_k = 1 + int(torch.randint(min(n, 5), (), generator=generator))
    layer = {
        "dim": draw(1, 2, 3, 7, 16, 20), "num_experts": n * n, "heads": draw(1, 2, 5), "top_k": top_k,
        "key_dim": draw(2, 6), "query_norm": draw("batch", "layer", "rms", "none"),
        "gate": draw("softmax", "sigmoid", "relu"), "activation": draw("gelu", "relu", "silu"),
        "shared_keys": draw(True, False), "sparse_grad": draw(True, False),
        "dispatch_chunks": draw(1, 2, 3, 4, 5), "dense_hidden": draw(0, 7),
    }  # fmt: skip
    counts = [draw(0, 1, 2, 9, 30) for _ in range(world_size)]
    counts[draw(*range(world_size))] += 2  # batch norm needs something
    return {"layer": layer, "one_shard": layer["query_norm"] == "layer" and draw(True, False)}, counts, columns


def fuzz_cases(rank, world_size, seed, count):
    generator = torch.Generator().manual_seed(seed)
    groups = {}
    results = []
    for number in range(count):
        options, counts, columns = random_case(world_size, number, generator)
        if columns not in groups:
            groups[columns] = ExpertGroups.over(dist.group.WORLD, columns)
        x, dy = tokens_of(counts, options["layer"]["dim"])
        layer = build(options, groups[columns])
        *parts, dense, quiet = run(layer, x.split(counts)[rank], dy.split(counts)[rank])
        for grad in dense.values():
            dist.all_reduce(grad)
        results.append((*dense_grads(parts), dense, quiet))
    return results


@pytest.mark.parametrize(("world_size", "count"), [(1, 20), (2, 90), (3, 80), (4, 70), (6, 20), (8, 20)])
def test_random_layouts_and_sizes(world_size, count):
    """300 cases in all. Ties of scores aside, which float64 does not meet, picks are those of the whole layer."""
    ranks = run_ranks(fuzz_cases, world_size, 77 + world_size, count, timeout=300)
    generator = torch.Generator().manual_seed(77 + world_size)
    for number in range(count):
        options, counts, columns = random_case(world_size, number, generator)
        whole = run(build(options, None), *tokens_of(counts, options["layer"]["dim"]))
        *parts, dense, quiet = whole
        want = (*dense_grads(parts), dense, quiet)
        results = [results[number] for results in ranks]
        compared = {name: (grad, want[4][name]) for name, grad in results[0][4].items()}
        for part in (0, 1, 2, 3, 5):
            shards = [result[part] for result in results]
            compared[part] = whole_table(shards, columns) if part in (2, 3) else torch.cat(shards), want[part]
        for name, (got, expected) in compared.items():
            error = (got - expected).abs().max().item() if got.numel() else 0.0
            assert error <= 1e-9 * (1 + expected.abs().max().item() if got.numel() else 0), (name, options, counts)


def traffic_case(rank, world_size, counts, columns, chunks):
    options = LAYERS["batch norm, uneven tables"] | {"dispatch_chunks": chunks}
    layer = build({"layer": options}, ExpertGroups.over(dist.group.WORLD, columns))
    torch.manual_seed(rank)
    picked = []
    layer.on_route = lambda indices, gates: picked.append(indices.flatten(1))
    y = layer(torch.randn(counts[rank], DIM, dtype=torch.float64))
    forward = layer.traffic.sent.copy()
    y.sum().backward()
    layout = layer.layout
    return (
        picked[0],
        forward,
        layer.traffic.sent - forward,
        layout.widths,
        [*map(layout.first_row, range(layout.row_shards + 1))],
    )


@pytest.mark.parametrize(
    ("counts", "columns", "chunks"),
    [
        ([5, 9, 3], 1, 1), ([5, 9, 3], 3, 1), ([5, 0, 3, 8], 2, 1), ([5, 9, 3, 0, 2, 7], 2, 1), ([5, 1, 3, 6], 4, 1),
        ([5, 9, 3], 1, 4), ([5, 9, 3], 3, 2), ([5, 0, 3, 8], 2, 3),
    ],
)  # fmt: skip
def test_bytes_sent_are_those_of_the_formula(counts, columns, chunks):
    """Each token once per row shard that it hits, each distinct pick once, both ways, and within the columns of a row
    shard picks to the others and dots around a ring; what stays on a rank is free. Parts of the tokens only add counts.
    """
    world = len(counts)
    results = run_ranks(traffic_case, world, counts, columns, chunks)
    widths, starts = results[0][3:]
    rows = world // columns
    tokens, picks = torch.zeros(world, rows, dtype=torch.int64), torch.zeros(world, rows, dtype=torch.int64)
    summed = torch.zeros(chunks, rows, dtype=torch.int64)  # picks of all homes, whose dots a part's ring adds up
    for home, (indices, *_) in enumerate(results):
        ends = [len(indices) * (chunk + 1) // chunks for chunk in range(chunks)]
        for number, token in enumerate(indices.tolist()):
            chunk = next(chunk for chunk, end in enumerate(ends) if number < end)
            for row in range(rows):
                hit = {e for e in token if starts[row] <= e < starts[row + 1]}
                tokens[home, row] += bool(hit)
                picks[home, row] += len(hit)
                summed[chunk, row] += len(hit)
    for rank, (_, forward, backward, *_) in enumerate(results):
        row, column = divmod(rank, columns)
        owners = [(r, c) for r in range(rows) for c in range(columns) if (r, c) != (row, column)]
        homes = [home for home in range(world) if home != rank]
        out = sum(int(tokens[rank, r]) * widths[c] for r, c in owners) * 8  # slices of x, or of dy
        back = int(tokens[homes, row].sum()) * widths[column] * 8  # slices of y, or of dx
        other_rows = [r for r in range(rows) if r != row]
        sent_tokens, sent_picks = int(tokens[rank, other_rows].sum()), int(picks[rank, other_rows].sum())
        own_column = range(column, world, columns)
        gathered_tokens, gathered_picks = (int(table[own_column, row].sum()) for table in (tokens, picks))
        ring = sum(2 * (columns - 1) * count * 8 // columns for count in summed[:, row].tolist())
        gates_home = sum(int(picks[home, row]) for home in own_column if home != rank)
        assert +forward == +Counter(
            {
                "counts": 2 * 8 * chunks * (rows - 1),
                "picks": sent_tokens * 4 + sent_picks * 4,
                "gates": sent_picks * 8,
                "x": out,
                "y": back,
                "column counts": 2 * 8 * chunks * (columns - 1) * rows,
                "column picks": (columns - 1) * (gathered_tokens * 4 + gathered_picks * 4),
                "column gates": (columns - 1) * gathered_picks * 8,
                "dots": ring,
            }
        )
        assert +backward == +Counter({"dy": out, "dx": back, "dgates": gates_home * 8, "ddots": ring})


def cost_case(rank, world_size, columns, chunks, wire):
    """In float32: what is counted from the picks, and what was sent, sizes of messages apart."""
    groups = ExpertGroups.over(dist.group.WORLD, columns, WIRES[wire])
    layer = PEER(DIM, 49, 3, 5, 6, seed=2, group=groups, dispatch_chunks=chunks)
    picked = []
    layer.on_route = lambda indices, gates: picked.append(indices.flatten(1))
    layer(torch.randn(7 * rank, DIM)).sum().backward()
    rows = world_size // columns
    sizes = 2 * 8 * chunks * (rows - 1 + (columns - 1) * rows)
    cost = exchange_bytes(picked[0], 49, DIM, rows, columns, home=rank, itemsize=4, wire=WIRES[wire])
    assert cost.hits == 0 if rank == 0 else 1 <= cost.hits <= rows
    pairs = exchange_pairs(picked[0], 49, DIM, rows, columns, home=rank, itemsize=4, wire=WIRES[wire])
    return cost.total, layer.traffic.bytes_sent - sizes, pairs


@pytest.mark.parametrize(
    ("world_size", "columns", "chunks", "wire"),
    [
        (1, 1, 1, None), (3, 1, 1, None), (3, 3, 1, None), (4, 2, 1, None), (6, 2, 1, None), (3, 3, 4, None),
        (4, 2, 2, None), (3, 1, 1, "bfloat16"), (3, 1, 1, "float8"), (4, 2, 2, "bfloat16"), (4, 2, 2, "float8"),
    ],
)  # fmt: skip
def test_the_cost_model_counts_what_is_sent(world_size, columns, chunks, wire):
    counted, by_rank, pairs = zip(*run_ranks(cost_case, world_size, columns, chunks, wire))
    sent = sum(by_rank)
    assert 0 <= sum(counted) - sent <= 2 * world_size * chunks  # the last byte of a ring's part, per rank and sum
    assert (sent > 0) == (world_size > 1)
    for own, counted_own in zip(by_rank, sum(pairs).sum(1).tolist()):  # of all homes' tokens
        assert abs(own - counted_own) <= 2 * world_size * chunks


def lonely_case(rank, world_size):
    layer = build({"layer": {"num_experts": 16, "top_k": 3, "query_norm": "none"}}, dist.group.WORLD)
    for name in ("all_to_all_single", "all_reduce"):
        setattr(dist, name, None)
    layer(tokens_of([5])[0]).sum().backward()
    return layer.layout.groups is not None and layer.traffic.bytes_sent == 0


def test_a_group_of_one_exchanges_nothing():
    assert run_ranks(lonely_case, 1) == [True]


def twice_case(rank, world_size):
    """Twice differentiated, the routed layer must say no rather than be wrong."""
    layout = GridLayout(9, DIM, ExpertGroups.over(dist.group.WORLD))
    shapes = (4, DIM), (4, 3), (len(layout.rows), DIM), (len(layout.rows), DIM)
    leaves = [torch.randn(*shape, requires_grad=True) for shape in shapes]
    x, gates, down, up = leaves
    y = routed_experts(x, torch.randint(9, (4, 3)), gates, down, up, "gelu", layout, Traffic(), dispatch_chunks=2)
    for grad in torch.autograd.grad(y.square().sum(), leaves, create_graph=True):
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward(retain_graph=True)


def test_the_exchange_is_differentiable_once():
    run_ranks(twice_case, 2)


TWO_PARTS = {
    "num_experts": 16, "heads": 2, "top_k": 3, "key_dim": 4, "query_norm": "none", "dispatch_chunks": 2,
}  # fmt: skip


def record(layer, before=lambda event: None, after=lambda event: None):
    """What this rank does from now on, in order: exchanges of gates and rows (and when it waits for them), what the
    owner computes and what the dense block does. For one forward and backward pass of two parts; a synchronous exchange
    is not recorded.
    """
    events = []
    names = iter(["gates", *(f"{row} {part}" for row in ("x", "y", "dy", "dx") for part in (0, 1)), "dgates"])
    send, columns = dist.all_to_all_single, layer.layout.groups.columns

    def happens(event, run=lambda: None):
        before(event)
        events.append(event)
        result = run()
        after(event)
        return result

    class Recorded:
        def __init__(self, work, name):
            self.work, self.name = work, name

        def wait(self):
            return happens(f"wait for {self.name}", self.work.wait)

    def start(out, x, receive=None, sizes=None, group=None, async_op=False):
        def run():
            return send(out, x, receive, sizes, group=group, async_op=async_op)

        if not async_op or not x.is_floating_point() or (columns is not None and group is columns):
            return run()
        name = next(names)
        return Recorded(happens(f"start {name}", run), name)

    def computed(name, function):
        count = iter(range(2))
        return lambda *arguments: happens(f"{name} {next(count)}", lambda: function(*arguments))

    dist.all_to_all_single = start
    dispatch.expert_mix_forward = computed("experts", dispatch.expert_mix_forward)
    dispatch.expert_mix_backward = computed("experts backward", dispatch.expert_mix_backward)
    dispatch.expert_table_grads = computed("tables", dispatch.expert_table_grads)
    if layer.dense_hidden:
        for name in ("dense_in", "dense_out"):
            linear = getattr(layer, name)
            linear.register_forward_hook(lambda *_, name=name: happens(name))
            linear.register_full_backward_hook(lambda *_, name=name: happens(f"{name} backward"))
    return events


def order_case(rank, world_size, counts, columns):
    layer = build({"layer": TWO_PARTS | {"dense_hidden": 3}}, ExpertGroups.over(dist.group.WORLD, columns))
    x = tokens_of(counts)[0].split(counts)[rank].clone().requires_grad_()
    events = record(layer)
    layer(x).sum().backward()
    return events


@pytest.mark.parametrize(("counts", "columns"), [([5, 9], 1), ([9, 0], 1), ([5, 1, 0, 6], 2), ([5, 9], 2)], ids=str)
def test_exchanges_overlap_the_experts_and_the_dense_block(counts, columns):
    """On every rank: an exchange has started before, and is waited for after, the experts of another part. The halves
    of the dense block lie where the first part arrives and where the last one returns. Forward and backward.
    """
    want = """
        start gates, start x 0, start x 1, dense_in, wait for gates, wait for x 0, experts 0,
        start y 0, wait for x 1, experts 1, start y 1, dense_out, wait for y 0, wait for y 1,
        start dy 0, start dy 1, dense_out backward, wait for dy 0, experts backward 0,
        start dx 0, wait for dy 1, experts backward 1, start dx 1, start dgates, tables 0,
        dense_in backward, wait for dx 0, wait for dx 1, wait for dgates
    """
    for events in run_ranks(order_case, len(counts), counts, columns):
        assert events == [event.strip() for event in want.split(",")]


def late_case(rank, world_size):
    """Rank 1 sends each of these only when rank 0 has computed that: rank 0 must not be waiting for it, nor rank 1's
    earlier exchanges need rank 1's attention.
    """
    needs = {
        "start x 1": "experts 0",
        "start y 0": "experts 1",
        "start dy 1": "experts backward 0",
        "start dx 0": "experts backward 1",
    }
    store = dist.distributed_c10d._get_default_store()

    def before(event):
        if rank == 1 and event in needs:
            store.wait([needs[event]], timedelta(seconds=30))

    def after(event):
        if rank == 0 and event in needs.values():
            store.set(event, "done")

    layer = build({"layer": TWO_PARTS}, dist.group.WORLD)
    events = record(layer, before, after)
    layer(tokens_of([8])[0].requires_grad_()).sum().backward()
    return len(events)


def test_exchanges_proceed_while_experts_compute():
    assert run_ranks(late_case, 2) == [25, 25]


def checkpointed_case(rank, world_size, columns, chunks):
    """Gradients and bytes without recomputation, and with either kind of it."""
    options = LAYERS["tiny pool, every expert picked"]
    if chunks > 1:
        options = LAYERS["per-head keys, sigmoid"] | {"dispatch_chunks": chunks, "dense_hidden": 5}
    groups = ExpertGroups.over(dist.group.WORLD, columns)
    results = []
    for reentrant in (None, False, True):
        layer = build({"layer": options}, groups)
        counts = [3 + 4 * (rank % 2) for rank in range(world_size)]
        x, dy = (part.split(counts)[rank] for part in tokens_of(counts))
        x = x.clone().requires_grad_()
        y = layer(x) if reentrant is None else checkpoint(layer, x, use_reentrant=reentrant)
        (y * dy).sum().backward()
        grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
        results.append(({"y": y.detach(), "x": x.grad, **grads}, layer.traffic.bytes_sent))
    return results


@pytest.mark.parametrize(("world_size", "columns", "chunks"), [(2, 1, 1), (2, 1, 3), (4, 2, 3)])
def test_recomputation_changes_no_gradient(world_size, columns, chunks):
    """Where recomputation stops as soon as it has what it needs, and nothing needs the results, the last part's are not
    sent again.
    """
    for (want, sent), (early, sent_early), (whole, sent_whole) in run_ranks(
        checkpointed_case, world_size, columns, chunks
    ):
        for got in (early, whole):
            assert got.keys() == want.keys()
            for name, value in got.items():
                torch.testing.assert_close(value, want[name], rtol=1e-13, atol=1e-13)
        assert sent < sent_early <= sent_whole
        assert (sent_early < sent_whole) is (chunks == 1)


def shared_case(rank, world_size, columns, chunks, sparse):
    """Two layers over the same tables; on one rank whole."""
    groups = ExpertGroups.over(dist.group.WORLD, columns) if world_size > 1 else None
    options = {"num_experts": 25, "heads": 2, "top_k": 3, "key_dim": 4, "dtype": torch.float64}
    first = PEER(DIM, **options, seed=1, group=groups, sparse_grad=sparse[0], dispatch_chunks=chunks, dense_hidden=3)
    second = PEER(DIM, **options, seed=2, group=groups, sparse_grad=sparse[1], dispatch_chunks=chunks, tables_of=first)
    x, dy = (part.split(12 // world_size)[rank] for part in tokens_of([12]))
    x = x.clone().requires_grad_()
    y = second(x + first(x))
    (y * dy).sum().backward()
    assert second.down.grad is first.down.grad
    return y.detach(), x.grad, *dense_grads([first.down.grad, first.up.grad])


@pytest.mark.parametrize(("world_size", "columns"), [(3, 1), (2, 2), (4, 2)])
@pytest.mark.parametrize("sparse", [(False, False), (True, True), (True, False)], ids=str)
def test_tables_of_two_layers_over_ranks(world_size, columns, sparse):
    ranks = run_ranks(shared_case, world_size, columns, 2, sparse)
    want = shared_case(0, 1, 1, 1, (False, False))
    for part, expected in enumerate(want):
        parts = [result[part] for result in ranks]
        got = torch.cat(parts) if part < 2 else whole_table(parts, columns)
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def unlike_groups(rank, world_size):
    options = {"num_experts": 25, "heads": 2, "top_k": 3, "key_dim": 4, "seed": 1}
    grid = ExpertGroups.over(dist.group.WORLD, 2)
    rows = PEER(DIM, **options, group=dist.group.WORLD)
    with pytest.raises(ValueError, match="tables_of must be a layer with the same column shards: 1 there, 2 here"):
        PEER(DIM, **options, group=grid, tables_of=rows)
    with pytest.raises(ValueError, match=r"tables_of must be a layer with the same ranks: \[0, 1\] there, None here"):
        PEER(DIM, **options, tables_of=rows)


def test_tables_over_other_ranks_are_not_shared():
    run_ranks(unlike_groups, 2)


@settings(max_examples=50, deadline=None)
@given(tokens=st.integers(0, 6), picks=st.integers(1, 12), experts=st.integers(1, 20), seed=st.integers(0, 2**20))
def test_merging_adds_gates(tokens, picks, experts, seed):
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(experts, (tokens, picks), generator=generator)
    gates = torch.rand(tokens, picks, generator=generator, dtype=torch.float64, requires_grad=True)
    merged = MergedPicks.of(indices)
    sent = merged.kept.view(-1).nonzero()[:, 0]
    sent = sent[torch.randperm(len(sent), generator=generator)]
    expert = merged.expert.view(-1)[sent]
    token = sent // picks
    gate = merged.gates(gates, sent)
    dense = torch.zeros(tokens, experts, dtype=torch.float64).scatter_add(1, indices, gates)
    rebuilt = torch.zeros_like(dense).index_put((token, expert), gate)
    torch.testing.assert_close(rebuilt, dense, rtol=1e-14, atol=1e-14)
    assert len({*zip(token.tolist(), expert.tolist())}) == token.numel()
    weight = torch.rand(tokens, experts, generator=generator, dtype=torch.float64)
    got, want = (torch.autograd.grad((each * weight).sum(), gates)[0] for each in (rebuilt, dense))
    torch.testing.assert_close(got, want)


class Arrived:
    """Rows that are there."""

    def __init__(self, rows):
        self.wait = lambda: rows


@settings(max_examples=40, deadline=None)
@given(
    shards=st.integers(1, 5),
    columns=st.integers(1, 4),
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**20),
)
def test_rows_add_up_at_home_as_one_after_the_other_would(shards, columns, counts, dtype, seed):
    """Bit for bit in the C backend: in float32 from 0 on, in the order of the row shards, and rounded at the end."""
    generator, dim, tokens = torch.Generator().manual_seed(seed), 3, sum(counts)
    begins = [sum(counts[:part]) for part in range(len(counts))]
    widths = [len(range(dim)[shard * dim // columns : (shard + 1) * dim // columns]) for shard in range(columns)]
    layout = SimpleNamespace(dim=dim, column_shards=columns, widths=widths, wire=WIRES[None])
    parts, arrivals, want = [], [], torch.zeros(tokens, dim)
    for begin, count in zip(begins, counts):
        sent = [begin + (torch.rand(count, generator=generator) < 0.6).nonzero()[:, 0] for _ in range(shards)]
        rows = [torch.randn(len(token), dim, generator=generator).to(dtype) for token in sent]
        for token, values in zip(sent, rows):
            want.index_add_(0, token, values.float())
        pieces = [piece.flatten() for values in rows for piece in values.split(widths, 1)]
        sizes, nothing = [piece.numel() for piece in pieces], slice(0, 0)
        home, send = slice(begin, begin + count), [len(token) for token in sent]
        parts.append(Part(nothing, nothing, home, torch.cat(sent), send, sizes, []))
        arrivals.append(Arrived(torch.cat(pieces)))
    plan = ExchangePlan(layout, Traffic(), parts, None, tokens, None)
    for _ in range(2):  # there and, by the same plan, back
        got = plan.add_rows_at_home(arrivals, dtype)
        assert got.dtype == dtype
        assert got.equal(want.to(dtype))


def initial_tables(rank, world_size, columns):
    layer = PEER(5, 81**2, top_k=4, seed=7, group=ExpertGroups.over(dist.group.WORLD, columns))
    return layer.layout.rows.start, layer.down.detach(), layer.up.detach(), layer.state_dict()["down"].shape


@pytest.mark.parametrize("columns", [1, 3])
def test_initial_tables_do_not_depend_on_the_sharding(columns):
    whole = PEER(5, 81**2, top_k=4, seed=7)
    parts = run_ranks(initial_tables, 3, columns)
    assert [part[0] for part in parts] == ([0, 2187, 4374] if columns == 1 else [0, 0, 0])
    for table, index in ((whole.down, 1), (whole.up, 2)):
        got = whole_table([part[index] for part in parts], columns)
        torch.testing.assert_close(got, table.detach(), rtol=0, atol=0)


def wrong_grids(rank, world_size):
    with pytest.raises(ValueError, match="3 column shards do not divide a group of 4 ranks"):
        ExpertGroups.over(dist.group.WORLD, 3)
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    with pytest.raises(ValueError, match="no grid of the ranks"):
        ExpertGroups(dist.group.WORLD, rows=pairs[rank // 2], columns=pairs[rank // 2])


def test_groups_that_are_no_grid_are_refused():
    run_ranks(wrong_grids, 4)
