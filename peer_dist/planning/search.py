"""The best layout of a config on given machines, by the planner's arithmetic, and what helps one that does not fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from rich.table import Table

from peer_dist.config import ConfigError, check_world, parse_config
from peer_dist.config.load import divisors
from peer_dist.planning.layout import Layout
from peer_dist.planning.plan import Need, Plan

SHOWN = 12
"""Layouts of a search that are shown."""

MEMORIES = ("device", "host", "disk")
"""Where tables may lie, the fastest first."""

Changes = dict[str, dict[str, Any]]


def search(own: Plan) -> list[Plan]:
    """All layouts of a plan's config on its machines, those that fit first, fastest first.

    Tried are tensor ranks inside a node (with sequence parallelism), pipeline stages, grids of the tables whose columns
    stay inside a node, ZeRO 0, 1 and 3 (2 saves nothing over 1 here: gradients are whole until the passes are over),
    recomputation of none and of all layers, and of the micro-batches that are powers of two those that fit: all of them
    in a pipeline, which they fill, else the largest. The global batch is the config's. Tables stay where the config has
    them; if nothing fits and their optimizer is lazy, host memory and then disks are tried. A cache of rows takes what
    is left of the device, and rows in host memory come near in the way that takes less time.

    Args:
        own: from :func:`peer_dist.planning.plan.unchecked`; it is one of them where its layout divides the world.

    Raises:
        ConfigError: there is no layout that does.
    """
    plans = _layouts(own)
    for memory in _further(own):
        if any(plan.fits for plan in plans):
            break
        moved = _changed(own, memory)
        plans += [] if moved is None else _layouts(moved)
    if not plans:
        raise ConfigError(
            f"--search: no layout of this model divides {own.layout.world_size} device(s) and train.global_batch_size "
            f"({own.layout.config.train.global_batch_size}); take another number of either"
        )
    return sorted(plans, key=lambda plan: (not plan.fits, plan.times.total if plan.fits else plan.memory.peak))


def _layouts(own: Plan) -> list[Plan]:
    """All layouts of a plan's config, whose tables stay where they are."""
    mine = _changed(own, {})
    plans = [] if mine is None else [mine]
    for parallel in _parallel(own.layout):
        for stage in (0, 1) if parallel["pipeline"] > 1 else (0, 1, 3):
            layers = own.layout.config.model.num_layers // parallel["pipeline"]
            for recomputed in (0, layers):
                changes = {"parallel": parallel, "zero": {"stage": stage}, "train": {"recompute_layers": recomputed}}
                plans += _batches(own, changes)
    return plans


def _further(own: Plan) -> Iterator[Changes]:
    """Memories beyond the one in which a config has its tables, the nearest first. A table optimizer that is not lazy
    has none: it would train another model.
    """
    config = own.layout.config
    for kind in config.kinds:
        tables = kind.tables(config)
        if (
            tables is not None
            and "table_memory" in type(kind.keys(config)).model_fields
            and config.table_optimizer.lazy
        ):
            for memory in MEMORIES[MEMORIES.index(tables.memory) + 1 :]:
                yield {kind.section_name: {"table_memory": memory}}


def _tuned(plan: Plan | None) -> Plan | None:
    """The plan with the largest cache that fits, and the faster way for rows to come near."""
    return None if plan is None else plan.with_cache(plan.recommended_cache).with_fastest_fetch()


def _parallel(layout: Layout) -> Iterator[dict[str, Any]]:
    """Sections ``parallel`` to try; what a config refuses is left to it."""
    config, world = layout.config, layout.world_size
    sparse = any(kind.sparse for kind in config.kinds)
    tables = any(kind.tables(config) for kind in config.kinds)
    for tensor in _powers(min(128, layout.gpus_per_node, world)):
        for pipeline in divisors(config.model.num_layers):
            if world % (tensor * pipeline):
                continue
            for rows in divisors(world // pipeline) if sparse else [1]:
                for columns in _powers(min(layout.gpus_per_node, world // pipeline // rows)) if tables else [1]:
                    if world // pipeline % (rows * columns):
                        continue
                    yield {
                        "tensor": tensor,
                        "sequence": tensor > 1,
                        "pipeline": pipeline,
                        "virtual_pipeline": 1,
                        "expert": rows,
                        "expert_tensor": columns,
                    }


def _batches(own: Plan, changes: Changes) -> list[Plan]:
    """Those of the micro-batches that fit; the smallest if none does."""
    parallel, batch = changes["parallel"], own.layout.config.train.global_batch_size
    data = own.layout.world_size // (parallel["tensor"] * parallel["pipeline"])
    fitting: list[Plan] = []
    plan: Plan | None = None
    for size in reversed(_powers(batch // data)) if batch >= data else []:
        changes["train"]["micro_batch_size"] = size
        plan = _tuned(_changed(own, changes)) or plan
        if plan is not None and plan.fits:
            fitting.append(plan)
            if parallel["pipeline"] == 1:
                break
    return fitting or ([plan] if plan is not None else [])


def _changed(own: Plan, changes: Changes) -> Plan | None:
    """The plan with some keys changed; None where they cannot be."""
    tree = own.layout.config.model_dump(mode="json", exclude_defaults=True)
    for section, keys in changes.items():
        tree[section] = {**tree.get(section, {}), **keys}
    try:
        config = parse_config(tree, "search")
        check_world(config, own.layout.world_size)
    except ConfigError:
        return None
    return replace(own, layout=replace(own.layout, config=config))


def advice(own: Plan) -> str:
    """What to change in a plan that does not fit: the single keys that suffice, or else what takes most."""
    config, layout, memory = own.layout.config, own.layout, own.memory
    held = " and ".join(_held(need) for need in own.needs if not need.met)
    enough = []
    for changes in _remedies(layout):
        plan = _changed(own, changes)
        if plan is not None and not plan.fits:
            plan = _tuned(plan)
        if plan is not None and plan.fits:
            keys = [
                f"{section}.{key}={_word(value)}" for section, keys in changes.items() for key, value in keys.items()
            ]
            size = f"{plan.memory.peak / 1e9:.1f} GB"
            enough.append(f"{' with '.join(keys)} ({size})")
    if enough:
        return f"does not fit: {held}; enough is one of {', '.join(enough)}"
    parts = ("weights", "gradients", "optimizer", "activations", "exchange", "temporaries")
    if all(need.met for need in own.needs if need.memory == "device"):
        largest = "tables and the states of their optimizer"
    else:
        largest = max(parts, key=lambda part: float(getattr(memory, part)))
    more = "fewer experts" if any(kind.sparse for kind in config.kinds) else "a smaller model"
    return (
        f"does not fit: {held}, most of it {largest}, and no single key is enough; let --search try them together, or "
        f"take more GPUs or {more}"
    )


def _held(need: Need) -> str:
    """What is taken of a memory that does not suffice."""
    where = {"device": "", "host": " of host memory", "disk": " of scratch files"}[need.memory]
    return f"the rank that needs most{where} takes {need.taken / 1e9:.1f} GB of {need.there / 1e9:.1f}"


def _word(value: Any) -> str:
    """A value as the command line takes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _remedies(layout: Layout) -> Iterator[Changes]:
    """Changes of one key each, with the keys that it asks for. Those that train another model come last."""
    config = layout.config
    for rows in divisors(layout.stage_ranks // layout.columns):
        if rows > layout.rows:
            yield {"parallel": {"expert": rows}}
    yield {"table_optimizer": {"name": "rowwise_adagrad"}}
    for stage in range(config.zero.stage + 1, 4):
        yield {"zero": {"stage": stage}}
    yield {"train": {"recompute_layers": config.model.num_layers // (layout.pipeline * layout.virtual)}}
    for size in reversed(_powers(config.train.micro_batch_size - 1)) if config.train.micro_batch_size > 1 else []:
        yield {"train": {"micro_batch_size": size}}
    table = config.table_optimizer
    for kind in config.kinds:
        tables = kind.tables(config)
        if tables is None:
            continue
        lazy: dict[str, Any] = {} if table.lazy else {"lazy": True}
        for memory in MEMORIES[MEMORIES.index(tables.memory) + 1 :]:
            yield {kind.section_name: {"table_memory": memory}} | ({"table_optimizer": lazy} if lazy else {})
        if tables.itemsize > 1:
            rounded = lazy | ({} if table.stochastic_rounding else {"stochastic_rounding": True})
            changes: Changes = {kind.section_name: {"table_dtype": "int8"}}
            yield changes | ({"table_optimizer": rounded} if rounded else {})


def _powers(largest: int) -> list[int]:
    """Powers of two up to it."""
    return [1 << power for power in range(largest.bit_length())]


def search_table(plans: Sequence[Plan]) -> Table:
    """The first of :func:`search`'s plans, and the first whose tables lie otherwise over the nodes than theirs."""
    shown = list(plans[:SHOWN])
    kinds = {_inside(plan) for plan in shown}
    shown += [plan for plan in plans[SHOWN:] if _inside(plan) not in kinds][:1]
    table = Table(title=f"{len(plans)} layouts tried", title_justify="left", box=None)
    far = any(plan.far for plan in shown)
    for name in ("TP x PP x DP", "experts", "copies", "one copy lies", "ZeRO", "micro-batch", "recomputed", "GB",
                 "in node GB", "between GB", "wire ms", "HBM ms", "step ms", "bound", "tokens/s"):  # fmt: skip
        table.add_column(name, justify="right", no_wrap=True)
    for plan in shown:
        layout, config = plan.layout, plan.layout.config
        table.add_row(
            f"{layout.tensor} x {layout.pipeline} x {layout.data}",
            f"{layout.rows} x {layout.columns}",
            str(layout.copies),
            _where(plan, far),
            str(config.zero.stage),
            str(config.train.micro_batch_size),
            str(config.train.recompute_layers),
            f"{plan.memory.peak / 1e9:.1f}{_too_much(plan)}",
            f"{sum(wire.node for wire in plan.wires.values()) / 1e9:.2f}",
            f"{sum(wire.network for wire in plan.wires.values()) / 1e9:.2f}",
            f"{1e3 * plan.work.wire_s:.1f}",
            f"{1e3 * plan.work.hbm_s:.1f}",
            f"{1e3 * plan.times.total:.1f}",
            plan.times.bound,
            f"{plan.tokens_per_second:,.0f}",
        )
    return table


def _too_much(plan: Plan) -> str:
    """Of which memory a plan takes too much, beside the device's peak; nothing if it fits."""
    others = " and ".join(need.memory for need in plan.needs if not need.met and need.memory != "device")
    device = any(not need.met for need in plan.needs if need.memory == "device")
    return (" too much" if device else "") + (f", {others} too much" if others else "")


def _where(plan: Plan, far: bool) -> str:
    """Where one copy of the tables lies; in which memory too, if that of some plans is ``far``."""
    if far:
        return f"{'a node' if _inside(plan) else 'nodes'}, {' and '.join(plan.far_memories) or 'device'}"
    return "inside a node" if _inside(plan) else "across nodes"


def _inside(plan: Plan) -> bool:
    return plan.layout.domain_group.nodes <= 1
