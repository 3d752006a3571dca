"""Tables whose rows lie in other memory, against ordinary ones: bit for bit, whatever is kept near."""

import copy
import gc
import math
import os
import pickle
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.utils.checkpoint

from peer_dist.kernels import Picks, disk, expert_mix, value_mix
from peer_dist.kernels.eight_bit import let_scales, quantised
from peer_dist.kernels.far import FarRows, Hot, Place, far_rows_of, near
from peer_dist.kernels.far.background import Job
from peer_dist.kernels.far.ranges import Ranges
from peer_dist.optim import TableOptimizer, TableRule
from tests.ranks import run_ranks

CPU = torch.device("cpu")
ROWS, DIM = 90, 12
RULES = {
    "adam": ("adam", torch.float32, None),
    "rowwise_adam": ("rowwise_adam", torch.float32, None),
    "rowwise_adagrad": ("rowwise_adagrad", torch.float32, None),
    "masters": ("rowwise_adam", torch.bfloat16, None),
    "stochastic": ("rowwise_adagrad", torch.bfloat16, 3),
    "int8": ("rowwise_adam", torch.int8, 3),
    "float8": ("adam", torch.uint8, 3),
}
MEMORIES = ("host", "disk")


def width(rule, tables=2, dim=DIM):
    """Bytes of a row with its states."""
    kind, dtype, seed = RULES[rule]
    states = {"adam": 8 * dim, "rowwise_adam": 4 * dim + 4, "rowwise_adagrad": 4}[kind]
    scale, master = 4 * (dtype.itemsize == 1), 4 * dim * (dtype == torch.bfloat16 and seed is None)
    return tables * (dtype.itemsize * dim + scale + states + master)


class Run:
    """Two tables that expert_mix reads, or one that value_mix does, and their optimizer."""

    def __init__(
        self, rule="rowwise_adam", memory=None, cached=0, folder=None, tables=2, rows=ROWS, one_pass=True, **groups
    ):
        kind, dtype, seed = RULES[rule]
        place = None if memory is None else Place(memory, CPU, cached * width(rule, tables), folder)
        generator = torch.Generator().manual_seed(7)
        self.tables, scales = [], []
        for _ in range(tables):
            values = torch.randn(rows, DIM, generator=generator, dtype=torch.float32, device="cpu")
            scale = None
            if dtype.itemsize == 1:
                values, scale = quantised(values, dtype)
            values = values.to(dtype)
            if place is not None:
                values, drawn = place.zeros(values.shape, dtype), values
                values.copy_(drawn)
                if scale is not None:
                    scale, drawn = place.zeros(scale.shape, torch.float32), scale
                    scale.copy_(drawn)
            table = torch.nn.Parameter(values, requires_grad=values.is_floating_point())
            if scale is not None:
                let_scales(table, scale)
                scales.append(scale)
            self.tables.append(table)
        self.scales = scales
        self.pool = None if place is None else FarRows(place, self.tables)
        named = {f"t{number}": table for number, table in enumerate(self.tables)}
        rule = TableRule(kind, 0.02, (0.8, 0.9), 1e-4, 0.1, lazy=True, rounding_seed=seed)
        self.optimizer = TableOptimizer(named, rule, DIM, one_pass=one_pass, **groups)

    def forward(self, seed, tokens=6, skew=3.0, each=4):
        generator = torch.Generator().manual_seed(seed)
        rows = len(self.tables[0])
        picked = torch.rand(tokens, each, generator=generator, dtype=torch.float64, device="cpu")
        picks = Picks.even((picked**skew * rows).long())
        gate = torch.rand(tokens * each, generator=generator, dtype=torch.float32, device="cpu").requires_grad_()
        self.x = torch.randn(tokens, DIM, generator=generator, dtype=torch.float32, device="cpu").requires_grad_()
        if len(self.tables) == 1:
            return value_mix(gate, self.tables[0], picks, sparse_grad=True) * self.x
        return expert_mix(self.x, picks, gate, *self.tables, "gelu", sparse_grad=True)

    def step(self, seed, passes=1, clip=0.7, **how):
        """A step's losses, gradients of the input, and norm."""
        seen = []
        for number in range(passes):
            loss = self.forward(seed * 10 + number, **how).square().sum()
            loss.backward()
            seen += [loss.detach(), self.x.grad]
        seen.append(self.optimizer.grad_norm(CPU))
        self.optimizer.step(clip)
        return seen

    def state(self):
        states = [value for *_, value in self.optimizer.state()]
        return [part.detach().clone() for part in (*self.tables, *self.scales, *states)]


def same(first, second):
    assert len(first) == len(second)
    assert all(torch.equal(one, two) for one, two in zip(first, second))


def pair(folder, rule="rowwise_adam", memory="host", cached=20, **how):
    return Run(rule, **how), Run(rule, memory, cached, folder, **how)


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("cached", [0, 7, 40, 2 * ROWS])
@pytest.mark.parametrize("rule", RULES)
def test_steps_are_those_of_ordinary_tables(memory, cached, rule, tmp_path):
    ordinary, far = pair(tmp_path, rule, memory, cached)
    for step, (tokens, skew) in enumerate([(6, 1.0), (0, 1.0), (50, 1.0), (3, 4.0), (6, 4.0), (6, 4.0), (9, 1.0)]):
        same(*(run.step(step, tokens=tokens, skew=skew) for run in (ordinary, far)))
    same(ordinary.state(), far.state())
    assert bool(far.pool._hot.used) == bool(cached)
    assert far.pool._hot.used == cached or cached in (40, 2 * ROWS)
    for step in range(10, 13):  # from where the flush has left it
        same(*(run.step(step) for run in (ordinary, far)))
    same(ordinary.state(), far.state())
    assert not ordinary.state()[0].equal(Run(rule).state()[0])


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("rule", ["adam", "stochastic", "int8"])
def test_micro_batches_and_one_table(memory, rule, tmp_path):
    for tables in (1, 2):
        ordinary, far = pair(tmp_path, rule, memory, 9, tables=tables, one_pass=False)
        for step in range(5):
            same(*(run.step(step, passes=3) for run in (ordinary, far)))
        same(ordinary.state(), far.state())


def test_random_sizes(tmp_path):
    chance = torch.Generator().manual_seed(0)

    def draw(most):
        return int(torch.randint(most, (), generator=chance, dtype=torch.int64, device="cpu"))

    for number in range(25):
        rows, rule = 1 + draw(200), list(RULES)[draw(len(RULES))]
        ordinary, far = pair(
            tmp_path, rule, MEMORIES[draw(2)], draw(rows + 20), rows=rows, tables=1 + draw(2), one_pass=bool(draw(2))
        )
        for step in range(4):
            how = {"passes": 1 + draw(3), "tokens": draw(60), "each": draw(9), "skew": 0.5 + draw(5)}
            same(*(run.step(number * 100 + step, **how) for run in (ordinary, far)))
        same(ordinary.state(), far.state())


def on_ranks(rank, world_size, group, folder):
    """Whether far tables step like ordinary ones that have copies, or other columns, on other ranks."""
    for rule in RULES:
        for memory in MEMORIES:
            groups = {group: torch.distributed.group.WORLD, "data_parallel_size": 2}
            ordinary, far = pair(folder, rule, memory, 30, **groups)
            for step in range(4):
                seed = step if group == "columns" else 10 * step + rank
                tokens = 5 if group == "columns" else 5 * rank
                same(*(run.step(seed, tokens=tokens) for run in (ordinary, far)))
            same(ordinary.state(), far.state())
            assert far.pool._hot.used == 30
            assert bool(far.pool.ahead_bytes) == (group == "columns")


@pytest.mark.parametrize("group", ["columns", "copies"])
def test_copies_and_columns_on_other_ranks(group, tmp_path):
    run_ranks(on_ranks, 2, group, tmp_path)


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("cached", [0, 30])
def test_passes_that_are_under_way_together(memory, cached, tmp_path):
    """As a pipeline has them, of several sizes, and with others that no backward pass follows in between."""
    ordinary, far = pair(tmp_path, "adam", memory, cached, one_pass=False)
    for step in range(5):
        grads = []
        for run in (ordinary, far):
            passes = []
            for number in range(3):
                passes.append((run.forward(10 * step + number, tokens=3 + 20 * number), run.x))
                with torch.no_grad():
                    run.forward(1000 + step, tokens=40)
            for y, _ in passes[::-1]:
                y.square().sum().backward()
            with torch.inference_mode():
                y = run.forward(2000 + step, tokens=30)
            norm = run.optimizer.grad_norm(CPU)
            with torch.no_grad():
                run.forward(3000 + step, skew=1.0)
            run.optimizer.step(1.0)
            grads.append([x.grad for _, x in passes] + [y.clone(), norm])
        same(*grads)
    same(ordinary.state(), far.state())


def test_staged_rows_go_with_the_picks(tmp_path):
    run = Run("adam", "host", 0)
    for step in range(30):
        run.step(step, tokens=6)
        with torch.no_grad():
            run.forward(100 + step)
        with torch.inference_mode():
            run.forward(200 + step)
    gc.collect()
    assert run.pool._buffer.ranges.taken == 0
    assert run.pool._buffer.staged <= 2 * 6 * 4  # not more than what was ever needed at once, and some room


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_passes(reentrant, tmp_path):
    ordinary, far = pair(tmp_path)
    for step in range(4):
        seen = []
        for run in (ordinary, far):
            before = torch.zeros((), dtype=torch.float32, device="cpu", requires_grad=True)
            again = lambda anchor, run=run, step=step: run.forward(step) + anchor  # noqa: E731
            y = torch.utils.checkpoint.checkpoint(again, before, use_reentrant=reentrant)
            y.square().sum().backward()
            seen.append([y.detach(), run.optimizer.grad_norm(CPU)])
            run.optimizer.step(1.0)
        same(*seen)
    same(ordinary.state(), far.state())
    traffic = far.pool.traffic()
    assert traffic.hits + traffic.misses > 0
    assert traffic.hits % 2 == traffic.misses % 2 == 0  # both forward passes count


def test_other_default_dtypes(tmp_path):
    ordinary = Run("masters")
    seen = [ordinary.step(step) for step in range(4)]
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            far = Run("masters", "disk", 9, tmp_path)
            for step in range(4):
                same(far.step(step), seen[step])
        finally:
            torch.set_default_dtype(torch.float32)
        same(ordinary.state(), far.state())


@pytest.mark.parametrize("memory", MEMORIES)
def test_who_writes_after_a_flush_is_heard(memory, tmp_path):
    ordinary, far = pair(tmp_path, "stochastic", memory, 30)
    for step in range(4):
        same(*(run.step(step) for run in (ordinary, far)))
    for run in (ordinary, far):
        for _, part, value in run.optimizer.state():
            assert part == "row_sq"
            value[::2] *= 3
        with torch.no_grad():
            run.tables[0][:50] *= -1
    for step in range(4, 8):
        same(*(run.step(step) for run in (ordinary, far)))
    same(ordinary.state(), far.state())


@pytest.mark.parametrize("memory", MEMORIES)
def test_writes_that_torch_does_not_count_are_heard_after_a_flush(memory, tmp_path):
    ordinary, far = pair(tmp_path, "adam", memory, 30)
    for step in range(4):
        same(*(run.step(step) for run in (ordinary, far)))
    for run in (ordinary, far):
        for _, _, value in run.optimizer.state():
            value.numpy()[::2] *= 3
        run.tables[1].detach().numpy()[:9] = 0
    for step in range(4, 8):
        same(*(run.step(step) for run in (ordinary, far)))
    same(ordinary.state(), far.state())


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("cached", [0, 30])
def test_writes_between_pass_and_step_are_heard(memory, cached, tmp_path):
    ordinary, far = pair(tmp_path, "adam", memory, cached)
    for step in range(4):
        for run in (ordinary, far):
            run.forward(step).square().sum().backward()
            run.optimizer.state()
            with torch.no_grad():
                run.tables[0].neg_()
            run.optimizer.grad_norm(CPU)
            run.optimizer.step(1.0)
    same(ordinary.state(), far.state())


def test_writes_before_the_first_step_are_heard(tmp_path):
    ordinary, far = pair(tmp_path)
    for run in (ordinary, far):
        run.forward(0)
        with torch.no_grad():
            run.tables[0].neg_()
    same(*(run.step(0) for run in (ordinary, far)))


@pytest.mark.parametrize("cached", [0, 30])
def test_writes_over_newer_rows_are_refused(cached, tmp_path):
    run = Run("adam", "host", cached)
    for step in range(2):
        run.step(step)
    with torch.no_grad():
        run.tables[0].zero_()
    for _ in range(2 if cached else 1):
        with pytest.raises(RuntimeError, match=r"wrote to a far table of \[90, 12\].* call FarRows.flush"):
            run.forward(5)


def test_after_a_flush_the_memory_is_the_truth(tmp_path):
    ordinary, far = pair(tmp_path, "rowwise_adagrad", "disk", 25)
    for step in range(6):
        same(*(run.step(step) for run in (ordinary, far)))
        if step > 2:
            assert not far.tables[0].equal(ordinary.tables[0])
            far.pool.flush()
            same(ordinary.tables, far.tables)


def test_copies_are_ordinary_tensors(tmp_path):
    ordinary, far = pair(tmp_path)
    for step in range(3):
        same(*(run.step(step) for run in (ordinary, far)))
    far.pool.flush()
    for copied in (copy.deepcopy(far.tables[0]), pickle.loads(pickle.dumps(far.tables[0]))):
        assert far_rows_of(copied) is None
        assert copied.equal(ordinary.tables[0])
        copied.data.zero_()
    same([far.step(3)[-1]], [ordinary.step(3)[-1]])


def test_an_error_in_the_background_is_raised_where_rows_are_needed(tmp_path):
    run = Run("adam", "disk", 5, tmp_path)
    run.step(0)
    run.forward(1).sum().backward()
    run.optimizer.grad_norm(CPU)
    moments = run.pool._far[0]
    moments["exp_avg"] = moments["exp_avg"][:, :-1]  # which no file serves
    run.optimizer.step(1.0)
    for needs in (lambda: run.forward(2), run.optimizer.state, run.pool.traffic, lambda: run.optimizer.step(1.0)):
        with pytest.raises(ValueError, match="rows of a scratch file") as error:
            needs()
        assert "_step_far" in [entry.name for entry in error.traceback]


def test_a_step_between_the_passes_is_refused(tmp_path):
    run = Run("adam", "host", 5)
    y = run.forward(0)
    run.step(1)
    with pytest.raises(RuntimeError, match="stepped between"):
        y.sum().backward()


def test_other_optimizers_train_them(tmp_path):
    seen = []
    for memory in (None, *MEMORIES):
        run = Run("adam", memory, 9, tmp_path)
        for table in run.tables:
            del table.pending_sums
        adam = torch.optim.SparseAdam(run.tables)
        losses = []
        for step in range(4):
            loss = run.forward(step).square().sum()
            losses.append(loss.detach())
            loss.backward()
            adam.step()
            adam.zero_grad()
        seen.append(losses)
    same(seen[0], seen[1])
    same(seen[0], seen[2])
    assert len(set(map(float, seen[0]))) == 4


def test_another_optimizer_goes_on(tmp_path):
    ordinary, far = pair(tmp_path, "adam", "disk", 20)
    rule = TableRule("rowwise_adagrad", 0.02, (0.8, 0.9), 1e-4, 0.1, lazy=True)
    for _ in range(2):
        for step in range(3):
            same(*(run.step(step) for run in (ordinary, far)))
        same(ordinary.state(), far.state())
        for run in (ordinary, far):
            run.optimizer = TableOptimizer(run.optimizer.tables, rule, DIM, one_pass=True)


def test_tables_that_are_not_lazy_are_refused(tmp_path):
    run = Run("adam", "host", 9)
    with pytest.raises(ValueError, match="t: a far table needs a lazy optimizer"):
        TableOptimizer({"t": run.tables[0]}, TableRule("adam", 0.1, (0.9, 0.9), 1e-8, 0.0), DIM)


def test_traffic(tmp_path):
    run, tables = Run("adam", "host", 0), 2
    row, state = tables * 4 * DIM, tables * 12 * DIM
    with torch.no_grad():
        run.forward(0)
    assert run.pool.traffic() == (0, 0, 0, 0)
    run.step(0)
    touched = run.pool.traffic()
    assert touched == (0, touched.misses, touched.misses * (row + state), touched.misses * state)
    run = Run("adam", "disk", 0, tmp_path)
    run.step(0)  # which finds the weights that the pass has staged
    assert run.pool.traffic() == touched._replace(read=touched.misses * state)
    run = Run("adam", "host", ROWS)
    run.step(0)
    filled = run.pool.traffic()  # it was stepped there before it came
    assert filled == (0, touched.misses, touched.misses * (row + 2 * state), touched.misses * state)
    run.step(0)
    assert run.pool.traffic() == (touched.misses, 0, 0, 0)
    run.pool.flush()
    assert run.pool.traffic() == (0, 0, 0, touched.misses * state)


def test_threads_share_a_pool(tmp_path):
    """Each finds its own rows, though others stage theirs and the buffer grows meanwhile."""
    plain, far = pair(tmp_path, memory="disk", cached=10)
    generator = torch.Generator().manual_seed(1)
    expert = [torch.randint(ROWS, (2 + number, 5), generator=generator) for number in range(40)]
    x = torch.randn(50, DIM, generator=generator)

    def output(run, picks):
        gate = torch.ones(picks.numel(), dtype=torch.float32, device="cpu")
        return expert_mix(x[: len(picks)], Picks.even(picks), gate, *run.tables, "gelu")

    def outputs(run, numbers):
        with torch.no_grad():
            return [output(run, expert[number]) for number in numbers]

    orders = [[(number * step) % 40 for number in range(40)] for step in (1, 3, 7, 9, 11, 13, 17, 19)]
    wanted = outputs(plain, range(40))
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(lambda order: outputs(far, order), orders))
    finally:
        sys.setswitchinterval(before)
    for order, of_thread in zip(orders, found):
        same(of_thread, [wanted[number] for number in order])


def test_a_lazy_optimizer_refuses_dense_gradients():
    for one_pass in (False, True):
        table = torch.nn.Parameter(torch.ones(4, 3))
        optimizer = TableOptimizer(
            {"t": table}, TableRule("adam", 0.1, (0.9, 0.99), 1e-8, 0.0, True), 3, one_pass=one_pass
        )

        def step(table=table, optimizer=optimizer):
            table.sum().backward()
            optimizer.grad_norm(CPU)

        with pytest.raises(ValueError, match=r"needs sparse gradients.*sparse_grad=True"):
            step()


def test_shapes_alone(tmp_path):
    run = Run("int8", "host", 9)
    picks = Picks.even(torch.zeros(3, 2, dtype=torch.int64, device="meta"))
    here = near(picks, *run.tables)
    assert [table.shape for table in here.tables] == [(ROWS, DIM)] * 2
    assert all(tensor.is_meta for tensor in (*here.tables, *here.scales))


def test_what_is_near_is_counted(tmp_path):
    run = Run("rowwise_adam", "host", 10)
    run.step(0, tokens=9)
    held = run.optimizer.memory()
    kept = sum(t.nbytes for t in run.pool.near_tensors())
    assert held.weights == kept
    assert held.optimizer == 0
    assert held.far == ROWS * width("rowwise_adam")
    assert kept >= 10 * width("rowwise_adam")


# ---------------------------------------------------------------------------------------------------------------------
# What is read for a step before it begins.


def backward(run, seed, **how):
    """The passes of a step, after which everything that is read ahead was read."""
    run.forward(seed, **how).square().sum().backward()
    ahead = run.pool and run.pool._last.ahead
    if ahead:
        ahead._job.settle()
    return ahead


@pytest.mark.parametrize("rule", RULES)
def test_states_are_read_while_the_backward_pass_goes_on(rule, tmp_path, monkeypatch):
    """Some of them or all, in blocks that the step's are in line with or not."""
    monkeypatch.setattr("peer_dist.kernels.far.rows._BLOCK", 700)
    states = width(rule) - width(rule, tables=2, dim=0)  # of what is on the disk
    states -= 2 * DIM * RULES[rule][1].itemsize
    for cached in (0, 15):
        ordinary, far = pair(tmp_path, rule, "disk", cached)
        assert far.pool.ahead_bytes == 1 << 29
        for step, most in enumerate((1 << 29, 5 * states, 1 << 29, 17 * states, 0)):
            far.pool.ahead_bytes = most
            backward(ordinary, step, tokens=12)
            ahead = backward(far, step, tokens=12)
            assert (ahead is not None) == bool(states and most)
            if ahead:
                rows, fit = len(far.pool._last.missed), most // states
                rows = rows if rows <= fit else fit // far.pool._block * far.pool._block
                assert sum(tensor.nbytes for tensor in far.pool.ahead_tensors()) == rows * states
                assert ahead.ready == rows
            same(*([run.optimizer.grad_norm(CPU)] for run in (ordinary, far)))
            if ahead:  # what was read is not read again
                for parts in far.pool._far:
                    for part, tensor in parts.items():
                        if part != "weights" and disk.is_mapped(tensor):
                            tensor.numpy()[far.pool._last.missed[: ahead.ready]] = math.nan
            for run in (ordinary, far):
                run.optimizer.step(0.7)
        same(ordinary.state(), far.state())


@pytest.mark.parametrize(
    "between", ["pass", "flush", "write", "write at once", "skip", "skip and write", "evaluation", "optimizer"]
)
def test_what_comes_between_backward_pass_and_step(between, tmp_path):
    ordinary, far = pair(tmp_path, "adam", "disk", 0 if between == "write at once" else 9)
    far.pool.sends_ahead = True
    states = {run: [value for *_, value in run.optimizer.state()] for run in (ordinary, far)}
    for step in range(5):
        for run in (ordinary, far):
            ahead = backward(run, step, tokens=9)
            assert (ahead is None) == (run is ordinary)
            if between == "write at once":  # nothing newer is near
                for value in states[run]:
                    value.mul_(0.5)
            if between == "pass":  # which nobody announced
                backward(run, 50 + step)
            elif between == "flush" and run is far:
                run.pool.flush()
            elif between == "write":
                for _, _, value in run.optimizer.state():
                    value.numpy()[::2] *= 0.5  # which torch does not hear of
            elif between.startswith("skip"):
                run.optimizer.zero_grad()
                assert run is ordinary or not list(run.pool.ahead_tensors())
                if between == "skip and write":
                    for _, _, value in run.optimizer.state():
                        value.numpy()[::2] *= 0.5
                backward(run, 70 + step)
            elif between == "evaluation":
                with torch.no_grad():
                    run.forward(80 + step, tokens=30)
            elif between == "optimizer":
                rule = TableRule("rowwise_adam", 0.02, (0.8, 0.9), 1e-4, 0.1, lazy=True)
                pending = [table.pending_sums for table in run.tables]
                run.optimizer = TableOptimizer(run.optimizer.tables, rule, DIM, one_pass=True)
                for table, sums in zip(run.tables, pending):
                    table.pending_sums = sums
        same(*([run.optimizer.grad_norm(CPU)] for run in (ordinary, far)))
        for run in (ordinary, far):
            run.optimizer.step(0.7)
    same(ordinary.state(), far.state())


def test_nothing_is_read_ahead_where_passes_add_up(tmp_path):
    for memory, one_pass in (("disk", False), ("host", True)):
        run = Run("adam", memory, 0, tmp_path, one_pass=one_pass)
        assert backward(run, 0) is None
    run = Run("adam", "disk", 0, tmp_path)
    assert backward(run, 0, tokens=0) is None


def test_what_is_read_ahead_is_counted_and_freed(tmp_path):
    run = Run("adam", "disk", 0, tmp_path)
    backward(run, 0)
    rows = len(run.pool._last.missed)
    assert run.optimizer.memory().far == ROWS * width("adam") + rows * 4 * 4 * DIM
    run.optimizer.grad_norm(CPU)
    run.optimizer.step(1.0)
    run.pool.traffic()
    assert run.optimizer.memory().far == ROWS * width("adam")


def test_an_error_while_reading_ahead_is_that_of_the_step(tmp_path):
    run = Run("adam", "disk", 0, tmp_path)
    run.step(0)
    moments = run.pool._far[0]
    whole = moments["exp_avg"]
    run.pool.traffic()
    moments["exp_avg"] = whole[:3]  # which has not all the rows
    assert backward(run, 1).ready == 0
    run.optimizer.grad_norm(CPU)
    run.optimizer.step(1.0)
    with pytest.raises(IndexError, match="rows that do not ascend"):
        run.forward(2)


def test_an_error_while_reading_ahead_that_does_not_come_again(tmp_path):
    ordinary, far = pair(tmp_path, "adam", "disk", 0)
    for step in range(3):
        far.pool.traffic()  # which waits for the step before
        moments = far.pool._far[0]
        whole, moments["exp_avg"] = moments["exp_avg"], moments["exp_avg"][:3]
        for run in (ordinary, far):
            backward(run, step)
        moments["exp_avg"] = whole
        for run in (ordinary, far):
            run.optimizer.grad_norm(CPU)
            run.optimizer.step(1.0)
    same(ordinary.state(), far.state())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing is forked off here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_does_not_wait_for_its_parents_thread(tmp_path):
    run = Run("adam", "disk", 0, tmp_path)
    backward(run, 0)
    run.optimizer.grad_norm(CPU)
    run.optimizer.step(1.0)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(20)
        code = 1
        try:
            run.forward(1)
        except RuntimeError as error:
            code = 7 if "call FarRows.flush before a fork" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    run.forward(1)


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("rule", ["rowwise_adam", "masters", "int8"])
def test_gradients_that_are_sent_before_the_step(rule, memory, tmp_path):
    """As those of GPUs are; with others in between that make them worthless."""
    for cached in (0, 20):
        ordinary, far = pair(tmp_path, rule, memory, cached)
        far.pool.sends_ahead = True
        for step in range(8):
            for run in (ordinary, far):
                backward(run, step, tokens=9)
                if step == 3:
                    run.optimizer.zero_grad()
                if step in (2, 3, 4):
                    backward(run, 50 + step)
                if step == 5:
                    for _, _, value in run.optimizer.state():
                        value.numpy()[::3] *= 2
                if step == 6:
                    with torch.no_grad():
                        run.forward(80 + step, tokens=30)
            assert len(far.pool._sent) == 2
            Job(lambda: None, CPU).wait()
            if step == 7:  # which shows that it is what is used
                rows, values = far.pool._sent[0].host
                values.fill_(0.0)
                assert len(rows)
            same(*([run.optimizer.grad_norm(CPU)] for run in (ordinary, far)))
            for run in (ordinary, far):
                run.optimizer.step(0.7)
            assert not far.pool._sent
            if step == 6:
                same(ordinary.state(), far.state())
        assert not ordinary.state()[0].equal(far.state()[0])


@pytest.mark.parametrize("memory", MEMORIES)
def test_a_thread_that_is_late_sends_what_the_step_expects(memory, tmp_path):
    """The step has given places to other rows before the thread comes to what the backward pass asked for."""
    ordinary, far = pair(tmp_path, "rowwise_adam", memory, 12)
    far.pool.sends_ahead = True
    for step in range(8):
        far.pool.traffic()  # the thread has nothing left to do
        busy = threading.Event()
        Job(lambda busy=busy: busy.wait(20), CPU)
        for run in (ordinary, far):
            run.forward(step, tokens=9).square().sum().backward()
        same(*([run.optimizer.grad_norm(CPU)] for run in (ordinary, far)))
        for run in (ordinary, far):
            run.optimizer.step(0.7)
        busy.set()
    same(ordinary.state(), far.state())


# ---------------------------------------------------------------------------------------------------------------------
# The room for staged rows.


def test_room_for_staged_rows_shrinks_once_the_cache_is_full(tmp_path):
    ordinary, far = pair(tmp_path, "rowwise_adam", "host", 40, rows=400)
    staged = []
    for step in range(70):
        how = {"tokens": 40 if step < 3 else 6, "skew": 3.0}
        same(*(run.step(step, **how) for run in (ordinary, far)))
        staged.append(far.pool._buffer.staged)
    assert staged[-1] < staged[4] / 2
    assert len(set(staged[4:])) <= 8  # it is seldom made anew; a busy thread lets go of some rows late
    same(*(run.step(99, tokens=60, skew=1.0) for run in (ordinary, far)))  # and grows again
    same(ordinary.state(), far.state())


# ---------------------------------------------------------------------------------------------------------------------
# Who has a place.


def test_places_go_to_those_that_are_touched_most():
    chance = torch.Generator().manual_seed(0)
    rows, capacity = 500, 50
    hot = Hot(rows, capacity, CPU)
    places = {}  # row to place
    chances = 1 / torch.arange(1, rows + 1, dtype=torch.float64, device="cpu")
    for step in range(300):
        touched = torch.unique(torch.multinomial(chances, 60, True, generator=chance))
        before = hot.slots(touched)
        assert [places.get(row, -1) for row in touched.tolist()] == before.tolist()
        exchange = hot.step(touched)
        came, went = exchange.coming.tolist(), exchange.going.tolist()
        assert not set(came) & places.keys()
        assert set(came) <= set(touched.tolist())
        assert len(set(exchange.slots.tolist())) == len(came)
        for row, slot, old in zip(came, exchange.slots.tolist(), went):
            if old >= 0:
                assert places.pop(old) == slot
            else:
                assert step < 10
            places[row] = slot
        assert sorted(places.values()) == list(range(hot.used))
        assert sum(old >= 0 for old in went) <= capacity // 8
    assert hot.used == capacity
    assert sum(row < capacity for row in places) > 0.7 * capacity


def test_old_touches_count_less(monkeypatch):
    monkeypatch.setattr("peer_dist.kernels.far.hot.HALF_LIFE", 2)
    hot = Hot(10, 1, CPU)
    first, second = (torch.tensor([row], dtype=torch.int64, device="cpu") for row in (3, 7))
    for _ in range(200):  # over which counts are made smaller several times
        hot.step(first)
    steps = 0
    while hot.rows.tolist() == [3]:
        hot.step(second)
        steps += 1
    assert hot.rows.tolist() == [7]
    assert hot.slots(torch.cat([first, second])).tolist() == [-1, 0]
    assert 2 <= steps <= 4


@pytest.mark.parametrize(("rows", "capacity"), [(0, 5), (7, 0), (7, 7), (7, 100), (1, 1)])
def test_no_places_and_more_than_rows(rows, capacity):
    hot = Hot(rows, capacity, CPU)
    everyone = torch.arange(rows, dtype=torch.int64, device="cpu")
    for _ in range(3):
        hot.step(everyone[:0])
        hot.step(everyone)
    assert hot.used == min(rows, capacity)
    assert sorted(hot.slots(everyone).tolist()) == (list(range(rows)) if capacity else [-1] * rows)


def test_ranges_are_apart_and_come_back():
    chance = torch.Generator().manual_seed(0)
    ranges, held = Ranges(5, 105), []
    for _ in range(400):
        count, leave = torch.randint(1, 30, (2,), generator=chance, dtype=torch.int64, device="cpu").tolist()
        taken = ranges.take(count)
        if taken is None:
            assert sum(r.end - r.begin for r in held) + count > 40  # what lies in between is in pieces
            del held[leave % len(held)]
            continue
        assert taken.end - taken.begin == count
        assert 5 <= taken.begin <= taken.end <= 105
        assert all(taken.end <= other.begin or other.end <= taken.begin for other in held)
        held.append(taken)
        assert ranges.taken == sum(r.end - r.begin for r in held)
        del taken
    held.clear()
    assert ranges.taken == 0
    assert ranges.take(100).begin == 5
    assert ranges.take(0) is not None
