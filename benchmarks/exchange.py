"""Bytes and time of the exchange by layout: what a grid of row and column shards sends per token.

    python benchmarks/exchange.py [--json FILE]

First by counting, at 8 to 512 ranks, for uniform picks (d = 1024, 128 picks, bfloat16 x, 4-byte gates: KB a token
and layer, forward + backward, a home's mean). Then the layer itself on 2, 4 and 8 CPU processes over gloo, float32:
bytes as sent, which must equal the count, and milliseconds.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from measure import show, write_json

from peer_dist import PEER
from peer_dist.sharding import ExpertGroups
from peer_dist.sharding.cost import exchange_bytes

DIM, TOKENS, EXPERTS, HEADS, TOP_K = 128, 2048, 256**2, 8, 16


def grids(ranks: int) -> list[tuple[int, int]]:
    return [(ranks // columns, columns) for columns in range(1, ranks + 1) if ranks % columns == 0]


def counted(ranks: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    indices = torch.randint(1024**2, (256, 128))
    rows = []
    for row_shards, column_shards in grids(ranks):
        cost = exchange_bytes(indices, 1024**2, 1024, row_shards, column_shards)
        between, inside = cost.forward + cost.backward, cost.column_forward + cost.column_backward
        rows.append(
            {
                "ranks": ranks,
                "grid": f"{row_shards} x {column_shards}",
                "between_KB": between / len(indices) / 1e3,
                "in_column_KB": inside / len(indices) / 1e3,
                "total_KB": cost.total / len(indices) / 1e3,
                "row_shards_hit": cost.hits,
            }
        )
    for row in rows:
        row["over_row_only"] = row["total_KB"] / rows[0]["total_KB"]
        row["over_column_only"] = row["total_KB"] / rows[-1]["total_KB"]
    return rows


def run(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{ranks}", rank=rank, world_size=ranks)
    rows = []
    for row_shards, column_shards in grids(ranks):
        groups = ExpertGroups.over(dist.group.WORLD, column_shards)
        layer = PEER(DIM, EXPERTS, HEADS, TOP_K, 64, query_norm="none", seed=0, group=groups, sparse_grad=True)
        torch.manual_seed(rank)
        x = torch.randn(TOKENS // ranks, DIM, requires_grad=True)
        picked: list[torch.Tensor] = []
        layer.on_route = lambda indices, gates, picked=picked: picked.append(indices.flatten(1))
        times = []
        for _ in range(6):
            layer.traffic.reset()
            dist.barrier()
            begin = time.perf_counter()
            torch.autograd.grad(layer(x).sum(), [x, layer.down, layer.up])
            dist.barrier()
            times.append(time.perf_counter() - begin)
        cost = exchange_bytes(picked[-1], EXPERTS, DIM, row_shards, column_shards, rank, 4, 4)
        sizes = 16 * (row_shards - 1 + (column_shards - 1) * row_shards)
        totals = torch.tensor([layer.traffic.bytes_sent - sizes, cost.total], dtype=torch.float64)
        dist.all_reduce(totals)
        sent, counted_bytes = totals.tolist()
        assert abs(sent - counted_bytes) <= 2 * ranks * column_shards, (sent, counted_bytes)  # the ring's last byte
        row = {"ranks": ranks, "grid": f"{row_shards} x {column_shards}", "sent_KB": sent / TOKENS / 1e3}
        rows.append({**row, "counted_KB": counted_bytes / TOKENS / 1e3, "both_ms": 1e3 * sorted(times[1:])[2]})
    if rank == 0:
        Path(folder, "rows.json").write_text(json.dumps(rows))
    dist.barrier()
    os._exit(0)  # gloo's teardown is not what is measured


def measured(ranks: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(run, (ranks, folder), nprocs=ranks)
        rows: list[dict[str, Any]] = json.loads(Path(folder, "rows.json").read_text())
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    by_count = {ranks: counted(ranks) for ranks in (8, 64, 512)}
    for ranks, rows in by_count.items():
        show(f"{ranks} ranks, counted: d=1024, 128 uniform picks, bfloat16, forward + backward", rows)
    by_run = [row for ranks in (2, 4, 8) for row in measured(ranks)]
    show(f"{TOKENS} tokens in all, d={DIM}, {HEADS} x {TOP_K} picks, float32, {os.cpu_count()} cores", by_run)
    write_json(options.json, {"counted": by_count, "measured": by_run})


if __name__ == "__main__":
    main()
