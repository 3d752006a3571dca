"""What several commands share: their options, and how they print."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from peer_dist.config import Config

ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="YAML file of the run.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="SECTION.KEY=VALUE", help="Change single keys of the file.", show_default=False),
]
VocabSize = Annotated[
    int | None, typer.Option(min=1, help="Rows of the embedding. Default: the data's tokenizer's, padded.")
]
Checkpoint = Annotated[str, typer.Option(help="A checkpoint, or a folder of them (the newest is taken).")]
DataPrefix = Annotated[
    str | None, typer.Option("--data", help="A prepared data set. Default: the one it was trained on.")
]
Split = Annotated[str, typer.Option(help="validation, test, or all of the data set.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Sequences per rank and forward pass.")]
Sbatch = Annotated[
    list[str] | None, typer.Option(help="Any other option of sbatch, such as --sbatch=--partition=gpu; repeatable.")
]
WIDTH = 160  # characters of a table whose names must stay whole in a file or a pipe
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def queue_for_ranks(tensor: int) -> None:
    """Give GPUs one hardware queue where ``tensor`` ranks share matrices, and else leave them theirs.

    Megatron's sums over these ranks overlap its products only so; the exchange of tokens overlaps better with several.
    To be called before anything is imported that may start CUDA, which reads the variable then.
    """
    if tensor > 1:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def vocab_size_of(config: Config) -> int:
    """Rows of the embedding: those of the data's tokenizer, padded.

    Raises:
        DataError: the data are not prepared; ``--vocab-size`` does without them.
    """
    from peer_dist.data.documents import DataError
    from peer_dist.data.stream import open_tokenizer

    try:
        return open_tokenizer(config.data).padded_vocab_size
    except DataError as error:
        raise DataError(f"{error}; or give the rows of the embedding with --vocab-size") from None
