"""Writes what is complete or absent, and leaves nothing of what could not be written."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from peer_dist.mistake import Mistake, in_words
from peer_dist.shortage import shortage


@contextlib.contextmanager
def whole(path: str | os.PathLike[str], raises: type[Mistake], option: str) -> Iterator[Path]:
    """A path to write a file to, which gets its name when all is written, and is removed if anything fails.

    What is there and no plain file, such as a pipe, is written itself.

    Args:
        path: of the file; its folder is there.
        raises: the error to raise.
        option: that named it, or its folder, as the beginning of the sentence.

    Raises:
        Mistake: ``raises``; it cannot be written.
    """
    partial = None
    try:
        path = Path(path)
        if path.is_file() or not os.path.lexists(path):
            path = Path(os.path.realpath(path))  # of a link, what it leads to
            partial = path.with_name(f".{path.name[:100]}.{socket.gethostname()[:64]}.{os.getpid()}")
        yield partial or path
        if partial is not None:
            os.replace(partial, path)
    except (OSError, ValueError) as error:
        if isinstance(error, Mistake):
            raise
        raise raises(f"{option}: {why_unwritten(error)}; name another place") from None
    finally:
        if partial is not None:
            with contextlib.suppress(OSError, ValueError):
                partial.unlink(missing_ok=True)


def why_unwritten(error: OSError | ValueError) -> str:
    """Why something cannot be written, as the middle of a sentence."""
    return f"cannot be written ({shortage(error) or getattr(error, 'strerror', None) or in_words(error)})"


@contextlib.contextmanager
def no_empty_folders(*folders: str | os.PathLike[str]) -> Iterator[None]:
    """A context that removes the folders which were made in it, if it ends by an error and nothing is in them."""
    made = [place for folder in folders for place in _missing(Path(os.path.abspath(folder)))]
    try:
        yield
    except BaseException:
        for place in sorted(set(made), key=lambda place: -len(place.parts)):  # what is inside first
            with contextlib.suppress(OSError):
                place.rmdir()  # which refuses one that is not empty
        raise


def _missing(folder: Path) -> list[Path]:
    """The folder and those above it, as far as they are not there."""
    return [place for place in (folder, *folder.parents) if not os.path.exists(place)]
