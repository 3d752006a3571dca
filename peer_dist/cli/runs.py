"""The commands that start a training run: train, submit, doctor. Heavy imports happen inside the commands."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from peer_dist.cli.options import MOST_RANKS, AsJson, ConfigFile, Overrides, Sbatch, number, queue_for_ranks, whole
from peer_dist.mistake import in_words, shown
from peer_dist.output import show


def train(
    config: ConfigFile,
    overrides: Overrides = None,
    profile: Annotated[
        str | None,
        typer.Option(
            metavar="FIRST:LAST",
            help="Trace these steps on every rank, into profile/ of logging.dir, and show what collectives cost.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Train a model, going on from its newest checkpoint if there is one.

    Alone, or a process per GPU under torchrun, srun or mpirun:  torchrun --nproc-per-node 8 -m peer_dist train -c FILE
    """
    from peer_dist.config import check_world, load_config
    from peer_dist.ranks.launchers import ranks_started

    settings = load_config(config, overrides or [])
    if started := ranks_started(os.environ):
        check_world(settings, started)  # training asks again, but only after seconds of imports
    steps = None if profile is None else _steps(profile, settings.train.steps)
    queue_for_ranks(settings.parallel.tensor)
    from peer_dist.training import train as run

    raise typer.Exit(run(settings, steps))


def submit(
    config: ConfigFile,
    overrides: Overrides = None,
    nodes: Annotated[int, whole(1, MOST_RANKS, "Nodes.")] = 1,
    gpus_per_node: Annotated[int, whole(0, 1024, "GPUs of each; 0: train on CPUs.")] = 0,
    ranks_per_node: Annotated[
        int | None, whole(1, 4096, "Ranks on each. Default: one per GPU, or one.", show_default=False)
    ] = None,
    time_limit: Annotated[
        str | None, typer.Option("--time", help="Time limit: minutes, HH:MM:SS or D-HH:MM:SS.", show_default=False)
    ] = None,
    sbatch: Sbatch = None,
    signal_lead: Annotated[
        int, whole(1, 10**6, "Seconds before the time limit at which the run saves; Slurm is up to 30 s late.")
    ] = 120,
    container: Annotated[str | None, typer.Option(help="Image to run in.", show_default=False)] = None,
    container_runtime: Annotated[str, typer.Option(help="What runs it: pyxis or apptainer.")] = "pyxis",
    setup: Annotated[
        Path | None,
        typer.Option(help="Shell file that each rank reads first: modules, NCCL variables.", show_default=False),
    ] = None,
    stage: Annotated[
        Path | None,
        typer.Option(help="Environment to copy to the nodes' disks: a folder or a tar file.", show_default=False),
    ] = None,
    local_disk: Annotated[Path, typer.Option(help="Folder on each node's own disk.")] = Path("/tmp"),
    doctor: Annotated[bool, typer.Option("--doctor", help="Let peer-dist doctor examine all ranks first.")] = False,
    chain: Annotated[int, whole(0, 1000, "Jobs that follow, each when the one before has ended.")] = 0,
    requeue: Annotated[
        bool | None,
        typer.Option(
            "--requeue/--no-requeue",
            help="Start again after a time limit, preemption or crash. Default: yes, without --chain.",
        ),
    ] = None,
    max_restarts: Annotated[int, whole(0, 10**6, "Restarts in a row without a new checkpoint.")] = 10,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the batch script, and submit nothing.")] = False,
) -> None:
    """Submit a training run to Slurm; it goes on by itself after time limits, preemption and lost nodes."""
    from peer_dist.slurm.script import SubmitError
    from peer_dist.slurm.submit import Job
    from peer_dist.slurm.submit import submit as run

    if container_runtime not in ("pyxis", "apptainer"):
        raise SubmitError(f"--container-runtime: {container_runtime!r} is not known; pyxis or apptainer")
    job = Job(
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        ranks_per_node=ranks_per_node,
        time_limit=time_limit,
        signal_lead=signal_lead,
        container=container,
        runtime="pyxis" if container_runtime == "pyxis" else "apptainer",
        doctor=doctor,
        setup=setup,
        stage=stage,
        local_disk=local_disk,
        chain=chain,
        requeue=requeue,
        max_restarts=max_restarts,
        options=tuple(sbatch or ()),
    )
    show(run(config, overrides or [], job, dry_run))


def doctor(
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="YAML file of the run: its layout, folders and data.")
    ] = None,
    overrides: Overrides = None,
    seconds: Annotated[float, number(1, 10**6, "Time limit of each check; who takes longer is named.")] = 30.0,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Instead: measure these machines' rates, for peer-dist plan --gpu FILE.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Examine machines, folders and network before a run, on all ranks that will train. Exit code 1: do not start.

    Alone, or as the run will be started:  torchrun --nproc-per-node 8 -m peer_dist doctor -c FILE

    Of GPUs it also says driver, speed and links, compares the kernels with their reference, and times a PEER layer
    against the bytes that it must move. Without a config it takes all GPUs of this machine.
    """
    from peer_dist.config import ConfigError, load_config

    if overrides and config is None:
        raise ConfigError(
            f"command line: {shown(overrides[0], 80)} changes a key of a config; give its file (--config)"
        )
    settings = None if config is None else load_config(config, overrides or [])
    from peer_dist.doctor.console import run

    run(settings, seconds, as_json=as_json, hardware=calibrate)


def _steps(text: str, last: int) -> range:
    """``10:15`` as the steps 10 to 15."""
    from peer_dist.config import ConfigError

    first, colon, end = text.partition(":")
    written = in_words(text, 40)
    if not (first.isdecimal() and (end if colon else first).isdecimal()) or len(text) > 40:
        raise ConfigError(
            f"--profile {written}: is no range of steps; write 10:15 for the steps 10 to 15, or 10 for one"
        )
    steps = range(int(first), int(end or first) + 1)
    if not steps or steps[0] < 1 or steps[-1] > last:
        raise ConfigError(f"--profile {written}: the run has the steps 1 to {last} (train.steps); name some of them")
    return steps
