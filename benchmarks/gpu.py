"""Every figure that the GPU kernels are held to, in one run of a few minutes on one card.

    pip install -e .[bench]
    python benchmarks/gpu.py --json FILE [--omnimoe CLONE] [--memory CLONE]

Picks are uniform; the products alone, but for the last line (PEER-pytorch, retrieval included). With a clone of
github.com/flash-algo/omni-moe its experts are compared too, and with one of github.com/facebookresearch/memory its
embedding bag as the up half. Sizes can be made small to try the script where there is no GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from kernels import Case, Problem
from layer import check, twins
from measure import cached_read, device_name, large_copy, seconds, show, write_json
from torch import Tensor

from peer_dist.kernels import Picks, backend, expert_mix


def products(case: Case, device: torch.device, rounds: int, clones: dict[str, Path | None]) -> dict[str, Any]:
    """One case of the products alone: milliseconds, shares of the copy bandwidth and ratios."""
    problem = Problem(case, device)
    x, dy, down, up = (t.detach() for t in (problem.x, problem.dy, problem.down, problem.up))
    gate, picks = problem.gate.detach().reshape(-1), Picks.even(problem.expert)
    ops = backend(x, down, up)

    def backward(dtype: torch.dtype) -> tuple[Tensor, ...]:
        fresh = Picks(picks.offsets, picks.expert.view(-1))  # sorts anew
        dx, dgate, dpre, hidden = ops.backward(dy, x, fresh, pre, gate, down, up, "gelu")
        touched, grads = ops.sparse_table_grads([(dpre, x), (hidden, dy)], fresh, case.experts, dtype=dtype)
        return dx, dgate, touched, *grads

    y, pre = ops.forward(x, picks, gate, down, up, "gelu")
    with torch.no_grad():
        torch.testing.assert_close(y.to(x.dtype), problem.gathered(), rtol=2e-2, atol=2e-2)
    same = all(a.equal(b) for a, b in zip(backward(torch.float32), backward(torch.float32)))
    same = same and y.equal(ops.forward(x, picks, gate, down, up, "gelu")[0])
    (copied, copy), (cached, read) = large_copy(device), cached_read(device)
    runs: dict[str, Callable[[], Any]] = {
        "copy_ms": copy,
        "cached_read_ms": read,
        "forward_ms": lambda: ops.forward(x, picks, gate, down, up, "gelu"),
        "backward_bf16_ms": lambda: backward(torch.bfloat16),
        "backward_fp32_ms": lambda: backward(torch.float32),
        "sort_ms": lambda: Picks(picks.offsets, picks.expert.view(-1)).segments,
    }
    runs |= published(problem, clones)
    taken = {name: 1e3 * time for name, time in seconds(runs, device, rounds).items()}
    bandwidth, of_cache = 1e3 * copied / taken["copy_ms"], 1e3 * cached / taken["cached_read_ms"]
    item, distinct = down.element_size(), torch.unique(picks.expert).numel()
    tokens = 2 * x.nbytes
    by_pick, by_row = (2 * rows * case.dim * item + tokens for rows in (picks.expert.numel(), distinct))
    return {
        "experts": case.experts,
        "picks_per_expert": picks.expert.numel() / case.experts,
        "copy_GB_per_s": bandwidth / 1e9,
        "cached_read_GB_per_s": of_cache / 1e9,
        **taken,
        "forward_share_of_copy_by_pick": 1e3 * by_pick / taken["forward_ms"] / bandwidth,
        "forward_share_of_copy_by_distinct_row": 1e3 * by_row / taken["forward_ms"] / bandwidth,
        "forward_share_of_cached_read_by_pick": 1e3 * by_pick / taken["forward_ms"] / of_cache,
        "backward_over_forward_bf16": taken["backward_bf16_ms"] / taken["forward_ms"],
        "backward_over_forward_fp32": taken["backward_fp32_ms"] / taken["forward_ms"],
        "two_runs_bit_identical": same,
    }


def published(problem: Problem, clones: dict[str, Path | None]) -> dict[str, Callable[[], Any]]:
    """The forward passes of other projects' kernels, from clones beside this one, checked against ours."""
    runs: dict[str, Callable[[], Any]] = {}
    x, down, up, gate = (t.detach() for t in (problem.x, problem.down, problem.up, problem.gate))
    if clones["omnimoe"]:
        sys.path.insert(0, str(clones["omnimoe"]))
        from omni_moe.ops.triton.omni_expert import triton_omni_expert_func

        expert = problem.expert.int()
        theirs = lambda: triton_omni_expert_func(x, down, up, gate.to(x.dtype), expert)  # noqa: E731
        ours = lambda: expert_mix(x, Picks.even(problem.expert), gate.reshape(-1), down, up, "silu")  # noqa: E731
        torch.testing.assert_close(theirs(), ours(), rtol=3e-2, atol=3e-2)
        runs |= {"omnimoe_silu_ms": theirs, "ours_silu_ms": ours}
    if clones["memory"]:
        sys.path.insert(0, str(clones["memory"]))
        from lingua.product_key.xformer_embeddingbag import xformers_embedding_bag

        ops = backend(x, up)
        half = lambda: xformers_embedding_bag(problem.expert, up, gate.to(up.dtype), mode="sum")  # noqa: E731
        mine = lambda: ops.mix(gate.reshape(-1), up, Picks.even(problem.expert))  # noqa: E731
        torch.testing.assert_close(half().float(), mine().float(), rtol=3e-2, atol=3e-2)
        runs |= {"memory_up_half_ms": half, "ours_up_half_ms": mine}
    return runs


def layers(
    dim: int, experts: int, tokens: int, dtype: torch.dtype, device: torch.device, rounds: int
) -> dict[str, Any]:
    """The whole layer against PEER-pytorch's, forward and backward: milliseconds and their ratio."""
    ours, theirs = twins(dim, experts, 8, 16, device)
    x = torch.randn(1, tokens, dim, dtype=torch.float32, device=device)
    check(ours, theirs, x[:, :256])
    ours, theirs, x = ours.to(dtype), theirs.to(dtype), x.to(dtype).requires_grad_()
    dy = torch.randn_like(x)

    def both(layer: torch.nn.Module) -> Any:
        return torch.autograd.grad(layer(x), [x, *layer.parameters()], dy)

    taken = seconds({"ours": lambda: both(ours), "PEER-pytorch": lambda: both(theirs)}, device, rounds)
    return {
        **{f"{name}_both_ms": 1e3 * time for name, time in taken.items()},
        "ratio": taken["PEER-pytorch"] / taken["ours"],
    }


def main() -> None:
    """Measure what the command line asks for, and show it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--experts", type=int, default=1024**2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--omnimoe", type=Path, metavar="CLONE")
    parser.add_argument("--memory", type=Path, metavar="CLONE")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    clones = {"omnimoe": options.omnimoe, "memory": options.memory}
    base = Case(options.experts, options.dim, options.tokens, 128, "bfloat16")
    dense = Case(options.tokens * 128 // 32, options.dim, options.tokens, 128, "bfloat16")
    with torch.no_grad():
        rows = [products(case, device, options.rounds, clones) for case in (base, dense)]
    whole = layers(options.dim, options.experts, options.tokens, torch.bfloat16, device, min(3, options.rounds))
    title = f"expert_mix, d={options.dim}, {options.tokens} tokens x 128 picks, bfloat16, {device_name(device)}"
    show(title, rows)
    sparse, often = rows
    goals = [
        ("forward: share of copy bandwidth", sparse["forward_share_of_copy_by_pick"], ">=", 0.9),
        ("backward over forward, bf16 gradients", sparse["backward_over_forward_bf16"], "<=", 2.2),
        ("backward over forward, fp32 gradients", sparse["backward_over_forward_fp32"], "<=", 3.0),
        ("two runs bit-identical", sparse["two_runs_bit_identical"], ">=", True),
        # each pick's rows pass through L2, however few come from memory
        ("32 picks per expert: share of reads from L2", often["forward_share_of_cached_read_by_pick"], ">=", 0.7),
        ("layer, forward + backward, over PEER-pytorch", whole["ratio"], ">=", 20.0),
    ]
    verdicts = {}
    for name, value, sign, goal in goals:
        met = value >= goal if sign == ">=" else value <= goal
        verdicts[name] = f"{value:.3g} ({'met' if met else 'not met'}: {sign} {goal:g})"
    show("Goals", [verdicts])
    write_json(options.json, {"title": title, "torch": torch.__version__, "rows": rows, "layer": whole})


if __name__ == "__main__":
    main()
