"""The command that makes a data set: prepare. Heavy imports happen inside it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peer_dist.cli.options import whole


def prepare(
    output: Annotated[Path, typer.Option("--output", "-o", help="Prefix of the files to write.")],
    inputs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="FILE", help=".txt or .jsonl files, also .gz. Default: the text shipped."),
    ] = None,
    tokenizer: Annotated[str, typer.Option(help="'byte', or a tokenizer.json of Hugging Face.")] = "byte",
    train_bpe: Annotated[
        int | None,
        whole(1, 1 << 24, "First learn a byte-level BPE vocabulary of this size.", show_default=False),
    ] = None,
    max_document: Annotated[
        int, whole(1, 1 << 31, "Characters after which a .txt is cut into documents, at blank lines.")
    ] = 16384,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing data set.")] = False,
) -> None:
    """Turn text into the token files that training reads (Megatron's .bin and .idx)."""
    from peer_dist.data.prepare import prepare as run
    from peer_dist.output import messages

    console = messages()
    prepared = run(inputs or None, output, tokenizer, train_bpe, max_document, force=force, console=console)
    console.print(
        f"{output}: {prepared.documents:,} documents, {prepared.tokens:,} tokens, vocabulary {prepared.vocab_size:,}"
    )
