"""The command line. Heavy imports happen inside the commands, so that help and mistakes answer at once."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperCommand

from peer_dist.ranks.exit_codes import MISTAKE

if TYPE_CHECKING:
    from peer_dist.config import Config

app = typer.Typer(
    name="peer-dist",
    help="Train, evaluate and run PEER language models: a Mixture of a Million Experts over many ranks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Checkpoint = Annotated[str, typer.Option(help="A checkpoint, or a folder of them (the newest is taken).")]
DataPrefix = Annotated[
    str | None, typer.Option("--data", help="A prepared data set. Default: the one it was trained on.")
]
Split = Annotated[str, typer.Option(help="validation, test, or all of the data set.")]
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
    from peer_dist.config import load_config

    settings = load_config(config, overrides or [])
    steps = None if profile is None else _steps(profile, settings.train.steps)
    from peer_dist.training import train as run

    raise typer.Exit(run(settings, steps))


@app.command()
def submit(
    config: Annotated[Path, typer.Option("--config", "-c", help="YAML file of the run.", show_default=False)],
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(help="Nodes.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="GPUs of each; 0: train on CPUs.")] = 0,
    ranks_per_node: Annotated[
        int | None, typer.Option(help="Ranks on each. Default: one per GPU, or one.", show_default=False)
    ] = None,
    time_limit: Annotated[
        str | None, typer.Option("--time", help="Time limit: minutes, HH:MM:SS or D-HH:MM:SS.", show_default=False)
    ] = None,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(help="Any other option of sbatch, such as --sbatch=--partition=gpu; repeatable."),
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
def match(
    config: Annotated[Path, typer.Option("--config", "-c", help="YAML file of the run.", show_default=False)],
    overrides: Overrides = None,
    kind: Annotated[
        list[str] | None,
        typer.Option(help="Partner's kind, as in model.mlp; repeatable. Default: all others."),
    ] = None,
    mode: Annotated[
        str,
        typer.Option(
            help="What is made equal: budget (training FLOPs of the run, by its steps), flops or params (of the "
            "feed-forward layers, by their sizes)."
        ),
    ] = "budget",
    reference_kind: Annotated[
        str | None, typer.Option(help="Kind of the layers to replace. Default: the one that is not dense.")
    ] = None,
    tolerance: Annotated[float, typer.Option(min=0, help="Deviation from which on there is a warning.")] = 0.02,
    folder: Annotated[
        Path | None, typer.Option("--write", help="Folder for the partners' configs.", show_default=False)
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(min=1, help="Rows of the embedding. Default: the data's tokenizer's, padded.")
    ] = None,
) -> None:
    """Find the runs that cost the same as this one with other feed-forward layers, to compare it with."""
    from peer_dist.config import load_config
    from peer_dist.sweep.match import comparison, misses, overruled, write
    from peer_dist.sweep.match import match as run

    settings = load_config(config, overrides or [])
    if vocab_size is None:
        vocab_size = _vocab_size(settings)
    partners = run(settings, vocab_size, kind or [], mode, reference_kind, tolerance)
    Console().print(comparison(partners))
    console = Console(stderr=True)
    for sentence in [*overruled(partners, overrides or []), *misses(partners, tolerance)]:
        console.print(f"[yellow]warning:[/] {escape(sentence)}", highlight=False, soft_wrap=True)
    if folder is not None:
        for path in write(partners[1:], folder, config.stem, mode):
            console.print(f"wrote {escape(str(path))}", highlight=False, soft_wrap=True)


@app.command()
def plan(
    config: Annotated[Path, typer.Option("--config", "-c", help="YAML file of the run.", show_default=False)],
    overrides: Overrides = None,
    gpu: Annotated[
        str, typer.Option(help="Device: h100, h200, a100, b200, cpu, or a .yaml file with the figures of another.")
    ] = "h100",
    gpus: Annotated[int | None, typer.Option(min=1, help="Devices (ranks). Default: a node's.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="Devices of a node. Default: the device's.")] = None,
    search: Annotated[bool, typer.Option("--search", help="Find the best of all layouts that fit.")] = False,
    tokens: Annotated[
        float | None, typer.Option(min=1, help="Tokens to train on. Default: those of the config's steps.")
    ] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Price of a device per hour.")] = None,
    hits: Annotated[
        float | None,
        typer.Option(min=1, help="Row shards that a token hits, as measured. Default: that of uniform picks."),
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(min=1, help="Rows of the embedding. Default: the data's tokenizer's, padded.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--write", help="File for the config with the best layout.", show_default=False)
    ] = None,
    construct: Annotated[
        str | None,
        typer.Option(
            metavar="RANK",
            help="Build the real model of this rank (or of the first and last rank of all stages: stages) without "
            "memory and without the others, and show what it holds and sends.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON object; with --search a list of them, best first.")
    ] = False,
) -> None:
    """What a run needs, before anything is rented: memory, bytes sent, time, cost. Exit code 1: it does not fit."""
    from peer_dist.config import ConfigError, load_config, write_config
    from peer_dist.planning.hardware import load_hardware
    from peer_dist.planning.plan import plan as run
    from peer_dist.planning.plan import unchecked
    from peer_dist.planning.search import SHOWN, advice, search_table
    from peer_dist.planning.search import search as find

    settings, hardware = load_config(config, overrides or []), load_hardware(gpu)
    if vocab_size is None:
        vocab_size = _vocab_size(settings)
    per_node = gpus_per_node or hardware.gpus_per_node
    if construct is not None:
        from peer_dist.planning.construct import built, construct_chosen

        if search or file or tokens or price or hits:
            raise ConfigError(
                "--construct: only builds the config's layout; leave out --search, --write, --tokens, --price, --hits"
            )
        made = construct_chosen(settings, construct, gpus or per_node, per_node, vocab_size, hardware.device)
        if as_json:
            typer.echo(json.dumps([asdict(each) for each in made], indent=1))
        else:
            for table in built(made):
                _wide_console().print(table, highlight=False)
        return
    budget = None if tokens is None else round(tokens)
    arguments = (settings, gpus or per_node, per_node, hardware, vocab_size, hits, budget, price)
    plans = find(unchecked(*arguments)) if search else [run(*arguments)]
    best = plans[0]
    if as_json:
        shown = [each.values() for each in plans[:SHOWN]]
        typer.echo(json.dumps(shown if search else shown[0], indent=1))
    else:
        for table in [*([search_table(plans)] if search else []), *best.tables()]:
            _wide_console().print(table, highlight=False)
    if not best.fits:
        text = escape(advice(best))
        Console(stderr=True).print(f"[red]error:[/] {text}", highlight=False, soft_wrap=True)
        raise typer.Exit(1)
    if file is not None:
        about = f"By peer-dist plan, for {best.layout.world_size} x {hardware.name}, {per_node} a node."
        write_config(best.layout.config, file, about)


@app.command()
def prepare(
    output: Annotated[Path, typer.Option("--output", "-o", help="Prefix of the files to write.")],
    inputs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="FILE", help=".txt or .jsonl files, also .gz. Default: the text shipped."),
    ] = None,
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
    made = run(inputs or None, output, tokenizer, train_bpe, max_document, force=force, console=console)
    console.print(
        f"{output}: {made.documents:,} documents, {made.tokens:,} tokens, vocabulary {made.vocab_size:,}",
        highlight=False,
    )


@app.command()
def evaluate(
    checkpoint: Checkpoint,
    prefix: DataPrefix = None,
    split: Split = "validation",
    dataset: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FILE",
            help="Instead: a published test set; repeatable. NAME: curation_corpus, lambada, pile, wikitext103, c4, "
            "enwik8, enwik8:validation or text. hf:OWNER/NAME/CONFIG:SPLIT as FILE reads the Hugging Face hub.",
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(help="With --dataset: tokens scored per window. Default: half of seq_length.", show_default=False),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per rank and forward pass.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Perplexity of a checkpoint on held-out text, with expert usage and the unigram line beside it.

    With --dataset: perplexity per token and word, bits per byte and character, on the papers' test sets.
    """
    from peer_dist.data.documents import DataError

    if stride is not None and not dataset:
        raise DataError("--stride: is for --dataset; prepared data are cut into sequences")
    if dataset and (prefix is not None or split != "validation"):
        raise DataError("--dataset: goes without --data and --split (of enwik8: --dataset enwik8:validation=FILE)")
    from peer_dist.evaluation.evaluate import HeldOutReport
    from peer_dist.evaluation.evaluate import evaluate as run
    from peer_dist.evaluation.suite import Suite, evaluate_sets

    result: HeldOutReport | Suite | None
    if dataset:
        result = evaluate_sets(checkpoint, dataset, stride, batch_size)
    else:
        result = run(checkpoint, prefix, split, batch_size)
    if result is None:  # another rank prints
        return
    if as_json:
        typer.echo(result.json())
        return
    console = Console()
    if not console.is_terminal:
        console.width = 200
    for table in result.tables():
        console.print(table, highlight=False)


@app.command()
def usage(
    checkpoint: Checkpoint,
    prefix: DataPrefix = None,
    split: Split = "validation",
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per rank and forward pass.")] = 8,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for usage.npz: gates and picks of every expert.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Which experts a checkpoint uses on held-out text, how evenly, and what its heads have in common."""
    from peer_dist.evaluation.usage_report import analyze_usage, usage_tables

    report = analyze_usage(checkpoint, prefix, split, batch_size, output)
    if report is None:  # another rank prints
        return
    if as_json:
        typer.echo(report.json())
        return
    for part in usage_tables(report):
        Console().print(part, "", sep="\n", highlight=False, soft_wrap=isinstance(part, str))


@app.command()
def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text to continue; repeatable. Default: an empty one.", show_default=False)
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="File of more of them, one per line.", show_default=False)
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to draw for each.")] = 200,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the most likely token.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Draw among the k most likely; 0: all.")] = 0,
    top_p: Annotated[
        float, typer.Option(min=0, max=1, help="Draw among the most likely that together have this probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the draws, of each prompt.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts at a time.")] = 8,
    tensor: Annotated[int, typer.Option(min=1, help="Ranks that share each layer's matrices.")] = 1,
    pipeline: Annotated[int, typer.Option(min=1, help="Stages that the layers are cut into.")] = 1,
) -> None:
    """Continue texts with a trained model, on any number of ranks; several are told apart by lines of their numbers."""
    from peer_dist.checkpoints.store import find_checkpoint
    from peer_dist.evaluation.generate import generate as run
    from peer_dist.evaluation.generate import read_prompts, write_texts
    from peer_dist.evaluation.loading import load_model
    from peer_dist.ranks.world import World

    prompts = read_prompts(prompt or [], prompt_file)
    find_checkpoint(checkpoint)
    world = World.from_environment()
    with world.joined():
        loaded = load_model(checkpoint, world.world_size, tensor, pipeline)
        draw = partial(run, loaded, tokens=tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        said = write_texts(draw, prompts, batch_size, sys.stdout if world.rank == 0 else None)
        if world.rank == 0:
            typer.echo(said, err=True)


@app.command()
def export(
    checkpoint: Checkpoint,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write; it must not exist.")],
    dtype: Annotated[str, typer.Option(help="Of the weights: float32 or bfloat16.")] = "float32",
    shard_size: Annotated[str, typer.Option(help="Of a file at most: a number of KB, MB or GB.")] = "5GB",
) -> None:
    """Write a trained model as safetensors, with code that runs it without this package, or with transformers."""
    from peer_dist.data.documents import DataError
    from peer_dist.export.folder import export as run
    from peer_dist.ranks.world import World

    world = World.from_environment()
    if world.world_size > 1:
        raise DataError(f"export: is the work of one process, but {world.world_size} ranks were started; start one")
    with world.joined():
        made = run(checkpoint, output, dtype, shard_size)
    typer.echo(f"{output}: {made.tensors} tensors, {made.bytes / 1e6:,.1f} MB, of {made.path} (step {made.step})")


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(help="YAML file of the sweep.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the runs. Default: runs/NAME.", show_default=False)
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time; they share cores and GPUs.")] = 1,
    ranks: Annotated[int, typer.Option(min=1, help="Processes of each run.")] = 1,
    limit_minutes: Annotated[
        float | None, typer.Option(min=0, help="Stop after this; the same command goes on.", show_default=False)
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="A run, model, size or variant, also with * and ?; repeatable.")
    ] = None,
    task: Annotated[int | None, typer.Option(min=0, help="Run this one (from 0) alone.", show_default=False)] = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="Submit the runs as a Slurm job array instead.")] = False,
    sbatch: Annotated[
        list[str] | None, typer.Option(help="sbatch's options, such as --sbatch=--time=60; repeatable.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the runs (or the batch script) alone.")] = False,
) -> None:
    """Train a grid of models, sizes, budgets and seeds, going on where it was left; results go to results.csv."""
    from peer_dist.sweep.spec import load_sweep

    if slurm and (only or task is not None or limit_minutes is not None):
        raise typer.BadParameter("--slurm submits the whole sweep, without --only, --task and --limit-minutes")
    loaded = load_sweep(file, output or Path("runs") / file.stem)
    if slurm:
        from peer_dist.sweep.array import submit_array

        typer.echo(submit_array(loaded, ranks, jobs, sbatch or [], dry_run))
        return
    from peer_dist.sweep.runner import run_sweep, runs_table, select

    runs = select(loaded, only or [], task)
    if dry_run:
        _wide_console().print(runs_table(loaded, runs), highlight=False)
        return
    raise typer.Exit(run_sweep(loaded, runs, jobs, ranks, limit_minutes, Console(stderr=True)))


@app.command()
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
        _wide_console().print(table, highlight=False)
    for path in paths:
        typer.echo(path)


@app.command()
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

    typer.echo(write_report(runs, output))


@app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="YAML file of the run: its folders and layout.")
    ] = None,
    overrides: Overrides = None,
    seconds: Annotated[float, typer.Option(min=1, help="Time limit of each check; who takes longer is named.")] = 30.0,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Instead: measure these machines' rates, for peer-dist plan --gpu FILE.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Examine machines, folders and network before a run, on all ranks that will train. Exit code 1: do not start.

    Alone, or as the run will be started:  torchrun --nproc-per-node 8 -m peer_dist doctor -c FILE
    """
    from peer_dist.config import load_config

    settings = None if config is None else load_config(config, overrides or [])
    from peer_dist.doctor.console import run

    run(settings, seconds, as_json=as_json, hardware=calibrate)


def _vocab_size(config: Config) -> int:
    from peer_dist.data.documents import DataError
    from peer_dist.data.stream import open_tokenizer

    try:
        return open_tokenizer(config.data).padded_vocab_size
    except DataError as error:
        raise DataError(f"{error}; or give the rows of the embedding with --vocab-size") from None


def _steps(text: str, last: int) -> range:
    """``10:15`` as the steps 10 to 15."""
    from peer_dist.config import ConfigError

    first, colon, end = text.partition(":")
    if not (first.isdecimal() and (end if colon else first).isdecimal()):
        raise ConfigError(f"--profile {text}: is no range of steps; write 10:15 for the steps 10 to 15, or 10 for one")
    steps = range(int(first), int(end or first) + 1)
    if not steps or steps[0] < 1 or steps[-1] > last:
        raise ConfigError(f"--profile {text}: the run has the steps 1 to {last} (train.steps); name some of them")
    return steps


def _wide_console() -> Console:
    """For tables whose names must stay whole in a file or a pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


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
        {"ConfigError", "DataError", "CheckpointError", "WorldError", "LockError", "SubmitError", "KindError"}
    )


if __name__ == "__main__":
    main()
