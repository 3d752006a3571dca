"""Tables of eight bits on a CPU: how rows are rounded, products over picks, and steps."""

import math

import pytest
import torch

from peer_dist.kernels import Picks, value_table_grad
from peer_dist.kernels.eight_bit import EightBit, dequantised, let_scales, quantised
from peer_dist.kernels.rounding import Rounding, random_bits
from peer_dist.kernels.updates import Plain, Step, update_rows
from peer_dist.optim import TableOptimizer, TableRule

FORMATS = [torch.int8, torch.uint8]
"""The dtypes of codes; uint8 has the bits of float8_e4m3fn."""


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_names_are_what_rows_are_called_where_they_are_rounded(dtype):
    """Slots that hold other rows are stepped as these are."""
    step = Step.of("rowwise_adagrad", 0.1, (0.9, 0.99), 1e-8, 0.1, count=1, scale=1.0, dim=9)
    rounding = Rounding(7, 3, 2)
    codes, scales = quantised(torch.randn(6, 9), dtype)
    grad, rows = torch.randn(3, 9).bfloat16(), torch.tensor([1, 2, 5])
    want = EightBit(codes.clone(), scales.clone()), torch.ones(6)
    update_rows(step, grad, want[0].codes, {"row_sq": want[1]}, rows=rows, rounding=rounding, scales=want[0].scales)
    for slots in (None, torch.tensor([0, 2, 3])):
        many = 3 if slots is None else 4
        there = torch.arange(3) if slots is None else slots
        table, held, row_sq = torch.zeros(many, 9, dtype=dtype), torch.ones(many), torch.ones(many)
        table[there], held[there] = codes[rows], scales[rows]
        update_rows(step, grad, table, {"row_sq": row_sq}, rows=slots, rounding=rounding, scales=held, numbers=rows)
        assert table[there].equal(want[0].codes[rows])
        assert held[there].equal(want[0].scales[rows])
        assert row_sq[there].equal(want[1][rows])


def test_names_of_bfloat16_rows():
    step = Step.of("rowwise_adagrad", 0.1, (0.9, 0.99), 1e-8, 0.1, count=1, scale=1.0, dim=9)
    whole, grad, rows = torch.randn(6, 9).bfloat16(), torch.randn(3, 9).bfloat16(), torch.tensor([1, 2, 5])
    few = whole[rows]
    for backend in (update_rows, None):
        want, got = whole.clone(), few.clone()
        if backend is None:
            Plain.update_rows(step, grad, want, {"row_sq": torch.ones(6)}, None, rows, None, Rounding(7, 0, 0))
            Plain.update_rows(
                step, grad, got, {"row_sq": torch.ones(3)}, None, None, None, Rounding(7, 0, 0), numbers=rows
            )
        else:
            update_rows(step, grad, want, {"row_sq": torch.ones(6)}, rows=rows, rounding=Rounding(7, 0, 0))
            update_rows(step, grad, got, {"row_sq": torch.ones(3)}, rounding=Rounding(7, 0, 0), numbers=rows)
        assert got.equal(want[rows])


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("kind", ["adam", "rowwise_adam", "rowwise_adagrad"])
def test_a_step_dequantises_steps_and_rounds(dtype, kind):
    """As a table of float32 is stepped, and then rounded by the bits of these places."""
    rows, columns = torch.tensor([0, 3, 4]), 17
    codes, scales = quantised(torch.randn(5, columns), dtype)
    grad = torch.randn(3, columns).bfloat16()
    rule = TableRule(kind, 0.05, (0.9, 0.99), 1e-8, 0.1, True, 11)
    table, master = codes.clone(), dequantised(codes, scales).requires_grad_()
    let_scales(table, scales.clone())
    optimizer = TableOptimizer({"t": table}, rule, columns, offsets={"t": (5, 6)})
    other = TableOptimizer({"t": master}, rule, columns)
    for _ in range(3):
        before = master.detach().clone()
        for each, weights in ((optimizer, table), (other, master)):
            summed = value_table_grad(torch.ones(3), grad, Picks.even(rows[:, None]), weights, sparse=True)
            assert (summed is None) == (weights is table)
            weights.grad = summed
            each.step(1.0)
        key = optimizer._rounding("t").key
        bits = random_bits(key, rows + 5, range(6, 6 + columns))
        want = quantised(master.detach()[rows], dtype, bits)
        assert table[rows].equal(want.codes)
        assert table.scales[rows].equal(want.scales)
        assert not master[rows].equal(before[rows])
        with torch.no_grad():
            master[rows] = dequantised(*want)
        assert dequantised(table, table.scales).equal(master)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_what_is_not_finite_makes_its_row_nan(dtype):
    values = torch.randn(4, 5)
    values[0, 1], values[2, 0], values[3, 4] = math.nan, math.inf, -math.inf
    for bits in (None, torch.randint(65536, (4, 5), dtype=torch.int32)):
        read = dequantised(*quantised(values, dtype, bits))
        assert read.isnan().all(1).tolist() == [True, False, True, True]
        assert read[1].isfinite().all()


def test_a_table_of_eight_bits_is_lazy_and_rounded():
    table = torch.zeros(3, 4, dtype=torch.int8)
    let_scales(table, torch.ones(3))
    for lazy, seed in ((False, 1), (True, None)):
        with pytest.raises(ValueError, match=r"t: .*table_optimizer.lazy and table_optimizer.stochastic_rounding"):
            TableOptimizer({"t": table}, TableRule("adam", 0.1, (0.9, 0.99), 1e-8, 0.0, lazy, seed), 4)
    step = Step.of("rowwise_adagrad", 0.1, (0.9, 0.99), 1e-8, 0.1, count=1, scale=1.0, dim=4)
    with pytest.raises(ValueError, match="scales, and rounded"):
        update_rows(step, torch.ones(3, 4).bfloat16(), table, {"row_sq": torch.ones(3)}, rounding=Rounding(1, 0, 0))
