"""The dense part's kernels against plain PyTorch in float64, and their compilation for GPUs that are not here. They run
on a GPU where there is one, and everywhere through Triton's interpreter.
"""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

from peer_dist.kernels import dense
from peer_dist.megatron import build_model, token_losses
from tests.models import VOCAB, make_batch, make_config

triton = pytest.importorskip("triton")

from peer_dist.kernels.triton import dense as kernels  # noqa: E402
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

DTYPES = {  # tolerance relative to the largest number: one rounding, which the interpreter makes towards zero
    torch.float64: 1e-13,
    torch.float32: 2e-6,
    torch.bfloat16: 2**-7 if INTERPRETED else 2**-8,
}
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
HEADS = [(5, 3, 4, 4, 8), (4, 1, 6, 2, 10), (3, 2, 4, 1, 64), (1, 2, 40, 20, 64)]  # s, b, heads, groups, channels


@pytest.fixture(autouse=True)
def _full_of_nan():
    """What a kernel leaves out shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def drawn(*shape, scale=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(sum(shape))
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(DEVICE, dtype)


def close(got, wanted, dtype):
    assert got.dtype == dtype
    bound = DTYPES[dtype] * max(1.0, float(wanted.abs().max()))
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=bound)


def with_gradients(function, inputs, *others):
    """Results and gradients of floating-point inputs; a result's gradient is drawn."""
    inputs = [value.detach().requires_grad_() for value in inputs]
    results = function(*inputs, *others)
    results = results if isinstance(results, tuple) else (results,)
    weights = [drawn(*result.shape, dtype=result.dtype) for result in results]
    return [value.detach() for value in results], torch.autograd.grad(results, inputs, weights)


def angles_of(length, channels):
    half = torch.arange(length)[:, None] * 100 ** -(torch.arange(channels // 2) / channels * 2)
    return torch.cat((half, half), -1).to(DEVICE)


def by_megatron(mixed, angles, groups):
    """As ``SelfAttention`` of Megatron-core splits, and rotates."""
    channels = angles.shape[-1]
    each = mixed.shape[-1] // groups - 2 * channels
    parts = mixed.unflatten(-1, (groups, -1)).split((each, channels, channels), -1)
    query, key, value = (part.reshape(*part.shape[:2], -1, channels) for part in parts)
    turned = [_apply_rotary_pos_emb_bshd(part, angles[:, None, None]) for part in (query, key)]
    return *turned, value


def test_plain_heads_are_megatrons():
    """Bit for bit."""
    for dtype in DTYPES:
        for length, batch, heads, groups, channels in HEADS:
            mixed, angles = drawn(length, batch, (heads + 2 * groups) * channels, dtype=dtype), angles_of(8, channels)
            case = [mixed], angles[:length], groups
            for got, wanted in zip(with_gradients(dense.Plain.split_heads, *case), with_gradients(by_megatron, *case)):
                for one, other in zip(got, wanted, strict=True):
                    assert one.equal(other)


@each_dtype
def test_plain_swiglu_is_torchs(dtype):
    """Bit for bit, with less kept."""
    x = drawn(3, 5, 34, scale=4, dtype=dtype).cpu()
    got = with_gradients(dense.swiglu, [x])
    wanted = with_gradients(lambda x: F.silu(x[..., :17]) * x[..., 17:], [x])
    assert got[0][0].equal(wanted[0][0])
    assert got[1][0].equal(wanted[1][0])


@runs_kernels
@each_dtype
@pytest.mark.parametrize("width", [1, 17, 1024, 1500])
def test_swiglu(dtype, width, monkeypatch):
    monkeypatch.setattr(dense, "backend", lambda x: kernels)
    x = drawn(3, 5, 2 * width, scale=4, dtype=dtype)
    x[0, 0, :1], x[0, 1, :1] = -1e4, 1e4
    wanted = with_gradients(lambda x: F.silu(x[..., :width]) * x[..., width:], [x.double()])
    got = with_gradients(dense.swiglu, [x])
    close(got[0][0], wanted[0][0], dtype)
    close(got[1][0], wanted[1][0], dtype)


@runs_kernels
@each_dtype
@pytest.mark.parametrize("shape", HEADS, ids=str)
def test_heads(dtype, shape, monkeypatch):
    monkeypatch.setattr(dense, "backend", lambda x: kernels)
    length, batch, heads, groups, channels = shape
    mixed, angles = drawn(length, batch, (heads + 2 * groups) * channels, dtype=dtype), angles_of(length, channels)
    wanted = with_gradients(by_megatron, [mixed.double()], angles.double(), groups)
    got = with_gradients(dense.split_heads, [mixed], angles, groups)
    for part, formula in zip(got[0], wanted[0], strict=True):
        close(part, formula, dtype)
    close(got[1][0], wanted[1][0], dtype)
    assert got[0][0].transpose(0, 1).is_contiguous(), "attention would copy it"


@runs_kernels
@each_dtype
@pytest.mark.parametrize(
    ("words", "scale", "shift"), [(1, 1, 0), (24, 30, 0), (100, 1, 1e4), (100, 300, 0), (130, 1, 0)]
)
def test_cross_entropy(dtype, words, scale, shift, monkeypatch):
    """Whatever the blocks; also of large logits."""
    monkeypatch.setattr(kernels, "WORDS", 64)
    logits = (drawn(7, words, scale=scale) + shift).to(dtype)
    labels = torch.arange(7, device=DEVICE)[:, None] * 37 % words
    wide = logits.double().requires_grad_()
    formula = wide.log_softmax(-1).gather(1, labels)
    factor, at_label = drawn(7, 1), drawn(1, 7).t()
    wanted = factor * wide.softmax(-1)
    wanted = wanted.scatter_add(1, labels, -at_label).detach()
    wider = torch.promote_types(dtype, torch.float32)
    logs, kept = kernels.label_logs(logits, labels)
    torch.testing.assert_close(
        logs.double(), formula.detach(), rtol=0, atol=(1e-13 if dtype == torch.float64 else 2e-6) * (scale + shift)
    )
    version = logits._version
    kernels.logits_to_gradient(logits, labels, kept, factor.to(wider), at_label.to(wider))
    close(logits, wanted, dtype)
    assert logits._version > version, "autograd would not see that the logits are no more"


@runs_kernels
def test_excluded_words(monkeypatch):
    """By logits of minus infinity: blocks of nothing else first, in between and last, and a label that is."""
    monkeypatch.setattr(kernels, "WORDS", 64)
    logits = drawn(4, 200, scale=2).float()
    logits[0, :64] = logits[1, 64:130] = logits[2, 128:] = logits[3, 5] = -torch.inf
    labels = torch.tensor([100, 3, 60, 5], device=DEVICE)[:, None]
    wanted, ones = logits.log_softmax(-1), torch.ones(4, 1, device=DEVICE)
    logs, kept = kernels.label_logs(logits, labels)
    torch.testing.assert_close(logs, wanted.gather(1, labels))
    kernels.logits_to_gradient(logits, labels, kept, ones, 0 * ones)
    torch.testing.assert_close(logits, wanted.exp())


@runs_kernels
def test_a_model_with_kernels_is_the_model_without(parallel, monkeypatch):
    """Losses and gradients of a transformer with documents and grouped queries, in float32."""
    config, batch, found = make_config(num_query_groups=1), make_batch(), []
    tokens, labels, documents = (batch[name].to(parallel.device) for name in ("tokens", "labels", "documents"))
    for which in (dense.Plain, kernels):
        monkeypatch.setattr(dense, "backend", lambda x, which=which: which)
        model = build_model(config, parallel, VOCAB, torch.float32)
        losses = token_losses(model, tokens, labels, documents)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        found.append((losses, *torch.autograd.grad(losses.sum(), parameters, allow_unused=True)))
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


@compiles
@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cuda", reason="the kernels run on the GPU")
def test_through_the_interpreter():
    run_interpreted(__file__, "not slow")


# ---------------------------------------------------------------------------------------------------------------------
# Ahead-of-time compilation: what the launcher would run, recorded and compiled for a GPU that need not be here.


def launched(dtype, monkeypatch):
    """Every distinct launch of a model's sizes."""

    def call():
        x = torch.empty(4, 2, 2 * 2816, dtype=dtype)
        kernels.swiglu_backward(kernels.swiglu(x), x)
        for heads, groups, channels in ((16, 16, 64), (32, 8, 128)):
            mixed, angles = torch.empty(4, 2, (heads + 2 * groups) * channels, dtype=dtype), angles_of(4, channels)
            kernels.join_heads(*kernels.split_heads(mixed, angles, groups), angles)
        logits, labels = torch.empty(4, 32000, dtype=dtype), torch.zeros(4, 1, dtype=torch.int64)
        logs, kept = kernels.label_logs(logits, labels)
        kernels.logits_to_gradient(logits, labels, kept, logs, logs)

    return launches(call, monkeypatch)


@compiles
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiles_without_spills(capability, monkeypatch, tmp_path):
    needs_assembler(capability)
    for dtype in (torch.bfloat16, torch.float32):
        found = launched(dtype, monkeypatch)
        assert len(found) == 8
        for launch in found:
            kernel, _, num_warps, constants = launch
            binary = compiled(launch, capability)
            registers, stack = resources(binary, tmp_path)
            print(f"sm_{capability} {num_warps} warps {registers:3d} registers {kernel.__name__} {dtype} {constants}")
            assert stack == 0, f"{kernel.__name__} {dtype} {constants} spills: {stack} bytes of stack"
            assert 65536 // (registers * num_warps * 32) * num_warps >= 16, f"{kernel.__name__}: few warps fit"
            assert "atom." not in binary.asm["ptx"]
            if dtype == torch.bfloat16 and kernel is not kernels._heads_kernel:
                assert re.search(r"ld\.global\S*\.v4\.[bfu]32", binary.asm["ptx"]), "loads are not 16 bytes wide"
