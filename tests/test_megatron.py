"""The Megatron seam: norm, attention, model, schedule, groups and checkpoints, against plain references."""

from __future__ import annotations

import contextlib
import itertools
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import checkpoint as recomputed
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from peer_dist.kinds.product_keys import PLACEMENT
from peer_dist.measures.held_out import make_micro_batch
from peer_dist.megatron import (
    CheckpointError,
    Parallel,
    build_model,
    cpu,
    dense_output_std,
    dist_checkpoint,
    forward_logits,
    pack_documents,
    peer_layers,
    run_forward_backward,
    token_losses,
)
from peer_dist.megatron import attention as attention_module
from peer_dist.megatron.attention import SDPAttention
from peer_dist.megatron.documents import visible
from peer_dist.megatron.norm import RMSNorm
from peer_dist.megatron.repeatable import with_repeatable_backward
from peer_dist.sharding import grid
from tests.models import EOD, SEQ, VOCAB, make_batch, make_config
from tests.ranks import run_ranks


@pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-in is for machines without CUDA")
def test_only_megatron_sees_the_stand_in() -> None:
    from megatron.core.tensor_parallel import layers

    seen, cuda = layers.torch, torch.Tensor.cuda
    assert cpu.install()
    assert layers.torch is seen is not torch
    assert torch.Tensor.cuda is cuda
    assert torch.zeros(2).type() == "torch.FloatTensor"
    assert seen.cuda.current_device() == torch.device("cpu")
    assert seen.zeros(2, device="cuda").device == torch.device("cpu")
    for call in (
        lambda: torch.zeros(2).cuda(),
        lambda: torch.zeros(2, device="cuda"),
        torch.cuda.current_device,
    ):
        with pytest.raises((RuntimeError, AssertionError)):
            call()


# ---------------------------------------------------------------- norm and attention


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_rms_norm_is_the_formula(dtype: torch.dtype, tolerance: float) -> None:
    norm = RMSNorm(SimpleNamespace(params_dtype=dtype, sequence_parallel=True), 24, eps=1e-5)
    assert norm.weight.sequence_parallel is True
    norm.weight.data.uniform_(0.5, 2)
    x = (3 * torch.randn(5, 2, 24)).to(dtype).requires_grad_()
    out = norm(x)
    out.float().square().sum().backward()

    wide = x.detach().double().requires_grad_()
    expected = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm.weight.double()
    expected.square().sum().backward()
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=10 * tolerance, atol=10 * tolerance)


def make_attention(**config: Any) -> SDPAttention:
    plain = {"kv_channels": 8, "attention_dropout": 0.0, "sequence_parallel": False}
    return SDPAttention(SimpleNamespace(**{**plain, **config}), layer_number=1)


def attention_reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("sbnh,tbnh->bnst", q, k) / q.shape[-1] ** 0.5
    if mask is None:
        mask = torch.ones(q.shape[0], q.shape[0], dtype=torch.bool).triu(1)
    elif mask.dtype != torch.bool:
        mask = ~visible(mask, q.shape[1], len(q))
    return torch.einsum("bnst,tbnh->sbnh", scores.masked_fill(mask, float("-inf")).softmax(-1), v).flatten(2)


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("documents", [False, True])
def test_attention_is_the_formula(groups: int, documents: bool) -> None:
    q, k, v = (torch.randn(SEQ, 2, n, 8, dtype=torch.float64, requires_grad=True) for n in (4, groups, groups))
    mask = make_batch()["documents"] if documents else None
    out, expected = make_attention()(q, k, v, mask), attention_reference(q, k, v, mask)
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    for got, want in zip(
        torch.autograd.grad((out * weight).sum(), (q, k, v)),
        torch.autograd.grad((expected * weight).sum(), (q, k, v)),
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("documents", [False, True])
def test_attention_is_megatrons(parallel: Parallel, documents: bool) -> None:
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    config = build_model(make_config(), parallel, VOCAB, torch.float32)[0].config
    theirs = DotProductAttention(config, 1, AttnMaskType.causal, "self")
    q, k, v = (torch.randn(SEQ, 2, 2, 16) for _ in range(3))
    packed = make_batch()["documents"] if documents else None
    mask = torch.ones(1, 1, SEQ, SEQ, dtype=torch.bool).triu(1) if packed is None else ~visible(packed, 2, SEQ)
    torch.testing.assert_close(SDPAttention(config, 1)(q, k, v, packed), theirs(q, k, v, mask))


def test_attention_dropout_uses_the_tracked_stream(parallel: Parallel) -> None:
    attention = make_attention(attention_dropout=0.5)
    q, k, v = (torch.randn(SEQ, 1, 2, 8) for _ in range(3))
    before = torch.get_rng_state()
    first, second = attention(q, k, v, None), attention(q, k, v, None)
    assert not torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state())
    attention.eval()
    assert torch.equal(attention(q, k, v, None), attention(q, k, v, None))


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention_as_on_cuda_is_the_same(
    monkeypatch: pytest.MonkeyPatch, groups: int, documents: bool, dtype: torch.dtype
) -> None:
    """There it is a node of its own, recomputed or not."""
    inputs = [torch.randn(SEQ, 2, n, 8, dtype=dtype, requires_grad=True) for n in (4, groups, groups)]
    mask = make_batch()["documents"] if documents else None
    attention = make_attention()

    def run(recompute: bool) -> list[torch.Tensor]:
        out = checkpoint(attention, *inputs, mask, use_reentrant=True) if recompute else attention(*inputs, mask)
        out.square().sum().backward()
        gradients = [tensor.grad for tensor in inputs]
        for tensor in inputs:
            tensor.grad = None
        return [out.detach(), *gradients]

    want = run(recompute=False)
    monkeypatch.setattr(attention_module, "varies", lambda device: True)
    for recompute in (False, True):
        got = run(recompute)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, want, strict=True))
    with torch.no_grad():
        assert torch.equal(attention(*inputs, mask), want[0])


def test_groups_without_a_fused_kernel_are_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA there is none for groups with a mask; here there is, so one is denied."""
    seen = []

    def fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> bool:
        seen.append((query.shape[1], key.shape[1], value.shape[1], options["enable_gqa"]))
        return not options["enable_gqa"]

    monkeypatch.setattr(attention_module, "varies", lambda device: True)
    monkeypatch.setattr(attention_module, "_fused", fused)
    test_attention_is_the_formula(2, documents=True)
    assert seen == [(4, 2, 2, True), (4, 4, 4, False)]


PACKED = {
    "uneven": [[EOD, 1, 2, EOD, 3, 4, 5, 6], [1, 2, 3, 4, 5, EOD, 6, 7]],
    "one token long": [[EOD, EOD, EOD, 1, 2, 3, EOD, EOD], [1, EOD, 2, EOD, 3, EOD, 4, EOD]],
    "at the ends": [[EOD, 1, 2, 3, 4, 5, 6, EOD], [1, 2, 3, 4, 5, 6, 7, 1]],
}


@pytest.mark.parametrize("tokens", PACKED.values(), ids=PACKED)
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("recompute", [False, True])
def test_packed_documents_are_masked_ones(
    monkeypatch: pytest.MonkeyPatch, tokens: list[list[int]], groups: int, recompute: bool
) -> None:
    """The way of GPUs, whose kernel's place is taken by attention over each stretch by itself."""
    lengths = []

    def flash(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, offsets: torch.Tensor, longest: int, **rest: Any
    ) -> torch.Tensor:
        assert offsets.is_contiguous()
        lengths.append((max(offsets.diff().tolist()), longest))
        parts = [
            attention_reference(*(x[begin:end, None] for x in (query, key, value)), None)[:, 0]
            for begin, end in itertools.pairwise(offsets.tolist())
        ]
        return torch.cat(parts).unflatten(1, query.shape[1:])

    documents, attention = pack_documents(torch.tensor(tokens), EOD), make_attention()
    inputs = [torch.randn(8, 2, n, 8, dtype=torch.float64, requires_grad=True) for n in (4, groups, groups)]

    def run() -> list[torch.Tensor]:
        for tensor in inputs:
            tensor.grad = None
        out = recomputed(attention, False, *inputs, documents) if recompute else attention(*inputs, documents)
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        return [out.detach(), *(tensor.grad for tensor in inputs)]

    want = run()
    monkeypatch.setattr(attention_module, "_flash_takes", lambda *_: True)
    monkeypatch.setattr(attention_module, "_flash", flash)
    for ours, theirs in zip(run(), want, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert lengths
    assert all(longest == given for longest, given in lengths)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_flash_kernel_takes_packed_documents(monkeypatch: pytest.MonkeyPatch, dropout: float) -> None:
    """Forward and backward, by torch's own description of it."""
    tokens = torch.randint(8, (2, 64))
    documents = pack_documents(tokens, EOD, torch.device("meta"))
    inputs = [torch.empty(64, 2, n, 16, device="meta", dtype=torch.bfloat16, requires_grad=True) for n in (4, 2, 2)]
    monkeypatch.setattr(attention_module, "_flash_takes", lambda *_: True)
    called = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(str(function))
            return function(*args, **(kwargs or {}))

    with Calls():
        out = make_attention(attention_dropout=dropout)(*inputs, documents)
        gradients = torch.autograd.grad(out.float().sum(), inputs)
    assert (out.shape, out.dtype) == ((64, 2, 64), torch.bfloat16)
    assert [gradient.shape for gradient in gradients] == [x.shape for x in inputs]
    assert called.count("aten._flash_attention_forward.default") == 1
    assert called.count("aten._flash_attention_backward.default") == 1


class Seen(torch.autograd.Function):
    """The identity; whether torch's strict flag is on, forward and backward, goes to a list. It may raise."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, seen: list[bool], fails: bool) -> torch.Tensor:
        seen.append(torch.are_deterministic_algorithms_enabled())
        ctx.seen, ctx.fails = seen, fails
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        ctx.seen.append(torch.are_deterministic_algorithms_enabled())
        if ctx.fails:
            raise RuntimeError("out of memory")
        return 2 * gradient, None, None


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("users", [(False, False), (True, True)])
def test_the_strict_flag_is_on_for_a_stretch_of_backward(
    users: tuple[bool, bool], fails: bool, recompute: bool
) -> None:
    """And then it is again what it was, after an error too."""
    x = torch.ones(3, requires_grad=True)
    before, inside, after = [], [], []

    def model(x: torch.Tensor) -> torch.Tensor:
        x = Seen.apply(x, before, False)
        x = with_repeatable_backward(lambda x: Seen.apply(x, inside, fails), x)
        return Seen.apply(x, after, False)

    def flag() -> tuple[bool, bool]:
        return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()

    strict, filled = users[0], torch.utils.deterministic.fill_uninitialized_memory
    torch._C._set_deterministic_algorithms(users[0], warn_only=users[1])
    try:
        y = checkpoint(model, x, use_reentrant=True) if recompute else model(x)
        with pytest.raises(RuntimeError, match="out of memory") if fails else contextlib.nullcontext():
            y.sum().backward()
        assert flag() == users
        assert torch.utils.deterministic.fill_uninitialized_memory is filled
    finally:
        torch._C._set_deterministic_algorithms(False, warn_only=False)
    assert inside[-1] is True
    assert set(inside[:-1]) == {strict}
    assert set(before) | set(after) == {strict}
    assert fails or x.grad.tolist() == [8.0] * 3


def test_a_stretch_with_several_inputs_and_outputs() -> None:
    """Those without gradients among them."""
    a, b, index = torch.randn(4, 3, requires_grad=True), torch.randn(4), torch.tensor([0, 2, 2, 3, 0])

    def stretch(a: torch.Tensor, b: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return a[index] * 2, b[index], index + 1

    outputs = with_repeatable_backward(stretch, a, b, index)
    assert [output.requires_grad for output in outputs] == [True, False, False]
    (got,) = torch.autograd.grad(outputs[0].square().sum(), a)
    (want,) = torch.autograd.grad(stretch(a, b, index)[0].square().sum(), a)
    assert torch.equal(got, want)


# ---------------------------------------------------------------- documents


def test_documents_by_hand() -> None:
    tokens = torch.tensor([[5, EOD, 6, 7], [EOD, 1, 2, 3], [EOD, EOD, 1, EOD]])
    documents = pack_documents(tokens, EOD)
    assert documents is not None
    assert documents.dtype == torch.int32
    assert documents[:, 0].tolist() == [0, 1, 4, 8, 9, 11, 12]
    assert documents.shape[1] == 4
    assert documents.untyped_storage().nbytes() == 7 * 4, "columns are one in memory"
    sees = visible(documents, 3, 4)[:, 0].int().tolist()
    assert sees[0] == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]]
    assert sees[1] == torch.ones(4, 4, dtype=torch.int).tril().tolist()
    assert sees[2] == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]
    assert pack_documents(tokens[1:2], EOD) is None
    moved = pack_documents(tokens, EOD, torch.device("meta"))
    assert moved.device.type == "meta", "found here, sent there"
    assert (moved.shape, moved.stride()) == (documents.shape, documents.stride())


def test_documents_do_not_see_each_other(parallel: Parallel) -> None:
    model = build_model(make_config(), parallel, VOCAB, torch.float32).eval()
    batch = make_batch()
    tokens, mask = batch["tokens"], batch["documents"]
    assert tokens is not None
    other = tokens.clone()
    other[0, :5] = other[0, :5] % (VOCAB - 1) + 1  # another first document
    with torch.no_grad():
        one, two = (forward_logits(model, x, mask)[0] for x in (tokens, other))
        assert not torch.allclose(forward_logits(model, other)[0, 5:], forward_logits(model, tokens)[0, 5:])
    torch.testing.assert_close(one[5:], two[5:])
    assert not torch.allclose(one[:5], two[:5])


def test_documents_of_a_sequence_train_as_if_alone(parallel: Parallel) -> None:
    """Loss and gradients of a batch as training makes it, against its documents in passes of their own."""
    config = make_config(peer={"query_norm": "rms"})
    sequences = torch.randint(1, VOCAB, (2, SEQ + 1))
    sequences[:, 5] = EOD
    sequences[:, 11] = EOD

    def losses_and_gradients(parts: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model = build_model(config, parallel, VOCAB, torch.float64)
        sums = [run_forward_backward(model, [make_micro_batch(part, EOD, parallel.device)]) for part in parts]
        return torch.stack(sums).sum(), {name: p.grad for name, p in model.named_parameters()}

    cuts = [0, 5, 11, SEQ]
    loss, gradients = losses_and_gradients([sequences])
    want, expected = losses_and_gradients([sequences[:, a : b + 1] for a, b in itertools.pairwise(cuts)])
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


# ---------------------------------------------------------------- model and schedule


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_output_std_is_the_dense_layers(parallel: Parallel, activation: str) -> None:
    """Of the dense feed-forward as the formula has it, and of the PEER layer in its place."""
    config = make_config(peer={"num_experts": 1024}, hidden_size=128, ffn_hidden_size=512, ffn_activation=activation)
    model = build_model(config, parallel, VOCAB, torch.float32)
    for layer, tolerance in zip(model[0].decoder.layers, (0.05, 0.15)):
        with torch.no_grad():
            out, bias = layer.mlp(torch.randn(512, 1, 128))
        assert bias is None
        assert out.std().item() == pytest.approx(dense_output_std(config.model), rel=tolerance)


def test_peer_keys_reach_the_layer(parallel: Parallel) -> None:
    """Every key of the peer section but where tables lie, none at its default but what the training loop reads."""
    peer = {
        "num_experts": 144, "heads": 3, "top_k": 5, "key_dim": 12, "query_norm": "layer", "gate": "sigmoid",
        "activation": "silu", "shared_keys": False, "output_gate": True, "dense_hidden": 20, "dispatch_chunks": 3,
        "key_norm": "rms", "layers_per_pool": 2, "table_dtype": "bfloat16", "revive_interval": 0,
    }  # fmt: skip
    config = make_config(peer=peer)
    assert config.peer.model_dump(exclude=set(PLACEMENT)) == peer
    config = config.model_copy(update={"model": make_config(num_layers=3, mlp="peer").model})
    layer, second, third = peer_layers(build_model(config, parallel, VOCAB, torch.float32)).values()
    assert layer.down is second.down is not third.down
    assert layer.up is second.up is not third.up
    assert (layer.num_experts, layer.heads, layer.top_k, layer.key_dim) == (144, 3, 5, 12)
    assert (layer.gate, layer.activation, layer.norm.kind) == ("sigmoid", "silu", "layer")
    assert layer.keys.shape == (3, 2, 12, 6)
    assert layer.key_norm.norm.kind == "rms"
    assert layer.gate_in.weight.shape == layer.gate_out.weight.shape
    assert layer.dense_in.weight.shape == layer.dense_out.weight.T.shape == (20, config.model.hidden_size)
    assert layer.dispatch_chunks == 3
    assert layer.down.dtype == layer.up.dtype == torch.bfloat16


@pytest.mark.parametrize("tied", [True, False])
def test_model_has_the_configured_parts(parallel: Parallel, tied: bool) -> None:
    state = torch.get_rng_state()
    model = build_model(make_config(tied_embeddings=tied), parallel, VOCAB, torch.bfloat16)
    assert torch.equal(state, torch.get_rng_state())
    names = dict(model.named_parameters())
    assert ("0.output_layer.weight" in names) is not tied
    assert not [name for name in names if name.endswith("bias") and "peer" not in name]
    assert list(peer_layers(model)) == [2]
    assert names["0.decoder.layers.1.mlp.peer.down"].dtype == torch.float32
    assert names["0.decoder.layers.0.mlp.linear_fc1.weight"].dtype == torch.bfloat16
    batch = make_batch()
    losses = token_losses(model, batch["tokens"], batch["labels"])
    assert losses.dtype == torch.float32
    assert losses.shape == (2, SEQ)
    logits = forward_logits(model, batch["tokens"]).float()
    torch.testing.assert_close(
        F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()), losses.mean(), rtol=1e-2, atol=1e-2
    )


@pytest.mark.parametrize("tied", [True, False])
def test_schedule_gradients_are_autograds(parallel: Parallel, tied: bool) -> None:
    scale = 0.37
    batches = [make_batch(seed) for seed in range(3)]
    model = build_model(make_config(tied_embeddings=tied), parallel, VOCAB, torch.float64)
    sums = run_forward_backward(model, batches, scale)
    got = {name: p.grad.clone() for name, p in model.named_parameters()}

    model = build_model(make_config(tied_embeddings=tied), parallel, VOCAB, torch.float64)
    totals = []
    for batch in batches:
        logits = forward_logits(model, batch["tokens"], batch["documents"])
        losses = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
        totals.append((losses * batch["loss_mask"].flatten()).sum())
        (scale * totals[-1]).backward()
    torch.testing.assert_close(sums, torch.stack(totals).float(), rtol=1e-5, atol=0)
    for name, p in model.named_parameters():  # Megatron takes the softmax in float32
        torch.testing.assert_close(got[name], p.grad, rtol=1e-4, atol=1e-6 * scale, msg=lambda m, n=name: f"{n}: {m}")


def test_forward_only_makes_no_gradients(parallel: Parallel) -> None:
    model = build_model(make_config(), parallel, VOCAB, torch.float32).eval()
    batch = make_batch()
    sums = run_forward_backward(model, [batch], forward_only=True)
    assert not sums.requires_grad
    assert all(p.grad is None for p in model.parameters())
    losses = token_losses(model, batch["tokens"], batch["labels"], batch["documents"])
    torch.testing.assert_close(sums[0], (losses * batch["loss_mask"]).sum())


def test_loss_decreases(parallel: Parallel) -> None:
    model = build_model(make_config(dropout=0.1), parallel, VOCAB, torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = make_batch(size=4)
    tokens = batch["loss_mask"].sum()
    history = []
    for _ in range(30):
        optimizer.zero_grad()
        history.append(run_forward_backward(model, [batch], 1 / tokens) / tokens)
        optimizer.step()
    assert history[-1] < 0.5 * history[0], history


# ---------------------------------------------------------------- layouts


def weights_and_losses(rank: int, world_size: int, expert: int) -> tuple[Any, ...]:
    groups = Parallel.initialize(expert=expert)
    torch.rand(rank + 1)  # ranks may have drawn different amounts before
    model = build_model(make_config(), groups, VOCAB, torch.float32).eval()
    layer = peer_layers(model)[2]
    dense = {name: p.detach() for name, p in model.named_parameters() if not name.endswith((".down", ".up"))}
    batch = make_batch()
    with torch.no_grad():
        losses = token_losses(model, batch["tokens"], batch["labels"], batch["documents"])
    return dense, layer.layout.rows.start, layer.down.detach(), layer.up.detach(), losses, dropout_streams(groups)


def dropout_streams(groups: Parallel) -> dict[tuple[int, int], list[torch.Tensor]]:
    """By seed and step: what dropout outside and inside the tracked stream draws."""
    drawn: dict[tuple[int, int], list[torch.Tensor]] = {}
    for seed, step in ((5, 3), (5, 4), (6, 3), (5, 3)):
        torch.rand(groups.rank + 1)  # what was drawn before does not matter
        groups.seed_step(seed, step)
        with get_cuda_rng_tracker().fork():
            tracked = torch.rand(4)
        values = [torch.rand(4), tracked]
        assert all(torch.equal(a, b) for a, b in zip(values, drawn.get((seed, step), values)))
        drawn[seed, step] = values
    return drawn


def test_layouts_agree_on_weights_and_losses() -> None:
    (one,) = run_ranks(weights_and_losses, 1, 1)
    for expert in (1, 2):
        ranks = run_ranks(weights_and_losses, 2, expert)
        for dense, first_row, down, up, losses, _ in ranks:
            assert dense.keys() == one[0].keys()
            assert all(torch.equal(dense[name], one[0][name]) for name in dense)
            assert torch.equal(down, one[2][first_row : first_row + len(down)])
            assert torch.equal(up, one[3][first_row : first_row + len(up)])
            torch.testing.assert_close(losses, one[4], rtol=1e-5, atol=1e-5)
        assert sum(len(rank[2]) for rank in ranks) == 64 * 2 // expert
        for streams in zip(*(rank[5].values() for rank in ranks)):  # differ between data parallel ranks
            assert not any(torch.equal(a, b) for a, b in zip(*streams))
        for rank in ranks:  # and between seeds and between steps
            assert len({tuple(part.tolist()) for parts in rank[5].values() for part in parts}) == 6


def layout(rank: int, world_size: int) -> dict[str, Any]:
    with pytest.raises(ValueError, match=r"expert x .* \(3\) must divide the number of ranks \(4\)"):
        Parallel.initialize(expert=3)
    groups = Parallel.initialize(expert=2)
    with pytest.raises(RuntimeError, match="exist already"):
        Parallel.initialize()
    mpu = groups.mpu
    answer = {
        "expert": dist.get_process_group_ranks(groups.experts.rows),
        "copies": dist.get_process_group_ranks(groups.expert_data_group),
        "data": dist.get_process_group_ranks(groups.data_parallel_group),
        "ranks": (groups.experts.rows.rank(), groups.expert_data_rank, groups.data_parallel_rank),
        "sizes": (groups.expert_size, groups.expert_data_size, groups.data_parallel_size, groups.tensor_size),
        "stage": (groups.is_first_stage, groups.is_last_stage, groups.pipeline_size),
        "mpu": (
            mpu.get_model_parallel_world_size(),
            mpu.get_model_parallel_rank(),
            mpu.get_data_parallel_rank(),
        ),
        "mpu data": mpu.get_data_parallel_group_ranks(),
        "one group": groups.experts.rows is groups.experts.domain and groups.token_group is groups.data_parallel_group,
        "columns": groups.experts.columns,
    }
    groups.destroy()
    Parallel.initialize(expert=4).destroy()
    assert len(dist.distributed_c10d._world.pg_map) == 1, "the world's: of the others nothing is left"
    return answer


def test_groups_of_two_experts_by_two_copies() -> None:
    for rank, answer in enumerate(run_ranks(layout, 4)):
        assert answer == {
            "expert": [[0, 1], [2, 3]][rank // 2],
            "copies": [[0, 2], [1, 3]][rank % 2],
            "data": [0, 1, 2, 3],
            "ranks": (rank % 2, rank // 2, rank),
            "sizes": (2, 2, 4, 1),
            "stage": (True, True, 1),
            "mpu": (1, 0, rank),
            "mpu data": [0, 1, 2, 3],
            "one group": True,
            "columns": None,
        }


# ---------------------------------------------------------------- checkpoints


def make_state(model: Any, groups: Parallel) -> dict[str, Any]:
    """Parameters, buffers, tables, a moment of each, and plain values."""
    dense = dist_checkpoint.dense_sharded_state(model)
    parameters = dict(model.named_parameters())
    moments = {
        name: dist_checkpoint.like(dense[name], parameters[name].detach() * 2, f"moment.{name}")
        for name in dense
        if name in parameters
    }
    tables = {}
    for number, layer in peer_layers(model).items():
        for table in ("down", "up"):
            data = getattr(layer, table).detach()
            for key, value in ((table, data), (f"moment.{table}", data * 3)):
                key = f"tables.{number}.{key}"
                tables[key] = dist_checkpoint.table_shard(
                    key, value, layer.layout.offset, layer.layout.shape, groups.expert_data_rank
                )
    return {"dense": dense, "moments": moments, "tables": tables, "step": 7, "notes": {"a": [1, None, "x"]}}


def former_first_of(size: int, shard: int, shards: int) -> int:
    """Where shards began before they were torch.chunk's."""
    return size * shard // shards


def save_state(rank: int, world_size: int, folder: str, split: Any = grid.first_of) -> None:
    grid.first_of = split  # in this process alone
    groups = Parallel.initialize(expert=world_size)
    model = build_model(make_config(), groups, VOCAB, torch.float32)
    run_forward_backward(model, [make_batch(rank)])  # moves BatchNorm's running statistics
    dist_checkpoint.save(make_state(model, groups), folder)


def load_state(rank: int, world_size: int, folder: str, expert: int) -> tuple[int, torch.Tensor]:
    groups = Parallel.initialize(expert=expert)
    model = build_model(make_config(), groups, VOCAB, torch.float32)
    expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    state = dist_checkpoint.load(make_state(model, groups), folder)
    assert (state["step"], state["notes"]) == (7, {"a": [1, None, "x"]})
    layer = peer_layers(model)[2]
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, expected[name]), name  # loaded in place
        if not name.endswith((".down", ".up")):
            assert torch.equal(state["dense"][name], tensor), name
            assert torch.equal(state["moments"][name], 2 * tensor), name
    for table in ("down", "up"):
        assert torch.equal(state["tables"][f"tables.2.moment.{table}"], 3 * getattr(layer, table))
    return layer.down.shape[0], layer.norm.running_mean


def test_checkpoint_fits_other_numbers_of_ranks_and_shards(tmp_path: Path) -> None:
    folder = str(tmp_path / "checkpoint")
    run_ranks(save_state, 2, folder)
    ((rows, mean),) = run_ranks(load_state, 1, folder, 1)
    assert rows == 64
    assert mean.abs().max() > 0
    uneven = run_ranks(load_state, 3, folder, 3)
    assert sorted(rows for rows, _ in uneven) == [20, 22, 22]
    assert all(torch.equal(other, mean) for _, other in uneven)
    assert [rows for rows, _ in run_ranks(load_state, 2, folder, 1)] == [64, 64]


def test_checkpoint_of_the_former_split(tmp_path: Path) -> None:
    """Its shards of 64 rows began at 0, 21 and 42."""
    folder = str(tmp_path / "checkpoint")
    run_ranks(save_state, 3, folder, former_first_of)
    for ranks, sizes in ((1, [64]), (3, [20, 22, 22])):
        assert sorted(rows for rows, _ in run_ranks(load_state, ranks, folder, ranks)) == sizes


@pytest.fixture
def saved(parallel: Parallel, tmp_path: Path) -> tuple[dict[str, Any], Path]:
    """A state and the folder it was saved in."""
    state = make_state(build_model(make_config(), parallel, VOCAB, torch.float32), parallel)
    dist_checkpoint.save(state, tmp_path / "saved")
    return state, tmp_path / "saved"


def test_dense_state_leaves_the_tables_out(parallel: Parallel) -> None:
    model = build_model(make_config(), parallel, VOCAB, torch.float32)
    registered = set(dist_checkpoint.dense_sharded_state(model))
    for layer in peer_layers(model).values():
        layer.release_shards()
    names = {*dict(model.named_parameters()), *dict(model.named_buffers())}
    assert registered == set(dist_checkpoint.dense_sharded_state(model)) == names
    assert not [name for name in names if name.endswith((".down", ".up"))]


def test_missing_and_extra_keys_are_named(saved: tuple[dict[str, Any], Path]) -> None:
    state, folder = saved
    norm = "decoder.final_layernorm.weight"
    more = {**state, "new": dist_checkpoint.like(state["dense"][f"0.{norm}"], torch.zeros(32), "invented")}
    with pytest.raises(CheckpointError, match=r"^invented is missing from the checkpoint"):
        dist_checkpoint.load(more, folder)
    fewer = {**state, "dense": {name: value for name, value in state["dense"].items() if name != f"0.{norm}"}}
    with pytest.raises(CheckpointError, match=f"^{norm} is in the checkpoint .* but not in the model"):
        dist_checkpoint.load(fewer, folder)
    assert f"0.{norm}" not in dist_checkpoint.load(fewer, folder, partial=True)["dense"]
    other = {
        **state,
        "dense": {**state["dense"], f"0.{norm}": dist_checkpoint.table_shard(norm, torch.zeros(7), (0,), (7,), 0)},
    }
    with pytest.raises(CheckpointError, match=rf"^{norm} has shape \(32,\) in the checkpoint .* and \(7,\)"):
        dist_checkpoint.load(other, folder)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("__0_0.distcp", None, "is missing"),
        ("__0_0.distcp", 1000, "is cut off: 1000 bytes"),
        ("common.pt", None, "common.pt is missing"),
        ("common.pt", 100, "common.pt is corrupt"),
        (".metadata", 100, "metadata is corrupt"),
        ("metadata.json", None, "is not a complete checkpoint: metadata.json"),
    ],
)
def test_damaged_files_are_named(saved: tuple[dict[str, Any], Path], name: str, size: int | None, message: str) -> None:
    state, folder = saved
    file = folder / name
    file.unlink() if size is None else os.truncate(file, size)
    with pytest.raises(CheckpointError, match=message) as error:
        dist_checkpoint.load(state, folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_shards_must_cover_the_table(parallel: Parallel, tmp_path: Path) -> None:
    def shard(rows: int, first_row: int, replica: int = 0) -> Any:
        return dist_checkpoint.table_shard("table", torch.zeros(rows, 2), (first_row, 0), (4, 2), replica)

    dist_checkpoint.save({"a": shard(3, 0), "b": shard(1, 3)}, tmp_path / "whole")
    for name, state, message in (
        ("gap", {"a": shard(3, 0)}, "^table is incomplete in the checkpoint"),
        ("overlap", {"a": shard(3, 0), "b": shard(2, 2)}, "^cannot save the checkpoint .*table"),
        ("copy", {"a": shard(4, 0, replica=1)}, "^table is missing from the checkpoint"),
    ):
        with pytest.raises(CheckpointError, match=message):
            dist_checkpoint.save(state, tmp_path / name)
