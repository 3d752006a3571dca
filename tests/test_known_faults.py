"""Silent faults that others found in Megatron-core and DeepSpeed: each test fails if the fault bit a run.

docs/known_faults.md lists them all, also those that no run reaches and those that other tests show.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from peer_dist.megatron import Parallel, build_model, run_forward_backward, shards_of
from tests.layouts import BATCH, LOSS, MOE, NORM, RECURRENT, Layout, base_config
from tests.layouts import trained as trained_as_it_is
from tests.models import CASES, VOCAB, make, make_batch
from tests.ranks import run_ranks
from tests.runs import make_trainer, with_keys

STEPS = 4

# ---------------------------------------------------------------- Megatron-core


def losses_and_logits(rank: int, world_size: int, sequence: bool) -> tuple[torch.Tensor, ...]:
    from peer_dist.megatron import forward_logits, token_losses

    config = make({"model.mlp": "dense", "parallel.tensor": world_size, "parallel.sequence": sequence})
    model = build_model(config, Parallel.initialize(tensor=world_size), VOCAB, torch.float32).eval()
    batch = make_batch()
    with torch.no_grad():
        logits = forward_logits(model, batch["tokens"], batch["documents"])
        return token_losses(model, batch["tokens"], batch["labels"], batch["documents"]), logits, batch["labels"]


@pytest.mark.parametrize("sequence", [False, True])
def test_losses_of_split_vocabularies_are_those_of_gathered_logits(sequence: bool) -> None:
    """Neither takes a rank's part of the vocabulary for the whole, nor the whole for a part."""
    for losses, logits, labels in run_ranks(losses_and_logits, 2, sequence):
        assert logits.shape[-1] == VOCAB
        wanted = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(losses)
        torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=1e-6)


def summed_over_tensor_ranks(rank: int, world_size: int, tree: dict[str, Any]) -> tuple[int, int]:
    """Tensors that Megatron summed over the tensor ranks in two steps, held-out passes and generation, and those among
    them that were not contiguous, whose sum it would drop.
    """
    from megatron.core.tensor_parallel import mappings

    from peer_dist.megatron import Decoder

    seen = []
    reduce = mappings._reduce

    def watched(tensor: torch.Tensor, group: Any) -> torch.Tensor:
        seen.append(tensor.is_contiguous())
        return reduce(tensor, group)

    mappings._reduce = watched
    trainer = make_trainer(tree)
    for _ in range(2):
        trainer.step()
        trainer.validate()
    trainer.model.eval()
    decoder = Decoder(trainer.model, 2, 8)
    for length in (5, 1, 1):
        decoder(torch.ones(2, length, dtype=torch.int64))
    return len(seen), seen.count(False)


@pytest.mark.parametrize(
    "settings",
    [
        {"model": {"mlp": ["peer", "dense", "pkm", "dense"], "num_query_groups": 2}},
        {"model": {"mlp": "peer", "ffn_activation": "gelu"}, "train": {"recompute_layers": 2}},
    ],
    ids=["grouped queries", "recomputed"],
)
def test_what_is_summed_over_tensor_ranks_is_contiguous(settings: dict[str, Any], text: Path, tmp_path: Path) -> None:
    tree = with_keys(base_config(text, tmp_path), **settings, parallel={"tensor": 2})
    for calls, lost in run_ranks(summed_over_tensor_ranks, 2, tree):
        assert calls > 20
        assert lost == 0


@pytest.mark.parametrize("parallel", [{}, {"tensor": 2}], ids=["one rank", "tensor ranks"])
def test_recomputed_layers_drop_out_the_same(parallel: dict[str, int], text: Path, tmp_path: Path) -> None:
    base = with_keys(base_config(text, tmp_path), model={"dropout": 0.2}, parallel=parallel)
    ranks = parallel.get("tensor", 1)
    kept, again = (
        run_ranks(trained_as_it_is, ranks, with_keys(base, train={"recompute_layers": layers}), STEPS)[0][:2]
        for layers in (0, 4)
    )
    for found, wanted in zip(again, kept, strict=True):
        assert found == pytest.approx(wanted, rel=1e-6)


# ---------------------------------------------------------------- DeepSpeed


@pytest.mark.parametrize("changes", CASES, ids=str)
def test_every_dense_parameter_has_a_gradient(parallel: Parallel, changes: dict[str, Any]) -> None:
    """ZeRO leaves a parameter without one out of its buckets, which would no longer be those of the other ranks."""
    model = build_model(make(changes), parallel, VOCAB, torch.float32)
    owned = {id(shard.parameter) for shard in shards_of(model).values()}
    run_forward_backward(model, [make_batch()])
    assert [n for n, p in model.named_parameters() if p.grad is None and id(p) not in owned] == []


def with_deepspeeds_keys(change: Callable[[dict[str, Any]], Any]) -> None:
    """Let this process's engines change the config that they hand to DeepSpeed."""
    from peer_dist.engines import zero

    initialize = zero.deepspeed.initialize

    def changed(*, config: dict[str, Any], **others: Any) -> Any:
        change(config)
        return initialize(config=config, **others)

    zero.deepspeed.initialize = changed


def trained_in_small_parts(
    rank: int, world_size: int, tree: dict[str, Any], steps: int, elements: int, pauses: bool
) -> tuple[list[float], list[float], list[float], list[int]]:
    """As :func:`tests.layouts.trained`, with DeepSpeed's limits of a large model, so that small ones exceed them.

    Args:
        elements: that a bucket, a sub-group or a message holds.
        pauses: whether a held-out pass lies between two steps.

    Returns:
        Beside the losses, norms and held-out loss the largest number of parameters whose values were not here after a
        step, and of parameters.
    """
    from peer_dist.engines import zero

    zero.BUCKET = elements
    keys = ("allgather_bucket_size", "sub_group_size", "stage3_max_live_parameters", "stage3_prefetch_bucket_size")
    small = {**dict.fromkeys(keys, elements), "stage3_max_reuse_distance": 0, "stage3_param_persistence_threshold": 0}
    with_deepspeeds_keys(lambda config: config["zero_optimization"].update(small))
    trainer = make_trainer(tree)
    if tree["zero"]["stage"] < 3:  # with the backward pass it races on a GPU
        assert not trainer.engine._zero.overlap_comm
    values, away = [], 0
    for _ in range(steps):
        values.append(trainer.step())
        away = max(away, sum(p.numel() == 0 for p in trainer.model.parameters()))
        if pauses:
            trainer.validate()
    held_out = [trainer.validate()["val/loss"]]
    sizes = [away, len(list(trainer.model.parameters()))]
    return [v["train/loss"] for v in values], [v["optimizer/grad_norm"] for v in values], held_out, sizes


SMALL_PARTS = [
    Layout(3, {}, 2, sequences=6),
    Layout(2, {"expert": 2}, 3, settings=MOE | RECURRENT, recompute=2),
    *(
        pytest.param(layout, marks=pytest.mark.slow)
        for layout in (
            Layout(2, {"expert": 2}, 1),
            Layout(2, {"expert": 2}, 2, offload=True),
            Layout(4, {"tensor": 2, "pipeline": 2}, 1, offload=True),
            Layout(2, {"expert": 2}, 3, offload=True),
            Layout(4, {"tensor": 2, "sequence": True, "expert": 2}, 3, settings=BATCH, recompute=2),
        )
    ),
]


@pytest.mark.parametrize("layout", SMALL_PARTS, ids=str)
def test_many_buckets_and_partitioned_parameters(layout: Layout, text: Path, tmp_path: Path) -> None:
    """What only large models exceed: gradients in many buckets, ZeRO-3's parameters released and fetched again."""
    base = base_config(text, tmp_path)
    wanted = run_ranks(trained_as_it_is, 1, layout.alone(base), STEPS)[0]
    elements = 1000  # a hundredth of the parameters, and less than an embedding
    for losses, norms, held_out, (away, parameters) in run_ranks(
        trained_in_small_parts, layout.ranks, layout.config(base), STEPS, elements, not layout.recompute
    ):
        assert losses == pytest.approx(wanted[0], rel=LOSS)
        assert norms == pytest.approx(wanted[1], rel=NORM)
        assert held_out == pytest.approx(wanted[2], rel=LOSS)
        assert away == (parameters if layout.zero == 3 else 0)


def saved_in_small_parts(rank: int, world_size: int, tree: dict[str, Any]) -> list[float]:
    with_deepspeeds_keys(
        lambda config: config["zero_optimization"].update(sub_group_size=1000, stage3_param_persistence_threshold=0)
    )
    trainer = make_trainer(tree)
    before = trainer.steps_done
    losses = [trainer.step()["train/loss"] for _ in range(2)]
    if before:
        return losses
    trainer.save()
    return [trainer.step()["train/loss"] for _ in range(2)]


def test_a_checkpoint_of_partitioned_parameters(text: Path, tmp_path: Path) -> None:
    """Into partitions like those that it was saved from, and without ZeRO."""
    base = base_config(text, tmp_path)
    layout = Layout(2, {"expert": 2}, 3)
    wanted = run_ranks(saved_in_small_parts, 2, layout.config(base))[0]
    assert run_ranks(saved_in_small_parts, 2, layout.config(base))[0] == wanted
    assert run_ranks(trained_as_it_is, 1, Layout(1, {}, 0).config(base), 2)[0][0] == pytest.approx(wanted, rel=LOSS)


@pytest.mark.parametrize("zero", [1, 3])
def test_clipping_that_is_off_is_off(zero: int, text: Path, tmp_path: Path) -> None:
    """DeepSpeed clips at 1 where it is told nothing."""
    base = with_keys(base_config(text, tmp_path), optimizer={"grad_clip": 0})
    plain, other = (run_ranks(trained_as_it_is, 1, Layout(1, {}, stage).config(base), STEPS)[0] for stage in (0, zero))
    assert min(plain[1][:-1]) > 1, "the case must clip at 1"
    assert other[0] == pytest.approx(plain[0], rel=LOSS)


def bf16_gradients(rank: int, world_size: int, tree: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The dense gradients of a step, after they are added up, and before they are clipped."""
    from deepspeed.utils import safe_get_full_grad

    trainer = make_trainer(tree)
    engine, found = trainer.engine, {}
    step = engine.step

    def watched(*args: float) -> Any:
        for name, parameter in engine.parameters.items():
            grad = parameter.main_grad if tree["zero"]["stage"] == 0 else safe_get_full_grad(parameter)
            found[name] = grad.detach().clone()
        return step(*args)

    engine.step = watched
    trainer.step()
    return found


@pytest.mark.parametrize(("zero", "offload"), [(1, False), (2, False), (2, True), (3, False)])
def test_modules_used_again_and_again_in_bf16(zero: int, offload: bool, text: Path, tmp_path: Path) -> None:
    """The routers' core is used by several layers, again in recomputed passes, and in each micro-batch of a step."""
    base = with_keys(base_config(text, tmp_path), train={"precision": "bf16"})

    def gradients(stage: int, offload: bool = False) -> dict[str, torch.Tensor]:
        layout = Layout(2, {"expert": 2}, stage, settings=MOE | RECURRENT, recompute=2, passes=3, offload=offload)
        return run_ranks(bf16_gradients, 2, layout.config(base))[0]

    wanted, got = gradients(0), gradients(zero, offload)
    assert any("router_core" in name for name in wanted)
    for name, grad in wanted.items():
        assert float((got[name].float() - grad).norm() / grad.norm()) < 2e-2, name


def test_how_exactly_bf16_gradients_add_up(text: Path, tmp_path: Path) -> None:
    """In float32 with ZeRO-0; in bf16 with the other stages, whose 32 passes are off by half a percent or so."""
    base = with_keys(base_config(text, tmp_path), train={"precision": "bf16"})
    trees = [Layout(1, {}, stage, sequences=1, passes=32).config(base) for stage in range(4)]
    exact, *others = (run_ranks(bf16_gradients, 1, tree)[0] for tree in trees)
    assert {grad.dtype for grad in exact.values()} == {torch.float32}
    for found in others:
        off = sum(float((found[name].float() - grad).square().sum()) for name, grad in exact.items()) ** 0.5
        of = sum(float(grad.square().sum()) for grad in exact.values()) ** 0.5
        assert 1e-4 < off / of < 2e-2, off / of
