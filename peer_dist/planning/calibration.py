"""``peer-dist doctor --calibrate`` measures the rates of these machines for ``peer-dist plan``.

All ranks measure at the same time, as they will train, and the slowest rank's rate counts, because it sets the pace.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import socket
import statistics
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from peer_dist.config import Config, ConfigError
from peer_dist.config.load import unwritable
from peer_dist.kernels import Picks, expert_mix
from peer_dist.kernels.allocation import host_zeros
from peer_dist.kernels.disk import check_folder, default_folder, disk_rates
from peer_dist.kinds import DENSE, PEER
from peer_dist.kinds.section import LONGEST_NAME
from peer_dist.machine import cpu_name, free_memory, nearest_existing
from peer_dist.mistake import Mistake
from peer_dist.planning.hardware import Hardware, load_hardware
from peer_dist.planning.plan import plan
from peer_dist.planning.rates import copy_seconds, fastest, product_seconds
from peer_dist.ranks.examination import Check, Examination, Finding, Here, Ranks, examine
from peer_dist.ranks.world import World
from peer_dist.reading import as_yaml
from peer_dist.sharding.cost import synthetic_picks
from peer_dist.units import sized

_MESSAGE = 16 << 20  # bytes of a rank's message to all others, by which bandwidth is measured
_ROUNDS = 8  # measurements of a call that all ranks make together
_LAYERS = (2, 8)  # layers of the models whose difference gives a layer's overhead
_ROW = 4096  # bytes of the rows by which a disk is measured
_WORDS = 128  # size of their vocabulary


@dataclass(frozen=True)
class Sizes:
    """Sizes of what is measured, large enough for a kind of device to reach its rate.

    Attributes:
        widths: widths of the square matrices to multiply.
        copy_size: float32 numbers to copy.
        experts, dim, dtype: rows, columns and dtype of the experts' tables.
        tokens, picks: number of tokens, and of experts that each of them picks.
        width, length: the hidden size and the sequence length of the dense layers that are timed for the work between
            matrix products.
        scratch: bytes of the file by which a disk is measured.
    """

    widths: tuple[int, ...]
    copy_size: int
    experts: int
    dim: int
    tokens: int
    dtype: torch.dtype
    picks: int = 128
    width: int = 256
    length: int = 256
    scratch: int = 1 << 30


SIZES = {
    "cpu": Sizes((256, 512, 1024), 1 << 25, 512**2, 256, 1024, torch.float32),
    "cuda": Sizes((2048, 4096, 8192), 1 << 28, 1024**2, 1024, 8192, torch.bfloat16, width=2048, length=2048),
}


@dataclass
class _Rates:
    """The measured rates, on rank 0.

    Attributes:
        values: the values of the hardware file's keys.
        guessed: for each of those keys that was not measured, what was written instead.
        best: by check, the best values that each rank measured in all turns; worse ones are other programs' doing.
    """

    values: dict[str, Any] = field(default_factory=dict)
    guessed: dict[str, str] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)

    def add(self, check: str, values: dict[int, Any]) -> dict[int, Any]:
        """Add a turn's values of a check, by rank; return the best ones of all turns."""
        self.best[check] = _better(
            self.best.get(check, values), values, min if check in ("links", "overheads") else max
        )
        return self.best[check]


def calibrate(world: World, path: Path, seconds: float = 30.0, turns: int = 3) -> Examination:
    """Measure the rates and write the hardware file. A collective call; all ranks get the same report.

    Args:
        world: the ranks, which have joined.
        path: the YAML file, which rank 0 writes unless a check failed.
        seconds: the time limit of each check in each turn.
        turns: how often all checks are made; the best values count, for other programs slow a machine for seconds.

    Raises:
        ConfigError: the file cannot be written; on rank 0 only.
    """
    from peer_dist.engines import building  # noqa: F401  (it takes seconds, which no check's limit should include)

    rates = _Rates()
    checks = [
        Check("device", _device, functools.partial(_judge_device, rates), "see whether nvidia-smi answers there"),
        Check("matrix products", _products, functools.partial(_judge_products, rates), "see what else runs there"),
        Check("memory", _memory, functools.partial(_judge_memory, rates), "see what else runs there"),
        Check("tables elsewhere", _elsewhere, functools.partial(_judge_elsewhere, rates), "see what else runs there"),
        Check(
            "links",
            _links,
            functools.partial(_judge_links, rates),
            "see with peer-dist doctor whether ranks reach each other",
            collective=True,
        ),
        Check(
            "overheads",
            _overheads,
            functools.partial(_judge_overheads, rates),
            "see with peer-dist doctor whether ranks reach each other",
            collective=True,
        ),
    ]
    for _ in range(turns):
        report = examine(world, checks, seconds=seconds)
        if not report.ok:
            break
    if world.rank == 0 and report.ok:
        write_hardware(path, rates.values, rates.guessed, report.ranks)
    return report


def write_hardware(path: Path, values: Mapping[str, Any], guessed: Mapping[str, str], ranks: int) -> None:
    """Write the file that ``peer-dist plan --gpu FILE`` reads.

    Args:
        path: the file; its folder is created if need be.
        values: the file's values by key; keys without a value are null.
        guessed: for each key that was not measured, what stands there instead.
        ranks: number of ranks that measured.

    Raises:
        ConfigError: the file cannot be written.
    """
    keys = (
        "name", "device", "memory_bytes", "hbm_bytes_per_s", "flops_per_s", "gather_bytes_per_s",
        "activation_bytes_per_s",
        "node_link_bytes_per_s", "node_link_latency_s", "network_bytes_per_s", "network_latency_s",
        "layer_overhead_s", "step_overhead_s",
        "bus_bytes_per_s", "bus_gather_bytes_per_s", "host_memory_bytes", "host_bytes_per_s",
        "disk_bytes", "disk_bytes_per_s", "disk_reads_per_s", "disk_writes_per_s", "gpus_per_node", "price_per_hour",
    )  # fmt: skip
    entry = {key: values.get(key) for key in keys}
    name = re.sub(r"[^a-z0-9]+", "-", str(entry["name"]).lower()).strip("-")
    lines = [f"# Measured by peer-dist doctor --calibrate on {ranks} rank(s). Rates are those of one rank."]
    lines += [f"# {key}: not measured, {instead}" for key, instead in guessed.items()]
    text = as_yaml({name: entry})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join([*lines, text]), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--calibrate {path}: cannot be written ({error.strerror}); name another file") from None


def _device(here: Here) -> dict[str, Any]:
    """This rank's host, its device's name, and the device's bytes of memory."""
    host = socket.gethostname()
    if here.device.type == "cuda":
        properties = torch.cuda.get_device_properties(here.device)
        return {"host": host, "name": properties.name, "bytes": properties.total_memory}
    name = f"{cpu_name()}, {torch.get_num_threads()} thread(s)"
    return {"host": host, "name": name, "bytes": free_memory()}


def _judge_device(rates: _Rates, values: dict[int, Any], ranks: Ranks) -> list[Finding]:
    """Add the device's name and memory, and the number of ranks on a host."""
    per_host = Counter(value["host"] for value in values.values())
    shared = 1 if ranks.backend == "nccl" else max(per_host.values())  # CPU ranks share their machine's memory
    first = values[min(values)]
    rates.values |= {
        "name": first["name"],
        "device": "cuda" if ranks.backend == "nccl" else "cpu",
        "memory_bytes": min(value["bytes"] for value in values.values()) // shared,
        "gpus_per_node": max(per_host.values()),
    }
    text = f"{len(values)} x {first['name']}, {sized(rates.values['memory_bytes'])} each"
    if len({value["name"] for value in values.values()}) > 1:
        return [Finding("device", "warn", f"ranks differ: {text} on rank 0", "calibrate on ranks of one kind")]
    return [Finding("device", "ok", text)]


def _products(here: Here) -> dict[str, dict[str, float]]:
    """FLOP/s of square products, by dtype and width."""
    rates: dict[str, dict[str, float]] = {}
    for name in ("float32", "bfloat16"):
        for width in SIZES[here.device.type].widths:
            seconds = product_seconds(here, width, getattr(torch, name))
            rates.setdefault(name, {})[str(width)] = 2 * width**3 / seconds
    return rates


def _judge_products(rates: _Rates, values: dict[int, Any], ranks: Ranks) -> list[Finding]:
    """Add the FLOP/s of each dtype: the slowest rank's at each width, and of the widths the median."""
    texts = []
    rates.values["flops_per_s"] = {}
    values = rates.add("products", values)
    for name, by_width in values[min(values)].items():
        slowest = {width: min(value[name][width] for value in values.values()) for width in by_width}
        rates.values["flops_per_s"][name] = _rounded(statistics.median(slowest.values()))
        texts.append(f"{name} " + ", ".join(f"{rate / 1e12:.3g} at {width}" for width, rate in slowest.items()))
    return [Finding("matrix products", "ok", f"TFLOP/s: {'; '.join(texts)} (the file has the median)")]


def _memory(here: Here) -> dict[str, float]:
    """Bytes per second that a large copy reads and writes, and that the experts' kernel reads for its picks."""
    sizes = SIZES[here.device.type]
    shape, dtype = (sizes.experts, sizes.dim), sizes.dtype
    copy_rate = 8 * sizes.copy_size / copy_seconds(here, sizes.copy_size)
    down, up = (torch.full(shape, sizes.dim**-0.5, dtype=dtype, device=here.device) for _ in range(2))
    x = torch.ones(sizes.tokens, sizes.dim, dtype=dtype, device=here.device)
    picks = synthetic_picks(sizes.experts, sizes.tokens, sizes.picks, device=here.device)
    gate = torch.ones(picks.numel(), dtype=torch.float32, device=here.device)
    with torch.no_grad():
        seconds = fastest(here, lambda: expert_mix(x, Picks.even(picks), gate, down, up, "gelu"))
    return {"copy": copy_rate, "gather": 2 * picks.numel() * sizes.dim * dtype.itemsize / seconds}


def _judge_memory(rates: _Rates, values: dict[int, Any], ranks: Ranks) -> list[Finding]:
    """Add the rates of the slowest rank."""
    values = rates.add("memory", values)
    copy_rate, gather_rate = (min(value[name] for value in values.values()) for name in ("copy", "gather"))
    rates.values |= {"hbm_bytes_per_s": _rounded(copy_rate), "gather_bytes_per_s": _rounded(gather_rate)}
    text = f"a copy moves {copy_rate / 1e9:.3g} GB/s, experts are gathered at {gather_rate / 1e9:.3g} GB/s"
    return [Finding("memory", "ok", text)]


def _elsewhere(here: Here) -> dict[str, float]:
    """What tables in host memory or on a disk need to know: bytes a second of rows that the host reads and writes, of
    copies over a GPU's bus and rows that its kernels read over it, and of the disk with the scratch files, where there
    is one.
    """
    sizes = SIZES[here.device.type]
    on_gpu = here.device.type == "cuda"
    table = host_zeros((sizes.experts, sizes.dim), sizes.dtype, pinned=on_gpu)
    generator = torch.Generator("cpu").manual_seed(here.rank)
    count = sizes.experts // 4
    rows = torch.randperm(sizes.experts, generator=generator, dtype=torch.int64, device="cpu")[:count].sort().values
    buffer = torch.empty(count, sizes.dim, dtype=sizes.dtype, device="cpu", pin_memory=on_gpu)

    def to_and_fro() -> None:
        torch.index_select(table, 0, rows, out=buffer)
        table.index_copy_(0, rows, buffer)

    moved = buffer.nbytes
    found = {"host": 4 * moved / fastest(here, to_and_fro), "memory": float(free_memory())}
    if on_gpu:  # written, not run
        from peer_dist.kernels.triton.rows import gather_rows

        near, picked = torch.empty_like(buffer, device=here.device), rows.to(here.device)
        found["there"] = moved / fastest(here, lambda: near.copy_(buffer, non_blocking=True))
        found["back"] = moved / fastest(here, lambda: buffer.copy_(near, non_blocking=True))
        found["gathered"] = moved / fastest(here, lambda: gather_rows(table, picked, near))
    folder = default_folder()
    try:
        check_folder(folder, 2 * sizes.scratch * here.world_size)
        disk = disk_rates(folder, _ROW, sizes.scratch)
    except (Mistake, OSError):  # as where temporary files are in memory
        return found
    found |= {"disk": min(disk.read, disk.written), "rows read": disk.rows_read, "rows written": disk.rows_written}
    return found | {"room": float(shutil.disk_usage(folder).free)}


def _judge_elsewhere(rates: _Rates, values: dict[int, Any], ranks: Ranks) -> list[Finding]:
    """Add the rates of the slowest rank, and each rank's share of its node's memory and disk."""
    values = rates.add("elsewhere", values)
    least = {name: min(value.get(name, 0.0) for value in values.values()) for name in values[min(values)]}
    shared = max(Counter(ranks.hosts.values()).values())
    rates.values["host_bytes_per_s"] = _rounded(least["host"])
    text = f"the host moves rows at {least['host'] / 1e9:.3g} GB/s"
    if ranks.backend == "nccl":
        bus, gathered = min(least["there"], least["back"]), least["gathered"]
        rates.values |= {"bus_bytes_per_s": _rounded(bus), "bus_gather_bytes_per_s": _rounded(gathered)}
        rates.values["host_memory_bytes"] = int(least["memory"]) // shared
        text += f"; the bus copies {bus / 1e9:.3g} GB/s, and kernels read rows over it at {gathered / 1e9:.3g} GB/s"
    if not least.get("disk"):
        advice = "set TMPDIR to a folder on a local disk with some room, if tables are to lie there"
        return [Finding("tables elsewhere", "warn", f"{text}; no disk was measured", advice)]
    rates.values |= {
        "disk_bytes": int(least["room"]) // shared,
        "disk_bytes_per_s": _rounded(least["disk"]),
        "disk_reads_per_s": _rounded(least["rows read"] / _ROW),
        "disk_writes_per_s": _rounded(least["rows written"] / _ROW),
    }
    each = f"{least['rows read'] / _ROW:,.0f} rows of {_ROW} bytes read, {least['rows written'] / _ROW:,.0f} written"
    text += f"; a disk moves {least['disk'] / 1e9:.3g} GB/s, and in a second {each}"
    return [Finding("tables elsewhere", "ok", text)]


def _links(here: Here) -> dict[str, dict[str, dict[str, float]]]:
    """What :func:`_exchanged` measures for each kind of link, "node" and "network", that there is.

    Inside a node all its ranks exchange. Between nodes each rank exchanges with those at its own place in the other
    nodes, all at once, so that they share a node's network as they do in a run.
    """
    hosts: list[str] = [""] * here.world_size
    dist.all_gather_object(hosts, socket.gethostname())
    inside = [[rank for rank, host in enumerate(hosts) if host == node] for node in dict.fromkeys(hosts)]
    between = [[node[place] for node in inside] for place in range(min(map(len, inside)))]
    times: dict[str, dict[str, dict[str, float]]] = {}
    for kind, groups in (("node", inside), ("network", between)):
        members = [ranks for ranks in groups if len(ranks) > 1]
        process_groups = [dist.new_group(ranks) for ranks in members]  # all ranks must make all of them
        own = [group for group, ranks in zip(process_groups, members) if here.rank in ranks]
        here.together()
        if own:
            times[kind] = _exchanged(here, own[0])
        here.together()
    return times


def _exchanged(here: Here, group: dist.ProcessGroup) -> dict[str, dict[str, float]]:
    """For each collective, seconds of a tiny message and of a large one, and the bytes that a rank sends in that."""
    ranks = group.size()
    times = {}
    for name, share in (("all-to-all", (ranks - 1) / ranks), ("all-reduce", 2 * (ranks - 1) / ranks)):
        seconds = []
        for size in (4 * ranks, _MESSAGE // 4 // ranks * ranks * 4):
            sent = torch.ones(size // 4, dtype=torch.float32, device=here.device)
            out = torch.empty_like(sent)
            run = (
                functools.partial(dist.all_to_all_single, out, sent, group=group)
                if name == "all-to-all"
                else functools.partial(dist.all_reduce, sent, group=group)
            )
            seconds.append(fastest(here, run, _ROUNDS))
        times[name] = {"tiny": seconds[0], "large": seconds[1], "bytes": share * sent.nbytes}
    return times


def _judge_links(rates: _Rates, values: dict[int, Any], ranks: Ranks) -> list[Finding]:
    """Add bandwidth and latency of the links, or what stands in their place if there are no such links."""
    if "hbm_bytes_per_s" not in rates.values:
        return [Finding("links", "warn", "not judged without what memory does", "see the check of memory")]
    texts = []
    keys = {"node": "node_link", "network": "network"}
    values = rates.add("links", values)
    for guess in rates.guessed:
        del rates.values[guess]
    rates.guessed.clear()
    for kind, key in keys.items():
        measured = [value[kind] for value in values.values() if kind in value]
        if not measured:
            continue
        for name in measured[0]:
            latency, large, size = (max(times[name][part] for times in measured) for part in ("tiny", "large", "bytes"))
            # noise may make the two times alike: at most ten times the large message's own rate
            bandwidth = size / max(large - latency, large / 10)
            texts.append(f"{kind}: {name} {bandwidth / 1e9:.3g} GB/s after {latency * 1e6:.0f} µs")
            if name == "all-to-all":  # the collective by which tokens travel to experts
                rates.values |= {f"{key}_bytes_per_s": _rounded(bandwidth), f"{key}_latency_s": _rounded(latency)}
    if "node_link_latency_s" not in rates.values:
        substitute = ("network", "that between nodes") if "network_latency_s" in rates.values else None
        _guess(rates, "node_link", substitute)
    if "network_latency_s" not in rates.values:
        _guess(rates, "network", ("node_link", "that inside the node") if texts else None)
    if rates.guessed:
        texts.append(f"not measured: {', '.join(rates.guessed)}")
        advice = "start it as the run will be started: all ranks of two nodes measure both kinds of links"
        return [Finding("links", "warn", "; ".join(texts), advice)]
    return [Finding("links", "ok", "; ".join(texts))]


def _guess(rates: _Rates, key: str, substitute: tuple[str, str] | None) -> None:
    """Fill in the rates of links that were not measured.

    Args:
        key: the hardware file's prefix for the links.
        substitute: the prefix of the links whose rates are taken, and their name; None if no links were measured.
    """
    for end in ("bytes_per_s", "latency_s"):
        if substitute is not None:
            value, reason = rates.values[f"{substitute[0]}_{end}"], f"{substitute[1]} stands there"
        elif end == "bytes_per_s":
            value, reason = rates.values["hbm_bytes_per_s"], "a copy's rate stands there"
        else:
            value, reason = 0.0, "0 stands there"
        rates.values[f"{key}_{end}"] = value
        rates.guessed[f"{key}_{end}"] = reason


def _overheads(here: Here) -> dict[str, float]:
    """Seconds of training steps: of two tiny models, which show what a layer and a step take whatever their sizes, and
    of one with dense layers as large as in training.
    """
    few, many = (_step_seconds(here, _model(layers)) for layers in _LAYERS)
    sizes = SIZES[here.device.type]
    return {"few": few, "many": many, "dense": _step_seconds(here, _dense_model(sizes, here.world_size))}


def _model(layers: int) -> Config:
    """The config of a tiny model, half of whose layers are PEER layers."""
    return Config.model_validate(
        {
            "model": {
                "num_layers": layers,
                "hidden_size": 32,
                "seq_length": 8,
                "mlp": [DENSE.name, PEER.name] * (layers // 2),
            },
            PEER.name: {"num_experts": 256, "heads": 1, "top_k": 4, "key_dim": 8, "query_norm": "rms"},
            "parallel": {"expert": "auto"},
            "data": {"prefix": "none"},
            "train": {"micro_batch_size": 1},
        }
    )


def _dense_model(sizes: Sizes, ranks: int) -> Config:
    """The config of a model with two dense layers of full size."""
    return Config.model_validate(
        {
            "model": {
                "num_layers": 2,
                "hidden_size": sizes.width,
                "num_attention_heads": max(1, sizes.width // 64),
                "seq_length": sizes.length,
                "mlp": DENSE.name,
            },
            "data": {"prefix": "none"},
            "train": {"micro_batch_size": 4, "global_batch_size": 4 * ranks},
        }
    )


def _step_seconds(here: Here, config: Config) -> float:
    """Seconds of the fastest training step of a model, over a micro-batch of random tokens."""
    from peer_dist.engines.building import dtype_of, join_groups, make_engine
    from peer_dist.measures.held_out import make_micro_batch
    from peer_dist.megatron import build_model, run_forward_backward, sparse_layers

    parallel = join_groups(config)
    try:
        dtype = dtype_of(config, here.device.type)
        model = build_model(config, parallel, _WORDS, dtype)
        for layer in sparse_layers(model).values():
            layer.release_shards()
        engine = make_engine(config, model, parallel, dtype)
        shape = (config.train.micro_batch_size, config.model.seq_length + 1)
        sequences = torch.randint(1, _WORDS, shape, dtype=torch.int64, device="cpu")
        batch = make_micro_batch(sequences, 0, here.device)

        def step() -> None:
            with engine.accumulate():
                run_forward_backward(model, [batch])
            engine.read(torch.zeros(1, dtype=torch.float64, device=here.device))
            engine.step(0.0, 0.0)

        return fastest(here, step, _ROUNDS)
    finally:
        parallel.destroy()


def _judge_overheads(rates: _Rates, values: dict[int, Any], ranks: Ranks) -> list[Finding]:
    """Add the overheads of a layer and of a step, and the rate at which activations move between matrix products."""
    if "network_bytes_per_s" not in rates.values or "flops_per_s" not in rates.values:
        return [Finding("overheads", "warn", "not judged without the other rates", "see the checks before it")]
    values = rates.add("overheads", values)
    few, many, dense = (max(value[name] for value in values.values()) for name in ("few", "many", "dense"))
    layer = max(0.0, (many - few) / (_LAYERS[1] - _LAYERS[0]))
    step = max(0.0, few - _LAYERS[0] * layer)
    rates.values |= {"layer_overhead_s": _rounded(layer), "step_overhead_s": _rounded(step)}
    text = f"{layer * 1e3:.2f} ms a layer, forward and backward, half of them PEER; {step * 1e3:.2f} ms a step beside"
    device = rates.values["device"]
    hardware = Hardware.model_validate({**rates.values, "activation_bytes_per_s": 1e30})
    config = _dense_model(SIZES[device], len(values))
    planned = plan(config, len(values), hardware.gpus_per_node, hardware, _WORDS).work
    unexplained = max(dense - planned.times.total, 1e-9)  # seconds that the plan has no other reason for
    rate = min(planned.activation_bytes / unexplained, hardware.hbm_bytes_per_s)
    rates.values["activation_bytes_per_s"] = _rounded(rate)
    text += (
        f"; activations move at {rate / 1e9:.3g} GB/s: a step of dense layers takes {dense * 1e3:.0f} ms, of which "
        f"products, gradients and the update explain {planned.times.total * 1e3:.0f}"
    )
    return [Finding("overheads", "ok", text)]


def _better(one: Any, other: Any, pick: Callable[[Any, Any], Any]) -> Any:
    """The better of two measurements of the same shape, number by number; ``pick`` is ``min`` or ``max``."""
    return {key: _better(one[key], other[key], pick) for key in one} if isinstance(one, dict) else pick(one, other)


def _rounded(value: float) -> float:
    """The value to three digits: measurements are not more precise."""
    return float(f"{value:.3g}")


def check_writable(path: Path) -> None:
    """Check before anything is measured that the hardware file can be written.

    Raises:
        ConfigError: the file cannot be written, or ``peer-dist plan`` would not take its name for a file's, or it holds
            something else.
    """
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--calibrate {path}: must end in .yaml, by which peer-dist plan knows a file")
    unfit = os.path.isdir(path) or not os.access(nearest_existing(path), os.W_OK) or unwritable(path.parent)
    if unfit or len(os.fsencode(path.name)) > LONGEST_NAME:
        raise ConfigError(f"--calibrate {path}: cannot be written; name a file in a folder that can")
    if os.path.isfile(path) and os.path.getsize(path):
        try:
            load_hardware(str(path))
        except ConfigError:  # a run's config, for one
            raise ConfigError(
                f"--calibrate {path}: is there and holds no device's figures; name another file, or remove it"
            ) from None
