"""A few steps looked at closely: a trace and the memory of each rank, and what its collectives moved and waited.

The trace has the spans of a step (:mod:`peer_dist.tracing`), every operation, every collective with its group and its
bytes, and the memory in use as a curve; Perfetto (ui.perfetto.dev) and chrome://tracing show it.
"""

from __future__ import annotations

import gzip
import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, record_function

from peer_dist.sharding.exchange import Traffic
from peer_dist.tracing import position

# Methods of torch's process groups, under the names that torch's versions gave them.
_COLLECTIVES = (
    *("allreduce", "allreduce_coalesced", "reduce", "broadcast", "barrier", "gather", "scatter", "send", "recv"),
    *("allgather", "_allgather_base", "all_gather_single", "allgather_into_tensor_coalesced"),
    *("reduce_scatter", "_reduce_scatter_base", "reduce_scatter_single", "reduce_scatter_tensor_coalesced"),
    *("alltoall", "alltoall_base", "all_to_all_single"),
)


@dataclass
class _Sum:
    """Sums over the steps for one collective in one group.

    Attributes:
        nbytes: of what this rank put in (of what it got, for ``recv``).
        seconds: for which this rank's host waited; of NCCL's kernels, for which they ran.
    """

    calls: int = 0
    nbytes: int = 0
    seconds: float = 0.0


_Sums = defaultdict[tuple[str, str], _Sum]  # by collective and group


class Profile:
    """Traces some steps of this rank. In all others nothing is measured, and nothing replaced.

    Args:
        steps: their numbers, counted from 1.
        folder: of the traces, a file per rank.
    """

    def __init__(self, steps: range, folder: Path) -> None:
        self._steps, self._folder = steps, folder
        self._name = f"rank-{dist.get_rank()}-steps-{steps[0]}-{steps[-1]}"
        self._running: ExitStack | None = None
        self._trace: profile | None = None
        self._seconds: list[float] = []
        self._collectives, self._kernels = _Sums(_Sum), _Sums(_Sum)
        self._sent: Counter[str] = Counter()

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around a step: the first of the steps begins, and the last one writes."""
        if number not in self._steps:
            yield
            return
        if self._running is None:
            self._begin()
        begin = time.perf_counter()
        with record_function(f"step {number}"):
            yield
        self._seconds.append(time.perf_counter() - begin)
        if number == self._steps[-1]:
            position.at("save", number)  # writing a long trace takes its time
            self._end()

    def add_traffic(self, traffic: Traffic) -> None:
        """What a layer's exchange sent in the step."""
        if self._running is not None:
            self._sent += traffic.sent

    def conclude(self, console: Console) -> None:
        """At the end of the run: write what is not written yet, and show this rank's collectives."""
        self._end()
        if not self._seconds:
            console.print(
                f"nothing profiled: the run had none of the steps {self._steps[0]} to {self._steps[-1]}",
                highlight=False,
            )
            return
        steps, seconds = len(self._seconds), sum(self._seconds)
        console.print(f"{self._name}, means of {steps} step(s) of {seconds / steps * 1e3:.1f} ms:", highlight=False)
        for table in self._tables():
            console.print(table, highlight=False)
        console.print(f"profile              {self._folder} (see https://ui.perfetto.dev)", highlight=False)

    def _begin(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._running = ExitStack()
        self._running.enter_context(_watched(self._collectives))
        cuda = torch.cuda.is_available()
        if cuda and "NSYS_PROFILING_SESSION_ID" in os.environ:  # Nsight Systems', which wants the GPU's counters alone
            torch.cuda.profiler.start()
            self._running.callback(torch.cuda.profiler.stop)
            self._running.enter_context(torch.autograd.profiler.emit_nvtx())
            return
        if cuda:
            torch.cuda.memory._record_memory_history(max_entries=1_000_000)
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
        self._trace = self._running.enter_context(
            profile(activities=activities, record_shapes=True, profile_memory=True)
        )

    def _end(self) -> None:
        if self._running is None:
            return
        self._running.close()
        self._running = None
        if self._trace is None:
            return
        path = self._folder / f"{self._name}.json.gz"
        self._trace.export_chrome_trace(str(path))
        self._trace = None
        _finish_trace(path, self._kernels)
        if torch.cuda.is_available():
            torch.cuda.memory._dump_snapshot(str(self._folder / f"{self._name}-memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)

    def _tables(self) -> Iterator[Table]:
        steps = len(self._seconds)
        yield _sums_table("collective", "ms waited", self._collectives, steps)
        if self._kernels:
            yield _sums_table("NCCL's kernels", "ms on the GPU", self._kernels, steps)
        if self._sent:
            table = Table("sent to other ranks", box=None)
            table.add_column("KB", justify="right")
            for what, nbytes in [*self._sent.most_common(), ("all", self._sent.total())]:
                table.add_row(what, f"{nbytes / steps / 1e3:,.1f}")
            yield table


def _sums_table(name: str, seconds: str, sums: Mapping[tuple[str, str], _Sum], steps: int) -> Table:
    table = Table(name, "group (ranks)", box=None)
    for column in ("calls", "KB", seconds):
        table.add_column(column, justify="right")
    for (name, group), each in sorted(sums.items(), key=lambda item: -item[1].seconds):
        mean = each.calls / steps, each.nbytes / steps / 1e3, each.seconds / steps * 1e3
        table.add_row(name, group, f"{mean[0]:,.1f}", f"{mean[1]:,.1f}", f"{mean[2]:,.2f}")
    return table


@contextmanager
def _watched(sums: _Sums) -> Iterator[None]:
    """Within it every collective of this process is counted, and has a range of its own in the trace."""
    kind = dist.ProcessGroup
    methods = {name: method for name, method in vars(kind).items() if name in _COLLECTIVES}
    for name, method in methods.items():
        setattr(kind, name, _counting(name.strip("_"), method, sums))
    try:
        yield
    finally:
        for name, method in methods.items():
            setattr(kind, name, method)


def _counting(name: str, method: Callable[..., Any], sums: _Sums) -> Callable[..., Any]:
    def call(group: Any, *args: Any, **kwargs: Any) -> Any:
        # The last of the first two is what is put in: outputs come before it.
        given = next((each for each in args[1::-1] if isinstance(each, torch.Tensor | list)), [])
        label = _group(group.group_desc, group.size())
        row, nbytes = sums[name, label], _nbytes(given)
        row.calls += 1
        row.nbytes += nbytes
        with record_function(f"{name}, {label}, {nbytes:,} bytes"):
            work = method(group, *args, **kwargs)
        return None if work is None else _Watched(work, row, f"wait for {name}, {label}")

    return call


def _group(description: str, size: int) -> str:
    """Megatron's EXPERT_MODEL_PARALLEL_GROUP of two ranks as `expert model (2)`."""
    return f"{description.lower().removesuffix('_group').replace('_parallel', '').replace('_', ' ')} ({size})"


def _nbytes(given: torch.Tensor | list[Any]) -> int:
    return given.nbytes if isinstance(given, torch.Tensor) else sum(map(_nbytes, given))


class _Watched:
    """A collective's handle that adds up for how long the host waits."""

    def __init__(self, work: Any, row: _Sum, label: str) -> None:
        self._work, self._row, self._label = work, row, label

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        with record_function(self._label):
            done = self._work.wait(*args, **kwargs)
        self._row.seconds += time.perf_counter() - begin
        return done

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _finish_trace(path: Path, kernels: _Sums) -> None:
    """Draw the allocations of a trace as a curve, and add up what NCCL's kernels did."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        trace = json.load(file)
    curve = []
    for event in trace["traceEvents"]:
        told = event.get("args", {})
        if event.get("name") == "[memory]":
            # A CPU's are counted from the beginning of the trace, a GPU's are all.
            device = "CPU, since the trace began" if told["Device Type"] == 0 else f"GPU {told['Device Id']}"
            place = {"ph": "C", "name": "memory (MiB)", "pid": event["pid"], "ts": event["ts"]}
            curve.append({**place, "args": {device: told["Total Allocated"] / 2**20}})
        elif event.get("cat") == "kernel" and "Collective name" in told:
            group = _group(str(told.get("Process Group Description", "")), told.get("Group size", 0))
            row = kernels[told["Collective name"], group]
            row.calls += 1
            dtype = str(told.get("dtype", "")).lower()
            row.nbytes += told.get("In msg nelems", 0) * _NCCL_BYTES.get(dtype, 1)
            row.seconds += event["dur"] / 1e6
    trace["traceEvents"] += curve
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=5) as file:
        json.dump(trace, file)


_NCCL_BYTES = {"float": 4, "bfloat16": 2, "half": 2, "double": 8, "long": 8, "int": 4}  # by the trace's names of dtypes
