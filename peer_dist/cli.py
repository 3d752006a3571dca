"""The command line. Heavy imports happen inside the commands, so that help and mistakes answer at once."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperCommand

from peer_dist.training.exits import MISTAKE

app = typer.Typer(
    name="peer-dist",
    help="Train, evaluate and run PEER language models: a Mixture of a Million Experts over many ranks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="SECTION.KEY=VALUE", help="Change single keys of the file.", show_default=False),
]


class _WithKeys(TyperCommand):
    """A command whose help lists every key of the config."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        from peer_dist.config.reference import key_tables

        console = Console()
        console.print("The config file's sections and keys:\n")
        for table in key_tables():
            console.print(table)


def _version(wanted: bool) -> None:
    if wanted:
        from peer_dist import __version__

        typer.echo(f"peer_dist {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


@app.command(cls=_WithKeys)
def train(
    config: Annotated[Path, typer.Option("--config", "-c", help="YAML file of the run.", show_default=False)],
    overrides: Overrides = None,
) -> None:
    """Train a model, going on from its newest checkpoint if there is one.

    Alone, or a process per GPU under torchrun, srun or mpirun:  torchrun --nproc-per-node 8 -m peer_dist train -c FILE
    """
    from peer_dist.config import load_config

    settings = load_config(config, overrides or [])
    from peer_dist.training import train as run

    raise typer.Exit(run(settings))


@app.command()
def submit(
    config: Annotated[Path, typer.Option("--config", "-c", help="YAML file of the run.", show_default=False)],
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(help="Nodes.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="GPUs of each; 0: train on CPUs.")] = 0,
    ranks_per_node: Annotated[
        int | None, typer.Option(help="Ranks on each. Default: one per GPU, or one.", show_default=False)
    ] = None,
    cpus_per_rank: Annotated[int | None, typer.Option(min=1, help="Cores of each rank.", show_default=False)] = None,
    time_limit: Annotated[
        str | None, typer.Option("--time", help="Time limit: minutes, HH:MM:SS or D-HH:MM:SS.", show_default=False)
    ] = None,
    account: Annotated[str | None, typer.Option(help="Account to charge.", show_default=False)] = None,
    partition: Annotated[str | None, typer.Option(help="Partition.", show_default=False)] = None,
    qos: Annotated[str | None, typer.Option(help="Quality of service.", show_default=False)] = None,
    name: Annotated[str, typer.Option(help="The job's name.")] = "peer_dist",
    sbatch: Annotated[
        list[str] | None,
        typer.Option(help="More of sbatch's options, such as --sbatch=--constraint=h100; repeatable."),
    ] = None,
    signal_lead: Annotated[
        int, typer.Option(min=1, help="Seconds before the time limit at which the run saves; Slurm is up to 30 s late.")
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
    chain: Annotated[int, typer.Option(min=0, help="Jobs that follow, each when the one before has ended.")] = 0,
    requeue: Annotated[
        bool | None,
        typer.Option(
            "--requeue/--no-requeue",
            help="Start again after a time limit, preemption or crash. Default: yes, without --chain.",
        ),
    ] = None,
    max_restarts: Annotated[int, typer.Option(min=0, help="Restarts in a row without a new checkpoint.")] = 10,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the batch script, and submit nothing.")] = False,
) -> None:
    """Submit a training run to Slurm; it goes on by itself after time limits, preemption and lost nodes."""
    from peer_dist.slurm.submit import Job, SubmitError
    from peer_dist.slurm.submit import submit as run

    if container_runtime not in ("pyxis", "apptainer"):
        raise SubmitError(f"--container-runtime: {container_runtime!r} is not known; pyxis or apptainer")
    job = Job(
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        ranks_per_node=ranks_per_node,
        time_limit=time_limit,
        account=account,
        partition=partition,
        qos=qos,
        name=name,
        cpus_per_rank=cpus_per_rank,
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
    typer.echo(run(config, overrides or [], job, dry_run))


@app.command()
def prepare(
    output: Annotated[Path, typer.Option("--output", "-o", help="Prefix of the files to write.")],
    inputs: Annotated[
        list[Path] | None,
        typer.Option("--input", "-i", help="A .txt or .jsonl file, also .gz; repeatable. Default: the text shipped."),
    ] = None,
    more: Annotated[list[Path] | None, typer.Argument(metavar="FILE", help="More input files.")] = None,
    tokenizer: Annotated[str, typer.Option(help="'byte', or a tokenizer.json of Hugging Face.")] = "byte",
    train_bpe: Annotated[
        int | None,
        typer.Option(help="First learn a byte-level BPE vocabulary of this size.", show_default=False),
    ] = None,
    max_document: Annotated[
        int, typer.Option(help="Characters after which a .txt is cut into documents, at blank lines.")
    ] = 16384,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing data set.")] = False,
) -> None:
    """Turn text into the token files that training reads (Megatron's .bin and .idx)."""
    from peer_dist.data.prepare import prepare as run

    console = Console(stderr=True)
    files = [*(inputs or []), *(more or [])]
    made = run(files or None, output, tokenizer, train_bpe, max_document, force=force, console=console)
    console.print(
        f"{output}: {made.documents:,} documents, {made.tokens:,} tokens, vocabulary {made.vocab_size:,}",
        highlight=False,
    )


@app.command()
def evaluate(
    checkpoint: Annotated[str, typer.Option(help="A checkpoint, or a folder of them (the newest is taken).")],
    prefix: Annotated[
        str | None, typer.Option("--data", help="A prepared data set. Default: the one it was trained on.")
    ] = None,
    split: Annotated[str, typer.Option(help="validation, test, or all of the data set.")] = "validation",
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per rank and forward pass.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Perplexity of a checkpoint on held-out text, with expert usage and the unigram line beside it."""
    from peer_dist.evaluation.report import evaluate as run

    report = run(checkpoint, prefix, split, batch_size)
    if report is None:  # another rank prints
        return
    if as_json:
        typer.echo(report.json())
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in report.rows():
        table.add_row(name, value)
    Console().print(table, highlight=False)


@app.command()
def generate(
    checkpoint: Annotated[str, typer.Option(help="A checkpoint, or a folder of them (the newest is taken).")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to draw.")] = 200,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the most likely token.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Draw among the k most likely; 0: all.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
) -> None:
    """Continue a text with a trained model."""
    from peer_dist.evaluation.generate import generate as run
    from peer_dist.evaluation.loading import load_model
    from peer_dist.training.checkpoints import find_checkpoint
    from peer_dist.training.world import World

    find_checkpoint(checkpoint)
    world = World.from_environment()
    with world.joined():
        loaded = load_model(checkpoint, world.world_size)
        sys.stdout.write(prompt if world.rank == 0 else "")
        for piece in run(loaded, prompt, tokens, temperature, top_k, seed):
            if world.rank == 0:
                sys.stdout.write(piece)
                sys.stdout.flush()
        sys.stdout.write("\n" if world.rank == 0 else "")


@app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="YAML file of the run: its folders and layout.")
    ] = None,
    overrides: Overrides = None,
    seconds: Annotated[float, typer.Option(min=1, help="Time limit of each check; who takes longer is named.")] = 30.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Examine machines, folders and network before a run, on all ranks that will train. Exit code 1: do not start.

    Alone, or as the run will be started:  torchrun --nproc-per-node 8 -m peer_dist doctor -c FILE
    """
    from peer_dist.config import load_config

    settings = None if config is None else load_config(config, overrides or [])
    from peer_dist.doctor.console import run

    run(settings, seconds, as_json=as_json)


def main() -> None:
    """Run a command; what a user can mend is told in one sentence, with exit code 2."""
    try:
        app(standalone_mode=True)
    except Exception as error:
        if not _is_users(error):
            raise
        names = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID")
        rank = next((os.environ[name] for name in names if name in os.environ), "0")
        if rank != "0" and type(error).__name__ != "WorldError":
            # Rank 0 finds most mistakes too, says so and leaves, and the launcher ends the others meanwhile.
            time.sleep(15)
        where = f" (rank {rank})" if rank != "0" else ""
        Console(stderr=True).print(f"[red]error{where}:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise SystemExit(getattr(error, "exit_code", MISTAKE)) from None


def _is_users(error: Exception) -> bool:
    """Whether the message alone says what to do. Looked up by name: importing the classes would take seconds."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return not names.isdisjoint(
        {"ConfigError", "DataError", "CheckpointError", "WorldError", "LockError", "SubmitError"}
    )


if __name__ == "__main__":
    main()
