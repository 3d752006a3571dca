"""What the benchmarks share: time, peak memory, the copy bandwidth of the moment, tables and JSON."""

from __future__ import annotations

import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(run: Callable[[], Any], device: torch.device, repeats: int = 7) -> float:
    """Median seconds of a call, after one that warms up."""
    run()
    times = []
    for _ in range(repeats):
        synchronize(device)
        begin = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Most memory held during a call above what was held before it, its results included.

    On a GPU the allocator says; on Linux the kernel's high-water mark of the process does.
    """
    run()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the mark starts again from what is held now
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of a large copy."""
    source = torch.randn(1 << (28 if device.type == "cuda" else 26), device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), device, 9)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{names[0].split(':')[1].strip() if names else platform.machine()}, {torch.get_num_threads()} threads"


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print results side by side: a column per row given, a line per key."""
    table = Table(title=title, title_justify="left", show_header=False)
    for key in dict.fromkeys(key for row in rows for key in row):
        values = (row.get(key, "") for row in rows)
        table.add_row(key, *(f"{value:.4g}" if isinstance(value, float) else str(value) for value in values))
    Console(width=160).print(table)


def write_json(path: Path | None, results: dict[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
