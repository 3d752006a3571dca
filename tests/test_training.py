"""The whole training step: against plain PyTorch, over layouts, killed and resumed."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml

from peer_dist.config import parse_config
from peer_dist.data.documents import DataError
from peer_dist.measures.metrics import read_metrics
from peer_dist.ranks.exit_codes import DONE
from peer_dist.ranks.signals import StopRequest
from tests.ranks import run_ranks
from tests.runs import (
    assert_close,
    assert_learns_and_resumes_bit_for_bit,
    command,
    copy_checkpoint,
    in_folder,
    losses_of,
    make_trainer,
    metrics_of,
    run_to_the_end,
    scalars_of,
    small_config,
    trained,
    with_keys,
)


def run_by_the_command(rank, world_size, tree):
    """`peer-dist train` alone, started by no launcher: its exit code."""
    from peer_dist.training import train

    dist.destroy_process_group()
    return train(parse_config(tree, "test"))


def plain_training(rank, world_size, tree, steps):
    """The same model trained by a dozen lines of plain PyTorch: no engine, no schedule, no shards."""
    from peer_dist.megatron import token_losses

    trainer = make_trainer(tree)
    o, t = trainer.config.optimizer, trainer.config.table_optimizer
    tables = [getattr(layer, part) for layer in trainer.layers.values() for part in ("down", "up")]
    dense = list(trainer.model.parameters())
    groups = [
        {"params": [p for p in dense if p.dim() > 1], "weight_decay": o.weight_decay, "peak": o.lr},
        {"params": [p for p in dense if p.dim() <= 1], "weight_decay": 0.0, "peak": o.lr},
        {"params": tables, "weight_decay": t.weight_decay, "peak": t.lr, "betas": t.betas, "eps": t.eps},
    ]
    for p in dense:  # without DeepSpeed's hooks
        p._backward_hooks = None
    adam = torch.optim.AdamW(groups, lr=1.0, betas=o.betas, eps=o.eps)
    losses, norms = [], []
    for step in range(steps):
        if step < o.warmup_steps:
            factor = (step + 1) / o.warmup_steps
        else:
            progress = (step - o.warmup_steps) / (o.decay_steps - o.warmup_steps)
            factor = o.min_lr_ratio + (1 - o.min_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2
        for group in adam.param_groups:
            group["lr"] = group["peak"] * factor
        batches = list(trainer._micro_batches(step))
        parts = []
        for batch in batches:
            loss = token_losses(trainer.model, batch["tokens"], batch["labels"], batch["documents"]).mean()
            parts.append(loss.detach())
            grads = torch.autograd.grad(loss / len(batches), [*dense, *tables])
            for p, g in zip([*dense, *tables], grads):
                p.grad = g if p.grad is None else p.grad + g
        losses.append(float(torch.stack(parts).mean()))
        norms.append(float(torch.nn.utils.clip_grad_norm_([*dense, *tables], o.grad_clip)))
        adam.step()
        adam.zero_grad()
    return losses, norms


def test_one_rank_equals_plain_pytorch(small):
    """ZeRO, the tables' optimizer, one global norm, the schedule and accumulation, all against plain code."""
    small["train"]["micro_batch_size"] = 4
    small["table_optimizer"] |= {"betas": [0.8, 0.9], "eps": 1e-5, "weight_decay": 3.0}
    want_losses, want_norms = run_ranks(plain_training, 1, small, 8)[0]
    losses, norms = run_ranks(trained, 1, small, 8)[0]
    assert_close(losses, want_losses, 1e-5)
    assert_close(norms, want_norms, 1e-4)
    assert max(norms) > small["optimizer"]["grad_clip"], "the case must clip"


TWO_RANKS = {"parallel": {"expert": 2}, "model": {"dropout": 0.1}}


@pytest.fixture(scope="module")
def quiet(text, tmp_path_factory):
    """A run of two ranks that nothing disturbs."""
    tree = with_keys(small_config(text, tmp_path_factory.mktemp("quiet")), **TWO_RANKS)
    run_ranks(run_to_the_end, 2, tree)
    return tree


@pytest.fixture(scope="module")
def quiet_alone(text, tmp_path_factory):
    """A run of one rank that nothing disturbs."""
    tree = small_config(text, tmp_path_factory.mktemp("quiet"))
    run_ranks(run_to_the_end, 1, tree)
    return tree


def test_killed_and_resumed_is_bit_for_bit(small, quiet, tmp_path):
    """Rank 1 dies in step 7; the same command goes on from step 4 and ends as if nothing had happened."""
    small = with_keys(small, **TWO_RANKS)
    with pytest.raises(AssertionError, match="rank 1 of 2 died"):
        run_ranks(run_to_the_end, 2, small, 7)
    assert sorted(losses_of(small)) == [1, 2, 3, 4, 5, 6, 7]
    shutil.copytree(small["logging"]["dir"], tmp_path / "before")
    run_ranks(run_to_the_end, 2, small)
    assert losses_of(small) == losses_of(quiet)
    assert [line["step"] for line in metrics_of(small)] == list(range(11)), "later lines were taken back"
    for key in ("optimizer/grad_norm", "optimizer/lr", "val/loss", "experts/layer1_unevenness"):
        got, want = ({line["step"]: line.get(key) for line in metrics_of(t)} for t in (small, quiet))
        assert got[10] == want[10], key


def test_more_steps_change_nothing_before(small, quiet_alone):
    """6 steps and then 4 more are 10 steps: neither the data order nor the schedule knows train.steps."""
    run_ranks(run_to_the_end, 1, with_keys(small, train={"steps": 6}))
    run_ranks(run_to_the_end, 1, small)
    assert losses_of(small) == losses_of(quiet_alone)


@pytest.mark.parametrize(
    ("dtype", "parallel", "zero"),
    [
        ("float32", {"expert": 2}, {"stage": 1}),
        ("bfloat16", {"expert": 2}, {"stage": 0}),
        ("bfloat16", {"tensor": 2, "sequence": True}, {"stage": 3}),
        ("bfloat16", {"pipeline": 2}, {"stage": 2}),
        ("bfloat16", {"expert": 2}, {"stage": 2, "offload": True}),
    ],
)
def test_bf16_trains_and_resumes_bit_for_bit(small, tmp_path, dtype, parallel, zero):
    """bf16 weights over float32 masters, with every engine; tables in either dtype."""
    small = with_keys(small, train={"precision": "bf16"}, peer={"table_dtype": dtype})
    small = with_keys(small, parallel=parallel, zero=zero, model={"num_layers": 2, "mlp": "peer"})
    assert_learns_and_resumes_bit_for_bit(small, tmp_path)


def written_later(rank, world_size, tree):
    """A run whose checkpoints are written only when the step after them is done; the steps in which one was."""
    from peer_dist.checkpoints import store
    from peer_dist.training import Trainer

    done, waited = threading.Event(), []

    class Later(store.FileWriter):
        def run(self):
            done.wait(60)
            super().run()

    class Watching(Trainer):
        def step(self):
            values = super().step()
            if self.store.writing:
                waited.append(self.steps_done)
                done.set()
            return values

        def save(self):
            done.clear()
            if self.steps_done == self.config.train.steps:
                done.set()
            return super().save()

    store.FileWriter = Later
    with StopRequest() as stop:
        Watching(parse_config(tree, "test")).run(stop)
    return waited


def test_asynchronous_saving(small, quiet):
    """Training goes on while checkpoints are written, and they are byte for byte those of a run that waits."""
    small = with_keys(small, **TWO_RANKS)
    assert run_ranks(written_later, 2, with_keys(small, checkpoint={"asynchronous": True})) == [[5, 9]] * 2
    assert losses_of(small) == losses_of(quiet)
    for name in ("step-00000008", "step-00000010"):
        files, wanted = (
            json.loads((Path(tree["checkpoint"]["dir"]) / name / "manifest.json").read_text())["files"]
            for tree in (small, quiet)
        )
        assert {k: v for k, v in files.items() if k.endswith(".distcp")} == {
            k: v for k, v in wanted.items() if k.endswith(".distcp")
        }
        assert files.keys() == wanted.keys()
    assert sorted(os.listdir(small["checkpoint"]["dir"])) == ["step-00000008", "step-00000010"]


def full_disk(rank, world_size, tree):
    from peer_dist.checkpoints import store
    from peer_dist.megatron import CheckpointError

    class Full(store.FileWriter):
        def run(self):
            if rank == 1:
                self._folder = self._folder / "nowhere"
            super().run()

    store.FileWriter = Full
    trainer = make_trainer(tree)
    trainer.step()
    trainer.save()
    trainer.step()
    with pytest.raises(CheckpointError, match=r"nowhere/.*No such file or directory; nothing complete"):
        trainer.store.finish()
    return trainer.store.steps()


def test_asynchronous_saving_that_fails_is_said_by_every_rank(small):
    small = with_keys(small, parallel={"expert": 2}, checkpoint={"asynchronous": True})
    assert run_ranks(full_disk, 2, small) == [[], []]


def test_a_checkpoint_of_a_grid_loads_elsewhere(small):
    """Saved by 2 x 2 shards of uneven width, gone on from by one rank and by three columns."""
    small = with_keys(small, train={"steps": 4, "global_batch_size": 12, "micro_batch_size": 3})
    run_ranks(run_to_the_end, 4, with_keys(small, parallel={"expert": 2, "expert_tensor": 2}))
    want, _ = run_ranks(trained, 4, with_keys(small, parallel={"expert": 2, "expert_tensor": 2}), 5)[0]
    for world_size, columns in [(1, 1), (3, 3)]:
        tree = with_keys(small, train={"micro_batch_size": 12 // world_size}, parallel={"expert_tensor": columns})
        assert_close(run_ranks(trained, world_size, tree, 5)[0][0], want, 1e-5)


@pytest.mark.parametrize("kind", ["rowwise_adam", "rowwise_adagrad"])
def test_row_wise_optimizers_in_any_layout(small, kind):
    """A grid with copies trains as one rank does; its checkpoint, a number a row, goes on in another layout."""
    small["train"]["global_batch_size"] = 16  # two passes a step
    small["model"] |= {"num_layers": 2, "mlp": ["peer", "dense"]}
    small = with_keys(small, table_optimizer={"name": kind}, train={"steps": 4})
    want, norms = run_ranks(trained, 1, with_keys(small, train={"micro_batch_size": 8}), 6)[0]
    grid = with_keys(small, train={"micro_batch_size": 1}, parallel={"expert": 2, "expert_tensor": 2})
    assert_close(run_ranks(trained, 8, grid, 6)[5][0], want, 1e-5)
    assert max(norms) > 0
    run_ranks(run_to_the_end, 4, with_keys(grid, train={"micro_batch_size": 2}))
    for world_size, parallel in [(1, {}), (2, {"expert_tensor": 2}), (4, {"expert": 2, "expert_tensor": 2})]:
        tree = with_keys(small, train={"micro_batch_size": 8 // world_size}, parallel=parallel)
        assert_close(run_ranks(trained, world_size, tree, 2)[0][0], want[4:], 1e-5)
    other = with_keys(small, train={"micro_batch_size": 8}, table_optimizer={"name": "adam"})
    with pytest.raises(AssertionError, match=f"was made with table_optimizer.name = {kind}, but the config says adam"):
        run_ranks(loading, 1, other)


@pytest.mark.parametrize("kind", ["adam", "rowwise_adam", "rowwise_adagrad"])
def test_lazy_training_in_any_layout(small, kind):
    """10 steps that touch few of many experts: row shards, column shards and copies train as one rank does."""
    small["train"]["global_batch_size"] = 16  # two passes a step
    small["model"] |= {"num_layers": 2, "mlp": ["peer", "dense"]}
    small["peer"].update(num_experts=2500, heads=2, top_k=2)
    small["table_optimizer"].update(name=kind, lazy=True, lr=0.03, weight_decay=5.0)
    small = with_keys(small, model={"seq_length": 16})
    want_losses, want_norms = run_ranks(trained, 1, with_keys(small, train={"micro_batch_size": 8}), 10)[0]
    for world_size, grid in [(2, {"expert": 2}), (2, {"expert_tensor": 2}), (2, {}), (4, {"expert_tensor": 2})]:
        tree = with_keys(small, train={"micro_batch_size": 8 // world_size}, parallel=grid)
        for losses, norms in run_ranks(trained, world_size, tree, 10):
            assert_close(losses, want_losses, 1e-5)
            assert_close(norms, want_norms, 1e-4)
    dense = with_keys(small, train={"micro_batch_size": 8}, table_optimizer={"lazy": False})
    dense_losses, _ = run_ranks(trained, 1, dense, 10)[0]
    assert max(abs(a - b) for a, b in zip(dense_losses, want_losses)) > 1e-3, "the case must leave rows untouched"


def gradients_made(rank, world_size, tree):
    """How many gradients of whole tables two steps make, and the losses."""
    from peer_dist import kernels

    made, make = [], kernels._table_grads
    kernels._table_grads = lambda *of: made.append(1) or make(*of)
    trainer = make_trainer(tree)
    return len(made), [trainer.step()["train/loss"] for _ in range(2)], len(made)


@pytest.mark.parametrize("settings", [{"zero": {"stage": 0}}, {"zero": {"stage": 1}, "train": {"recompute_layers": 1}}])
def test_a_step_makes_one_gradient_of_a_table(small, settings):
    """However many passes it has: the later ones add to the first one's."""
    tree = with_keys(small, **settings)
    tree["train"] = {**tree["train"], "micro_batch_size": 2}
    ((before, _, after),) = run_ranks(gradients_made, 1, tree)
    assert (before, after) == (0, 4)  # of two layers' pairs in two steps


def by_sums(rank, world_size, tree, gradients):
    """Losses, norms and what becomes of the tables, whose optimizer may be given ``gradients`` instead of sums."""
    from peer_dist import kernels
    from peer_dist.kernels.pending import PendingSums, pending_sums
    from peer_dist.optim import tables

    if gradients:
        tables.ask_for_sums = tables._merge_as_it_comes
    left = []
    kernels.PendingSums = lambda *of: left.append(of) or PendingSums(*of)
    trainer = make_trainer(tree)
    values = [trainer.step() for _ in range(4)]
    optimizer = trainer.engine.tables
    asked = [pending_sums(table) for table in optimizer.tables.values()]
    assert asked == [None if gradients else []] * 4
    assert len(left) == (0 if gradients else 8)  # of two layers in four steps
    parts = [*optimizer.tables.values(), *(part for *_, part in optimizer.state())]
    return [(v["train/loss"], v["optimizer/grad_norm"]) for v in values], [part.tolist() for part in parts]


@pytest.mark.parametrize(
    ("world_size", "settings"),
    [
        (1, {"train": {"recompute_layers": 1}, "zero": {"stage": 0}}),
        (2, {"parallel": {"expert": 2}, "peer": {"dispatch_chunks": 2}, "zero": {"stage": 1}}),
    ],
    ids=["one rank, recomputed", "two ranks, parts"],
)
def test_tables_step_by_sums_as_by_gradients(small, world_size, settings):
    """Where a step has one pass, in the same bits."""
    small["table_optimizer"].update(lazy=True)
    small = with_keys(with_keys(small, **settings), train={"micro_batch_size": 8 // world_size})
    assert run_ranks(by_sums, world_size, small, False) == run_ranks(by_sums, world_size, small, True)


@pytest.mark.parametrize("lazy", [False, True])
def test_stochastically_rounded_tables_train_and_resume_bit_for_bit(small, tmp_path, lazy):
    """bf16 tables without masters; a checkpoint of masters is another run's."""
    small = with_keys(
        small,
        train={"precision": "bf16"},
        parallel={"expert": 2},
        peer={"table_dtype": "bfloat16"},
        table_optimizer={"stochastic_rounding": True, "lazy": lazy},
    )
    assert_learns_and_resumes_bit_for_bit(small, tmp_path)
    masters = with_keys(small, table_optimizer={"stochastic_rounding": False})
    with pytest.raises(AssertionError, match=r"made with table_optimizer.stochastic_rounding = True, but the config"):
        run_ranks(loading, 2, masters)


def table_rates(rank, world_size, tree, steps):
    trainer = make_trainer(tree)
    return [[values["optimizer/lr"], values["optimizer/table_lr"]] for values in (trainer.step() for _ in range(steps))]


def test_the_tables_may_have_a_schedule_of_their_own(small):
    """What it leaves unset is the dense part's."""
    small["optimizer"].update(warmup_steps=2, decay_steps=6, min_lr_ratio=0.5, lr=1.0)
    small["table_optimizer"].update(warmup_steps=0, min_lr_ratio=0.0, lr=1.0)
    rates = run_ranks(table_rates, 1, small, 8)[0]
    dense = [0.5, 1.0] + [0.75 + 0.25 * math.cos(math.pi * step / 4) for step in range(5)] + [0.5]
    tables = [0.5 + 0.5 * math.cos(math.pi * step / 6) for step in range(7)] + [0.0]
    for got, want in zip(zip(*rates), (dense, tables)):
        assert list(got) == pytest.approx(want, abs=1e-12)


def test_a_checkpoint_older_than_a_key_is_resumed_at_its_default(small):
    from peer_dist.checkpoints.resuming import check_resumable
    from peer_dist.megatron import CheckpointError

    config = parse_config(small, "test")
    manifest = {"config": config.model_dump(mode="json"), "data": []}
    del manifest["config"]["peer"]["output_gate"]
    check_resumable(Path("run"), config, [], manifest)
    gated = parse_config(with_keys(small, peer={"output_gate": True}), "test")
    with pytest.raises(CheckpointError, match=r"was made with peer.output_gate = False, but the config says True"):
        check_resumable(Path("run"), gated, [], manifest)


def test_the_parts_in_which_tokens_travel_may_change_on_resume(small):
    from peer_dist.checkpoints.resuming import check_resumable

    manifest = {"config": parse_config(small, "test").model_dump(mode="json"), "data": []}
    check_resumable(Path("run"), parse_config(with_keys(small, peer={"dispatch_chunks": 4}), "test"), [], manifest)


def test_init_from_takes_the_weights_only(small, quiet, tmp_path):
    """A new run from another's weights: step 0, the other's held-out loss, fresh optimizers and schedule."""
    copy_checkpoint(quiet, small, 10)
    new = in_folder(small, tmp_path / "new")
    new = with_keys(new, train={"steps": 2}, checkpoint={"init_from": small["checkpoint"]["dir"]})
    run_ranks(run_to_the_end, 1, new)
    first, last = metrics_of(new)[0], metrics_of(quiet)[-1]
    assert first["step"] == 0
    assert first["val/loss"] == pytest.approx(last["val/loss"], rel=1e-6)
    assert first["val/loss"] < metrics_of(quiet)[0]["val/loss"] - 0.5
    assert metrics_of(new)[1]["optimizer/lr"] == pytest.approx(2e-3 / 3)
    shutil.rmtree(small["checkpoint"]["dir"])  # from its own first checkpoint on the run does not need it
    assert run_ranks(run_by_the_command, 1, with_keys(new, train={"steps": 3})) == [0]
    assert sorted(losses_of(new)) == [1, 2, 3]


def test_another_runs_numbers_are_kept(small):
    """A new run in an old one's logging folder moves its metrics aside; a resumed run does not."""
    small = with_keys(small, train={"steps": 1})
    old = {"step": 7, "train/loss": 1.5}
    logs = Path(small["logging"]["dir"])
    logs.mkdir(parents=True)
    (logs / "metrics.jsonl").write_text(json.dumps(old) + "\n")
    run_ranks(run_to_the_end, 1, small)
    run_ranks(run_to_the_end, 1, with_keys(small, train={"steps": 2}))
    (aside,) = logs.glob("metrics-*.jsonl")
    assert read_metrics(aside) == [old]
    assert [line["step"] for line in metrics_of(small)] == [0, 1, 2]


def poisoned(rank, world_size, tree, table):
    """A gradient that is not finite, of one parameter on one rank, in the second of five steps; saved after it."""
    trainer = make_trainer(tree)
    trainer.step()
    tables = [t for layer in trainer.layers.values() for t in (layer.down, layer.up)]
    victim = tables[-1] if table and tables else list(trainer.model.parameters())[-1]

    def weights():
        masters = [value for _, part, value in trainer.engine.dense_state() if part == "master"]
        own = [getattr(p, "ds_tensor", p) for p in trainer.model.parameters()]  # under ZeRO-3 a part
        return [p.detach().clone() for p in [*masters, *own, *tables]]

    handle = victim.register_hook(lambda grad: grad * (math.nan if rank == world_size - 1 else 1.0))
    before = weights()
    values = trainer.step()
    unchanged = all(torch.equal(a, b) for a, b in zip(before, weights()))
    handle.remove()
    trainer.save()
    rest = [trainer.step() for _ in range(3)]
    skipped = [v["optimizer/skipped_steps"] for v in (values, *rest)]
    moved = not any(torch.equal(a, b) for a, b in zip(before, weights()))
    return unchanged, moved, skipped, ([v["train/loss"] for v in rest], [v["optimizer/grad_norm"] for v in rest])


@pytest.mark.parametrize("table", [True, False], ids=["table", "dense"])
@pytest.mark.parametrize(
    ("world_size", "parallel", "stage", "lazy"),
    [
        (2, {"expert": 2}, 1, False),
        (2, {"expert": 2}, 1, True),
        (2, {"expert": 2}, 0, False),
        (2, {"expert": 2}, 3, False),
        (4, {"tensor": 2, "pipeline": 2, "expert": 2}, 2, True),
    ],
)
def test_a_gradient_that_is_not_finite_skips_the_step_on_every_rank(small, world_size, parallel, stage, lazy, table):
    """And leaves nothing behind: the run goes on, and a resumed one equals it bit for bit."""
    small = with_keys(small, parallel=parallel, zero={"stage": stage}, table_optimizer={"lazy": lazy})
    small = with_keys(small, model={"num_layers": 2, "mlp": ["dense", "peer"]})
    results = run_ranks(poisoned, world_size, small, table)
    for unchanged, moved, skipped, (losses, norms) in results:
        assert unchanged
        assert moved
        assert skipped == [1, 1, 1, 1]
        assert all(map(math.isfinite, losses + norms))
        assert (losses, norms) == results[0][3]
    assert run_ranks(trained, world_size, small, 3) == [results[0][3]] * world_size


def two_rank_traffic(rank, world_size, tree):
    """Exchange bytes per token of a step, and the bytes that this rank's layers counted in it."""
    from peer_dist.sharding import Traffic

    counted, reset = [], Traffic.reset
    trainer = make_trainer(tree)
    Traffic.reset = lambda self: (counted.append(self.bytes_sent), reset(self))[1]
    values = trainer.step()
    assert len(counted) == len(trainer.layers) == 2
    return values["exchange/bytes_per_token"], sum(counted)


def test_exchange_bytes_are_those_of_all_layers_and_ranks(small):
    results = run_ranks(two_rank_traffic, 2, with_keys(small, parallel={"expert": 2}))
    assert all(sent > 0 for _, sent in results)
    assert [value for value, _ in results] == [sum(sent for _, sent in results) / (8 * 32)] * 2


def loading(rank, world_size, tree):
    make_trainer(tree)


def loading_model(rank, world_size, folder):
    from peer_dist.evaluation.loading import load_model

    load_model(folder, world_size)


def test_checkpoints_are_verified_and_kept(small, quiet_alone):
    """The newest two stay; half-written ones are ignored; damage and other models are named."""
    folder = Path(small["checkpoint"]["dir"])
    shutil.copytree(quiet_alone["checkpoint"]["dir"], folder)
    shutil.copytree(quiet_alone["logging"]["dir"], small["logging"]["dir"])
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000008", "step-00000010"]
    manifest = json.loads((folder / "step-00000010" / "manifest.json").read_text())
    assert (manifest["step"], manifest["sequences"]) == (10, 80)
    (folder / ".step-00000012.partial").mkdir()
    (folder / "step-00000014").mkdir()  # no manifest: not complete

    with pytest.raises(AssertionError, match=r"model.hidden_size = 32, but the config says 64"):
        run_ranks(loading, 1, with_keys(small, model={"hidden_size": 64}))
    with pytest.raises(AssertionError, match=r"train.global_batch_size = 8, but the config says 4"):
        run_ranks(loading, 1, with_keys(small, train={"global_batch_size": 4}))
    with pytest.raises(AssertionError, match=r"train.seed = 5, but the config says 6"):
        run_ranks(loading, 1, with_keys(small, train={"seed": 6}))

    victim = max((folder / "step-00000010").glob("*.distcp"), key=lambda file: file.stat().st_size)
    whole = victim.read_bytes()
    flipped = bytearray(whole)
    flipped[len(flipped) // 2] ^= 1
    for damage in (bytes(flipped), whole[:-1]):
        victim.write_bytes(damage)
        with pytest.raises(AssertionError, match=rf"{victim.name}: is damaged .*go on from step-00000008 with"):
            run_ranks(loading, 1, small)
    victim.write_bytes(bytes(flipped))
    with pytest.raises(AssertionError, match=rf"{victim.name}: is damaged"):
        run_ranks(loading, 1, with_keys(small, checkpoint={"dir": str(folder / "new"), "init_from": str(folder)}))
    with pytest.raises(AssertionError, match=rf"{victim.name}: is damaged"):
        run_ranks(loading_model, 1, str(folder))
    victim.unlink()
    with pytest.raises(AssertionError, match=rf"{victim.name}: is missing"):
        run_ranks(loading, 1, small)
    shutil.rmtree(folder / "step-00000010")
    run_ranks(run_to_the_end, 1, small)  # from step 8
    assert sorted(losses_of(small)) == list(range(1, 11))
    shown = scalars_of(small, "train/loss")  # what the first run wrote of steps 9 and 10 was taken back
    assert shown == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in losses_of(small).items()]


def test_data_may_move_but_not_change(small, text, tmp_path):
    """A run knows its data by what they are, not by where they lie."""
    from peer_dist.data.prepare import prepare

    run_ranks(run_to_the_end, 1, with_keys(small, train={"steps": 4}))
    moved = tmp_path / "elsewhere" / "same"
    moved.parent.mkdir()
    prepare(None, moved)
    run_ranks(loading, 1, with_keys(small, data={"prefix": str(moved)}))
    (tmp_path / "other.txt").write_text("Other words.\n\n" * 4000)
    prepare([tmp_path / "other.txt"], tmp_path / "other")
    with pytest.raises(AssertionError, match=r"step-00000004: was made from other data than .*other holds now"):
        run_ranks(loading, 1, with_keys(small, data={"prefix": str(tmp_path / "other")}))


def test_signals_end_a_run_with_a_checkpoint(small):
    """In the step in which one rank gets it, on every rank, and the run is whole: two stops and an end."""
    small = with_keys(small, parallel={"expert": 2}, checkpoint={"interval": 100, "keep": 9})
    run_ranks(run_to_the_end, 2, small, 2, signal.SIGTERM)
    run_ranks(run_to_the_end, 2, small, 5, signal.SIGINT)
    saved = sorted(path.name for path in Path(small["checkpoint"]["dir"]).iterdir())
    assert saved == ["step-00000003", "step-00000006"]
    assert sorted(losses_of(small)) == [1, 2, 3, 4, 5, 6]


def torchrun(tree, path, ranks=2):
    path.write_text(yaml.safe_dump(tree))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.Popen(
        [*launcher, "-m", "peer_dist", "train", "--config", str(path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_torchrun_saves_and_leaves_on_a_signal(small, tmp_path):
    """The real command under the real launcher: a signal to one rank, a clean exit, and the command goes on."""
    small = with_keys(small, parallel={"expert": 2}, train={"steps": 100_000}, checkpoint={"interval": 100_000})
    process = torchrun(small, tmp_path / "run.yaml")
    metrics = Path(small["logging"]["dir"]) / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or len(read_metrics(metrics)) < 4:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = [int(child) for child in children if b"peer_dist" in Path(f"/proc/{child}/cmdline").read_bytes()]
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGUSR1)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "stopped at step" in errors
    (saved,) = [int(path.name.removeprefix("step-")) for path in Path(small["checkpoint"]["dir"]).iterdir()]
    assert max(losses_of(small)) == saved

    with command(with_keys(small, train={"steps": saved + 2}), tmp_path) as run:
        assert run.codes(60) == [DONE, DONE], run.words(0)
        assert f"going on from step {saved}" in run.words(0)
    assert max(losses_of(small)) == saved + 2


def groups_case(rank, world_size, tree):
    trainer = make_trainer(tree)
    parallel = trainer.parallel
    return dist.get_world_size(parallel.experts.rows), dist.get_world_size(parallel.expert_data_group)


def test_ranks_left_over_replicate_the_tables(small):
    assert run_ranks(groups_case, 4, with_keys(small, parallel={"expert": 2})) == [(2, 2)] * 4


def masks_alive(rank, world_size, tree):
    """Micro-batches made in a step and in a validation; how many masks there were when one was made, at most in the
    step and in all.
    """
    from peer_dist.measures import held_out

    make, masks, most, made = held_out.make_micro_batch, [], 0, 0

    def counted(sequences, eod, device):
        nonlocal most, made
        most, made = max(most, sum(mask() is not None for mask in masks)), made + 1
        batch = make(sequences, int(sequences[0, 5]), device)  # between documents
        masks.append(weakref.ref(batch["documents"]))
        return batch

    held_out.make_micro_batch = counted
    trainer = make_trainer(tree)
    trainer.step()
    passes, in_step = made, most
    trainer.validate()
    return passes, made - passes, in_step, most


@pytest.mark.parametrize(
    ("world_size", "parallel", "most"),
    [(1, {}, 0), (2, {"pipeline": 2}, 0), (2, {"pipeline": 2, "virtual_pipeline": 2}, 1)],
)
def test_micro_batches_are_there_one_at_a_time(small, world_size, parallel, most):
    """But for those that a stage's second chunk has yet to see, and the next step's first, which is there already."""
    small = with_keys(small, parallel=parallel, model={"num_layers": 4, "mlp": ["dense", "peer", "peer", "dense"]})
    small = with_keys(small, train={"global_batch_size": 16}, evaluation={"batches": 2})
    assert run_ranks(masks_alive, world_size, small) == [(9, 16, most, most + 1)] * world_size


def asked_for(rank, world_size, tree, fails):
    """After how many steps the second step's first batch was asked for, and its error, the first ``fails`` times."""
    trainer = make_trainer(tree)
    read, asked, error = trainer.data.train.batch, [], None

    def unreadable(positions):
        if positions.start == trainer.config.train.global_batch_size:
            asked.append(trainer.steps_done)
            if len(asked) <= fails:
                raise DataError("the file is gone")
        return read(positions)

    trainer.data.train.batch = unreadable
    try:
        for _ in range(trainer.config.train.steps):
            trainer.step()
    except DataError as raised:
        error = str(raised)
    return asked, trainer.steps_done, error


@pytest.mark.parametrize(
    ("steps", "fails", "result"),
    [
        (2, 0, ([0], 2, None)),
        (2, 1, ([0, 1], 2, None)),
        (2, 2, ([0, 1], 1, "the file is gone")),
        (1, 2, ([], 1, None)),
    ],
)
def test_a_batch_is_read_ahead_and_its_error_raised_in_its_own_step(small, steps, fails, result):
    assert run_ranks(asked_for, 1, with_keys(small, train={"steps": steps}), fails) == [result]


def reads(rank, world_size, tree):
    """From where a step reads tensors on the host, but for the data and for what layers read to send tokens."""
    import peer_dist

    trainer = make_trainer(tree)
    trainer.step()
    root, seen = Path(peer_dist.__file__).parent, []

    def watch(name):
        read = getattr(torch.Tensor, name)

        def watched(tensor, *args):
            caller = Path(sys._getframe(1).f_code.co_filename)
            if caller.is_relative_to(root) and caller.name != "indexed_data.py":
                seen.append(f"{caller.parent.name}/{caller.name}")
            return read(tensor, *args)

        setattr(torch.Tensor, name, watched)

    for name in ("tolist", "item", "cpu", "numpy", "__float__", "__int__", "__bool__"):
        watch(name)
    trainer.step()
    return seen


@pytest.mark.parametrize(("stage", "engine", "norm"), [(0, "replicated.py", 0), (1, "zero.py", 1), (3, "zero.py", 1)])
def test_a_step_is_read_once(small, stage, engine, norm):
    """A GPU's host waits there; the norm that DeepSpeed is given is in host memory then."""
    small = with_keys(small, zero={"stage": stage})
    assert run_ranks(reads, 1, small) == [[f"engines/{engine}"] * (1 + norm)]
