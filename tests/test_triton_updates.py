"""The steps of tables in Triton against plain PyTorch, bit for bit, and their compilation for GPUs that are not here.
They run on a GPU where there is one, and everywhere through Triton's interpreter.
"""

from __future__ import annotations

import itertools
import re
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peer_dist import PEER
from peer_dist import kernels as package
from peer_dist.kernels.eight_bit import CODES, dequantised, quantised
from peer_dist.kernels.picks import Picks
from peer_dist.kernels.rounding import Rounding
from peer_dist.kernels.updates import Plain, Step
from peer_dist.optim import TableOptimizer, TableRule
from tests.updates import CASES, KINDS, SUM_ULPS, Table, same_bits

triton = pytest.importorskip("triton")

from peer_dist.kernels.triton import experts, launching, updates  # noqa: E402
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


class EightBitTable(Table):
    """A table of eight bits, whose rows differ much in size and one of which has zeros alone, to be stepped.

    Args:
        named: whether what rows are called is told apart from where they are.
    """

    def __init__(self, kind, codes, lazy, rows, columns, seed=0, *, named=False, odd=()):
        super().__init__(kind, "rounded", lazy, rows, columns, seed, odd=odd)
        generator = torch.Generator().manual_seed(seed)
        values = self.table.float() * 10.0 ** torch.randint(-20, 20, (rows, 1), generator=generator)
        if rows:
            values[rows // 2] = 0
        bits = torch.randint(2**16, values.shape, dtype=torch.int32, generator=generator)
        self.table, self.scales = quantised(values, codes, bits)
        self.called = torch.randint(2**31 - 9, (len(self.grad),), generator=generator) if named else None

    def stepped(self, backend, device="cpu", squares=None):
        table, scales = self.table.to(device, copy=True), self.scales.to(device, copy=True)
        moments = {name: moment.to(device, copy=True) for name, moment in self.moments.items()}
        given = (None if value is None else value.to(device) for value in (self.rows, squares, self.called))
        rows, squares, called = given
        grad = self.grad.to(device)
        backend.update_rows(self.step, grad, table, moments, None, rows, squares, self.rounding, scales, called)
        # what is not finite has no codes
        codes = torch.where(scales.isfinite()[:, None], table, 0)
        parts = {"table": codes, "scales": scales, "values": dequantised(table, scales), **moments}
        return {name: value.cpu() for name, value in parts.items()}


@runs_kernels
@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(KINDS), codes=st.sampled_from(list(CODES.values())), lazy=st.booleans(), named=st.booleans(),
    rows=st.integers(0, 20), columns=st.sampled_from([1, 3, 5, 16, 17, 100, 412, 1000, 1025]),
    seed=st.integers(0, 2**20), wide=st.booleans(),
    odd=st.lists(st.sampled_from([0.0, -0.0, 1e-30, 1e15, float("inf"), -float("inf"), float("nan")]), max_size=3),
)  # fmt: skip
def test_eight_bits_are_those_of_plain_pytorch(kind, codes, lazy, named, rows, columns, seed, wide, odd):
    """With rows wider than a program, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(updates, "MAX_BLOCK_D", 32 if wide else 4096)
        EightBitTable(kind, codes, lazy, rows, columns, seed, named=named, odd=tuple(odd)).check(updates, DEVICE)


@runs_kernels
@pytest.mark.parametrize("codes", CODES.values(), ids=CODES)
def test_every_magnitude_gets_the_scale_and_codes_of_the_definition(codes):
    """Rows at and around each power of two and each largest code, in a step that leaves the weights as they are."""
    exponents = torch.arange(-130, 120)[:, None]
    largest = torch.tensor([1.0, 1.5, 1.75, 1.984375], dtype=torch.float64)
    exact = torch.ldexp(largest, exponents).float().flatten()
    most = torch.cat([exact, exact.nextafter(torch.tensor(0.0)), exact.nextafter(torch.tensor(torch.inf))])
    generator = torch.Generator().manual_seed(0)
    values = most[:, None] * torch.cat(
        [torch.ones(len(most), 1), torch.randn(len(most), 15, generator=generator).clamp(-1, 1)], 1
    )
    grad, squares = values.to(DEVICE), torch.zeros(len(values), device=DEVICE)
    step = Step(1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0, -1.0, 0.0)  # w = 0 w + g / sqrt(1)
    rounding, found = Rounding(7, 0, 0), []
    for kernels in (updates, Plain):
        table = torch.zeros(values.shape, dtype=codes, device=DEVICE)
        scales, row_sq = (torch.ones(len(values), device=DEVICE) for _ in range(2))
        kernels.update_rows(step, grad, table, {"row_sq": row_sq}, None, None, squares, rounding, scales, None)
        found.append((table, scales))
    assert found[0][1].equal(found[1][1])
    assert found[0][0].equal(found[1][0])
    assert len(found[0][1].unique()) > 200


@runs_kernels
def test_rows_of_bfloat16_are_rounded_by_what_they_are_called():
    table = Table("rowwise_adam", "rounded", True, 12, 9)
    called = torch.tensor([0, 5, 2**31 - 9, 4])[: len(table.grad)]

    class Named:
        """A backend that is told so."""

        def __init__(self, backend):
            self.backend = backend

        def update_rows(self, *arguments):
            self.backend.update_rows(*arguments, None, called.to(arguments[1].device))

    squares = Plain.row_squares(table.grad)
    got, want = (table.stepped(Named(kernels), DEVICE, squares) for kernels in (updates, Plain))
    same_bits(got, want)
    assert not got["table"].equal(table.stepped(updates, DEVICE, squares)["table"])


LAZY = [(kind, way) for kind, way, lazy in CASES if lazy]


class Sums:
    """A table to be stepped, and two gradients of it as sums over picks of all rows but the last, one of which has most
    picks.
    """

    def __init__(self, kind, way, rows=8, tokens=24, columns=20, odd=None):
        self.table = Table(kind, way, False, rows, columns)
        generator = torch.Generator().manual_seed(1)
        expert = torch.randint(0, rows - 1, (tokens, 2), generator=generator)
        expert[:, 0] = 3
        dtype = self.table.table.dtype
        self.sums = [
            (torch.randn(2 * tokens, generator=generator).to(DEVICE),
             torch.randn(tokens, columns, generator=generator).to(DEVICE, dtype))
            for _ in range(2)
        ]  # fmt: skip
        if odd is not None:
            self.sums[0][0][-1] = odd
        self.picks, self.rows, self.dtype = Picks.even(expert.to(DEVICE)), rows, dtype

    def check(self):
        """The bits of the two steps, given the sums over the columns, and nearly these sums."""
        table = self.table
        table.rows, grads = experts.sparse_table_grads(self.sums, self.picks, self.rows, dtype=self.dtype)
        sums = experts.run_sums(self.sums, self.picks, self.rows)
        every = updates.run_squares(sums, self.dtype)
        for which, (grad, squares) in enumerate(zip(grads, every)):
            given = squares[table.rows]
            torch.testing.assert_close(given, updates.row_squares(grad), rtol=SUM_ULPS * 2**-24, atol=0, equal_nan=True)
            assert not squares.index_fill(0, table.rows, 0.0).any()
            table.grad = grad
            want = table.stepped(updates, DEVICE, given)
            got = table.stepped(InRegisters(sums, which, squares), DEVICE)
            same_bits(got, want)
            same_bits(table.stepped(InRegisters(sums, which, squares), DEVICE), got)
            assert not got["table"].equal(table.table)
            assert got["table"][-1].equal(table.table[-1])


class InRegisters:
    """Steps by sums instead of gradients."""

    def __init__(self, *operands):
        self.operands = operands

    def update_rows(self, step, grad, table, moments, master, rows, squares, rounding):
        updates.update_runs(step, *self.operands, table, moments, master, rounding)


@runs_kernels
@pytest.mark.parametrize("case", LAZY, ids=str)
def test_sums_in_registers_step_as_gradients_do(case, monkeypatch):
    monkeypatch.setattr(experts, "PIECE", 8)
    Sums(*case).check()


@runs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_sums_of_slices_of_columns(kind, monkeypatch):
    monkeypatch.setattr(experts, "MAX_GRAD_BLOCK_D", 16)
    Sums(kind, "rounded", columns=33).check()
    Sums(kind, "float32", columns=1, tokens=4, odd=float("inf")).check()


@runs_kernels
@pytest.mark.parametrize("kind", ["adam", "rowwise_adam"])
def test_a_layer_without_gradients_steps_as_with_them(kind, monkeypatch):
    """In one step after the other; with empty batches, with one that is dropped, and with two passes in one step."""
    for name, kernels in (("backend", package.triton), ("updates.backend", updates)):
        monkeypatch.setattr(f"peer_dist.kernels.{name}", lambda *tensors, kernels=kernels: kernels)
    found = []
    with group_of_one():
        for one_pass in (False, True):
            torch.manual_seed(0)
            layer = PEER(8, 16, heads=1, top_k=2, key_dim=8, query_norm="rms", sparse_grad=True, device=DEVICE)
            tables = {name: table.requires_grad_() for name, table in layer.tables().items()}
            rule = TableRule(kind, 0.02, (0.8, 0.9), 1e-4, 0.1, lazy=True)
            optimizer, norms = TableOptimizer(tables, rule, 8, one_pass=one_pass), []
            for seeds, bad in [([1], 1), ([2], float("nan")), ([3], 1), ([4, 5], 1), ([6], 1)]:
                for seed in seeds:
                    x = torch.randn(seed - 1, 8, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
                    (layer(x).square().sum() * bad).backward()
                norms.append(optimizer.grad_norm(x.device))
                assert all(not one_pass or len(seeds) == 2 or table.grad is None for table in tables.values())
                optimizer.step(0.5) if norms[-1].isfinite() else optimizer.zero_grad()
            found.append([*norms, *tables.values(), *(value for *_, value in optimizer.state())])
    assert optimizer.steps == 4
    for got, want in zip(*found):
        # a row's mean adds in another order
        torch.testing.assert_close(got, want, rtol=1e-5 if kind == "rowwise_adam" or want.dim() == 0 else 0, atol=0,
                                   equal_nan=True)  # fmt: skip


@contextmanager
def group_of_one():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


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
STACK |= {(8192, 80): 16}  # of eight bits, to stay at 64 registers, with which twice the programs fit


def launched(columns, monkeypatch):
    """Every distinct launch at this number of columns."""

    def call():
        for case in CASES:
            table = Table(*case, 12, columns)
            for squares in (None, torch.zeros(len(table.grad))):
                table.stepped(updates, squares=squares)
            updates.row_squares(table.grad)
        for kind, codes in itertools.product(KINDS, CODES.values()):  # always lazy
            table = EightBitTable(kind, codes, True, 12, columns, named=True)
            for squares in (None, torch.zeros(len(table.grad))):
                table.stepped(updates, squares=squares)

    return launches(call, monkeypatch)


@compiles
def test_steps_by_sums_compile_without_spills(monkeypatch, tmp_path):
    check_steps_by_sums([case for case in LAZY if case[0] == "rowwise_adam"], 1024, 90, monkeypatch, tmp_path)


@compiles
@pytest.mark.slow
@pytest.mark.parametrize(
    ("columns", "capability"),
    itertools.product([64, 100, 256, 412, 512, 1024, 1280, 2048, 8192], [80, 90, 100]),
    ids=str,
)
def test_steps_by_sums_compile_at_any_number_of_columns(columns, capability, monkeypatch, tmp_path):
    check_steps_by_sums(LAZY, columns, capability, monkeypatch, tmp_path)


def check_steps_by_sums(cases, columns, capability, monkeypatch, folder):
    needs_assembler(capability)

    def call():
        for case in cases:
            made = Sums(*case, tokens=300, columns=columns)
            for count in (1, 2):
                sums = experts.run_sums(made.sums[:count], made.picks, made.rows)
                updates.run_squares(sums, made.dtype)
                made.table.stepped(InRegisters(sums, 0, torch.zeros(made.rows)))
                experts.table_grads(made.sums[:count], made.picks, made.rows, dtype=made.dtype)

    found = launches(call, monkeypatch)
    assert {kernel.__name__ for kernel, *_ in found} == {
        "_pieces_kernel", "_runs_kernel", "_run_squares_kernel", "_update_runs_kernel"
    }  # fmt: skip
    for launch in found:
        binary = compiled(launch, capability)
        registers, stack = resources(binary, folder)
        name = f"sm_{capability} {launch[2]} warps {registers} registers {launch[0].__name__} {launch[3]}"
        print(name, stack)
        assert stack <= (16 if capability == 100 else 0), f"{name} spills: {stack} bytes of stack"
        assert registers <= 128, name
        assert "fma.rn.f32" not in binary.asm["ptx"], f"{name}: sums and steps must have the same bits everywhere"
        if launch[0] is updates._update_runs_kernel:
            assert "div.full" not in binary.asm["ptx"], "divisions are not rounded to the nearest"
            assert "sqrt.approx" not in binary.asm["ptx"], "roots are not rounded to the nearest"


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
        if kernel in (updates._update_kernel, updates._update_eight_bit_kernel):
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
        for table in (Table(kind, "rounded", False, rows, 64), EightBitTable(kind, torch.int8, True, 3 * rows, 64)):
            table.rounding = Rounding(key, row, column)
            table.stepped(updates)
    assert len(variants) == 2
