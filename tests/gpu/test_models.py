"""Whole models of every kind of layer on the GPU, in Megatron-core without its stand-in, against float64 on the CPU."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from peer_dist.megatron import Parallel, build_model, run_forward_backward, sparse_layers
from tests.gpu.device import DEVICE, assert_same
from tests.models import CASES, SMALL, VOCAB, make, make_batch
from tests.ranks import run_ranks

pytestmark = pytest.mark.gpu

FULL = {
    section: {**keys, "table_dtype": "float32"} if "table_dtype" in keys else keys for section, keys in SMALL.items()
}


def passed(model, dtype, seed, device):
    """Loss, picks and every gradient of a batch."""
    batch = {
        name: value if value is None else value.to(device, dtype if value.is_floating_point() else None)
        for name, value in make_batch(seed).items()
    }
    picks = []
    for layer in sparse_layers(model).values():
        layer.on_route = lambda indices, gates: picks.append(indices.sort().values.cpu())
    model.zero_grad()
    loss = run_forward_backward(model, [batch], 0.1)
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return loss.double().cpu(), picks, {name: grad.detach().double().cpu() for name, grad in grads.items()}


def in_float64(rank, world_size, changes, weights, seeds):
    """The same of some batches, on the CPU."""
    parallel = Parallel.initialize()
    model = build_model(make(changes, FULL), parallel, VOCAB, torch.float64).double()
    model.load_state_dict(
        {name: value.double() if value.is_floating_point() else value for name, value in weights.items()}
    )
    return [passed(model, torch.float64, seed, "cpu") for seed in seeds]


@pytest.mark.parametrize("changes", CASES, ids=str)
def test_model(changes, parallel):
    """Loss and every gradient in float32, on the first of some batches where rounding moves no pick."""
    model = build_model(make(changes, FULL), parallel, VOCAB, torch.float32)
    weights = {name: value.cpu() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    seeds = range(3)
    (wanted,) = run_ranks(in_float64, 1, changes, weights, seeds)
    pairs = ((passed(model, torch.float32, seed, DEVICE), want) for seed, want in zip(seeds, wanted))
    alike = (pair for pair in pairs if all(map(torch.equal, pair[0][1], pair[1][1])))
    got, (loss, _, grads) = next(alike, (None, (None,) * 3))
    assert got is not None, "other picks in every batch"
    assert got[2].keys() == grads.keys()
    assert_same([got[0]], [loss], 1e-5)
    scale = max(float(grad.norm()) for grad in grads.values())
    for name, grad in grads.items():
        error = float((got[2][name] - grad).norm())
        assert error <= 2e-4 * float(grad.norm()) + 1e-6 * scale, name
    assert dist.get_backend() == ("nccl" if DEVICE.type == "cuda" else "gloo")
