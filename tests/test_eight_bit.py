"""Tables of eight bits on a CPU: how rows are rounded, products over picks, and steps."""

import math
import platform

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import peer_dist.kernels as package
from peer_dist.kernels import Picks, dots, expert_mix, native, value_mix, value_table_grad
from peer_dist.kernels.eight_bit import EightBit, dequantised, let_scales, quantised
from peer_dist.kernels.pending import ask_for_sums, pending_sums
from peer_dist.kernels.rounding import Rounding, random_bits
from peer_dist.kernels.updates import Plain, Step, update_rows
from peer_dist.machine import cpu_features
from peer_dist.optim import TableOptimizer, TableRule
from tests.definitions import ACTIVATIONS

FORMATS = [torch.int8, torch.uint8]
"""The dtypes of codes; uint8 has the bits of float8_e4m3fn."""
LARGEST = {torch.int8: 127.0, torch.uint8: 448.0}
COLUMNS = [1, 3, 16, 17, 64, 103, 1025]
formats = pytest.mark.parametrize("dtype", FORMATS, ids=["int8", "e4m3"])


def rows_of_all_magnitudes(rows, columns, seed=0, least=-140, most=120):
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(least, most, (rows, 1), generator=generator)
    return torch.randn(rows, columns, generator=generator) * torch.exp2(exponents.float())


def steps_of(values, dtype, scales):
    """What lies between a value's neighbours among those that a row's codes stand for, in float64."""
    scaled = (values.double() / scales.double()[:, None]).abs()
    if dtype == torch.int8:
        return torch.ones_like(scaled) * scales.double()[:, None]
    exponents = scaled.clamp_min(2.0**-6).log2().floor()
    return torch.exp2(exponents - 3) * scales.double()[:, None]


@formats
@settings(max_examples=25, deadline=None)
@given(rows=st.integers(0, 20), columns=st.sampled_from([0, *COLUMNS]), seed=st.integers(0, 2**20))
def test_rows_are_rounded_to_the_nearest_under_the_least_scale(dtype, rows, columns, seed):
    values = rows_of_all_magnitudes(rows, columns, seed)
    codes, scales = quantised(values, dtype)
    assert codes.shape == values.shape
    assert codes.dtype == dtype
    assert (torch.frexp(scales).mantissa == 0.5).all()
    if columns:
        most = values.abs().amax(1).double()
        assert (most <= LARGEST[dtype] * scales.double()).all()
        assert ((most > LARGEST[dtype] * scales.double() / 2) | (scales == 2.0**-100) | (most == 0)).all()
    scaled = values / scales[:, None]
    if dtype == torch.int8:
        assert codes.equal(scaled.round().to(torch.int8))
    else:
        assert codes.equal(scaled.to(torch.float8_e4m3fn).view(torch.uint8))
    assert dequantised(codes, scales).bfloat16().float().equal(dequantised(codes, scales))


@formats
@settings(max_examples=25, deadline=None)
@given(rows=st.integers(0, 20), columns=st.sampled_from(COLUMNS), seed=st.integers(0, 2**20))
def test_rounding_at_random_goes_to_a_neighbour(dtype, rows, columns, seed):
    values = rows_of_all_magnitudes(rows, columns, seed)
    codes, scales = quantised(values, dtype, random_bits(seed, torch.arange(rows), range(columns)))
    read = dequantised(codes, scales)
    assert scales.equal(quantised(values, dtype).scales)
    assert ((read.double() - values.double()).abs() < steps_of(values, dtype, scales)).all()
    there = quantised(values, dtype)
    again = dequantised(*there)  # what has codes stays, whatever the bits
    bits = torch.full(values.shape, 65535, dtype=torch.int32)
    assert dequantised(*quantised(again, dtype, bits)).equal(again)


@formats
@pytest.mark.parametrize("value", [0.3, 1.0, 5.7, 100.2, 126.99, 0.0021, 1e-6, 0.0])
def test_rounding_at_random_has_the_value_as_its_mean(dtype, value):
    """Over all of the random bits there are."""
    values = torch.tensor([[LARGEST[dtype], value, -value]]).expand(65536, 3)
    bits = torch.arange(65536, dtype=torch.int32)[:, None].expand(65536, 3)
    codes, scales = quantised(values, dtype, bits)
    assert (scales == 1).all()
    read = dequantised(codes, scales).double()
    step = steps_of(values[:1], dtype, scales[:1])[0, 1]
    assert (read[:, 0] == LARGEST[dtype]).all()
    assert abs(read[:, 1].mean() - values[0, 1]) <= step * 2**-16
    assert read[:, 2].equal(-read[:, 1])


@formats
def test_nothing_saturates(dtype):
    """At the end of every scale's range, and just before and behind it."""
    ends = LARGEST[dtype] * torch.exp2(torch.arange(-130, 110).float())
    values = torch.cat([ends, ends.nextafter(torch.tensor(0.0)), ends.nextafter(torch.tensor(math.inf))])
    values = torch.stack([values, -values, values / 3], 1)
    for bits in (None, *(torch.full(values.shape, each, dtype=torch.int32) for each in (0, 32768, 65535))):
        codes, scales = quantised(values, dtype, bits)
        read = dequantised(codes, scales)
        assert ((read.double() - values.double()).abs() < steps_of(values, dtype, scales)).all()
        assert (read[:240, 0] == ends)[scales[:240] > 2.0**-100].all()


@formats
def test_rows_of_zeros_and_no_rows(dtype):
    for shape in ((3, 5), (0, 5), (3, 0), (0, 0)):
        codes, scales = quantised(torch.zeros(shape), dtype)
        assert codes.shape == shape
        assert scales.shape == shape[:1]
        assert dequantised(codes, scales).equal(torch.zeros(shape))
        assert (scales == 0.5).all()


@formats
@pytest.mark.parametrize("columns", COLUMNS)
def test_a_checkpoint_in_bfloat16_has_every_value(dtype, columns):
    bits = torch.randint(65536, (30, columns), dtype=torch.int32)
    codes, scales = quantised(rows_of_all_magnitudes(30, columns), dtype, bits)
    saved = dequantised(codes, scales).bfloat16()
    for loaded in (saved, saved[:, : columns // 2], saved[:, columns // 2 :]):  # slices have scales of their own
        assert dequantised(*quantised(loaded.float(), dtype)).equal(loaded.float())


@formats
def test_slices_merge_to_the_nearest(dtype):
    values = rows_of_all_magnitudes(30, 40, least=-5, most=5)
    values[:, 10:] *= 4096
    halves = torch.cat([dequantised(*quantised(part, dtype)) for part in (values[:, :10], values[:, 10:])], 1)
    codes, scales = quantised(halves, dtype)
    merged = dequantised(codes, scales)
    assert not merged.equal(halves)
    assert ((merged.double() - halves.double()).abs() <= steps_of(halves, dtype, scales) / 2).all()


def test_nothing_depends_on_the_defaults_of_torch():
    values, bits = rows_of_all_magnitudes(5, 17), torch.randint(65536, (5, 17), dtype=torch.int32)
    for dtype in FORMATS:
        want = quantised(values, dtype, bits)
        read = dequantised(*want)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            got = quantised(values, dtype, bits)
            assert dequantised(*got).equal(read)
        finally:
            torch.set_default_dtype(before)
        assert all(one.equal(other) for one, other in zip(got, want))


@pytest.fixture(params=["this processor", "any processor", "no compiler"])
def compiled(request, monkeypatch, tmp_path_factory):
    """The C library for this processor, or as compiled for others that have fewer vector instructions; and none."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    if request.param == "no compiler":
        monkeypatch.setattr(native, "available", lambda *tensors: False)
    elif request.param != "this processor":
        if platform.machine() not in ("x86_64", "AMD64"):
            pytest.skip("its flag is for x86")
        march = "-march=x86-64" if request.param == "any processor" else f"-march={request.param}"
        if request.param == "x86-64-v3" and not native._LEVELS["x86-64-v3"] <= set(cpu_features().split()):
            pytest.skip("this processor lacks these")
        flags = tuple(march if flag == "-march=native" else flag for flag in native.FLAGS)
        monkeypatch.setattr(native, "FLAGS", flags)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / request.param))
        native.load_library.cache_clear()
    if request.param != "no compiler" and native.load_library() is None:
        pytest.skip("no C compiler here")
    yield request.param
    torch.set_num_threads(before)
    if request.param not in ("this processor", "no compiler"):
        native.load_library.cache_clear()


def table_of(values, dtype):
    codes, scales = quantised(values, dtype)
    let_scales(codes, scales)
    return codes


def near_enough(got, want, terms):
    """Within float32's roundings of the sum of the magnitudes of what is added up."""
    assert ((got.double() - want).abs() <= 1e-5 * terms + 1e-30).all()


@formats
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tokens=st.sampled_from([0, 1, 2, 7]), dim=st.sampled_from(COLUMNS), rows=st.sampled_from([1, 2, 9, 64]),
    most=st.sampled_from([0, 1, 5, 70]), activation=st.sampled_from(list(ACTIVATIONS)), seed=st.integers(0, 2**20),
    wide=st.booleans(),
)  # fmt: skip
def test_products_are_those_of_the_values(compiled, dtype, tokens, dim, rows, most, activation, seed, wide):
    """In float64; the layer's gradients too, which those of the tables are left out of, being sums of these."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, most + 1, (tokens,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    picks = Picks(offsets, torch.randint(rows, (int(offsets[-1]),), generator=generator))
    down, up = (table_of(rows_of_all_magnitudes(rows, dim, seed + i, -9, 3), dtype) for i in range(2))
    x, dy = torch.randn(2, tokens, dim, generator=generator).to(torch.float32 if wide else torch.bfloat16)
    gate = torch.randn(picks.expert.numel(), generator=generator)
    exact = [dequantised(table, table.scales).double() for table in (down, up)]
    read = EightBit(down, down.scales)
    assert (package.backend(x, read) is native) == (compiled != "no compiler")

    picked, there = exact[0][picks.expert], x.double()[picks.token]
    near_enough(dots(x, down, picks), (picked * there).sum(1), (picked * there).abs().sum(1))
    mixed = [torch.zeros(tokens, dim, dtype=torch.float64) for _ in range(2)]
    weighted = gate.double()[:, None] * picked
    mixed[0].index_add_(0, picks.token, weighted)
    mixed[1].index_add_(0, picks.token, weighted.abs())
    near_enough(value_mix(gate, down, picks), *mixed)

    leaves = [x.float().requires_grad_(), gate.clone().requires_grad_()]
    y = expert_mix(leaves[0], picks, leaves[1], down, up, activation)
    got = torch.autograd.grad(y, leaves, dy.float())
    others = [leaf.detach().double().requires_grad_() for leaf in leaves]
    hidden = ACTIVATIONS[activation]((others[0][picks.token] * picked).sum(1)) * others[1]
    want_y = torch.zeros(tokens, dim, dtype=torch.float64)
    want_y = want_y.index_add(0, picks.token, hidden[:, None] * exact[1][picks.expert])
    want = torch.autograd.grad(want_y, others, dy.double())
    for one, other in zip((y, *got), (want_y, *want)):
        scale = float(other.detach().abs().max()) if other.numel() else 1.0
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4 * max(1.0, scale))


@formats
@pytest.mark.parametrize("compiled", ["this processor", "x86-64-v3", "any processor", "no compiler"], indirect=True)
def test_every_code_is_read_exactly(compiled, dtype):
    codes = torch.arange(256).to(torch.uint8)
    codes = codes.view(torch.int8) if dtype == torch.int8 else codes[codes % 128 != 127]
    for scale in (1.0, 2.0**-100, 2.0**100):
        for shift in range(3):  # in vectors, and behind them
            table = codes.roll(5 * shift)[None, shift:].contiguous()
            let_scales(table, torch.tensor([scale]))
            picks = Picks.even(torch.zeros(1, 1, dtype=torch.int64))
            assert value_mix(torch.ones(1), table, picks)[0].equal(dequantised(table, table.scales)[0])


@formats
def test_offsets_beyond_two_to_the_31(dtype):
    """Memory that is hardly touched."""
    many, columns = 2**21 + 2, 1024
    table, scales = torch.empty(many, columns, dtype=dtype), torch.empty(many)
    rows = torch.tensor([1, many - 2, many - 1])
    few = quantised(torch.randn(3, columns), dtype)
    table[rows], scales[rows] = few
    picks, small = Picks.even(rows[None]), Picks.even(torch.arange(3)[None])
    x = torch.randn(1, columns)
    assert native.dots(x, EightBit(table, scales), picks).equal(native.dots(x, few, small))
    step = Step.of("rowwise_adagrad", 0.1, (0.9, 0.99), 1e-8, 0.1, count=1, scale=1.0, dim=columns)
    grad, row_sq = torch.randn(3, columns).bfloat16(), torch.zeros(many)
    native.update_rows(step, grad, table, {"row_sq": row_sq}, None, rows, None, Rounding(7, 0, 0), scales)
    native.update_rows(
        step, grad, few.codes, {"row_sq": torch.zeros(3)}, None, None, None, Rounding(7, 0, 0), few.scales, rows
    )
    assert table[rows].equal(few.codes)
    assert scales[rows].equal(few.scales)


def test_what_c_does_not_serve_is_served_by_the_reference():
    """Tables of two formats, with gaps, of scales in another dtype."""
    x, picks = torch.randn(1, 6), Picks.even(torch.tensor([[2, 0]]))
    whole = quantised(torch.randn(3, 12), torch.int8)
    gaps = EightBit(whole.codes[:, ::2], whole.scales)
    double = EightBit(whole.codes[:, :6].contiguous(), whole.scales.double())
    for table in (gaps, double):
        assert package.backend(x, table) is package._REFERENCE
        want = (dequantised(*table)[picks.expert] * x).sum(1)
        torch.testing.assert_close(package.backend(x, table).dots(x, table, picks), want.float())
    two = quantised(torch.randn(3, 6), torch.int8), quantised(torch.randn(3, 6), torch.uint8)
    assert package.backend(x, *two) is package._REFERENCE
    assert not native.available(x, two[0], torch.randn(3, 6))
    with pytest.raises(ValueError, match="scales must be"):
        native.dots(x, EightBit(two[0].codes, torch.ones(2)), picks)
    with pytest.raises(IndexError, match="rows 0 to 3 from a table of 3"):
        native.dots(x, two[0], Picks.even(torch.tensor([[3, 0]])))


@formats
def test_nan_goes_through(compiled, dtype):
    values = torch.randn(3, 20)
    values[1, 4] = math.inf
    table = table_of(values, dtype)
    picks = Picks.even(torch.tensor([[0, 2], [1, 2]]))
    y = expert_mix(torch.randn(2, 20), picks, torch.ones(4), table, table, "gelu")
    assert y.isnan().all(1).tolist() == [False, True]
    assert dots(torch.randn(2, 20), table, picks).isnan().tolist() == [False, False, True, False]


@formats
@pytest.mark.parametrize("decay", [1.0, 2.0**-10, 2.0**-30, 2.0**-45, 0.0, 2.0**20, -1.0])
def test_steps_to_every_magnitude(compiled, dtype, decay):
    """And to zeros of either sign, as by plain PyTorch."""
    values = rows_of_all_magnitudes(200, 37)
    table = table_of(values, dtype)
    got, want = (EightBit(table.clone(), table.scales.clone()) for _ in range(2))
    step = Step.of("rowwise_adagrad", 0.0, (0.9, 0.99), 1e-8, 0.0, count=1, scale=1.0, dim=37)._replace(decay=decay)
    grad = torch.randn(200, 37).bfloat16()
    update_rows(step, grad, got.codes, {"row_sq": torch.ones(200)}, rounding=Rounding(3, 0, 1), scales=got.scales)
    moments = {"row_sq": torch.ones(200)}
    Plain.update_rows(step, grad, want.codes, moments, None, None, None, Rounding(3, 0, 1), want.scales)
    assert got.codes.equal(want.codes)
    torch.testing.assert_close(got.scales, want.scales, rtol=0, atol=0, equal_nan=True)


@formats
def test_steps_far_smaller_than_codes_are_taken_in_the_mean(dtype):
    """Of 1 / 100 of what lies between codes at most: rounded to the nearest, none would move a weight."""
    columns, steps, rate = 4096, 60, 2.0**-7
    start = torch.full((1, columns), 60.0)
    start[0, 0] = 64.0
    table = table_of(start, dtype)
    assert dequantised(table, table.scales).equal(start)
    step = Step.of("rowwise_adagrad", rate, (0.9, 0.99), 0.0, 0.0, count=1, scale=1.0, dim=columns)
    grad = torch.ones(1, columns).bfloat16()
    for count in range(steps):
        moments = {"row_sq": torch.zeros(1)}
        rounding = Rounding(count, 0, 0)
        update_rows(step, grad, table, moments, rounding=rounding, scales=table.scales)
    moved = (start - dequantised(table, table.scales)).double()
    spread = 4 * math.sqrt(steps * rate * (1 if dtype == torch.int8 else 4) / columns)
    assert abs(moved.mean() - steps * rate) < spread


@formats
def test_a_backward_pass_leaves_sums_in_bfloat16(compiled, dtype):
    """The gradient of the rows that were picked, where an optimizer asked."""
    down, up = (table_of(torch.randn(9, 17), dtype) for _ in range(2))
    ask_for_sums(down), ask_for_sums(up)
    picks = Picks.even(torch.tensor([[8, 0], [3, 3], [8, 1]]))
    x, gate = torch.randn(3, 17, requires_grad=True), torch.randn(6)
    y = expert_mix(x, picks, gate, down, up, "silu")
    y.sum().backward()
    exact = [dequantised(table, table.scales).requires_grad_() for table in (down, up)]
    expert_mix(x, picks, gate, *exact, "silu").sum().backward()
    for table, other in zip((down, up), exact):
        (left,) = pending_sums(table)
        rows, values = left.gradient(table)
        assert rows.tolist() == [0, 1, 3, 8]
        assert values.dtype == torch.bfloat16
        torch.testing.assert_close(values.float(), other.grad[rows], rtol=2**-7, atol=1e-5)


@formats
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


@formats
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


@formats
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
