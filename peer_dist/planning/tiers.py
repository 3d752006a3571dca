"""Tables whose rows lie in host memory or on disk: what they take in each memory, and what bringing rows near costs.

Near the kernels there are a cache of hot rows with the states of their optimizer, and an arena of the other rows that
passes under way have picked: fetched in the forward pass, found again in the backward pass. The step of an optimizer
happens where a row is. Numbers that a row has one of (scales, row-wise moments) are in host memory where tables are on
a disk. The model leaves out the rows that enter and leave the cache.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from peer_dist.config import ConfigError
from peer_dist.kinds import KINDS, Tables
from peer_dist.kinds.cost import FLOAT
from peer_dist.planning.hardware import Hardware
from peer_dist.planning.hit_rate import Distinct, Skew
from peer_dist.planning.layout import Layout, Place
from peer_dist.planning.state import part_of

_ROW_NUMBER = 8  # bytes, of a gradient's row
_OF_ROW, _OF_PLACE = 8, 9  # bytes that the cache keeps of each row of a table, and of each row that it holds
_ROOM = 1.25  # of the buffer of staged rows, over what there was at the most


@dataclass(frozen=True)
class Pool:
    """A rank's part of the tables of one layer, or of several that share them, which lie far from the kernels.

    Attributes:
        layers: from 0, those that pick from it.
        rows, columns: of this rank's part of each table.
        cached: rows that the cache holds.
    """

    tables: Tables
    layers: Sequence[int]
    rows: int
    columns: int
    cached: int
    moments: tuple[int, int]
    masters: bool

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of all tables, with its scales: what is fetched."""
        return len(self.tables.names) * (self.columns * self.tables.itemsize + self.tables.scale_size)

    @property
    def state_bytes(self) -> int:
        """Bytes of its moments and masters."""
        whole, one = self.moments
        return len(self.tables.names) * FLOAT * ((whole + self.masters) * self.columns + one)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of its gradient."""
        return len(self.tables.names) * (self.columns * self.tables.gradient_itemsize + _ROW_NUMBER)

    @property
    def cached_bytes(self) -> int:
        """Bytes of a row with its states, as the cache has it."""
        return self.row_bytes + self.state_bytes

    @property
    def bytes(self) -> int:
        """Bytes of all rows and their states."""
        return self.rows * self.cached_bytes

    @property
    def disk_bytes(self) -> int:
        """Those of them that are on a disk."""
        if self.tables.memory != "disk":
            return 0
        ones = FLOAT * self.moments[1] + self.tables.scale_size
        return self.bytes - self.rows * len(self.tables.names) * ones

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache: rows are in it with their states, beside where each row of the table is and its count."""
        return self.cached * (self.row_bytes + self.state_bytes + _OF_PLACE) + (
            self.rows * _OF_ROW if self.cached else 0
        )

    def runs(self, rows: float) -> float:
        """Requests for so many rows of a table, drawn evenly: neighbours are read and written together."""
        return rows * (1 - min(1.0, rows / self.rows))

    def in_pass(self, layout: Layout, skew: Skew) -> Distinct:
        """Distinct rows that one layer picks in a pass."""
        return skew.distinct(self.rows, layout.own_tokens * self.tables.picks * layout.columns, self.cached)

    def in_step(self, layout: Layout, skew: Skew) -> Distinct:
        """Distinct rows whose gradients a step brings, those of the copies' tokens too."""
        times = layout.passes * len(self.layers) * layout.copies
        return skew.distinct(self.rows, times * layout.own_tokens * self.tables.picks * layout.columns, self.cached)

    def staged_bytes(self, layout: Layout, stage: int, skew: Skew) -> float:
        """Bytes of the arena: the rows that passes in flight have picked. The first passes find the cache empty."""
        picked = self.in_pass(layout, skew).rows
        chunks = [chunk[layout.config.train.recompute_layers :] for chunk in layout.layers(stage)]
        kept = sum(layer in chunk for chunk in chunks for layer in self.layers)
        # a layer that is recomputed keeps nothing, but while its backward pass runs
        rows = picked * max(1, kept * layout.in_flight(stage) / layout.virtual)
        return max(min(_ROOM * rows, self.rows), rows) * self.row_bytes


def far_pools(layout: Layout, place: Place) -> list[Pool]:
    """A rank's far tables, in the order of their first layers; pools of one kind share its cache evenly."""
    config, kinds = layout.config, layout.config.model.mlp_kinds
    own = {layer for chunk in layout.layers(place.stage) for layer in chunk}
    here = [layers for layers in config.pools if layers[0] in own]
    number = Counter(kinds[layers[0]] for layers in here)
    pools = []
    for layers in here:
        tables = KINDS[kinds[layers[0]]].tables(config)
        if tables is None or not tables.far:
            continue
        rows = part_of(tables.rows, place.row, layout.rows)
        columns = part_of(config.model.hidden_size, place.column, layout.columns)
        table = config.table_optimizer
        pool = Pool(tables, layers, rows, columns, 0, table.moments, table.keeps_masters(tables.itemsize))
        share = tables.cache_bytes // number[kinds[layers[0]]]
        pools.append(replace(pool, cached=min(rows, share // pool.cached_bytes)))
    return pools


@dataclass(frozen=True)
class Fetch:
    """Seconds in which rows come near.

    Attributes:
        direct: kernels read them over the bus.
        copied: the host gathers them in a buffer, which is then copied over the bus.
        taken: by the ways that the config names.
    """

    direct: float
    copied: float
    taken: float

    @property
    def fastest(self) -> str:
        """The way that takes less time."""
        return "direct" if self.direct <= self.copied else "copied"

    def __add__(self, other: Fetch) -> Fetch:
        return Fetch(self.direct + other.direct, self.copied + other.copied, self.taken + other.taken)

    def __mul__(self, times: float) -> Fetch:
        return Fetch(self.direct * times, self.copied * times, self.taken * times)


def fetched(pool: Pool, rows: float, hardware: Hardware) -> Fetch:
    """How long it takes until so many of its rows, on average, are near."""
    size = rows * pool.row_bytes
    on_gpu = hardware.device == "cuda"
    bus = size / _rate(hardware, "bus") if on_gpu else 0.0
    if pool.tables.memory == "disk":
        seconds = _disk_seconds(hardware, "read", pool.runs(rows) * len(pool.tables.names), size) + bus
        return Fetch(seconds, seconds, seconds)
    gathered = 2 * size / _rate(hardware, "host")  # read and written
    if not on_gpu:
        return Fetch(gathered, gathered, gathered)
    direct, copied = size / _rate(hardware, "bus_gather"), gathered + bus
    return Fetch(direct, copied, direct if pool.tables.fetch == "direct" else copied)


@dataclass(frozen=True)
class FarStep:
    """What stepping rows costs where they lie.

    Attributes:
        seconds: of it, nothing hidden.
        size: bytes of rows and states that are read there for it, and as many are written.
    """

    seconds: float
    size: float


def stepped(pool: Pool, rows: float, hardware: Hardware) -> FarStep:
    """How so many of its rows are updated, on average."""
    gradients, size = rows * pool.gradient_bytes, rows * pool.cached_bytes
    over = gradients / _rate(hardware, "bus") if hardware.device == "cuda" else 0.0
    computed = (2 * size + gradients) / _rate(hardware, "host")
    if pool.tables.memory == "host":
        return FarStep(over + computed, size)
    requests = pool.runs(rows) * len(pool.tables.names) * (1 + pool.moments[0] + pool.masters)
    disk = _disk_seconds(hardware, "read", requests, size) + _disk_seconds(hardware, "write", requests, size)
    return FarStep(over + computed + disk, size)


def exposed(steps: Sequence[tuple[float, float]]) -> float:
    """Seconds for which the next forward pass waits for steps that one worker makes in the order of the layers.

    Args:
        steps: of each pool the seconds of its step, and the seconds of the forward pass before its first layer.
    """
    done, waited = 0.0, 0.0
    for seconds, before in steps:
        done += seconds
        waited = max(waited, done - before)
    return waited


def _disk_seconds(hardware: Hardware, way: str, requests: float, size: float) -> float:
    return max(requests / _rate(hardware, f"disk_{way}"), size / _rate(hardware, "disk"))


def _rate(hardware: Hardware, name: str) -> float:
    """Bytes a second of ``bus``, ``bus_gather``, ``host`` and ``disk``; requests a second of ``disk_read``,
    ``disk_write``.
    """
    reached, figures = hardware.achievable, hardware
    rate, key, share = {
        "bus": (figures.bus_bytes_per_s, "bus_bytes_per_s", reached.bus),
        "bus_gather": (figures.bus_gather_bytes_per_s, "bus_gather_bytes_per_s", reached.bus),
        "host": (figures.host_bytes_per_s, "host_bytes_per_s", reached.host),
        "disk": (figures.disk_bytes_per_s, "disk_bytes_per_s", reached.disk),
        "disk_read": (figures.disk_reads_per_s, "disk_reads_per_s", reached.disk),
        "disk_write": (figures.disk_writes_per_s, "disk_writes_per_s", reached.disk),
    }[name]
    if rate is None:
        raise ConfigError(
            f"--gpu: {hardware.name} has no {key}, which plans of peer.table_memory host and disk need; add it to its "
            "file, or measure it with peer-dist doctor --calibrate"
        )
    return rate * share
