"""The layers under the ways in which other people's code uses a layer: any default dtype and device, autocast, torch's
compiler, exporters and tracers, hooks and adapters, initialisation from meta, wrong input.
"""

import contextlib
import copy
import itertools
import math
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from peer_dist import PEER, ProductKeyMemory
from peer_dist.kernels import mkl, native
from peer_dist.layers.recurrence import RouterCore, RouterState
from peer_dist.layers.router import CosineLogits, LinearLogits, Router, Rule
from peer_dist.sharding import ExpertGroups
from tests.ranks import run_ranks

DIM, STATE = 12, 5


def peer(**options):
    return lambda **more: PEER(DIM, 49, 3, 4, 6, **{"query_norm": "rms", "seed": 3, **options, **more})


def memory(**options):
    return lambda **more: ProductKeyMemory(DIM, 49, 3, 4, 6, **{"seed": 3, **options, **more})


def option_values(**options):
    """One layer for each value of each option."""
    return {f"{name}={value}": peer(**{name: value}) for name, values in options.items() for value in values}


LAYERS = {
    "peer": peer(),
    **option_values(
        query_norm=["batch", "layer", "none"],
        gate=["sigmoid", "relu"],
        activation=["relu", "silu"],
        shared_keys=[False],
        key_norm=["layer", "rms"],
        output_gate=[True],
        dense_hidden=[7],
        sparse_grad=[True],
        state_size=[STATE],
        table_dtype=[torch.bfloat16],
        output_std=[0.01],
        dispatch_chunks=[2],
    ),
    "everything": peer(
        query_norm="layer", key_norm="layer", shared_keys=False, output_gate=True, dense_hidden=7, state_size=STATE
    ),
    "memory": memory(),
    "memory, rms": memory(query_norm="rms", gate="relu", sparse_grad=True),
    "memory, shared": memory(query_norm="layer", shared_keys=True),
    "memory, dense": memory(query_norm="none", query_projection=False, init="dense", num_layers=2),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def inputs(layer, tokens=9, dtype=torch.float32):
    """What the layer takes: the same numbers whatever the defaults are."""
    generator = torch.Generator().manual_seed(7)

    def drawn(*shape):
        return torch.empty(shape, dtype=torch.float32, device="cpu").normal_(generator=generator).to(dtype)

    x = drawn(3, tokens // 3, DIM).requires_grad_()
    return (x, drawn(3, tokens // 3, STATE)) if getattr(layer, "state_query", None) is not None else (x,)


def results(layer, arguments, call=None):
    """Output and all gradients, dense, by name; of ``call``, if it is the layer in another form."""
    layer.zero_grad()
    arguments[0].grad = None
    y = (layer if call is None else call)(*arguments)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=torch.float32, device="cpu").view_as(y).to(y.dtype))
    grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
    found = {"y": y.detach(), "x": arguments[0].grad, **grads}
    return {name: value.to_dense() if value.is_sparse else value for name, value in found.items()}


def assert_same(got, want, **tolerance):
    assert got.keys() == want.keys()
    for name, value in want.items():
        if tolerance:
            torch.testing.assert_close(got[name], value, **tolerance, msg=lambda text, name=name: f"{name}: {text}")
        else:
            assert got[name].dtype == value.dtype, name
            assert torch.equal(got[name], value), name


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


DEFAULTS = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "in meta": lambda: torch.device("meta"),
    "in cpu": lambda: torch.device("cpu"),
    "meta by default": lambda: default_device("meta"),
}


# ---------------------------------------------------------------------------------------------------------------------
# Default dtypes and devices.


@pytest.mark.parametrize("default", DEFAULTS)
@every_layer
def test_defaults_change_nothing(name, default):
    layer = LAYERS[name]()
    want = results(layer, inputs(layer))
    arguments = inputs(layer)
    with DEFAULTS[default]():
        got = results(layer, arguments)
        built = LAYERS[name](dtype=torch.float32, device="cpu")
        layer.reset_parameters()
    assert_same(got, want)
    assert_same(built.state_dict(), LAYERS[name]().state_dict())
    assert_same(layer.state_dict(), built.state_dict())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@every_layer
def test_layers_of_the_default_dtype(name, dtype):
    """Built without a dtype they are of the default one, as torch's are; drawn numbers are only rounded."""
    with default_dtype(dtype):
        layer = LAYERS[name]()
    assert all(parameter.dtype in (dtype, torch.bfloat16) for parameter in layer.parameters())
    for key, value in LAYERS[name]().state_dict().items():
        if key not in ("up", "gate_out.weight", "dense_out.weight"):  # whose scale is measured on rounded keys
            got, exact = layer.state_dict()[key], 1e-7 if "key_norm" in key else 0  # a number that is not drawn
            torch.testing.assert_close(got, value.to(got.dtype), rtol=exact, atol=0)
    arguments = inputs(layer, dtype=dtype)
    got = results(layer, arguments)
    assert got["y"].dtype == got["x"].dtype == dtype
    assert all(value.isfinite().all() for value in got.values())
    with default_dtype(dtype):
        assert_same(results(layer, inputs(layer, dtype=dtype)), got)


def sharded_defaults(rank, world_size, columns):
    """The names of the layers that a default changed, unsharded ones left out."""
    groups, wrong = ExpertGroups.over(dist.group.WORLD, columns), []
    for name, make in LAYERS.items():
        layer = make(group=groups)
        want = results(layer, inputs(layer, 3 * rank + 6))
        for default in DEFAULTS:
            arguments = inputs(layer, 3 * rank + 6)
            with DEFAULTS[default]():
                got = results(layer, arguments)
            try:
                assert_same(got, want)
            except AssertionError as error:
                wrong.append(f"{name}, {default}: {error}")
    return wrong


@pytest.mark.parametrize("columns", [1, 2])
def test_defaults_change_nothing_on_two_ranks(columns):
    assert run_ranks(sharded_defaults, 2, columns) == [[], []]


ROUTERS = {
    "linear": lambda: Router(LinearLogits(DIM, 6, 0.1), 6, Rule(2, balance_loss=0.1, z_loss=0.1, bias_rate=0.1)),
    "cosine": lambda: Router(CosineLogits(DIM, 6, 4), 6, Rule(2, score="sigmoid", entropy_loss=0.1)),
}


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("name", ROUTERS)
def test_defaults_change_no_router(name, default):
    torch.manual_seed(0)
    router = ROUTERS[name]()
    x = torch.randn(4, 3, DIM)
    want = router(x)
    with DEFAULTS[default]():
        got = router(x)
    for a, b in zip(got, want):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("default", DEFAULTS)
def test_defaults_change_no_recurrent_state(default):
    torch.manual_seed(0)
    core = RouterCore(STATE)
    step = RouterState(core, DIM)
    x, state = torch.randn(4, DIM), torch.randn(4, STATE)
    want = step(x, state)
    with DEFAULTS[default]():
        assert torch.equal(step(x, state), want)


# ---------------------------------------------------------------------------------------------------------------------
# Autocast.


def in_autocast(layer, arguments, dtype):
    routed = []
    layer.on_route = lambda indices, gates: routed.append((indices, gates))
    with torch.autocast("cpu", dtype):
        outside = results(layer, arguments)  # the backward pass inside autocast too
    layer.on_route = None
    return outside, routed[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_layer
def test_autocast(name, dtype):
    """The linear maps lose bits, and scores, gates and sums do not: given its picks, the layer is nearly itself."""
    layer = LAYERS[name]()
    got, (indices, gates) = in_autocast(layer, inputs(layer), dtype)
    assert gates.dtype == torch.float32
    assert got["y"].dtype == got["x"].dtype == torch.float32
    for key, parameter in layer.named_parameters():
        assert got[key].dtype == parameter.dtype
        assert got[key].isfinite().all()
    if name == "memory, dense":  # nothing that autocast would round
        assert_same(got, results(layer, inputs(layer)))
    exact = copy.deepcopy(layer)
    picked = []
    exact.on_route = lambda indices, gates: picked.append((indices, gates))
    want = results(exact, inputs(exact))
    agree = (picked[0][0] == indices).all(-1)
    assert agree.float().mean() > 0.5, "most heads pick the same experts in the same order"
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(
        gates[agree], picked[0][1][agree], rtol=0, atol=16 * rounding * picked[0][1].max().item()
    )
    tokens = agree.all(-1)
    scale = float(want["y"].abs().max())
    torch.testing.assert_close(
        got["y"].flatten(0, 1)[tokens], want["y"].flatten(0, 1)[tokens], rtol=0, atol=32 * rounding * scale
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernels", [["mkl"], []], ids=str)
def test_autocast_of_other_kernels(kernels, dtype, monkeypatch):
    """Those in plain torch, of whose operations autocast knows some, are out of its sight too."""
    monkeypatch.setattr(native, "available", lambda *tensors: False)
    if not kernels:
        monkeypatch.setattr(mkl, "available", lambda *tensors: False)
    layer = LAYERS["memory, dense"]()  # without a linear map, whose bits autocast would take
    got, _ = in_autocast(layer, inputs(layer), dtype)
    assert_same(got, results(layer, inputs(layer)))


def sharded_autocast(rank, world_size, columns):
    groups, found = ExpertGroups.over(dist.group.WORLD, columns), {}
    for name, make in LAYERS.items():
        for dtype in (torch.bfloat16, torch.float16):
            layer = make(group=groups)
            arguments = inputs(layer, 12)
            found[f"{name}, {dtype}"] = in_autocast(layer, arguments, dtype)[0]
    return found


@pytest.mark.parametrize("columns", [1, 2])
def test_autocast_on_two_ranks(columns):
    """Two ranks with the same tokens have the output of the whole layer, and as many of its gradients."""
    for rank, found in enumerate(run_ranks(sharded_autocast, 2, columns)):
        for name, dtype in itertools.product(LAYERS, (torch.bfloat16, torch.float16)):
            whole = LAYERS[name]()
            want = in_autocast(whole, inputs(whole, 12), dtype)[0]
            got = found[f"{name}, {dtype}"]
            rows = slice(0, 25) if rank == 0 else slice(25, 49)  # as torch.chunk has them
            if columns == 1:
                for table in {"down", "up", "values"} & want.keys():
                    want[table] = 2 * want[table][rows]  # of the sum of both ranks' losses
            else:
                part = slice(6 * rank, 6 * rank + 6)
                for table in {"down", "up", "values"} & want.keys():
                    want[table] = 2 * want[table][:, part]
            rounded = 2e-2 if name.startswith("table_dtype") else 1e-3  # sums of other parts, in fewer bits
            assert_same(got, want, rtol=rounded, atol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Compilers, exporters, tracers and counters.


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@every_layer
def test_compiled_in_one_graph(name, fresh_compiler):
    """Without a graph break and, once sizes are dynamic, without compiling again; forward and backward."""
    layer = LAYERS[name]()
    graphs = []

    def count(graph, example):
        graphs.append(graph)
        return graph

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    counted = torch.compile(layer, fullgraph=True, dynamic=True, backend=count)
    for tokens in (6, 9, 15, 30):
        want = results(layer, inputs(layer, tokens))
        assert_same(results(layer, inputs(layer, tokens), compiled), want, rtol=1e-5, atol=1e-6)
        counted(*inputs(layer, tokens))
    assert len(graphs) == 1


def test_compiled_by_inductor(fresh_compiler):
    layer = LAYERS["peer"]()
    compiled = torch.compile(layer, fullgraph=True)
    want = results(layer, inputs(layer))
    assert_same(results(layer, inputs(layer), compiled), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name",
    [
        "peer",
        "query_norm=batch",
        "query_norm=layer",
        "key_norm=rms",
        "sparse_grad=True",
        "everything",
        "memory",
        "memory, dense",
    ],
)
def test_compiled_in_autocast(name, fresh_compiler):
    layer = LAYERS[name]()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        want = results(layer, inputs(layer))
        got = results(layer, inputs(layer), compiled)
    assert_same(got, want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_compiled_where_a_default_device_is_set(device, fresh_compiler):
    for name in ("memory", "everything"):
        layer = LAYERS[name]()
        want, arguments = results(layer, inputs(layer)), inputs(layer)
        with default_device(device):
            got = results(layer, arguments, torch.compile(layer, fullgraph=True, backend="aot_eager"))
        assert_same(got, want, rtol=1e-5, atol=1e-6)


def test_a_compiled_layer_that_is_recomputed_moves_its_statistics_once(fresh_compiler):
    layer, twin = LAYERS["query_norm=batch"](), LAYERS["query_norm=batch"]()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        (x,) = inputs(layer)
        torch.utils.checkpoint.checkpoint(compiled, x, use_reentrant=False).sum().backward()
        twin(x)
    assert_same(layer.state_dict(), twin.state_dict(), rtol=1e-5, atol=1e-6)
    assert layer.norm.running_mean.abs().max() > 0


@every_layer
def test_built_of_fake_tensors(name):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        layer = LAYERS[name]()
        layer.reset_parameters()
        x = torch.empty(3, 4, DIM, requires_grad=True)
        y = layer(x, *([torch.empty(3, 4, STATE)] if "state" in name or name == "everything" else []))
        y.sum().backward()
    assert y.shape == x.grad.shape == (3, 4, DIM)


@every_layer
def test_exported(name):
    layer = LAYERS[name]().eval()
    sizes = {dim: torch.export.Dim(f"size{dim}", min=2) for dim in (0, 1)}
    arguments = inputs(layer)
    program = torch.export.export(layer, arguments, dynamic_shapes=(sizes,) * len(arguments))
    for tokens in (6, 9, 30):
        arguments = inputs(layer, tokens)
        torch.testing.assert_close(program.module()(*arguments), layer(*arguments), rtol=1e-5, atol=1e-6)


@every_layer
def test_traced(name, tmp_path):
    """The graphs of torch.jit.trace and of TensorBoard; ONNX, which cannot have it, is refused."""
    from torch.utils.tensorboard import SummaryWriter

    layer = LAYERS[name]().eval()
    arguments = inputs(layer)
    traced = torch.jit.trace(layer, arguments)
    assert torch.equal(traced(*arguments), layer(*arguments))
    with SummaryWriter(tmp_path) as writer:
        writer.add_graph(layer, arguments)
    assert isinstance(layer.traffic.picks_received, int)
    with pytest.raises(NotImplementedError, match="has no form in ONNX"):
        torch.onnx.export(layer, arguments, tmp_path / "layer.onnx", dynamo=False)


@every_layer
def test_on_meta(name):
    """Shapes and dtypes, forward and backward, without any memory."""
    layer = LAYERS[name](device="meta")
    arguments = tuple(x.detach().to("meta") for x in inputs(layer))
    arguments[0].requires_grad_()
    found = layer(*arguments)
    found.sum().backward()
    assert found.shape == arguments[0].shape == arguments[0].grad.shape
    for parameter in layer.parameters():
        assert parameter.grad.shape == parameter.shape


OPERATORS = torch.ops.peer_dist


def operator_cases():
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(shape, generator=generator, requires_grad=True)

    offsets = torch.tensor([0, 3, 3, 8, 10])
    expert = torch.randint(25, (10,), generator=generator)
    for norm, weight, bias in (("none", None, None), ("rms", drawn(12), None), ("layer", drawn(12), drawn(12))):
        for keys in (drawn(2, 5, 3), drawn(2, 2, 5, 3)):
            yield OPERATORS.retrieve, (drawn(4, 2, 6), keys, 3, norm, weight, bias, 1e-5)
    for activation in ("gelu", "relu", "silu"):
        arguments = drawn(4, 7), offsets, expert, drawn(10), drawn(25, 7), drawn(25, 7), activation, False
        yield OPERATORS.expert_mix, arguments
    yield OPERATORS.value_mix, (drawn(10), drawn(25, 7), offsets, expert, False)
    yield OPERATORS.dots, (drawn(4, 7).detach(), drawn(25, 7).detach(), offsets, expert)
    sums = [drawn(10).detach(), drawn(10).detach()], [drawn(4, 7).detach(), drawn(4, 7).detach()]
    yield OPERATORS.table_grads, (*sums, offsets, expert, 25, torch.float32)
    yield OPERATORS.sparse_table_grads, (*sums, offsets, expert, 25, torch.float32)


@pytest.mark.parametrize(("op", "arguments"), operator_cases())
def test_operators_are_what_torch_asks_of_them(op, arguments):
    torch.library.opcheck(op.default, arguments)


def test_flops_are_counted():
    """Those of the definition: products of the query projection, of all sub-keys' scores and over picks."""
    tokens, dim, n, heads, top_k, key_dim = 10, DIM, 7, 3, 4, 6
    layer = PEER(dim, n * n, heads, top_k, key_dim, "rms", seed=0, sparse_grad=True)
    x = torch.randn(tokens, dim, requires_grad=True)
    query, scores = 2 * tokens * dim * heads * key_dim, 2 * tokens * heads * n * key_dim
    products = 2 * tokens * heads * top_k * dim  # of each pick with a row
    with FlopCounterMode(display=False) as counter:
        y = layer(x)
    assert counter.get_total_flops() == query + scores + 2 * products
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    of_scores = 2 * 2 * tokens * heads * top_k * key_dim
    assert counter.get_total_flops() == 2 * query + of_scores + 4 * products
    values = ProductKeyMemory(dim, n * n, heads, top_k, key_dim, "rms", seed=0)
    with FlopCounterMode(display=False) as counter:
        values(x).sum().backward()
    assert counter.get_total_flops() == 3 * query + scores + of_scores + 3 * products


FIRST_COUNTS = """
import os
import torch
from peer_dist import PEER

def count(device, backward_only):
    layer = PEER(12, 49, 3, 4, 6, "rms", device=device)
    x = torch.randn(10, 12, device=device, requires_grad=True)
    y = layer(x) if backward_only else None
    from torch.utils.flop_counter import FlopCounterMode
    counts = []
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            (layer(x) if y is None else y).sum().backward(retain_graph=True)
        counts.append(counter.get_total_flops())
    print(*counts, flush=True)

for device in ("cpu", "meta"):
    for backward_only in (False, True):
        child = os.fork()
        if child == 0:
            try:
                count(device, backward_only)
            finally:
                os._exit(0)
        os.waitpid(child, 0)
"""


def test_the_first_count_of_flops_is_whole():
    """A counter that was imported, and made, before its formulas were asked for; each in a fork that has none yet."""
    found = subprocess.run([sys.executable, "-c", FIRST_COUNTS], capture_output=True, text=True, check=True)
    counts = [line.split() for line in found.stdout.splitlines()]
    assert len(counts) == 4, found.stderr
    assert all(first == second != "0" for first, second in counts), counts


def sharded_flops(rank, world_size):
    groups = ExpertGroups.over(dist.group.WORLD, 2)
    layer = PEER(DIM, 49, 3, 4, 6, "rms", seed=0, group=groups, data_group=dist.group.WORLD)
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(5, DIM)).sum().backward()
    return sum(
        flops
        for op, flops in counter.get_flop_counts()["Global"].items()
        if "peer_dist" in str(op) and "ret" not in str(op)
    )


def test_flops_of_two_ranks_are_those_of_one():
    picks = 2 * 5 * 3 * 4  # of which heads share some, that travel once
    counted = sum(run_ranks(sharded_flops, 2))
    assert 0.7 * 6 * 2 * picks * DIM < counted <= 6 * 2 * picks * DIM


def test_a_second_derivative_is_refused():
    layer = LAYERS["peer"]()
    (x,) = inputs(layer)
    (grad,) = torch.autograd.grad(layer(x).sum(), layer.down, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        grad.sum().backward()


@every_layer
def test_forward_mode_is_refused(name):
    """An operator without a rule for tangents would drop them."""
    layer = LAYERS[name]().eval()
    x, *state = inputs(layer)
    x = x.detach()
    for frozen in (False, True):
        layer.requires_grad_(not frozen)
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            torch.func.jvp(lambda x, layer=layer, state=state: layer(x, *state), (x,), (x,))
        with torch.autograd.forward_ad.dual_level():
            layer(x, *state)
            with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
                layer(torch.autograd.forward_ad.make_dual(x, x), *state)


# ---------------------------------------------------------------------------------------------------------------------
# Modules that are called.


@every_layer
def test_every_sub_module_is_called(name):
    """Adapters, quantizers and offloading replace or hook sub-modules: none is read behind its back."""
    layer = LAYERS[name]()
    want = layer(*inputs(layer)).detach()
    called, linear = set(), [key for key, module in layer.named_modules() if type(module) is nn.Linear]
    for key, module in layer.named_modules():
        module.register_forward_hook(lambda module, args, output, key=key: called.add(key))
    layer(*inputs(layer))
    assert called == {key for key, _ in layer.named_modules()}
    for key in linear:  # and its output matters
        changed = copy.deepcopy(layer)
        changed.get_submodule(key).register_forward_hook(
            lambda module, args, output: output + torch.ones_like(output).cumsum(-1)
        )
        assert not torch.allclose(changed(*inputs(layer)), want)


class LowRank(nn.Module):
    """A linear map with an adapter beside it, as LoRA puts it."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(rank, base.in_features) / 4)
        self.b = nn.Parameter(torch.randn(base.out_features, rank) / 4)

    def forward(self, x):
        return self.base(x) + x @ self.a.T @ self.b.T


@every_layer
def test_adapters_merge(name):
    layer = LAYERS[name]()
    for key in [key for key, module in layer.named_modules() if type(module) is nn.Linear]:
        adapted, merged = copy.deepcopy(layer), copy.deepcopy(layer)
        adapter = LowRank(getattr(adapted, key))
        setattr(adapted, key, adapter)
        with torch.no_grad():
            getattr(merged, key).weight += adapter.b @ adapter.a
        y = adapted(*inputs(layer))
        torch.testing.assert_close(y, merged(*inputs(layer)), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(y, layer(*inputs(layer)))
        y.sum().backward()
        assert adapter.a.grad.any()


STATE_DICT = {
    "everything": [
        "keys", "down", "up", "query.weight", "norm.weight", "norm.bias", "state_query.weight", "gate_in.weight",
        "gate_out.weight", "dense_in.weight", "dense_out.weight", "key_norm.norm.weight", "key_norm.norm.bias",
    ],
    "query_norm=batch": [
        "keys", "down", "up", "query.weight", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var",
    ],
    "memory, dense": ["keys", "values"],
}  # fmt: skip


@pytest.mark.parametrize("name", STATE_DICT)
def test_names_of_the_state_dict_stay(name):
    assert sorted(LAYERS[name]().state_dict()) == sorted(STATE_DICT[name])


# ---------------------------------------------------------------------------------------------------------------------
# Initialisation.


def reset_every_module(layer):
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


def reset_from_the_leaves(layer):
    layer.apply(lambda module: module.reset_parameters() if hasattr(module, "reset_parameters") else None)


RESETS = {
    "itself": lambda layer: layer.reset_parameters(),
    "every module": reset_every_module,
    "from the leaves": reset_from_the_leaves,
}


@pytest.mark.parametrize("reset", RESETS)
@every_layer
def test_reset_repeats_the_initialisation(name, reset):
    want = {key: value.clone() for key, value in LAYERS[name]().state_dict().items()}
    with torch.device("meta"):
        from_meta = LAYERS[name]()
    spoilt, copied = LAYERS[name](), copy.deepcopy(LAYERS[name]())
    for layer in (from_meta.to_empty(device="cpu"), spoilt, copied):
        with torch.no_grad():
            for value in layer.state_dict().values():
                value.fill_(math.nan)
        RESETS[reset](layer)
        assert_same(layer.state_dict(), want)


@pytest.mark.parametrize("kind", [PEER, ProductKeyMemory])
def test_without_a_seed_each_reset_draws_anew(kind):
    torch.manual_seed(0)
    layer = kind(DIM, 49, 3, 4, 6)
    first = layer.query.weight.clone()
    layer.reset_parameters()
    second = layer.query.weight.clone()
    assert not torch.equal(first, second)
    layer.reset_parameters(seed=5)
    assert torch.equal(layer.query.weight, kind(DIM, 49, 3, 4, 6, seed=5).query.weight)
    reset_every_module(layer)
    assert torch.equal(layer.query.weight, kind(DIM, 49, 3, 4, 6, seed=5).query.weight)


def fully_sharded_from_meta(rank, world_size):
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(rank)
    wrong = []
    for name, make in LAYERS.items():
        if make().sparse_grad:
            continue  # refused
        for seed in (3, None):
            with torch.device("meta"):
                model = nn.Sequential(nn.Linear(DIM, DIM), make(seed=seed))
            fully_shard(model[1])
            fully_shard(model)
            model.to_empty(device="cpu")
            reset_every_module(model)
            got = {
                key: value.full_tensor() if hasattr(value, "full_tensor") else value
                for key, value in model[1].state_dict().items()
            }
            if seed is None:  # the ranks agree, though their generators do not
                both = [None, None]
                dist.all_gather_object(both, got)
                want = both[0]
            else:
                want = make(seed=seed).state_dict()
            wrong += [f"{name}, {seed}: {key}" for key in want if not torch.equal(got[key], want[key])]
            wrong += [f"{name}: {key} is not finite" for key in want if not got[key].isfinite().all()]
    return wrong


def test_initialisation_under_fully_sharded_data_parallelism():
    assert run_ranks(fully_sharded_from_meta, 2) == [[], []]


# ---------------------------------------------------------------------------------------------------------------------
# Outputs.


@every_layer
def test_outputs_are_no_views(name):
    """As a linear map's are not: what is added in place to a view would lose the hooks that FSDP2 puts on outputs."""
    layer = LAYERS[name]()
    x, *state = inputs(layer)
    y = layer(x, *state)
    assert not y._is_view()
    want = results(layer, (x, *state), lambda *arguments: layer(*arguments) + x)
    assert_same(results(layer, (x, *state), lambda *arguments: layer(*arguments).add_(x)), want)
    assert not layer(x.detach().flatten(0, 1), *(each.flatten(0, 1) for each in state))._is_view()


# ---------------------------------------------------------------------------------------------------------------------
# Refusals.


@every_layer
def test_refusals(name):
    layer = LAYERS[name]()
    x, *state = inputs(layer)
    for wrong in (x[..., :6], torch.cat([x, x], -1), x.new_ones(()), x.new_ones(5)):
        with pytest.raises(ValueError, match=r"must be \[\.\.\., dim\] with dim = 12"):
            layer(wrong, *state)
    numbers = x.detach()
    for wrong in (numbers.long(), numbers > 0, numbers.to(torch.complex64), numbers.to_sparse()):
        with pytest.raises(ValueError, match="must be dense and of floating-point numbers"):
            layer(wrong, *state)
    with pytest.raises(ValueError, match="input is on meta, but the layer is on cpu"):
        layer(x.detach().to("meta"), *state)
    if state:
        with pytest.raises(ValueError, match="state_size=5 needs a state"):
            layer(x)
    one = x[:1, :1], *(part[:1, :1] for part in state)
    if type(layer.norm).__name__ == "QueryBatchNorm":
        with pytest.raises(ValueError, match="more than one token in a training pass"):
            layer(*one)
        layer.eval()
    assert layer(*one).shape == (1, 1, DIM)
    nothing = layer(x[:0], *(part[:0] for part in state))
    assert nothing.shape == (0, 3, DIM)


def one_token_in_all(rank, world_size, counts):
    layer = PEER(DIM, 49, 3, 4, 6, seed=0, group=dist.group.WORLD)
    try:
        return layer(torch.randn(counts[rank], DIM)).shape[0]
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("counts", [(1, 1), (1, 0), (0, 0), (1, 4)])
def test_one_token_on_some_ranks(counts):
    found = run_ranks(one_token_in_all, 2, counts)
    if sum(counts) == 1:
        assert all("more than one token" in text for text in found)
    else:
        assert found == list(counts)
