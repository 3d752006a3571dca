"""What is worked out of picks, against the way it was done before.

    python benchmarks/picks.py [--json FILE]

First the order of 128 uniform picks a token by expert, with their tokens: by a sort of 32-bit keys, against one of 64
bits. Then the sum at home of what the owners of experts sent: by the mix, against casts and index_add shard by shard.
Every token has a row from each of 8 row shards, as with 128 uniform picks. Results are compared first, bit for bit on a
CPU. ``read_once`` is the share that moving each row and each sum once would take at the copy bandwidth of the moment.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import device_name, large_copy, seconds, show, write_json
from torch import Tensor

from peer_dist.kernels import Picks, sum_rows
from peer_dist.kernels.picks import ByExpert

SHARDS, TOKENS, DIM, PICKS = 8, 2048, 1024, 128


@dataclass(frozen=True)
class Case:
    """How many shards of the columns send, and in what dtype."""

    columns: int
    dtype: str

    def sent(self, device: torch.device) -> list[Tensor]:
        """``[tokens, columns]`` from every row shard's owner of the first columns, then of the next."""
        generator, shape = torch.Generator(device).manual_seed(0), (TOKENS, DIM // self.columns)
        pieces = SHARDS * self.columns
        dtype = getattr(torch, self.dtype)
        return [
            torch.randn(shape, generator=generator, dtype=torch.float32, device=device).to(dtype) for _ in range(pieces)
        ]


def former(case: Case, token: Tensor, rows: Tensor) -> Tensor:
    """Shard by shard, each piece cast and added to all of the sum."""
    out = torch.zeros(TOKENS, DIM, dtype=torch.float32, device=rows.device)
    pieces = iter(rows.split(rows.numel() // (SHARDS * case.columns)))
    for _ in range(SHARDS):
        for columns in out.split(DIM // case.columns, 1):
            columns.index_add_(0, token, next(pieces).view(TOKENS, -1).float())
    return out.to(rows.dtype)


def present(case: Case, picks: Picks, rows: Tensor) -> Tensor:
    """As :meth:`peer_dist.sharding.exchange.ExchangePlan.add_rows_at_home` does."""
    if case.columns == 1:
        return sum_rows(rows.view(-1, DIM), picks, rows.dtype)
    pieces = rows.view(SHARDS, case.columns, TOKENS, DIM // case.columns).unbind(1)
    return torch.cat([sum_rows(piece.reshape(SHARDS * TOKENS, -1), picks, rows.dtype) for piece in pieces], 1)


def measure(case: Case, device: torch.device, rounds: int) -> dict[str, Any]:
    """Milliseconds of both and of the plan of the new one, and ratios."""
    rows = torch.cat([piece.flatten() for piece in case.sent(device)])
    token = torch.arange(TOKENS, dtype=torch.int64, device=device)
    plan = partial(Picks.of_rows, token.repeat(SHARDS), TOKENS)
    picks = plan()
    same = former(case, token, rows).equal(present(case, picks, rows))
    assert same or device.type != "cpu"
    copied, copy = large_copy(device)
    runs: dict[str, Callable[[], Any]] = {
        "copy_ms": copy,
        "former_ms": lambda: former(case, token, rows),
        "present_ms": lambda: present(case, picks, rows),
        "plan_ms": plan,
    }
    taken = {name: 1e3 * time for name, time in seconds(runs, device, rounds).items()}
    moved = rows.nbytes * (SHARDS + 1) / SHARDS
    return {
        "columns": case.columns,
        "dtype": case.dtype,
        **taken,
        "ratio": taken["former_ms"] / taken["present_ms"],
        "read_once": moved / copied * taken["copy_ms"] / taken["present_ms"],
        "same_bits": same,
    }


def former_order(picks: Picks) -> tuple[Tensor, ...]:
    """The numbers in order, the order and its tokens, all of 64 bits."""
    ascending, pick = torch.sort(picks.expert, stable=True)
    ids = torch.arange(picks.tokens, dtype=torch.int64, device=pick.device)
    token = torch.repeat_interleave(ids, picks.offsets.diff(), output_size=len(pick))
    return ascending, pick, token[pick]


def present_order(picks: Picks) -> tuple[Tensor, ...]:
    """The same, of 32 bits."""
    order = ByExpert.of(Picks(picks.offsets, picks.expert))
    return order.expert, order.pick, order.token


def measure_order(rows: int, device: torch.device, rounds: int) -> dict[str, Any]:
    """Milliseconds of both, and their ratio."""
    generator = torch.Generator(device).manual_seed(0)
    picks = Picks.even(torch.randint(rows, (TOKENS, PICKS), generator=generator, dtype=torch.int64, device=device))
    assert all(a.equal(b.long()) for a, b in zip(former_order(picks), present_order(picks)))
    runs: dict[str, Callable[[], Any]] = {
        "former_ms": lambda: former_order(picks),
        "present_ms": lambda: present_order(picks),
    }
    taken = {name: 1e3 * time for name, time in seconds(runs, device, rounds).items()}
    return {"rows": rows, **taken, "ratio": taken["former_ms"] / taken["present_ms"]}


def main() -> None:
    """Measure all cases, and show them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    orders = [measure_order(rows, device, options.rounds) for rows in (256**2, 1024**2)]
    show(f"{TOKENS * PICKS} picks by expert, {device_name(device)}", orders)
    rows = [
        measure(Case(columns, dtype), device, options.rounds) for dtype in ("bfloat16", "float32") for columns in (1, 2)
    ]
    show(f"combine at home, {TOKENS} tokens, {SHARDS} row shards, d={DIM}, {device_name(device)}", rows)
    write_json(
        options.json, {"device": device_name(device), "torch": torch.__version__, "order": orders, "combine": rows}
    )


if __name__ == "__main__":
    main()
