"""What a run is made on: machines, devices, versions, and how ranks share the work."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import re
import socket
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from peer_dist.ranks.rank_zero import from_every_rank

if TYPE_CHECKING:  # the doctor needs no Megatron
    from peer_dist.megatron import Parallel

PACKAGES = ("peer_dist", "torch", "megatron-core", "deepspeed", "triton", "apex", "transformer_engine", "numpy")


def environment(parallel: Parallel) -> dict[str, Any]:
    """Plain values for the record of a run: ``hosts`` (device to ranks, by host), ``layout`` (the sizes of groups) and
    ``versions``. A collective call.
    """
    devices = from_every_rank(f"{socket.gethostname()}: {_device_name(parallel.device)}")
    rows, domain = parallel.expert_size, parallel.experts.domain.size()
    return {
        "hosts": dict(Counter(devices)),
        "layout": {
            "ranks": parallel.world_size,
            "tensor": parallel.tensor_size,
            "pipeline": parallel.pipeline_size,
            "data parallel": parallel.data_parallel_size,
            "expert rows": rows,
            "expert columns": domain // rows,
            "expert copies": parallel.expert_data_size,
        },
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of all that can change what a run does, by name."""
    found = {"python": platform.python_version(), "kernel": platform.release()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    found["torch"] = torch.__version__
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    if torch.cuda.is_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    with contextlib.suppress(OSError):
        found["driver"] = Path("/proc/driver/nvidia/version").read_text().splitlines()[0].split("  ")[1].strip()
    return found


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        name = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if name:
            return f"{name[1]}, {torch.get_num_threads()} threads"
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def free_memory() -> int:
    """Bytes of memory that this machine, or the container's limit, leaves."""
    free = []
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free.append(int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) << 10)
    folder = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # "max", or no cgroup of version 2: no limit
        free.append(int((folder / "memory.max").read_text()) - int((folder / "memory.current").read_text()))
    return min(free, default=0)
