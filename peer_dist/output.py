"""Where words go: messages to stderr, results to stdout, and neither ever ends the work that they are about.

Nothing that is printed is read as markup or emoji, and what a terminal would obey is spelled out: names, paths and
prompts are shown as they are. Colours are given as styles (``console.print(text, style="red")``) or by
:class:`rich.text.Text`.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from typing import Any, TextIO

from rich.console import Console

from peer_dist.mistake import Mistake, printable

_PATIENCE = 5.0  # seconds for which a stream that takes nothing is waited for, where it says so instead of blocking


class OutputError(Mistake, OSError):
    """A result could not be printed."""


class _Console(Console):
    """A console that shows text as it is."""

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich's, with control characters of texts spelled out."""
        super().print(*(printable(thing) if isinstance(thing, str) else thing for thing in objects), **options)


class _Outlasting(io.RawIOBase):
    """Writes to a descriptor as long as that works; when it no longer does, ``lost`` says why.

    A reader that has gone (``| head -1``), a terminal that was closed or a full disk is no reason to end a run.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self.lost = descriptor, ""

    def write(self, data: Any, /) -> int:
        size = len(memoryview(data).cast("B"))
        if self.lost:
            return size
        try:
            return os.write(self._descriptor, data)
        except BlockingIOError:
            if select.select([], [self._descriptor], [], _PATIENCE)[1]:
                return 0
            self.lost = f"nothing was taken for {_PATIENCE:.0f} s"
        except OSError as error:
            self.lost = error.strerror or str(error)
        return size

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)


_streams: dict[str, _Outlasting] = {}
_results_shown = False


def outlast_readers() -> None:
    """Make this process's stdout and stderr outlast their readers. To be called before anything is opened or printed.

    Standard descriptors that are closed are opened to nothing: the next file to be opened would otherwise get one, and
    what a library prints would be written into it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError as error:
            if error.errno == errno.EBADF:
                null = os.open(os.devnull, os.O_RDWR)
                if null != descriptor:  # pragma: no cover - the lowest free one is taken
                    os.dup2(null, descriptor)
                    os.close(null)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None or (name not in _streams and _descriptor(stream) == descriptor):
            raw = _streams[name] = _Outlasting(descriptor)
            line_buffering = name == "stderr" or raw.isatty()
            encoding = getattr(stream, "encoding", None) or "utf-8"
            buffer = io.BufferedWriter(raw)
            setattr(sys, name, io.TextIOWrapper(buffer, encoding, "backslashreplace", line_buffering=line_buffering))


def _descriptor(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError):
        return None


def lost() -> dict[str, str]:
    """Why ``stdout`` or ``stderr`` takes no more words; empty while both do."""
    return {name: raw.lost for name, raw in _streams.items() if raw.lost}


def messages(quiet: bool = False) -> Console:
    """The console for what people should know of the work: stderr, one line each however long, text as it is."""
    return _Console(stderr=True, quiet=quiet, markup=False, emoji=False, highlight=False, soft_wrap=True)


def results(least_width: int = 0) -> Console:
    """The console for tables that were asked for: stdout, text as it is.

    Args:
        least_width: characters of a line where stdout is no terminal, so that names stay whole in files and pipes.
    """
    global _results_shown
    _results_shown = True
    console = _Console(markup=False, emoji=False, highlight=False)
    if least_width and not console.is_terminal:
        console.width = least_width
    return console


def show(text: object) -> None:
    """Print a result, as it is and in a line of its own, to stdout."""
    global _results_shown
    _results_shown = True
    print(text, file=sys.stdout)


def check_results() -> None:
    """Make sure that what was asked for has been printed; a reader that closed the pipe has read what it wanted.

    Raises:
        OutputError: it has not, because the disk is full for example.
    """
    if not _results_shown or sys.stdout is None:
        return
    sys.stdout.flush()
    why = lost().get("stdout")
    if why and why != os.strerror(errno.EPIPE):
        raise OutputError(f"standard output: the results could not be printed ({why}); print them to another place")
