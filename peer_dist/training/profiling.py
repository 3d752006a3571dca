"""Profiles a few steps: the trace and the memory of each rank, and its collectives' bytes and waiting times.

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

from peer_dist.mistake import in_words
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
    """Totals over the profiled steps for one collective in one group.

    Attributes:
        calls: number of calls.
        nbytes: bytes that this rank put in (for ``recv``, that it got).
        seconds: time for which this rank's host waited; for NCCL's kernels, for which they ran.
    """

    calls: int = 0
    nbytes: int = 0
    seconds: float = 0.0


_Sums = defaultdict[tuple[str, str], _Sum]  # by collective and group


class Profile:
    """Traces some steps of this rank. In all other steps nothing is measured or replaced.

    Args:
        steps: the numbers of the steps to trace, counted from 1.
        folder: where the traces are written, a file per rank.
    """

    def __init__(self, steps: range, folder: Path) -> None:
        self._steps, self._folder = steps, folder
        self._name = f"rank-{dist.get_rank()}-steps-{steps[0]}-{steps[-1]}"
        self._running: ExitStack | None = None
        self._trace: profile | None = None
        self._seconds: list[float] = []
        self._collectives, self._kernels = _Sums(_Sum), _Sums(_Sum)
        self._sent: Counter[str] = Counter()
        self._lost = ""  # why the trace could not be written

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """A context for step ``number``: the first of the steps begins the trace, and the last one writes it."""
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
        """Add the bytes that a layer's exchange sent in this step."""
        if self._running is not None:
            self._sent += traffic.sent

    def conclude(self, console: Console) -> None:
        """Write a trace that the run's end has cut short, and print what this rank's collectives did."""
        self._end()
        if not self._seconds:
            console.print(
                f"nothing profiled: the run had none of the steps {self._steps[0]} to {self._steps[-1]}",
                highlight=False,
            )
            return
        steps, seconds = len(self._seconds), sum(self._seconds)
        console.print(f"{self._name}, means of {steps} step(s) of {seconds / steps * 1e3:.1f} ms:")
        for table in self._tables():
            console.print(table)
        if self._lost:
            console.print(f"no profile could be written to {self._folder}: {self._lost}")
            return
        console.print(f"profile              {self._folder} (see https://ui.perfetto.dev)")

    def _begin(self) -> None:
        """Start the profilers and the counting of collectives."""
        self._running = ExitStack()
        self._running.enter_context(_watched(self._collectives))
        cuda = torch.cuda.is_available()
        if cuda and "NSYS_PROFILING_SESSION_ID" in os.environ:  # only one profiler can use the GPU's counters
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
        """Stop the profilers, if they run, and write what they recorded."""
        if self._running is None:
            return
        self._running.close()
        self._running = None
        if self._trace is None:
            return
        path = self._folder / f"{self._name}.json.gz"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._trace.export_chrome_trace(str(path))
            _finish_trace(path, self._kernels)
            if torch.cuda.is_available():
                torch.cuda.memory._dump_snapshot(str(self._folder / f"{self._name}-memory.pickle"))
        except (OSError, RuntimeError, EOFError, ValueError) as error:  # torch may write half a file, and say nothing
            self._lost = in_words(error)
        self._trace = None
        if torch.cuda.is_available():
            torch.cuda.memory._record_memory_history(enabled=None)

    def _tables(self) -> Iterator[Table]:
        """Yield tables of collectives, of NCCL's kernels and of the bytes of exchanges, all means per step."""
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
    """A table of means per step, the collective with the most seconds first.

    Args:
        name: heading of the first column.
        seconds: heading of the column of times, which are shown in milliseconds.
    """
    table = Table(name, "group (ranks)", box=None)
    for column in ("calls", "KB", seconds):
        table.add_column(column, justify="right")
    for (collective, group), row in sorted(sums.items(), key=lambda item: -item[1].seconds):
        calls, kilobytes, milliseconds = row.calls / steps, row.nbytes / steps / 1e3, row.seconds / steps * 1e3
        table.add_row(collective, group, f"{calls:,.1f}", f"{kilobytes:,.1f}", f"{milliseconds:,.2f}")
    return table


@contextmanager
def _watched(sums: _Sums) -> Iterator[None]:
    """A context in which every collective of this process is counted in ``sums``, and is a range in the trace."""
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
    """``method`` of a process group, which counts its calls and bytes in ``sums`` and returns a timed handle."""

    def call(group: Any, *args: Any, **kwargs: Any) -> Any:
        # outputs come before inputs: of the first two arguments the last tensors are the inputs
        inputs = next((argument for argument in args[1::-1] if isinstance(argument, torch.Tensor | list)), [])
        label = _group(group.group_desc, group.size())
        row, nbytes = sums[name, label], _nbytes(inputs)
        row.calls += 1
        row.nbytes += nbytes
        with record_function(f"{name}, {label}, {nbytes:,} bytes"):
            work = method(group, *args, **kwargs)
        return None if work is None else _Watched(work, row, f"wait for {name}, {label}")

    return call


def _group(description: str, size: int) -> str:
    """A group's name for people: Megatron's EXPERT_MODEL_PARALLEL_GROUP of two ranks is `expert model (2)`."""
    return f"{description.lower().removesuffix('_group').replace('_parallel', '').replace('_', ' ')} ({size})"


def _nbytes(tensors: torch.Tensor | list[Any]) -> int:
    """Bytes of a tensor, or of all tensors in nested lists."""
    return tensors.nbytes if isinstance(tensors, torch.Tensor) else sum(map(_nbytes, tensors))


class _Watched:
    """A collective's handle that adds the time for which the host waits to ``row``."""

    def __init__(self, work: Any, row: _Sum, label: str) -> None:
        self._work, self._row, self._label = work, row, label

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        with record_function(self._label):
            result = self._work.wait(*args, **kwargs)
        self._row.seconds += time.perf_counter() - begin
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _finish_trace(path: Path, kernels: _Sums) -> None:
    """Add a curve of the memory in use to the trace's file, and the calls of NCCL's kernels to ``kernels``."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        trace = json.load(file)
    curve = []
    for event in trace["traceEvents"]:
        details = event.get("args", {})
        if event.get("name") == "[memory]":
            # a CPU's allocations are counted only from the beginning of the trace on
            device = "CPU, since the trace began" if details["Device Type"] == 0 else f"GPU {details['Device Id']}"
            place = {"ph": "C", "name": "memory (MiB)", "pid": event["pid"], "ts": event["ts"]}
            curve.append({**place, "args": {device: details["Total Allocated"] / 2**20}})
        elif event.get("cat") == "kernel" and "Collective name" in details:
            group = _group(str(details.get("Process Group Description", "")), details.get("Group size", 0))
            row = kernels[details["Collective name"], group]
            row.calls += 1
            dtype = str(details.get("dtype", "")).lower()
            row.nbytes += details.get("In msg nelems", 0) * _NCCL_BYTES.get(dtype, 1)
            row.seconds += event["dur"] / 1e6
    trace["traceEvents"] += curve
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=5) as file:
        json.dump(trace, file)


# bytes of a number, by the names that a trace has for dtypes
_NCCL_BYTES = {"float": 4, "bfloat16": 2, "half": 2, "double": 8, "long": 8, "int": 4}
