"""Runs a sweep, or goes on with it. Each run is a process of its own, whose state is in its folder."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Protocol

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from peer_dist.config import ConfigError, check_world, load_config
from peer_dist.machine import usable_cores
from peer_dist.measures.metrics import read_metrics
from peer_dist.mistake import Mistake
from peer_dist.ranks.exit_codes import DIVERGED, DONE, STOPPED
from peer_dist.ranks.signals import StopRequest
from peer_dist.reading import reading
from peer_dist.sweep.results import RESULTS, Row, row_of, write_results
from peer_dist.sweep.spec import Run, Sweep
from peer_dist.sweep.tuning import choose_rates

FAILED = 1
_RESULT = "result.json"
_POLL_SECONDS = 0.5


def select(sweep: Sweep, patterns: Sequence[str] = (), task: int | None = None) -> list[Run]:
    """Choose runs by patterns (with * and ?) for their name, model, size or variant, and the trials they need.

    Args:
        sweep: the sweep.
        patterns: a run is chosen if it fits one of them; by default all are.
        task: the number of the only run to choose, instead of patterns.

    Raises:
        ConfigError: a pattern fits no run, or there is no such task.
    """
    if task is not None:
        if task >= len(sweep.runs):
            raise ConfigError(f"--task: {task} is not below {len(sweep.runs)}, the number of runs of {sweep.path}")
        return [sweep.runs[task]]
    if not patterns:
        return sweep.runs
    names: set[str] = set()
    for pattern in patterns:
        matching = [
            run
            for run in sweep.runs
            if any(fnmatch(name, pattern) for name in (run.name, run.model, run.size, run.variant))
        ]
        if not matching:
            raise ConfigError(
                f"--only: {pattern} is no run, model, size or variant; runs are such as {sweep.runs[-1].name}"
            )
        names |= {run.name for run in matching}
        names |= {trial.name for run in matching if run.trial is None for trial in sweep.trials(run.model)}
    return [run for run in sweep.runs if run.name in names]


def finished(sweep: Sweep) -> dict[str, Row]:
    """The rows of the runs that have ended, by the runs' names."""
    paths = {run.name: sweep.folder / run.name / _RESULT for run in sweep.runs}
    rows = {}
    for name, path in paths.items():
        if path.is_file():
            with reading(path, ConfigError, "the result of a run", "remove it to run that one again"):
                rows[name] = Row.model_validate_json(path.read_bytes())
    return rows


def settled(sweep: Sweep, run: Run, rows: dict[str, Row]) -> Run | None:
    """The run with its tuned learning rates; None as long as they are not known."""
    if sweep.file.tune is None or run.trial is not None:
        return run
    choice = choose_rates(sweep, run.model, rows)
    return None if choice is None else run.at(choice.rates)


def runs_table(sweep: Sweep, runs: Sequence[Run]) -> Table:
    """A table of runs with their costs, which says which of them are done."""
    rows, file = finished(sweep), sweep.path
    table = Table(title=f"{file}: {len(runs)} runs, {sum(run.name in rows for run in runs)} of them done", box=None)
    for column in ("run", "steps", "tokens", "parameters", "active", "FLOPs/token", "FLOPs", ""):
        table.add_column(column, justify="left" if column in ("run", "") else "right", no_wrap=True)
    spent = 0.0
    for run in runs:
        flops = run.tokens * run.cost.train_flops_per_token
        spent += flops
        counts = (run.config.train.steps, run.tokens, run.cost.total.parameters, run.cost.total.active)
        table.add_row(
            run.name,
            *(f"{count:,}" for count in counts),
            f"{run.cost.train_flops_per_token:.3g}",
            f"{flops:.3g}",
            rows[run.name].status if run.name in rows else "",
        )
    table.add_row("all", "", f"{sum(run.tokens for run in runs):,}", "", "", "", f"{spent:.3g}", "")
    return table


class Process(Protocol):
    """What a sweep asks of a run's process, as of a :class:`subprocess.Popen`."""

    returncode: int | None

    def poll(self) -> int | None:
        """The exit code, which ``returncode`` is from then on; None while the process runs."""
        ...

    def send_signal(self, number: int) -> None:
        """Send a signal to the process."""
        ...


# of the arguments of `python -m`, the environment and the log file
StartProcess = Callable[[Sequence[str], dict[str, str], Path], Process]


def start_process(arguments: Sequence[str], environment: dict[str, str], log: Path) -> Process:
    """Start ``python -m ARGUMENTS``, whose output is appended to ``log``."""
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=environment,
            start_new_session=True,  # Ctrl-C only reaches this process, which asks the runs to stop
        )


def run_sweep(
    sweep: Sweep,
    runs: Sequence[Run],
    jobs: int,
    ranks: int,
    limit_minutes: float | None,
    console: Console,
    start: StartProcess = start_process,
) -> int:
    """Run those of ``runs`` that are not done, and write the results table after each.

    A signal, or the end of the time limit, asks the running ones to save and leave; the same call goes on later.

    Args:
        sweep: the sweep, whose other runs are in the table too.
        runs: the runs to do, from :func:`select`.
        jobs: number of runs at a time; they share the cores, and the GPUs if there are some.
        ranks: number of processes of each run.
        limit_minutes: the time limit; None for no limit.
        console: where progress and outcomes are printed.
        start: starts a run's process, of the arguments of ``python -m``, its environment and its log file.

    Returns:
        The exit code: DONE, FAILED, or STOPPED if there is more to do.

    Raises:
        ConfigError: the ranks do not fit the config or the GPUs, or a run was started with another config.
    """
    deadline = math.inf if limit_minutes is None else time.monotonic() + 60 * limit_minutes
    rows, gpus = finished(sweep), _gpus()
    _check_runs(sweep, runs, jobs, ranks, gpus, rows)
    sweep.folder.mkdir(parents=True, exist_ok=True)
    write_results(sweep.folder / RESULTS, _in_order(sweep, rows))
    waiting = [run for run in runs if run.name not in rows]
    failed: list[str] = []
    stopping = False
    with StopRequest() as stop, _progress(console) as progress:
        total = progress.add_task("runs", total=len(runs), completed=len(runs) - len(waiting))
        slots = _Slots(sweep.folder, jobs, ranks, gpus, progress, start)
        while True:
            for ended in slots.reap():
                row, outcome = ended.outcome(stopping)
                console.print(f"{ended.run.name}: {outcome}")
                if row is not None:
                    _finish(ended.folder, row, sweep.file.keep_checkpoints)
                    rows |= finished(sweep)  # read again: other tasks of a job array finish runs too
                    write_results(sweep.folder / RESULTS, _in_order(sweep, rows))
                    progress.advance(total)
                    _print_choice(sweep, ended.run, rows, console)
                elif not stopping:
                    failed.append(ended.run.name)
            if not stopping and (stop.received is not None or time.monotonic() >= deadline):
                stopping = True
                slots.stop()
            if not stopping:
                for slot in slots.free():
                    run = _take_settled(sweep, waiting, rows)
                    if run is not None:
                        slots.fill(slot, run)
            if not slots.running:
                break
            time.sleep(_POLL_SECONDS)
    undone = [run.name for run in runs if run.name not in rows]
    blocked = [] if stopping else [name for name in undone if name not in failed]
    for names, state in ((failed, "failed"), (blocked, "not started, for want of their model's trials")):
        if names:
            console.print(f"{len(names)} {state}: {', '.join(names)}")
    if stopping and undone:
        console.print(f"stopped with {len(undone)} of {len(runs)} runs to do; the same command goes on")
    console.print(f"results: {sweep.folder / RESULTS}")
    return FAILED if failed or blocked else STOPPED if undone else DONE


def _check_runs(
    sweep: Sweep, runs: Sequence[Run], jobs: int, ranks: int, gpus: Sequence[str], rows: dict[str, Row]
) -> None:
    """Refuse what cannot be run.

    Raises:
        ConfigError: there are too few GPUs, a layout does not fit the ranks, or a run was started with another config.
    """
    if gpus and jobs * ranks > len(gpus):
        raise ConfigError(f"--jobs {jobs} x --ranks {ranks}: needs {jobs * ranks} GPUs, and {len(gpus)} can be seen")
    for run in runs:
        check_world(run.config, ranks)
    for run in sweep.runs:
        tuned = settled(sweep, run, rows)
        if tuned is not None:
            _check_unchanged(sweep.folder / run.name, tuned)


def _take_settled(sweep: Sweep, waiting: list[Run], rows: dict[str, Row]) -> Run | None:
    """Remove the first run with known learning rates from ``waiting`` and return it with them, or None."""
    for place, run in enumerate(waiting):
        tuned = settled(sweep, run, rows)
        if tuned is not None:
            del waiting[place]
            return tuned
    return None


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    )


@dataclass
class _Running:
    """A run that has a process."""

    run: Run
    folder: Path
    process: Process
    task: TaskID

    def steps_done(self) -> int:
        """The number of steps that the run has logged so far."""
        try:
            return max(0, sum(1 for _ in (self.folder / "metrics.jsonl").open("rb")) - 1)
        except OSError:
            return 0

    def outcome(self, stopped: bool) -> tuple[Row | None, str]:
        """The row of the run and a text about its outcome; without a row the run has not reached an end.

        Args:
            stopped: whether the run was asked to stop.
        """
        code, path = self.process.returncode, self.folder / "metrics.jsonl"
        metrics: list[dict[str, Any]] = []
        with contextlib.suppress(Mistake):  # the run has said so itself
            metrics = read_metrics(path) if path.is_file() else []
        complete = code == DONE and metrics and metrics[-1]["step"] == self.run.config.train.steps
        if complete and "val/loss" not in metrics[-1]:
            return None, "failed: its validation split has no whole sequence; raise the second share of data.split"
        if complete or code == DIVERGED:
            row = row_of(self.run, metrics, diverged=code == DIVERGED)
            return row, "diverged" if row.val_loss is None else f"loss {row.val_loss:.4f}, {row.train_seconds:.0f} s"
        if stopped:
            return None, f"stopped at step {self.steps_done()} of {self.run.config.train.steps}"
        lines = [line.strip() for line in _log(self.folder).read_text(errors="replace").splitlines() if line.strip()]
        reason = lines[-1] if lines else "it said nothing"
        return None, f"failed (exit code {code}): {reason}; see {_log(self.folder)}"


class _Slots:
    """The machine in slots with equal shares of its cores and GPUs; one run at a time has a slot.

    Args:
        folder: holds the folders of the runs.
        jobs: number of slots.
        ranks: number of processes of each run.
        gpus: the GPUs to share, by CUDA's names; empty without GPUs.
        progress: where the steps of the runs are shown.
        start: starts a run's process.

    Attributes:
        running: the run of each slot that is not free.
    """

    def __init__(
        self,
        folder: Path,
        jobs: int,
        ranks: int,
        gpus: Sequence[str],
        progress: Progress,
        start: StartProcess,
    ) -> None:
        self.running: dict[int, _Running] = {}
        self._start = start
        self._folder, self._jobs, self._ranks, self._gpus, self._progress = folder, jobs, ranks, gpus, progress

    def free(self) -> list[int]:
        """The slots without a run."""
        return [slot for slot in range(self._jobs) if slot not in self.running]

    def fill(self, slot: int, run: Run) -> None:
        """Start a run's process in a free slot; what it prints goes to its log."""
        folder = self._folder / run.name
        folder.mkdir(exist_ok=True)
        config = folder / "config.yaml"
        config.write_text(yaml.safe_dump(run.config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
        launcher = []
        if self._ranks > 1:
            launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(self._ranks), "-m"]
        threads = max(1, usable_cores() // (self._jobs * self._ranks))
        environment = {"OMP_NUM_THREADS": str(threads), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", **os.environ}
        gpus = self._gpus[slot * self._ranks :][: self._ranks]
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        arguments = [*launcher, "peer_dist", "train", "--config", str(config)]
        process = self._start(arguments, environment, _log(folder))
        task = self._progress.add_task(run.name, total=run.config.train.steps)
        self.running[slot] = _Running(run, folder, process, task)

    def reap(self) -> Iterator[_Running]:
        """Yield the runs that have ended, whose slots are now free, and show the progress of the others."""
        for slot, child in list(self.running.items()):
            self._progress.update(child.task, completed=child.steps_done())
            if child.process.poll() is not None:
                del self.running[slot]
                self._progress.remove_task(child.task)
                yield child

    def stop(self) -> None:
        """Ask all runs to save and leave."""
        for child in self.running.values():
            child.process.send_signal(signal.SIGTERM)


def _log(folder: Path) -> Path:
    """The log file of a run, in its folder."""
    return folder / "log.txt"


def _finish(folder: Path, row: Row, keep_checkpoints: bool) -> None:
    """Mark a run as finished, so that it is not run again; remove its checkpoints unless they are to be kept."""
    partial = folder / f".{_RESULT}"
    partial.write_text(row.model_dump_json(indent=1), encoding="utf-8")
    os.replace(partial, folder / _RESULT)
    if not keep_checkpoints:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def _in_order(sweep: Sweep, rows: dict[str, Row]) -> list[Row]:
    """The rows in the order of the sweep's runs."""
    return [rows[run.name] for run in sweep.runs if run.name in rows]


def _check_unchanged(folder: Path, run: Run) -> None:
    """Refuse to mix the results of two versions of a sweep's file in one folder.

    Raises:
        ConfigError: the run in the folder was started with another config.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        return
    before, now = load_config(path).model_dump(mode="json"), run.config.model_dump(mode="json")
    # the steps first, because other values follow from them
    for section, keys in sorted(now.items(), key=lambda item: item[0] != "train"):
        for key, value in keys.items():
            if key != "dir" and before[section][key] != value:
                steps = " (by its budgets or tokens)" if (section, key) == ("train", "steps") else ""
                raise ConfigError(
                    f"{folder}: was run with {section}.{key} {before[section][key]}, and the sweep's file gives "
                    f"{value}{steps}; choose another --output, or delete that folder"
                )


def _print_choice(sweep: Sweep, run: Run, rows: dict[str, Row], console: Console) -> None:
    """After a model's last trial, print the learning rates that were chosen."""
    choice = choose_rates(sweep, run.model, rows) if run.trial is not None else None
    if choice is not None:
        console.print(f"{run.model}: {choice}")


def _gpus() -> list[str]:
    """CUDA's names of the GPUs that this process sees, which the runs share."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible is not None else [str(n) for n in range(torch.cuda.device_count())]
    return names[: torch.cuda.device_count()]
