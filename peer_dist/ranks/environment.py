"""What a run runs on: machines, devices, versions, and how ranks share the work."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import socket
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from peer_dist.machine import cpu_name, nvidia_driver
from peer_dist.ranks.rank_zero import from_every_rank

if TYPE_CHECKING:  # the doctor needs no Megatron
    from peer_dist.megatron import Parallel

PACKAGES = ("peer_dist", "torch", "megatron-core", "deepspeed", "triton", "apex", "transformer_engine", "numpy")


def environment(parallel: Parallel) -> dict[str, Any]:
    """Plain values for the record of a run. A collective call.

    Returns:
        ``hosts``: number of ranks by host and device; ``layout``: sizes of the groups; ``float32 products``: their
        precision, as torch names it; ``versions``: :func:`versions`.
    """
    devices = _devices(parallel.device)
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
        "float32 products": torch.get_float32_matmul_precision(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """The versions of all software that can change what a run does, by name; what is not installed is left out."""
    installed = {"python": platform.python_version(), "kernel": platform.release()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    installed["torch"] = torch.__version__
    if torch.version.cuda:
        installed["cuda"] = torch.version.cuda
    if torch.cuda.is_available():
        installed["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    if driver := nvidia_driver():
        installed["driver"] = driver
    return installed


def _devices(device: torch.device) -> list[str]:
    """A text with the host and the device of every rank, in the order of the ranks. A collective call."""
    host = socket.gethostname()
    if device.type == "cuda":
        return from_every_rank(f"{host}: {torch.cuda.get_device_name(device)}")
    asks = from_every_rank(host).index(host) == dist.get_rank()  # one rank of a machine: the answer can take a second
    names = {name: cpu for name, cpu in from_every_rank((host, cpu_name() if asks else None)) if cpu is not None}
    threads = from_every_rank((host, torch.get_num_threads()))
    return [f"{host}: {names[host]}, {count} threads" for host, count in threads]
