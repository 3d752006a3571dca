"""What a rank allocates at most: states, activations of the passes in flight, what travels, and temporaries.

Activations are what autograd keeps in our stack (Megatron's local layers, torch's attention within documents, RMSNorm
in float32), counted tensor by tensor; temporaries are those of the largest step of a backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from peer_dist.kernels.dense import BLOCK
from peer_dist.kinds import KINDS, Kind, Tables
from peer_dist.kinds.cost import FLOAT
from peer_dist.optim.held_bytes import BUCKET
from peer_dist.planning.hit_rate import EVEN, Skew
from peer_dist.planning.layout import Layout, Place
from peer_dist.planning.state import State, dense_elements, dense_shapes, gradient_bytes, shards, state
from peer_dist.planning.tiers import far_pools
from peer_dist.planning.traffic import routes

LIVE = 1_000_000_000  # elements up to which ZeRO-3 leaves parameters that it has gathered in place (likewise)


@dataclass(frozen=True)
class PeakMemory:
    """Bytes of one rank.

    Attributes:
        activations: kept for the backward passes at the peak, those of the exchange apart.
        exchange: tokens, picks and gates that experts' owners keep, and what is on its way.
        temporaries: of one step of the passes: gradients not yet added, copies in another dtype, ZeRO-3's parameters.
        reduction: DeepSpeed's bucket and the copy of it that is sent, between the passes and the step.
        step: what the optimizers work in.
        peak: at the worst moment; less than the sum, because not all are there at once.
        passes_peak: until the last backward pass has ended, without the reduction and the step.
        host: of ZeRO's offload, in host memory.
        cache, staged: of rows near the kernels whose tables lie elsewhere: hot ones with their states, and those that
            passes under way have picked.
        tables_host: in host memory, of tables that lie there with their states, or of what is kept there of those on
            disk; on a CPU rank it is part of the peak.
        tables_disk: of scratch files.
    """

    weights: int
    gradients: float
    optimizer: int
    activations: float
    exchange: float
    temporaries: float
    reduction: float
    step: float
    peak: float
    passes_peak: float
    host: int
    cache: int
    staged: float
    tables_host: float
    tables_disk: int


@dataclass(frozen=True)
class Kept:
    """Bytes of one layer (or of what follows the last one) in one pass.

    Attributes:
        activations, exchange: from its forward to its backward pass.
        working: beside them in its backward pass, new gradients apart.
    """

    activations: float
    exchange: float = 0.0
    working: float = 0.0


@dataclass(frozen=True)
class _Moment:
    """Bytes that are held while one part's backward pass runs."""

    activations: float
    exchange: float
    working: float
    gradients: float

    @property
    def total(self) -> float:
        return self.activations + self.exchange + self.working + self.gradients


def memory(
    layout: Layout,
    place: Place,
    vocab_size: int,
    itemsize: int,
    device: str,
    hits: float | None = None,
    skew: Skew = EVEN,
) -> PeakMemory:
    """The most bytes that one rank holds at once, and what they are made of.

    Args:
        vocab_size: rows of the embedding, padding included.
        itemsize: bytes of an activation and of a dense parameter.
        device: ``cuda`` or ``cpu``.
        hits: row shards that a token hits; None: those of uniform picks.
        skew: of picks.
    """
    held = state(layout, place, vocab_size, itemsize, skew)
    inputs = layout.in_flight(place.stage) * layout.tokens * 20  # ids, labels and weights: of the passes in flight
    timeline = _backward_timeline(layout, place, vocab_size, itemsize, device, hits, held, skew)
    worst = max(timeline, key=lambda moment: moment.total)
    elements = dense_elements(layout, place.stage, vocab_size)
    reduction, lasting = 0, 0
    if layout.config.zero.stage:
        bucket = min(BUCKET, elements) * itemsize
        reduction = bucket * (2 if layout.data > 1 else 1)  # what is sent is a copy: parts of several ranks, end to end
        lasting = bucket if layout.config.zero.stage == 3 else 0
    gathered = 0
    if layout.config.zero.stage == 3 and layout.data > 1:
        gathered = min(LIVE, elements) * itemsize
    pools = far_pools(layout, place)
    cache = sum(pool.cache_bytes for pool in pools)
    staged = sum(pool.staged_bytes(layout, place.stage, skew) for pool in pools)
    on_disk = sum(pool.disk_bytes for pool in pools)
    in_memory = float(sum(pool.bytes for pool in pools) - on_disk)
    in_memory += min(on_disk, max((pool.tables.resident_bytes for pool in pools), default=0))
    if device == "cuda":  # gradients are copied there
        in_memory += held.far_gradients
    base = held.weights + held.optimizer + inputs + lasting + cache + staged + (in_memory if device == "cpu" else 0)
    step = _step(layout, elements, itemsize)
    return PeakMemory(
        held.weights,
        held.gradients,
        held.optimizer,
        worst.activations + inputs,
        worst.exchange,
        worst.working + gathered,
        reduction,
        step,
        base + max(worst.total + gathered, held.gradients + max(reduction - lasting, step)),
        base - lasting + worst.total + gathered,
        held.host,
        cache,
        staged,
        in_memory,
        on_disk,
    )


def _step(layout: Layout, elements: int, itemsize: int) -> float:
    """Temporaries of the optimizers: ZeRO's partition of the gradients end to end. The tables' step has none."""
    zero = layout.config.zero
    return 0.0 if zero.stage == 0 or zero.offload else elements / layout.data * (itemsize + FLOAT)


def _backward_timeline(
    layout: Layout,
    place: Place,
    vocab_size: int,
    itemsize: int,
    device: str,
    hits: float | None,
    held: State,
    skew: Skew,
) -> Iterator[_Moment]:
    """The moments of a stage's backward passes, from its last part to its first, and the end.

    A part's backward pass frees what its forward pass kept, and leaves gradients. From the second pass on all gradients
    are there, and new ones stand beside them until they are added, but for those of dense tables, which grow in place.
    """
    growing = layout.passes == 1 and layout.config.zero.stage > 0
    gradients = _new_gradients(layout, place, vocab_size, itemsize, growing, skew)
    for parts in kept_parts(layout, place.stage, vocab_size, itemsize, device, hits):
        in_flight = layout.in_flight(place.stage)
        activations = in_flight * sum(kept.activations for _, kept in parts)
        exchange = in_flight * sum(kept.exchange for _, kept in parts)
        there = 0.0 if growing else held.gradients
        for part, kept in reversed(parts):
            new = gradients.get(part, _NewGradients())
            yield _Moment(activations, exchange, kept.working + new.at_once, there)
            activations -= kept.activations
            exchange -= kept.exchange
            there += new.in_all if growing else 0.0
    yield _Moment(0.0, 0.0, 0.0, held.gradients)


@dataclass(frozen=True)
class _NewGradients:
    """Bytes that the backward pass of a part makes: in all, and the most before they are added to those there are."""

    in_all: float = 0.0
    at_once: float = 0.0


def _new_gradients(
    layout: Layout, place: Place, vocab_size: int, itemsize: int, made: bool, skew: Skew
) -> dict[str | int, _NewGradients]:
    """By part: a layer's tables get their gradients together, every other parameter by itself. They are ``made`` in
    this pass, or those of dense tables are there.
    """
    shapes, owned = dense_shapes(layout, place.stage, vocab_size), shards(layout, place)
    gradients = {}
    for part in shapes.keys() | owned.keys():
        sizes = [math.prod(shape) * itemsize for shape in shapes.get(part, [])]
        new = [
            (block, gradient_bytes(layout, block, block.gradient_itemsize or itemsize, 1, skew))
            for block in owned.get(part, [])
        ]
        beside = sum(size for block, size in new if made or layout.config.table_optimizer.lazy or not block.table_rows)
        gradients[part] = _NewGradients(sum(sizes) + sum(size for _, size in new), max([beside, *sizes]))
    return gradients


def kept_parts(
    layout: Layout, stage: int, vocab_size: int, itemsize: int, device: str, hits: float | None = None
) -> Iterator[list[tuple[str | int, Kept]]]:
    """For each chunk of a stage: what its layers (from 0) and the ``head`` keep in one pass, in their order."""
    config, kinds = layout.config, layout.config.model.mlp_kinds
    by_kind = {kind: _layer(layout, kind, itemsize, device, hits) for kind, _ in layout.kinds(stage)}
    for chunk in layout.layers(stage):
        parts: list[tuple[str | int, Kept]] = []
        for number, layer in enumerate(chunk):
            kept = by_kind[kinds[layer]]
            if number < config.train.recompute_layers:
                again = kept.activations + kept.exchange + kept.working
                kept = Kept(layout.split_tokens * _carried(layout) * itemsize, working=again)
            parts.append((layer, kept))
        if chunk[-1] == config.model.num_layers - 1:
            parts.append(("head", _head(layout, vocab_size, itemsize, device)))
        yield parts


def moved_activations(layout: Layout, stage: int, vocab_size: int, itemsize: int, device: str) -> float:
    """Bytes that a pass writes and reads of activations: all that is kept is written and read forward; backward it is
    read, and its gradient written and read. Recomputed layers go forward twice.
    """
    by_kind = {kind: _layer(layout, kind, itemsize, device, None).activations for kind, _ in layout.kinds(stage)}
    moved = sum(number * (2 * forwards + 3) * by_kind[kind] for (kind, forwards), number in layout.kinds(stage).items())
    if stage == layout.pipeline - 1:
        moved += 5 * _head(layout, vocab_size, itemsize, device).activations
    return moved


def _carried(layout: Layout) -> int:
    """Width of what goes from layer to layer."""
    config = layout.config
    return config.model.hidden_size + (config.router.state_size if config.has_router_core else 0)


def _norm(d: int, itemsize: int, device: str) -> float:
    """Bytes per token: the input in float32, its inverse root, on a CPU the normed one, and the output."""
    return d * (FLOAT + itemsize + (FLOAT if device == "cpu" else 0)) + FLOAT


def _layer(layout: Layout, kind: str, itemsize: int, device: str, hits: float | None) -> Kept:
    config, model, tensor = layout.config, layout.config.model, layout.tensor
    d, split, tokens = model.hidden_size, layout.split_tokens, layout.tokens
    fused = device == "cuda"  # one kernel splits and rotates, and puts a sequence's tokens end to end
    # queries, keys, values, the context twice; its logarithms; on a CPU also the three before rotation, and rotations
    attention = (5 if fused else 7) * d / tensor * itemsize + model.num_attention_heads / tensor * FLOAT
    if not fused:
        attention += itemsize * (2 * d // model.num_attention_heads / config.train.micro_batch_size)
    if not fused or itemsize == FLOAT:  # which no flash kernel takes: documents are a mask
        attention += itemsize * model.seq_length
    dropped = 2 * d if model.dropout else 0
    both = split * (2 * _norm(d, itemsize, device) + dropped) + tokens * attention
    own = _feed_forward(layout, KINDS[kind], itemsize, hits)
    working = max(own.working, 6 * d / tensor * itemsize * tokens) + split * d * (2 * FLOAT + itemsize)
    return Kept(both + own.activations, own.exchange, working)


def _feed_forward(layout: Layout, kind: Kind, itemsize: int, hits: float | None) -> Kept:
    """What the layer itself keeps, and what sending its tokens to experts or values keeps."""
    config, tokens, d = layout.config, layout.own_tokens, layout.config.model.hidden_size
    kept, working = kind.kept(config, itemsize)
    tables, experts = kind.tables(config), kind.experts(config)
    if tables:
        if layout.tensor > 1 and not config.parallel.sequence:
            kept += d * itemsize  # this rank's part of the tokens
        return _rows(layout, tables, Kept(tokens * kept, working=tokens * working), itemsize, hits)
    away = 0.0
    if experts and layout.rows > 1:
        away = tokens * experts.top_k * 2 * d * itemsize
    return Kept(tokens * kept, away, tokens * working)


def _rows(layout: Layout, tables: Tables, own: Kept, itemsize: int, hits: float | None) -> Kept:
    """A layer that picks rows of tables and keeps ``own`` for it, with the picks and what travels."""
    tokens, d, columns = layout.own_tokens, layout.config.model.hidden_size, layout.columns
    if layout.rows * columns == 1:
        if not tables.tokens_travel:
            return Kept(own.activations, working=own.working + tokens * d * FLOAT)
        numbers = tokens * tables.picks * FLOAT  # the experts' dot products
        return Kept(own.activations + numbers, working=max(own.working, 3 * numbers + tokens * 2 * d * FLOAT))
    route = routes(layout, tables, hits)
    merging = 8 * (tokens * tables.picks + 2 * route.picks + (1 + columns) * route.pairs)
    if not tables.tokens_travel:  # gates and picks travel, and sums of values come home
        received, travelling = columns * route.picks * (8 + FLOAT), route.pairs * d * 2 * itemsize
    else:
        received = route.pairs * d * itemsize + columns * route.picks * (8 + 2 * FLOAT)
        # dy as sent and as received, dx in float32 and as sent, and a pick's three gradients at an owner
        travelling = route.pairs * d * (3 * itemsize + FLOAT) + columns * route.picks * 3 * FLOAT
    return Kept(own.activations, received + merging, max(own.working, travelling))


def _head(layout: Layout, vocab_size: int, itemsize: int, device: str) -> Kept:
    """The last norm and the logits, which become their gradient in place; of them, a block at a time in float32."""
    words = layout.tokens * vocab_size / layout.tensor
    return Kept(
        layout.split_tokens * _norm(layout.config.model.hidden_size, itemsize, device) + words * itemsize,
        working=(min(words, BLOCK) if device == "cpu" else 0) * FLOAT
        + layout.split_tokens * layout.config.model.hidden_size * (itemsize + FLOAT),
    )
