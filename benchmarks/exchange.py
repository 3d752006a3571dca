"""Bytes and time of the exchange by layout: what a grid of row and column shards sends per token.

    python benchmarks/exchange.py [--overlap] [--json FILE]

First by counting, at 8 to 512 ranks, for uniform picks (d = 1024, 128 picks, bfloat16 x, 4-byte gates: KB a token
and layer, forward + backward, a home's mean). Then the layer itself on 2, 4 and 8 CPU processes over gloo, float32:
bytes as sent, which must equal the count, and milliseconds.

With ``--overlap`` instead: how much of the exchange hides behind the experts where tokens travel in 1, 2 and 4 parts,
with and without a dense block beside, on 2 and 4 processes of one thread. Forward + backward of ``routed_experts`` on
fixed uniform picks is timed as it is (both), with nothing on the wire (compute: every all-to-all returns at once), and
the same all-to-alls one after the other with nothing else (exchange).
hidden = (compute + exchange - both) / min(compute, exchange): 1 if the shorter hides behind the longer, 0 if they take
turns, less if they are in each other's way. waiting is what a pass spends waiting for collectives, the counts' and the
end of the slowest rank included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F
from measure import seconds, show, write_json

from peer_dist import PEER
from peer_dist.kernels import huge_pages
from peer_dist.sharding import ExpertGroups, GridLayout, Traffic, routed_experts
from peer_dist.sharding.cost import exchange_bytes

DIM, TOKENS, EXPERTS, HEADS, TOP_K = 128, 2048, 256**2, 8, 16
FLOATS: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
NUMBERS: dict[str, Any] = {"dtype": torch.int64, "device": "cpu"}
OVERLAPS = {"much to send": {"dim": 1024, "picks": 8}, "much to compute": {"dim": 256, "picks": 128}}


def grids(ranks: int) -> list[tuple[int, int]]:
    """All ``(row shards, column shards)`` of so many ranks."""
    return [(ranks // columns, columns) for columns in range(1, ranks + 1) if ranks % columns == 0]


def counted(ranks: int) -> list[dict[str, Any]]:
    """A row for every grid of ``ranks``: KB per token as counted, and over those of the pure layouts."""
    torch.manual_seed(0)
    indices = torch.randint(1024**2, (256, 128), **NUMBERS)
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
    """A rank: bytes as sent, which must equal those counted, and time, for every grid; rank 0 writes ``rows.json``."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{ranks}", rank=rank, world_size=ranks)
    rows = []
    for row_shards, column_shards in grids(ranks):
        groups = ExpertGroups.over(dist.group.WORLD, column_shards)
        layer = PEER(
            DIM, EXPERTS, HEADS, TOP_K, 64, query_norm="none", seed=0, group=groups, sparse_grad=True, **FLOATS
        )
        torch.manual_seed(rank)
        x = torch.randn(TOKENS // ranks, DIM, requires_grad=True, **FLOATS)
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
        totals = torch.tensor([layer.traffic.bytes_sent - sizes, cost.total], dtype=torch.float64, device="cpu")
        dist.all_reduce(totals)
        sent, counted_bytes = totals.tolist()
        assert abs(sent - counted_bytes) <= 2 * ranks * column_shards, (sent, counted_bytes)  # the ring's last byte
        row = {"ranks": ranks, "grid": f"{row_shards} x {column_shards}", "sent_KB": sent / TOKENS / 1e3}
        rows.append({**row, "counted_KB": counted_bytes / TOKENS / 1e3, "both_ms": 1e3 * sorted(times[1:])[2]})
    if rank == 0:
        Path(folder, "rows.json").write_text(json.dumps(rows))
    dist.barrier()
    os._exit(0)  # gloo's teardown is not what is measured


class Wire:
    """Stands in for torch's ``all_to_all_single``, to measure a pass without it and it without the pass."""

    def __init__(self) -> None:
        """Begin with nothing recorded, and let collectives through."""
        self.send = dist.all_to_all_single
        self.record: list[tuple[tuple[Any, ...], torch.Tensor]] | None = None
        self.answers: Iterator[torch.Tensor] | None = None
        self.waiting = 0.0  # seconds since it was last set to 0

    def __call__(self, out: torch.Tensor, x: torch.Tensor, *sizes: Any, async_op: bool = False, group: Any) -> Any:
        """As ``all_to_all_single``: send, record, or answer from the record, by what is set."""
        if self.answers is not None:  # nothing travels; numbers, which sizes depend on, are those of the recorded pass
            answer = next(self.answers)
            if not out.is_floating_point():
                out.copy_(answer)
            return self
        if self.record is not None:
            self.send(out, x, *sizes, group=group)
            self.record.append(((torch.empty_like(out), x.clone(), *sizes), out.clone()))
            return self
        work = self.send(out, x, *sizes, group=group, async_op=True)
        if async_op:
            return Clocked(self, work)
        self.clock(work.wait)
        return None

    def clock(self, wait: Callable[[], Any]) -> None:
        """Call ``wait`` and add its seconds to ``waiting``."""
        begin = time.perf_counter()
        wait()
        self.waiting += time.perf_counter() - begin

    def wait(self) -> None:
        """Of work that is done."""


class Clocked:
    """Work whose time of waiting is counted."""

    def __init__(self, wire: Wire, work: dist.Work) -> None:
        """Take over ``work``, whose waiting ``wire`` counts."""
        self.wire, self.work = wire, work

    def wait(self) -> None:
        """Wait for the work."""
        self.wire.clock(self.work.wait)


def overlap(rank: int, ranks: int, folder: str) -> None:
    """A rank: time with, without and of the exchange alone, for every case; rank 0 writes ``rows.json``."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # what is read where nothing travelled is whatever lay in memory
    dist.init_process_group("gloo", init_method=f"file://{folder}/{ranks}", rank=rank, world_size=ranks)
    wire = dist.all_to_all_single = Wire()
    rows = []
    for case, sizes in OVERLAPS.items():
        dim, picks = sizes["dim"], sizes["picks"]
        torch.manual_seed(rank)
        layout = GridLayout(EXPERTS, dim, ExpertGroups.over(dist.group.WORLD))
        x, dy = torch.randn(2, TOKENS // ranks, dim, **FLOATS)
        gates = torch.rand(len(x), picks, requires_grad=True, **FLOATS)
        indices = torch.randint(EXPERTS, (len(x), picks), **NUMBERS)
        tables = [huge_pages(torch.randn(len(layout.rows), dim, **FLOATS)).requires_grad_() for _ in range(2)]
        dense = [torch.randn(*shape, **FLOATS).requires_grad_() for shape in ((dim // 4, dim), (dim, dim // 4))]
        x.requires_grad_()

        def both(
            chunks: int,
            beside: bool,
            leaves: tuple[torch.Tensor, ...] = (x, gates, *tables),
            dense: list[torch.Tensor] = dense,
            dy: torch.Tensor = dy,
            indices: torch.Tensor = indices,
            layout: GridLayout = layout,
        ) -> None:
            halves = (lambda x: F.gelu(F.linear(x, dense[0])), lambda h: F.linear(h, dense[1])) if beside else None
            x, gates, down, up = leaves
            y = routed_experts(x, indices, gates, down, up, "gelu", layout, Traffic(), True, chunks, halves)
            torch.autograd.grad(y, [*leaves, *dense] if beside else leaves, dy)
            wire.clock(dist.barrier)

        def clocked(waits: list[float], both: Callable[[], None]) -> None:
            wire.waiting = 0.0
            both()
            waits.append(wire.waiting)

        def compute(chunks: int, beside: bool, recorded: list[Any], both: Any = both) -> None:
            wire.answers = iter([answer for _, answer in recorded])
            both(chunks, beside)
            wire.answers = None

        def exchange(recorded: list[Any]) -> None:
            for arguments, _ in recorded:
                wire.send(*arguments)
            dist.barrier()

        calls: dict[str, Callable[[], Any]] = {}
        waits: dict[str, list[float]] = {}
        for chunks in (1, 2, 4):
            wire.record = recorded = []
            both(chunks, False)
            wire.record = None
            calls[f"exchange {chunks}"] = partial(exchange, recorded)
            for beside in (False, True):
                calls[f"compute {chunks} {beside}"] = partial(compute, chunks, beside, recorded)
                name = f"both {chunks} {beside}"
                calls[name] = partial(clocked, waits.setdefault(name, []), partial(both, chunks, beside))
        taken = seconds(calls, x.device)
        for beside in (False, True):
            for chunks in (1, 2, 4):
                alone, wired = taken[f"compute {chunks} {beside}"], taken[f"exchange {chunks}"]
                together = taken[f"both {chunks} {beside}"]
                rows.append(
                    {
                        "ranks": ranks,
                        "case": f"{case}: d={dim}, {picks} picks",
                        "dense_hidden": dim // 4 if beside else 0,
                        "parts": chunks,
                        "compute_ms": 1e3 * alone,
                        "exchange_ms": 1e3 * wired,
                        "both_ms": 1e3 * together,
                        "waiting_ms": 1e3 * statistics.median(waits[f"both {chunks} {beside}"]),
                        "hidden": (alone + wired - together) / min(alone, wired),
                    }
                )
    if rank == 0:
        Path(folder, "rows.json").write_text(json.dumps(rows))
    dist.barrier()
    os._exit(0)


def measured(ranks: int, run: Callable[[int, int, str], None] = run) -> list[dict[str, Any]]:
    """The rows that rank 0 writes when ``run`` is started on so many processes."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(run, (ranks, folder), nprocs=ranks)
        rows: list[dict[str, Any]] = json.loads(Path(folder, "rows.json").read_text())
    return rows


def main() -> None:
    """Measure what the command line asks for, and show it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--overlap", action="store_true", help="how much of the exchange hides behind the experts")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.overlap:
        rows = [row for ranks in (2, 4) for row in measured(ranks, overlap)]
        for number in range(0, len(rows), 6):
            show(f"{TOKENS} tokens in all, float32, {os.cpu_count()} cores, gloo over loopback", rows[number:][:6])
        write_json(options.json, {"overlap": rows})
        return
    by_count = {ranks: counted(ranks) for ranks in (8, 64, 512)}
    for ranks, rows in by_count.items():
        show(f"{ranks} ranks, counted: d=1024, 128 uniform picks, bfloat16, forward + backward", rows)
    by_run = [row for ranks in (2, 4, 8) for row in measured(ranks)]
    show(f"{TOKENS} tokens in all, d={DIM}, {HEADS} x {TOP_K} picks, float32, {os.cpu_count()} cores", by_run)
    write_json(options.json, {"counted": by_count, "measured": by_run})


if __name__ == "__main__":
    main()
