"""Attention gives the same bits each time: on a GPU the kernels that torch would take do not."""

from types import SimpleNamespace

import pytest
import torch

from peer_dist.megatron import pack_documents  # and with it Megatron, where there is no CUDA too
from peer_dist.megatron.attention import SDPAttention
from peer_dist.megatron.documents import visible
from tests.gpu.device import DEVICE

pytestmark = pytest.mark.gpu
SEQ, BATCH, HEADS, CHANNELS, EOD = (1024, 4, 16, 64, 0) if DEVICE.type == "cuda" else (64, 2, 4, 8, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)  # kernels of their own
@pytest.mark.parametrize("groups", [HEADS, HEADS // 4])
@pytest.mark.parametrize("documents", [False, True])
def test_two_runs_give_the_same_bits(groups: int, documents: bool, dtype: torch.dtype) -> None:
    config = SimpleNamespace(kv_channels=CHANNELS, attention_dropout=0.0, sequence_parallel=False)
    attention = SDPAttention(config, layer_number=1)
    draws = torch.Generator().manual_seed(1)
    inputs = [
        torch.randn(SEQ, BATCH, n, CHANNELS, generator=draws).to(DEVICE, dtype).requires_grad_()
        for n in (HEADS, groups, groups)
    ]
    mask = None
    if documents:
        mask = pack_documents(torch.randint(SEQ // 8, (BATCH, SEQ), generator=draws), EOD, DEVICE)
        assert mask is not None

    def run() -> list[torch.Tensor]:
        out = attention(*inputs, mask)
        assert bool(out.isfinite().all())
        return [out.detach(), *torch.autograd.grad(out.float().square().sum(), inputs)]

    first = run()
    for _ in range(5):
        for again, before in zip(run(), first, strict=True):
            assert torch.equal(again, before)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.skipif(DEVICE.type != "cuda", reason="the kernels, and the count of memory, are CUDA's")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("documents", [False, True])
def test_the_scores_of_groups_are_never_held(documents: bool, dtype: torch.dtype) -> None:
    config = SimpleNamespace(kv_channels=CHANNELS, attention_dropout=0.0, sequence_parallel=False)
    query, key, value = (
        torch.randn(SEQ, BATCH, n, CHANNELS, device=DEVICE, dtype=dtype, requires_grad=True)
        for n in (HEADS, HEADS // 4, HEADS // 4)
    )
    mask = torch.ones(BATCH, 1, SEQ, SEQ, dtype=torch.bool, device=DEVICE).triu(1) if documents else None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    SDPAttention(config, layer_number=1)(query, key, value, mask).sum().backward()
    scores = BATCH * HEADS * SEQ * SEQ * 4
    assert torch.cuda.max_memory_allocated() - before < 1.5 * scores  # they and their softmax would be twice as much


@pytest.mark.parametrize("channels", [8, 12])  # flash pads what is no multiple of 8
def test_gradients_are_those_of_the_formula(channels: int) -> None:
    config = SimpleNamespace(kv_channels=channels, attention_dropout=0.0, sequence_parallel=False)
    attention = SDPAttention(config, layer_number=1)
    inputs = [torch.randn(64, 2, n, channels, device=DEVICE).bfloat16().requires_grad_() for n in (4, 2, 2)]
    for documents in (None, pack_documents(torch.randint(8, (2, 64)), EOD, DEVICE)):
        out = attention(*inputs, documents)
        weight = torch.randn_like(out)
        got = torch.autograd.grad((out * weight).sum(), inputs)
        q, k, v = (x.detach().double().requires_grad_() for x in inputs)
        keys, values = (x.repeat_interleave(2, dim=2) for x in (k, v))
        unseen = torch.ones(64, 64, dtype=torch.bool, device=DEVICE).triu(1)
        if documents is not None:
            unseen = ~visible(documents, 2, 64)
        scores = torch.einsum("sbnh,tbnh->bnst", q, keys) / channels**0.5
        shares = scores.masked_fill(unseen, float("-inf")).softmax(-1)
        wide = torch.einsum("bnst,tbnh->sbnh", shares, values).flatten(2)
        torch.testing.assert_close(out.double(), wide, rtol=3e-2, atol=3e-2)
        for ours, want in zip(got, torch.autograd.grad((wide * weight.double()).sum(), (q, k, v)), strict=True):
            torch.testing.assert_close(ours.double(), want, rtol=5e-2, atol=1e-1)
