"""Rows that travel rounded: the rounding itself, the layer against one that rounds by formula, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from peer_dist import PEER, ProductKeyMemory
from peer_dist.config import ConfigError
from peer_dist.config.load import parse_config
from peer_dist.sharding import ExpertGroups
from peer_dist.sharding.wire import WIRES
from tests.ranks import run_ranks
from tests.shards import whole_table

BFLOAT16, FLOAT8 = WIRES["bfloat16"], WIRES["float8"]


def sent(wire, rows):
    return wire.decode(wire.encode(rows)).to(rows.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("magnitude", [1e-30, 1e-5, 1.0, 1e30])
def test_an_element_is_rounded_by_no_more_than_is_said(magnitude, dtype):
    rows = (torch.randn(64, 33) * torch.randn(64, 33).exp() * magnitude).to(dtype)
    exact = rows.double()
    scale = exact.abs().amax(1, keepdim=True) / 448
    eighth = torch.maximum(exact.abs() * 2.0**-4, scale * 2.0**-10)
    own = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-22  # the result is of the rows' dtype, the scale of float32
    assert bool(((sent(FLOAT8, rows).double() - exact).abs() <= eighth + own * exact.abs()).all())
    assert bool(((sent(BFLOAT16, rows).double() - exact).abs() <= exact.abs() * 2.0**-8).all())
    assert bool((sent(FLOAT8, rows) != rows).any())
    assert bool((sent(BFLOAT16, rows) != rows).any()) == (dtype != torch.bfloat16)


@pytest.mark.parametrize("wire", [BFLOAT16, FLOAT8], ids=str)
def test_rows_that_are_odd(wire):
    assert torch.equal(sent(wire, torch.zeros(2, 5)), torch.zeros(2, 5))
    assert torch.equal(sent(wire, torch.tensor([[1e-45, 0.0]])).isfinite(), torch.tensor([[True, True]]))
    rows = torch.ones(3, 4)
    rows[0, 1], rows[1, 2] = float("nan"), float("-inf")
    assert sent(wire, rows).isfinite().all(1).tolist() == [False, False, True]
    for shape in ((0, 3), (2, 0), (0, 0)):
        assert sent(wire, torch.empty(shape)).shape == shape
        assert wire.encode(torch.empty(shape)).shape == (shape[0], wire.length(shape[1]))


class Rounded(torch.autograd.Function):
    """As on the way: the value and its gradient are rounded, and the gradient passes straight through."""

    @staticmethod
    def forward(ctx, rows, wire, shards):
        ctx.wire, ctx.shards = wire, shards
        return rounded(rows, wire, shards)

    @staticmethod
    def backward(ctx, grad):
        return rounded(grad, ctx.wire, ctx.shards), None, None


def rounded(rows, wire, shards):
    """Each slice has a scale of its own."""
    return torch.cat([sent(wire, part) for part in rows.split(-(-rows.shape[1] // shards), 1)], 1)


DIM = 10
KINDS = {
    "peer": (PEER, {"num_experts": 49, "activation": "relu"}, ("down", "up")),
    "product_key_memory": (ProductKeyMemory, {"num_values": 49}, ("values",)),
}
OPTIONS = {"dim": DIM, "heads": 3, "top_k": 5, "key_dim": 6, "query_norm": "none", "seed": 3, "dtype": torch.float64}


def travelling(rank, world_size, kind, wire, columns, chunks, x, dy):
    """The layer's output, the gradients of x and of its tables, and the number of row shards."""
    layer_type, sizes, tables = KINDS[kind]
    parts = {"dispatch_chunks": chunks} if layer_type is PEER else {}
    layer = layer_type(**OPTIONS, **sizes, **parts, group=ExpertGroups.over(dist.group.WORLD, columns, WIRES[wire]))
    x = x.chunk(world_size)[rank].clone().requires_grad_()
    y = layer(x)
    y.backward(dy.chunk(world_size)[rank])
    return y.detach(), x.grad, [getattr(layer, name).grad for name in tables], layer.layout.row_shards


@pytest.mark.parametrize("wire", ["bfloat16", "float8"])
@pytest.mark.parametrize(
    ("kind", "world_size", "columns", "chunks"),
    [("peer", 2, 1, 1), ("peer", 3, 1, 3), ("peer", 4, 2, 2), ("peer", 3, 3, 1), ("product_key_memory", 4, 2, 1)],
)
def test_the_layer_is_that_of_rounded_rows(kind, world_size, columns, chunks, wire):
    """In float64: x is rounded, and so are the sum of each row shard, dy, and the dx of each row shard.

    A sum whose last bit differs could be rounded the other way, by 2^-8 or 2^-4 of itself: these numbers have no such.
    """
    torch.manual_seed(5)
    x, dy = torch.randn(24, DIM, dtype=torch.float64), torch.randn(24, DIM, dtype=torch.float64)
    ranks = run_ranks(travelling, world_size, kind, wire, columns, chunks, x, dy)
    layer_type, sizes, names = KINDS[kind]
    layer, row_shards = layer_type(**OPTIONS, **sizes), ranks[0][-1]
    tables = [getattr(layer, name) for name in names]
    x.requires_grad_()
    indices, gates = (value.flatten(1) for value in layer._pick(layer._queries(layer.query(x)), layer.keys))
    rows, y = -(-49 // row_shards), torch.zeros_like(x)
    for shard in range(row_shards):
        weights = torch.where(indices // rows == shard, gates, 0.0)
        if kind == "peer":
            at_owner = Rounded.apply(x, WIRES[wire], columns)
            weights = weights * torch.einsum("td,tpd->tp", at_owner, tables[0][indices]).relu()
        y = y + Rounded.apply(torch.einsum("tp,tpd->td", weights, tables[-1][indices]), WIRES[wire], columns)
    y.backward(dy)
    compared = [(torch.cat([rank[0] for rank in ranks]), y.detach()), (torch.cat([rank[1] for rank in ranks]), x.grad)]
    compared += [
        (whole_table([rank[2][place] for rank in ranks], columns), table.grad) for place, table in enumerate(tables)
    ]
    for got, want in compared:
        assert want.abs().max() > 0.1
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"parallel": {"wire": "bfloat16"}, "train": {"precision": "bf16"}}, "parallel.wire bfloat16 has no effect"),
        ({"parallel": {"wire": "float16"}}, "parallel.wire: "),
    ],
)
def test_what_has_no_effect_or_no_meaning_is_refused(keys, words):
    with pytest.raises(ConfigError, match=words):
        parse_config({"data": {"prefix": "text"}, **keys}, "run.yaml")
    parse_config({"data": {"prefix": "text"}, "parallel": {"wire": "float8"}, "train": {"precision": "bf16"}}, "a")
