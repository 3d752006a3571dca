"""expert_mix against ten lines of plain PyTorch, on every backend."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from peer_dist.kernels import Picks, cpu, expert_mix, reference
from peer_dist.kernels import reference as reference_backend

ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


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


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@settings(max_examples=40, deadline=None)
@given(
    tokens=st.sampled_from([0, 1, 2, 7, 33]),
    dim=st.sampled_from([1, 3, 16, 50, 103]),
    rows=st.sampled_from([1, 2, 9, 64]),
    most=st.sampled_from([0, 1, 5, 40]),
    activation=st.sampled_from(list(ACTIVATIONS)),
    seed=st.integers(0, 2**20),
)
def test_forward_and_gradients_in_float64(backend, tokens, dim, rows, most, activation, seed):
    picks, values = case(tokens, dim, rows, most, torch.float64, seed)
    with pytest.MonkeyPatch.context() as patch:
        if backend == "reference":
            patch.setattr(cpu, "available", lambda *tensors: False)
            patch.setattr(reference_backend, "CHUNK_ELEMENTS", 64)  # many chunks
        else:
            assert cpu.available(values[0], values[2], values[3])
        x, gate, down, up = values
        y = expert_mix(x, picks, gate, down, up, activation)
        dy = torch.randn_like(y)
        got = torch.autograd.grad(y, values, dy)
    want_y = plain(x, picks.token, picks.expert, gate, down, up, activation)
    want = torch.autograd.grad(want_y, values, dy)
    torch.testing.assert_close(y, want_y, rtol=1e-12, atol=1e-12)
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-11)


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


def test_nothing_of_tokens_by_picks_by_dim_is_made():
    """The largest tensor made in forward and backward is a table gradient, not the gathered rows."""
    tokens, each, dim, rows = 256, 64, 64, 1024
    expert = torch.randint(rows, (tokens, each))
    x, down, up = (torch.randn(n, dim, requires_grad=True) for n in (tokens, rows, rows))
    gate = torch.rand(tokens * each, requires_grad=True)
    for ops in (cpu, reference):
        with pytest.MonkeyPatch.context() as patch:
            if ops is reference:
                patch.setattr(cpu, "available", lambda *tensors: False)
                patch.setattr(reference, "CHUNK_ELEMENTS", 1 << 14)
            with torch.profiler.profile(profile_memory=True) as profile:
                expert_mix(x, Picks.even(expert), gate, down, up, "gelu").sum().backward()
        largest = max(event.self_cpu_memory_usage for event in profile.events())
        assert largest < tokens * each * dim * 4 / 4
