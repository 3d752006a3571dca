"""Rows at random of a table in a scratch file, past the page cache, against the page cache, as ratios in one run.

    python benchmarks/disk.py FOLDER [--gigabytes 4] [--json FILE]

"ours" is what tables use. "cached" makes the same requests, as many at once, through the page cache. "mapping"
indexes the mapped tensor. All begin with an empty page cache, as where tables are far larger than memory, and end when
what they have written is on the disk. "fresh" rows are written to space that nothing was written to before.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import show, write_json
from torch import Tensor

from peer_dist.kernels import disk


def rows_per_second(table: Tensor, count: int, rounds: int, writes: bool) -> dict[str, float]:
    """The median of each way, each with rows of its own in every round."""
    place = disk._place(table)
    if place is None or place[0].sector == 1:
        raise SystemExit("this disk has no way past the page cache, or there is no C compiler")
    file, values = place[0], torch.ones(count, table.shape[1], dtype=table.dtype, device="cpu")
    sector, flags = file.sector, fcntl.fcntl(file.descriptor, fcntl.F_GETFL)

    def ours(rows: Tensor, part: Tensor) -> None:
        (disk.write_rows if writes else disk.read_rows)(table, rows, part)

    def cached(rows: Tensor, part: Tensor) -> None:
        file.sector = 1
        fcntl.fcntl(file.descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        wrong, _ = disk._in_c(file, 0, len(table), table[0].nbytes, rows, disk._bytes(part), writes)
        os.fdatasync(file.descriptor)
        file.sector = sector
        fcntl.fcntl(file.descriptor, fcntl.F_SETFL, flags)
        assert not wrong

    def mapping(rows: Tensor, part: Tensor) -> None:
        if writes:
            table[rows] = part
            os.fdatasync(file.descriptor)
        else:
            torch.index_select(table, 0, rows, out=part)

    ways: dict[str, Callable[[Tensor, Tensor], None]] = {"ours": ours, "cached": cached, "mapping": mapping}
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            rows = torch.randint(len(table), (count,), dtype=torch.int64, device="cpu").unique()
            file.leave_mapping()
            disk._forget(file)
            begin = time.perf_counter()
            way(rows, values[: len(rows)])
            found[name].append(len(rows) / (time.perf_counter() - begin))
    return {name: statistics.median(each) for name, each in found.items()}


def measure(folder: Path, row_bytes: int, size: int, rounds: int) -> list[dict[str, Any]]:
    """Rows of one size: fresh ones written, then all of the table, then some read and written."""
    length, results = size // row_bytes, []
    table = disk.mapped((length, row_bytes), torch.uint8, folder)

    def note(what: str, found: dict[str, float]) -> None:
        ratios = {f"ours over {name}": found["ours"] / found[name] for name in ("cached", "mapping")}
        results.append({"rows": f"{row_bytes} bytes, {what}", **found, **ratios})

    note("fresh, written", rows_per_second(table, 4096, 1, writes=True))
    step = max((1 << 24) // row_bytes, 1)
    for rows in torch.arange(length, dtype=torch.int64, device="cpu").split(step):
        disk.write_rows(table, rows, torch.ones(len(rows), row_bytes, dtype=torch.uint8, device="cpu"))
    note("read", rows_per_second(table, 8192, rounds, writes=False))
    note("written", rows_per_second(table, 8192, rounds, writes=True))
    return results


def main() -> None:
    """Measure rows of 4 bytes to 4 KiB, and show them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = []
    for row_bytes in (4, 1024, 2048, 4096):
        size = int(options.gigabytes * 1e9) // (16 if row_bytes == 4 else 1)
        results = measure(options.folder, row_bytes, size, options.rounds)
        show("rows a second", results)
        found += results
    rates = disk.disk_rates(options.folder, 1024)._asdict()
    show("bytes a second, rows of 1024 bytes", [rates])
    write_json(options.json, {"torch": torch.__version__, "rows": found, "rates": rates})


if __name__ == "__main__":
    main()
