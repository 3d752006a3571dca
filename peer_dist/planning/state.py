"""Weights, gradients and optimizer states of a rank: exactly the bytes that the engines allocate.

Gradients are those at the end of the last backward pass, before they are reduced: the most there ever are. Counts of
steps, buffers such as BatchNorm's statistics, and rotary positions are left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from peer_dist.config import Config
from peer_dist.config.schema import ParallelConfig, TableOptimizerConfig
from peer_dist.kinds import KINDS
from peer_dist.kinds.cost import FLOAT, Shape
from peer_dist.kinds.routing import core_shapes
from peer_dist.planning.hit_rate import EVEN, Skew, distinct
from peer_dist.planning.layout import Layout, Place
from peer_dist.sharding.grid import first_of

_OF_EXPERTS = TableOptimizerConfig(name="adam")  # as the optimizer of coarse experts keeps its states
PERSISTENT = 100_000  # elements up to which ZeRO-3 keeps a parameter whole on every rank (DeepSpeed's default)


@dataclass(frozen=True)
class Block:
    """A rank's part of a table, or a coarse expert's matrix."""

    rows: int
    columns: int
    itemsize: int = 0
    """Bytes of a table's element; a coarse expert's are those of the dense part."""
    table_rows: int = 0
    """Rows of the whole table; 0 for a coarse expert."""
    picks: int = 0
    """Picks of one token in all layers that share the table."""
    scale_size: int = 0
    """Bytes of a row's scale."""
    gradient_itemsize: int = 0
    """Bytes of an element of a table's gradient."""
    far: bool = False
    """Whether a table's rows lie in other memory than the kernels'."""

    @property
    def size(self) -> int:
        """Elements of the block."""
        return self.rows * self.columns


@dataclass(frozen=True)
class State:
    """Bytes of one rank.

    Attributes:
        weights, gradients, optimizer: near the kernels, but for what is cached of far tables.
        host: what ZeRO's offload keeps in host memory of the optimizer's.
        far_weights, far_optimizer: of tables that lie far from the kernels.
        far_gradients: of theirs; part of ``gradients``.
    """

    weights: int
    gradients: float
    optimizer: int
    host: int = 0
    far_weights: int = 0
    far_optimizer: int = 0
    far_gradients: float = 0.0


def dense_shapes(layout: Layout, stage: int, vocab_size: int) -> dict[str | int, list[Shape]]:
    """The trained parameters of a stage's rank but for its shards: of each layer (from 0), the ``embedding``, the
    ``head`` and what routers share (``core``). Matrices have two dimensions or more, and are what decays.
    """
    config, tensor, chunks = layout.config, layout.tensor, layout.layers(stage)
    d, last = config.model.hidden_size, layout.pipeline - 1
    shapes: dict[str | int, list[Shape]] = {}
    if stage == 0:
        shapes["embedding"] = [(vocab_size // tensor, d)]
    keys = d // config.model.num_attention_heads * config.model.query_groups  # wide, and so are values
    attention = [(d,), ((d + 2 * keys) // tensor, d), (d, d // tensor), (d,)]
    by_kind = {kind: [*attention, *KINDS[kind].shapes(config, tensor)] for kind, _ in layout.kinds(stage)}
    kinds = config.model.mlp_kinds
    shapes |= {layer: by_kind[kinds[layer]] for layers in chunks for layer in layers}
    if config.has_router_core:  # each chunk has a copy
        shapes["core"] = [*core_shapes(config)] * len(chunks)
    if stage == last:
        own = not config.model.tied_embeddings or layout.pipeline * layout.virtual > 1
        shapes["head"] = [(d,), *([(vocab_size // tensor, d)] if own else [])]
    return shapes


def dense_elements(layout: Layout, stage: int, vocab_size: int) -> int:
    """All of :func:`dense_shapes`."""
    return sum(math.prod(shape) for part in dense_shapes(layout, stage, vocab_size).values() for shape in part)


def shards(layout: Layout, place: Place) -> dict[str | int, list[Block]]:
    """Layer (from 0) to the blocks that a rank owns of it."""
    config, d = layout.config, layout.config.model.hidden_size
    pools = {pool[0]: len(pool) for pool in config.pools}
    columns = part_of(d, place.column, layout.columns)
    blocks: dict[str | int, list[Block]] = {}
    kinds = config.model.mlp_kinds
    for layer in (layer for chunk in layout.layers(place.stage) for layer in chunk):
        kind = KINDS[kinds[layer]]
        tables, experts = kind.tables(config), kind.experts(config)
        if tables and layer in pools:
            rows = part_of(tables.rows, place.row, layout.rows)
            picks = tables.picks * pools[layer]
            held = (tables.scale_size, tables.gradient_itemsize, tables.far)
            block = Block(rows, columns, tables.itemsize, tables.rows, picks, *held)
            blocks[layer] = [block] * len(tables.names)
        if experts:
            own = experts.number // layout.rows
            blocks[layer] = [Block(own * experts.outputs, d), Block(own * d, experts.hidden)]
    return blocks


def part_of(size: int, shard: int, shards: int) -> int:
    """Of so many rows or columns, those of a shard."""
    return first_of(size, shard + 1, shards) - first_of(size, shard, shards)


def touched(layout: Layout, block: Block, passes: int | None = None, skew: Skew = EVEN) -> float:
    """The share of a table's rows that a copy's tokens are expected to pick in so many passes; None: in a step."""
    tokens = (passes or layout.passes) * layout.own_tokens * layout.rows * layout.columns
    return distinct(block.table_rows, tokens * block.picks, exponent=skew.exponent).rows / block.table_rows


def gradient_bytes(layout: Layout, block: Block, itemsize: int, passes: int | None = None, skew: Skew = EVEN) -> float:
    """Bytes of a shard's gradient after so many passes (None: a step's); lazy tables hold touched rows only.

    Where a GPU keeps the operands of their sums instead, it is the most that could be there.
    """
    if block.table_rows and layout.config.table_optimizer.lazy:
        return touched(layout, block, passes, skew) * block.rows * (block.columns * itemsize + 8)
    return block.size * itemsize


def state(layout: Layout, place: Place, vocab_size: int, itemsize: int, skew: Skew = EVEN) -> State:
    """Bytes of weights, gradients and optimizer states on one rank.

    Args:
        vocab_size: rows of the embedding, padding included.
        itemsize: bytes of a dense parameter, 4 or 2.
        skew: of picks, by which lazy tables have gradients.
    """
    shapes = [shape for part in dense_shapes(layout, place.stage, vocab_size).values() for shape in part]
    blocks = [block for owned in shards(layout, place).values() for block in owned]
    dense, owned = _dense_state(layout, shapes, itemsize), _shard_state(layout, blocks, itemsize, skew)
    return State(
        dense.weights + owned.weights,
        dense.gradients + owned.gradients,
        dense.optimizer + owned.optimizer,
        dense.host,
        owned.far_weights,
        owned.far_optimizer,
        owned.far_gradients,
    )


def checkpoint_bytes(config: Config, vocab_size: int, itemsize: int) -> int:
    """Bytes of the tensors in a checkpoint of a run, which do not depend on its layout.

    They are the weights, the moments of all optimizers, and float32 masters: of the dense part always, of tables and
    experts where those are of another dtype. Tables of eight bits are saved as bfloat16 numbers.

    Args:
        vocab_size: rows of the embedding, padding included.
        itemsize: bytes of a dense parameter, 4 or 2.
    """
    alone = config.model_copy(update={"parallel": ParallelConfig()})
    layout, place = Layout(alone, 1, 1), Place()
    blocks = [block for owned in shards(layout, place).values() for block in owned]
    saved = [replace(block, itemsize=block.itemsize and max(2, block.itemsize), scale_size=0) for block in blocks]
    owned = _shard_state(layout, saved, itemsize)
    tables = owned.weights + owned.optimizer + owned.far_weights + owned.far_optimizer
    return dense_elements(layout, 0, vocab_size) * (itemsize + 3 * FLOAT) + tables


def _dense_state(layout: Layout, shapes: list[Shape], itemsize: int) -> State:
    """AdamW's two moments in float32; a float32 master of what is not, and under ZeRO of float32 too."""
    zero, ranks = layout.config.zero, layout.data
    sizes = [math.prod(shape) for shape in shapes]
    if zero.stage == 0:  # gradients in one float32 buffer
        return State(sum(sizes) * itemsize, sum(sizes) * FLOAT, sum(sizes) * (2 + (itemsize < FLOAT)) * FLOAT)
    if zero.stage == 3:  # each parameter is cut into equal parts, and gradients have a buffer of parts beside them
        parts = sum(-(-size // ranks) for size in sizes)
        whole = sum(-(-size // ranks) for size in sizes if size <= PERSISTENT) * ranks if ranks > 1 else 0
        weights, gradients = (parts + whole) * itemsize, (sum(sizes) + parts) * itemsize
        optimizer = parts * 3 * FLOAT
    else:  # matrices and vectors, each end to end, in equal parts of an even number of elements
        flat = 0
        for group in ([s for s in shapes if len(s) > 1], [s for s in shapes if len(s) < 2]):
            flat += -(-sum(math.prod(shape) for shape in group) // (2 * ranks)) * 2 * ranks
        weights, gradients, optimizer = flat * itemsize, sum(sizes) * itemsize, flat // ranks * 3 * FLOAT
    return State(weights, gradients, *((0, optimizer) if zero.offload else (optimizer, 0)))


def _shard_state(layout: Layout, blocks: list[Block], itemsize: int, skew: Skew = EVEN) -> State:
    """Tables by their own optimizer; coarse experts by Adam, in the dtype of the dense part."""
    table = layout.config.table_optimizer
    weights, optimizer = [0, 0], [0, 0]  # near and far
    gradients = [0.0, 0.0]
    for block in blocks:
        rule, element = (table, block.itemsize) if block.table_rows else (_OF_EXPERTS, itemsize)
        whole, one = rule.moments
        weights[block.far] += block.size * element + block.rows * block.scale_size
        gradients[block.far] += gradient_bytes(layout, block, block.gradient_itemsize or itemsize, skew=skew)
        kept = (whole + rule.keeps_masters(element)) * block.size + one * block.rows
        optimizer[block.far] += kept * FLOAT
    return State(weights[0], sum(gradients), optimizer[0], 0, weights[1], optimizer[1], gradients[1])
