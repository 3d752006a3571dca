"""The device that tests of a GPU run on, and what they compare it with."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peer_dist.kernels import Picks
from peer_dist.layers.product_keys import retrieve
from peer_dist.sharding import exchange

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

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
