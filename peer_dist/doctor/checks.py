"""The checks before a run: for each of them, what a rank measures and how rank 0 judges it."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import os
import shutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from peer_dist.config import ConfigError, check_world
from peer_dist.config.schema import VOCAB_MULTIPLE
from peer_dist.data.documents import DataError
from peer_dist.data.prepare import describe_prepared
from peer_dist.doctor.gpu import gpu_checks, known_card, memory_users, unseen_gpus
from peer_dist.engines.building import dtype_of
from peer_dist.kernels.disk import FolderError, check_folder, default_folder, network_file_system
from peer_dist.machine import free_memory, mount_of, nearest_existing, usable_cores
from peer_dist.mistake import Mistake
from peer_dist.planning.layout import Layout
from peer_dist.planning.rates import copy_seconds, product_seconds
from peer_dist.planning.state import checkpoint_bytes
from peer_dist.planning.tiers import far_pools
from peer_dist.ranks.environment import PACKAGES, versions
from peer_dist.ranks.examination import Check, Finding, Here, Ranks, Verdict
from peer_dist.training.readiness import check_ready
from peer_dist.units import sized

_MAY_DIFFER = {"driver", "kernel"}  # a difference is worth a warning, but a run works

_SHARED_MEMORY = 1 << 30  # bytes of /dev/shm below which NCCL's and data loaders' segments may not fit
WRITTEN_BYTES = 64 << 20  # bytes that each rank writes to measure the disk's speed
_SLOW_DISK = 20e6  # bytes per second and rank
_SLOW, _FAR_TOO_SLOW = 1.5, 3.0  # times the ranks' median that give a warning and a failure
_APART, _FAR_APART = 1.0, 60.0  # seconds between clocks that give a warning and a failure
COLLECTIVE_BYTES = (64 << 10, 4 << 20, 32 << 20)  # bytes per rank and collective
# The width and dtype of a product and the float32 numbers of a copy by which ranks are compared, by device.
_PRODUCT = {"cuda": (8192, torch.bfloat16), "cpu": (512, torch.float32)}
_COPIED = {"cuda": 1 << 28, "cpu": 1 << 22}

# Bus bandwidths in GB/s that every healthy machine exceeds, low enough that only a wrong network or a broken link stays
# below. Those of gloo were measured on loopback; the others are a fraction of the links' own figures.
_FLOORS: tuple[tuple[str, bool, str, float], ...] = (
    # backend, one host, word in the device's name, floor
    ("gloo", True, "", 0.1),
    ("gloo", False, "", 0.05),
    ("nccl", True, "H100", 150.0),
    ("nccl", True, "H200", 150.0),
    ("nccl", True, "B200", 300.0),
    ("nccl", True, "A100", 80.0),
    ("nccl", True, "", 5.0),
    ("nccl", False, "", 5.0),
)


def _versions(here: Here) -> dict[str, str]:
    """Versions of the packages, the driver and the kernel on this rank, by name."""
    return versions()


def _judge_versions(values: dict[int, dict[str, str]], ranks: Ranks) -> list[Finding]:
    """Whether all ranks have the same versions, and those that peer_dist was made for."""
    findings = []
    common = {}
    for name in sorted({name for installed in values.values() for name in installed}):
        counts = Counter(installed.get(name, "none") for installed in values.values())
        common[name] = counts.most_common(1)[0][0]
        for other in counts:
            if other != common[name]:
                who = ranks.named(rank for rank, installed in values.items() if installed.get(name, "none") == other)
                findings.append(
                    Finding(
                        "versions",
                        "warn" if name in _MAY_DIFFER else "fail",
                        f"{who}: {name} {other}, elsewhere {common[name]}",
                        "start every rank in the same environment or image",
                    )
                )
    for name, tried in _requirements().items():
        if name not in common or not tried.contains(common[name], prereleases=True):
            findings.append(
                Finding(
                    "versions",
                    "fail",
                    f"{name} is {common.get(name, 'missing')}, but peer_dist was made for {tried}",
                    f"pip install '{name}{tried}'",
                )
            )
    text = ", ".join(
        f"{name} {common[name]}" for name in ("python", *PACKAGES, "cuda", "nccl", "driver") if name in common
    )
    return findings or [Finding("versions", "ok", text, figures=common)]


def _requirements() -> dict[str, SpecifierSet]:
    """The versions that setup.py allows of the packages whose versions are asked, by name."""
    needs = map(Requirement, importlib.metadata.requires("peer_dist") or [])
    return {
        need.name: need.specifier
        for need in needs
        if need.name in PACKAGES and (need.marker is None or need.marker.evaluate({"extra": "train"}))
    }


def _devices(here: Here) -> dict[str, Any]:
    """This rank's GPU and its memory in bytes; without one, its cores and threads."""
    if here.device.type == "cuda":
        properties = torch.cuda.get_device_properties(here.device)
        free, total = torch.cuda.mem_get_info(here.device)
        unique = str(getattr(properties, "uuid", here.device.index))
        users = memory_users(unique)
        return {"name": properties.name, "unique": unique, "free": free, "total": total, "users": users}
    return {"name": "cpu", "cores": usable_cores(), "threads": torch.get_num_threads(), "unseen": unseen_gpus()}


def _judge_devices(values: dict[int, dict[str, Any]], ranks: Ranks) -> list[Finding]:
    """Whether ranks have devices of one kind and of their own, with free memory, and threads that fit the cores."""
    findings = []
    names = Counter(value["name"] for value in values.values())
    if len(names) > 1:
        text = ", ".join(f"{count} x {name}" for name, count in names.items())
        findings.append(Finding("devices", "warn", f"ranks differ: {text}", "the slowest sets the pace of all"))
    ranks_on: dict[tuple[str, str], list[int]] = {}  # by host and device
    for rank, value in values.items():
        ranks_on.setdefault((ranks.hosts.get(rank, "?"), value.get("unique", "cpu")), []).append(rank)
    for (host, unique), sharers in ranks_on.items():
        first = values[sharers[0]]
        if unique != "cpu" and len(sharers) > 1:
            text = f"{ranks.named(sharers)} share one {first['name']}"
            findings.append(Finding("devices", "fail", text, "start one rank per GPU (--nproc-per-node, --gpus)"))
        elif unique == "cpu" and len(sharers) * first["threads"] > first["cores"]:
            text = f"{len(sharers)} ranks of {first['threads']} threads on the {first['cores']} cores of {host}"
            findings.append(Finding("devices", "warn", text, "start fewer ranks, or lower OMP_NUM_THREADS"))
    busy = [rank for rank, value in values.items() if "free" in value and value["free"] < 0.9 * value["total"]]
    if busy:
        least = min(values[rank]["free"] for rank in busy)
        text = f"{ranks.named(busy)}: device memory is in use already, {sized(least)} free at the least"
        users = [f"{user} for {ranks.named([rank])}" for rank in busy for user in values[rank]["users"]]
        advice = f"end {', '.join(users[:4])}" if users else "see with nvidia-smi who uses it"
        findings.append(Finding("devices", "warn", text, advice))
    unseen: dict[tuple[str, str], list[int]] = {}  # by what is told and advised
    for rank, value in values.items():
        if value.get("unseen"):
            told, advice = value["unseen"]
            unseen.setdefault((told, advice), []).append(rank)
    for (told, advice), without in unseen.items():
        findings.append(Finding("devices", "fail", f"{ranks.named(without)}: {told}", advice))
    one = next(iter(values.values()))
    text = f"{len(values)} x {one['name']}"
    text += f", {sized(one['free'])} free" if "free" in one else f", {one['threads']} of {one['cores']} cores each"
    return findings or [Finding("devices", "ok", text, figures={key: value for key, value in one.items() if value})]


def _room(here: Here) -> dict[str, Any]:
    """Free bytes of memory and, for each use of a disk, the path asked about, its free bytes and if it is writable."""
    disks = {name: nearest_existing(path) for name, path in here.folders.items()}
    disks["temporary files"] = Path(tempfile.gettempdir())
    disks["caches"] = nearest_existing(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"))
    disks["/dev/shm"] = Path("/dev/shm")
    return {
        "memory": free_memory(),
        "disks": {
            name: [str(path), shutil.disk_usage(path).free, os.access(path, os.W_OK)]
            for name, path in disks.items()
            if path.exists()
        },
    }


def _judge_room(values: dict[int, dict[str, Any]], ranks: Ranks) -> list[Finding]:
    """Whether memory and disks have room for a run and its checkpoints."""
    findings = []
    needed = _checkpoint_bytes(ranks)
    for name in dict.fromkeys(name for value in values.values() for name in value["disks"]):
        places = {rank: value["disks"][name] for rank, value in values.items() if name in value["disks"]}
        read_only = [rank for rank, (_, _, writable) in places.items() if not writable]
        if read_only and name in ("temporary files", "caches", "/dev/shm"):
            text = f"{ranks.named(read_only)}: {places[read_only[0]][0]} ({name}) cannot be written"
            findings.append(
                Finding("memory and disk", "warn", text, "set TMPDIR or XDG_CACHE_HOME to a folder that can")
            )
        tightest = min(places, key=lambda rank: places[rank][1])
        path, free, _ = places[tightest]
        if name == "/dev/shm" and free < _SHARED_MEMORY and ranks.world_size > 1:
            text = f"{ranks.named([tightest])}: {sized(free)} of shared memory"
            findings.append(
                Finding("memory and disk", "warn", text, "start containers with --shm-size=8g or --ipc=host")
            )
        elif name == "checkpoint.dir" and needed and free < needed * (1 + _checkpoints_kept(ranks)):
            text = (
                f"{path} has {sized(free)} free; a checkpoint takes {sized(needed)} or more, "
                f"{_checkpoints_kept(ranks) + 1} at once"
            )
            verdict: Verdict = "fail" if free < needed else "warn"
            findings.append(Finding("memory and disk", verdict, text, "choose another checkpoint.dir, or keep fewer"))
        elif name != "/dev/shm" and free < 1 << 30:
            text = f"{ranks.named([tightest])}: {sized(free)} free at {path} ({name})"
            findings.append(Finding("memory and disk", "warn", text, "make room, or move it elsewhere"))
    least = min(values, key=lambda rank: values[rank]["memory"])
    if 0 < values[least]["memory"] < 2 << 30:
        text = f"{ranks.named([least])}: {sized(values[least]['memory'])} of memory"
        findings.append(Finding("memory and disk", "warn", text, "end other programs there, or raise the limit"))
    disks = ", ".join(f"{name} {sized(free)}" for name, (_, free, _) in values[least]["disks"].items())
    return findings or [Finding("memory and disk", "ok", f"memory {sized(values[least]['memory'])}, {disks}")]


def _checkpoint_bytes(ranks: Ranks) -> int:
    """Bytes of a checkpoint of the configured run; 0 without a config.

    The embedding is left out if the data, which the size of its vocabulary follows from, are not prepared yet.
    """
    config = ranks.config
    if config is None:
        return 0
    try:
        vocab_size = describe_prepared(next(iter(config.data.weights))).vocab_size
    except DataError:
        vocab_size = 0
    itemsize = dtype_of(config, "cuda" if ranks.backend == "nccl" else "cpu").itemsize
    return checkpoint_bytes(config, -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE, itemsize)


def _checkpoints_kept(ranks: Ranks) -> int:
    """The number of checkpoints that the configured run keeps; 0 without a config."""
    return 0 if ranks.config is None else ranks.config.checkpoint.keep


def _judge_layout(values: dict[int, Any], ranks: Ranks) -> list[Finding]:
    """Whether the config's groups fit the ranks, and which of them cross hosts."""
    if ranks.config is None:
        return []
    layout, world = ranks.config.parallel, ranks.world_size
    try:
        check_world(ranks.config, world)
    except ConfigError as error:
        return [Finding("layout", "fail", str(error), "change the config or the number of ranks")]
    findings = []
    for name, size, what in (
        ("parallel.expert_tensor", layout.expert_tensor, "column groups exchange partial sums of every pick"),
        ("parallel.tensor", layout.tensor, "tensor groups exchange activations in every layer"),
    ):
        # Megatron numbers ranks so that these two are neighbours
        groups = [range(first, first + size) for first in range(0, world, size)]
        crossing = [group for group in groups if len({ranks.hosts.get(rank) for rank in group}) > 1]
        if crossing:
            example = ranks.named(crossing[0])
            text = f"{name} = {size}: {len(crossing)} of {len(groups)} groups cross hosts, such as {example}"
            findings.append(Finding("layout", "warn", text, f"{what}: keep {name} within a node"))
    text = f"{layout.expert_rows(world)} x {layout.expert_tensor} table shards; no column or tensor group crosses hosts"
    return findings or [Finding("layout", "ok", text)]


def _refusal(here: Here) -> str:
    """The sentence by which a run would be refused here before it begins; '' if it would not, or only for its layout,
    of which :func:`_judge_layout` tells.
    """
    if here.config is None:
        return ""
    try:
        check_world(here.config, here.world_size)
    except ConfigError:
        return ""
    try:
        check_ready(here.config, here.world_size, here.local_world_size)
    except Mistake as mistake:
        return str(mistake)
    return ""


def _judge_refusals(values: dict[int, str], ranks: Ranks) -> list[Finding]:
    """Whether the run can read what it begins with or goes on from, on every rank."""
    if ranks.config is None:
        return []
    refused: dict[str, list[int]] = {}
    for rank, sentence in values.items():
        if sentence:
            refused.setdefault(sentence, []).append(rank)
    findings = []
    for sentence, by in refused.items():
        problem, _, advice = sentence.rpartition("; ")
        told = f"{ranks.named(by)}: {problem or sentence}"
        findings.append(
            Finding("what it reads", "fail", told, advice if problem else "mend it: the run would not begin")
        )
    if findings:
        return findings
    return [Finding("what it reads", "ok", "the data, their tokenizer and the checkpoint folder are fit for the run")]


def _shared(here: Here) -> dict[str, Any]:
    """For each folder of the run, its path and the ranks whose files this rank does not see after they were renamed."""
    unseen = {}
    for name, path in here.folders.items():
        folder = nearest_existing(path)
        prefix = f".doctor-{here.visit}-{name}-"
        mine = folder / f"{prefix}{here.rank}"
        part = mine.with_name(mine.name + ".part")
        here.left_behind += [part, mine]
        with _writing(folder):
            with open(part, "wb") as file:
                file.write(str(here.rank).encode())
                file.flush()
                os.fsync(file.fileno())
            part.rename(mine)
        expected = {f"{prefix}{rank}" for rank in range(here.world_size)}
        deadline = time.monotonic() + here.seconds / 2 / len(here.folders)
        while (missing := expected - set(os.listdir(folder))) and time.monotonic() < deadline:
            time.sleep(0.05)
        unseen[name] = [str(folder), sorted(int(file_name.rpartition("-")[2]) for file_name in missing)]
        neighbour = (here.rank + 1) % here.world_size
        if not missing and (folder / f"{prefix}{neighbour}").read_bytes() != str(neighbour).encode():
            raise OSError(f"{folder}: the file of rank {neighbour} has other contents here")
    return unseen


def _judge_shared(values: dict[int, dict[str, Any]], ranks: Ranks) -> list[Finding]:
    """Whether every rank sees what the others write in the folders of the run."""
    findings = []
    for name in next(iter(values.values())):
        writers = set(values)
        unseen = {rank: set(value[name][1]) & writers for rank, value in values.items()}
        unseen = {rank: missing for rank, missing in unseen.items() if missing}
        if unseen:
            rank = min(unseen, key=lambda rank: (-len(unseen[rank]), rank))
            text = (
                f"{ranks.named([rank])} does not see what {ranks.named(unseen[rank])} wrote in {values[rank][name][0]}"
            )
            findings.append(
                Finding("shared folders", "fail", text, f"mount the same file system for {name} on every node")
            )
    places = ", ".join(f"{name} ({place[0]})" for name, place in values[min(values)].items())
    return findings or [Finding("shared folders", "ok", f"every rank sees what the others write: {places}")]


def _scratch(here: Here) -> dict[str, Any]:
    """Of each folder in which this rank's tables lie: where it is mounted and as what, its free bytes and those that
    the rank's tables need there; nothing of a run whose tables lie elsewhere, nor of a folder for which the run would
    be refused in any case.
    """
    config = here.config
    if config is None:
        return {}
    try:
        check_world(config, here.world_size)
    except ConfigError:
        return {}
    layout = Layout(config, here.world_size, here.world_size)
    found: dict[str, Any] = {}
    for pool in far_pools(layout, layout.place(here.rank)):
        if pool.tables.memory == "disk":
            folder = Path(pool.tables.folder or default_folder())
            try:
                check_folder(folder, 0)
            except FolderError:
                continue
            mount, kind = mount_of(folder)
            value = {
                "mount": mount,
                "kind": kind,
                "free": shutil.disk_usage(folder).free,
                "network": network_file_system(folder) is not None,
                "needed": 0,
            }
            found.setdefault(str(folder), value)["needed"] += pool.disk_bytes
    return found


def _judge_scratch(values: dict[int, dict[str, Any]], ranks: Ranks) -> list[Finding]:
    """Whether tables on a disk lie on a local one. That there is room is said by what the run reads and writes."""
    findings, texts = [], []
    for folder in dict.fromkeys(folder for value in values.values() for folder in value):
        there = {rank: value[folder] for rank, value in values.items() if folder in value}
        for kind in dict.fromkeys(value["kind"] for value in there.values()):
            own = [rank for rank, value in there.items() if value["kind"] == kind]
            one, needed = there[own[0]], max(there[rank]["needed"] for rank in own)
            text = f"{folder} is on {kind or 'a disk'}{' at ' + one['mount'] if one['mount'] else ''}"
            text += f", {sized(min(there[rank]['free'] for rank in own))} free; a rank's tables need {sized(needed)}"
            texts.append(text)
            if one["network"]:
                advice = "name one on a local disk in peer.table_folder: rows at random are slow over a network"
                findings.append(Finding("tables on disk", "warn", f"{ranks.named(own)}: {text}", advice))
    if not texts:
        return []
    return findings or [Finding("tables on disk", "ok", "; ".join(texts))]


def _disk_speed(here: Here) -> float:
    """Bytes per second that this rank writes while the others write too."""
    folder = nearest_existing(next(iter(here.folders.values())))
    path = folder / f".doctor-{here.visit}-speed-{here.rank}"
    here.left_behind.append(path)
    block = os.urandom(1 << 20)
    start = time.perf_counter()
    with _writing(folder), open(path, "wb") as file:
        for _ in range(WRITTEN_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return WRITTEN_BYTES / (time.perf_counter() - start)


def _judge_disk_speed(values: dict[int, float], ranks: Ranks) -> list[Finding]:
    """Whether every rank writes fast enough, and how long a checkpoint takes."""
    total, slowest = sum(values.values()), min(values, key=lambda rank: values[rank])
    text = f"{total / 1e6:,.0f} MB/s together"
    if needed := _checkpoint_bytes(ranks):
        text += f": a checkpoint of {sized(needed)} or more takes {needed / total:,.1f} s"
    findings = []
    if values[slowest] < _SLOW_DISK:
        slow = f"{text}; {ranks.named([slowest])} writes {values[slowest] / 1e6:,.0f} MB/s"
        advice = "choose a faster checkpoint.dir, or checkpoint.asynchronous=true and a longer checkpoint.interval"
        findings.append(Finding("writing", "warn", slow, advice))
    return findings or [Finding("writing", "ok", text)]


def _clock(here: Here) -> float:
    """Seconds by which this rank's clock is ahead of rank 0's, read when both leave a collective call together."""
    ahead = []
    for _ in range(9):
        here.together()
        mine = torch.tensor([time.time()], dtype=torch.float64, device=here.device)
        reference = mine.clone()
        dist.broadcast(reference, 0)
        ahead.append(float(mine - reference))
    return statistics.median(ahead)


def _judge_clock(values: dict[int, float], ranks: Ranks) -> list[Finding]:
    """Whether the clocks agree."""
    worst = max(values, key=lambda rank: abs(values[rank]))
    text = (
        f"{ranks.named([worst])} is {abs(values[worst]):.3f} s {'ahead of' if values[worst] > 0 else 'behind'} rank 0"
    )
    if abs(values[worst]) < _APART:
        return [Finding("clocks", "ok", f"within {abs(values[worst]):.3f} s of rank 0's")]
    verdict: Verdict = "fail" if abs(values[worst]) > _FAR_APART else "warn"
    return [Finding("clocks", verdict, text, "run chrony or ntpd on every node")]


def _collectives(here: Here) -> dict[str, Any]:
    """Seconds of each collective by its size, the names of those with wrong results, and the device's name. A rank that
    is alone goes through the backend too, with itself.
    """
    world, rank = here.world_size, here.rank
    seconds: dict[str, float] = {}
    wrong = []
    for size in COLLECTIVE_BYTES:
        count = size // 4 // world * world
        mine = torch.full((count,), float(rank + 1), dtype=torch.float32, device=here.device)
        out = torch.empty_like(mine)
        blocks = torch.arange(world, device=here.device, dtype=torch.float32).repeat_interleave(count // world)
        sent = blocks + world * rank  # the numbers of rank r for rank b tell both r and b
        runs: dict[str, Callable[[], Any]] = {
            "all-reduce": lambda out=out: dist.all_reduce(out),  # type: ignore[misc]
            "all-to-all": lambda out=out, sent=sent: dist.all_to_all_single(out, sent),  # type: ignore[misc]
        }
        expected = {"all-reduce": torch.full_like(mine, world * (world + 1) / 2), "all-to-all": blocks * world + rank}
        for name, run in runs.items():
            times = []
            for _ in range(4):  # the first makes connections
                out.copy_(mine)
                here.together()
                start = time.perf_counter()
                run()
                here.finish()
                times.append(time.perf_counter() - start)
                if not torch.equal(out, expected[name]):
                    wrong.append(f"{name} of {sized(size)}")
            seconds[f"{name} {size}"] = min(times[1:])
    return {"seconds": seconds, "wrong": sorted(set(wrong)), "name": _devices(here)["name"]}


def _judge_collectives(values: dict[int, dict[str, Any]], ranks: Ranks) -> list[Finding]:
    """Whether collectives give right results, and are as fast as a healthy machine's."""
    findings = []
    wrong = {rank: value["wrong"] for rank, value in values.items() if value["wrong"]}
    if wrong:
        what = ", ".join(sorted({name for names in wrong.values() for name in names}))
        text = f"{ranks.named(wrong)}: wrong result of {what}"
        findings.append(Finding("collectives", "fail", text, "do not train: look for broken links (NCCL_DEBUG=INFO)"))
    if ranks.world_size == 1:
        text = f"one rank: nothing to exchange, and {ranks.backend} gives it back right"
        return findings or [Finding("collectives", "ok", text)]
    one_host = len(set(ranks.hosts.values())) == 1
    device = values[min(values)]["name"]
    floor = next(
        floor
        for backend, alone, word, floor in _FLOORS
        if backend == ranks.backend and alone == one_host and word in device
    )
    world, slow = ranks.world_size, []
    speeds: list[str] = []
    figures: dict[str, float] = {}
    for name, share in (("all-reduce", 2 * (world - 1) / world), ("all-to-all", (world - 1) / world)):
        for size in COLLECTIVE_BYTES:
            seconds = max(value["seconds"][f"{name} {size}"] for value in values.values())
            figures[f"seconds of {name} of {size} bytes"] = seconds
            if size == COLLECTIVE_BYTES[0]:
                speeds.append(f"{name} of {sized(size)} {seconds * 1e3:.2f} ms")
            else:
                speed = share * size / seconds / 1e9
                speeds.append(f"{sized(size)} {speed:.2f} GB/s")
                if size == COLLECTIVE_BYTES[-1] and speed < floor:
                    slow.append(name)
    text = ", ".join(speeds) + f" (at least {floor} GB/s expected at {sized(COLLECTIVE_BYTES[-1])})"
    if slow:
        advice = "check that NCCL_SOCKET_IFNAME, NCCL_IB_HCA or GLOO_SOCKET_IFNAME name the fast network"
        findings.append(Finding("collectives", "warn", f"slow {' and '.join(slow)}: {text}", advice, figures))
    return findings or [Finding("collectives", "ok", text, figures=figures)]


def _speed(here: Here) -> dict[str, Any]:
    """Seconds of a fixed product and a fixed copy, each the best of many, because other programs disturb some; and of
    a GPU its name and bytes of memory.
    """
    kind = here.device.type
    value = {"product": product_seconds(here, *_PRODUCT[kind]), "copy": copy_seconds(here, _COPIED[kind])}
    if kind == "cuda":
        properties = torch.cuda.get_device_properties(here.device)
        return {**value, "card": properties.name, "memory": properties.total_memory}
    return value


def _judge_speed(values: dict[int, dict[str, Any]], ranks: Ranks) -> list[Finding]:
    """Whether all ranks compute and copy about equally fast, and GPUs that are known as fast as plans take them to."""
    kind = "cuda" if ranks.backend == "nccl" else "cpu"
    width, dtype = _PRODUCT[kind]
    work = {"product": 2 * width**3, "copy": 8 * _COPIED[kind]}  # FLOPs; bytes read and written
    figures: dict[str, float] = {}
    findings = []
    medians = []
    for name in ("product", "copy"):
        median = statistics.median_low([value[name] for value in values.values()])
        slow = {rank: value[name] / median for rank, value in values.items() if value[name] > _SLOW * median}
        if slow:
            worst, usual = max(slow.values()), f"the median of {median * 1e3:.2f} ms"
            text = f"{ranks.named(sorted(slow))}: a {name} takes up to {worst:.1f} times {usual}"
            verdict: Verdict = "fail" if worst > _FAR_TOO_SLOW else "warn"
            advice = "see what else runs there, its clock rates and temperature; leave the node out of the run"
            findings.append(Finding("speed of ranks", verdict, text, advice))
        rate = work[name] / median
        medians.append(f"{name} {median * 1e3:.2f} ms ({_shown(name, rate)})")
        figures |= {f"{name}_seconds": median, "flops_per_s" if name == "product" else "copy_bytes_per_s": rate}
    findings += _below_plans(values, ranks, work)
    text = f"{str(dtype).rpartition('.')[2]} {', '.join(medians)}; no rank over {_SLOW} times that"
    findings = findings or [Finding("speed of ranks", "ok", text)]
    return [dataclasses.replace(finding, figures=figures) for finding in findings]


def _below_plans(values: dict[int, dict[str, Any]], ranks: Ranks, work: dict[str, int]) -> list[Finding]:
    """The GPUs that are slower than ``hardware.yaml`` takes cards of their name to be in a run."""
    below: dict[tuple[str, str, float], list[int]] = {}  # by what is slow, the card and what is expected of it
    for rank, value in values.items():
        card = known_card(value["card"], value["memory"]) if "card" in value else None
        if card is not None:
            for name, expected in (
                ("product", card.flops_per_s.bfloat16 * card.achievable.flops),
                ("copy", card.hbm_bytes_per_s * card.achievable.hbm),
            ):
                if work[name] / value[name] < expected:
                    below.setdefault((name, card.name, expected), []).append(rank)
    findings = []
    for (name, known, expected), slow in below.items():
        reached = _shown(name, work[name] / max(values[rank][name] for rank in slow))
        text = f"{ranks.named(slow)}: a {name} reaches {reached}; plans take {_shown(name, expected)} for {known}"
        advice = "see with nvidia-smi what else runs there, the clocks, the power limit and the temperature"
        findings.append(Finding("speed of ranks", "warn", text, advice))
    return findings


def _shown(name: str, rate: float) -> str:
    """The rate of a product or a copy as a card's data sheet gives it."""
    return f"{rate / 1e12:.3g} TFLOP/s" if name == "product" else f"{rate / 1e9:,.0f} GB/s"


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """A context whose errors name the folder, not the doctor's own file in it."""
    try:
        yield
    except OSError as error:
        raise OSError(f"nothing can be written to {folder} ({error.strerror})") from None


_DRIVER, *_KERNELS = gpu_checks()  # these say nothing on CPUs

CHECKS: tuple[Check, ...] = (
    Check("versions", _versions, _judge_versions, "install peer_dist there again"),
    Check("devices", _devices, _judge_devices, "see whether nvidia-smi answers there"),
    _DRIVER,
    Check("memory and disk", _room, _judge_room, "see whether df answers there; a hung mount does not"),
    Check("layout", lambda here: None, _judge_layout, ""),
    Check("what it reads", _refusal, _judge_refusals, "see whether the file system there answers"),
    Check("shared folders", _shared, _judge_shared, "make the folder writable, and see that its mount answers"),
    Check("tables on disk", _scratch, _judge_scratch, "see whether the file system there answers"),
    Check("writing", _disk_speed, _judge_disk_speed, "see whether the file system there is full or hung"),
    Check("speed of ranks", _speed, _judge_speed, "see what else runs there, or leave the node out"),
    *_KERNELS,
    Check(
        "clocks",
        _clock,
        _judge_clock,
        "see that ranks reach each other (firewall, NCCL_SOCKET_IFNAME)",
        collective=True,
    ),
    Check(
        "collectives",
        _collectives,
        _judge_collectives,
        "see that ranks reach each other (firewall, NCCL_SOCKET_IFNAME, NCCL_DEBUG=INFO)",
        collective=True,
    ),
)
