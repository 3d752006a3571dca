"""How long a step takes, by what is computed, read and sent: floors over achievable rates, and where they overlap.

- Matrix products: FLOPs of :mod:`peer_dist.planning.counts` over the device's rate; backward twice, recomputed layers'
  forward once more.
- Activations: what layers keep is written and read forward; backward it is read, and its gradient written and read.
- Experts: the distinct rows that a pass picks are read once forward and once backward, and their gradients written; or
  their products, if those take longer.
- Exchange: bytes by link. With ``peer.dispatch_chunks`` the shorter of exchange and experts hides behind the longer but
  for one part's share. All other communication is waited for, as it is in the code.
- Pipeline: the slowest stage's pass, ``(stages - 1) / virtual stages`` times more often than it has passes.
- Accumulation: from the second pass on, gradients are read twice and written once.
- Optimizer: each byte of its states read and written once, of gradients read twice (norm and update), of weights
  written.
- Far tables (:mod:`peer_dist.planning.tiers`): each forward pass waits for the rows that the cache has not. Their step
  goes on behind the next forward pass, up to the layer that needs it; on CPU ranks it takes the cores that the pass
  needs, and only a disk's part is hidden. What of it is read or sent during the backward pass is not modelled.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from peer_dist.kinds import KINDS
from peer_dist.kinds.cost import FLOAT, SHARDED_PARTS, total
from peer_dist.planning.counts import Counts
from peer_dist.planning.hardware import Hardware
from peer_dist.planning.hit_rate import EVEN, Skew, distinct
from peer_dist.planning.layout import Layout, Place
from peer_dist.planning.peak_memory import PeakMemory, moved_activations
from peer_dist.planning.state import Block, shards, touched
from peer_dist.planning.tiers import Fetch, exposed, far_pools, fetched, stepped
from peer_dist.planning.traffic import exchange, routes, step_traffic


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, of the rank that is waited for; the parts add up to the total.

    Attributes:
        matmul: matrix products.
        activations: what lies between the products: norms, attention's softmax, activation functions, residual sums.
        experts: rows of tables read, gradients of theirs written.
        exchange: tokens to experts and back, what hides behind the experts left out.
        tensor: activations of tensor-parallel blocks and batch statistics.
        pipeline: sends between stages.
        bubble: stages waiting for the first and the last pass.
        gradients: the dense part's, reduced, and ZeRO's parameters gathered.
        tables: gradients of expert shards between their copies.
        accumulation: the gradients of the passes after the first, added to those there are.
        optimizer: updates.
        far_rows: rows of far tables, until they are near.
        far_step: of their updates, what the next forward pass does not hide.
        overhead: fixed costs per layer and step.
    """

    matmul: float
    activations: float
    experts: float
    exchange: float
    tensor: float
    pipeline: float
    bubble: float
    gradients: float
    tables: float
    accumulation: float
    optimizer: float
    far_rows: float
    far_step: float
    overhead: float

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return sum(asdict(self).values())

    @property
    def bound(self) -> str:
        """The largest part."""
        parts = asdict(self)
        return max(parts, key=lambda part: parts[part])


@dataclass(frozen=True)
class Work:
    """What one rank does in a step.

    Attributes:
        times: of its step.
        wire_s: seconds of the exchange if nothing hid it.
        hbm_s: seconds of reading and writing expert rows.
        hbm_bytes: of activations, expert rows, gradients that are added and the optimizer.
        activation_bytes: those of activations alone.
        far: what tables cost that lie elsewhere; None where none does.
    """

    times: StepTime
    wire_s: float
    hbm_s: float
    hbm_bytes: float
    activation_bytes: float
    far: Far | None = None


@dataclass(frozen=True)
class Far:
    """What a step of a rank's far tables costs.

    Attributes:
        hit_rate: share of a pass's distinct rows that the cache has.
        fetch: seconds in which rows come near, both ways of it.
        step_s: seconds of their updates, what is hidden included.
        read, written: bytes of rows and states where they lie, for passes and updates.
    """

    hit_rate: float
    fetch: Fetch
    step_s: float
    read: float
    written: float


def work(
    layout: Layout,
    stage: int,
    memory: PeakMemory,
    counts: Counts,
    vocab_size: int,
    itemsize: int,
    hardware: Hardware,
    hits: float | None = None,
    skew: Skew = EVEN,
) -> Work:
    """The work of one rank of a stage; arguments as in :func:`peer_dist.planning.peak_memory.memory`."""
    place, passes = Place(stage), layout.passes
    one = _pass(layout, stage, counts, itemsize, hardware, hits, skew)
    traffic = step_traffic(layout, place, vocab_size, itemsize, hits)
    sent = {name: wire.seconds(hardware) for name, wire in traffic.items()}
    stream = hardware.hbm_bytes_per_s * hardware.achievable.hbm
    moved = moved_activations(layout, stage, vocab_size, itemsize, hardware.device)
    activations = moved / (hardware.activation_bytes_per_s or stream)
    tensor = sent["tensor"] + sent["statistics"]
    overhead = sum(map(len, layout.layers(stage))) * passes * hardware.layer_overhead_s
    all_passes = passes * (one.matmul + activations + one.experts + one.exposed) + tensor + overhead
    added, updated = 3 * (passes - 1) * memory.gradients, optimizer_bytes(layout, place, memory, skew)
    far, far_step = _far(layout, place, hardware, skew, one.matmul / 3 + 2 / 5 * activations)
    times = StepTime(
        matmul=passes * one.matmul,
        activations=passes * activations,
        experts=passes * one.experts,
        exchange=passes * one.exposed,
        tensor=tensor,
        pipeline=sent["pipeline"],
        bubble=all_passes / passes * (layout.pipeline - 1) / layout.virtual,
        gradients=sent["gradients"],
        tables=sent["tables"],
        accumulation=added / stream,
        optimizer=updated / stream,
        far_rows=far.fetch.taken if far else 0.0,
        far_step=far_step,
        overhead=overhead + hardware.step_overhead_s,
    )
    return Work(
        times=times,
        wire_s=passes * one.wire,
        hbm_s=passes * one.row_bytes / _gather_rate(hardware),
        hbm_bytes=passes * (one.row_bytes + moved) + added + updated,
        activation_bytes=passes * moved,
        far=far,
    )


def _far(layout: Layout, place: Place, hardware: Hardware, skew: Skew, forward: float) -> tuple[Far | None, float]:
    """What far tables cost a rank, and how long its next forward pass, of ``forward`` seconds, waits for their step."""
    pools = far_pools(layout, place)
    if not pools:
        return None, 0.0
    order = [layer for chunk in layout.layers(place.stage) for layer in chunk]
    again = {layer for chunk in layout.layers(place.stage) for layer in chunk[: layout.config.train.recompute_layers]}
    fetch, steps = Fetch(0.0, 0.0, 0.0), []
    picked, missed, read, written, step_s = 0.0, 0.0, 0.0, 0.0, 0.0
    for pool in pools:
        rows = pool.in_pass(layout, skew)
        times = layout.passes * sum(2 if layer in again else 1 for layer in pool.layers)
        fetch += fetched(pool, rows.missed, hardware) * times
        step = stepped(pool, pool.in_step(layout, skew).missed, hardware)
        before = forward * order.index(pool.layers[0]) / len(order)
        steps.append((step.seconds, before))
        picked, missed = picked + times * rows.rows, missed + times * rows.missed
        step_s += step.seconds
        read += times * rows.missed * pool.row_bytes + step.size
        written += step.size
    hidden = hardware.device == "cuda" or pools[0].tables.memory == "disk"
    waited = exposed(steps) if hidden else step_s
    return Far(1 - missed / picked if picked else 1.0, fetch, step_s, read, written), waited


@dataclass
class _Pass:
    """Seconds of one forward and backward pass through a stage, recomputation included, and bytes of expert rows.

    Attributes:
        exposed: of the exchange (``wire``), what does not hide behind the experts.
    """

    matmul: float = 0.0
    experts: float = 0.0
    exposed: float = 0.0
    wire: float = 0.0
    row_bytes: float = 0.0


def _pass(
    layout: Layout,
    stage: int,
    counts: Counts,
    itemsize: int,
    hardware: Hardware,
    hits: float | None,
    skew: Skew,
) -> _Pass:
    rate, gather = hardware.flops(itemsize) * hardware.achievable.flops, _gather_rate(hardware)
    one = _Pass()
    for (kind, forwards), number in layout.kinds(stage).items():
        products, picked = _flops(layout, kind, counts)
        one.matmul += number * (forwards + 2) * products / rate
        forward, backward = row_bytes(layout, kind, itemsize, hardware.device, hits, skew)
        there, back = (wire.seconds(hardware) for wire in exchange(layout, kind, itemsize, hits))
        for times, size, flops, sent in ((forwards, forward, picked, there), (1, backward, 2 * picked, back)):
            busy = max(size / gather, flops / rate)
            one.experts += number * times * busy
            one.exposed += number * times * (sent - _hidden(layout, kind, sent, busy))
            one.wire += number * times * sent
            one.row_bytes += number * times * size
    if stage == layout.pipeline - 1:
        one.matmul += 3 * layout.tokens / layout.tensor * counts.outside["logits"].flops / rate
    return one


def _gather_rate(hardware: Hardware) -> float:
    """Bytes of expert rows read per second."""
    return hardware.gather_bytes_per_s * hardware.achievable.gather


def _flops(layout: Layout, kind: str, counts: Counts) -> tuple[float, float]:
    """FLOPs of one rank's forward pass through a layer: matrix products, and those of tables' rows."""
    parts = next(layer for layer in counts.layers if layer.kind == kind)
    picked = 0
    if KINDS[kind].tables(layout.config):
        picked = sum(cost.flops for name, cost in parts.feed_forward.items() if name in SHARDED_PARTS)
    products = total(parts.block).flops + total(parts.feed_forward).flops - picked
    tokens = layout.tokens / layout.tensor  # split over tensor ranks by heads and widths, or by tokens
    return tokens * products, tokens * picked


def row_bytes(
    layout: Layout, kind: str, itemsize: int, device: str, hits: float | None, skew: Skew
) -> tuple[float, float]:
    """Bytes that a rank's experts or values read and write in one pass, forward and backward.

    Forward, the picked rows of each table, the tokens that came and what leaves; backward the same, and the rows'
    gradients, all of them if they are dense. A GPU reads each distinct row once; a CPU's cache is small, and it reads a
    row for every pick, and in the backward pass once more to make its gradient.
    """
    config = layout.config
    tables = KINDS[kind].tables(config)
    if not tables:
        return 0.0, 0.0
    row = config.model.hidden_size / layout.columns * len(tables.names) * tables.itemsize
    picks = layout.own_tokens * tables.picks * layout.rows * layout.columns / layout.rows
    own = tables.rows / layout.rows
    touched_rows = distinct(math.ceil(own), picks, exponent=skew.exponent).rows
    read = (picks if device == "cpu" else touched_rows) * row
    passing = routes(layout, tables, hits).pairs * config.model.hidden_size * itemsize
    gradient = row * tables.gradient_itemsize / tables.itemsize
    written = (touched_rows if config.table_optimizer.lazy else touched_rows + own) * gradient
    return read + 2 * passing, read * (2 if device == "cpu" else 1) + written + 3 * passing


def _hidden(layout: Layout, kind: str, sent: float, busy: float) -> float:
    """Seconds of the exchange behind the experts."""
    tables = KINDS[kind].tables(layout.config)
    return min(sent, busy) * (1 - 1 / (tables.chunks if tables else 1))


def optimizer_bytes(layout: Layout, place: Place, memory: PeakMemory, skew: Skew = EVEN) -> float:
    """Read and written by a step near the kernels; the dense part's weights are counted with the tables'. Of far
    tables it is what the cache has.
    """
    everything = 2 * (memory.optimizer + memory.host) + 2 * memory.gradients + memory.weights
    for pool in far_pools(layout, place):
        rows = pool.in_step(layout, skew)
        everything += (rows.rows - rows.missed) * (pool.row_bytes + 2 * pool.state_bytes)
    if not layout.config.table_optimizer.lazy:
        return everything
    blocks = [block for owned in shards(layout, place).values() for block in owned if block.table_rows]
    return everything - sum(_untouched(layout, block, skew) for block in blocks if not block.far)


def _untouched(layout: Layout, block: Block, skew: Skew) -> float:
    """Bytes of a table's weights and states that a lazy step leaves alone."""
    table = layout.config.table_optimizer
    numbers, master = table.moments[0], table.keeps_masters(block.itemsize)
    share = 1 - touched(layout, block, skew=skew)
    return share * block.size * (block.itemsize + 2 * FLOAT * (numbers + master))
