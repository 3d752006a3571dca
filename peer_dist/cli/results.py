"""The commands for many runs and their results: sweep, plot, report. Heavy imports happen inside the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peer_dist.cli.options import WIDTH, OptionError, Sbatch, number, whole
from peer_dist.output import messages, results, show


def sweep(
    file: Annotated[Path, typer.Argument(help="YAML file of the sweep.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the runs. Default: runs/NAME.", show_default=False)
    ] = None,
    jobs: Annotated[int, whole(1, 1024, "Runs at a time; they share cores and GPUs.")] = 1,
    ranks: Annotated[int, whole(1, 1024, "Processes of each run.")] = 1,
    limit_minutes: Annotated[
        float | None, number(0, 10**8, "Stop after this; the same command goes on.", show_default=False)
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="A run, model, size or variant, also with * and ?; repeatable.")
    ] = None,
    task: Annotated[int | None, whole(0, 10**6, "Run this one (from 0) alone.", show_default=False)] = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="Submit the runs as a Slurm job array instead.")] = False,
    sbatch: Sbatch = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the runs (or the batch script) alone.")] = False,
) -> None:
    """Train a grid of models, sizes, budgets and seeds, going on where it was left; results go to results.csv."""
    from peer_dist.sweep.spec import load_sweep

    if slurm and (only or task is not None or limit_minutes is not None):
        raise OptionError("--slurm: submits the whole sweep; leave out --only, --task and --limit-minutes")
    loaded = load_sweep(file, output or Path("runs") / file.stem)
    if slurm:
        from peer_dist.sweep.array import submit_array

        show(submit_array(loaded, ranks, jobs, sbatch or [], dry_run))
        return
    from peer_dist.sweep.runner import run_sweep, runs_table, select

    runs = select(loaded, only or [], task)
    if dry_run:
        results(WIDTH).print(runs_table(loaded, runs))
        return
    raise typer.Exit(run_sweep(loaded, runs, jobs, ranks, limit_minutes, messages()))


def plot(
    inputs: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="Sweeps' folders or results.csv, folders of runs, usage .npz files."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the figures.")],
    kind: Annotated[
        list[str] | None,
        typer.Option(help="isoflop, models, loss, experts, hk or usage; repeatable. Default: all that can be drawn."),
    ] = None,
    against: Annotated[
        str, typer.Option(help="Size of isoFLOP curves: train_flops_per_token, active_parameters or parameters.")
    ] = "train_flops_per_token",
) -> None:
    """Draw results as PNG and SVG: isoFLOP curves with their optima, losses, usage of experts."""
    from peer_dist.plots.command import plot as run
    from peer_dist.plots.command import results_of, tables

    paths = run(inputs, output, kind or [], against)
    for table in tables(results_of(inputs), against):
        results(WIDTH).print(table)
    for path in paths:
        show(path)


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs; several are compared.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="HTML file. Default: report.html, in the run's folder or for several here."
        ),
    ] = None,
) -> None:
    """What was run and what came of it, as one HTML page that needs nothing else."""
    from peer_dist.report.page import write_report

    show(write_report(runs, output))
