"""Runs of training that many tests make: a small config, its trainer, whole runs, and what they leave."""

import copy
import os
import shutil
import signal
from pathlib import Path

import pytest
import yaml

from peer_dist.config import parse_config
from peer_dist.measures.metrics import read_metrics
from peer_dist.ranks.signals import StopRequest
from tests.ranks import Command, run_ranks


def small_config(text: Path, folder: Path) -> dict:
    """A config as plain values: two PEER layers among three, every part of the training step in use."""
    return {
        "model": {
            "num_layers": 3,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "ffn_hidden_size": 48,
            "seq_length": 32,
            "mlp": ["peer", "dense", "peer"],
        },
        "peer": {"num_experts": 225, "heads": 3, "top_k": 4, "key_dim": 8},
        "optimizer": {"lr": 2e-3, "warmup_steps": 3, "decay_steps": 40, "grad_clip": 0.5},
        "table_optimizer": {"lr": 2e-3, "weight_decay": 0.01},
        "data": {"prefix": str(text)},
        "train": {"steps": 10, "micro_batch_size": 2, "global_batch_size": 8, "seed": 5, "precision": "fp32"},
        "evaluation": {"interval": 5, "batches": 1},
        "checkpoint": {"dir": str(folder / "checkpoints"), "interval": 4},
        "logging": {"dir": str(folder / "logs"), "interval": 5},
    }


def with_keys(tree, **sections):
    """A copy of the config with some keys changed."""
    tree = copy.deepcopy(tree)
    for section, keys in sections.items():
        tree.setdefault(section, {}).update(keys)
    return tree


def make_trainer(tree):
    from peer_dist.training import Trainer

    return Trainer(parse_config(tree, "test"))


def trained(rank, world_size, tree, steps):
    """Losses and gradient norms of the first steps."""
    trainer = make_trainer(tree)
    values = [trainer.step() for _ in range(steps)]
    return [v["train/loss"] for v in values], [v["optimizer/grad_norm"] for v in values]


def run_to_the_end(rank, world_size, tree, at=None, sent=signal.SIGKILL):
    """A whole run as the command makes it; in step ``at``, if given, rank 1 gets a signal."""
    from peer_dist.training import Trainer

    class Mortal(Trainer):
        def step(self):
            if rank == 1 and self.steps_done == at:
                os.kill(os.getpid(), sent)
            return super().step()

    with StopRequest() as stop:
        Mortal(parse_config(tree, "test")).run(stop)
    return True


def command(tree, folder, before=None, ranks=2):
    """`peer-dist train` on ``ranks`` ranks."""
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(tree))
    return Command(ranks, ["train", "--config", str(config)], folder / "stderr", before)


def losses_of(tree):
    return {line["step"]: line["train/loss"] for line in metrics_of(tree) if "train/loss" in line}


def metrics_of(tree):
    return read_metrics(Path(tree["logging"]["dir"]) / "metrics.jsonl")


def scalars_of(tree, name):
    """What TensorBoard shows: pairs of step and value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return [(event.step, event.value) for event in EventAccumulator(tree["logging"]["dir"]).Reload().Scalars(name)]


def assert_close(got, want, tolerance):
    assert len(got) == len(want)
    for step, (a, b) in enumerate(zip(got, want)):
        assert a == pytest.approx(b, rel=tolerance), f"step {step + 1}"


def in_folder(tree, folder):
    """The same run with its checkpoints and logs in a folder of their own."""
    return with_keys(tree, checkpoint={"dir": str(folder / "checkpoints")}, logging={"dir": str(folder / "logs")})


def copy_checkpoint(source, target, step):
    """Let a run go on from what another of the same config had saved in ``step``."""
    name = f"step-{step:08d}"
    shutil.copytree(Path(source["checkpoint"]["dir"]) / name, Path(target["checkpoint"]["dir"]) / name)


def assert_learns_and_resumes_bit_for_bit(small, tmp_path):
    """Ten steps on two ranks, whose losses fall, and the last six again from the fourth one's checkpoint."""
    quiet = with_keys(in_folder(small, tmp_path / "quiet"), checkpoint={"keep": 3})
    run_ranks(run_to_the_end, 2, quiet)
    copy_checkpoint(quiet, small, 4)
    run_ranks(run_to_the_end, 2, small)
    losses = losses_of(quiet)
    assert losses_of(small) == {step: losses[step] for step in range(5, 11)}
    assert losses[10] < losses[1] - 0.3
