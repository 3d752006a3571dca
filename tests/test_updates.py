"""The steps of tables in C against plain PyTorch, bit for bit."""

import platform

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peer_dist.kernels import native, updates
from peer_dist.kernels.rounding import Rounding
from peer_dist.kernels.updates import Plain, Step, row_squares, update_rows
from tests.updates import CASES, EIGHT_CASES, KINDS, Table, same_bits

COLUMNS = [0, 1, 3, 5, 16, 63, 64, 100, 412, 1000, 1024, 1025, 3000]


@pytest.fixture(params=["this processor", "any processor"])
def compiled(request, monkeypatch, tmp_path_factory):
    """The library for this processor, and as compiled where there are none of its vector instructions."""
    if request.param == "any processor":
        if platform.machine() not in ("x86_64", "AMD64"):
            pytest.skip("its flag is for x86")
        flags = tuple("-march=x86-64" if flag == "-march=native" else flag for flag in native.FLAGS)
        monkeypatch.setattr(native, "FLAGS", flags)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "any processor"))
        native.load_library.cache_clear()
    if native.load_library() is None:
        pytest.skip("no C compiler here")
    yield
    if request.param == "any processor":
        native.load_library.cache_clear()


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    case=st.sampled_from(CASES + EIGHT_CASES), named=st.booleans(),
    rows=st.integers(0, 20), columns=st.sampled_from(COLUMNS), seed=st.integers(0, 2**20),
    odd=st.lists(st.sampled_from([0.0, -0.0, 1e-42, 1e30, float("inf"), -float("inf"), float("nan")]), max_size=3),
)  # fmt: skip
def test_bits_are_those_of_plain_pytorch(compiled, case, rows, columns, seed, odd, named):
    Table(*case, rows, columns, seed, odd=tuple(odd), named=named).check(native)


@pytest.mark.parametrize("case", CASES + EIGHT_CASES, ids=str)
def test_threads_and_runs_change_nothing(case):
    table, found, before = Table(*case, 300, 100), [], torch.get_num_threads()
    for threads in (1, 3, 3):
        torch.set_num_threads(threads)
        found.append(table.stepped(native))
    torch.set_num_threads(before)
    for other in found[1:]:
        same_bits(other, found[0])


@pytest.mark.parametrize(("kind", "lazy"), [(kind, lazy) for kind in KINDS for lazy in (False, True)])
def test_a_step_is_that_of_float64(kind, lazy):
    """All in float32: within four ulps of the largest term."""
    table = Table(kind, "float32", lazy, 30, 100)
    step, which = table.step, slice(None) if table.rows is None else table.rows
    raw, old = table.grad.double(), {name: value.double()[which] for name, value in table.moments.items()}
    g = raw * step.scale
    new = {}
    if "row_sq" in old:
        new["row_sq"] = step.second * old["row_sq"] + step.rest_second * g.square().mean(1)
        square = new["row_sq"][:, None]
    else:
        square = new["exp_avg_sq"] = step.second * old["exp_avg_sq"] + step.rest_second * g.square()
    if "exp_avg" in old:
        g = new["exp_avg"] = step.first * old["exp_avg"] + step.rest_first * g
    new["table"] = step.decay * table.table.double()[which] - step.rate * g / (
        (square * step.unbiased).sqrt() + step.eps
    )
    got = table.stepped(native)
    for name, value in new.items():
        torch.testing.assert_close(got[name][which].double(), value, rtol=4 * 2**-24, atol=4 * 2**-24)


@pytest.mark.parametrize("backend", [native, Plain], ids=["C", "plain"])
def test_offsets_beyond_two_to_the_31(backend):
    """Memory that is hardly touched; a dense step would touch all of it."""
    many, columns = 2**21 + 2, 1024
    table, row_sq = torch.empty(many, columns, dtype=torch.bfloat16), torch.empty(many)
    rows = torch.tensor([1, many - 2, many - 1])
    small, few = torch.randn(3, columns).bfloat16(), torch.rand(3)
    table[rows], row_sq[rows] = small, few
    step = Step.of("rowwise_adagrad", 0.1, (0.9, 0.99), 1e-8, 0.1, count=1, scale=1.0, dim=columns)
    grad = torch.randn(3, columns).bfloat16()
    backend.update_rows(step, grad, table, {"row_sq": row_sq}, None, rows, None, Rounding(7, 0, 0))
    for place, row in enumerate(rows.tolist()):
        one, its = small[place : place + 1], few[place : place + 1]
        Plain.update_rows(step, grad[place : place + 1], one, {"row_sq": its}, None, None,
                          native.row_squares(grad[place : place + 1]) if backend is native else None,
                          Rounding(7, row, 0))  # fmt: skip
        assert table[row].equal(one[0])
        assert row_sq[row].equal(its[0])


def test_what_c_does_not_serve_is_stepped_too():
    """float16 and float64 tables, gradients and tables that are not contiguous."""
    for dtype in (torch.float16, torch.float64):
        table = Table("rowwise_adam", "master", False, 9, 10)
        low, grad = table.table.to(dtype), table.grad.to(dtype)
        want = table.stepped(Plain)
        update_rows(table.step, grad, low, table.moments, master=table.master)
        assert table.master.equal(want["master"])
        assert low.equal(want["master"].to(dtype))
    for case in CASES[:2]:
        table = Table(*case, 9, 10)
        want = table.stepped(Plain)
        across = table.table.T.contiguous().T
        update_rows(table.step, table.grad.T.contiguous().T, across, table.moments, rows=table.rows)
        assert across.equal(want["table"])
    assert row_squares(torch.ones(3, 4, dtype=torch.float64)).tolist() == [4.0, 4.0, 4.0]


def test_autograd_sees_that_a_table_was_stepped():
    table = torch.ones(3, 4, requires_grad=True)
    y = (table * table).sum()
    step = Step.of("rowwise_adagrad", 0.1, (0.9, 0.99), 1e-8, 0.1, count=1, scale=1.0, dim=4)
    with torch.no_grad():
        updates.update_rows(step, torch.ones(3, 4), table, {"row_sq": torch.zeros(3)})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
