"""Checkpoints against the disk: bytes per second of saving and loading a model that is nearly all tables, on 2 ranks.

    python benchmarks/checkpoint.py [--experts 262144 --dim 512 --dtype float32] [--folder DIR] [--json FILE]

In each round, in turns: both ranks write plain files of the size of their checkpoint's, in blocks, and sync them; save;
read the plain files; verify the checkpoint (its checksums); load it. Before anything is read, the system is asked to
forget the pages of the file. All times are those of the slower rank, the medians of the rounds. Growth is that of a
rank's resident memory, at most, beside the tables that it holds anyway.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from measure import show, write_json

from peer_dist.megatron.dist_checkpoint import BUFFER_BYTES

RANKS, BLOCK = 2, BUFFER_BYTES // 2
NAMES = ("plain write", "save", "plain read", "verify", "load")


def config(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """A run's config: one PEER layer with its tables over :data:`RANKS` ranks, as a tree."""
    bf16 = options.dtype == "bfloat16"
    return {
        "model": {"num_layers": 1, "hidden_size": options.dim, "num_attention_heads": 4, "mlp": ["peer"]}
        | {"ffn_hidden_size": options.dim, "seq_length": 64},
        "peer": {"num_experts": options.experts, "table_dtype": options.dtype},
        "parallel": {"expert": RANKS},
        "table_optimizer": {"name": "rowwise_adagrad", "lazy": True, "stochastic_rounding": bf16},
        "data": {"prefix": f"{folder}/text"},
        "train": {"micro_batch_size": 1, "global_batch_size": RANKS, "precision": "fp32"},
        "checkpoint": {"dir": f"{folder}/checkpoints", "keep": 1},
        "logging": {"dir": f"{folder}/logs"},
    }


def write(path: Path, size: int) -> None:
    """Write ``size`` random bytes to a file in blocks, and sync it to the disk."""
    block = memoryview(os.urandom(BLOCK))
    with path.open("wb") as file:
        for begin in range(0, size, BLOCK):
            file.write(block[: size - begin])
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> None:
    """Read a file to its end, in blocks."""
    block = memoryview(bytearray(BLOCK))
    with path.open("rb", buffering=0) as file:
        while file.readinto(block):
            pass


def forget(folder: Path) -> None:
    """Take the files' pages out of the system's cache; they are on the disk."""
    for path in folder.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def resident(key: str) -> int:
    """Bytes of a line of ``/proc/self/status``, such as VmRSS."""
    line = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert line is not None
    return int(line[1]) << 10


def run(rank: int, options: argparse.Namespace, folder: str) -> None:
    """A rank: time every action of :data:`NAMES` in turns; rank 0 writes ``rows.json`` into ``folder``."""
    from peer_dist.checkpoints.manifest import read_manifest
    from peer_dist.checkpoints.state import restore_run
    from peer_dist.checkpoints.store import verify_checkpoint
    from peer_dist.config import parse_config
    from peer_dist.data.prepare import prepare
    from peer_dist.training import Trainer

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    if rank == 0:
        prepare(None, Path(folder, "text"))
    dist.barrier()
    trainer = Trainer(parse_config(config(options, folder), "benchmark"))
    trainer.step()
    path, plain = trainer.save(), Path(folder, "plain")
    plain.mkdir(exist_ok=True)
    files = {name: size for name, (size, _) in read_manifest(path)["files"].items()}
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    growth = dict.fromkeys(NAMES, 0)

    def timed(name: str, action: Callable[..., Any], *args: Any) -> Any:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = resident("VmRSS")
        dist.barrier()
        begin = time.perf_counter()
        result = action(*args)
        dist.barrier()
        seconds[name].append(time.perf_counter() - begin)
        growth[name] = max(growth[name], resident("VmHWM") - before)
        return result

    for _ in range(options.rounds):
        timed("plain write", write, plain / str(rank), files[f"__{rank}_0.distcp"])
        trainer.steps_done += 1
        path = timed("save", trainer.save)
        forget(plain)
        timed("plain read", read, plain / str(rank))
        forget(path)
        timed("verify", verify_checkpoint, path)
        forget(path)
        timed("load", restore_run, path, trainer.model, trainer.engine, trainer.parallel, 1)
    size = sum(files.values())
    most = torch.tensor([growth[name] for name in NAMES], dtype=torch.int64, device="cpu")
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    if rank == 0:
        rows = [
            {
                "what": name,
                "seconds": statistics.median(seconds[name]),
                "GB_per_second": size / 1e9 / statistics.median(seconds[name]),
                "growth_MB": grown / 1e6,
            }
            for name, grown in zip(NAMES, most.tolist())
        ]
        Path(folder, "rows.json").write_text(json.dumps([size, rows]))
    dist.barrier()
    os._exit(0)


def main() -> None:
    """Measure what the command line asks for, and show it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=262144)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write: the disk that is measured (a temporary folder)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        multiprocessing.spawn(run, (options, folder), nprocs=RANKS)
        size, rows = json.loads(Path(folder, "rows.json").read_text())
    title = f"{size / 1e9:.2f} GB, {2 * options.experts * options.dim / 1e6:.0f}M expert parameters, {RANKS} ranks"
    show(title, rows)
    write_json(options.json, {"title": title, "torch": torch.__version__, "rows": rows})


if __name__ == "__main__":
    main()
