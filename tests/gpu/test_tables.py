"""Tables of eight bits, and rows of the host's memory, on the GPU against the CPU."""

from __future__ import annotations

import pytest
import torch

from peer_dist.kernels import Picks, backend, expert_mix, updates
from peer_dist.kernels.eight_bit import CODES, EightBit, dequantised, let_scales, quantised, scales_of
from peer_dist.optim import TableOptimizer, TableRule
from tests.gpu.device import DEVICE, assert_same, needs_gpu, waits_are_named
from tests.test_triton_updates import group_of_one

pytestmark = pytest.mark.gpu

ROWS, DIM, TOKENS, EACH = 512, 200, 64, 24


def drawn():
    """x, dy, gate, which rows are picked, and the values of two tables."""
    generator = torch.Generator().manual_seed(0)
    x, dy = torch.randn(2, TOKENS, DIM, generator=generator)
    gate = torch.rand(TOKENS * EACH, generator=generator)
    expert = torch.randint(ROWS // 2, (TOKENS, EACH), generator=generator)
    down, up = torch.randn(2, ROWS, DIM, generator=generator) / DIM**0.5
    return x, dy, gate, expert, down, up


def coded(values, codes, device):
    table, scales = (part.to(device) for part in quantised(values, codes))
    let_scales(table, scales)
    return table


@pytest.mark.parametrize("codes", CODES.values(), ids=CODES)
def test_a_step_of_eight_bits(codes):
    """Outputs and gradients against float64, and the codes and scales after steps against those of the CPU."""
    x, dy, gate, expert, *values = drawn()
    rule = TableRule("rowwise_adagrad", 0.02, (0.8, 0.9), 1e-8, 0.1, lazy=True, rounding_seed=3)
    wide = [dequantised(*quantised(each, codes)).double() for each in values]
    picks = Picks.even(expert)
    leaves = [each.double().requires_grad_() for each in (x, gate)]
    y = expert_mix(leaves[0], picks, leaves[1], *wide, "gelu")
    want = [y, *torch.autograd.grad(y, leaves, dy.double())]
    with group_of_one():
        tables = {name: coded(each, codes, DEVICE) for name, each in zip(("down", "up"), values)}
        optimizer = TableOptimizer(tables, rule, DIM)
        leaves = [each.to(DEVICE).requires_grad_() for each in (x, gate)]
        y = expert_mix(leaves[0], Picks.even(expert.to(DEVICE)), leaves[1], *tables.values(), "gelu")
        y.backward(dy.to(DEVICE))
        assert_same([y, *(leaf.grad for leaf in leaves)], want, 2e-5)
        before = [table.clone() for table in tables.values()]
        optimizer.grad_norm(DEVICE)
        optimizer.step(0.5)
    for table, old in zip(tables.values(), before):
        assert (table[: ROWS // 2] != old[: ROWS // 2]).any(1).sum() > ROWS // 4
        assert table[ROWS // 2 :].equal(old[ROWS // 2 :])


@pytest.mark.parametrize("codes", CODES.values(), ids=CODES)
@pytest.mark.parametrize("kind", ["adam", "rowwise_adam", "rowwise_adagrad"])
def test_codes_and_scales_are_those_of_the_cpu(kind, codes):
    generator = torch.Generator().manual_seed(1)
    *_, down, _ = drawn()
    rows = torch.randperm(ROWS, generator=generator)[:100].sort()[0]
    grad = torch.randn(100, DIM, generator=generator).bfloat16()
    squares = grad.float().square().sum(1)
    step = updates.Step.of(kind, 0.02, (0.8, 0.9), 1e-4, 0.1, count=3, scale=0.5, dim=DIM, lazy=True)
    found = []
    for device in ("cpu", DEVICE):
        table = coded(down, codes, device)
        moments = {name: torch.zeros(table.shape, device=device) for name in ("exp_avg", "exp_avg_sq")}
        moments["row_sq"] = torch.zeros(ROWS, device=device)
        for name in {"adam": ["row_sq"], "rowwise_adam": ["exp_avg_sq"]}.get(kind, ["exp_avg", "exp_avg_sq"]):
            del moments[name]
        updates.update_rows(
            step, grad.to(device), table, moments, rows=rows.to(device), squares=squares.to(device),
            rounding=updates.Rounding(5, 0, 0), scales=scales_of(table),
        )  # fmt: skip
        found.append([table.cpu(), scales_of(table).cpu(), *(each.cpu() for each in moments.values())])
    for got, want in zip(found[1], found[0]):
        assert got.equal(want)


@needs_gpu
def test_tables_of_eight_bits_are_tritons():
    from peer_dist.kernels import triton

    table = EightBit(*(part.to(DEVICE) for part in quantised(torch.randn(4, 8), torch.int8)))
    x = torch.zeros(1, 8, device=DEVICE)
    assert backend(x, table, table) is triton
    assert updates.backend(x.bfloat16(), table.codes) is triton.updates


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.float32], ids=str)
def test_rows_of_the_hosts_memory(dtype, monkeypatch):
    """Rows, and numbers of rows such as scales, come and go without a wait of the host."""
    from peer_dist.kernels.triton import rows as kernels

    generator = torch.Generator().manual_seed(2)
    for shape in ((4096, DIM), (4096,)):
        far = torch.randint(-99, 99, shape, generator=generator).to(dtype).pin_memory()
        chosen = torch.randperm(4096, generator=generator)[:999]
        slots = torch.randperm(1500, generator=generator)[:999]
        rows, to = chosen.to(DEVICE), slots.to(DEVICE)
        near = torch.zeros(1500, *shape[1:], dtype=dtype, device=DEVICE)
        wanted = far.clone()
        with waits_are_named(monkeypatch) as met:
            kernels.gather_rows(far, rows, near, to)
            doubled = near + near
            kernels.scatter_rows(far, rows, doubled, to)
        assert met == []
        torch.cuda.synchronize()
        assert near.cpu()[slots].equal(wanted[chosen])
        wanted[chosen] = wanted[chosen] + wanted[chosen]
        assert far.equal(wanted)
