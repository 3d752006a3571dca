"""The tables' optimizers against a few plain lines: whole, on column shards, lazily, and rounded at random."""

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from peer_dist.kernels import updates
from peer_dist.kernels.rounding import random_bits, round_stochastically, stream_key
from peer_dist.optim import TableOptimizer, TableRule
from peer_dist.optim.sparse import merge, sum_over_copies
from peer_dist.optim.tables import KINDS
from tests.ranks import run_ranks

LR, BETAS, EPS, DECAY, STEPS = 0.02, (0.8, 0.9), 1e-4, 0.1, 6


def problem():
    """A table ``[7, 10]`` and its gradients, one row of which is always zero."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(7, 10, generator=generator)
    grads = [torch.randn(7, 10, generator=generator) for _ in range(STEPS)]
    for grad in grads:
        grad[3] = 0
    return table, grads


TOUCHED = [[0, 2, 6], [], [2, 4], [0, 1, 2, 4, 5, 6], [6], [0, 2]]
"""Rows that a step's sparse gradients are of; row 3 is in none."""


def pieces(rows, values, size=7):
    """A step's gradient as two micro-batches give it: the first has every row, the second half of some again."""
    rows, again = torch.tensor(rows, dtype=torch.int64), torch.tensor(rows[::-2], dtype=torch.int64)
    first, second = values[rows].clone(), values[again] / 2
    first[torch.isin(rows, again)] /= 2
    for which, part in ((rows, first), (again, second)):
        yield torch.sparse_coo_tensor(which[None], part, (size, values.shape[1]), check_invariants=True)


def accumulated(rows, values):
    first, second = pieces(rows, values)
    return first + second


class Pieces(torch.autograd.Function):
    """Gives its parameter a gradient, which autograd then accumulates."""

    @staticmethod
    def forward(ctx, table, grad):
        ctx.grad = grad
        return table.new_zeros(())

    @staticmethod
    def backward(ctx, _):
        return ctx.grad, None


def plain(kind, lazy=False, decay=DECAY):
    table, grads = problem()
    table = table.double()
    first, second = torch.zeros_like(table), torch.zeros_like(table) if kind == "adam" else table.new_zeros(7, 1)
    for step, (grad, touched) in enumerate(zip((grad.double() for grad in grads), TOUCHED), 1):
        rows = touched if lazy else list(range(7))
        grad = grad[rows]
        square = grad**2 if kind == "adam" else (grad**2).mean(1, keepdim=True)
        table[rows] *= 1 - LR * decay
        if kind == "rowwise_adagrad":
            second[rows] += square
            table[rows] -= LR * grad / (second[rows].sqrt() + EPS)
            continue
        first[rows] = BETAS[0] * first[rows] + (1 - BETAS[0]) * grad
        second[rows] = BETAS[1] * second[rows] + (1 - BETAS[1]) * square
        unbiased = (1 - BETAS[1] ** step) ** 0.5
        eps = EPS / unbiased if lazy and kind == "adam" else EPS  # as torch.optim.SparseAdam has it
        table[rows] -= LR * first[rows] / (1 - BETAS[0] ** step) / (second[rows].sqrt() / unbiased + eps)
    return table


def train(kind, columns=slice(None), group=None, scale=1.0, dtype=torch.float32, lazy=False, **options):
    table, grads = problem()
    table = table[:, columns].contiguous().to(dtype).requires_grad_()
    seed, decay = options.pop("rounding_seed", None), options.pop("weight_decay", DECAY)
    rule = TableRule(kind, 1.0, BETAS, EPS, decay, lazy, seed)
    optimizer = TableOptimizer({"t": table}, rule, 10, columns=group, **options)
    optimizer.set_lr(LR)
    for grad, touched in zip(grads, TOUCHED):
        grad = grad[:, columns].to(dtype) / scale
        if not lazy:
            table.grad = grad
        for part in pieces(touched, grad) if lazy and touched else ():
            Pieces.apply(table, part).backward()
        optimizer.step(scale)
        assert table.grad is None
    assert optimizer.steps == STEPS
    return table.detach(), {part: value.clone() for _, part, value in optimizer.state()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("block", [None, 1, 20, 1 << 18])
def test_equal_to_plain_lines(kind, lazy, block, monkeypatch):
    """In C, and in plain PyTorch in blocks. Lazily: gradients from several micro-batches, a step that touches nothing
    and a row that no step touches.
    """
    if block is not None:
        monkeypatch.setattr(updates, "BLOCK", block)
        monkeypatch.setattr(updates.native, "load_library", lambda: None)
    for scale in (1.0, 0.25):
        table, state = train(kind, scale=scale, lazy=lazy)
        torch.testing.assert_close(table.double(), plain(kind, lazy), rtol=1e-5, atol=1e-6)
    assert set(state) == {
        "adam": {"exp_avg", "exp_avg_sq"}, "rowwise_adam": {"exp_avg", "row_sq"}, "rowwise_adagrad": {"row_sq"}
    }[kind]  # fmt: skip
    assert kind == "adam" or state["row_sq"].shape == (7,)
    if lazy:
        assert table[3].equal(problem()[0][3])
        assert all(value[3].count_nonzero() == 0 for value in state.values())


def test_lazy_adam_is_sparse_adam():
    table, grads = problem()
    table = table.requires_grad_()
    optimizer = torch.optim.SparseAdam([table], lr=LR, betas=BETAS, eps=EPS)
    for grad, touched in zip(grads, TOUCHED):
        table.grad = accumulated(touched, grad)
        optimizer.step()
    got, state = train("adam", lazy=True, weight_decay=0.0)
    torch.testing.assert_close(got, table.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(state["exp_avg_sq"], optimizer.state[table]["exp_avg_sq"])


def test_many_tables_step_as_each_alone():
    table, grads = problem()
    tables = {str(n): (table + n).to(torch.bfloat16 if n else torch.float32).requires_grad_() for n in range(3)}
    rule = TableRule("adam", LR, BETAS, EPS, DECAY)
    optimizer = TableOptimizer(tables, rule, 10)
    apart = {name: TableOptimizer({name: t.detach().clone().requires_grad_()}, rule, 10) for name, t in tables.items()}
    for grad in grads:
        for each in (optimizer, *apart.values()):
            for t in each.tables.values():
                t.grad = grad.to(t.dtype, copy=True)
            each.step(0.5)
    for name, t in tables.items():
        assert t.grad is None
        assert t.equal(apart[name].tables[name])
    assert optimizer.steps == len(grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adam_is_torchs(dtype):
    """Its fused AdamW on the master, which rounds otherwise here and there."""
    table, grads = problem()
    table = table.to(dtype)
    master = table.float().requires_grad_()
    adamw = torch.optim.AdamW([master], LR, BETAS, EPS, DECAY, fused=True)
    for grad in grads:
        master.grad = grad.to(dtype).float()
        adamw.step()
    got, state = train("adam", dtype=dtype)
    torch.testing.assert_close(state.get("master", got), master.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("lazy", [False, True])
def test_gradients_are_averaged_in_the_step(lazy):
    """A half is exact: the same bits as of gradients that were halved before; the norm is of the averages."""
    found = []
    for size in (1, 2):
        table = problem()[0].requires_grad_()
        optimizer = TableOptimizer({"t": table}, TableRule("rowwise_adam", LR, BETAS, EPS, DECAY, lazy), 10,
                                   data_parallel_size=size)  # fmt: skip
        for grad, touched in zip(problem()[1], TOUCHED):
            table.grad = accumulated(touched, grad * size) if lazy else grad * size
            optimizer.step(0.5)
        found.append((table.detach(), [value for _, _, value in optimizer.state()]))
    assert found[0][0].equal(found[1][0])
    for one, other in zip(found[0][1], found[1][1]):
        assert one.equal(other)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation gave, those of given memory apart."""

    def __init__(self, *apart):
        super().__init__()
        self.apart, self.elements = {tensor.data_ptr() for tensor in apart}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not result.is_sparse and result.data_ptr() not in self.apart:
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "seed"), [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, 1)])
@pytest.mark.parametrize("plain", [False, True])
def test_a_lazy_step_makes_nothing_larger_than_the_touched_rows(kind, dtype, seed, plain, monkeypatch):
    if plain:
        monkeypatch.setattr(updates.native, "load_library", lambda: None)
    table = torch.ones(1000, 8, dtype=dtype).requires_grad_()
    optimizer = TableOptimizer({"t": table}, TableRule(kind, LR, BETAS, EPS, DECAY, True, seed), 8)
    table.grad = next(pieces(range(5), torch.ones(5, 8, dtype=dtype), 1000))
    with Largest(table, *(value for *_, value in optimizer.state())) as largest:
        optimizer.step(0.5)
    assert largest.elements <= 5 * 16


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lazy", [False, True])
def test_a_bfloat16_table_is_the_rounding_of_its_master(kind, lazy):
    table, state = train(kind, dtype=torch.bfloat16, lazy=lazy)
    assert table.dtype == torch.bfloat16
    assert table.equal(state["master"].bfloat16())
    assert (state["master"] - plain(kind, lazy).float()).abs().max() < 0.02


def on_columns(rank, world_size, kind, lazy):
    columns = slice(10 * rank // world_size, 10 * (rank + 1) // world_size)
    return train(kind, columns, dist.group.WORLD, lazy=lazy)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lazy", [False, True])
def test_column_shards_step_like_the_whole(kind, lazy):
    """Three of uneven width; a row's number is that of the whole row, the same on all of them."""
    want, whole = train(kind, lazy=lazy)
    parts = run_ranks(on_columns, 3, kind, lazy)
    torch.testing.assert_close(torch.cat([table for table, _ in parts], 1), want, rtol=1e-6, atol=1e-6)
    for _, state in parts:
        if kind != "adam":
            torch.testing.assert_close(state["row_sq"], whole["row_sq"], rtol=1e-6, atol=1e-7)
            assert state["row_sq"].equal(parts[0][1]["row_sq"])


def norms(rank, world_size, lazy):
    """Of no gradient, of one that is not finite, and what is left of either."""
    table = torch.ones(5, 3).requires_grad_()
    optimizer = TableOptimizer({"t": table}, TableRule("adam", LR, BETAS, EPS, DECAY, lazy), 3, copies=dist.group.WORLD)
    found = [float(optimizer.grad_norm(table.device))]
    optimizer.zero_grad()
    for bad in (float("nan"), float("inf")):
        if rank == 0:
            grad = torch.zeros(5, 3)
            grad[1] = torch.tensor([1.0, bad, 2.0])
            table.grad = next(pieces([1], grad, 5)) if lazy else grad
        found.append(float(optimizer.grad_norm(table.device)))
        optimizer.zero_grad()
        assert table.grad is None
    optimizer.grad_norm(table.device)
    optimizer.step(1.0)
    assert optimizer.steps == 1
    return found, table.detach()


@pytest.mark.parametrize("lazy", [False, True])
def test_gradients_that_are_missing_or_not_finite(lazy):
    for (none, *bad), table in run_ranks(norms, 2, lazy):
        assert none == 0
        assert not any(torch.tensor(bad).isfinite())
        torch.testing.assert_close(table, torch.full((5, 3), 1.0 if lazy else 1 - LR * DECAY))


ROWS = {
    "disjoint": ([0, 1], [8, 9], [4]),
    "overlapping": ([0, 3, 9], [3, 9], [0, 3, 5]),
    "one empty": ([2, 6], [], [6]),
    "all empty": ([], [], []),
    "all": (range(11),) * 3,
}


def reduced(rank, world_size, dtype):
    """The sum of each case's gradients as this rank has it, and what it gave."""
    results = {}
    for case, touched in ROWS.items():
        generator = torch.Generator().manual_seed(rank)
        rows = torch.tensor(list(touched[rank]), dtype=torch.int64)
        values = torch.randn(len(rows), 5, generator=generator).to(dtype)
        grad = merge(torch.sparse_coo_tensor(rows[None], values, (11, 5), check_invariants=True))
        got = sum_over_copies(grad, dist.group.WORLD)
        assert got.is_coalesced()
        table = torch.zeros(11, 5, dtype=dtype, requires_grad=True)
        optimizer = TableOptimizer(
            {"t": table},
            TableRule("adam", LR, BETAS, EPS, 0.0, lazy=True),
            5,
            copies=dist.group.WORLD,
            data_parallel_size=world_size,
        )
        table.grad = grad
        norm = optimizer.grad_norm(table.device)
        results[case] = rows, values, got.indices()[0], got.values(), norm, table.grad.to_dense()
    return results


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_add_their_sparse_gradients(world_size, dtype):
    """Whatever rows each touched: the dense sum, the same bits everywhere; its mean's norm."""
    ranks = run_ranks(reduced, world_size, dtype)
    for case in ROWS:
        want = torch.zeros(11, 5)
        for each in ranks:
            rows, values, *_ = each[case]
            want.index_add_(0, rows, values.float())
        union = sorted({row for each in ranks for row in each[case][0].tolist()})
        for each in ranks:
            *_, rows, values, norm, total = each[case]
            assert rows.tolist() == union, case
            assert values.equal(want[rows].to(dtype)), "added in the order of the ranks, in float32, and rounded once"
            torch.testing.assert_close(total.float(), want, rtol=1e-2, atol=1e-2)
            torch.testing.assert_close(norm, total.float().norm() / world_size, rtol=1e-5, atol=0)
            assert norm.equal(ranks[0][case][4])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("rounding_seed", [None, 3])
def test_state_goes_on_as_if_nothing_had_happened(kind, lazy, rounding_seed):
    """Weights, state and the number of steps are all that there is to save."""

    def make(table):
        table = table.bfloat16().requires_grad_()
        return table, TableOptimizer({"t": table}, TableRule(kind, LR, BETAS, EPS, DECAY, lazy, rounding_seed), 10)

    def advance(table, optimizer, steps):
        for step in steps:
            grad = problem()[1][step].bfloat16()
            table.grad = accumulated(TOUCHED[step], grad) if lazy else grad
            optimizer.step(1.0)

    table, optimizer = make(problem()[0])
    advance(table, optimizer, range(3))
    resumed, other = make(table.detach().clone())
    saved = {(name, part): value.clone() for name, part, value in optimizer.state()}
    assert (("t", "master") in saved) == (rounding_seed is None)
    for name, part, value in other.state():
        value.copy_(saved[name, part])
    other.steps = optimizer.steps
    for each in ((table, optimizer), (resumed, other)):
        advance(*each, range(3, STEPS))
    assert resumed.equal(table)
    assert other.steps == STEPS
    for (*_, got), (*_, want) in zip(other.state(), optimizer.state()):
        assert got.equal(want)


def draws(value, count, seed=0):
    """``value`` rounded in ``count`` steps, ``[count]``."""
    rows, columns = torch.arange(10), range(count // 1000)
    bits = torch.cat([random_bits(stream_key(seed, "t", step), rows, columns).flatten() for step in range(100)])
    return round_stochastically(torch.full((count,), value), bits)


@pytest.mark.parametrize("share", [0.001, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("low", [1.0, -3.0, 2.0**-130])
def test_stochastic_rounding_is_unbiased(low, share):
    """Only the neighbours, and the further one as often as the value is near it."""
    low = torch.tensor(low, dtype=torch.bfloat16)
    high = (low.view(torch.int16) + 1).view(torch.bfloat16)
    value = float(low) + share * (float(high) - float(low))
    got = draws(value, 100_000)
    assert set(got.tolist()) == {float(low), float(high)}
    at_high = float((got == high).double().mean())
    assert at_high == pytest.approx(share, abs=5 * (share * (1 - share) / 100_000) ** 0.5 + 2**-16)


def test_what_bfloat16_has_stays():
    everything = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    kept = round_stochastically(everything.float()[None], torch.full((1, 1 << 16), 0xFFFF, dtype=torch.int32))[0]
    nan = everything.isnan()
    assert kept[~nan].view(torch.int16).equal(everything[~nan].view(torch.int16)), "the sign of zero too"
    assert kept[nan].isnan().all()
    odd = torch.tensor([[0x7F800001, 0x7FFFFFFF, -1]], dtype=torch.int32).view(torch.float32)
    assert round_stochastically(odd, torch.full((1, 3), 0xFFFF, dtype=torch.int32)).isnan().all()


def test_random_bits_are_the_places_own():
    """Equal in any part of the table, uniform, and others with another seed, table or step."""
    rows, columns, key = torch.arange(1000), range(64), stream_key(5, "layer1.up", 2)
    whole = random_bits(key, rows, columns)
    assert whole.min() >= 0
    assert whole.max() < 1 << 16
    for part_rows, part_columns in [(rows[17:], range(3, 64)), (rows[[5, 800]], range(6, 7)), (rows[:9], range(8, 21))]:
        part = random_bits(key, part_rows, part_columns)
        assert part.equal(whole[part_rows][:, part_columns.start : part_columns.stop])
    ones = torch.stack([(whole >> bit & 1).double().mean() for bit in range(16)])
    torch.testing.assert_close(ones, torch.full((16,), 0.5, dtype=torch.float64), rtol=0, atol=0.01)
    spread = torch.histc(whole.double(), 64, 0, 1 << 16)
    assert float(((spread - 1000) ** 2 / 1000).sum()) < 130, "chi-square of 63 degrees of freedom"
    for a, b in [(whole[1:], whole[:-1]), (whole[:, 1:], whole[:, :-1])]:
        assert abs(float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1])) < 0.02
    for other in (stream_key(6, "layer1.up", 2), stream_key(5, "layer1.down", 2), stream_key(5, "layer1.up", 3)):
        assert float((random_bits(other, rows, columns) == whole).double().mean()) < 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lazy", [False, True])
def test_a_stochastically_rounded_table(kind, lazy):
    """No master; near the exact one; shards with their offsets round as the whole does."""
    table, state = train(kind, dtype=torch.bfloat16, lazy=lazy, rounding_seed=1)
    assert "master" not in state
    assert all(value.dtype == torch.float32 for value in state.values())
    assert (table.double() - plain(kind, lazy)).abs().max() < 0.06
    again, _ = train(kind, dtype=torch.bfloat16, lazy=lazy, rounding_seed=2)
    assert not again.equal(table)
    if lazy:
        assert table[3].equal(problem()[0][3].bfloat16())
    if kind == "adam":  # a row's mean would need the ranks of all columns
        for columns in (slice(0, 5), slice(5, 10)):
            offsets = {"t": (0, columns.start)}
            part, _ = train(kind, columns, dtype=torch.bfloat16, lazy=lazy, rounding_seed=1, offsets=offsets)
            assert part.equal(table[:, columns])


@pytest.mark.parametrize("lazy", [False, True])
def test_row_shards_round_as_the_whole(lazy):
    generator = torch.Generator().manual_seed(1)
    whole, grad = torch.randn(2, 64, 10, generator=generator).bfloat16()
    rows = torch.arange(0, 64, 3)

    def stepped(part):
        table = whole[part.start : part.stop].clone().requires_grad_()
        offsets = {"t": (part.start, 0)}
        rule = TableRule("rowwise_adam", LR, BETAS, EPS, DECAY, lazy, 7)
        optimizer = TableOptimizer({"t": table}, rule, 10, offsets=offsets)
        mine = rows[(rows >= part.start) & (rows < part.stop)] - part.start
        full = grad[part.start : part.stop].clone()
        table.grad = next(pieces(mine.tolist(), full, len(part))) if lazy else full
        optimizer.step(1.0)
        return table.detach()

    want = stepped(range(64))
    assert torch.cat([stepped(range(21)), stepped(range(21, 64))]).equal(want)
