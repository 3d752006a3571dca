"""expert_mix against ten lines of plain PyTorch, on every backend."""

import ctypes
import math
import os
import platform
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peer_dist.kernels import (
    Picks,
    allocation,
    expert_mix,
    mkl,
    native,
    reference,
    table_grad,
    top_pairs,
    value_mix,
)
from tests.definitions import ACTIVATIONS


def plain(x, token, expert, gate, down, up, activation):
    hidden = ACTIVATIONS[activation]((x[token] * down[expert]).sum(-1)) * gate
    return torch.zeros_like(x).index_add(0, token, hidden[:, None] * up[expert])


def case(tokens, dim, rows, most, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, most + 1, (tokens,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    expert = torch.randint(rows, (int(offsets[-1]),), generator=generator)  # a row may repeat in a token
    values = [
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((tokens, dim), (expert.numel(),), (rows, dim), (rows, dim))
    ]
    return Picks(offsets, expert), values


@pytest.fixture
def two_threads():
    """Parallel loops share their work between threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["native", "mkl", "reference"])
def backend(request, monkeypatch):
    """Each CPU backend in turn, by hiding those that would be chosen before it."""
    if request.param != "reference":  # whose many small steps share nothing
        request.getfixturevalue("two_threads")
    if request.param != "native":
        monkeypatch.setattr(native, "available", lambda *tensors: False)
    if request.param == "reference":
        monkeypatch.setattr(mkl, "available", lambda *tensors: False)
        monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 64)  # many chunks
    return request.param


@pytest.mark.parametrize("sparse", [False, True])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tokens=st.sampled_from([0, 1, 2, 7, 33]),
    dim=st.sampled_from([1, 3, 16, 50, 103, 412, 1000, 1280]),
    rows=st.sampled_from([1, 2, 9, 64]),
    most=st.sampled_from([0, 1, 5, 40, 512]),
    activation=st.sampled_from(list(ACTIVATIONS)),
    seed=st.integers(0, 2**20),
)
def test_forward_and_gradients(backend, sparse, tokens, dim, rows, most, activation, seed):
    dtype = torch.float32 if backend == "native" else torch.float64
    tolerance = 1e-4 if backend == "native" else 1e-12  # of float32 sums that may cancel
    picks, values = case(tokens, dim, rows, most, dtype, seed)
    x, gate, down, up = values
    assert native.available(x, down, up) == (backend == "native")
    y = expert_mix(x, picks, gate, down, up, activation, sparse)
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, values, dy)
    assert got[2].is_sparse == sparse
    exact = [v.detach().double().requires_grad_() for v in values]
    want_y = plain(exact[0], picks.token, picks.expert, exact[1], exact[2], exact[3], activation)
    want = torch.autograd.grad(want_y, exact, dy.double())
    for g, w in zip((y, *got), (want_y, *want)):
        g = g.to_dense() if g.is_sparse else g
        assert g.dtype == dtype
        scale = float(w.detach().abs().max()) if w.numel() else 1.0
        torch.testing.assert_close(g.double(), w, rtol=tolerance, atol=tolerance * max(1.0, scale))


@pytest.fixture(params=["this processor", "any processor"])
def compiled(request, two_threads, monkeypatch, tmp_path):
    """native.c for this processor, and as compiled where there are none of its vector instructions."""
    if request.param == "any processor":
        if platform.machine() not in ("x86_64", "AMD64"):
            pytest.skip("its flag is for x86")
        flags = tuple("-march=x86-64" if flag == "-march=native" else flag for flag in native.FLAGS)
        monkeypatch.setattr(native, "FLAGS", flags)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        native.load_library.cache_clear()
    yield
    if request.param == "any processor":
        native.load_library.cache_clear()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    queries=st.integers(0, 5), n=st.sampled_from([1, 2, 15, 16, 17, 63, 64, 100, 257, 1024, 1500]),
    kind=st.sampled_from(["normal", "ties", "equal", "nan", "all nan", "infinite", "ascending"]),
    seed=st.integers(0, 2**20), data=st.data(),
)  # fmt: skip
def test_top_pairs(compiled, queries, n, kind, seed, data):
    top_k = data.draw(st.sampled_from([k for k in (1, 2, 3, 8, 16, 17, 33, 64) if k <= n]))
    generator = torch.Generator().manual_seed(seed)
    halves = torch.randn(2, queries, n, generator=generator)
    if kind == "ties":
        halves = (2 * halves).round() / 4
    elif kind == "equal":
        halves = torch.zeros_like(halves)
    elif kind == "nan":
        halves[torch.rand(halves.shape, generator=generator) < 0.01] = math.nan
    elif kind == "all nan":
        halves[1] = math.nan
    elif kind == "infinite":
        halves[torch.rand(halves.shape, generator=generator) < 0.7] = -math.inf
    elif kind == "ascending":
        halves = halves.sort(-1).values
    assert native.searches(halves[0], top_k)
    number, score = top_pairs(*halves, top_k)
    want = reference.top_pairs(*halves, top_k)[1]
    torch.testing.assert_close(score, want, rtol=0, atol=0, equal_nan=True)
    assert ((number >= 0) & (number < n * n)).all()
    sums = halves[0].gather(1, number // n) + halves[1].gather(1, number % n)
    torch.testing.assert_close(sums, score, rtol=0, atol=0, equal_nan=True)
    ordered = number.sort().values
    assert (ordered[:, 1:] != ordered[:, :-1]).all()


def test_more_picks_of_a_head_than_the_search_in_c_holds(backend):
    halves = torch.randn(2, 3, 80)
    assert not native.searches(halves[0], 65)
    torch.testing.assert_close(top_pairs(*halves, 65), reference.top_pairs(*halves, 65))


@pytest.mark.parametrize("rows", [1, 7, 3000, 5_000_000])
def test_picks_grouped_by_row(rows):
    """As a stable sort does, with one, two and three digits."""
    generator = torch.Generator().manual_seed(rows)
    counts = torch.randint(0, 40, (200,), generator=generator)
    offsets = F.pad(counts.cumsum(0), (1, 0))
    picks = Picks(offsets, torch.randint(rows, (int(offsets[-1]),), generator=generator))
    picks.expert[0] = rows - 1
    touched, order, token, starts = native._group(picks, rows)
    assert order.equal(picks.by_expert.pick)
    assert token.equal(picks.by_expert.token)
    for got, want in zip((touched, starts), picks.segments):
        assert got.equal(want.long())


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stream", [False, True])
def test_table_gradients_as_written_by_any_processor(compiled, sparse, dtype, stream, monkeypatch):
    """Rows that begin at whole cache lines and others, past the caches and not, with a NaN and a row never picked."""
    monkeypatch.setattr(native, "STREAM_BYTES", -1 if stream else 1 << 60)
    for dim in (64, 100, 256):
        picks, (x, gate, down, up) = case(50, dim, 40, 9, torch.float32, dim)
        x.data[3, 5] = math.nan
        tables = [table.detach().to(dtype).requires_grad_() for table in (down, up)]
        y = expert_mix(x, picks, gate, *tables, "gelu", sparse)
        got = torch.autograd.grad(y, tables, torch.ones_like(y))
        exact = [table.detach().double().requires_grad_() for table in tables]
        want_y = plain(x.double(), picks.token, picks.expert, gate.double(), *exact, "gelu")
        for g, w in zip(got, torch.autograd.grad(want_y, exact, torch.ones_like(want_y))):
            g = g.to_dense() if g.is_sparse else g
            assert g.isnan().any()
            assert not g.isnan().all()
            tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 8e-3, "atol": 1e-3}
            torch.testing.assert_close(g.double(), w, **tolerance, equal_nan=True)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activations_in_c(compiled, activation):
    """Value and slope from far below to far above zero, as exact as float32 allows."""
    pre = torch.cat([torch.linspace(-120, 120, 4001), torch.linspace(-6, 6, 4001), torch.tensor([0.0, -0.0, 1e-30])])
    x, one = pre[:, None].clone().requires_grad_(), torch.ones(1, 1)
    y = expert_mix(
        x, Picks.even(torch.zeros(len(pre), 1, dtype=torch.int64)), torch.ones(len(pre)), one, one, activation
    )
    exact = pre.double().requires_grad_()
    want = ACTIVATIONS[activation](exact)
    torch.testing.assert_close(y[:, 0].double(), want, rtol=1e-6, atol=1e-6)
    slopes = torch.autograd.grad(y.sum(), x)[0][:, 0].double(), torch.autograd.grad(want.sum(), exact)[0]
    torch.testing.assert_close(*slopes, rtol=1e-6, atol=1e-6)


def test_the_two_halves_of_any_backend(backend):
    """mix, and table_grad as its gradient, added to what is there."""
    picks, (x, weight, table, out) = case(30, 20, 9, 12, torch.float32, 6)
    x, weight, table, out = (value.detach() for value in (x, weight, table, out))
    want = torch.zeros(30, 20).index_add(0, picks.token, weight[:, None] * table[picks.expert])
    torch.testing.assert_close(value_mix(weight, table, picks), want, rtol=1e-5, atol=1e-5)
    want = out.index_add(0, picks.expert, weight[:, None] * x[picks.token])
    table_grad(weight, x, picks, out)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sparse", [False, True])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tokens=st.sampled_from([0, 1, 7, 33]),
    dim=st.sampled_from([1, 16, 103, 1000]),
    rows=st.sampled_from([1, 2, 64]),
    most=st.sampled_from([0, 1, 5, 200]),
    table_dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 2**20),
)
def test_values_and_their_gradients(backend, sparse, tokens, dim, rows, most, table_dtype, seed):
    wide = torch.promote_types(table_dtype, torch.float32)
    picks, (dy, gate, values, _) = case(tokens, dim, rows, most, wide, seed)
    leaves = gate, values.detach().to(table_dtype).requires_grad_()
    y = value_mix(*leaves, picks, sparse)
    dgate, dvalues = torch.autograd.grad(y, leaves, dy.detach())
    assert (y.dtype, dgate.dtype, dvalues.dtype, dvalues.is_sparse) == (wide, wide, table_dtype, sparse)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    want = torch.zeros(tokens, dim, dtype=torch.float64)
    want = want.index_add(0, picks.token, exact[0][:, None] * exact[1][picks.expert])
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 1e-2}
    for got, expected in zip((y, dgate, dvalues), (want, *torch.autograd.grad(want, exact, dy.detach().double()))):
        close = tolerance[got.dtype]
        got = got.to_dense() if got.is_sparse else got
        scale = float(expected.detach().abs().max()) if expected.numel() else 1.0
        torch.testing.assert_close(got.double(), expected, rtol=close, atol=close * max(1.0, scale))


def test_large_gradients_use_their_memory_again():
    """Only once nothing refers to it, a view neither; memory of another size is given back."""
    rows, dim = allocation._LARGE // 256, 128
    first = allocation.gradient_memory(rows, dim, torch.float32)
    place = first.data_ptr()
    view = first.view(-1)[7:]
    second = allocation.gradient_memory(rows, dim, torch.float32)
    assert second.data_ptr() != place
    first.fill_(1)
    second.fill_(2)
    assert (first == 1).all()
    del first
    third = allocation.gradient_memory(rows, dim, torch.float32)
    assert third.data_ptr() != place
    assert view[0] == 1
    del view
    fourth = allocation.gradient_memory(rows - 3, dim, torch.float32)
    assert fourth.data_ptr() == place
    assert fourth.shape == (rows - 3, dim)
    del second, third, fourth
    assert len(allocation._idle) >= 3
    large = allocation.gradient_memory(8 * rows, dim, torch.bfloat16)
    assert allocation._idle == []
    assert large.is_contiguous()
    assert allocation.gradient_memory(3, dim, torch.bfloat16).untyped_storage().nbytes() == 6 * dim


def strided(tokens, each, rows):
    """Index tensors of the same shape that are views of others: of every kind of stride."""
    wide = torch.randint(rows, (tokens, 3 * each))
    yield torch.randint(rows, (each, tokens)).T
    yield wide[:, ::3]
    yield wide[:, :each]
    yield wide[:1, :each].expand(tokens, each)
    yield wide[:, :1].expand(tokens, each)
    yield torch.tensor(rows - 1).expand(tokens, each)


@pytest.mark.parametrize(("tokens", "each"), [(5, 4), (1, 6), (6, 1)])
def test_index_tensors_may_be_views(backend, tokens, each):
    """Picks of a transposed, sliced or expanded tensor are those of its copy, forward and backward."""
    for expert in strided(tokens, each, 9):
        assert expert.shape == (tokens, each)
        # as small as in a layer: sums of larger ones cancel, and float32 leaves less of them than the bound asks for
        shapes = (tokens, 7), (tokens * each,), (9, 7), (9, 7)
        values = [torch.normal(0, 7**-0.5, shape).requires_grad_() for shape in shapes]
        y = expert_mix(values[0], Picks.even(expert), *values[1:], "gelu")
        token = torch.arange(tokens).repeat_interleave(each)
        want = plain(values[0], token, expert.contiguous().view(-1), *values[1:], "gelu")
        torch.testing.assert_close(y, want)
        dy = torch.normal(0, 7**-0.5, y.shape)
        for got, expected in zip(torch.autograd.grad(y, values, dy), torch.autograd.grad(want, values, dy)):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_nan_goes_through(backend, activation):
    """A token that is not a number makes its own output and gates' gradients so, and no other's."""
    picks, values = case(7, 20, 9, 5, torch.float32, 8)
    values[0].data[3] = math.nan
    y = expert_mix(values[0], picks, *values[1:], activation)
    want = plain(values[0], picks.token, picks.expert, *values[1:], activation)
    assert want.isnan().any(1).tolist() == [False] * 3 + [True] + [False] * 3
    torch.testing.assert_close(y, want, equal_nan=True)
    got, expected = (torch.autograd.grad(out.sum(), values[1])[0] for out in (y, want))
    torch.testing.assert_close(got, expected, equal_nan=True)


def test_a_second_derivative_is_refused(backend):
    picks, values = case(7, 20, 9, 5, torch.float32, 8)
    y = expert_mix(values[0], picks, *values[1:], "gelu")
    for grad in torch.autograd.grad(y.square().sum(), values, create_graph=True):
        with pytest.raises(RuntimeError, match="differentiated once"):
            grad.sum().backward(retain_graph=True)


def test_the_native_backend_is_built_here_and_missed_nowhere(monkeypatch, tmp_path):
    """It compiles into the user's cache; without a compiler, or with a broken one, MKL serves."""
    picks, (x, gate, down, up) = case(9, 20, 30, 6, torch.float32, 3)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.load_library.cache_clear()
    want = expert_mix(x, picks, gate, down, up, "gelu")
    assert len(list((tmp_path / "peer_dist").glob("expert_mix-*.so"))) == 1
    for compiler, path in (("false", os.environ["PATH"]), ("cc", "")):
        monkeypatch.setenv("CC", compiler)
        monkeypatch.setenv("PATH", path)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / compiler))
        native.load_library.cache_clear()
        assert not native.available(x, down, up)
        torch.testing.assert_close(expert_mix(x, picks, gate, down, up, "gelu"), want)
    native.load_library.cache_clear()


def test_the_native_backend_can_be_built_ahead(monkeypatch, tmp_path):
    """Where there is no compiler, or the cache cannot be written, the best library for the processor serves."""
    picks, (x, gate, down, up) = case(9, 20, 30, 6, torch.float32, 3)
    want = expert_mix(x, picks, gate, down, up, "gelu")
    monkeypatch.setattr(native, "BUILT", tmp_path / "built")
    made = native.build_ahead()
    loaded = []
    monkeypatch.setattr(native.ctypes, "CDLL", lambda path, load=ctypes.CDLL: loaded.append(Path(path)) or load(path))
    monkeypatch.setenv("PATH", "")
    usable = [path for path in made if native._LEVELS.get(native._ahead()[path], set()) <= _features()]
    for left in range(len(usable)):
        native.load_library.cache_clear()
        assert native.available(x, down, up)
        torch.testing.assert_close(expert_mix(x, picks, gate, down, up, "gelu"), want)
        assert loaded[-1] == usable[left]
        usable[left].unlink()
    monkeypatch.setattr(native, "cpu_features", lambda: "flags : fpu sse2")
    native.load_library.cache_clear()
    assert not native.available(x, down, up) or platform.machine() != "x86_64"
    native.load_library.cache_clear()


def _features() -> set[str]:
    return set(native.cpu_features().split())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_halves(dtype):
    """The halves apart, as the owners of column slices call them; and threads change nothing."""
    picks, (x, gate, down, _) = case(300, 37, 50, 60, torch.float32, 4)
    table = down.detach().to(dtype)
    x, gate = x.detach(), gate.detach()
    results = []
    for threads in (1, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        results.append((native.dots(x, table, picks), native.mix(gate, table, picks)))
        torch.set_num_threads(before)
    for one, three, want in zip(*results, (reference.dots(x, table, picks), reference.mix(gate, table, picks))):
        assert torch.equal(one, three)
        torch.testing.assert_close(one, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("x_dtype", "table_dtype"), [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "bfloat16")]
)
def test_low_precision_is_rounded_once(x_dtype, table_dtype):
    """Sums are kept in float32: the error is that of rounding inputs and output, not of the sum's length."""
    picks, values = case(20, 64, 30, 100, torch.float64, 5)
    dtypes = [getattr(torch, name) for name in (x_dtype, "float32", table_dtype, table_dtype)]
    low = [v.detach().to(dtype).requires_grad_() for v, dtype in zip(values, dtypes)]
    y = expert_mix(low[0], picks, *low[1:], "gelu")
    grads = torch.autograd.grad(y.float().square().sum(), low)
    exact = [v.detach().double().requires_grad_() for v in low]
    want = plain(exact[0], picks.token, picks.expert, *exact[1:], "gelu")
    want_grads = torch.autograd.grad(want.square().sum(), exact)
    assert y.dtype == low[0].dtype
    assert (y.double() - want).norm() / want.norm() < 4e-3
    for got, w, v in zip(grads, want_grads, low):
        assert got.dtype == v.dtype
        assert (got.double() - w).norm() / w.norm() < 1e-2


def test_nothing_of_tokens_by_picks_by_dim_is_made(backend, monkeypatch):
    """The largest tensor made in forward and backward is a table gradient, not the gathered rows."""
    tokens, each, dim, rows = 256, 64, 64, 1024
    expert = torch.randint(rows, (tokens, each))
    x, down, up = (torch.randn(n, dim, requires_grad=True) for n in (tokens, rows, rows))
    gate = torch.rand(tokens * each, requires_grad=True)
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 1 << 14)
    with torch.profiler.profile(profile_memory=True) as profile:
        expert_mix(x, Picks.even(expert), gate, down, up, "gelu").sum().backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest < tokens * each * dim * 4 / 4
