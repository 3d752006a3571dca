"""What several commands share: their options, and how they print."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peer_dist.mistake import Mistake, in_words

if TYPE_CHECKING:
    from peer_dist.config import Config

MOST_RANKS = 1 << 17  # as kinds/section.py says of keys; that is not imported for --help


class OptionError(Mistake):
    """An option's value that cannot be used."""


def whole(least: int, most: int, help: str, *names: str, **more: Any) -> Any:
    """An option that is a whole number between two; ``names`` and ``more`` are those of ``typer.Option``."""
    return _number(_integer, "a whole number", least, most, help, names, more)


def number(least: int, most: int, help: str, *names: str, **more: Any) -> Any:
    """An option that is a finite number between two."""
    return _number(_float, "a number", least, most, help, names, more)


def _number(
    parser: Callable[[Any], Any],
    kind: str,
    least: int,
    most: int,
    help: str,
    names: tuple[str, ...],
    more: dict[str, Any],
) -> Any:
    """Typer's own ranges let through what is not a number, and say of the others what they are not in several lines."""

    def checked(param: typer.CallbackParam, value: Any) -> Any:
        if value is None or (not isinstance(value, str) and least <= value <= most):
            return value
        text = in_words(str(value), 40)
        raise OptionError(f"{param.opts[-1]} {text!r}: must be {kind} from {least:,} to {most:,}")

    return typer.Option(*names, parser=parser, callback=checked, help=help, **more)


def _integer(text: Any) -> Any:
    """The number, or the text where it is none. (Typer shows the function's name, and asks it about defaults too.)"""
    try:
        return int(text)
    except ValueError:
        return text


def _float(text: Any) -> Any:
    try:
        value = float(text)
    except ValueError:
        return text
    return value if math.isfinite(value) else str(text)


_integer.__name__, _float.__name__ = "integer", "float"

ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="YAML file of the run.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="SECTION.KEY=VALUE", help="Change single keys of the file.", show_default=False),
]
VocabSize = Annotated[int | None, whole(1, 1 << 31, "Rows of the embedding. Default: the data's tokenizer's, padded.")]
Checkpoint = Annotated[str, typer.Option(help="A checkpoint, or a folder of them (the newest is taken).")]
DataPrefix = Annotated[
    str | None, typer.Option("--data", help="A prepared data set. Default: the one it was trained on.")
]
Split = Annotated[str, typer.Option(help="validation, test, or all of the data set.")]
BatchSize = Annotated[int, whole(1, 1 << 16, "Sequences per rank and forward pass.")]
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
