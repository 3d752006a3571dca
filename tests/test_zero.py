"""What surrounds DeepSpeed: what it is told of the machine, and where norms go when its own are in host memory."""

import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from peer_dist.megatron import run_forward_backward
from tests.ranks import run_ranks
from tests.runs import make_trainer, with_keys

IMPORTING = """
import os
os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed.ops
from deepspeed.accelerator import cuda_accelerator
from deepspeed.comm.torch import build_shm_op

def probe():
    raise AssertionError("compilers were started")

deepspeed.ops._probe_compatible_ops = probe
cuda_accelerator.pynvml = "as where it is installed"
os.environ["DS_ACCELERATOR"] = "xpu"
import peer_dist.engines.zero
assert build_shm_op() is None
assert cuda_accelerator.pynvml is None
assert os.environ["DS_ACCELERATOR"] == "cpu"
"""


def test_deepspeed_starts_no_compiler_and_follows_no_other_machine():
    """Importing it prints nothing: ``peer-dist doctor --json`` prints JSON alone."""
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": "GPU-0aa71b,MIG-7"}  # names, of which this machine has none
    command = [sys.executable, "-c", IMPORTING]
    run = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, ""), run.stderr


def test_the_norm_of_the_shards_goes_where_deepspeeds_own_is(monkeypatch):
    """With offload that is host memory; a tensor there cannot be scaled by one on the device."""
    from peer_dist.engines import zero

    combined = []
    monkeypatch.setattr(zero, "combine_grad_norm_groups", lambda norms: combined.append(norms) or 1.0)
    engine = object.__new__(zero.ZeroEngine)
    with FakeTensorMode():
        shards = torch.ones((), device="cuda")
        for dense in (torch.ones((), device="cpu"), torch.ones((), device="cuda")):
            engine._global_norm([dense, dense], shards)
            assert [norm.device.type for norm in combined.pop()] == [dense.device.type] * 3


def told(rank, world_size, tree):
    trainer = make_trainer(tree)
    engine, offload = trainer.engine._engine, trainer.engine._engine._config.zero_config.offload_optimizer
    asked = []
    trainer.engine._engine.get_global_grad_norm = lambda: asked.append(1)
    trainer.step()
    return engine.tput_timer.config.enabled, offload and offload.pin_memory, len(asked)


@pytest.mark.parametrize("zero", [{"stage": 1}, {"stage": 2, "offload": True}, {"stage": 3, "offload": True}])
def test_no_step_waits_for_what_nobody_reads(small, zero):
    """DeepSpeed's throughput timer waits for the device, and its norm is asked for once the update is queued."""
    small = with_keys(small, zero=zero, model={"num_layers": 1, "mlp": "peer"})
    pinned = False if "offload" in zero else None
    assert run_ranks(told, 1, small) == [(False, pinned, 0)]


def copied(rank, world_size, tree):
    """Elements of the bucket, and of the largest tensor that is made of several to be reduced."""
    trainer = make_trainer(tree)
    zero, made = trainer.engine._zero, []
    flatten = zero.flatten

    def watched(tensors):
        whole = flatten(tensors)
        made.append(0 if whole.data_ptr() == tensors[0].data_ptr() else whole.numel())
        return whole

    zero.flatten = watched
    with trainer.engine.accumulate():
        run_forward_backward(trainer.model, trainer._micro_batches(0))
    return zero.reduce_bucket_size, max(made, default=0)


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_is_reduced_is_a_copy_of_the_bucket(small, ranks):
    """As the plan counts it: with several data-parallel ranks, to each of which a part of it goes."""
    for bucket, made in run_ranks(copied, ranks, with_keys(small, zero={"stage": 2})):
        assert made == (bucket if ranks > 1 else 0)
