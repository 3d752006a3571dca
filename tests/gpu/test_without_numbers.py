"""Layers on a device that has no numbers: torch's ``meta``. Where a GPU would make the host wait for a number, it
refuses to say one, and it refuses tensors of another device. The GPU's kernels are chosen and their launches looked at.
Copies from the host, for which it waits too, are refused.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import peer_dist.kernels as package
from peer_dist import PEER
from peer_dist.kernels import Picks, updates
from peer_dist.kernels.custom_ops import functions
from peer_dist.layers import product_keys
from peer_dist.layers.router import CosineLogits, LinearLogits, Router, Rule
from peer_dist.optim import TableOptimizer, TableRule
from peer_dist.sharding import ExpertGroups, GridLayout, exchange
from peer_dist.sharding.transport import SymmetricMemory
from peer_dist.sharding.wire import WIRES
from tests.gpu.test_layers import LAYERS

pytestmark = pytest.mark.gpu
pytest.importorskip("triton")

from peer_dist.kernels import triton as kernels  # noqa: E402
from peer_dist.kernels.triton import launching  # noqa: E402

META, CPU = torch.device("meta"), torch.device("cpu")
TOKENS, PICKED_ROWS = 40, 17


class NoCopies(TorchFunctionMode):
    """Nothing is made on the host and copied to the device."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made = function in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor)
        copied = (
            function in (torch.Tensor.to, torch.Tensor.copy_) and args[function is torch.Tensor.copy_].device == CPU
        )
        assert not (made or copied) or out.device == CPU, f"{function.__name__} copies from the host"
        return out


class Operators(TorchDispatchMode):
    """Our operators are really run, where torch would ask for shapes alone."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "peer_dist":
            with NoCopies():
                return functions[function.name().partition("::")[2]](*args)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that would be launched; all other backends are out of reach."""
    names = []

    def record(kernel, grid, *args, num_warps, **constants):
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        assert {value.device for value in tensors} == {META}
        assert all(value.is_contiguous() for value in tensors)
        names.append(getattr(kernel, "__name__", None) or kernel.fn.__name__)

    def segments(picks):
        """Of some number of rows, which is asked of the device."""
        rows = torch.empty(PICKED_ROWS, dtype=torch.int64, device=META)
        return rows, torch.empty(PICKED_ROWS + 1, dtype=torch.int32, device=META)

    monkeypatch.setattr(launching, "launch", record)
    monkeypatch.setattr(package, "backend", lambda *tensors: kernels)
    monkeypatch.setattr(Picks, "segments", property(segments))
    monkeypatch.setitem(product_keys.CHUNK_TOKENS, "meta", 16)
    return names


def meta_layer(kind, options, **more):
    number = "num_experts" if kind is PEER else "num_values"
    sizes = {"dim": 96, "heads": 3, "top_k": 8, "key_dim": 32, number: 32**2}
    return kind(**{**sizes, **options, **more}, device=META, dtype=torch.bfloat16)


def step(call, layer=None):
    layer = call if layer is None else layer
    x = torch.empty(TOKENS, layer.dim, device=META, dtype=torch.bfloat16, requires_grad=True)
    with NoCopies(), Operators():
        y = call(x)
        assert y.device == META
        assert y.dtype == x.dtype
        return torch.autograd.grad(y, [x, *layer.parameters()], torch.empty_like(y))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(("kind", "options"), LAYERS, ids=str)
def test_no_layer_asks_the_device_for_a_number(kind, options, mode, launched):
    layer = meta_layer(kind, options)
    grads = step(getattr(layer, mode)())
    sparse = options.get("sparse_grad", False)
    assert [grad.is_sparse for grad, (name, _) in zip(grads[1:], layer.named_parameters())] == [
        sparse and name in ("down", "up", "values") for name, _ in layer.named_parameters()
    ]
    assert "_runs_kernel" in launched
    assert ("_token_kernel" if kind is PEER else "_mix_kernel") in launched
    retrieval = "_halves_kernel", "_pairs_kernel", "_query_grad_kernel", "_key_grad_kernel"
    assert [launched.count(name) for name in retrieval] == [3] * 4  # one each for every 16 tokens


@pytest.fixture
def sent_evenly(parallel, monkeypatch):
    """A grid of one rank that sends to itself; the counts are those of tokens with two experts each."""
    monkeypatch.setattr(GridLayout, "spread", property(lambda layout: layout.groups is not None))
    asked = []

    def counts(value):
        asked.append(value)
        assert value.device == META
        parts = value.shape[-2]
        tokens = np.array([TOKENS * (part + 1) // parts - TOKENS * part // parts for part in range(parts)])
        return np.broadcast_to(np.stack([tokens, 2 * tokens], -1), value.shape).copy()

    monkeypatch.setattr(exchange, "on_host", counts)
    work = type("Work", (), {"wait": lambda self: None})
    monkeypatch.setattr(dist, "all_to_all_single", lambda out, x, *sizes, **options: _checked(out, x, *sizes) or work())
    monkeypatch.setattr(dist, "all_reduce", lambda *args, **options: None)
    return asked


def _checked(out, x, *sizes):
    assert out.device == x.device == META
    for value, rows in zip((out, x), sizes):
        assert sum(rows) == len(value)


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize(("kind", "options"), LAYERS, ids=str)
def test_an_exchange_asks_once_in_its_forward_pass(kind, options, chunks, launched, sent_evenly):
    parts = {"dispatch_chunks": chunks} if kind is PEER else {}
    layer = meta_layer(kind, options, group=ExpertGroups.over(dist.group.WORLD), **parts)
    step(layer)
    assert len(sent_evenly) == 1
    assert "_runs_kernel" in launched


def waits(asked, layer):
    """How often the host waits in a step, and in a step of which the whole layer is recomputed."""
    asked.clear()
    step(layer)
    once = len(asked)
    asked.clear()
    step(lambda x: checkpoint(layer, x, use_reentrant=False), layer)
    return once, len(asked)


@pytest.mark.parametrize(("kind", "options"), LAYERS[:2], ids=str)
def test_recomputation_makes_the_plan_again(kind, options, launched, sent_evenly):
    layer = meta_layer(kind, options, group=ExpertGroups.over(dist.group.WORLD))
    assert waits(sent_evenly, layer) == (1, 2)


@pytest.fixture
def sizes_on_device(sent_evenly, monkeypatch):
    """Symmetric memory, whose operator and buffers have no numbers; more than one row shard, so that rows travel."""
    calls = []

    def vdev(x, out, sizes, arrived, group_name):
        assert {value.device for value in (x, out, sizes, arrived)} == {META}
        calls.append((tuple(x.shape), tuple(out.shape)))

    monkeypatch.setattr(symmetric_memory, "is_nvshmem_available", lambda: True)
    monkeypatch.setattr(symmetric_memory, "set_backend", lambda name: None)
    monkeypatch.setattr(symmetric_memory, "empty", torch.empty)
    monkeypatch.setattr(torch.ops.symm_mem, "all_to_all_vdev", vdev, raising=False)
    monkeypatch.setattr(dist, "all_to_all_single", lambda out, x, group: None)
    return calls


@pytest.mark.parametrize("wire", [None, "float8"])
@pytest.mark.parametrize(("kind", "options"), LAYERS, ids=str)
def test_symmetric_memory_never_asks(kind, options, wire, launched, sent_evenly, sizes_on_device):
    """Neither forward nor backward nor recomputed, and shapes are the same whatever the picks: all that the capture of
    a CUDA graph needs.
    """
    if options.get("sparse_grad"):
        pytest.skip("the host asks for the number of touched rows")
    world = dist.group.WORLD
    groups = ExpertGroups(world, world, wire=WIRES[wire], transport=SymmetricMemory())
    layer = meta_layer(kind, options, group=groups)
    step(layer)
    first = list(sizes_on_device)
    assert len(first) == (7 if kind is PEER else 5)  # picks, gates, x, y, dy, dx, dgates; of values no x and no dx
    sizes_on_device.clear()
    step(layer)
    assert sizes_on_device == first
    assert waits(sent_evenly, layer) == (0, 0)
    assert "_runs_kernel" in launched


RULES = [
    Rule(2), Rule(3, score="sigmoid", bias_rate=0.1, balance_loss=0.1), Rule(2, normalize=False, dropout=0.2),
    Rule(2, expert_choice=True, z_loss=0.1), Rule(2, entropy_loss=0.1, balance_loss=0.1),
]  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(
    "logits", [LinearLogits(12, 6, 0.1), CosineLogits(12, 6, 4)], ids=lambda part: type(part).__name__
)
def test_no_router_asks_the_device_for_a_number(logits, rule):
    router = Router(logits, 6, rule).to(META)
    x = torch.empty(8, 3, 12, device=META, requires_grad=True)
    with NoCopies():
        gates, picked = router(x)
        assert gates.device == picked.device == META
        torch.autograd.grad(gates.sum(), [x, *router.parameters()])
        router.end_step(True)


@pytest.mark.parametrize("kind", ["adam", "rowwise_adam", "rowwise_adagrad"])
@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("way", ["float32", "master", "rounded", "columns"])
def test_no_update_of_tables_asks_the_device_for_a_number(kind, lazy, way, launched, monkeypatch):
    """A lazy one has one micro-batch a step, whose gradient is known to be merged. A table takes a launch for the norm
    and one for the step; on columns the rows' sums are taken once more.
    """
    monkeypatch.setattr(dist, "all_reduce", lambda *args, **options: None)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(updates, "backend", lambda *tensors: kernels.updates)
    dtype = torch.float32 if way == "float32" else torch.bfloat16
    table = torch.empty(64, 12, device=META, dtype=dtype, requires_grad=True)
    rule = TableRule(kind, 1e-3, (0.9, 0.99), 1e-8, 0.1, lazy=lazy, rounding_seed=1 if way == "rounded" else None)
    columns = object() if way == "columns" else None
    optimizer = TableOptimizer({"t": table}, rule, 12, columns=columns, data_parallel_size=2)
    if lazy:
        rows, values = (
            torch.empty(1, 5, dtype=torch.int64, device=META),
            torch.empty(5, 12, device=META, dtype=table.dtype),
        )
        grad = torch.sparse_coo_tensor(rows, values, table.shape, is_coalesced=True, check_invariants=False)
    else:
        grad = torch.empty_like(table)
    table.backward(grad)
    with NoCopies():
        assert optimizer.grad_norm(META).device == META
        optimizer.step(0.5)
    sums = 2 if way == "columns" and kind != "adam" else 1
    assert sorted(launched) == ["_squares_kernel"] * sums + ["_update_kernel"]
