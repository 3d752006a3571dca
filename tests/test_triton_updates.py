"""The steps of tables in Triton against plain PyTorch, bit for bit, and their compilation for GPUs that are not here.
They run on a GPU where there is one, and everywhere through Triton's interpreter.
"""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peer_dist.kernels.rounding import Rounding
from peer_dist.kernels.updates import Plain, Step
from tests.updates import CASES, KINDS, Table, same_bits

triton = pytest.importorskip("triton")

from peer_dist.kernels.triton import launching, updates  # noqa: E402
from tests.gpu_kernels import (  # noqa: E402
    DEVICE,
    INTERPRETED,
    compiled,
    compiles,
    launches,
    needs_assembler,
    resources,
    run_interpreted,
    runs_kernels,
)


@runs_kernels
@settings(max_examples=40, deadline=None)
@given(
    case=st.sampled_from(CASES), rows=st.integers(0, 20), columns=st.sampled_from([1, 3, 5, 16, 100, 412, 1000, 1025]),
    seed=st.integers(0, 2**20),
    odd=st.lists(st.sampled_from([0.0, -0.0, 1e-30, 1e15, float("inf"), -float("inf"), float("nan")]), max_size=3),
)  # fmt: skip
def test_bits_are_those_of_plain_pytorch(case, rows, columns, seed, odd):
    Table(*case, rows, columns, seed, odd=tuple(odd)).check(updates, DEVICE)


@runs_kernels
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_wider_than_a_program(case, monkeypatch):
    monkeypatch.setattr(updates, "MAX_BLOCK_D", 32)
    for columns in (32, 33, 100):
        Table(*case, 7, columns, odd=(float("nan"),)).check(updates, DEVICE)


@runs_kernels
@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_runs_are_equal(case):
    table = Table(*case, 64, 96)
    same_bits(table.stepped(updates, DEVICE), table.stepped(updates, DEVICE))


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_masters_of_other_tables(dtype):
    """Rounded as torch rounds them, by the device; the interpreter has its own way."""
    table = Table("rowwise_adam", "master", False, 9, 10)
    squares = Plain.row_squares(table.grad)
    table.table, table.grad = table.table.to(dtype), table.grad.to(dtype)
    got, want = table.stepped(updates, DEVICE, squares), table.stepped(Plain, squares=squares)
    assert got["master"].equal(want["master"])
    torch.testing.assert_close(got["table"], want["table"], rtol=2e-3 if INTERPRETED else 0, atol=0)


@runs_kernels
def test_offsets_beyond_two_to_the_31():
    """Memory that is hardly touched, of 4 GB; a dense step would touch all of it."""
    many, columns = 2**21 + 2, 1024
    table, row_sq = torch.empty(many, columns, dtype=torch.bfloat16, device=DEVICE), torch.empty(many, device=DEVICE)
    rows = torch.tensor([1, many - 2, many - 1], device=DEVICE)
    small, few = torch.randn(3, columns, device=DEVICE).bfloat16(), torch.rand(3, device=DEVICE)
    table[rows], row_sq[rows] = small, few
    step = Step.of("rowwise_adagrad", 0.1, (0.9, 0.99), 1e-8, 0.1, count=1, scale=1.0, dim=columns)
    grad = torch.randn(3, columns, device=DEVICE).bfloat16()
    squares = updates.row_squares(grad)
    updates.update_rows(step, grad, table, {"row_sq": row_sq}, None, rows, None, Rounding(7, 0, 0))
    for place, row in enumerate(rows.tolist()):
        at = slice(place, place + 1)
        Plain.update_rows(step, grad[at], small[at], {"row_sq": few[at]}, None, None, squares[at], Rounding(7, row, 0))
        assert table[row].equal(small[place])
        assert row_sq[row].equal(few[place])


@compiles
@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cuda", reason="the kernels run on the GPU")
def test_through_the_interpreter():
    run_interpreted(__file__, "not slow")


# ---------------------------------------------------------------------------------------------------------------------
# Ahead-of-time compilation: what the launcher would run, recorded and compiled for a GPU that need not be here.


# Bytes that ptxas 13 spills of one variant (lazy `adam` in float32), to stay at 48 registers a thread.
STACK = {(256, 80): 8, (256, 90): 8, (256, 100): 8}


def launched(columns, monkeypatch):
    """Every distinct launch at this number of columns."""

    def call():
        for case in CASES:
            table = Table(*case, 12, columns)
            for squares in (None, torch.zeros(len(table.grad))):
                table.stepped(updates, squares=squares)
            updates.row_squares(table.grad)

    return launches(call, monkeypatch)


def check_compilation(columns, capability, monkeypatch, folder):
    needs_assembler(capability)
    for launch in launched(columns, monkeypatch):
        kernel, args, num_warps, constants = launch
        binary = compiled(launch, capability)
        registers, stack = resources(binary, folder)
        kinds = " ".join(str(arg.dtype)[6:] if isinstance(arg, torch.Tensor) else "-" for arg in args[:8])
        print(f"sm_{capability} {num_warps} warps {registers:3d} registers {kernel.__name__} {kinds} {constants}")
        assert stack <= STACK.get((columns, capability), 0), (
            f"{kernel.__name__} {kinds} {constants} spills: {stack} bytes of stack"
        )
        fit = 65536 // (registers * num_warps * 32) * num_warps
        assert fit >= 16, f"{kinds} {constants}: {fit} warps fit a multiprocessor"
        row_offsets = re.findall(r"arith\.(?:muli|shli) .*: tensor<\d+x1xi(\d+)>", binary.asm["ttir"])
        assert set(row_offsets) <= {"64"}, "offsets of rows must be 64 bits wide"
        if columns % 8 == 0:
            assert re.search(r"ld\.global\S*\.v4\.[bfu]32", binary.asm["ptx"]), "loads are not 16 bytes wide"
        elements = (p for p, arg in zip(kernel.params, args) if isinstance(arg, torch.Tensor) and arg.dim() == 2)
        narrow = [p.name for p in elements if p.do_not_specialize or p.do_not_specialize_on_alignment]
        assert not narrow, f"{narrow} are taken for numbers by pick, whose loads cannot be 16 bytes wide"
        if kernel is updates._update_kernel:
            assert "fma.rn.f32" not in binary.asm["ptx"], "operations are fused"
            assert "div.full" not in binary.asm["ptx"], "divisions are not rounded to the nearest"
            assert "sqrt.approx" not in binary.asm["ptx"], "roots are not rounded to the nearest"


@compiles
@pytest.mark.parametrize(
    ("columns", "capability"), [*itertools.product([256, 1024], [80, 90]), (4096, 90), (1024, 100)], ids=str
)
def test_compiles_without_spills(columns, capability, monkeypatch, tmp_path):
    check_compilation(columns, capability, monkeypatch, tmp_path)


@compiles
@pytest.mark.slow
@pytest.mark.parametrize(
    ("columns", "capability"),
    itertools.product([1, 3, 64, 100, 412, 512, 1000, 1280, 2048, 8192], [80, 90, 100]),
    ids=str,
)
def test_compiles_at_any_number_of_columns(columns, capability, monkeypatch, tmp_path):
    check_compilation(columns, capability, monkeypatch, tmp_path)


@compiles
@pytest.mark.parametrize("kind", KINDS)
def test_steps_and_shards_do_not_compile_anew(kind, monkeypatch):
    """Whatever their random bits, the rows touched, and where the table begins."""
    variants = set()

    def record(kernel, grid, *args, num_warps, **constants):
        kinds = [
            value.dtype
            if isinstance(value, torch.Tensor)
            else value is None or parameter.do_not_specialize or type(value)
            for parameter, value in zip(kernel.params, args)
        ]
        variants.add((kernel.__name__, str(kinds), num_warps, str(constants)))

    monkeypatch.setattr(launching, "launch", record)
    for key, rows, row, column in [(3, 16, 0, 0), (-16, 17, 16, 64), (1 << 62, 1, 1, 1)]:
        table = Table(kind, "rounded", False, rows, 64)
        table.rounding = Rounding(key, row, column)
        table.stepped(updates)
    assert len(variants) == 1
