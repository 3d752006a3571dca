"""The sums over picks in Triton against ten lines of plain PyTorch in float64, and their compilation for GPUs that are
not here. They run on a GPU where there is one, and everywhere through Triton's interpreter.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import peer_dist.kernels as package
from peer_dist.kernels import Picks
from peer_dist.kernels.eight_bit import CODES, EightBit, dequantised, quantised
from peer_dist.kernels.picks import ByExpert
from tests.definitions import ACTIVATIONS

triton = pytest.importorskip("triton")

from peer_dist.kernels.triton import experts as kernels  # noqa: E402
from peer_dist.kernels.triton import launching  # noqa: E402
from tests.gpu_kernels import (  # noqa: E402
    DEVICE,
    INTERPRETED,
    SHARED_LIMIT,
    compiled,
    compiles,
    launches,
    needs_assembler,
    resources,
    run_interpreted,
    runs_kernels,
)

BF16 = 8e-3 if INTERPRETED else 4e-3  # one rounding to nearest; the interpreter truncates
WAYS = {  # each to be taken at the small sizes of tests
    "token-major": {"EXPERT_MAJOR": 1e9},
    # slices of the columns where dim allows
    "by expert": {"EXPERT_MAJOR": 0.0, "_l2_bytes": lambda device: 600, "NARROWEST": 1},
    "wide": {"EXPERT_MAJOR": 1e9, "MAX_BLOCK_D": 32, "MAX_GRAD_BLOCK_D": 32},  # rows too wide for one program
}


def picks_of(counts, rows, generator):
    offsets = F.pad(torch.as_tensor(counts, dtype=torch.int64).cumsum(0), (1, 0))
    return Picks(offsets.to(DEVICE), torch.randint(rows, (int(offsets[-1]),), generator=generator).to(DEVICE))


def inputs(picks, dim, rows, generator, x_dtype, table_dtype):
    """x, dy, gate, down, up."""
    shapes = (picks.tokens, dim), (picks.tokens, dim), (picks.expert.numel(),), (rows, dim), (rows, dim)
    dtypes = x_dtype, x_dtype, x_dtype, table_dtype, table_dtype
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    scaled = (values[0], values[1], values[2], values[3] / dim**0.5, values[4])
    return [value.to(DEVICE, dtype) for value, dtype in zip(scaled, dtypes)]


def plain(x, dy, gate, down, up, picks, activation):
    """y, pre, dx, dgate, ddown, dup in float64."""
    x, dy, gate, down, up = (value.double() for value in (x, dy, gate, down, up))
    leaves = [value.requires_grad_() for value in (x, gate, down, up)]
    pre = (x[picks.token] * down[picks.expert]).sum(-1)
    hidden = ACTIVATIONS[activation](pre) * gate
    y = torch.zeros_like(x).index_add(0, picks.token, hidden[:, None] * up[picks.expert])
    return y.detach(), pre.detach(), *torch.autograd.grad(y, leaves, dy)


def ours(x, dy, gate, down, up, picks, activation):
    """The same from the kernels, with every uninitialised tensor full of NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        y, pre = kernels.forward(x, picks, gate, down, up, activation)
        dx, dgate, dpre, hidden = kernels.backward(dy, x, picks, pre, gate, down, up, activation)
        pairs = [(dpre, x), (hidden, dy)]
        ddown, dup = kernels.table_grads(pairs, picks, down.shape[0])
        rows, sparse = kernels.sparse_table_grads(pairs, picks, down.shape[0])
        for pair, grad in zip(pairs, (ddown, dup)):  # of one table, as for values
            torch.testing.assert_close(kernels.table_grads([pair], picks, down.shape[0])[0], grad)
    finally:
        torch.use_deterministic_algorithms(before)
    touched = picks.expert.unique()
    assert rows.equal(touched)
    assert sparse[0].equal(ddown[touched])
    assert sparse[1].equal(dup[touched])
    sums = tuple(torch.ones_like(grad) for grad in (ddown, dup))
    assert kernels.table_grads(pairs, picks, down.shape[0], out=sums)[0] is sums[0]
    for total, grad in zip(sums, (ddown, dup)):
        torch.testing.assert_close(total, grad + 1)
    one = torch.ones_like(ddown)
    kernels.table_grad(dpre, x, picks, one)
    torch.testing.assert_close(one, ddown + 1)
    return y, pre, dx, dgate, ddown, dup


def close(got, want, tolerance):
    for g, w in zip(got, want):
        assert g.shape == w.shape
        assert not g.isnan().any()
        assert (g.double() - w).norm() <= tolerance * w.norm() + 1e-30


@runs_kernels
@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=6 if INTERPRETED else 3, deadline=None)  # a GPU compiles some ten kernels for each
@given(
    counts=st.lists(st.sampled_from([0, 1, 3, 33]), max_size=5),
    dim=st.sampled_from([1, 3, 16, 50, 103]),
    rows=st.sampled_from([1, 2, 9, 64]),
    activation=st.sampled_from(list(ACTIVATIONS)),
    seed=st.integers(0, 2**20),
)
def test_equal_to_plain_pytorch_in_float64(way, counts, dim, rows, activation, seed):
    generator = torch.Generator().manual_seed(seed)
    picks = picks_of(counts, rows, generator)
    values = inputs(picks, dim, rows, generator, torch.float64, torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (WAYS[way] | {"PIECE": 8}).items():
            patch.setattr(kernels, name, value)
        got = ours(*values, picks, activation)
    close(got, plain(*values, picks, activation), 1e-12)


@runs_kernels
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("x_dtype", "table_dtype", "tolerance"),
    [
        (torch.float32, torch.float32, 2e-6),
        (torch.bfloat16, torch.bfloat16, BF16),
        (torch.bfloat16, torch.float32, BF16),
        (torch.float32, torch.bfloat16, 2e-6),
        (torch.float16, torch.float16, 5e-4),
    ],
    ids=str,
)
def test_low_precision_is_rounded_once(way, x_dtype, table_dtype, tolerance, monkeypatch):
    """Whatever the dtypes of tables and tokens, errors are those of float32 sums and of rounding results once."""
    for name, value in WAYS[way].items():
        monkeypatch.setattr(kernels, name, value)
    generator = torch.Generator().manual_seed(3)
    picks = picks_of([20, 0, 1, 9], 12, generator)  # more than one tile of a token's picks
    values = inputs(picks, 72, 12, generator, x_dtype, table_dtype)
    got = ours(*values, picks, "gelu")
    assert [value.dtype for value in got] == [x_dtype, torch.float32, x_dtype, x_dtype] + [torch.float32] * 2
    close(got, plain(*values, picks, "gelu"), tolerance)
    _, pre, _, _, *grads = got
    close((pre, *grads), (lambda w: (w[1], w[4], w[5]))(plain(*values, picks, "gelu")), 2e-6)


@runs_kernels
@pytest.mark.parametrize("dim", [412, 1000, 1280, pytest.param(4096, marks=pytest.mark.slow)])
@pytest.mark.parametrize("way", ["token-major", "by expert"])
def test_dims_of_models(way, dim, monkeypatch):
    for name, value in (WAYS[way] | {"_l2_bytes": lambda device: 10000}).items():
        monkeypatch.setattr(kernels, name, value)
    generator = torch.Generator().manual_seed(dim)
    picks = picks_of([9, 0, 14], 12, generator)
    values = inputs(picks, dim, 12, generator, torch.bfloat16, torch.bfloat16)
    close(ours(*values, picks, "silu"), plain(*values, picks, "silu"), BF16)


@runs_kernels
@pytest.mark.parametrize("counts", [[512], [512, 1, 0, 511], []])
def test_many_picks_and_none(counts):
    generator = torch.Generator().manual_seed(9)
    picks = picks_of(counts, 40, generator)
    values = inputs(picks, 32, 40, generator, torch.float32, torch.float32)
    close(ours(*values, picks, "relu"), plain(*values, picks, "relu"), 2e-6)


@runs_kernels
def test_popular_experts_are_summed_in_pieces(monkeypatch):
    """Runs of a piece, one more, several and none, and pieces to spare."""
    monkeypatch.setattr(kernels, "PIECE", 8)
    launched = []
    launch = launching.launch
    monkeypatch.setattr(launching, "launch", lambda kernel, *a, **k: (launched.append(kernel), launch(kernel, *a, **k)))
    expert = torch.repeat_interleave(torch.tensor([0, 1, 2, 4, 5]), torch.tensor([8, 9, 40, 1, 16]))
    generator = torch.Generator().manual_seed(1)
    expert = expert[torch.randperm(74, generator=generator)].to(DEVICE)
    picks = Picks(torch.tensor([0, 30, 74], device=DEVICE), expert)
    values = inputs(picks, 24, 7, generator, torch.float64, torch.float64)
    close(ours(*values, picks, "gelu"), plain(*values, picks, "gelu"), 1e-13)
    assert kernels._pieces_kernel in launched


@runs_kernels
@pytest.mark.parametrize("add", [False, True])
def test_runs_of_one_program(add, monkeypatch):
    """Rows without picks among others, more rows than programs take evenly, and pieces that begin and end in a run."""
    monkeypatch.setattr(kernels, "PIECE", 4)
    launched = []
    launch = launching.launch
    monkeypatch.setattr(
        launching, "launch", lambda kernel, grid, *a, **k: launched.append(grid) or launch(kernel, grid, *a, **k)
    )
    counts = [0, 1, 0, 3, 13, 4, 0, 0, 1, 9, 0, 2, 0, 0, 1, 0, 0, 0, 1]
    expert = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    generator = torch.Generator().manual_seed(3)
    for rows, each in ((19, 4), (53, 8), (18, 4)):
        chosen = expert[expert < rows]
        picks = Picks.even(chosen[torch.randperm(len(chosen), generator=generator)].to(DEVICE)[:, None])
        x, dy, gate, *_ = inputs(picks, 10, rows, generator, torch.float64, torch.float64)
        out = [torch.full((rows, 10), 2.0 * add, dtype=torch.float64, device=DEVICE) for _ in range(2)]
        got = kernels.table_grads([(gate, x), (gate * 2, dy)], picks, rows, out=out if add else None)
        assert launched[-1][0] == -(-rows // each)
        for grad, start, weight, source in zip(got, out, (gate, gate * 2), (x, dy)):
            want = torch.full_like(start, 2.0 * add).index_add(0, picks.expert, weight[:, None] * source)
            torch.testing.assert_close(grad, want, rtol=1e-13, atol=1e-13)


@runs_kernels
@pytest.mark.parametrize("way", WAYS)
def test_two_runs_give_the_same_bits(way, monkeypatch):
    for name, value in (WAYS[way] | {"PIECE": 8}).items():
        monkeypatch.setattr(kernels, name, value)
    generator = torch.Generator().manual_seed(2)
    picks = picks_of([30, 7, 0, 41], 6, generator)
    values = inputs(picks, 40, 6, generator, torch.bfloat16, torch.bfloat16)
    first, again = (ours(*values, Picks(picks.offsets, picks.expert.view(-1)), "gelu") for _ in range(2))
    assert all(a.equal(b) for a, b in zip(first, again))


@runs_kernels
def test_gradients_in_the_tables_dtype():
    generator = torch.Generator().manual_seed(4)
    picks = picks_of([5, 9], 10, generator)
    x, dy, *_ = inputs(picks, 48, 10, generator, torch.bfloat16, torch.bfloat16)
    pairs = [(torch.randn(14, generator=generator).to(DEVICE), each) for each in (x, dy)]
    wide = kernels.table_grads(pairs, picks, 10)
    low = kernels.table_grads(pairs, picks, 10, dtype=torch.bfloat16)
    rows, sparse = kernels.sparse_table_grads(pairs, picks, 10, dtype=torch.bfloat16)
    sums = tuple(grad.clone() for grad in low)
    kernels.table_grads(pairs, picks, 10, out=sums)
    for a, b, c, d in zip(wide, low, sparse, sums):
        assert b.dtype == c.dtype == d.dtype == torch.bfloat16
        close([b], [a.double()], BF16)
        close([d], [2 * a.double()], 2 * BF16)
        assert c.equal(b[rows])


@runs_kernels
@pytest.mark.parametrize("way", WAYS)
def test_the_halves_alone(way, monkeypatch):
    """What column slices call: partial dots add up to the dots, and the mix of a slice is a slice of the mix."""
    for name, value in WAYS[way].items():
        monkeypatch.setattr(kernels, name, value)
    generator = torch.Generator().manual_seed(6)
    picks = picks_of([11, 0, 40, 2, 3], 8, generator)
    x, _, weight, down, up = inputs(picks, 60, 8, generator, torch.float64, torch.float64)
    want = (x[picks.token] * down[picks.expert]).sum(-1)
    parts = [slice(0, 32), slice(32, 60)]
    partial = [kernels.dots(x[:, part], down[:, part].contiguous(), picks) for part in parts]
    torch.testing.assert_close(partial[0] + partial[1], want)
    mixed = torch.cat([kernels.mix(weight, up[:, part].contiguous(), picks) for part in parts], 1)
    torch.testing.assert_close(mixed, torch.zeros_like(x).index_add(0, picks.token, weight[:, None] * up[picks.expert]))
    assert kernels.mix(weight, up, picks, dtype=torch.bfloat16).dtype == torch.bfloat16


@runs_kernels
@pytest.mark.parametrize("codes", CODES.values(), ids=CODES)
def test_every_code_of_eight_bits_is_read_exactly(codes):
    """But for e4m3's NaN, which no row that was rounded has."""
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(codes)[:, None]
    scales = torch.ldexp(torch.ones(256), torch.arange(256) % 219 - 100)
    finite = dequantised(every, scales).isfinite()[:, 0]
    table = EightBit(every[finite].to(DEVICE), scales[finite].to(DEVICE))
    picks = Picks.even(torch.arange(len(table.codes), device=DEVICE)[:, None])
    got = kernels.dots(torch.ones(len(table.codes), 1, device=DEVICE), table, picks)
    assert got.equal(dequantised(*table)[:, 0])
    assert kernels.mix(torch.ones_like(got), table, picks).equal(dequantised(*table))
    assert len(table.codes) == (256 if codes == torch.int8 else 254)


def eight_bit(values, codes, generator):
    """Rows of very different scales, and one of zeros."""
    values = values.cpu().float() * 10.0 ** torch.randint(-4, 4, (len(values), 1), generator=generator)
    values[len(values) // 2] = 0
    bits = torch.randint(2**16, values.shape, dtype=torch.int32, generator=generator)
    return EightBit(*(part.to(DEVICE) for part in quantised(values, codes, bits)))


@runs_kernels
@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=6 if INTERPRETED else 3, deadline=None)
@given(
    codes=st.sampled_from(list(CODES.values())),
    x_dtype=st.sampled_from([(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, BF16)]),
    counts=st.lists(st.sampled_from([0, 1, 3, 33]), max_size=5),
    dim=st.sampled_from([1, 3, 16, 50, 103]),
    activation=st.sampled_from(list(ACTIVATIONS)),
    seed=st.integers(0, 2**20),
)
def test_tables_of_eight_bits(way, codes, x_dtype, counts, dim, activation, seed):
    """Both passes, by the values of their rows in float64; sums are those of other tables."""
    dtype, tolerance = x_dtype
    generator = torch.Generator().manual_seed(seed)
    picks = picks_of(counts, 9, generator)
    x, dy, gate, down, up = inputs(picks, dim, 9, generator, dtype, torch.float64)
    tables = [eight_bit(table, codes, generator) for table in (down, up)]
    want_y, want_pre, want_dx, want_dgate, *_ = plain(
        x, dy, gate, *(dequantised(*t) for t in tables), picks, activation
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in WAYS[way].items():
            patch.setattr(kernels, name, value)
        y, pre = kernels.forward(x, picks, gate, *tables, activation)
        dx, dgate, dpre, hidden = kernels.backward(dy, x, picks, pre, gate, *tables, activation)
    assert [value.dtype for value in (y, dx, dgate)] == [dtype] * 3
    assert {value.dtype for value in (pre, dpre, hidden)} == {torch.promote_types(dtype, torch.float32)}
    close([y, pre, dx, dgate], [want_y, want_pre, want_dx, want_dgate], tolerance)
    wanted_hidden = ACTIVATIONS[activation](want_pre) * gate.double()
    close([hidden], [wanted_hidden], max(tolerance, 4e-6))


@runs_kernels
def test_tables_of_eight_bits_are_served(monkeypatch):
    table = EightBit(*quantised(torch.randn(4, 8), torch.int8))
    there = EightBit(*(part.to(DEVICE) for part in table))
    assert launching.available(torch.zeros(2, 8, device=DEVICE), there)
    assert not launching.available(there.codes)
    assert not launching.available(EightBit(there.codes[:, :0], there.scales))
    assert launching.available(table) is INTERPRETED
    if DEVICE == "cuda":
        assert package.backend(torch.zeros(2, 8, device=DEVICE), there) is package.triton


@runs_kernels
@pytest.mark.parametrize("sparse", [False, True])
def test_behind_expert_mix(sparse, monkeypatch):
    monkeypatch.setattr(package, "backend", lambda *tensors: kernels)
    generator = torch.Generator().manual_seed(8)
    picks = picks_of([4, 0, 9], 6, generator)
    x, dy, *tables = inputs(picks, 20, 6, generator, torch.bfloat16, torch.float32)
    leaves = [value.clone().requires_grad_() for value in (x, *tables)]
    y = package.expert_mix(leaves[0], picks, *leaves[1:], "gelu", sparse)
    grads = torch.autograd.grad(y, leaves, dy)
    assert [grad.is_sparse for grad in grads] == [False, False, sparse, sparse]
    got = [grad.to_dense() if grad.is_sparse else grad for grad in grads]
    want_y, _, *want = plain(x, dy, *tables, picks, "gelu")
    close([y, *got], [want_y, *want], BF16)


@runs_kernels
@pytest.mark.parametrize(("way", "sorted_forward"), [("token-major", 0), ("by expert", 1)])
def test_a_step_sorts_once(way, sorted_forward, monkeypatch):
    """In the forward pass, where that takes picks by expert, or in the backward pass."""
    for name, value in WAYS[way].items():
        monkeypatch.setattr(kernels, name, value)
    monkeypatch.setattr(package, "backend", lambda *tensors: kernels)
    sorts, of = [], ByExpert.of
    monkeypatch.setattr(ByExpert, "of", lambda picks: sorts.append(picks) or of(picks))
    picks = picks_of([4, 0, 9], 6, generator := torch.Generator().manual_seed(8))
    leaves = [value.requires_grad_() for value in inputs(picks, 40, 6, generator, torch.float32, torch.float32)]
    x, dy, *tables = leaves
    y = package.expert_mix(x, picks, *tables, "gelu")
    assert len(sorts) == sorted_forward
    torch.autograd.grad(y, [x, *tables], dy)
    assert len(sorts) == 1


@runs_kernels
@pytest.mark.parametrize("sparse", [False, True])
def test_behind_value_mix(sparse, monkeypatch):
    monkeypatch.setattr(package, "backend", lambda *tensors: kernels)
    generator = torch.Generator().manual_seed(9)
    picks = picks_of([4, 0, 9], 6, generator)
    _, dy, gate, values, _ = inputs(picks, 20, 6, generator, torch.float32, torch.bfloat16)
    leaves = [value.clone().requires_grad_() for value in (gate, values)]
    y = package.value_mix(*leaves, picks, sparse)
    grads = torch.autograd.grad(y, leaves, dy)
    assert [grad.is_sparse for grad in grads] == [False, sparse]
    exact = [value.double().requires_grad_() for value in (gate, values)]
    want = dy.new_zeros(3, 20, dtype=torch.float64).index_add(
        0, picks.token, exact[0][:, None] * exact[1][picks.expert]
    )
    got = [y, *(grad.to_dense() if grad.is_sparse else grad for grad in grads)]
    close(got, [want, *torch.autograd.grad(want, exact, dy.double())], BF16)


@runs_kernels
def test_mistakes_are_named():
    picks = picks_of([2], 4, torch.Generator().manual_seed(0))
    x, dy, gate, down, up = inputs(picks, 8, 4, torch.Generator().manual_seed(0), torch.float32, torch.float32)
    with pytest.raises(ValueError, match="activation must be one of"):
        kernels.forward(x, picks, gate, down, up, "tanh")
    with pytest.raises(ValueError, match="contiguous"):
        kernels.dots(x[:, :4], down[:, :4], picks)
    with pytest.raises(ValueError, match="out must be"):
        kernels.table_grads([(gate, x), (gate, dy)], picks, 5, out=(down, up))


SIZES = [(1, 1000), (16, 1024), (100, 1000), (512, 412)] if INTERPRETED else itertools.product(
    [1, 16, 100, 512], [412, 1000, 1024]
)  # fmt: skip


@runs_kernels
@pytest.mark.parametrize(("each", "dim"), SIZES)
def test_picks_of_a_token(dim, each):
    """Tables that are read row by row and, with eight and more picks a row, by expert."""
    tokens = 1 if INTERPRETED else 256
    generator = torch.Generator().manual_seed(each)
    picks = picks_of([each] * tokens, 64 if INTERPRETED else 2**14, generator)
    rows = 64 if INTERPRETED else 2**14
    values = inputs(picks, dim, rows, generator, torch.bfloat16, torch.bfloat16)
    close(ours(*values, picks, "gelu"), plain(*values, picks, "gelu"), BF16)


@runs_kernels
def test_offsets_beyond_two_to_the_31():
    """Of tables and of tokens. Interpreted, they are memory that is hardly touched; a GPU needs 17 GB."""
    many, dim = 2**19 + 2, 4096
    last = many - 1
    down, up = (torch.empty(many, dim, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    picks = Picks.even(torch.tensor([[last, 0, 7], [last - 1, last, 1]], device=DEVICE))
    for table in (down, up):
        table[picks.expert] = torch.randn(6, dim, dtype=torch.bfloat16, device=DEVICE)
    x, gate = torch.randn(2, dim, dtype=torch.bfloat16, device=DEVICE), torch.rand(6, device=DEVICE)
    small = Picks(picks.offsets, torch.arange(6, device=DEVICE)), down[picks.expert], up[picks.expert]
    y, pre = kernels.forward(x, picks, gate, down, up, "gelu")
    want = kernels.forward(x, small[0], gate, *small[1:], "gelu")
    assert y.equal(want[0])
    got = kernels.backward(x, x, picks, pre, gate, down, up, "gelu")
    for one, other in zip(got, kernels.backward(x, x, small[0], pre, gate, *small[1:], "gelu")):
        assert one.equal(other)
    # `down` as tokens, the last of which picks three rows of `x`
    offsets = torch.zeros(many + 1, dtype=torch.int64, device=DEVICE)
    offsets[-1] = 3
    few = Picks(offsets, torch.tensor([1, 0, 1], device=DEVICE))
    dots = kernels.dots(down, x, few)
    torch.testing.assert_close(dots, (down[last].float() * x[few.expert].float()).sum(1), rtol=1e-4, atol=1e-3)
    (grad,) = kernels.table_grads([(gate[:3], down)], few, 2)
    torch.testing.assert_close(grad, torch.stack([gate[1], gate[0] + gate[2]])[:, None] * down[last].float())
    if DEVICE == "cuda":  # half a million programs
        (ddown,) = kernels.table_grads([(gate, x)], picks, many, dtype=torch.bfloat16)
        want = gate[0] * x[0].float() + gate[4] * x[1].float()
        torch.testing.assert_close(ddown[last].float(), want, rtol=1e-2, atol=1e-2)
        assert kernels.mix(gate[:3], x, few)[last].equal(kernels.mix(gate[:3], x, Picks(offsets[-2:], few.expert))[0])


@compiles
def test_serves_cuda_tensors_alone():
    assert not launching.available(torch.zeros(2))
    assert launching.available()


@runs_kernels
def test_serves_floating_dtypes():
    assert launching.available(torch.zeros(2, device=DEVICE), torch.zeros(2, dtype=torch.bfloat16, device=DEVICE))
    assert not launching.available(torch.zeros(2, dtype=torch.int64, device=DEVICE))


@compiles
def test_importable_without_triton():
    code = "import sys; sys.modules['triton'] = None; from peer_dist.kernels import triton; print(triton.available())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize(
    ("tokens", "rows", "expected"),
    [
        (8192, 2**20, False),  # one pick a row
        (8192, 2**15, True),  # 32 picks a row
        (8192, 2**18, True),  # 4 picks a row
        (8192, 2**12, False),  # the tables stay in L2 as they are
        (2**18, 2**20, False),  # 32 picks a row, but slices that stay in L2 would be 16 bytes
    ],
)
def test_order_is_chosen_by_bytes(tokens, rows, expected):
    """At 128 picks a token, d = 1024, bf16."""
    x, table = (torch.empty(n, 1024, dtype=torch.bfloat16, device="meta") for n in (tokens, rows))
    picks = Picks.even(torch.empty(tokens, 128, dtype=torch.int64, device="meta"))
    assert kernels._fused(x, table, picks, "gelu") is not expected


@compiles
@pytest.mark.parametrize("dim", [64, 5])
def test_no_part_of_the_tokens_compiles_a_kernel_again(dim, monkeypatch):
    """Parts begin anywhere: what a kernel is compiled for must not depend on where, nor on how many picks there are."""
    variants = [set(), set()]
    for count, variant in zip((1, 3), variants):  # picks of the first token, in front of the part

        def record(kernel, grid, *args, num_warps, variant=variant, **constants):
            kinds = [
                (parameter.name, value.dtype, parameter.do_not_specialize_on_alignment or value.data_ptr() % 16)
                if isinstance(value, torch.Tensor)
                else (parameter.name, None if value is None else parameter.do_not_specialize or value)
                for parameter, value in zip(kernel.params, args)
            ]
            variant.add((kernel.__name__, str(kinds), num_warps, str(constants)))

        monkeypatch.setattr(launching, "launch", record)
        generator = torch.Generator().manual_seed(0)
        picks = picks_of([count, 600 + count], 8, generator)
        x, dy, gate, down, up = (v.cpu() for v in inputs(picks, dim, 8, generator, torch.bfloat16, torch.bfloat16))
        x, dy, gate = x[1:], dy[1:], gate[count:]
        part = Picks((picks.offsets[1:] - count).cpu(), picks.expert[count:].cpu())
        _, pre = kernels.forward(x, part, gate, down, up, "gelu")
        _, _, dpre, hidden = kernels.backward(dy, x, part, pre, gate, down, up, "gelu")
        kernels.mix(kernels.dots(x, down, part), up, part)
        kernels.table_grads([(dpre, x), (hidden, dy)], part, 8)
    assert variants[0] == variants[1]


@compiles
@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cuda", reason="the kernels run on the GPU")
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_through_the_interpreter(which):
    run_interpreted(__file__, which)


# ---------------------------------------------------------------------------------------------------------------------
# Ahead-of-time compilation: what the launcher would run, recorded and compiled for a GPU that need not be here.

STACK = {(64, 100): 8}  # bytes that ptxas 13 spills of 16-bit rows so narrow, to stay at 96 registers a thread


GRADIENTS = {"_pieces_kernel", "_runs_kernel"}  # whose tables are not read


def launched(dtype, dim, monkeypatch):
    """Every distinct launch at this dtype and dim; with tables of eight bits tokens are bfloat16."""
    eight = dtype in CODES.values()
    generator = torch.Generator().manual_seed(0)

    def call():
        for way, count in (("token-major", 400), ("token-major", 4), ("by expert", 4)):
            picks = picks_of([count, count], 8, generator)
            kind = torch.bfloat16 if eight else dtype
            x, dy, gate, down, up = (v.to("cpu") for v in inputs(picks, dim, 8, generator, kind, kind))
            if eight:
                down, up = (quantised(table.float(), dtype) for table in (down, up))
            with monkeypatch.context() as patch:
                patch.setattr(kernels, "EXPERT_MAJOR", WAYS[way]["EXPERT_MAJOR"])
                if way == "by expert":
                    fourth = dim * 8 * dtype.itemsize // 4  # of the table
                    patch.setattr(kernels, "_l2_bytes", lambda device, fourth=fourth: fourth)
                for activation in ACTIVATIONS if (dim, dtype) == (1024, torch.bfloat16) else ("gelu",):
                    _, pre = kernels.forward(x, picks, gate, down, up, activation)
                    kernels.backward(dy, x, picks, pre, gate, down, up, activation)
                kernels.mix(kernels.dots(x, down, picks), up, picks)
                for pairs in () if eight else ([(pre, x), (pre, dy)], [(pre, dy)]):
                    kernels.table_grads(pairs, picks, 8, dtype=dtype)
                    kernels.table_grads(pairs, picks, 8, out=[torch.zeros(8, dim) for _ in pairs])
                if not eight:
                    kernels.table_grad(pre, x, picks, torch.zeros(8, dim))

    return launches(call, monkeypatch)


def check_compilation(dtype, dim, capability, monkeypatch, folder):
    needs_assembler(capability)
    most = {}  # by kernel: registers, bytes spilled and bytes of shared memory
    for launch in launched(dtype, dim, monkeypatch):
        kernel, _, num_warps, constants = launch
        binary = compiled(launch, capability)
        registers, stack = resources(binary, folder)
        name = f"{kernel.__name__} {constants}"
        print(f"sm_{capability} {num_warps} warps {registers:3d} registers {binary.metadata.shared:5d} shared {name}")
        assert stack <= STACK.get((dim, capability), 0), f"{name} spills: {stack} bytes of stack"
        assert binary.metadata.shared <= SHARED_LIMIT[capability], name
        assert registers * num_warps * 32 <= 65536 // 2, f"{name}: fewer than two programs fit a multiprocessor"
        row_offsets = re.findall(r"arith\.(?:muli|shli) .*: tensor<\d+x1xi(\d+)>", binary.asm["ttir"])
        assert set(row_offsets) == {"64"}, f"{name}: offsets of rows must be 64 bits wide"
        if dim * dtype.itemsize % 16 == 0:
            assert re.search(r"ld\.global\S*\.v4\.[buf]32", binary.asm["ptx"]), f"{name}: loads are not 16 bytes wide"
        used = registers, stack, binary.metadata.shared
        most[kernel.__name__] = tuple(map(max, used, most.get(kernel.__name__, used)))
    others = {"_token_kernel"} if dim > kernels.MAX_BLOCK_D else set()
    others |= GRADIENTS if dtype in CODES.values() else set()
    assert most.keys() == {name for name in vars(kernels) if name.endswith("_kernel")} - others
    return most


@compiles
def test_table_of_resources(monkeypatch, tmp_path):
    """The one in docs/performance.md, of rows of 1024."""
    page = (Path(__file__).parent.parent / "docs" / "performance.md").read_text()
    version = re.search(r"compiled by Triton (\S+):", page)[1]
    if version != triton.__version__:
        pytest.skip(f"the table is of Triton {version}")
    cases = list(itertools.product([torch.bfloat16, torch.float32], [80, 90, 100]))
    cases += [(codes, 90) for codes in CODES.values()]
    columns = [check_compilation(dtype, 1024, capability, monkeypatch, tmp_path) for dtype, capability in cases]
    formats = {codes: name for name, codes in CODES.items()}
    names = [f"{formats.get(dtype, str(dtype).rpartition('.')[2])}, sm_{capability}" for dtype, capability in cases]
    lines = [["kernel", *names], ["---"] * (1 + len(names))]
    for kernel in sorted(columns[0]):
        used = (column.get(kernel) for column in columns)
        lines.append([f"`{kernel}`", *("-" if most is None else "{} / {} / {}".format(*most) for most in used)])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    assert table in page, f"docs/performance.md needs this table:\n{table}"


@compiles
@pytest.mark.parametrize(
    ("dtype", "dim", "capability"),
    [
        *itertools.product([torch.float32, torch.bfloat16], [256, 1024, 4096], [80, 90]),
        (torch.bfloat16, 1024, 100),
        *itertools.product(CODES.values(), [1024], [80, 90, 100]),
    ],
    ids=str,
)
def test_compiles_without_spills(dtype, dim, capability, monkeypatch, tmp_path):
    check_compilation(dtype, dim, capability, monkeypatch, tmp_path)


@compiles
@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "dim", "capability"),
    [
        *itertools.product(
            [torch.float32, torch.bfloat16, torch.float16, *CODES.values()],
            [64, 100, 412, 512, 1000, 1280, 2048, 8192],
            [80, 90, 100],
        ),
        *itertools.product([torch.float32, torch.bfloat16, torch.float16], [256, 1024, 4096], [100]),
        *itertools.product(CODES.values(), [256, 4096], [80, 90, 100]),
    ],
    ids=str,
)
def test_compiles_at_any_dim(dtype, dim, capability, monkeypatch, tmp_path):
    """Any even one: odd rows are read element by element, and float16 ones spill some bytes there."""
    check_compilation(dtype, dim, capability, monkeypatch, tmp_path)
