"""Tables whose rows lie in other memory, against ordinary ones: bit for bit, whatever is kept near."""

import copy
import pickle
import threading

import pytest
import torch
import torch.utils.checkpoint

from peer_dist.kernels import Picks, expert_mix, value_mix
from peer_dist.kernels.eight_bit import let_scales, quantised
from peer_dist.kernels.far import FarRows, Hot, Place, near
from peer_dist.kernels.far import rows as far_rows
from peer_dist.kernels.far.ranges import Ranges
from peer_dist.optim import TableOptimizer, TableRule

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


@pytest.fixture(autouse=True)
def alone():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def width(rule, tables=2, dim=DIM):
    """Bytes of a row with its states."""
    kind, dtype, seed = RULES[rule]
    states = {"adam": 8 * dim, "rowwise_adam": 4 * dim + 4, "rowwise_adagrad": 4}[kind]
    scale, master = 4 * (dtype.itemsize == 1), 4 * dim * (dtype == torch.bfloat16 and seed is None)
    return tables * (dtype.itemsize * dim + scale + states + master)


class Run:
    """Two tables that expert_mix reads, or one that value_mix does, and their optimizer."""

    def __init__(self, rule="rowwise_adam", memory=None, cached=0, folder=None, tables=2, rows=ROWS, one_pass=True):
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
        self.optimizer = TableOptimizer(named, rule, DIM, one_pass=one_pass)

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
@pytest.mark.parametrize("skew", [1.0, 4.0], ids=["uniform", "skewed"])
def test_steps_are_those_of_ordinary_tables(memory, cached, rule, skew, tmp_path):
    ordinary, far = pair(tmp_path, rule, memory, cached)
    for step, tokens in enumerate((6, 0, 50, 3, 6, 6, 9)):
        same(*(run.step(step, tokens=tokens, skew=skew) for run in (ordinary, far)))
    same(ordinary.state(), far.state())
    assert bool(far.pool._hot.used) == bool(cached)
    assert far.pool._hot.used == cached or cached in (40, 2 * ROWS)
    for step in range(10, 13):  # from where the flush has left it
        same(*(run.step(step, skew=skew) for run in (ordinary, far)))
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
