"""The commands that read a checkpoint: evaluate, usage, generate, export. Heavy imports happen inside the commands."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from peer_dist.cli.options import (
    MOST_RANKS,
    AsJson,
    BatchSize,
    Checkpoint,
    DataPrefix,
    Split,
    number,
    queue_for_ranks,
    whole,
)
from peer_dist.output import messages, result_stream, results, show


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
        whole(1, 1 << 24, "With --dataset: tokens scored per window. Default: half of seq_length.", show_default=False),
    ] = None,
    batch_size: BatchSize = 8,
    as_json: AsJson = False,
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
        show(result.json())
        return
    for table in result.tables():
        results(200).print(table)


def usage(
    checkpoint: Checkpoint,
    prefix: DataPrefix = None,
    split: Split = "validation",
    batch_size: BatchSize = 8,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for usage.npz: gates and picks of every expert.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Which experts a checkpoint uses on held-out text, how evenly, and what its heads have in common."""
    from peer_dist.evaluation.usage_report import analyze_usage, usage_tables

    report = analyze_usage(checkpoint, prefix, split, batch_size, output)
    if report is None:  # another rank prints
        return
    if as_json:
        show(report.json())
        return
    for part in usage_tables(report):
        results().print(part, "", sep="\n", soft_wrap=not isinstance(part, Table))


def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text to continue; repeatable. Default: an empty one.", show_default=False)
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="File of more of them, one per line.", show_default=False)
    ] = None,
    tokens: Annotated[int, whole(1, 10**7, "Tokens to draw for each.")] = 200,
    temperature: Annotated[float, number(0, 10**6, "0 takes the most likely token.")] = 0.8,
    top_k: Annotated[int, whole(0, 1 << 31, "Draw among the k most likely; 0: all.")] = 0,
    top_p: Annotated[float, number(0, 1, "Draw among the most likely that together have this probability.")] = 1.0,
    seed: Annotated[int, whole(0, 2**63 - 1, "Seed of the draws, of each prompt.")] = 0,
    batch_size: Annotated[int, whole(1, 1 << 16, "Texts at a time.")] = 8,
    tensor: Annotated[int, whole(1, MOST_RANKS, "Ranks that share each layer's matrices.")] = 1,
    pipeline: Annotated[int, whole(1, MOST_RANKS, "Stages that the layers are cut into.")] = 1,
) -> None:
    """Continue texts with a trained model, on any number of ranks; several are told apart by lines of their numbers."""
    queue_for_ranks(tensor)
    from peer_dist.evaluation.generate import generate as run
    from peer_dist.evaluation.generate import read_prompts, write_texts
    from peer_dist.evaluation.loading import load_model, read_settings
    from peer_dist.ranks.world import World

    prompts = read_prompts(prompt or [], prompt_file)
    read_settings(checkpoint, tensor, pipeline)
    world = World.from_environment()
    with world.joined():
        loaded = load_model(checkpoint, world.world_size, tensor, pipeline)
        draw = partial(run, loaded, tokens=tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        said = write_texts(draw, prompts, batch_size, result_stream() if world.rank == 0 else None)
        if world.rank == 0:
            messages().print(said)


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
        written = run(checkpoint, output, dtype, shard_size)
    show(f"{output}: {written.tensors} tensors, {written.bytes / 1e6:,.1f} MB, of {written.path} (step {written.step})")
