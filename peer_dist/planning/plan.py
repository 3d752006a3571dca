"""What a run will need before anything is rented: parameters, memory, bytes on the wire, time, money."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from rich.table import Table

from peer_dist.config import Config, ConfigError, check_world, parse_config
from peer_dist.kinds import Kind
from peer_dist.kinds.cost import SHARDED_PARTS, Cost
from peer_dist.planning.counts import Counts, count
from peer_dist.planning.hardware import Hardware
from peer_dist.planning.hit_rate import EVEN, Skew
from peer_dist.planning.layout import Layout, Place, check_vocabulary
from peer_dist.planning.peak_memory import PeakMemory, memory
from peer_dist.planning.tiers import far_pools
from peer_dist.planning.timing import StepTime, Work, work
from peer_dist.planning.traffic import Wire, step_traffic
from peer_dist.units import short


@dataclass(frozen=True)
class Need:
    """Bytes of one memory, ``device``, ``host`` or ``disk``, that a rank takes, and those that it may."""

    memory: str
    taken: float
    there: float

    @property
    def met(self) -> bool:
        """Whether there are enough."""
        return self.taken <= self.there


@dataclass(frozen=True)
class Plan:
    """A config on machines. Time is worked out when it is first asked for.

    Attributes:
        layout: one that was checked.
        vocab_size: rows of the embedding, padding included.
        counts: of the model, the same in all layouts.
        hits: mean number of distinct row shards that a token hits; None: that of uniform picks.
        skew: of picks, by which rows that lie elsewhere are in the cache.
        tokens: to train on.
        price_per_hour: of a device; None if it is not known.
    """

    layout: Layout
    hardware: Hardware
    vocab_size: int
    counts: Counts
    hits: float | None
    tokens: int
    price_per_hour: float | None
    skew: Skew = EVEN

    @property
    def itemsize(self) -> int:
        """Bytes of an activation and of a dense parameter."""
        precision = self.layout.config.train.precision
        if precision == "auto":
            return 2 if self.hardware.device == "cuda" else 4
        return 2 if precision == "bf16" else 4

    @cached_property
    def _held(self) -> dict[Place, PeakMemory]:
        """Memory of the ranks with the largest shards (the first ones), one for each different kind of stage."""
        config, stages = self.layout.config, dict[Any, int]()
        firsts, kinds_of = {pool[0] for pool in config.pools}, config.model.mlp_kinds
        for stage in range(self.layout.pipeline):
            kinds = [[(kinds_of[n], n in firsts) for n in chunk] for chunk in self.layout.layers(stage)]
            stages.setdefault((str(kinds), stage == 0, stage == self.layout.pipeline - 1), stage)
        places = [Place(stage) for stage in stages.values()]
        arguments = self.vocab_size, self.itemsize, self.hardware.device, self.hits, self.skew
        return {place: memory(self.layout, place, *arguments) for place in places}

    @cached_property
    def place(self) -> Place:
        """The rank that needs the most memory."""
        return max(self._held, key=lambda place: self._held[place].peak)

    @property
    def memory(self) -> PeakMemory:
        """Memory of the rank that needs the most."""
        return self._held[self.place]

    @cached_property
    def wires(self) -> Mapping[str, Wire]:
        """What that rank sends in a step, by purpose."""
        return step_traffic(self.layout, self.place, self.vocab_size, self.itemsize, self.hits)

    @cached_property
    def work(self) -> Work:
        """Work of the stage that the others wait for."""
        arguments = self.counts, self.vocab_size, self.itemsize, self.hardware, self.hits, self.skew
        works = (work(self.layout, p.stage, held, *arguments) for p, held in self._held.items())
        return max(works, key=lambda stage: stage.times.total)

    @property
    def times(self) -> StepTime:
        """Seconds of a step, of the stage that the others wait for."""
        return self.work.times

    @cached_property
    def needs(self) -> list[Need]:
        """Of each memory the most that a rank needs: the ``device``'s, and of ``host`` and ``disk`` where it uses them
        and the hardware has figures. Ranks of a node share its host memory and its disk; stages need different parts,
        and the largest stands for all.
        """
        held, hardware = self._held.values(), self.hardware
        needs = [Need("device", self.memory.peak, hardware.memory)]
        host = max(each.host + each.tables_host for each in held) if hardware.device == "cuda" else 0
        for name, taken, there in (
            ("host", host, hardware.host_memory_bytes),
            ("disk", max(each.tables_disk for each in held), hardware.disk_bytes),
        ):
            if taken and there:
                needs.append(Need(name, taken, there * hardware.achievable.memory))
        return needs

    @property
    def fits(self) -> bool:
        """Whether the ranks that need most of each memory have it."""
        return all(need.met for need in self.needs)

    @property
    def far(self) -> list[Kind]:
        """The kinds of layers whose tables lie in host memory or on disk."""
        config = self.layout.config
        return [kind for kind in config.kinds if (tables := kind.tables(config)) is not None and tables.far]

    def with_cache(self, gigabytes: float) -> Plan:
        """The same plan with so large a cache for rows of far tables, of each kind as much."""
        return self._with({kind: {"table_cache_gb": gigabytes / len(self.far)} for kind in self.far})

    def with_fastest_fetch(self) -> Plan:
        """The same plan, whose rows in host memory come to the GPU in the way that takes less time."""
        far = self.work.far
        if far is None or far.fetch.direct == far.fetch.copied:
            return self
        kinds = [kind for kind in self.far if kind.keys(self.layout.config).table_memory == "host"]
        return self._with({kind: {"table_fetch": far.fetch.fastest} for kind in kinds})

    def _with(self, changes: Mapping[Kind, dict[str, Any]]) -> Plan:
        """The same plan with some keys of some kinds changed."""
        tree = self.layout.config.model_dump(mode="json", exclude_defaults=True)
        for kind, keys in changes.items():
            tree[kind.section_name] = {**tree.get(kind.section_name, {}), **keys}
        return replace(self, layout=replace(self.layout, config=parse_config(tree, "plan"))) if changes else self

    @cached_property
    def recommended_cache(self) -> float:
        """GB of the largest cache that fits the device beside the rest, or that has all rows; 0 where nothing fits."""
        size = 0.0
        for _ in range(2):  # a first size, and what is left beside what the cache remembers of it
            cached = self.with_cache(size)
            pools = far_pools(cached.layout, cached.place)
            kept = sum(pool.cached * pool.cached_bytes for pool in pools)
            free = self.hardware.memory - (cached.memory.peak - kept)
            everything = sum(pool.rows * pool.cached_bytes for pool in pools)
            size = min(max(0.0, math.floor(10 * free / 1e9) / 10), math.ceil(10 * everything / 1e9) / 10)
        return size

    @property
    def tokens_per_step(self) -> int:
        """Tokens of the global batch."""
        return self.layout.config.train.global_batch_size * self.layout.config.model.seq_length

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all ranks per second."""
        return self.tokens_per_step / self.times.total

    @property
    def mfu(self) -> float:
        """Training FLOPs (three times the forward ones) over the devices' figure."""
        flops = self.counts.train_flops_per_token * self.tokens_per_second / self.layout.world_size
        return flops / self.hardware.flops(self.itemsize)

    @property
    def hbm_share(self) -> float:
        """Bytes of :attr:`Work.hbm_bytes` over what the device could move in the time."""
        return self.work.hbm_bytes / self.times.total / self.hardware.hbm_bytes_per_s

    @property
    def days(self) -> float:
        """Days of training, without restarts, validation and checkpoints."""
        return self.tokens / self.tokens_per_second / 86400

    @property
    def cost(self) -> float | None:
        """Price of the whole training; None without a price per hour."""
        return None if self.price_per_hour is None else self.days * 24 * self.layout.world_size * self.price_per_hour

    @property
    def expert_parameters(self) -> Cost:
        """Tables of experts and values, and coarse experts."""
        return sum((cost for name, cost in self.counts.parts.items() if name in SHARDED_PARTS), Cost())

    def values(self) -> dict[str, Any]:
        """All figures as plain data: bytes, seconds, FLOPs."""
        config, layout = self.layout.config, self.layout
        whole, experts = self.counts.total, self.expert_parameters
        return {
            "hardware": self.hardware.name,
            "layout": {
                "world_size": layout.world_size,
                "gpus_per_node": layout.gpus_per_node,
                **config.parallel.model_dump(),
                "expert": layout.rows,
                "data": layout.data,
                "expert_copies": layout.copies,
                "zero": config.zero.stage,
                "micro_batch_size": config.train.micro_batch_size,
                "passes": layout.passes,
                "recompute_layers": config.train.recompute_layers,
            },
            "parameters": {
                "all": whole.parameters,
                "dense": whole.parameters - experts.parameters,
                "expert": experts.parameters,
                "active": whole.active,
            },
            "flops_per_token": {"forward": whole.flops, "training": self.counts.train_flops_per_token},
            "memory": {**asdict(self.memory), "available": self.hardware.memory, "fits": self.fits},
            "memories": {need.memory: {"taken": need.taken, "available": need.there} for need in self.needs},
            "far_tables": self._far_values(),
            "rank": asdict(self.place),
            "sent_per_step": {name: {"node": wire.node, "network": wire.network} for name, wire in self.wires.items()},
            "seconds": {**asdict(self.times), "step": self.times.total},
            "bound": self.times.bound,
            "exchange_seconds": self.work.wire_s,
            "expert_rows_seconds": self.work.hbm_s,
            "tokens_per_second": self.tokens_per_second,
            "mfu": self.mfu,
            "memory_bandwidth_share": self.hbm_share,
            "tokens": self.tokens,
            "days": self.days,
            "cost": self.cost,
        }

    @property
    def far_bytes_per_token(self) -> tuple[float, float]:
        """Bytes of far tables that are read and written for a token of the global batch, by all ranks of a stage."""
        far, ranks = self.work.far, self.layout.stage_ranks
        if far is None:
            return 0.0, 0.0
        return far.read * ranks / self.tokens_per_step, far.written * ranks / self.tokens_per_step

    @cached_property
    def far_memories(self) -> list[str]:
        """Where tables lie that are not on the device: ``host``, ``disk``."""
        return sorted({str(pool.tables.memory) for place in self._held for pool in far_pools(self.layout, place)})[::-1]

    def _far_values(self) -> dict[str, Any] | None:
        """Of tables that lie elsewhere; None where none do."""
        far = self.work.far
        if far is None:
            return None
        read, written = self.far_bytes_per_token
        return {
            "memories": self.far_memories,
            "hit_rate": far.hit_rate,
            "read_bytes_per_token": read,
            "written_bytes_per_token": written,
            "fetch_seconds": {"direct": far.fetch.direct, "copied": far.fetch.copied},
            "fastest_fetch": far.fetch.fastest,
            "step_seconds": far.step_s,
            "recommended_cache_gb": self.recommended_cache,
        }

    def _far_table(self) -> list[Table]:
        """For a terminal, where tables lie elsewhere."""
        far, held = self.work.far, self.memory
        if far is None:
            return []
        taken = {need.memory: f"{need.taken / 1e9:.2f} of {need.there / 1e9:.2f} GB" for need in self.needs}
        keys = [f"{kind.key('table_cache_gb')}={self.recommended_cache / len(self.far):g}" for kind in self.far]
        fits = "fits" if len(keys) == 1 else "fit"
        near = f"{1e3 * far.fetch.taken:.1f}"
        if far.fetch.direct != far.fetch.copied:
            ways = f"read by kernels {1e3 * far.fetch.direct:.1f}, gathered by the host {1e3 * far.fetch.copied:.1f}"
            near += f" ({ways})"
            faster, config = self.with_fastest_fetch(), self.layout.config
            changed = [kind for kind in self.far if kind.keys(faster.layout.config) != kind.keys(config)]
            if changed:
                faster_by = " and ".join(f"{kind.key('table_fetch')}={far.fetch.fastest}" for kind in changed)
                near += f"; {faster_by} is faster"
        names = {"host": "host memory", "disk": "scratch files"}
        on_disk = taken.get("disk", f"{held.tables_disk / 1e9:.2f} GB")
        return [
            _table(
                f"tables in {' and '.join(names[memory] for memory in self.far_memories)}",
                ("host memory", taken.get("host", f"{(held.tables_host + held.host) / 1e9:.2f} GB")),
                *([("scratch files", on_disk)] if held.tables_disk else []),
                ("cache", f"{held.cache / 1e9:.2f} GB; {' and '.join(keys)} {fits} beside the rest"),
                ("distinct rows of a pass in it", f"{far.hit_rate:.1%}"),
                ("bytes per token", "{:,.0f} read, {:,.0f} written".format(*self.far_bytes_per_token)),
                ("rows come near, ms a step", near),
                ("their update, ms", f"{1e3 * far.step_s:.1f}; waited for: {1e3 * self.times.far_step:.1f}"),
            )
        ]

    def tables(self) -> list[Table]:
        """For a terminal."""
        layout, whole, experts = self.layout, self.counts.total, self.expert_parameters
        grid = f"{layout.rows} x {layout.columns}, {layout.copies} copies"
        overview = _table(
            f"{layout.world_size} x {self.hardware.name}, {layout.gpus_per_node} a node",
            ("tensor x pipeline x data", f"{layout.tensor} x {layout.pipeline} x {layout.data}"),
            ("expert rows x columns", grid),
            ("ZeRO, micro-batch, passes", _options(layout)),
            (
                "parameters",
                f"{short(whole.parameters)}: {short(whole.parameters - experts.parameters)} dense, "
                f"{short(experts.parameters)} in experts; {short(whole.active)} active per token",
            ),
            ("training FLOPs per token", short(self.counts.train_flops_per_token)),
        )
        held = self.memory
        parts = ("weights", "gradients", "optimizer", "activations", "exchange", "temporaries", "reduction", "step")
        used = _table(
            f"memory of a rank, GB (stage {self.place.stage})",
            *((part, f"{getattr(held, part) / 1e9:.2f}") for part in parts),
            *([("rows near, cached and staged", f"{(held.cache + held.staged) / 1e9:.2f}")] if self.far else []),
            ("peak", f"{held.peak / 1e9:.2f} of {self.hardware.memory / 1e9:.2f}"),
            *([("in host memory", f"{held.host / 1e9:.2f}")] if held.host and not self.far else []),
        )
        sent = _table(
            "a rank sends a step, GB",
            ("", "inside a node  between nodes"),
            *(
                (name, f"{wire.node / 1e9:>13.3f}  {wire.network / 1e9:>13.3f}")
                for name, wire in self.wires.items()
                if wire.total
            ),
        )
        times = {name: seconds for name, seconds in asdict(self.times).items() if seconds}
        spent = _table(
            "a step, ms",
            *((name, f"{1e3 * seconds:.1f}") for name, seconds in times.items()),
            ("in all", f"{1e3 * self.times.total:.1f}, most of it {self.times.bound}"),
            (
                "exchange beside expert rows",
                f"{1e3 * self.work.wire_s:.1f} on the wire, {1e3 * self.work.hbm_s:.1f} in memory",
            ),
        )
        cost = "" if self.cost is None else f", cost {self.cost:,.0f}"
        result = _table(
            f"{short(self.tokens)} tokens",
            ("tokens/s", f"{self.tokens_per_second:,.0f}"),
            ("MFU", f"{self.mfu:.1%}"),
            ("share of memory bandwidth", f"{self.hbm_share:.1%}"),
            ("time", f"{self.days:.2f} days{cost}"),
        )
        return [overview, used, *self._far_table(), sent, spent, result]


def plan(
    config: Config,
    world_size: int,
    gpus_per_node: int,
    hardware: Hardware,
    vocab_size: int,
    hits: float | None = None,
    tokens: int | None = None,
    price_per_hour: float | None = None,
    skew: Skew = EVEN,
) -> Plan:
    """The config's own layout on ``world_size`` devices.

    Args:
        vocab_size: rows of the embedding, padding included.
        hits: mean number of distinct row shards that a token hits; None: that of uniform picks.
        tokens: to train on; None: those of the config's steps.
        price_per_hour: of a device; None: the hardware's.
        skew: of picks.

    Raises:
        ConfigError: the layout does not divide the world, or has not so many row shards to be hit.
    """
    check_world(config, world_size)
    check_vocabulary(config, vocab_size)
    rows = config.parallel.expert_rows(world_size)
    if hits is not None and hits > rows:
        raise ConfigError(f"--hits {hits:g}: the tables have {rows} row shard(s), of which a token hits 1 to {rows}")
    return unchecked(config, world_size, gpus_per_node, hardware, vocab_size, hits, tokens, price_per_hour, skew)


def unchecked(
    config: Config,
    world_size: int,
    gpus_per_node: int,
    hardware: Hardware,
    vocab_size: int,
    hits: float | None = None,
    tokens: int | None = None,
    price_per_hour: float | None = None,
    skew: Skew = EVEN,
) -> Plan:
    """:func:`plan` of a layout that need not divide the world: to search others from."""
    train = config.train
    return Plan(
        Layout(config, world_size, gpus_per_node),
        hardware,
        vocab_size,
        count(config, vocab_size),
        hits,
        train.steps * train.global_batch_size * config.model.seq_length if tokens is None else tokens,
        hardware.price_per_hour if price_per_hour is None else price_per_hour,
        skew,
    )


def _options(layout: Layout) -> str:
    train = layout.config.train
    again = f", {train.recompute_layers} layers recomputed" if train.recompute_layers else ""
    return f"{layout.config.zero.stage}, {train.micro_batch_size}, {layout.passes}{again}"


def _table(title: str, *rows: tuple[str, str]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    for row in rows:
        table.add_row(*row)
    return table
