"""The commands that say what a run costs: plan, match. Heavy imports happen inside the commands."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from peer_dist.cli.options import (
    MOST_RANKS,
    WIDTH,
    ConfigFile,
    Overrides,
    VocabSize,
    number,
    vocab_size_of,
    whole,
)
from peer_dist.output import messages, results, show


def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    gpu: Annotated[
        str, typer.Option(help="Device: h100, h200, a100, b200, cpu, or a .yaml file with the figures of another.")
    ] = "h100",
    gpus: Annotated[int | None, whole(1, MOST_RANKS, "Devices (ranks). Default: a node's.")] = None,
    gpus_per_node: Annotated[int | None, whole(1, MOST_RANKS, "Devices of a node. Default: the device's.")] = None,
    search: Annotated[bool, typer.Option("--search", help="Find the best of all layouts that fit.")] = False,
    tokens: Annotated[
        float | None, number(1, 10**18, "Tokens to train on. Default: those of the config's steps.")
    ] = None,
    price: Annotated[float | None, number(0, 10**9, "Price of a device per hour.")] = None,
    hits: Annotated[
        float | None,
        number(1, MOST_RANKS, "Row shards that a token hits, as measured. Default: that of uniform picks."),
    ] = None,
    zipf: Annotated[
        float | None,
        number(0, 10, "Exponent of the picks' Zipf law, for rows that a cache holds. Default: 0, uniform picks."),
    ] = None,
    hit_rate: Annotated[
        float | None,
        number(0, 1, "Share of a pass's distinct rows in the cache, as measured. Default: what --zipf gives."),
    ] = None,
    vocab_size: VocabSize = None,
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
    from peer_dist.planning.hit_rate import Skew
    from peer_dist.planning.plan import plan as run
    from peer_dist.planning.plan import unchecked
    from peer_dist.planning.search import SHOWN, advice, search_table
    from peer_dist.planning.search import search as find

    settings, hardware = load_config(config, overrides or []), load_hardware(gpu)
    vocab_size = vocab_size or vocab_size_of(settings)
    per_node = gpus_per_node or hardware.gpus_per_node
    if construct is not None:
        from peer_dist.planning.construct import built, construct_chosen

        if search or file or tokens or price or hits or zipf is not None or hit_rate is not None:
            raise ConfigError(
                "--construct: only builds the config's layout; leave out --search, --write, --tokens, --price, --hits, "
                "--zipf, --hit-rate"
            )
        ranks = construct_chosen(settings, construct, gpus or per_node, per_node, vocab_size, hardware.device)
        if as_json:
            show(json.dumps([asdict(rank) for rank in ranks], indent=1))
        else:
            for table in built(ranks):
                results(WIDTH).print(table)
        return
    if search and hit_rate is not None:
        raise ConfigError("--hit-rate: was measured with one size of cache, and --search tries others; give --zipf")
    budget, skew = None if tokens is None else round(tokens), Skew(zipf or 0.0, hit_rate)
    arguments = (settings, gpus or per_node, per_node, hardware, vocab_size, hits, budget, price, skew)
    plans = find(unchecked(*arguments)) if search else [run(*arguments)]
    best = plans[0]
    if as_json:
        shown = [candidate.values() for candidate in plans[:SHOWN]]
        show(json.dumps(shown if search else shown[0], indent=1))
    else:
        for table in [*([search_table(plans)] if search else []), *best.tables()]:
            results(WIDTH).print(table)
    if not best.fits:
        messages().print(Text.assemble(("error:", "red"), f" {advice(best)}"))
        raise typer.Exit(1)
    if file is not None:
        about = f"By peer-dist plan, for {best.layout.world_size} x {hardware.name}, {per_node} a node."
        write_config(best.layout.config, file, about)


def match(
    config: ConfigFile,
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
    tolerance: Annotated[float, number(0, 10**6, "Deviation from which on there is a warning.")] = 0.02,
    folder: Annotated[
        Path | None, typer.Option("--write", help="Folder for the partners' configs.", show_default=False)
    ] = None,
    vocab_size: VocabSize = None,
) -> None:
    """Find the runs that cost the same as this one with other feed-forward layers, to compare it with."""
    from peer_dist.config import load_config
    from peer_dist.sweep.match import comparison, misses, overruled, write
    from peer_dist.sweep.match import match as run

    settings = load_config(config, overrides or [])
    vocab_size = vocab_size or vocab_size_of(settings)
    partners = run(settings, vocab_size, kind or [], mode, reference_kind, tolerance)
    results().print(comparison(partners))
    console = messages()
    for sentence in [*overruled(partners, overrides or []), *misses(partners, tolerance)]:
        console.print(Text.assemble(("warning:", "yellow"), f" {sentence}"))
    if folder is not None:
        for path in write(partners[1:], folder, config.stem, mode):
            console.print(f"wrote {path}")
