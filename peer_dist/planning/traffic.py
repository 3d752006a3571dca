"""What a rank sends in a step, by purpose and by link: inside a node, and between nodes.

Exchanges are counted by :mod:`peer_dist.sharding.cost`, all else by the volumes of ring algorithms. A reduction over
several nodes is taken to add up inside the nodes first, and to use all adapters of a node.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from peer_dist.kinds import KINDS, Tables
from peer_dist.kinds.cost import FLOAT
from peer_dist.planning.hardware import Hardware
from peer_dist.planning.layout import Group, Layout, Place
from peer_dist.planning.state import dense_elements, shards, touched
from peer_dist.sharding.cost import ExchangeBytes, Routes, bytes_of, size_bytes
from peer_dist.sharding.wire import WIRES


@dataclass(frozen=True)
class Wire:
    """Sent by one rank: bytes to ranks of its node and of other nodes, and collectives that stay inside and do not."""

    node: float = 0.0
    network: float = 0.0
    node_calls: float = 0.0
    network_calls: float = 0.0

    @property
    def total(self) -> float:
        """Bytes in all."""
        return self.node + self.network

    def __add__(self, other: Wire) -> Wire:
        return Wire(
            self.node + other.node,
            self.network + other.network,
            self.node_calls + other.node_calls,
            self.network_calls + other.network_calls,
        )

    def times(self, factor: float) -> Wire:
        """The same sent ``factor`` times."""
        return Wire(self.node * factor, self.network * factor, self.node_calls * factor, self.network_calls * factor)

    def seconds(self, hardware: Hardware) -> float:
        """One after the other: what is inside of nodes, what is not, and the collectives' latencies."""
        reached = hardware.achievable
        return (
            self.node / (hardware.node_link_bytes_per_s * reached.node_link)
            + self.network / (hardware.network_bytes_per_s * reached.network)
            + self.node_calls * hardware.node_link_latency_s
            + self.network_calls * hardware.network_latency_s
        )


def _sent(group: Group, size: float, calls: float) -> Wire:
    """``size`` bytes to all peers alike."""
    if group.size == 1:
        return Wire()
    near = (calls, 0.0) if group.nodes <= 1 else (0.0, calls)
    return Wire(size * group.near, size * (1 - group.near), *near)


def _ring(group: Group, size: float, ways: float = 2, calls: float = 1) -> Wire:
    """An all-reduce of ``size`` bytes (2 ways); an all-gather to, or a reduce-scatter of, as many (1 way)."""
    if group.size == 1:
        return Wire()
    inside = ways * (group.together - 1) / group.together * size
    between = ways * (group.nodes - 1) / group.nodes * size / group.together
    return Wire(inside, between, *((calls, 0.0) if group.nodes <= 1 else (0.0, calls)))


def routes(layout: Layout, tables: Tables, hits: float | None) -> Routes:
    """Where the tokens of a rank go in one pass of a layer with these tables, were picks uniform."""
    sizes = (tables.rows, tables.heads, tables.top_k, layout.rows)
    hits = _uniform_hits(*sizes) if hits is None else min(hits, layout.rows)  # of another layout, in a search
    return Routes.uniform(layout.own_tokens, *sizes, hits)


@lru_cache(maxsize=1024)
def _uniform_hits(rows: int, heads: int, top_k: int, shards: int) -> float:
    """Row shards that a token hits; a plan asks often, and the work grows with shards and picks."""
    return Routes.uniform(1, rows, heads, top_k, shards).pairs


def exchange(
    layout: Layout, kind: str, itemsize: int, hits: float | None = None, sent: ExchangeBytes | None = None
) -> tuple[Wire, Wire]:
    """Bytes that one rank's routed experts or values send in one pass through a layer of this kind, both ways.

    Args:
        itemsize: bytes of an activation.
        hits: row shards that a token hits, if it is known better than for uniform picks.
        sent: by the tokens of the pass, if their picks are known (:func:`peer_dist.sharding.cost.exchange_bytes`).
    """
    config, d = layout.config, layout.config.model.hidden_size
    tables, experts = KINDS[kind].tables(config), KINDS[kind].experts(config)
    if experts:  # a copy of a token for each of its experts, and a float32 weight
        away = layout.own_tokens * experts.top_k * (1 - 1 / layout.rows)
        size = away * (2 * d * itemsize + FLOAT)
        return _sent(layout.row_group, size, 4), _sent(layout.row_group, size, 3)
    if not tables:
        return Wire(), Wire()
    columns, parts, values = layout.columns, tables.chunks, not tables.tokens_travel
    wire = WIRES[config.parallel.wire]
    sent = sent or bytes_of(routes(layout, tables, hits), d, d / columns, columns, itemsize, FLOAT, values, wire)
    sizes, column_sizes = size_bytes(layout.rows, columns, parts)
    ways = 1 if values else 2
    return (
        _sent(layout.domain_group, sent.rows_forward, ways * parts)
        + _sent(layout.row_group, sent.picks_forward + sizes, 4)
        + _sent(layout.column_group, sent.column_forward + column_sizes, 4 if values else 4 + parts),
        _sent(layout.domain_group, sent.rows_backward, ways * parts)
        + _sent(layout.row_group, sent.picks_backward, 1)
        + _sent(layout.column_group, sent.column_backward, parts),
    )


def step_traffic(
    layout: Layout, place: Place, vocab_size: int, itemsize: int, hits: float | None = None
) -> Mapping[str, Wire]:
    """Bytes that one rank sends in a step, by purpose.

    ``exchange``: tokens to experts and back; ``statistics``: sums of query BatchNorm; ``tensor``: activations of
    tensor-parallel blocks; ``pipeline``: activations between stages; ``gradients``: of the dense part, and ZeRO's
    parameters; ``tables``: gradients of expert shards between their copies.
    """
    config, passes = layout.config, layout.passes
    wires = {"exchange": Wire(), "statistics": Wire(), "tensor": Wire()}
    for (kind, forwards), number in layout.kinds(place.stage).items():
        there, back = exchange(layout, kind, itemsize, hits)
        wires["exchange"] += (there.times(forwards) + back).times(number * passes)
        wires["statistics"] += _statistics(layout, kind).times(number * passes * (1 + forwards))
        wires["tensor"] += _tensor(layout, kind, itemsize, forwards).times(number * passes)
    wires["tensor"] += _ends(layout, place, itemsize).times(passes)
    carried = config.model.hidden_size + (config.router.state_size if config.has_router_core else 0)
    sends = (layout.pipeline > 1) * 2 * passes * layout.virtual  # there and back; the ends have fewer
    wires["pipeline"] = _sent(layout.next_stage, layout.split_tokens * carried * itemsize, 1).times(sends)
    wires["gradients"] = _gradients(layout, place, vocab_size, itemsize)
    wires["tables"] = _tables(layout, place, itemsize)
    return wires


def _statistics(layout: Layout, kind: str) -> Wire:
    """Two small sums over all ranks of a stage."""
    features = KINDS[kind].batch_statistics(layout.config)
    if not features:
        return Wire()
    return _ring(layout.group(layout.stage_ranks, 1), 2 * features * FLOAT, calls=2)


def _tensor(layout: Layout, kind: str, itemsize: int, forwards: int) -> Wire:
    """Attention and a dense feed-forward: under sequence parallelism gathered before and scattered after, and gathered
    once more for the first matrix's gradient; else an all-reduce each way. Sparse layers take a share of the tokens.
    """
    config, size = layout.config, layout.tokens * layout.config.model.hidden_size * itemsize
    sparse = KINDS[kind].sparse
    blocks = 1 if sparse else 2
    if config.parallel.sequence:
        return _ring(layout.tensor_group, size, ways=1, calls=1).times(blocks * (2 * forwards + 3))
    shares = _ring(layout.tensor_group, size, ways=1).times(forwards + 1) if sparse else Wire()
    return _ring(layout.tensor_group, size).times(blocks * (forwards + 1)) + shares


def _ends(layout: Layout, place: Place, itemsize: int) -> Wire:
    """The embedding's sum and the input gradient of the logits, with the three sums of the loss."""
    size, wire = layout.tokens * layout.config.model.hidden_size * itemsize, Wire()
    ways = 1 if layout.config.parallel.sequence else 2
    if place.stage == 0:
        wire += _ring(layout.tensor_group, size, ways)
    if place.stage == layout.pipeline - 1:
        wire += _ring(layout.tensor_group, size, 3 if layout.config.parallel.sequence else 2)
        wire += _ring(layout.tensor_group, layout.tokens * FLOAT).times(3)
    return wire


def _gradients(layout: Layout, place: Place, vocab_size: int, itemsize: int) -> Wire:
    """ZeRO-0: an all-reduce in float32. ZeRO 1 and 2 (DeepSpeed's buckets of many ranks): an all-reduce, and the new
    parameters gathered. ZeRO-3: a reduce-scatter, and parameters gathered in every forward and backward pass.
    """
    config, group = layout.config, layout.data_group
    elements = dense_elements(layout, place.stage, vocab_size)
    if config.zero.stage == 0:
        wire = _ring(group, elements * FLOAT)
    elif config.zero.stage < 3:
        wire = _ring(group, elements * itemsize, ways=3, calls=4)
    else:
        wire = _ring(
            group, elements * itemsize, ways=1 + 2 * layout.passes, calls=4 * layout.passes * config.model.num_layers
        )
    if config.model.tied_embeddings and layout.pipeline > 1 and place.stage in (0, layout.pipeline - 1):
        ends = layout.group(2, layout.world_size - layout.stage_ranks)
        wire += _ring(ends, vocab_size // layout.tensor * config.model.hidden_size * itemsize)
    return wire


def _tables(layout: Layout, place: Place, itemsize: int) -> Wire:
    """An all-reduce; lazily the rows touched, to those who add them up and from there to all."""
    wire, lazy = Wire(), layout.config.table_optimizer.lazy
    for block in (block for owned in shards(layout, place).values() for block in owned):
        size: float = block.size * (block.itemsize or itemsize)
        if block.table_rows and lazy:
            one = touched(layout, block)
            any_copy = 1 - (1 - one) ** layout.copies
            size *= (one + any_copy) / 2
        wire += _ring(layout.copy_group, size)
    return wire
