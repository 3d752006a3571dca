"""The tables' optimizers against elementwise passes, as ratios in one run.

    python benchmarks/tables.py [--json FILE]

"passes" is how tables were stepped before: blocks of rows in some ten elementwise operations of torch's, and dense
`adam` by torch's fused AdamW. Bytes an element are counted: those that each operation reads and writes. On a GPU, whose
blocks of the passes fall out of its caches, they go through memory; on a CPU a block's temporaries stay in its cache.
Times on a CPU are the processor's. Gradients are not clipped, which would take the passes one pass more.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from measure import device_name, large_copy, seconds, show, write_json
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from peer_dist.kernels import row_gradient
from peer_dist.kernels.eight_bit import CODES, dequantised, let_scales, quantised, scales_of
from peer_dist.kernels.rounding import Rounding, random_bits, round_stochastically, stream_key
from peer_dist.kernels.updates import Step, update_rows
from peer_dist.optim import TableOptimizer, TableRule

LR, BETAS, EPS, DECAY = 1e-3, (0.9, 0.999), 1e-8, 0.01
BLOCKS = {"cpu": 1 << 18, "cuda": 1 << 24}  # elements


@dataclass(frozen=True)
class Case:
    """A table and its optimizer; ``weights``: float32, bfloat16 with a master, bfloat16 rounded at random, or a
    format of eight bits.
    """

    kind: str
    weights: str
    lazy: bool
    rows: int
    dim: int

    def bytes_in_one_pass(self) -> int:
        """Bytes that a step moves for each element."""
        grad = 4 if self.weights == "float32" else 2
        weight = {"float32": 8, "master": 10, "rounded": 4}.get(self.weights, 2)  # rows' scales are left out
        return grad + weight + 8 * MOMENTS[self.kind]


WEIGHTS = ("float32", "master", "rounded")
MOMENTS = {"adam": 2, "rowwise_adam": 1, "rowwise_adagrad": 0}


class Passes:
    """One table, stepped as it was before."""

    def __init__(self, case: Case, table: Tensor) -> None:
        self.case, self.table, self.steps = case, table, 0
        self.scales = scales_of(table)
        self.master = table if case.weights != "master" else table.detach().float().requires_grad_()
        like = torch.zeros_like(table, dtype=torch.float32, requires_grad=False)
        self.moments = {name: like.clone() for name in ("exp_avg", "exp_avg_sq")[: MOMENTS[case.kind]]}
        if case.kind != "adam":
            self.moments["row_sq"] = torch.zeros(len(table), dtype=torch.float32, device=table.device)
        self.adamw: torch.optim.AdamW | None = None
        if case.kind == "adam" and not case.lazy and case.weights != "rounded":
            self.adamw = torch.optim.AdamW([self.master], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True)

    @torch.no_grad()
    def step(self, rows: Tensor | None, values: Tensor) -> None:
        """``values [touched, dim]`` are the gradients of ``rows``, or of all."""
        self.steps += 1
        if self.adamw is not None:
            self.master.grad = values.float()
            self.adamw.step()
            if self.master is not self.table:
                self.table.copy_(self.master)
            return
        size = max(1, BLOCKS[values.device.type] // self.case.dim)
        blocks = [slice(first, min(first + size, len(values))) for first in range(0, len(values), size)]
        mean = None
        if "row_sq" in self.moments:
            mean = torch.empty(len(values), dtype=torch.float32, device=values.device)
            for block in blocks:
                torch.linalg.vector_norm(values[block].float(), dim=1, out=mean[block])
            mean.square_().div_(self.case.dim)
        for block in blocks:
            self._step_block(block, rows, values[block].float(), None if mean is None else mean[block])

    def _step_block(self, block: slice, rows: Tensor | None, grad: Tensor, mean: Tensor | None) -> None:
        table, master, moments = self.table, self.master, self.moments
        if rows is None:
            weight, state = master[block].float(), {part: value[block] for part, value in moments.items()}
            touched = torch.arange(block.start, block.stop, dtype=torch.int64, device=grad.device)
        else:
            touched = rows[block]
            weight = master.index_select(0, touched)
            weight = weight.float() if self.scales is None else dequantised(weight, self.scales[touched])
            state = {part: value.index_select(0, touched) for part, value in moments.items()}
        self._apply(weight, grad, state, mean)
        if rows is not None:
            for part, value in state.items():
                moments[part].index_copy_(0, touched, value)
            if master.dtype == torch.float32:
                master.index_copy_(0, touched, weight)
        if table.dtype == torch.float32:
            return
        if self.case.weights == "master":
            rounded = weight.to(table.dtype)
        else:
            bits = random_bits(stream_key(1, "t", self.steps), touched, range(table.shape[1]))
            if self.scales is None:
                rounded = round_stochastically(weight, bits)
            else:
                rounded, self.scales[touched] = quantised(weight, table.dtype, bits)
        if rows is None:
            table[block] = rounded
        else:
            table.index_copy_(0, touched, rounded)

    def _apply(self, weight: Tensor, grad: Tensor, state: dict[str, Tensor], mean: Tensor | None) -> None:
        weight.mul_(1 - LR * DECAY)
        if self.case.kind == "rowwise_adagrad":
            weight.addcdiv_(grad, state["row_sq"].add_(mean).sqrt().add_(EPS)[:, None], value=-LR)
            return
        first, second = BETAS
        moment = state["exp_avg"].lerp_(grad, 1 - first)
        correction, eps = 1 - second**self.steps, EPS
        if mean is None:
            square = state["exp_avg_sq"].mul_(second).addcmul_(grad, grad, value=1 - second)
            eps /= math.sqrt(correction) if self.case.lazy else 1.0
        else:
            square = state["row_sq"].lerp_(mean, 1 - second)[:, None]
        root = (square / correction).sqrt_().add_(eps)
        weight.addcdiv_(moment, root, value=-LR / (1 - first**self.steps))


class Traffic(TorchDispatchMode):
    """Counts the bytes that torch's operations read and write, and these operations."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.operations = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = function.overloadpacket.__name__
        if function.is_view or function.namespace != "aten" or name in ("empty", "detach", "alias"):
            return result
        self.operations += 1
        given = args + tuple(kwargs[arg.name] for arg in function._schema.arguments[len(args) :] if arg.name in kwargs)
        arguments = [
            (tensor, arg.alias_info is not None and arg.alias_info.is_write and arg.name != "grads")
            for arg, value in zip(function._schema.arguments, given)
            for tensor in (value if isinstance(value, list | tuple) else [value])
            if isinstance(tensor, Tensor)
        ]
        if name in ("index_select", "index_copy_"):  # the rows, read and written, and their numbers
            rows = result if name == "index_select" else args[3]
            self.bytes += 2 * rows.nbytes + args[2].nbytes
            return result
        for tensor, written in arguments:
            overwritten = written and (name in ("copy_", "fill_") or "out" in kwargs)
            self.bytes += tensor.nbytes * (2 if written and not overwritten else 1)
        if not any(written for _, written in arguments):
            self.bytes += sum(out.nbytes for out in (result if isinstance(result, tuple) else [result]))
        return result


def steps_of_codes(case: Case, table: Tensor, rows: Tensor | None, grad: Tensor) -> Callable[[], None]:
    """What steps rows of a table of eight bits."""
    parts = ("exp_avg", "exp_avg_sq")[: MOMENTS[case.kind]]
    moments = {part: torch.zeros(table.shape, dtype=torch.float32, device=table.device) for part in parts}
    if case.kind != "adam":
        moments["row_sq"] = torch.zeros(len(table), dtype=torch.float32, device=table.device)
    count = itertools.count(1)

    def step() -> None:
        number = next(count)
        numbers = Step.of(case.kind, LR, BETAS, EPS, DECAY, count=number, scale=1.0, dim=case.dim, lazy=case.lazy)
        rounding = Rounding(stream_key(1, "t", number), 0, 0)
        update_rows(numbers, grad, table, moments, rows=rows, rounding=rounding, scales=scales_of(table))

    return step


def measure(case: Case, device: torch.device, rounds: int) -> dict[str, Any]:
    """Milliseconds of either way, their ratio, and ours as a share of a copy's bandwidth, of equal weights."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.float32 if case.weights == "float32" else torch.bfloat16
    weights = torch.randn(case.rows, case.dim, generator=generator, dtype=torch.float32, device=device).to(dtype)
    coded = None if case.weights not in CODES else quantised(weights.float(), CODES[case.weights])
    rows = None
    if case.lazy:  # one of each two
        picked = torch.randint(2, (case.rows // 2,), generator=generator, dtype=torch.int64, device=device)
        rows = 2 * torch.arange(case.rows // 2, dtype=torch.int64, device=device) + picked
    shape = case.rows if rows is None else len(rows), case.dim
    grad = torch.randn(shape, generator=generator, dtype=torch.float32, device=device).to(dtype)

    def fresh() -> Tensor:
        if coded is None:
            return weights.clone().requires_grad_()
        table = coded.codes.clone()
        let_scales(table, coded.scales.clone())
        return table

    def ours() -> tuple[Tensor, Callable[[], None]]:
        table = fresh()
        if coded is not None:  # a gradient of theirs is never on the table: the step alone, as the optimizer takes it
            return table, steps_of_codes(case, table, rows, grad)
        rule = TableRule(case.kind, LR, BETAS, EPS, DECAY, case.lazy, 1 if case.weights == "rounded" else None)
        optimizer = TableOptimizer({"t": table}, rule, case.dim)

        def step() -> None:
            table.grad = grad if rows is None else row_gradient(rows, grad, case.rows)
            optimizer.step(1.0)

        return table, step

    def passes() -> tuple[Tensor, Callable[[], None]]:
        table = fresh()
        optimizer = Passes(case, table)
        return table, lambda: optimizer.step(rows, grad)

    (one, step), (other, former) = ours(), passes()
    step(), former()
    if coded is None:
        torch.testing.assert_close(one, other, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6)
    else:  # some roundings differ, by a code
        read = [dequantised(table, table.scales) for table in (one, other)]  # type: ignore[attr-defined]
        torch.testing.assert_close(*read, rtol=0.13, atol=float(coded.scales.max()))
    with Traffic() as traffic:
        former()
    copied, copy = large_copy(device)
    clock = time.perf_counter if device.type == "cuda" else time.process_time  # others may have the processor too
    took = seconds({"ours": step, "passes": former, "copy": copy}, device, rounds, clock=clock)
    moved = case.bytes_in_one_pass() * grad.numel()
    return {
        **asdict(case),
        "bytes_an_element": case.bytes_in_one_pass(),
        "bytes_an_element_in_passes": traffic.bytes / grad.numel(),
        "operations_in_passes": traffic.operations,
        "ours_ms": 1e3 * took["ours"],
        "passes_ms": 1e3 * took["passes"],
        "ratio": took["passes"] / took["ours"],
        "copy_GB_per_s": copied / took["copy"] / 1e9,
        "share_of_copy_bandwidth": moved / took["ours"] * took["copy"] / copied,
    }


def main() -> None:
    """Measure every kind of optimizer, and show it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--elements", type=int, help="of a table: 2**24 by default, 2**30 on a GPU")
    parser.add_argument("--dim", type=int, action="append", help="1024 and 256 by default")
    parser.add_argument("--weights", choices=[*WEIGHTS, *CODES], action="append", help="those without codes by default")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    elements = options.elements or (1 << 30 if device.type == "cuda" else 1 << 24)
    found = []
    for dim, kind, weights in itertools.product(options.dim or (1024, 256), MOMENTS, options.weights or WEIGHTS):
        ways = (True,) if weights in CODES else (False, True)  # tables of eight bits are stepped where they were picked
        rows = [measure(Case(kind, weights, lazy, elements // dim, dim), device, options.rounds) for lazy in ways]
        show(f"{kind}, {weights}, {dim} columns, on {device_name(device)}", rows)
        found += rows
    write_json(options.json, {"device": device_name(device), "torch": torch.__version__, "rows": found})


if __name__ == "__main__":
    main()
