"""The device that tests of a GPU run on, and what they compare it with."""

from __future__ import annotations

import contextlib
import copy
import pickle
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn

from peer_dist.kernels import Picks
from peer_dist.layers.product_keys import retrieve
from peer_dist.sharding import exchange
from tests.ranks import run_ranks

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

LIMIT = 120  # seconds for a case on several GPUs

needs_gpu = pytest.mark.skipif(DEVICE.type == "cpu", reason="no GPU: says nothing of a CPU")


def dense(tensor: Tensor) -> Tensor:
    """In float64 on the CPU, sparse or not."""
    tensor = tensor.detach()
    return (tensor.to_dense() if tensor.is_sparse else tensor).double().cpu()


def assert_same(got: list[Tensor], want: list[Tensor], tolerance: float) -> None:
    """Whole tensors, relative to their size."""
    assert len(got) == len(want)
    for number, (one, other) in enumerate(zip(map(dense, got), map(dense, want))):
        assert one.shape == other.shape, number
        error = float((one - other).norm() / other.norm().clamp_min(1e-30))
        assert error <= tolerance, f"tensor {number} of {len(got)}: relative error {error:.1e}"


def run(layer: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """The output, the gradient of the input, and that of each parameter."""
    x = x.clone().requires_grad_()
    y = layer(x)
    return [y, *torch.autograd.grad(y, [x, *layer.parameters()], dy.to(y.dtype))]


def clear_tokens(layer: Any, x: Tensor, margin: float) -> Tensor:
    """Those of ``x [tokens, dim]``, float64, whose picks are the same whatever the rounding: with a gap of ``margin``
    between the last score that is picked and the first that is not, when they are the whole batch.
    """
    layer = copy.deepcopy(layer)
    while True:
        if layer.query is None:
            query = x[:, None].expand(-1, layer.heads, -1)
        else:
            query = layer.norm(layer.query(x).unflatten(-1, (layer.heads, layer.key_dim)))
        keys = layer._product_keys() if hasattr(layer, "_product_keys") else layer.keys
        scores = retrieve(query, keys, layer.top_k + 1)[1]
        clear = (scores[..., -2] - scores[..., -1] > margin).all(1)
        if clear.all():
            return x.detach()
        x = x[clear]
        assert len(x) > 8, "hardly a token is left"


@contextlib.contextmanager
def waits_are_named(patch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """On a GPU an error for each wait of the host for the device, but for those with a name, which are listed."""
    met: list[str] = []

    def allowed(name: str, function: Any) -> Any:
        def call(*args: Any) -> Any:
            met.append(name)
            if DEVICE.type == "cpu":
                return function(*args)
            torch.cuda.set_sync_debug_mode("default")
            try:
                return function(*args)
            finally:
                torch.cuda.set_sync_debug_mode("error")

        return call

    patch.setattr(exchange, "on_host", allowed("sizes of what is exchanged", exchange.on_host))
    segments = allowed("number of rows that a sparse gradient has", Picks.segments.func)
    patch.setattr(Picks, "segments", property(segments))
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield met
    finally:
        if DEVICE.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def on_cpu(value: Any) -> Any:
    """What a rank of a GPU returns, its tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: on_cpu(part) for key, part in value.items()}
    return type(value)(map(on_cpu, value)) if isinstance(value, (list, tuple)) else value


def _gpu_rank(
    rank: int, world_size: int, store: str, fn: Callable[..., Any], args: tuple[Any, ...], results: Any
) -> None:
    torch.cuda.set_device(rank)
    limit = timedelta(seconds=LIMIT)
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=limit)
    # by value: torch's own pickling would have this process serve the tensors, which may leave before they are read
    results.put((rank, pickle.dumps(on_cpu(fn(rank, world_size, *args)))))
    dist.barrier(device_ids=[rank])
    dist.destroy_process_group()


def run_on_devices(fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """``fn(rank, world_size, *args)`` over NCCL on a GPU for each rank, or on CPU ranks; the results in rank order."""
    if DEVICE.type == "cpu":
        return run_ranks(fn, world_size, *args)
    results = multiprocessing.get_context("spawn").SimpleQueue()
    found: dict[int, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world_size, f"{folder}/store", fn, args, results)
        ranks = multiprocessing.spawn(_gpu_rank, arguments, world_size, join=False)
        end = time.monotonic() + LIMIT
        while len(found) < world_size:
            if time.monotonic() > end:
                for process in ranks.processes:
                    process.kill()
                raise AssertionError(f"{world_size - len(found)} of {world_size} ranks did not finish in {LIMIT} s")
            if results.empty():
                ranks.join(timeout=0.1)  # raises what a rank raised
            else:
                rank, value = results.get()
                found[rank] = pickle.loads(value)
        while not ranks.join():
            pass
    return [found[rank] for rank in range(world_size)]
