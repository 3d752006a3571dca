"""Layers whose tables lie elsewhere or have eight bits, in anybody's program: built, moved, cast, copied, loaded."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peer_dist import PEER, ProductKeyMemory, exempt_tables
from peer_dist.kernels.disk import is_mapped
from peer_dist.kernels.eight_bit import scales_of
from peer_dist.kernels.far import far_rows_of
from peer_dist.optim import TableOptimizer, TableRule
from tests.ranks import run_ranks

MEMORIES = ("device", "host", "disk")
EIGHT = (torch.int8, torch.float8_e4m3fn)
HELD = [case for case in itertools.product(MEMORIES, (torch.float32, torch.bfloat16, *EIGHT)) if case[0] != "device"]
HELD += [("device", dtype) for dtype in EIGHT]
held = pytest.mark.parametrize(("memory", "dtype"), HELD)


def peer(**options: Any) -> PEER:
    return PEER(16, 64, 2, 3, 8, "rms", **{"seed": 1, "table_cache_gb": 2e-6, **options})


def memory_layer(**options: Any) -> ProductKeyMemory:
    return ProductKeyMemory(16, 64, 2, 3, 8, "rms", **{"seed": 1, "table_cache_gb": 1e-6, **options})


def tokens() -> Tensor:
    return torch.randn(7, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float32, device="cpu")


def is_there(layer: PEER, memory: str, dtype: torch.dtype) -> None:
    """Its tables lie where they should, and their scales with them."""
    for table in layer.tables().values():
        assert (far_rows_of(table) is not None) == (memory != "device")
        assert is_mapped(table) == (memory == "disk")
        assert (scales_of(table) is not None) == (dtype in EIGHT)
    if dtype in EIGHT:
        assert layer.up.scales is layer.up_scales
        assert layer.up_scales.dtype == torch.float32
    assert (far_rows_of(layer.down) is far_rows_of(layer.up)) or memory == "device"


@held
@pytest.mark.parametrize("make", [peer, memory_layer])
def test_computes_what_an_ordinary_layer_does(
    make: Callable[..., PEER | ProductKeyMemory], memory: str, dtype: torch.dtype
) -> None:
    """Of the same values; the gradients of far tables are sparse, those of eight bits are none."""
    layer, twin = make(table_memory=memory, table_dtype=dtype), make()
    twin.load_state_dict(layer.state_dict())
    inputs = [tokens().requires_grad_() for _ in range(2)]
    for one, x in zip((layer, twin), inputs, strict=True):
        y = one(x)
        y.square().sum().backward()
    torch.testing.assert_close(layer(inputs[0]), twin(inputs[1]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-4, atol=1e-5)
    for name, table in layer.tables().items():
        if dtype in EIGHT:
            assert table.grad is None
            assert not table.requires_grad
        else:
            assert table.grad.is_sparse
            rounded = 1e-2 if dtype == torch.bfloat16 else 1e-5
            want = getattr(twin, name).grad
            torch.testing.assert_close(table.grad.to_dense().float(), want, rtol=rounded, atol=rounded)


@held
def test_copied_cast_and_loaded(memory: str, dtype: torch.dtype) -> None:
    layer, x = peer(table_memory=memory, table_dtype=dtype), tokens()
    want = layer(x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        is_there(other, memory, dtype)
        assert torch.equal(other(x), want)
        with torch.no_grad():
            other.zero_output()
        assert not other(x).any()
    assert torch.equal(layer(x), want), "copies are others"
    state = layer.state_dict()
    assert state["down"].dtype == (torch.bfloat16 if dtype in EIGHT else dtype)
    assert not any("scales" in key for key in state)
    other = peer(table_memory=memory, table_dtype=dtype, seed=5)
    assert not torch.equal(other(x), want)
    for assign in (False, True):
        other.reset_parameters(seed=6)
        other.load_state_dict(state, assign=assign)
        is_there(other, memory, dtype)
        assert torch.equal(other(x), want)
    with pytest.raises(RuntimeError, match="size mismatch for down"):
        other.load_state_dict({**state, "down": state["down"][:9]})
    low = layer.to(torch.bfloat16)
    is_there(low, memory, dtype)
    assert low.down.dtype == (low.down.dtype if dtype in EIGHT else torch.bfloat16)
    torch.testing.assert_close(low(x.bfloat16()).float(), want, rtol=0.1, atol=0.1)


@held
def test_built_on_meta(memory: str, dtype: torch.dtype) -> None:
    """Without memory first; ``to_empty`` lets tables lie where they should, and ``reset_parameters`` draws the same."""
    with torch.device("meta"):
        layer = peer(table_memory=memory, table_dtype=dtype)
        assert layer(torch.empty(3, 16)).shape == (3, 16)
    assert layer.down.is_meta
    layer = layer.to_empty(device="cpu")
    is_there(layer, memory, dtype)
    layer.reset_parameters(seed=1)
    assert torch.equal(layer(tokens()), peer(table_memory=memory, table_dtype=dtype)(tokens()))


def test_shared_tables() -> None:
    """Two layers read one pool, and move together."""
    first = peer(table_memory="host", table_dtype=torch.int8)
    model = nn.ModuleList([first, peer(tables_of=first, seed=4)]).bfloat16()
    assert model[1].down is model[0].down
    assert model[1].down.scales is model[0].down_scales
    both = copy.deepcopy(model)
    assert both[1].up is both[0].up
    assert both[1].up.far_rows is not first.up.far_rows
    assert torch.equal(both[1](tokens().bfloat16()), model[1](tokens().bfloat16()))


def test_trains_with_torchs_own_optimizers() -> None:
    """A far table by SparseAdam, as the same on the device; what they write is what the next pass reads."""
    layers = [peer(table_memory="disk"), peer(sparse_grad=True)]
    losses: list[list[float]] = [[], []]
    for layer, curve in zip(layers, losses, strict=True):
        sparse = torch.optim.SparseAdam(list(layer.tables().values()), lr=0.05)
        dense = torch.optim.Adam([p for name, p in layer.named_parameters() if name not in ("down", "up")], lr=0.01)
        for _ in range(5):
            loss = (layer(tokens()) - 1).square().mean()
            loss.backward()
            for optimizer in (sparse, dense):
                optimizer.step()
                optimizer.zero_grad()
            curve.append(float(loss))
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]


@held
def test_compiled_without_looking_into_it(memory: str, dtype: torch.dtype) -> None:
    layer = peer(table_memory=memory, table_dtype=dtype)
    compiled = torch.compile(layer, backend="aot_eager")
    for count in (7, 3):
        x = tokens()[:count]
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-6)
    compiled(tokens()).sum().backward()
    assert layer.keys.grad is not None
    assert dtype in EIGHT or layer.down.grad.is_sparse


def table_optimizer(layer: PEER | ProductKeyMemory, names: tuple[str, ...] = ()) -> TableOptimizer:
    rule = TableRule("rowwise_adam", 0.05, (0.9, 0.99), 1e-8, 0.0, lazy=True, rounding_seed=3)
    tables = layer.tables()
    return TableOptimizer({name: tables[name] for name in names or tables}, rule, 16)


def trained(layer: PEER | ProductKeyMemory) -> TableOptimizer:
    """Its tables' optimizer after some steps, which leave newer rows near the kernels than where they lie."""
    optimizer = table_optimizer(layer)
    for _ in range(3):
        layer(tokens()).square().sum().backward()
        optimizer.step(1.0)
    return optimizer


@held
@pytest.mark.parametrize("make", [peer, memory_layer])
def test_drawn_anew_after_training(
    make: Callable[..., PEER | ProductKeyMemory], memory: str, dtype: torch.dtype
) -> None:
    """What was newer near the kernels is neither lost nor in the way."""
    layer = make(table_memory=memory, table_dtype=dtype)
    trained(layer)
    layer.reset_parameters(seed=1)
    assert torch.equal(layer(tokens()), make(table_memory=memory, table_dtype=dtype)(tokens()))
    if isinstance(layer, PEER):
        trained(layer)
        layer.zero_output()
        assert not layer(tokens()).any()


@held
@pytest.mark.parametrize("make", [peer, memory_layer])
def test_written_to_before_its_backward_pass(
    make: Callable[..., PEER | ProductKeyMemory], memory: str, dtype: torch.dtype
) -> None:
    """Refused, as autograd does with ordinary tables, by whoever it was."""
    layer = make(table_memory=memory, table_dtype=dtype)
    y = layer(tokens())
    with torch.no_grad():
        next(iter(layer.tables().values())).zero_()
    with pytest.raises(RuntimeError, match=r"a table of \[64, 16\] was written to"):
        y.sum().backward()
    optimizer = trained(layer)
    y = layer(tokens())
    layer(tokens()).square().sum().backward()
    optimizer.step(1.0)
    with pytest.raises(RuntimeError, match="between a forward pass and its backward pass"):
        y.sum().backward()


@held
def test_pickled_with_an_optimizer(memory: str, dtype: torch.dtype) -> None:
    """Also between a backward pass and its step; a copy's tables are nobody's, and have gradients of their own."""
    layer = peer(table_memory=memory, table_dtype=dtype)
    optimizer = trained(layer)
    layer(tokens()).sum().backward()
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    assert torch.equal(other(tokens()), layer(tokens()))
    before = other.state_dict()["down"].clone()
    other(tokens()).square().sum().backward()
    assert dtype in EIGHT or other.down.grad._nnz()
    optimizer.step(1.0)
    assert torch.equal(other.state_dict()["down"], before)


@held
@pytest.mark.parametrize("make", [peer, memory_layer])
def test_only_what_is_meant_for_the_tables_trains_them(
    make: Callable[..., PEER | ProductKeyMemory], memory: str, dtype: torch.dtype
) -> None:
    layer = make(table_memory=memory, table_dtype=dtype)
    optimizer = table_optimizer(layer)

    def gradients() -> list[bool]:
        return [grad is not None and bool(grad._nnz()) for _, grad in optimizer.gradients()]

    x = tokens().requires_grad_()
    (dx,) = torch.autograd.grad(layer(x).square().sum(), [x])
    layer(x).square().sum().backward(inputs=[x])
    assert torch.equal(dx, x.grad)
    assert not any(gradients()), "somebody asked for the input's gradient alone"
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name in layer.tables() and parameter.is_floating_point())
    layer(tokens()).square().sum().backward()
    assert all(gradients()), "all else is frozen"
    if dtype not in EIGHT:
        optimizer.zero_grad()
        layer.requires_grad_(False)
        layer(x).square().sum().backward()
        assert not any(gradients()), "the tables are frozen"


def test_each_table_by_an_optimizer_of_its_own() -> None:
    layer, twin = (peer(table_memory="host") for _ in range(2))
    optimizer = table_optimizer(layer, ("down",))
    other = torch.optim.SGD([layer.up], 0.1)
    for one in (layer, twin):
        one(tokens()).square().sum().backward()
    ((_, grad),) = optimizer.gradients()
    assert torch.equal(grad.to_dense(), twin.down.grad.to_dense())
    assert torch.equal(layer.up.grad.to_dense(), twin.up.grad.to_dense())
    assert layer.down.grad is None
    other.step()


@held
def test_not_traced_or_exported(memory: str, dtype: torch.dtype) -> None:
    layer, x = peer(table_memory=memory, table_dtype=dtype).eval(), tokens()
    for trace in (lambda: torch.jit.trace(layer, (x,)), lambda: torch.export.export(layer, (x,))):
        with pytest.raises(NotImplementedError, match=r"load its state_dict\(\) into a layer with table_memory device"):
            trace()


def test_no_ordinary_parameter_takes_a_tables_place() -> None:
    """As loaders assign them, who would leave the tables on the device and in more bits without a word."""
    for options in ({"table_memory": "host"}, {"table_dtype": torch.int8}):
        for device in ("cpu", "meta"):
            layer = peer(**options, device=device)
            with pytest.raises(ValueError, match="down of PEER lies elsewhere or has eight bits"):
                layer.down = nn.Parameter(torch.zeros(64, 16, dtype=torch.float32, device="cpu"))
            layer.down = layer.down


def test_codes_without_scales() -> None:
    """They would be taken for numbers."""
    layer = peer(table_dtype=torch.int8)
    detached = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    with pytest.raises(RuntimeError, match=r"codes of eight bits \[64, 16\] without the scales of their rows"):
        torch.func.functional_call(layer, detached, (tokens(),))
    values = torch.func.functional_call(layer, layer.state_dict(), (tokens(),))
    torch.testing.assert_close(values, layer(tokens()), rtol=1e-5, atol=1e-5)


def refused(rank: int, world_size: int) -> list[str]:
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    asked = peer(table_dtype=torch.int8)
    table_optimizer(asked)
    said = []
    for wrap in (DistributedDataParallel, fully_shard):
        for options in ({"table_memory": "host"}, {"table_dtype": torch.int8}):
            try:
                wrap(nn.Sequential(peer(**options)))
                said.append("")
            except ValueError as error:
                said.append(str(error))
    try:
        DistributedDataParallel(asked)
    except ValueError as error:
        said.append(str(error))
    return said


def wrapped(rank: int, world_size: int, memory: str) -> tuple[list[Tensor], Tensor]:
    """Scales of this rank's rows after steps under DDP, and the whole table."""
    from torch.nn.parallel import DistributedDataParallel

    for build in (nn.Sequential, lambda layer: layer):
        layer = peer(table_memory=memory, table_dtype=torch.int8, group=torch.distributed.group.WORLD)
        rule = TableRule("rowwise_adam", 0.05, (0.9, 0.99), 1e-8, 0.0, lazy=True, rounding_seed=3)
        offsets = dict.fromkeys(layer.tables(), layer.layout.offset)
        optimizer = TableOptimizer(layer.tables(), rule, 16, offsets=offsets)
        model = build(layer)
        exempt_tables(model)
        model = DistributedDataParallel(model)
        for _ in range(3):
            model(tokens()[rank::world_size]).square().sum().backward()
            optimizer.step(1.0)
        layer.flush()
    down = layer.state_dict()["down"]
    return list(layer.down_scales), down.full_tensor() if world_size > 1 else down


@pytest.mark.parametrize("memory", ["device", "host"])
def test_ddp_leaves_the_scales(memory: str) -> None:
    """It broadcasts buffers in each pass: those of the first rank's rows would be the other's."""
    ((alone, table),) = run_ranks(wrapped, 1, memory)
    (first, one), (second, other) = run_ranks(wrapped, 2, memory)
    assert torch.equal(one, other)
    close = torch.isclose(one.float(), table.float(), rtol=0.02, atol=0.02)
    assert close.float().mean() > 0.99
    assert len(set(map(float, alone))) > 1
    same = sum(float(a) == float(b) for a, b in zip(alone, first + second, strict=True))
    assert same > 60, "all but those at the border of two"


def test_wrappers_leave_such_tables() -> None:
    """Nobody averages their gradients. DDP has nothing to do with tables that have none."""
    ddp_far, ddp_eight, shard_far, shard_eight, stepped = run_ranks(refused, 1)[0]
    assert ddp_far.startswith("DistributedDataParallel cannot keep 0.down alike on the ranks, whose rows lie elsewhere")
    assert ddp_eight == ""
    assert stepped.startswith("DistributedDataParallel cannot keep down alike")
    assert shard_far.startswith("fully_shard cannot keep down alike")
    assert shard_eight.startswith("fully_shard cannot keep down alike")


@pytest.mark.parametrize("make", [peer, memory_layer])
def test_rows_come_near_as_told(make: Any) -> None:
    for fetch in ("direct", "copied"):
        assert make(table_memory="host", table_fetch=fetch).place.fetch == fetch
    assert make(table_memory="host").place.fetch == "direct"


def test_impossible_options() -> None:
    for options, said in (
        ({"table_memory": "tape"}, "table_memory must be one of device, host, disk, not 'tape'"),
        ({"table_memory": "host", "table_cache_gb": -1.0}, "table_cache_gb and table_resident_gb must be at least 0"),
        (
            {"table_memory": "host", "table_fetch": "carried"},
            "table_fetch must be one of direct, copied, not 'carried'",
        ),
        ({"table_dtype": torch.uint8}, "table_dtype must be float32, .* or int8 of torch's, not torch.uint8"),
    ):
        with pytest.raises(ValueError, match=said):
            peer(**options)
