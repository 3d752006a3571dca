"""expert_mix on fixed picks against gather + einsum, as ratios in one run.

    python benchmarks/kernels.py                       the headline comparison for this machine's device
    python benchmarks/kernels.py --sweep experts       N from 64k to 4M at equal picks (also: picks, dim, tokens,
                                                       skew, density)
    python benchmarks/kernels.py --json FILE           what plot.py draws
    python benchmarks/kernels.py --formats             the same tables in all formats, those of eight bits too; the
                                                       processor's time on a CPU

The floor of the forward is the distinct rows of both tables read once, plus x and y, at the copy bandwidth
measured in the same run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import device_name, extra_bytes, large_copy, seconds, show, write_json
from torch import Tensor

from peer_dist.kernels import Picks, expert_mix, huge_pages
from peer_dist.kernels.eight_bit import CODES, let_scales, quantised
from peer_dist.kernels.pending import ask_for_sums, pending_sums
from peer_dist.sharding.cost import synthetic_picks


@dataclass(frozen=True)
class Case:
    """Sizes of one comparison; ``zipf`` 0 picks uniformly, else with that exponent."""

    experts: int = 1024**2
    dim: int = 256
    tokens: int = 2048
    picks: int = 128
    dtype: str = "float32"
    zipf: float = 0.0


class Problem:
    """Tables, tokens and picks of a case."""

    def __init__(self, case: Case, device: torch.device) -> None:
        """Draw them, always the same ones."""
        torch.manual_seed(0)
        dtype = torch.float32 if case.dtype in CODES else getattr(torch, case.dtype)
        self.down, self.up = (
            huge_pages(torch.empty(case.experts, case.dim, device=device, dtype=dtype)).normal_(0, case.dim**-0.5)
            for _ in range(2)
        )
        if case.dtype in CODES:
            self.down, self.up = (_of_eight_bits(table, CODES[case.dtype]) for table in (self.down, self.up))
        self.x = torch.randn(case.tokens, case.dim, device=device, dtype=dtype)
        self.expert = synthetic_picks(case.experts, case.tokens, case.picks, case.zipf, device)
        self.gate = torch.rand(case.tokens, case.picks, dtype=torch.float32, device=device)
        self.dy = torch.randn_like(self.x)
        self.leaves = [self.x, self.gate]
        if case.dtype not in CODES:
            self.leaves += [self.down, self.up]
        for leaf in self.leaves:
            leaf.requires_grad_()

    def ours(self) -> Tensor:
        """``[tokens, dim]`` by :func:`expert_mix`."""
        picks = Picks.even(self.expert)
        return expert_mix(self.x, picks, self.gate.reshape(-1), self.down, self.up, "gelu", sparse_grad=True)

    def gathered(self) -> Tensor:
        """What public layers do: both tables' rows as [tokens, picks, dim]; sparse table gradients here too."""
        down = F.embedding(self.expert, self.down, sparse=True)
        up = F.embedding(self.expert, self.up, sparse=True)
        hidden = F.gelu(torch.einsum("td,tkd->tk", self.x, down)) * self.gate.to(self.x.dtype)
        return torch.einsum("tk,tkd->td", hidden, up)

    def backward(self, y: Tensor) -> tuple[Tensor, ...]:
        """``y``, and its gradients to x, gates and tables for the output's gradient ``dy``."""
        return y, *torch.autograd.grad(y, self.leaves, self.dy)

    def all_gradients(self) -> None:
        """Both directions, and the gradients of the rows picked, which tables of eight bits are owed after it."""
        self.backward(self.ours())
        for table in (self.down, self.up):
            for left in pending_sums(table) or ():
                left.gradient(table)
        for table in (self.down, self.up):
            (pending_sums(table) or []).clear()


def _of_eight_bits(table: Tensor, dtype: torch.dtype) -> Tensor:
    """A table's codes, with their scales; blocks of rows, because rounding has temporaries."""
    codes = huge_pages(torch.empty(table.shape, dtype=dtype, device=table.device))
    scales = torch.empty(len(table), dtype=torch.float32, device=table.device)
    for begin in range(0, len(table), 1 << 14):
        block = slice(begin, begin + (1 << 14))
        codes[block], scales[block] = quantised(table[block], dtype)
    let_scales(codes, scales)
    ask_for_sums(codes)
    return codes


def measure(case: Case, device: torch.device, rounds: int) -> dict[str, Any]:
    """One case: seconds, ratios, memory and share of the copy bandwidth; outputs are compared first."""
    problem = Problem(case, device)
    copied, copy = large_copy(device)
    item = problem.down.element_size()
    distinct = torch.unique(problem.expert).numel()
    read_once = 2 * distinct * case.dim * item + 2 * problem.x.nbytes
    per_pick = 2 * problem.expert.numel() * case.dim * item + 2 * problem.x.nbytes
    row: dict[str, Any] = {**asdict(case), "picks_per_expert": case.tokens * case.picks / case.experts}

    def forward(run: Callable[[], Tensor]) -> Tensor:
        with torch.no_grad():
            return run()

    torch.testing.assert_close(forward(problem.ours), forward(problem.gathered), rtol=2e-2, atol=2e-2)
    weights = problem.gate.detach().to(problem.x.dtype)
    runs = {
        "copy_ms": copy,
        "forward_ms": lambda: forward(problem.ours),
        "gather_forward_ms": lambda: forward(problem.gathered),
        "up_half_embedding_bag_ms": lambda: F.embedding_bag(
            problem.expert, problem.up.detach(), per_sample_weights=weights, mode="sum"
        ),
        "both_ms": lambda: problem.backward(problem.ours()),
        "gather_both_ms": lambda: problem.backward(problem.gathered()),
    }
    row |= {name: 1e3 * time for name, time in seconds(runs, device, rounds).items()}
    bandwidth = 1e3 * copied / row["copy_ms"]
    row["copy_GB_per_s"] = bandwidth / 1e9
    row["forward_ratio"] = row["gather_forward_ms"] / row["forward_ms"]
    row["both_ratio"] = row["gather_both_ms"] / row["both_ms"]
    row["forward_over_floor"] = row["forward_ms"] / 1e3 * bandwidth / read_once
    row["forward_GB_per_s_by_pick"] = per_pick / row["forward_ms"] / 1e6
    row["share_of_copy_bandwidth"] = per_pick / (row["forward_ms"] / 1e3) / bandwidth
    row["both_extra_MB"] = extra_bytes(lambda: problem.backward(problem.ours()), device) / 1e6
    row["gather_both_extra_MB"] = extra_bytes(lambda: problem.backward(problem.gathered()), device) / 1e6
    return row


def compare_formats(case: Case, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of the forward pass, and of both with all gradients, of the same tables in every format."""
    problems = {dtype: Problem(replace(case, dtype=dtype), device) for dtype in ("float32", "bfloat16", *CODES)}
    runs: dict[str, Callable[[], Any]] = {}
    for dtype, problem in problems.items():
        runs[f"forward {dtype}"] = torch.no_grad()(problem.ours)
        runs[f"both {dtype}"] = problem.all_gradients
    took = seconds(runs, device, rounds, clock=time.perf_counter if device.type == "cuda" else time.process_time)
    rows = []
    for dtype, problem in problems.items():
        row: dict[str, Any] = {**asdict(replace(case, dtype=dtype))}
        row["bytes_a_row"] = problem.down[0].nbytes + (4 if dtype in CODES else 0)
        for name in ("forward", "both"):
            row[f"{name}_ms"] = 1e3 * took[f"{name} {dtype}"]
            for other in ("float32", "bfloat16"):
                row[f"{name}_over_{other}"] = took[f"{name} {dtype}"] / took[f"{name} {other}"]
        rows.append(row)
    return rows


SWEEPS: dict[str, tuple[str, list[Case]]] = {
    "experts": ("experts", [Case(experts=n**2) for n in (256, 512, 1024, 2048)]),
    "picks": ("picks", [Case(picks=p) for p in (32, 64, 128, 256, 512)]),
    "dim": ("dim", [Case(dim=d, experts=512**2, tokens=512) for d in (256, 512, 1024, 2048, 4096)]),
    "tokens": ("tokens", [Case(tokens=t, picks=32) for t in (1024, 4096, 16384, 65536)]),
    "skew": ("zipf", [Case(zipf=z) for z in (0.0, 0.6, 0.9, 1.2)]),
    # picks per expert: 0.25, 8 and 32 (the paper's batch)
    "density": ("picks_per_expert", [Case(experts=n) for n in (2048 * 128 * 4, 2048 * 128 // 8, 2048 * 128 // 32)]),
}


def main() -> None:
    """Measure what the command line asks for, and show it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sweep", choices=list(SWEEPS))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the headline comparison")
    parser.add_argument("--formats", action="store_true")
    parser.add_argument("--experts", type=int, help="of the comparison of formats; 512**2 by default")
    parser.add_argument("--rounds", type=int, help="15 by default, 3 in a sweep")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.sweep:
        key, cases = SWEEPS[options.sweep]
        rows = [measure(case, device, options.rounds or 3) for case in cases]
    elif options.formats:
        key, experts = None, options.experts or 512**2
        rows = []
        for dim, number in ((256, experts), (1024, experts // 4)):
            rows += compare_formats(Case(experts=number, dim=dim, tokens=512), device, options.rounds or 15)
    else:
        key = None
        base = Case() if device.type == "cpu" else Case(dim=1024, tokens=8192, dtype="bfloat16")
        base = replace(base, dtype=options.dtype or base.dtype)
        rows = [measure(case, device, options.rounds or 15) for case in (base, replace(base, experts=256**2))]
    show(f"expert_mix on {device_name(device)}", rows)
    results = {"device": device_name(device), "torch": torch.__version__, "sweep": options.sweep, "over": key}
    write_json(options.json, {**results, "rows": rows})


if __name__ == "__main__":
    main()
