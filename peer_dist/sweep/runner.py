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

from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from peer_dist.config import ConfigError, check_world, load_config
from peer_dist.machine import usable_cores
from peer_dist.measures.metrics import read_metrics
from peer_dist.mistake import Mistake
from peer_dist.ranks.exit_codes import DIVERGED, DONE, STOPPED
from peer_dist.ranks.lock import LockError, RunLock
from peer_dist.ranks.signals import StopRequest
from peer_dist.reading import as_yaml, read_json
from peer_dist.sweep.results import RESULTS, Row, problem_of, read_results, row_of, write_results
from peer_dist.sweep.spec import Run, Sweep
from peer_dist.sweep.tuning import choose_rates
from peer_dist.writing import whole

FAILED = 1
_RESULT = "result.json"
_POLL_SECONDS = 0.5
_LEAVE_SECONDS = 600.0  # for runs to save and leave
# Nobody else would end a run after its sweep was killed. Set before Python becomes the run (PR_SET_PDEATHSIG is 1): a
# function that runs between fork and exec can hang where there are threads.
_WITH_PARENT = (
    "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, int(signal.SIGTERM), 0, 0, 0); "
    f"os.getppid() == int(sys.argv[1]) or sys.exit({STOPPED}); "
    "os.execv(sys.executable, [sys.executable, '-m', *sys.argv[2:]])"
)


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
        if not pattern.strip():  # sizes and variants that are not in the file have an empty name
            raise ConfigError("--only: is empty; name a run, model, size or variant, or leave it out")
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
    """The rows of the runs that have ended, by the runs' names.

    Raises:
        ConfigError: a run's result is damaged, or another run's.
    """
    rows = {run.name: _result(sweep.folder / run.name) for run in sweep.runs}
    return {name: row for name, row in rows.items() if row is not None}


def _result(folder: Path) -> Row | None:
    """The row of the run in ``folder``; None if it has not ended.

    Raises:
        ConfigError: the file is damaged, or another run's.
    """
    path, advice = folder / _RESULT, "restore it, or delete it to have the run made again"
    if not os.path.lexists(path):
        return None
    value = read_json(path, ConfigError, advice)
    try:
        row = Row.model_validate(value)
    except ValidationError as error:
        raise ConfigError(f"{path}: is no result of a run ({problem_of(error)}); {advice}") from None
    if row.run != folder.name:
        raise ConfigError(f"{path}: is the result of the run {row.run:.80}, not of {folder.name}; {advice}")
    return row


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
    """Start ``python -m ARGUMENTS``, whose output is appended to ``log``; it gets SIGTERM if this process is killed.

    Raises:
        ConfigError: no process can be started.
    """
    start = ["-c", _WITH_PARENT, str(os.getpid())] if sys.platform == "linux" else ["-m"]
    with log.open("ab") as file:
        try:
            return subprocess.Popen(
                [sys.executable, *start, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=environment,
                start_new_session=True,  # Ctrl-C only reaches this process, which asks the runs to stop
            )
        except OSError as error:
            raise ConfigError(
                f"{arguments[-1]}: no process can be started for it ({error.strerror}); end other programs, or start "
                "fewer runs at a time (--jobs)"
            ) from None


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
        ConfigError: the ranks do not fit the config or the GPUs, a run was started with another config, or the folder
            holds another sweep's results, or cannot be written.
    """
    deadline = math.inf if limit_minutes is None else time.monotonic() + 60 * limit_minutes
    rows, gpus = finished(sweep), _gpus()
    _check_runs(sweep, runs, jobs, ranks, gpus, rows)
    _check_table(sweep)
    with _writing(sweep.folder):
        sweep.folder.mkdir(parents=True, exist_ok=True)
        write_results(sweep.folder / RESULTS, _in_order(sweep, rows))
    waiting = [run for run in runs if run.name not in rows]
    failed: list[str] = []
    elsewhere: list[str] = []
    stopping = False
    with (
        StopRequest() as stop,
        _progress(console) as progress,
        _Slots(sweep.folder, jobs, ranks, gpus, progress, start) as slots,
        _writing(sweep.folder),
    ):
        total = progress.add_task("runs", total=len(runs), completed=len(runs) - len(waiting))
        while True:
            for ended in slots.reap():
                row, outcome = ended.outcome(stopping)
                console.print(f"{ended.run.name}: {outcome}")
                if row is not None:
                    _finish(ended.folder, row, sweep.file.keep_checkpoints)
                ended.lock.__exit__(None, None, None)
                if row is not None:
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
                    while (run := _take_settled(sweep, waiting, rows)) is not None:
                        try:
                            slots.fill(slot, run)
                            break
                        except LockError as error:
                            console.print(f"{run.name}: {error}")
                            elsewhere.append(run.name)
                            rows |= finished(sweep)
            if not slots.running:
                break
            time.sleep(_POLL_SECONDS)
    if elsewhere:
        rows |= finished(sweep)
    undone = [run.name for run in runs if run.name not in rows]
    elsewhere = [name for name in elsewhere if name in undone]
    blocked = [] if stopping else [name for name in undone if name not in (*failed, *elsewhere)]
    for names, state in (
        (failed, "failed"),
        (elsewhere, "not started, because another sweep runs them"),
        (blocked, "not started, for want of their model's trials"),
    ):
        if names:
            console.print(f"{len(names)} {state}: {', '.join(names)}")
    if stopping and undone:
        console.print(f"stopped with {len(undone)} of {len(runs)} runs to do; the same command goes on")
    console.print(f"results: {sweep.folder / RESULTS}")
    return FAILED if failed or blocked or elsewhere else STOPPED if undone else DONE


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


def _check_table(sweep: Sweep) -> None:
    """Refuse to replace a table that is not this sweep's.

    Raises:
        ConfigError: it is another sweep's, another program's, or damaged.
    """
    path = sweep.folder / RESULTS
    if not os.path.lexists(path):
        return
    advice = "choose another --output, or move that file away, and it is written again"
    others = {row.run for row in read_results(path, advice)} - {run.name for run in sweep.runs}
    # runs that the sweep's file no longer has keep what they gave
    others = {name for name in others if not os.path.lexists(sweep.folder / name / _RESULT)}
    if others:
        raise ConfigError(f"{path}: has runs such as {min(others):.80}, which {sweep.path} has not; {advice}")


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """A context in which what cannot be written is told in one sentence.

    Raises:
        ConfigError: that sentence.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, Mistake):
            raise
        place = error.filename or folder
        raise ConfigError(
            f"{place}: cannot be written ({error.strerror}); make room, or choose another --output"
        ) from None


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
    lock: RunLock

    def steps_done(self) -> int:
        """The number of steps that the run has logged so far."""
        with contextlib.suppress(OSError), (self.folder / "metrics.jsonl").open("rb") as file:
            return max(0, sum(1 for _ in file) - 1)
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
        reason = _last_words(_log(self.folder)) or "it said nothing"
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

    def __enter__(self) -> _Slots:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        """Leave no run behind: those that an error has left running are asked to save and leave, then killed."""
        if kind is not None:
            self.stop()
        end = time.monotonic() + _LEAVE_SECONDS
        while self.running:
            if time.monotonic() > end:
                for child in self.running.values():
                    child.process.send_signal(signal.SIGKILL)
            for child in self.reap():
                child.lock.__exit__(None, None, None)
            time.sleep(_POLL_SECONDS)

    def free(self) -> list[int]:
        """The slots without a run."""
        return [slot for slot in range(self._jobs) if slot not in self.running]

    def fill(self, slot: int, run: Run) -> None:
        """Start a run's process in a free slot; what it prints goes to its log.

        Raises:
            LockError: another sweep runs it, or has done so meanwhile.
            OSError: its folder cannot be written.
        """
        folder = self._folder / run.name
        lock = RunLock(folder).__enter__()
        try:
            if os.path.lexists(folder / _RESULT):
                raise LockError("another sweep has made this run meanwhile")
            process = self._started(slot, run, folder)
        except BaseException:
            lock.__exit__(None, None, None)
            raise
        task = self._progress.add_task(run.name, total=run.config.train.steps)
        self.running[slot] = _Running(run, folder, process, task, lock)

    def _started(self, slot: int, run: Run, folder: Path) -> Process:
        config = folder / "config.yaml"
        with whole(config, ConfigError, str(config)) as partial:
            partial.write_text(as_yaml(run.config.model_dump(mode="json")), encoding="utf-8")
        launcher = []
        if self._ranks > 1:
            launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(self._ranks), "-m"]
        threads = max(1, usable_cores() // (self._jobs * self._ranks))
        environment = {"OMP_NUM_THREADS": str(threads), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", **os.environ}
        gpus = self._gpus[slot * self._ranks :][: self._ranks]
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        arguments = [*launcher, "peer_dist", "train", "--config", str(config)]
        return self._start(arguments, environment, _log(folder))

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


def _last_words(log: Path, most: int = 1 << 16) -> str:
    """The last line of a log that is not blank; '' if there is none, or no log."""
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - most))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
        return next((line for line in reversed(lines) if line), "")
    return ""


def _finish(folder: Path, row: Row, keep_checkpoints: bool) -> None:
    """Mark a run as finished, so that it is not run again; remove its checkpoints unless they are to be kept."""
    with whole(folder / _RESULT, ConfigError, str(folder / _RESULT)) as partial:
        partial.write_text(row.model_dump_json(indent=1), encoding="utf-8")
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
    if not os.path.lexists(path):
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
