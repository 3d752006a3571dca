"""What a person can mend: the base of every error that the commands report as one sentence."""

from __future__ import annotations

import re
import sys
import traceback
from pathlib import Path

_IN_MODULE = re.compile(r'^ +File "(.+)", line \d+, in <module>$', re.MULTILINE)
_OURS = Path(__file__).parent


class Mistake(Exception):
    """Something that a person can mend. The message is one sentence: what is wrong, where, and what to do.

    Attributes:
        exit_code: of a command that ends by it.
    """

    exit_code = 2


def in_words(error: BaseException | str, most: int = 200) -> str:
    """Another library's error as a part of a sentence: its first lines in one, without control characters, cut.

    Args:
        error: the error, or its text.
        most: number of characters.
    """
    text = error if isinstance(error, str) else str(error) or type(error).__name__
    text = printable(" ".join(line.strip() for line in text.split("\n") if line.strip()).replace("\t", " "))
    return text if len(text) <= most else f"{text[: most - 3]}..."


def unimportable(error: BaseException) -> str | None:
    """What another package's import failed by, if that is what an error means; a sentence.

    Packages read variables and files of their own while they are imported, and raise whatever they raise where these
    hold what they do not know.

    Args:
        error: any error, also one that another process sent.
    """
    frames = "".join(traceback.format_tb(error.__traceback__))
    if type(error.__cause__).__name__ == "_RemoteTraceback":  # of a pool of processes
        frames = str(error.__cause__)
    places = [Path(file) for file in _IN_MODULE.findall(frames)]
    others = [place for place in places if place.is_absolute() and _OURS not in place.parents]
    if not others:
        return None
    place = others[-1]
    above = max(
        (path for path in map(Path, sys.path) if path in place.parents),
        key=lambda path: len(path.parts),
        default=place.parent,
    )
    name = place.relative_to(above).parts[0].removesuffix(".py")
    return (
        f"{name} cannot be imported ({type(error).__name__}: {in_words(error)}); mend its installation, or the "
        "environment variable, locale or file that it read"
    )


def shown(value: object, most: int = 60) -> str:
    """A value as a file has it, for a sentence: cut, in one line."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    try:
        text = printable(repr(value))
    except ValueError:  # Python writes no number of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= most else f"{text[: most - 3]}..."


def printable(text: str) -> str:
    """``text`` with what a terminal would obey, or no encoding can write, spelled out: ``\\x1b``, ``\\ud800``.

    What breaks lines or turns the direction of what follows is obeyed too: a name would look like another.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_spelled(char) if _obeyed(char) else char for char in text)


def _obeyed(char: str) -> bool:
    code = ord(char)
    return (
        (code < 32 and char not in "\n\t")
        or 127 <= code < 160
        or 0x2028 <= code <= 0x202E
        or 0x2066 <= code <= 0x2069
        or 0xD800 <= code < 0xE000
    )


def _spelled(char: str) -> str:
    return f"\\x{ord(char):02x}" if ord(char) < 256 else f"\\u{ord(char):04x}"
