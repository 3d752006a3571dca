"""``peer-dist doctor --calibrate``: the rates of these machines, measured for ``peer-dist plan``.

All ranks measure at the same time, as they will train, and of their rates the slowest counts: it sets the pace.
"""

from __future__ import annotations

import functools
import os
import re
import socket
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from peer_dist.config import Config, ConfigError
from peer_dist.kernels import Picks, expert_mix
from peer_dist.kinds import DENSE, PEER
from peer_dist.machine import cpu_name, free_memory
from peer_dist.planning.hardware import Hardware
from peer_dist.planning.plan import plan
from peer_dist.ranks.examination import Check, Examination, Finding, Here, Ranks, examine
from peer_dist.ranks.world import World
from peer_dist.sharding.cost import synthetic_picks
from peer_dist.units import sized

_MESSAGE = 16 << 20  # bytes that a rank has for all others, of which bandwidth is measured
_TURNS = 3  # of all checks: what slows a machine down lasts for seconds
_ROUNDS = 8  # of what all ranks do together
_LAYERS = (2, 8)  # of the models whose difference tells a layer's overhead
_WORDS = 128  # of their vocabulary


@dataclass(frozen=True)
class _Sizes:
    """What is measured, large enough for a kind of device to reach its rate.

    Attributes:
        widths: of square matrices.
        copied: float32 numbers.
        experts, dim, tokens, picks, dtype: of the tables, and of what is read from them.
        width, length: of the layers, and of their sequences, that tell what lies between matrix products.
    """

    widths: tuple[int, ...]
    copied: int
    experts: int
    dim: int
    tokens: int
    dtype: torch.dtype
    picks: int = 128
    width: int = 256
    length: int = 256


_SIZES = {
    "cpu": _Sizes((256, 512, 1024), 1 << 25, 512**2, 256, 1024, torch.float32),
    "cuda": _Sizes((2048, 4096, 8192), 1 << 28, 1024**2, 1024, 8192, torch.bfloat16, width=2048, length=2048),
}


@dataclass
class _Rates:
    """What the checks found, on rank 0: the hardware file's keys, and those of them that were not measured."""

    values: dict[str, Any] = field(default_factory=dict)
    guessed: dict[str, str] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)
    """By check, what each rank measured, of all turns the best: what is worse is other programs' doing."""

    def add(self, check: str, values: dict[int, Any]) -> dict[int, Any]:
        """A turn's values; all turns'."""
        self.best[check] = _better(
            self.best.get(check, values), values, max if check in ("products", "memory") else min
        )
        return self.best[check]


def calibrate(world: World, path: Path, seconds: float = 30.0) -> Examination:
    """Measure, and write the hardware file; every rank of the process group calls it, and all get the same report.

    Args:
        path: the YAML file, written by rank 0 unless a check failed.
        seconds: what a check may take in each turn.

    Raises:
        ConfigError: on rank 0, where the file cannot be written.
    """
    from peer_dist.engines import building  # noqa: F401  (seconds that are no check's)

    rates = _Rates()
    checks = [
        Check("device", _device, functools.partial(_judge_device, rates), "see whether nvidia-smi answers there"),
        Check("matrix products", _products, functools.partial(_judge_products, rates), "see what else runs there"),
        Check("memory", _memory, functools.partial(_judge_memory, rates), "see what else runs there"),
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
    for _ in range(_TURNS):
        report = examine(world, checks, seconds=seconds)
        if not report.ok:
            break
    if world.rank == 0 and report.ok:
        write_hardware(path, rates.values, rates.guessed, report.ranks)
    return report


def write_hardware(path: Path, values: Mapping[str, Any], guessed: Mapping[str, str], ranks: int) -> None:
    """The file that ``peer-dist plan --gpu FILE`` reads.

    Args:
        guessed: keys that were not measured, and what stands there instead.

    Raises:
        ConfigError: it cannot be written.
    """
    keys = (
        "name", "device", "memory_bytes", "hbm_bytes_per_s", "flops_per_s", "gather_bytes_per_s",
        "activation_bytes_per_s",
        "node_link_bytes_per_s", "node_link_latency_s", "network_bytes_per_s", "network_latency_s",
        "layer_overhead_s", "step_overhead_s", "gpus_per_node", "price_per_hour",
    )  # fmt: skip
    entry = {each: values.get(each) for each in keys}
    key = re.sub(r"[^a-z0-9]+", "-", str(entry["name"]).lower()).strip("-")
    lines = [f"# Measured by peer-dist doctor --calibrate on {ranks} rank(s). Rates are those of one rank."]
    lines += [f"# {each}: not measured, {instead}" for each, instead in guessed.items()]
    text = yaml.safe_dump({key: entry}, sort_keys=False, allow_unicode=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join([*lines, text]), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--calibrate {path}: cannot be written ({error.strerror}); name another file") from None


def _times(here: Here, run: Callable[[], Any], rounds: int = 0) -> list[float]:
    """Seconds of each call after one that warms up: of so many, or of as many as a third of a second has."""
    run()
    here.finish()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < (rounds or 5) or (not rounds and time.perf_counter() - begin < 0.3):
        start = time.perf_counter()
        run()
        here.finish()
        times.append(time.perf_counter() - start)
    return times


def _least(here: Here, run: Callable[[], Any], rounds: int = 0) -> float:
    """What comes on top is other programs'."""
    return min(_times(here, run, rounds))


def _device(here: Here) -> dict[str, Any]:
    host = socket.gethostname()
    if here.device.type == "cuda":
        about = torch.cuda.get_device_properties(here.device)
        return {"host": host, "name": about.name, "bytes": about.total_memory}
    name = f"{cpu_name()}, {torch.get_num_threads()} thread(s)"
    return {"host": host, "name": name, "bytes": free_memory()}


def _judge_device(rates: _Rates, values: dict[int, Any], ranks: Ranks) -> list[Finding]:
    per_host = Counter(value["host"] for value in values.values())
    shared = 1 if ranks.backend == "nccl" else max(per_host.values())  # CPU ranks share their machine's memory
    first = values[min(values)]
    rates.values |= {
        "name": first["name"],
        "device": "cuda" if ranks.backend == "nccl" else "cpu",
        "memory_bytes": min(value["bytes"] for value in values.values()) // shared,
        "gpus_per_node": max(per_host.values()),
    }
    told = f"{len(values)} x {first['name']}, {sized(rates.values['memory_bytes'])} each"
    if len({value["name"] for value in values.values()}) > 1:
        return [Finding("device", "warn", f"ranks differ: {told} on rank 0", "calibrate on ranks of one kind")]
    return [Finding("device", "ok", told)]


def _products(here: Here) -> dict[str, dict[str, float]]:
    """FLOP/s of square products, by dtype and width."""
    found: dict[str, dict[str, float]] = {}
    for name in ("float32", "bfloat16"):
        for width in _SIZES[here.device.type].widths:
            a = torch.ones(width, width, dtype=getattr(torch, name), device=here.device)
            out = torch.empty_like(a)
            taken = _least(here, functools.partial(torch.mm, a, a, out=out))
            found.setdefault(name, {})[str(width)] = 2 * width**3 / taken
    return found


def _judge_products(rates: _Rates, values: dict[int, Any], ranks: Ranks) -> list[Finding]:
    told = []
    rates.values["flops_per_s"] = {}
    values = rates.add("products", values)
    for name, by_width in values[min(values)].items():
        slowest = {width: min(value[name][width] for value in values.values()) for width in by_width}
        rates.values["flops_per_s"][name] = _rounded(statistics.median(slowest.values()))
        told.append(f"{name} " + ", ".join(f"{rate / 1e12:.3g} at {width}" for width, rate in slowest.items()))
    return [Finding("matrix products", "ok", f"TFLOP/s: {'; '.join(told)} (the file has the median)")]


def _memory(here: Here) -> dict[str, float]:
    """Bytes per second that a large copy reads and writes, and that the experts' kernel reads by its picks."""
    sizes = _SIZES[here.device.type]
    shape, dtype = (sizes.experts, sizes.dim), sizes.dtype
    copied = _copied(here, sizes.copied)
    down, up = (torch.full(shape, sizes.dim**-0.5, dtype=dtype, device=here.device) for _ in range(2))
    x = torch.ones(sizes.tokens, sizes.dim, dtype=dtype, device=here.device)
    drawn = synthetic_picks(sizes.experts, sizes.tokens, sizes.picks, device=here.device)
    gate = torch.ones(drawn.numel(), device=here.device)
    with torch.no_grad():
        taken = _least(here, lambda: expert_mix(x, Picks.even(drawn), gate, down, up, "gelu"))
    return {"copy": copied, "gather": 2 * drawn.numel() * sizes.dim * dtype.itemsize / taken}


def _copied(here: Here, count: int) -> float:
    source = torch.ones(count, device=here.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _least(here, lambda: target.copy_(source))


def _judge_memory(rates: _Rates, values: dict[int, Any], ranks: Ranks) -> list[Finding]:
    values = rates.add("memory", values)
    copied, gathered = (min(value[name] for value in values.values()) for name in ("copy", "gather"))
    rates.values |= {"hbm_bytes_per_s": _rounded(copied), "gather_bytes_per_s": _rounded(gathered)}
    told = f"a copy moves {copied / 1e9:.3g} GB/s, experts are gathered at {gathered / 1e9:.3g} GB/s"
    return [Finding("memory", "ok", told)]


def _links(here: Here) -> dict[str, dict[str, dict[str, float]]]:
    """By kind of link: for each collective, seconds of a tiny message and of a large one, and the bytes that a rank
    sends in that.

    Inside a node all of its ranks take part; between nodes the ranks of one place in each node do, all at once, so that
    they share its network as they will.
    """
    hosts: list[str] = [""] * here.world_size
    dist.all_gather_object(hosts, socket.gethostname())
    inside = [[rank for rank, host in enumerate(hosts) if host == each] for each in dict.fromkeys(hosts)]
    between = [[node[place] for node in inside] for place in range(min(map(len, inside)))]
    found: dict[str, dict[str, dict[str, float]]] = {}
    for kind, groups in (("node", inside), ("network", between)):
        several = [ranks for ranks in groups if len(ranks) > 1]
        made = [dist.new_group(ranks) for ranks in several]  # all ranks make all of them
        mine = [group for group, ranks in zip(made, several) if here.rank in ranks]
        here.together()
        if mine:
            found[kind] = _exchanged(here, mine[0])
        here.together()
    return found


def _exchanged(here: Here, group: dist.ProcessGroup) -> dict[str, dict[str, float]]:
    ranks = group.size()
    found = {}
    for name, moved in (("all-to-all", (ranks - 1) / ranks), ("all-reduce", 2 * (ranks - 1) / ranks)):
        seconds = []
        for size in (4 * ranks, _MESSAGE // 4 // ranks * ranks * 4):
            sent = torch.ones(size // 4, device=here.device)
            out = torch.empty_like(sent)
            run = (
                functools.partial(dist.all_to_all_single, out, sent, group=group)
                if name == "all-to-all"
                else functools.partial(dist.all_reduce, sent, group=group)
            )
            seconds.append(_least(here, run, _ROUNDS))
        found[name] = {"tiny": seconds[0], "large": seconds[1], "bytes": moved * sent.nbytes}
    return found


def _judge_links(rates: _Rates, values: dict[int, Any], ranks: Ranks) -> list[Finding]:
    if "hbm_bytes_per_s" not in rates.values:
        return [Finding("links", "warn", "not judged without what memory does", "see the check of memory")]
    told = []
    keys = {"node": "node_link", "network": "network"}
    values = rates.add("links", values)
    for key in rates.guessed:
        del rates.values[key]
    rates.guessed.clear()
    for kind, key in keys.items():
        measured = [value[kind] for value in values.values() if kind in value]
        if not measured:
            continue
        for name in measured[0]:
            latency, large, size = (max(each[name][key] for each in measured) for key in ("tiny", "large", "bytes"))
            bandwidth = size / max(large - latency, large / 10)  # of a noisy pair no more than ten times what it took
            told.append(f"{kind}: {name} {bandwidth / 1e9:.3g} GB/s after {latency * 1e6:.0f} µs")
            if name == "all-to-all":  # what experts need
                rates.values |= {f"{key}_bytes_per_s": _rounded(bandwidth), f"{key}_latency_s": _rounded(latency)}
    if "node_link_latency_s" not in rates.values:
        instead = ("network", "that between nodes") if "network_latency_s" in rates.values else None
        _guess(rates, "node_link", instead)
    if "network_latency_s" not in rates.values:
        _guess(rates, "network", ("node_link", "that inside the node") if told else None)
    if rates.guessed:
        told.append(f"not measured: {', '.join(rates.guessed)}")
        advice = "start it as the run will be started: all ranks of two nodes measure both kinds of links"
        return [Finding("links", "warn", "; ".join(told), advice)]
    return [Finding("links", "ok", "; ".join(told))]


def _guess(rates: _Rates, key: str, instead: tuple[str, str] | None) -> None:
    for end in ("bytes_per_s", "latency_s"):
        if instead is not None:
            value, why = rates.values[f"{instead[0]}_{end}"], f"{instead[1]} stands there"
        elif end == "bytes_per_s":
            value, why = rates.values["hbm_bytes_per_s"], "a copy's rate stands there"
        else:
            value, why = 0.0, "0 stands there"
        rates.values[f"{key}_{end}"] = value
        rates.guessed[f"{key}_{end}"] = why


def _overheads(here: Here) -> dict[str, float]:
    """Seconds of training steps: of two tiny models, which tell what a layer and a step take whatever their sizes, and
    of one whose layers have sizes.
    """
    few, many = (_step_seconds(here, _model(layers)) for layers in _LAYERS)
    sizes = _SIZES[here.device.type]
    return {"few": few, "many": many, "dense": _step_seconds(here, _dense_model(sizes, here.world_size))}


def _model(layers: int) -> Config:
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


def _dense_model(sizes: _Sizes, ranks: int) -> Config:
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
        batch = make_micro_batch(torch.randint(1, _WORDS, shape), 0, here.device)

        def step() -> None:
            with engine.accumulate():
                run_forward_backward(model, [batch])
            engine.step(0.0, 0.0)

        return _least(here, step, _ROUNDS)
    finally:
        parallel.destroy()


def _judge_overheads(rates: _Rates, values: dict[int, Any], ranks: Ranks) -> list[Finding]:
    if "network_bytes_per_s" not in rates.values or "flops_per_s" not in rates.values:
        return [Finding("overheads", "warn", "not judged without the other rates", "see the checks before it")]
    values = rates.add("overheads", values)
    few, many, dense = (max(value[name] for value in values.values()) for name in ("few", "many", "dense"))
    layer = max(0.0, (many - few) / (_LAYERS[1] - _LAYERS[0]))
    step = max(0.0, few - _LAYERS[0] * layer)
    rates.values |= {"layer_overhead_s": _rounded(layer), "step_overhead_s": _rounded(step)}
    told = f"{layer * 1e3:.2f} ms a layer, forward and backward, half of them PEER; {step * 1e3:.2f} ms a step beside"
    device = rates.values["device"]
    known = Hardware.model_validate({**rates.values, "activation_bytes_per_s": 1e30})
    config = _dense_model(_SIZES[device], len(values))
    planned = plan(config, len(values), known.gpus_per_node, known, _WORDS).work
    between = max(dense - planned.times.total, 1e-9)  # what the plan has no other reason for
    rate = min(planned.activation_bytes / between, known.hbm_bytes_per_s)
    rates.values["activation_bytes_per_s"] = _rounded(rate)
    told += (
        f"; activations move at {rate / 1e9:.3g} GB/s: a step of dense layers takes {dense * 1e3:.0f} ms, of which "
        f"products, gradients and the update explain {planned.times.total * 1e3:.0f}"
    )
    return [Finding("overheads", "ok", told)]


def _better(one: Any, other: Any, of: Callable[[Any, Any], Any]) -> Any:
    """The better of two measurements of the same shape, number by number."""
    return {key: _better(one[key], other[key], of) for key in one} if isinstance(one, dict) else of(one, other)


def _rounded(value: float) -> float:
    """To three digits: what is measured has no more."""
    return float(f"{value:.3g}")


def check_writable(path: Path) -> None:
    """Before anything is measured.

    Raises:
        ConfigError: the file cannot be written, or would not be known by its name.
    """
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--calibrate {path}: must end in .yaml, by which peer-dist plan knows a file")
    place = path if path.exists() else next(each for each in path.absolute().parents if each.exists())
    if path.is_dir() or not os.access(place, os.W_OK):
        raise ConfigError(f"--calibrate {path}: cannot be written; name a file in a folder that can")
