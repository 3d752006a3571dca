"""What a step takes on one card, part by part, each beside the least that its bytes and FLOPs take there.

    pip install -e .[bench]
    python benchmarks/gpu.py --json FILE [--omnimoe CLONE] [--memory CLONE]
    torchrun --standalone --nproc-per-node 2 benchmarks/gpu.py    (the exchange over two cards)

In under 5 minutes (--limit). A part that fails says so in a sentence, and the others go on; one for which no time is
left says that. Floors are at the speeds of a copy and of a matrix product that are measured in the same run; picks are
uniform. With a clone of github.com/flash-algo/omni-moe its experts are compared too, and with one of
github.com/facebookresearch/memory its embedding bag as the up half. Sizes can be made small to try the script where
there is no GPU: --device cpu --experts 1024 --tokens 64 --dim 64.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from floors import Sizes, floors, products_floor, update_floor
from kernels import Case, Problem
from layer import check, twins
from measure import cached_read, device_name, large_copy, seconds, show, write_json
from rich.console import Console
from rich.table import Table
from torch import Tensor

from peer_dist import PEER
from peer_dist.kernels import (
    Picks,
    backend,
    expert_mix,
    expert_mix_backward,
    expert_mix_forward,
    expert_table_grads,
    sum_rows,
)
from peer_dist.kernels.eight_bit import CODES, let_scales, quantised, scales_of
from peer_dist.kernels.rounding import Rounding
from peer_dist.kernels.updates import Step, update_rows
from peer_dist.layers.product_keys import retrieve
from peer_dist.machine import nvidia_driver
from peer_dist.optim import TableOptimizer, TableRule
from peer_dist.optim.tables import KINDS
from peer_dist.sharding import ExpertGroups, GridLayout

BF16 = torch.bfloat16


@dataclass
class Bench:
    """What all parts share, and what they find.

    Attributes:
        sizes: of the layer.
        end: the time of :func:`time.monotonic` at which no more parts begin; parts are told a time of their own.
        until: that time of the part that is being measured.
        copied, multiplied: bytes and FLOPs a second of a large copy and of a matrix product in bfloat16.
        rows: the table: a part, its milliseconds and its floor.
        goals: what is to be reached, the value and the goal.
        details: more of some parts.
        failed: parts that were not measured, and why in a sentence.
    """

    device: torch.device
    sizes: Sizes
    rounds: int
    clones: dict[str, Path | None]
    end: float
    until: float = math.inf
    copied: float = 0.0
    multiplied: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)
    goals: list[dict[str, Any]] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def measure(self, runs: dict[str, Callable[[], Any]]) -> dict[str, float]:
        """Milliseconds of each call."""
        taken = seconds(runs, self.device, self.rounds, min(self.until, self.end))
        return {name: 1e3 * each for name, each in taken.items()}

    def row(self, part: str, ms: float, moved: float = 0.0, flops: float = 0.0, speed: float | None = None) -> float:
        """Add a line; the share of its floor, which is 0 where there is none. ``speed``: bytes a second of what they
        are moved over, a copy's by default.
        """
        floor = 1e3 * max(moved / (speed or self.copied), flops / self.multiplied)
        self.rows.append({"part": part, "ms": ms, "floor_ms": floor, "share": floor / ms})
        return floor / ms

    def goal(self, name: str, value: float, sign: str, goal: float) -> None:
        """Add what is to be reached; ``sign`` is ``>=`` or ``<=``."""
        met = value >= goal if sign == ">=" else value <= goal
        self.goals.append({"goal": name, "value": float(value), "sign": sign, "wanted": goal, "met": met})

    def tensor(self, *shape: int, dtype: torch.dtype = BF16) -> Tensor:
        """Normal numbers."""
        return torch.randn(*shape, dtype=dtype, device=self.device)

    def picks(self) -> Tensor:
        """Uniform picks of the layer's rows, ``[tokens, heads * top_k]``."""
        shape = self.sizes.tokens, self.sizes.heads * self.sizes.top_k
        return torch.randint(self.sizes.experts, shape, dtype=torch.int64, device=self.device)


def agree(got: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float = 0.02) -> None:
    """Whole tensors, relative to their size; bfloat16 rounds each number by up to 0.4%."""
    for one, other in zip(got, wanted, strict=True):
        one, other = one.detach().float(), other.detach().float()
        error = float((one - other).norm() / other.norm().clamp_min(1e-30))
        if not error <= tolerance:
            raise ValueError(f"results differ by {error:.1e} of their size")


def speeds(bench: Bench) -> None:
    """A copy's and a product's, which the floors of all other parts are made of."""
    copied, copy_run = large_copy(bench.device)
    side = 8192 if bench.device.type == "cuda" else 512
    one, other = bench.tensor(side, side), bench.tensor(side, side)
    taken = bench.measure({"copy": copy_run, "product": lambda: one @ other})
    bench.copied, bench.multiplied = 1e3 * copied / taken["copy"], 1e3 * 2 * side**3 / taken["product"]
    bench.details["speeds"] = {"copy_GB_per_s": bench.copied / 1e9, "product_TFLOP_per_s": bench.multiplied / 1e12}


def products(bench: Bench) -> None:
    """The sums over picks, at the layer's picks a row and at 32; two runs' bits."""
    sizes = bench.sizes
    few = Case(sizes.experts, sizes.dim, sizes.tokens, sizes.heads * sizes.top_k, "bfloat16")
    many = Case(max(1, sizes.picks // 32), sizes.dim, sizes.tokens, sizes.heads * sizes.top_k, "bfloat16")
    rows = [_products(bench, case) for case in (few, many)]
    bench.details["products"] = rows
    sparse, often = rows
    bench.goal("forward: share of copy bandwidth", sparse["forward_share_of_copy_by_pick"], ">=", 0.9)
    bench.goal("backward over forward, bf16 gradients", sparse["backward_over_forward_bf16"], "<=", 2.2)
    bench.goal("backward over forward, fp32 gradients", sparse["backward_over_forward_fp32"], "<=", 3.0)
    bench.goal("two runs bit-identical", sparse["two_runs_bit_identical"], ">=", True)
    # each pick's rows pass through L2, however few come from memory
    bench.goal("32 picks per expert: share of reads from L2", often["forward_share_of_cached_read_by_pick"], ">=", 0.7)


@torch.no_grad()
def _products(bench: Bench, case: Case) -> dict[str, Any]:
    """One case of the products alone: milliseconds, shares of the copy bandwidth and ratios."""
    problem = Problem(case, bench.device)
    x, dy, down, up = (t.detach() for t in (problem.x, problem.dy, problem.down, problem.up))
    gate, picks = problem.gate.detach().reshape(-1), Picks.even(problem.expert)
    ops = backend(x, down, up)

    def backward(dtype: torch.dtype) -> tuple[Tensor, ...]:
        fresh = Picks(picks.offsets, picks.expert.clone())  # sorts anew
        dx, dgate, dpre, hidden = ops.backward(dy, x, fresh, pre, gate, down, up, "gelu")
        touched, grads = ops.sparse_table_grads([(dpre, x), (hidden, dy)], fresh, case.experts, dtype=dtype)
        return dx, dgate, touched, *grads

    y, pre = ops.forward(x, picks, gate, down, up, "gelu")
    torch.testing.assert_close(y.to(x.dtype), problem.gathered(), rtol=2e-2, atol=2e-2)
    same = all(a.equal(b) for a, b in zip(backward(torch.float32), backward(torch.float32)))
    same = same and y.equal(ops.forward(x, picks, gate, down, up, "gelu")[0])
    cached, read = cached_read(bench.device)
    runs: dict[str, Callable[[], Any]] = {
        "cached_read": read,
        "forward": lambda: ops.forward(x, picks, gate, down, up, "gelu"),
        "backward_bf16": lambda: backward(BF16),
        "backward_fp32": lambda: backward(torch.float32),
    }
    taken = bench.measure(runs | published(problem, bench.clones))
    bandwidth, of_cache = bench.copied, 1e3 * cached / taken["cached_read"]
    item, distinct = down.element_size(), torch.unique(picks.expert).numel()
    tokens = 2 * x.nbytes
    by_pick, by_row = (2 * rows * case.dim * item + tokens for rows in (picks.expert.numel(), distinct))
    each = picks.expert.numel() / case.experts
    numbers = picks.expert.numel() * (4 + 4 + 4)
    bench.row(f"experts, forward, {each:.3g} picks a row", taken["forward"], by_row + numbers)
    return {
        "experts": case.experts,
        "picks_per_expert": each,
        "copy_GB_per_s": bandwidth / 1e9,
        "cached_read_GB_per_s": of_cache / 1e9,
        **{f"{name}_ms": each for name, each in taken.items()},
        "forward_share_of_copy_by_pick": 1e3 * by_pick / taken["forward"] / bandwidth,
        "forward_share_of_copy_by_distinct_row": 1e3 * by_row / taken["forward"] / bandwidth,
        "forward_share_of_cached_read_by_pick": 1e3 * by_pick / taken["forward"] / of_cache,
        "backward_over_forward_bf16": taken["backward_bf16"] / taken["forward"],
        "backward_over_forward_fp32": taken["backward_fp32"] / taken["forward"],
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
        runs |= {"omnimoe_silu": theirs, "ours_silu": ours}
    if clones["memory"]:
        sys.path.insert(0, str(clones["memory"]))
        from lingua.product_key.xformer_embeddingbag import xformers_embedding_bag

        ops = backend(x, up)
        half = lambda: xformers_embedding_bag(problem.expert, up, gate.to(up.dtype), mode="sum")  # noqa: E731
        mine = lambda: ops.mix(gate.reshape(-1), up, Picks.even(problem.expert))  # noqa: E731
        torch.testing.assert_close(half().float(), mine().float(), rtol=3e-2, atol=3e-2)
        runs |= {"memory_up_half": half, "ours_up_half": mine}
    return runs


def updates(bench: Bench) -> None:
    """A step of one table by each optimizer, and the norm of its gradient."""
    sizes = bench.sizes
    hit = sizes.hit(sizes.picks, sizes.experts)
    shares = []
    for kind, lazy, stochastic in itertools.product(KINDS, (False, True), (False, True)):
        table = bench.tensor(sizes.experts, sizes.dim).requires_grad_()
        rule = TableRule(kind, 1e-3, (0.9, 0.99), 1e-8, 0.1, lazy=lazy, rounding_seed=1 if stochastic else None)
        optimizer = TableOptimizer({"t": table}, rule, sizes.dim)
        rows = torch.randperm(sizes.experts, dtype=torch.int64, device=bench.device)[:hit].sort()[0]
        grad = bench.tensor(hit if lazy else sizes.experts, sizes.dim)
        if lazy:
            options: Any = {"dtype": grad.dtype, "is_coalesced": True, "check_invariants": False}
            grad = torch.sparse_coo_tensor(rows[None], grad, table.shape, device=bench.device, **options)

        def step(table: Tensor = table, grad: Tensor = grad, optimizer: TableOptimizer = optimizer) -> None:
            table.grad = grad
            optimizer.step(0.5)

        def norm(table: Tensor = table, grad: Tensor = grad, optimizer: TableOptimizer = optimizer) -> None:
            table.grad = grad
            optimizer.grad_norm(bench.device)

        first = (kind, stochastic) == (KINDS[0], False)  # the norm is that of all kinds
        taken = bench.measure({"step": step, **({"norm": norm} if first else {})})
        name = f"{kind}, {'lazy' if lazy else 'dense'}, {'stochastic rounding' if stochastic else 'float32 master'}"
        shares.append(bench.row(name, taken["step"], update_floor(sizes, kind, lazy, stochastic) / 2))
        if first:
            moved = (hit if lazy else sizes.experts) * sizes.dim * sizes.item
            share = bench.row(f"gradient norm, {'sparse' if lazy else 'dense'}", taken["norm"], moved)
            bench.goal(f"gradient norm, {'sparse' if lazy else 'dense'}: share of floor", share, ">=", 0.8)
        del table, optimizer, grad, step, norm
    bench.goal("the slowest optimizer of tables: share of floor", min(shares), ">=", 0.7)


@torch.no_grad()
def eight_bits(bench: Bench) -> None:
    """The sums over picks of tables of either format, both passes, and the update of one; beside bfloat16."""
    sizes = bench.sizes
    hit = sizes.hit(sizes.picks, sizes.experts)
    x, dy = bench.tensor(sizes.tokens, sizes.dim), bench.tensor(sizes.tokens, sizes.dim)
    gate, picks = bench.tensor(sizes.picks, dtype=torch.float32), Picks.even(bench.picks())
    rows = torch.randperm(sizes.experts, dtype=torch.int64, device=bench.device)[:hit].sort()[0]
    grad = bench.tensor(hit, sizes.dim)
    shares, ratios = [], []
    for name, codes in {"bfloat16": BF16, **CODES}.items():
        if codes == BF16:
            down, up = (bench.tensor(sizes.experts, sizes.dim) for _ in range(2))
        else:
            down, up = (_coded(bench, codes) for _ in range(2))
        _, pre = expert_mix_forward(x, picks, gate, down, up, "gelu")
        runs: dict[str, Callable[[], Any]] = {
            "forward": lambda down=down, up=up: expert_mix_forward(x, picks, gate, down, up, "gelu"),
            "backward": lambda down=down, up=up, pre=pre: expert_mix_backward(
                dy, x, picks, pre, gate, down, up, "gelu"
            ),
        }
        moments = {kind: _moments(kind, down) for kind in (KINDS if codes != BF16 else ())}
        for kind, each in moments.items():
            step = Step.of(kind, 1e-3, (0.9, 0.99), 1e-8, 0.1, count=1, scale=0.5, dim=sizes.dim, lazy=True)
            runs[kind] = lambda step=step, table=down, each=each: update_rows(
                step, grad, table, each, rows=rows, rounding=Rounding(1, 0, 0), scales=scales_of(table)
            )
        taken = bench.measure(runs)
        floor = products_floor(sizes, *((sizes.item, 0) if codes == BF16 else (1, 4)))
        shares.append(bench.row(f"experts of {name}, forward", taken["forward"], floor))
        bench.row(f"experts of {name}, backward", taken["backward"], floor + 4 * sizes.picks)
        ratios.append(taken["forward"])
        for kind in moments:
            moved = update_floor(sizes, kind, True, True, eight_bit=True) / 2
            shares.append(bench.row(f"{kind}, lazy, {name}", taken[kind], moved))
        del down, up, pre, runs, moments
    bench.goal("experts of eight bits, forward, over bfloat16", ratios[0] / max(ratios[1:]), ">=", 1.6)
    bench.goal("eight bits: the smallest share of floor, forward and update", min(shares[1:]), ">=", 0.6)


def _coded(bench: Bench, codes: torch.dtype) -> Tensor:
    """A table of eight bits, made in parts, whose float32 numbers would else take four times its memory."""
    sizes = bench.sizes
    table = torch.empty(sizes.experts, sizes.dim, dtype=codes, device=bench.device)
    scales = torch.empty(sizes.experts, dtype=torch.float32, device=bench.device)
    for part in torch.arange(sizes.experts, dtype=torch.int64, device="cpu").split(1 << 16):
        at = slice(int(part[0]), int(part[-1]) + 1)
        table[at], scales[at] = quantised(bench.tensor(len(part), sizes.dim, dtype=torch.float32), codes)
    let_scales(table, scales)
    return table


def _moments(kind: str, table: Tensor) -> dict[str, Tensor]:
    """Those of a kind, zeros."""
    whole = {"adam": ("exp_avg", "exp_avg_sq"), "rowwise_adam": ("exp_avg",), "rowwise_adagrad": ()}[kind]
    moments = {name: torch.zeros(table.shape, dtype=torch.float32, device=table.device) for name in whole}
    if kind != "adam":
        moments["row_sq"] = torch.zeros(len(table), dtype=torch.float32, device=table.device)
    return moments


@torch.no_grad()
def far_rows(bench: Bench) -> None:
    """Rows of the host's memory: gathered and written back by a kernel, and packed by the CPU and copied, against a
    copy of as many bytes in one piece, which is what the bus can do.
    """
    from peer_dist.kernels import triton  # late: importing it takes a while, and needs a GPU to be of use

    sizes, cuda = bench.sizes, bench.device.type == "cuda"
    count = min(sizes.experts, 1 << 18)
    if not triton.available(bench.tensor(1, sizes.dim)):
        raise ValueError("there is no Triton that could read the host's memory")
    for name, dtype in (("bfloat16", BF16), ("eight bits", torch.int8)):
        far = torch.zeros(count, sizes.dim, dtype=dtype, device="cpu", pin_memory=cuda)
        chosen = torch.randperm(count, dtype=torch.int64, device="cpu")[: count // 2].sort()[0]
        for at in range(0, count, 4096):  # what can be told apart
            far[at : at + 4096] = torch.randint(-99, 99, (1, sizes.dim), dtype=torch.int64, device="cpu").to(dtype)
        rows = chosen.to(bench.device)
        near = torch.empty(len(rows), sizes.dim, dtype=dtype, device=bench.device)
        packed = torch.empty(near.shape, dtype=dtype, device="cpu", pin_memory=cuda)

        def pack(far: Tensor = far, chosen: Tensor = chosen, near: Tensor = near, packed: Tensor = packed) -> None:
            if cuda:
                torch.cuda.current_stream().synchronize()  # the copy before must have left the buffer
            torch.index_select(far, 0, chosen, out=packed)
            near.copy_(packed, non_blocking=True)

        triton.rows.gather_rows(far, rows, near)
        agree([near.cpu()], [far[chosen]], 0.0)
        taken = bench.measure(
            {
                "copy": lambda near=near, packed=packed: near.copy_(packed, non_blocking=True),
                "back": lambda near=near, packed=packed: packed.copy_(near, non_blocking=True),
                "gather": lambda far=far, rows=rows, near=near: triton.rows.gather_rows(far, rows, near),
                "scatter": lambda far=far, rows=rows, near=near: triton.rows.scatter_rows(far, rows, near),
                "pack": pack,
            }
        )
        to_device, to_host = (1e3 * near.nbytes / taken[way] for way in ("copy", "back"))
        rows_of = f"{len(rows)} of {count} rows of {name}"
        share = bench.row(f"{rows_of} gathered over the bus", taken["gather"], near.nbytes, speed=to_device)
        bench.row(f"{rows_of} written back", taken["scatter"], near.nbytes, speed=to_host)
        bench.row(f"{rows_of} packed by the CPU and copied", taken["pack"], near.nbytes, speed=to_device)
        bench.goal(f"rows of {name} gathered over the bus: share of a copy's speed", share, ">=", 0.8)
        bench.details[f"bus, {name}"] = {"to_device_GB_per_s": to_device / 1e9, "to_host_GB_per_s": to_host / 1e9}


def retrieval(bench: Bench) -> None:
    """The best product keys of each query, and the gradients of queries and keys."""
    sizes = bench.sizes
    query = bench.tensor(sizes.tokens, sizes.heads, sizes.key_dim).requires_grad_()
    keys = bench.tensor(2, math.isqrt(sizes.experts), sizes.key_dim // 2).requires_grad_()
    scores = retrieve(query, keys, sizes.top_k)[1]
    dscores = torch.randn_like(scores)

    def forward() -> Tensor:
        with torch.no_grad():
            return retrieve(query, keys, sizes.top_k)[1]

    taken = bench.measure(
        {
            "forward": forward,
            "backward": lambda: torch.autograd.grad(scores, [query, keys], dscores, retain_graph=True),
        }
    )
    least = floors(sizes, KINDS[0], False)
    flops = 2 * query.numel() * keys.shape[1]
    share = bench.row("retrieval, forward", taken["forward"], least["retrieval", "forward"], flops)
    bench.row("retrieval, backward", taken["backward"], least["retrieval", "backward"])
    bench.goal("retrieval, forward: share of floor, in which comparing costs nothing", share, ">=", 0.1)


@torch.no_grad()
def sorting(bench: Bench) -> None:
    """Sorting picks by expert, and the gradients of both tables from sorted picks, dense and of the picked rows."""
    sizes = bench.sizes
    x, dy = bench.tensor(sizes.tokens, sizes.dim), bench.tensor(sizes.tokens, sizes.dim)
    picks = Picks.even(bench.picks())
    weights = [bench.tensor(sizes.picks, dtype=torch.float32) for _ in range(2)]
    table = bench.tensor(sizes.experts, 1).expand(-1, sizes.dim)  # for its shape and dtype
    x16, dy16, table16 = (value[:, :16].contiguous() for value in (x, dy, table))

    def grads(x: Tensor, dy: Tensor, table: Tensor, sparse: bool) -> Any:
        fresh = Picks(picks.offsets, picks.expert.clone())  # not sorted yet
        return expert_table_grads(*weights, x, dy, fresh, table, table, sparse)

    taken = bench.measure(
        {
            # gradients of rows of 16 columns cost little beside the sort that they want
            "sort": lambda: grads(x16, dy16, table16, False),
            "dense": lambda: grads(x, dy, table, False),
            "sparse": lambda: grads(x, dy, table, True),
        }
    )
    for lazy, name in ((False, "dense"), (True, "sparse")):
        least = floors(sizes, KINDS[0], lazy)
        moved = least["sort", "backward"] + least["table gradients", "backward"]
        share = bench.row(f"sort and table gradients, {name}", taken[name], moved)
        bench.goal(f"sort and table gradients, {name}: share of floor", share, ">=", 0.6)
    narrow = floors(Sizes(**{**vars(sizes), "dim": 16}), KINDS[0], False)
    moved = narrow["sort", "backward"] + narrow["table gradients", "backward"]
    bench.row("sort and gradients of 16 columns", taken["sort"], moved)


def layer(bench: Bench) -> None:
    """The whole layer, forward, backward, gradient norm and update, against the time of its own bytes."""
    sizes = bench.sizes
    for lazy in (False, True):
        module = PEER(
            sizes.dim, sizes.experts, heads=sizes.heads, top_k=sizes.top_k, key_dim=sizes.key_dim, sparse_grad=lazy,
            device=bench.device, dtype=BF16,
        )  # fmt: skip
        rule = TableRule("rowwise_adam", 1e-3, (0.9, 0.99), 1e-8, 0.1, lazy=lazy)
        optimizer = TableOptimizer({"down": module.down, "up": module.up}, rule, sizes.dim)
        x, dy = bench.tensor(sizes.tokens, sizes.dim).requires_grad_(), bench.tensor(sizes.tokens, sizes.dim)

        def forward(module: PEER = module, x: Tensor = x) -> Tensor:
            with torch.no_grad():
                return module(x)

        def passes(module: PEER = module, x: Tensor = x, dy: Tensor = dy) -> None:
            module.zero_grad()
            module(x).backward(dy)

        def step(optimizer: TableOptimizer = optimizer, passes: Callable[[], None] = passes) -> None:
            passes()
            optimizer.grad_norm(bench.device)
            optimizer.step(0.5)

        runs: dict[str, Callable[[], Any]] = {"passes": passes, "step": step}
        taken = bench.measure(runs if lazy else {"forward": forward, **runs})
        least, dense = floors(sizes, "rowwise_adam", lazy), "sparse" if lazy else "dense"
        flops = 2 * sizes.tokens * sizes.heads * sizes.key_dim * (3 * sizes.dim + math.isqrt(sizes.experts))
        first = sum(moved for (part, phase), moved in least.items() if phase == "forward" and part in FORWARD)
        both = first + sum(moved for (_, phase), moved in least.items() if phase == "backward")
        if not lazy:
            bench.row("layer, forward", taken["forward"], first)
        bench.row(f"layer, forward + backward, {dense} gradients", taken["passes"], both, flops)
        share = bench.row(
            f"layer, a step with rowwise_adam, {dense} gradients", taken["step"], sum(least.values()), flops
        )
        bench.goal(f"a layer's step over the time of its bytes, {dense} gradients", 1 / share, "<=", 1.5)
        del module, optimizer, forward, passes, step


FORWARD = ("queries", "retrieval", "experts")


def attention(bench: Bench) -> None:
    """Attention between documents as the model has it, against torch's with a mask of all pairs, and causal alone."""
    from peer_dist.measures.held_out import make_micro_batch
    from peer_dist.megatron.attention import SDPAttention

    cuda = bench.device.type == "cuda"
    batch, length, heads, channels = (bench.sizes.tokens // 2048, 2048, 16, 64) if cuda else (2, 32, 4, 8)
    batch = max(1, batch)
    config: Any = SimpleNamespace(kv_channels=channels, attention_dropout=0.0, sequence_parallel=False)
    module = SDPAttention(config, layer_number=1)
    sequences = torch.ones(batch, length + 1, dtype=torch.int64, device="cpu")
    ends = range(length // 4, length, length // 4)  # four documents a sequence
    sequences[:, list(ends)] = 0
    made = make_micro_batch(sequences, 0, bench.device)
    documents = made["documents"]
    inputs = [bench.tensor(length, batch, heads, channels).requires_grad_() for _ in range(3)]
    dy = bench.tensor(length, batch, heads * channels)
    number = (sequences[:, :-1] == 0).cumsum(1).to(bench.device)
    places = torch.arange(length, dtype=torch.int64, device=bench.device)
    seen = (number[:, :, None] == number[:, None, :]) & (places[:, None] >= places)

    def both(attend: Callable[..., Tensor], *arguments: Any) -> Any:
        y = attend(*inputs, *arguments)
        return y, *torch.autograd.grad(y, inputs, dy)

    def plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (each.permute(1, 2, 0, 3) for each in (query, key, value))
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
        return y.permute(2, 0, 1, 3).flatten(2)

    mask = seen[:, None]
    agree(both(module, documents), both(plain, mask))
    taken = bench.measure(
        {
            "documents": lambda: both(module, documents),
            "mask": lambda: both(plain, mask),
            "causal": lambda: both(plain, None),
        }
    )
    moved = 12 * inputs[0].nbytes  # q, k, v, y; again with their gradients
    pairs = int(seen.sum())
    bench.row("attention between documents, both passes", taken["documents"], moved, 3.5 * 4 * pairs * heads * channels)
    bench.row(
        "as torch's with a mask of all pairs", taken["mask"], moved + 2 * mask.nbytes, 14 * length * inputs[0].numel()
    )
    bench.row("causal attention without documents", taken["causal"], moved, 7 * length * inputs[0].numel())
    bench.goal("attention between documents over a mask of all pairs", taken["mask"] / taken["documents"], ">=", 2.0)


def cross_entropy(bench: Bench) -> None:
    """The loss from logits and back, as the model has it, against torch's over float32 logits."""
    from peer_dist.config import load_config
    from peer_dist.engines.building import join_groups
    from peer_dist.megatron import build_model

    cuda = bench.device.type == "cuda"
    words, tokens = (32000, bench.sizes.tokens) if cuda else (256, 64)
    small = ["model.num_layers=1", "model.mlp=dense", "model.hidden_size=64", "model.num_attention_heads=4"]
    small += ["model.ffn_hidden_size=64", "model.seq_length=64", "zero.stage=0", "parallel.expert=1"]
    config = load_config(Path(__file__).parents[1] / "configs" / "one-gpu.yaml", [*small, "data.prefix=unused"])
    parallel = join_groups(config)
    try:
        (model,) = build_model(config, parallel, words, BF16)
        logits, labels = (
            bench.tensor(tokens, 1, words),
            torch.randint(words, (1, tokens), dtype=torch.int64, device=bench.device),
        )

        def ours() -> tuple[Tensor, ...]:
            # a tensor of its own each time: the loss may turn the logits into their gradient where they are
            own = logits.clone().requires_grad_()
            losses = model.compute_language_model_loss(labels, own * 1)  # of a product, as those of a model
            return losses.flatten(), *torch.autograd.grad(losses.sum(), own)

        def plain() -> tuple[Tensor, ...]:
            own = logits.clone().requires_grad_()
            losses = F.cross_entropy((own * 1).float().view(tokens, words), labels.view(-1), reduction="none")
            return losses, *torch.autograd.grad(losses.sum(), own)

        agree(ours(), plain())
        taken = bench.measure({"ours": ours, "plain": plain})
    finally:
        parallel.destroy()
    copies = 6 * logits.nbytes  # the copy, the product by one and its gradient: in both
    bench.row("cross-entropy, both passes", taken["ours"], copies + 3 * logits.nbytes)
    bench.row("as torch's over float32 logits", taken["plain"], copies + 3 * logits.nbytes)
    bench.goal("cross-entropy over torch's", taken["plain"] / taken["ours"], ">=", 1.0)


@torch.no_grad()
def combine(bench: Bench) -> None:
    """The sum at home of the rows that eight owners sent: by the kernel that mixes, and one owner after the other."""
    sizes, owners = bench.sizes, 8
    arrived = bench.tensor(owners * sizes.tokens, sizes.dim)
    token = torch.arange(sizes.tokens, dtype=torch.int64, device=bench.device)
    owner = torch.arange(owners, dtype=torch.int64, device=bench.device)
    picks = Picks.even(token[:, None] + owner * sizes.tokens)  # a row of each owner

    def added() -> Tensor:
        out = torch.zeros(sizes.tokens, sizes.dim, dtype=torch.float32, device=bench.device)
        for rows in arrived.split(sizes.tokens):
            out.index_add_(0, token, rows.float())
        return out.to(BF16)

    def mixed() -> Tensor:
        return sum_rows(arrived, picks, BF16)

    agree([mixed()], [added()])
    taken = bench.measure({"mixed": mixed, "added": added})
    moved = arrived.nbytes + arrived.nbytes // owners
    bench.row(f"rows of {owners} owners summed at home", taken["mixed"], moved)
    bench.row("the same, added one owner after the other", taken["added"], moved)
    bench.goal("rows summed at home: share of floor", bench.rows[-2]["share"], ">=", 0.7)


def exchange(bench: Bench) -> None:
    """A layer over all ranks, one card each; one rank sends all to itself, beside the layer that sends nothing."""
    sizes, world = bench.sizes, dist.get_world_size()
    x, dy = bench.tensor(sizes.tokens, sizes.dim).requires_grad_(), bench.tensor(sizes.tokens, sizes.dim)

    def passes(module: PEER) -> None:
        module.zero_grad()
        module(x).backward(dy)

    options: Any = {"heads": sizes.heads, "top_k": sizes.top_k, "key_dim": sizes.key_dim, "seed": 1, "dtype": BF16}
    spread = PEER(
        sizes.dim, sizes.experts, group=ExpertGroups.over(dist.group.WORLD), device=bench.device, **options
    )  # fmt: skip
    runs: dict[str, Callable[[], Any]] = {}
    if world == 1:
        whole = PEER(sizes.dim, sizes.experts, device=bench.device, **options)
        runs["whole"] = lambda: passes(whole)

    @contextmanager
    def routed() -> Iterator[None]:
        always = property(lambda layout: layout.groups is not None)
        with patch.object(GridLayout, "spread", always):
            yield

    def through() -> None:
        with routed():
            passes(spread)

    if world > 1:
        bench.until = bench.end = math.inf  # as many rounds on all ranks
    taken = bench.measure({"spread": through, **runs})
    least = floors(Sizes(**{**vars(sizes), "ranks": max(2, world)}), KINDS[0], False)
    moved = sum(bytes_ for (part, phase), bytes_ in least.items() if phase == "backward" or part in FORWARD)
    moved += least["dispatch", "forward"] + least["combine", "forward"]
    name = f"layer over {world} ranks" if world > 1 else "layer that sends all tokens to itself"
    bench.row(f"{name}, both passes", taken["spread"], moved if world > 1 else 0)
    if world == 1:
        bench.row("the same layer, nothing sent", taken["whole"])
        bench.goal("sending all tokens to oneself over sending none", taken["spread"] / taken["whole"], "<=", 1.5)


def peer_pytorch(bench: Bench) -> None:
    """The whole layer against PEER-pytorch's, forward and backward; no round begins when its time is used up."""
    sizes = bench.sizes
    ours, theirs = twins(sizes.dim, sizes.experts, sizes.heads, sizes.top_k, bench.device)
    x = bench.tensor(1, sizes.tokens, sizes.dim, dtype=torch.float32)
    check(ours, theirs, x[:, :256])
    ours, theirs, x = ours.to(BF16), theirs.to(BF16), x.to(BF16).requires_grad_()
    dy = torch.randn_like(x)

    def both(module: torch.nn.Module) -> Any:
        return torch.autograd.grad(module(x), [x, *module.parameters()], dy)

    taken = bench.measure({"ours": lambda: both(ours), "theirs": lambda: both(theirs)})
    cut = " (cut: its time was used up)" if time.monotonic() > bench.until else ""
    bench.row("our layer beside PEER-pytorch's, both passes", taken["ours"])
    bench.row(f"PEER-pytorch's layer{cut}", taken["theirs"])
    bench.goal("layer, forward + backward, over PEER-pytorch", taken["theirs"] / taken["ours"], ">=", 20.0)


PARTS: dict[str, tuple[Callable[[Bench], None], float]] = {
    "speeds": (speeds, 10),
    "products": (products, 30),
    "updates": (updates, 60),
    "eight bits": (eight_bits, 25),
    "rows over the bus": (far_rows, 15),
    "retrieval": (retrieval, 15),
    "sort and table gradients": (sorting, 20),
    "layer": (layer, 40),
    "attention": (attention, 15),
    "cross-entropy": (cross_entropy, 15),
    "combine": (combine, 10),
    "exchange": (exchange, 20),
    "PEER-pytorch": (peer_pytorch, 60),
}
"""In the order of their weight, with the seconds after which each begins no more rounds."""


def run(bench: Bench, names: list[str], keep: Callable[[], None]) -> None:
    """Measure the parts, and ``keep`` what is known after each."""
    for name in dict.fromkeys(["speeds", *names]):
        part, budget = PARTS[name]
        begin = time.monotonic()
        bench.until = begin + budget
        if begin > bench.end:
            bench.failed[name] = "no time was left"
        elif "speeds" in bench.failed:
            bench.failed[name] = "the speeds to compare with are not known"
        else:
            try:
                part(bench)
            except Exception as error:  # the others go on
                first = (str(error).strip() or "no more is known").splitlines()[0]
                bench.failed[name] = f"{type(error).__name__}: {first[:300]}"
            gc.collect()
            if bench.device.type == "cuda":
                torch.cuda.empty_cache()
        why = f", not measured: {bench.failed[name]}" if name in bench.failed else ""
        print(f"{name}: {time.monotonic() - begin:.0f} s{why}", flush=True)
        keep()


def environment(device: torch.device) -> dict[str, Any]:
    """What the figures are of."""
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = None
    return {
        "device": device_name(device),
        "driver": nvidia_driver() if device.type == "cuda" else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": version,
        "python": platform.python_version(),
        "command": shlex.join(["python", *sys.argv]),
    }


def show_rows(title: str, rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table(title=title, title_justify="left")
    for name in ("part", "ms", "floor, ms", "share of floor"):
        table.add_column(name, justify="left" if name == "part" else "right")
    for row in rows:
        floor = (f"{row['floor_ms']:.3f}", f"{row['share']:.2f}") if row["floor_ms"] else ("", "")
        table.add_row(row["part"], f"{row['ms']:.3f}", *floor)
    Console(width=120).print(table)


def main() -> None:
    """Measure what the command line asks for, and show it."""
    begin = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--experts", type=int, default=1024**2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--limit", type=float, default=270, metavar="SECONDS", help="no part begins after them")
    parser.add_argument("--only", nargs="+", choices=list(PARTS)[1:], metavar="PART", help=", ".join(list(PARTS)[1:]))
    parser.add_argument("--omnimoe", type=Path, metavar="CLONE")
    parser.add_argument("--memory", type=Path, metavar="CLONE")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    sizes = Sizes(options.tokens, options.dim, options.experts)
    clones = {"omnimoe": options.omnimoe, "memory": options.memory}
    bench = Bench(device, sizes, options.rounds, clones, begin + options.limit)
    title = f"PEER, {sizes.tokens} tokens, d={sizes.dim}, N={sizes.experts}, bfloat16, {device_name(device)}"

    def keep() -> None:
        if dist.get_rank() == 0:
            results = {"seconds": time.monotonic() - begin, "limit": options.limit, "rows": bench.rows}
            results |= {"goals": bench.goals, "not_measured": bench.failed, **bench.details}
            write_json(options.json, {"title": title, **environment(device), **results})

    with joined(device):
        # of several ranks the exchange alone: parts that stop by the clock would leave others waiting
        run(bench, options.only or (list(PARTS) if dist.get_world_size() == 1 else ["exchange"]), keep)
        if dist.get_rank():
            return
    if bench.rows:
        show("Speeds", [bench.details["speeds"]])
        show_rows(title, bench.rows)
        verdicts = {
            each["goal"]: f"{each['value']:.3g} ({'' if each['met'] else 'not '}met: {each['sign']} {each['wanted']:g})"
            for each in bench.goals
        }
        if verdicts:
            show("Goals", [verdicts])
    for name, reason in bench.failed.items():
        print(f"not measured: {name}: {reason}")
    print(f"{time.monotonic() - begin:.0f} s in all; no part begins after {options.limit:.0f}")


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """The ranks that torchrun started, or this process alone."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if cuda else "gloo")
    else:
        dist.init_process_group("nccl" if cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
