"""Training on the GPU, through the trainer and by the commands, against CPU ranks of the same run.

Runs start from a CPU rank's checkpoint, since a GPU draws other weights. On a GPU they are made in this process, one
after the other, so that CUDA and Megatron start once.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml

from peer_dist.checkpoints.store import verify_checkpoint
from peer_dist.config import parse_config
from peer_dist.ranks.signals import StopRequest
from tests.gpu.device import DEVICE, needs_gpu
from tests.ranks import Forked, run_ranks
from tests.runs import (
    assert_close,
    copy_checkpoint,
    in_folder,
    losses_of,
    make_trainer,
    metrics_of,
    run_to_the_end,
    small_config,
    with_keys,
)

pytestmark = pytest.mark.gpu
START, END = 2, 12  # ten steps
FP32, BF16 = {"precision": "fp32"}, {"precision": "bf16"}


@pytest.fixture(scope="module")
def world():
    """Calls ``fn(rank, world_size, *args)`` in a world of one rank, on a GPU in this process, else in its own."""
    if DEVICE.type == "cpu":
        yield lambda fn, *args: run_ranks(fn, 1, *args)[0]
        return
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield lambda fn, *args: fn(0, 1, *args)
    dist.destroy_process_group()


@contextlib.contextmanager
def trainer_of(tree):
    trainer = make_trainer(tree)
    assert trainer.parallel.device.type == DEVICE.type
    try:
        yield trainer
    finally:
        trainer.parallel.destroy()


def run_here(rank, world_size, tree):
    """A whole run, as the command makes it: its last weights. Its checkpoints are whole."""
    with trainer_of(tree) as trainer, StopRequest() as stop:
        trainer.run(stop)
        for path in Path(tree["checkpoint"]["dir"]).glob("step-*"):
            verify_checkpoint(path)
        return [parameter.detach().cpu() for parameter in trainer.model.parameters()] + [
            shard.detach().cpu() for layer in trainer.layers.values() for shard in (layer.down, layer.up)
        ]


def steps_here(rank, world_size, tree):
    """The numbers of the steps from a checkpoint on."""
    with trainer_of(tree) as trainer:
        assert trainer.steps_done == START
        return [trainer.step() for _ in range(END - START)]


TABLES = {
    "adam": {},
    "lazy": {"table_optimizer": {"name": "rowwise_adagrad", "lazy": True}},
    "rounded": {
        "peer": {"table_dtype": "bfloat16"},
        "table_optimizer": {"name": "rowwise_adagrad", "lazy": True, "stochastic_rounding": True},
    },
}


@pytest.fixture(scope="module")
def on_cpu(text, tmp_path_factory):
    """Runs in float32 on a CPU rank, by the tables' optimizer, with a checkpoint of every other step."""
    trees = {}
    for name, keys in TABLES.items():
        folder = tmp_path_factory.mktemp(f"cpu-{name}")
        tree = with_keys(small_config(text, folder), **keys)
        tree = with_keys(tree, train={"steps": END}, checkpoint={"interval": 2, "keep": 9}, logging={"interval": 1})
        run_ranks(run_to_the_end, 1, tree)
        trees[name] = tree
    return trees


MODES = {
    **{f"fp32, ZeRO {stage}": {"zero": {"stage": stage}, "train": FP32} for stage in range(4)},
    **{f"bf16, ZeRO {stage}": {"zero": {"stage": stage}, "train": BF16} for stage in range(4)},
    **{f"fp32, ZeRO {n}, offload": {"zero": {"stage": n, "offload": True}, "train": FP32} for n in (1, 2, 3)},
    **{f"bf16, ZeRO {n}, offload": {"zero": {"stage": n, "offload": True}, "train": BF16} for n in (1, 2, 3)},
    "fp32, recomputed": {"train": {**FP32, "recompute_layers": 3}},
    "bf16, recomputed": {"train": {**BF16, "recompute_layers": 3}},
    "fp32, lazy": {"train": FP32},
    "bf16, lazy": {"train": BF16},
    "fp32, rounded": {"train": FP32},
    "bf16, rounded": {"train": BF16},
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_ten_steps(mode, on_cpu, world, tmp_path):
    """Losses and norms within 1e-4 of the CPU's in fp32; in bf16 losses within 1%."""
    reference = on_cpu[mode.rpartition(", ")[2] if mode.rpartition(", ")[2] in TABLES else "adam"]
    tree = with_keys(in_folder(reference, tmp_path), **MODES[mode])
    copy_checkpoint(reference, tree, START)
    values = world(steps_here, tree)
    lines = {line["step"]: line for line in metrics_of(reference) if "train/loss" in line}
    want = [lines[step] for step in range(START + 1, END + 1)]
    fp32 = mode.startswith("fp32")
    pairs = [(value["train/loss"], line["train/loss"]) for value, line in zip(values, want)]
    assert_close(*zip(*pairs), 1e-4 if fp32 else 1e-2)
    if fp32:
        pairs = [(value["optimizer/grad_norm"], line["optimizer/grad_norm"]) for value, line in zip(values, want)]
        assert_close(*zip(*pairs), 1e-3 if mode.endswith("rounded") else 1e-4)
    for value in values:
        spans = [value[f"time/{name}"] for name in ("retrieve", "dispatch", "experts", "combine", "optimizer", "other")]
        assert all(seconds >= 0 for seconds in spans)
        assert value["time/experts"] > 0
        assert sum(spans) == pytest.approx(value["time/step"], rel=0.05)


RESUMED = {
    "bf16, ZeRO 1": {"train": BF16},
    "fp32, ZeRO 0": {"train": FP32, "zero": {"stage": 0}},
    "bf16, ZeRO 3, offload": {"train": BF16, "zero": {"stage": 3, "offload": True}},
    "bf16, rounded, recomputed": {"train": {**BF16, "recompute_layers": 3}, **TABLES["rounded"]},
    "bf16, asynchronous": {"train": BF16, "checkpoint": {"asynchronous": True}},
}


@pytest.mark.parametrize("mode", RESUMED)
def test_resumes_bit_for_bit(mode, small, world, tmp_path):
    quiet = with_keys(in_folder(with_keys(small, **RESUMED[mode]), tmp_path / "quiet"), checkpoint={"keep": 3})
    want = world(run_here, quiet)
    again = in_folder(quiet, tmp_path / "again")
    copy_checkpoint(quiet, again, 4)
    got = world(run_here, again)
    losses = losses_of(quiet)
    assert losses_of(again) == {step: losses[step] for step in range(5, 11)}
    assert all(a.equal(b) for a, b in zip(got, want, strict=True))


def test_checkpoints_go_from_device_to_device(on_cpu, world, tmp_path):
    """Two steps on the GPU from the CPU's checkpoint, two on the CPU from the GPU's, and back."""
    reference = on_cpu["adam"]
    tree = in_folder(reference, tmp_path)
    copy_checkpoint(reference, tree, START)
    for number, steps in enumerate((4, 6, 8)):
        leg = with_keys(tree, train={"steps": steps})
        if number % 2:
            run_ranks(run_to_the_end, 1, leg)
        else:
            world(run_here, leg)
    got, want = losses_of(tree), losses_of(reference)
    assert list(got) == list(range(START + 1, 9))
    assert_close([got[step] for step in got], [want[step] for step in got], 1e-4)


def start(args, output):
    """`peer-dist ARGS`, in a process of its own where there is a GPU, which no fork can use."""
    if DEVICE.type == "cpu":
        return Forked(args, output)
    with open(output, "a") as file:
        return subprocess.Popen([sys.executable, "-m", "peer_dist", *args], stdout=file, stderr=file)


def ended(commands, seconds=180):
    """The words of `peer-dist` commands that run beside each other, once all have ended well.

    Args:
        commands: arguments of each, and the file for its words.
    """
    processes, end = [start(args, output) for args, output in commands], time.monotonic() + seconds
    try:
        while any(process.poll() is None for process in processes) and time.monotonic() < end:
            time.sleep(0.05)
        words = [output.read_text() for _, output in commands]
        assert [process.poll() for process in processes] == [0] * len(commands), "\n".join(words)
        return words
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)


def saved(tree, folder):
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


commands = pytest.mark.slow  # on the CPU the default run has such commands in files of their own


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    """A run by the command, profiled."""
    folder = tmp_path_factory.mktemp("trained")
    tree = with_keys(small_config(text, folder), checkpoint={"keep": 3}, train=BF16)
    ended([(["train", "--config", saved(tree, folder), "--profile", "6:7"], folder / "words")])
    return tree, folder


@commands
def test_killed_and_resumed_bit_for_bit(trained, tmp_path):
    """By SIGKILL in its seventh step or later; what it goes on with is what an undisturbed run did."""
    quiet, _ = trained
    tree = with_keys(in_folder(quiet, tmp_path), train={"steps": 2000})
    output = tmp_path / "words"
    process = start(["train", "--config", saved(tree, tmp_path)], output)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if max(losses_of(tree), default=0) >= 6:
                break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    while process.poll() is None:
        time.sleep(0.02)
    for step in Path(tree["checkpoint"]["dir"]).glob("step-*"):  # it was fast: none after the fourth may help
        if step.name > "step-00000004":
            shutil.rmtree(step)
    ended([(["train", "--config", saved(with_keys(tree, train={"steps": 10}), tmp_path)], output)])
    assert losses_of(tree) == losses_of(quiet)


@commands
def test_profile(trained):
    tree, _ = trained
    folder = Path(tree["logging"]["dir"]) / "profile"
    names = sorted(path.name for path in folder.iterdir())
    assert any(name.endswith(".json.gz") for name in names), names
    if DEVICE.type == "cuda":
        (snapshot,) = folder.glob("*-memory.pickle")
        assert snapshot.stat().st_size > 1000


@commands
def test_evaluate_generate_export(trained, tmp_path):
    tree, _ = trained
    checkpoint = ["--checkpoint", tree["checkpoint"]["dir"]]
    evaluated, generated, _ = ended(
        [
            (["evaluate", *checkpoint, "--json"], tmp_path / "evaluate"),
            (["generate", *checkpoint, "--prompt", "ROMEO:", "--tokens", "20"], tmp_path / "generate"),
            (["export", *checkpoint, "--output", str(tmp_path / "exported")], tmp_path / "export"),
        ]
    )
    report, _ = json.JSONDecoder().raw_decode(evaluated, evaluated.index("{"))
    assert report["step"] == 10
    held_out = [line["val/loss"] for line in metrics_of(tree) if "val/loss" in line]
    assert report["loss"] == pytest.approx(held_out[-1], rel=0.03)  # of a batch of the same text
    assert "ROMEO:" in generated
    assert list((tmp_path / "exported").glob("*.safetensors"))


@needs_gpu
def test_peak_memory_is_that_of_the_plan(world, text, tmp_path):
    """Within a tenth, for a model whose tables and activations are far larger than the allocator's rounding."""
    from peer_dist.planning.hardware import load_hardware
    from peer_dist.planning.plan import plan

    tree = with_keys(
        small_config(text, tmp_path),
        model={"hidden_size": 1024, "num_attention_heads": 16, "ffn_hidden_size": 4096, "seq_length": 1024},
        peer={"num_experts": 256**2, "heads": 8, "top_k": 16, "key_dim": 128},
        train={"micro_batch_size": 4, "global_batch_size": 8, **BF16},
    )
    with trainer_of(tree) as trainer:
        trainer.step()
        torch.cuda.reset_peak_memory_stats()
        trainer.step()
        peak = torch.cuda.max_memory_allocated()
        vocab_size = trainer.data.tokenizer.padded_vocab_size
    predicted = plan(parse_config(tree, "test"), 1, 1, load_hardware("h100"), vocab_size, 1.0)
    assert predicted.memory.peak == pytest.approx(peak, rel=0.1)


@needs_gpu
def test_nccl_flight_recorder(tmp_path):
    """The files that a hang leaves, made by hand: there and readable."""
    code = f"""
import pickle, torch, torch.distributed as dist
from peer_dist.ranks.watchdog import record_nccl
record_nccl({str(tmp_path)!r})
torch.cuda.set_device(0)
dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
dist.all_reduce(torch.ones(3, device="cuda"))
trace = pickle.loads(torch._C._distributed_c10d._dump_nccl_trace())
assert any("all_reduce" in entry["profiling_name"] for entry in trace["entries"]), trace
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert result.returncode == 0, result.stderr
