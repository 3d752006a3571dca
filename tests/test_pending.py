"""Steps of tables by sums that backward passes leave, against steps by the gradients that those would have made."""

import pytest
import torch
import torch.utils.checkpoint

from peer_dist import PEER
from peer_dist.kernels.pending import pending_sums
from peer_dist.layers.product_key_memory import ProductKeyMemory
from peer_dist.optim import TableOptimizer, TableRule
from peer_dist.optim.tables import KINDS

CPU = torch.device("cpu")
LAYERS = {
    "peer": lambda: PEER(20, 81, heads=2, top_k=3, key_dim=8, sparse_grad=True, seed=0),
    "pkm": lambda: ProductKeyMemory(20, 81, heads=2, top_k=3, key_dim=8, sparse_grad=True, seed=0),
}


class Run:
    """A layer and the optimizer of its tables."""

    def __init__(self, make, kind, dtype, one_pass, seed=None):
        torch.manual_seed(0)
        self.layer = make()
        tables = self.layer.tables()
        for table in tables.values():
            table.data = table.data.to(dtype)
        rule = TableRule(kind, 0.02, (0.8, 0.9), 1e-4, 0.1, lazy=True, rounding_seed=seed)
        self.optimizer = TableOptimizer(tables, rule, 20, one_pass=one_pass)

    def backward(self, seed, tokens=5, bad=False):
        x = torch.randn(tokens, 20, generator=torch.Generator().manual_seed(seed))
        (self.layer(x).square().mean() * (float("nan") if bad else 1)).backward()

    def state(self):
        parts = [*self.layer.tables().values(), *(value for *_, value in self.optimizer.state())]
        return [part.detach().clone() for part in parts]

    def norm(self):
        return self.optimizer.grad_norm(CPU)


def equal(first, second):
    return all(map(torch.equal, first.state(), second.state()))


def pair(layer, kind="rowwise_adam", dtype=torch.float32, seed=None):
    return [Run(LAYERS[layer], kind, dtype, one_pass, seed) for one_pass in (False, True)]


@pytest.fixture(autouse=True)
def alone():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "seed"), [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, 3)], ids=str
)
def test_a_step_is_that_of_the_gradients(layer, kind, dtype, seed):
    given, summed = pair(layer, kind, dtype, seed)
    start = given.state()
    for step, tokens in enumerate((5, 0, 300, 5)):
        for run in (given, summed):
            run.backward(step, tokens)
        assert all(table.grad is None for table in summed.optimizer.tables.values())
        assert given.norm() == summed.norm()
        for run in (given, summed):
            run.optimizer.step(0.5)
        assert equal(given, summed)
    assert not given.state()[0].equal(start[0])


def test_two_passes_add_up():
    """As those of two layers with one pool of experts do, and those where autograd knew of no sums."""
    given, summed = pair("peer")
    for run in (given, summed):
        run.backward(0)
        run.backward(1)
    assert given.norm() == summed.norm()
    for run in (given, summed):
        run.optimizer.step(1.0)
    assert equal(given, summed)


def test_recomputed_layers_step_alike():
    given, summed = pair("peer")
    x = torch.randn(7, 20)
    for run in (given, summed):
        for reentrant in (False, True):
            layer = run.layer
            y = torch.utils.checkpoint.checkpoint(layer, x.clone().requires_grad_(), use_reentrant=reentrant)
            y.square().mean().backward()
            run.norm()
            run.optimizer.step(1.0)
    assert equal(given, summed)


def test_what_is_dropped_leaves_nothing():
    given, summed = pair("peer", "adam")
    start = summed.state()
    summed.backward(0, bad=True)
    assert not summed.norm().isfinite()
    assert [name for name, grad in summed.optimizer.gradients() if not grad.values().isfinite().all()] == ["down", "up"]
    summed.optimizer.zero_grad()
    summed.backward(0)
    summed.optimizer.zero_grad()
    assert all(pending_sums(table) == [] and table.grad is None for table in summed.optimizer.tables.values())
    assert all(map(torch.equal, start, summed.state()))
    for run in (given, summed):
        run.backward(1)
        run.norm()
        run.optimizer.step(1.0)
    assert equal(given, summed)


def test_operands_are_the_gradients_memory():
    given, summed = pair("peer")
    for run in (given, summed):
        run.backward(0, tokens=64)
    operands = 2 * 64 * 20 * 4 + 64 * 6 * (4 + 4 + 8) + 65 * 8  # x and dy, dpre and hidden and expert, offsets
    assert summed.optimizer.memory().gradients == operands
    assert given.optimizer.memory().gradients > 0


def test_operands_that_were_written_to_are_refused():
    _, summed = pair("peer")
    x = torch.randn(5, 20)
    summed.layer(x).sum().backward()
    x.zero_()
    with pytest.raises(RuntimeError, match="was written to after the backward pass"):
        summed.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [40, 3, 200])
def test_a_dense_gradient_grows_in_place(dim, dtype):
    """Three passes: it stays where it is, with float32's very bits, and with one rounding less a pass in bfloat16."""
    made = []
    for grows in (False, True):
        torch.manual_seed(0)
        layer = PEER(dim, 64, heads=2, top_k=4, key_dim=8, query_norm="rms", dtype=dtype)
        tables = {name: table.requires_grad_() for name, table in layer.tables().items()}
        if grows:
            TableOptimizer(tables, TableRule("adam", 0.1, (0.9, 0.9), 1e-8, 0.0), dim)
        places = []
        for seed in range(3):
            x = torch.randn(9, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)
            before = {name: table.grad.clone() for name, table in tables.items() if seed}
            layer(x).square().sum().backward()
            places.append([table.grad.data_ptr() for table in tables.values()])
            if grows and seed:
                assert all(not before[name].equal(table.grad) for name, table in tables.items())
        assert not grows or places[0] == places[1] == places[2]
        made.append([table.grad for table in tables.values()])
    for got, want in zip(made[1], made[0]):
        assert not (got.equal(want) and dtype == torch.bfloat16)  # else it did not grow in place
        torch.testing.assert_close(
            got, want, rtol=0, atol=0 if dtype == torch.float32 else float(want.abs().max()) * 2**-6
        )


@pytest.mark.parametrize("lazy", [False, True])
def test_whoever_asks_for_a_gradient_gets_it(lazy):
    """autograd.grad, backward of other inputs, and hooks: with a gradient there already that could grow."""
    torch.manual_seed(0)
    layer = PEER(20, 81, heads=2, top_k=3, key_dim=8, query_norm="rms", sparse_grad=lazy, seed=0)
    x = torch.randn(5, 20)
    loss = lambda: layer(x).square().mean()  # noqa: E731
    want = torch.autograd.grad(loss(), [layer.down, layer.up])
    TableOptimizer(layer.tables(), TableRule("adam", 0.1, (0.9, 0.9), 1e-8, 0.0, lazy=lazy), 20, one_pass=True)
    if not lazy:
        loss().backward()
    before = None if lazy else layer.down.grad.clone()
    for got, gradient in zip(torch.autograd.grad(loss(), [layer.down, layer.up]), want):
        torch.testing.assert_close(got.to_dense(), gradient.to_dense())
    loss().backward(inputs=[layer.query.weight])
    assert (layer.down.grad is None) if lazy else layer.down.grad.equal(before)
    assert not pending_sums(layer.down)
    seen = []
    with_hooks = [table.register_hook(seen.append) for table in (layer.down, layer.up)]
    loss().backward()
    assert [gradient.is_sparse for gradient in seen] == [lazy, lazy]
    for hook in with_hooks:
        hook.remove()
    loss().backward()
    assert len(pending_sums(layer.down) or ()) == int(lazy)
