"""Loss spikes and gradients that are not finite: left out, counted, and the end of a run that has nothing else."""

import json
import math
from pathlib import Path

import pytest
import torch

from peer_dist.config import ConfigError, parse_config
from peer_dist.ranks.signals import StopRequest
from tests.ranks import run_ranks
from tests.runs import in_folder, losses_of, make_trainer, metrics_of, run_to_the_end, trained, with_keys


def guard(**keys):
    from peer_dist.config.schema import GuardConfig
    from peer_dist.training.guard import Guard

    return Guard(GuardConfig(**keys))


def test_a_spike_exceeds_the_median_of_the_losses_that_were_applied():
    watched = guard(spike_factor=1.5, spike_window=3, max_skipped_steps=2)
    for step, loss in enumerate([2.0, 9.0, 2.2]):
        assert not watched.is_spike(100.0), "the window is not full"
        watched.record(step + 1, (0, 1), loss, 1.0, True, False, [])
    assert not watched.is_spike(3.3)  # 1.5 x 2.2
    assert watched.is_spike(3.31)
    assert watched.is_spike(math.inf)
    assert not watched.is_spike(math.nan), "its gradients say so themselves"
    watched.record(4, (3, 4), 5.0, math.nan, False, True, [])
    assert (watched.spikes, watched.not_finite, watched.given_up) == (1, 0, False)
    assert not watched.is_spike(3.3), "a spike is no part of the median"
    again = guard(spike_factor=1.5, spike_window=3, max_skipped_steps=2)
    again.load(json.loads(json.dumps(watched.state())))
    again.record(5, (4, 5), math.nan, math.inf, False, False, ["layer0.up"])
    assert (again.spikes, again.not_finite, again.given_up) == (1, 1, True)
    assert again.is_spike(3.31)
    again.record(6, (5, 6), 2.0, 1.0, True, False, [])
    assert not again.given_up
    assert not guard().is_spike(1e9), "off by default"


def test_a_factor_that_would_skip_every_other_batch_is_refused(small):
    with pytest.raises(ConfigError, match=r"spike_factor: must be above 1, or 0"):
        parse_config(with_keys(small, guard={"spike_factor": 0.9}), "test")


def left_out(rank, world_size, tree):
    """Five steps, the second taken for a spike; weights, counts and numbers, and a checkpoint made after it."""
    trainer = make_trainer(tree)
    trainer.step()
    tables = [t for layer in trainer.layers.values() for t in (layer.down, layer.up)]

    def weights():
        masters = [value for _, part, value in trainer.engine.dense_state() if part == "master"]
        own = [getattr(p, "ds_tensor", p) for p in trainer.model.parameters()]  # under ZeRO-3 a part
        return [p.detach().clone() for p in [*masters, *own, *tables]]

    is_spike, trainer.guard.is_spike = trainer.guard.is_spike, lambda loss: True
    before = weights()
    skipped = trainer.step()
    unchanged = all(torch.equal(a, b) for a, b in zip(before, weights()))
    trainer.guard.is_spike = is_spike
    trainer.save()
    rest = [trainer.step() for _ in range(3)]
    counts = [(v["optimizer/skipped_spikes"], v["optimizer/skipped_steps"]) for v in (skipped, *rest)]
    return unchanged, counts, ([v["train/loss"] for v in rest], [v["optimizer/grad_norm"] for v in rest])


@pytest.mark.parametrize(
    ("world_size", "parallel", "zero", "lazy", "precision"),
    [
        (2, {"expert": 2}, {"stage": 0}, True, "fp32"),
        (2, {"expert": 2}, {"stage": 0}, False, "bf16"),
        (2, {"expert": 2}, {"stage": 1}, False, "fp32"),
        (2, {"expert": 2}, {"stage": 2, "offload": True}, False, "bf16"),
        (2, {"expert": 2}, {"stage": 3}, True, "fp32"),
        (4, {"tensor": 2, "pipeline": 2, "expert": 2}, {"stage": 1}, False, "bf16"),
    ],
)
def test_a_spike_leaves_nothing_behind(small, world_size, parallel, zero, lazy, precision):
    """No weight moves, and what follows equals, bit for bit, a run that comes fresh from a checkpoint."""
    small = with_keys(small, parallel=parallel, zero=zero, table_optimizer={"lazy": lazy})
    small = with_keys(small, train={"precision": precision}, model={"num_layers": 2, "mlp": ["dense", "peer"]})
    results = run_ranks(left_out, world_size, small)
    for unchanged, counts, numbers in results:
        assert unchanged
        assert counts == [(1, 0)] * 4
        assert all(map(math.isfinite, [*numbers[0], *numbers[1]]))
        assert numbers == results[0][2]
    assert run_ranks(trained, world_size, small, 3) == [results[0][2]] * world_size


def diverging(rank, world_size, tree, table, first):
    """A run in which one tensor's gradients are not finite from a step on, on the last rank."""
    from peer_dist.training import Trainer
    from peer_dist.training.guard import Diverged

    class Poisoned(Trainer):
        def step(self):
            if self.steps_done == first and rank == world_size - 1:
                tables = [t for layer in self.layers.values() for t in (layer.down, layer.up)]
                victim = tables[-1] if table else list(self.model.parameters())[-1]
                victim.register_hook(lambda grad: grad * math.nan)
            return super().step()

    with StopRequest() as stop:
        try:
            Poisoned(parse_config(tree, "test")).run(stop)
        except Diverged as error:
            return str(error)
    return None


@pytest.mark.parametrize("table", [True, False], ids=["table", "dense"])
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_run_without_an_end_to_it_stops_with_a_report(small, stage, table):
    small = with_keys(small, parallel={"expert": 2}, zero={"stage": stage}, guard={"max_skipped_steps": 3})
    small = with_keys(small, model={"num_layers": 2, "mlp": ["dense", "peer"]})
    small = with_keys(small, train={"steps": 40}, checkpoint={"interval": 2})
    told = run_ranks(diverging, 2, small, table, 5)
    logs = Path(small["logging"]["dir"])
    report = json.loads((logs / "diverged-step-00000008.json").read_text())
    for text in told:
        assert text.startswith("3 steps in a row, up to step 8, were left out (gradients not finite)")
        assert str(Path(small["checkpoint"]["dir"]) / "step-00000004") in text
    assert str(logs / "diverged-step-00000008.json") in told[0]
    assert (logs / "diverged-step-00000008.txt").read_text().strip() in told[0]
    assert [step["outcome"] for step in report["steps"]] == ["applied"] * 5 + ["gradients not finite"] * 3
    assert report["steps"][-1]["sequences"] == [7 * 8, 8 * 8]
    assert [step["loss"] for step in report["steps"]] == list(losses_of(small).values())
    assert report["steps"][0]["grad_norm"] == metrics_of(small)[1]["optimizer/grad_norm"]
    if table:
        assert report["steps"][-1]["not_finite"] == ["layer2.up"]
    else:
        assert len(report["steps"][-1]["not_finite"]) >= 1
        assert not any(name.startswith("layer") for name in report["steps"][-1]["not_finite"])
    assert sorted(p.name for p in Path(small["checkpoint"]["dir"]).iterdir()) == ["step-00000002", "step-00000004"]


def run_to_the_end_with_a_spike(rank, world_size, tree, at):
    """A run in which the loss of one step is taken for ten times what it is."""
    from peer_dist.training import Trainer

    class Spiking(Trainer):
        def step(self):
            is_spike = type(self.guard).is_spike
            factor = 10.0 if self.steps_done == at else 1.0
            self.guard.is_spike = lambda loss: is_spike(self.guard, loss * factor)
            return super().step()

    with StopRequest() as stop:
        Spiking(parse_config(tree, "test")).run(stop)


def test_counts_and_window_survive_a_resume(small, tmp_path):
    """A run that left out a step, stopped and resumed, is the run that did not stop."""
    small = with_keys(small, parallel={"expert": 2}, guard={"spike_factor": 1.2, "spike_window": 2})
    quiet = in_folder(small, tmp_path / "quiet")
    run_ranks(run_to_the_end_with_a_spike, 2, quiet, 5)
    run_ranks(run_to_the_end_with_a_spike, 2, with_keys(small, train={"steps": 7}), 5)
    manifest = json.loads((Path(small["checkpoint"]["dir"]) / "step-00000007" / "manifest.json").read_text())
    assert manifest["updates"] == 6
    assert (manifest["guard"]["spikes"], manifest["guard"]["in_a_row"]) == (1, 0)
    assert manifest["guard"]["losses"] == [losses_of(small)[5], losses_of(small)[7]]
    run_ranks(run_to_the_end, 2, small)
    assert losses_of(small) == losses_of(quiet)
    assert metrics_of(small)[-1]["optimizer/skipped_spikes"] == 1
