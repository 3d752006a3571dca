"""The exchange whose sizes stay on the device, by the GPU's kernels, interpreted, and a stand-in for torch's operator.

The stand-in does over gloo what ``torch.ops.symm_mem.all_to_all_vdev`` says: it reads sizes from tensors, and tells the
sizes and offsets that arrived. What it does not write it fills with NaN.
"""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
import torch.nn.functional as F

from peer_dist import PEER, ProductKeyMemory
from peer_dist.config import ConfigError, check_world, parse_config
from peer_dist.engines.building import join_groups
from peer_dist.kernels import Picks
from peer_dist.sharding import ExpertGroups, GridLayout, Traffic, dispatch
from peer_dist.sharding.transport import ALL_TO_ALL, Alone, SymmetricMemory
from peer_dist.sharding.wire import WIRES
from tests.ranks import run_ranks
from tests.shards import dense_grads

pytest.importorskip("triton")

import peer_dist.kernels as package
from peer_dist.kernels import triton as kernels
from peer_dist.kernels.triton import experts
from tests.gpu_kernels import INTERPRETED, compiles, run_interpreted

interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_through_the_interpreter")
_library = torch.library.Library("symm_mem", "IMPL")


def all_to_all_vdev(x, out, sizes, arrived, group_name):
    group = dist.distributed_c10d._resolve_process_group(group_name)
    ranks, send = dist.get_world_size(group), sizes.tolist()
    assert sum(send) <= len(x)
    dist.all_to_all_single(arrived[0], sizes, group=group)
    receive = arrived[0].tolist()
    assert sum(receive) <= len(out)
    arrived[1] = arrived[0].cumsum(0) - arrived[0]
    blocks = min(64, -(-x.nbytes // 65536 // ranks) * ranks)  # of 65536 bytes, as many for each rank
    assert blocks % ranks == 0
    for rows in receive:
        assert rows * x.stride(0) * x.element_size() % (blocks // ranks) == 0
    out.view(torch.uint8).fill_(255)
    dist.all_to_all_single(out[: sum(receive)], x[: sum(send)], receive, send, group=group)


def stand_in():
    """The transport on CPU ranks, whose memory is not zero to begin with."""
    _library.impl("all_to_all_vdev", all_to_all_vdev, "CPU")
    symmetric_memory.is_nvshmem_available = lambda: True
    symmetric_memory.set_backend = lambda name: None
    symmetric_memory.empty = lambda *size, dtype, device: torch.full(size, -1 if dtype.is_signed else 255, dtype=dtype)
    return SymmetricMemory()


class Routed(GridLayout):
    """One process that sends its tokens to itself."""

    spread = True


class OnDevice(Routed):
    """And keeps sizes on the device."""

    transport = Alone(sizes_on_device=True)


DIM = 10
OPTIONS = {"dim": DIM, "heads": 3, "top_k": 3, "key_dim": 6, "query_norm": "none", "seed": 3}
CASES = {
    "peer": (PEER, {"num_experts": 49}),
    "dense block beside": (PEER, {"num_experts": 49, "dense_hidden": 5, "activation": "relu"}),
    "tiny pool, every expert picked": (PEER, {"num_experts": 9, "heads": 4}),
    "product-key memory": (ProductKeyMemory, {"num_values": 49}),
}


def run(kind, options, groups, tokens, rank):
    torch.manual_seed(rank)
    layer = kind(**OPTIONS | options, group=groups)
    results = []
    for _ in range(2):  # buffers take turns, and one batch is not the other
        x = torch.randn(tokens, DIM, dtype=layer.keys.dtype, requires_grad=True)
        y = layer(x)
        y.backward(torch.randn_like(y))
        results += [y.detach(), x.grad]
    return [*results, *dense_grads([value.grad for value in layer.parameters()])], layer.traffic


def on_device(rank, world_size, wire, tokens, dtype, cases):
    torch.set_default_dtype(dtype)
    package.backend = lambda *tensors: kernels
    transport = stand_in()
    found = []
    for kind, options in map(CASES.get, cases):
        for one in (ALL_TO_ALL, transport):
            groups = ExpertGroups(dist.group.WORLD, dist.group.WORLD, wire=WIRES[wire], transport=one)
            results, traffic = run(kind, options, groups, tokens, rank)
            found.append((results, traffic.bytes_sent, traffic.sent, traffic.picks_received, traffic.tokens_received))
    return found


@interpreted
@pytest.mark.parametrize(
    ("world_size", "wire", "tokens", "dtype", "cases"),
    [
        (2, None, 3, torch.float64, ["peer", "product-key memory"]), (2, None, 0, torch.float32, ["peer"]),
        pytest.param(4, None, 3, torch.float64, CASES, marks=pytest.mark.slow),
        pytest.param(2, "float8", 5, torch.float32, CASES, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_equal_to_sizes_on_the_host(world_size, wire, tokens, dtype, cases):
    ranks = run_ranks(on_device, world_size, wire, tokens, dtype, list(cases))
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for found in ranks:
        for host, device in zip(found[::2], found[1::2]):
            for got, want in zip(device[0], host[0], strict=True):
                torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
            assert device[3:] == host[3:]
            for what in ("x", "y", "dy", "dx"):
                assert device[2][what] == host[2][what]
            assert device[2]["gates"] >= host[2]["gates"]


@pytest.mark.parametrize("layout", [Routed, pytest.param(OnDevice, marks=interpreted)])
@pytest.mark.parametrize("kind", CASES)
def test_one_process_can_send_to_itself(kind, layout, monkeypatch):
    if layout is OnDevice:
        monkeypatch.setattr(package, "backend", lambda *tensors: kernels)
    layer_type, options = CASES[kind]
    layer = layer_type(**OPTIONS | options, dtype=torch.float64)
    x = torch.randn(6, DIM, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(6, DIM, dtype=torch.float64)
    results = []
    for each in (layer.layout, layout(layer.num_experts, DIM)):
        layer.layout = each
        y = layer(x)
        results.append([y, *torch.autograd.grad(y, [x, *layer.parameters()], dy)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert layer.traffic.bytes_sent == 0
    assert layer.traffic.tokens == layer.traffic.tokens_received == 6


WAYS = {
    "token-major": {"EXPERT_MAJOR": 1e9}, "by expert": {"EXPERT_MAJOR": 0.0, "_l2_bytes": lambda device: 600},
    "wide": {"EXPERT_MAJOR": 1e9, "MAX_BLOCK_D": 16},
}  # fmt: skip


def between_guards(value, at_end):
    """``value`` at the beginning or at the end of memory before and after which reading ends the process."""
    memory = mmap.mmap(-1, 3 * mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None)
    for page in (0, 2):
        assert not libc.mprotect(ctypes.c_void_p(address + page * mmap.PAGESIZE), mmap.PAGESIZE, 0)
    begin = 2 * mmap.PAGESIZE - value.nbytes if at_end else mmap.PAGESIZE
    return torch.frombuffer(memory, dtype=value.dtype, count=value.numel(), offset=begin).view_as(value).copy_(value)


@interpreted
@pytest.mark.parametrize("way", WAYS)
def test_room_for_picks_is_no_pick(way, monkeypatch):
    """Of no token and of row -1, and more than a piece of them: nothing is read for them either."""
    monkeypatch.setattr(package, "backend", lambda *tensors: kernels)
    for name, value in WAYS[way].items():
        monkeypatch.setattr(experts, name, value)
    generator = torch.Generator().manual_seed(1)
    offsets, expert = torch.tensor([0, 3, 3, 8, 8]), torch.randint(6, (8,), generator=generator)
    x, dy, *tables = (torch.randn(size, 20, generator=generator) for size in (4, 4, 6, 6))
    x, dy = (between_guards(rows, at_end=True) for rows in (x, dy))
    tables = [between_guards(table, at_end=False) for table in tables]
    gate = torch.rand(8, generator=generator)
    nan = torch.full((2 * experts.PIECE,), float("nan"))

    def all_of(picks, gate):
        y, pre = package.expert_mix_forward(x, picks, gate, *tables, "gelu")
        dx, dgate, *weights = package.expert_mix_backward(dy, x, picks, pre, gate, *tables, "gelu")
        weights = [torch.cat([weight[:8], nan[: len(weight) - 8]]) for weight in weights]
        grads = package.expert_table_grads(*weights, x, dy, picks, *tables)
        dots = package.dots(x, tables[0], picks)
        return [y, pre[:8], dx, dgate[:8], *grads, dots[:8], package.value_mix(gate, tables[0], picks)]

    room = Picks(offsets, F.pad(expert, (0, len(nan)), value=-1))
    for got, want in zip(all_of(room, torch.cat([gate, nan])), all_of(Picks(offsets, expert), gate), strict=True):
        torch.testing.assert_close(got, want)


@compiles
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_through_the_interpreter(which):
    run_interpreted(__file__, which)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"parallel": {"expert_tensor": 2}}, "parallel.expert_tensor must be 1"),
        ({"parallel": {"expert": 3}, "model": {"mlp": "peer"}}, "parallel.expert: 3 row shards are no power of two"),
        ({"parallel": {"expert": "auto"}, "model": {"mlp": "peer"}}, "parallel.expert: 3 row shards are no power"),
        ({"parallel": {"pipeline": 2}}, "parallel.pipeline must be 1"),
        ({"peer": {"dispatch_chunks": 2}, "model": {"mlp": "peer"}}, "peer.dispatch_chunks must be 1"),
        ({"table_optimizer": {"lazy": True}}, "table_optimizer.lazy must be false"),
    ],
)
def test_what_sizes_on_the_device_cannot_serve_is_refused(keys, words):
    keys = {**keys, "parallel": {"transport": "symmetric_memory", **keys.get("parallel", {})}}
    with pytest.raises(ConfigError, match=words):
        check_world(parse_config({"data": {"prefix": "text"}, **keys}, "run.yaml"), 3)


def test_numbers_that_nobody_asks_for_do_not_pile_up():
    traffic = Traffic()
    for number in range(1000):
        traffic.add_later(torch.tensor(number), {"x": 3})
        traffic.add_later(torch.tensor(1), {"tokens_received": 1})
    assert sum(map(len, traffic._later.values())) < 200
    assert (traffic.bytes_sent, traffic.tokens_received) == (3 * sum(range(1000)), 1000)
    assert (traffic.bytes_sent, traffic.tokens_received) == (3 * sum(range(1000)), 1000), "once"


def test_machines_without_it_are_told_so():
    config = parse_config({"data": {"prefix": "text"}, "parallel": {"transport": "symmetric_memory"}}, "run.yaml")
    with pytest.raises(ConfigError, match=r"parallel\.transport: symmetric_memory needs GPUs"):
        join_groups(config)


@pytest.mark.parametrize("options", [{"sparse_grad": True}, {"dispatch_chunks": 2}], ids=str)
def test_layers_refuse_it_too(options):
    layer = PEER(**OPTIONS, num_experts=49, **options)
    with pytest.raises(ValueError, match="keeps sizes on the device"):
        dispatch._planned(
            torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3), OnDevice(49, DIM), layer.traffic,
            layer.sparse_grad, layer.dispatch_chunks,
        )  # fmt: skip


@compiles
def test_the_layer_needs_no_symmetric_memory():
    """A torch without the module, which is torch's own: the layer is there, and the transport is not."""
    code = (
        "import sys; sys.modules['torch.distributed._symmetric_memory'] = None\n"
        "from peer_dist import PEER; from peer_dist.sharding.transport import SymmetricMemory\n"
        "print(PEER.__name__, SymmetricMemory.available())"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "PEER False\n"
