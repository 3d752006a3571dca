"""What the benchmarks share: time, peak memory, the copy bandwidth of the moment, tables and JSON."""

from __future__ import annotations

import gc
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from peer_dist.machine import cpu_name


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(
    runs: dict[str, Callable[[], Any]],
    device: torch.device,
    rounds: int = 9,
    until: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each call. All take their turn in every round, so that a machine whose speed drifts (other
    tenants, clocks) treats them alike; a turn is one call that warms up and one that is timed, so that none pays for
    the memory that the one before gave back.

    Args:
        until: no round but the first begins after this time of :func:`time.monotonic`.
        clock: what counts the seconds, the processor's time say.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(rounds):
        if round_number and time.monotonic() > until:
            break
        for name, run in runs.items():
            run()
            synchronize(device)
            begin = clock()
            run()
            synchronize(device)
            times[name].append(clock() - begin)
    return {name: statistics.median(taken) for name, taken in times.items()}


def extra_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """The most that torch's allocator handed out during a call beyond what is held after it: its results."""
    run()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        results = run()
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
        del results
        return extra
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        results = run()
    kineto = profile.profiler.kineto_results  # type: ignore[union-attr]
    moves = sorted((event.start_ns(), event.nbytes()) for event in kineto.events() if event.name() == "[memory]")
    held = list(itertools.accumulate((size for _, size in moves), initial=0))
    del results
    return max(held) - held[-1]


def large_copy(device: torch.device) -> tuple[int, Callable[[], Any]]:
    """A copy far larger than the caches, to be timed among others, and the bytes that it reads and writes."""
    source = torch.randn(1 << (28 if device.type == "cuda" else 26), dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes, lambda: target.copy_(source)


def cached_read(device: torch.device) -> tuple[int, Callable[[], Any]]:
    """A sum that reads 4 MB again and again, which stay in a GPU's L2, to be timed among others; the bytes read."""
    source = torch.randn(1 << 20, dtype=torch.float32, device=device)
    repeated = source.expand(256 if device.type == "cuda" else 16, -1)
    return repeated.numel() * source.element_size(), lambda: repeated.sum(1)


def device_name(device: torch.device) -> str:
    """The device's name; of a CPU with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print results side by side: a column per row given, a line per key."""
    table = Table(title=title, title_justify="left", show_header=False)
    for key in dict.fromkeys(key for row in rows for key in row):
        values = (row.get(key, "") for row in rows)
        table.add_row(key, *(f"{value:.4g}" if isinstance(value, float) else str(value) for value in values))
    Console(width=160).print(table)


def write_json(path: Path | None, results: dict[str, Any]) -> None:
    """Write results to a file, and make its folder; without ``path`` nothing."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
