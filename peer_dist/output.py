"""Where words go: messages to stderr, results to stdout, and neither ever ends the work that they are about.

Nothing that is printed is read as markup or emoji, and what a terminal would obey is spelled out: names, paths and
prompts are shown as they are. Colours are given as styles (``console.print(text, style="red")``) or by
:class:`rich.text.Text`.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import sys
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

from peer_dist.mistake import Mistake, printable

_PATIENCE = 5.0  # seconds for which a stream that takes nothing is waited for, where it says so instead of blocking
_NARROWEST = 20  # characters of a line, in fewer of which tables show nothing
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class OutputError(Mistake, OSError):
    """A result could not be printed."""


class _Console(Console):
    """A console that shows text as it is, also in the cells, titles and headings of tables."""

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich's, with control characters of texts spelled out."""
        super().print(*(_spelled(thing) if isinstance(thing, Text) else thing for thing in objects), **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """As rich's, with control characters spelled out."""
        return super().render_str(printable(text), **options)


def _spelled(text: Text) -> Text:
    """``text`` with control characters spelled out, in its style as a whole if there are some."""
    plain = printable(text.plain)
    return text if plain == text.plain else Text(plain, text.style)


class _Outlasting(io.RawIOBase):
    """Writes to a descriptor as long as that works; ``lost`` says why words were lost, when some were.

    A reader that has gone (``| head -1``), a terminal that was closed or a full disk is no reason to end a run. A disk
    may have room again later: it is tried again with the next words.
    """

    def __init__(self, descriptor: int, closed: bool = False) -> None:
        self._descriptor, self._gone = descriptor, closed
        self.lost = os.strerror(errno.EBADF) if closed else ""

    def write(self, data: Any, /) -> int:
        size = len(memoryview(data).cast("B"))
        if self._gone:
            return size
        try:
            return os.write(self._descriptor, data)
        except BlockingIOError:
            with contextlib.suppress(OSError, ValueError):
                poll = select.poll()  # select() knows no descriptors above 1023
                poll.register(self._descriptor, select.POLLOUT)
                if poll.poll(_PATIENCE * 1e3):
                    return 0
            self._lose(f"nothing was taken for {_PATIENCE:.0f} s")
        except OSError as error:
            self._lose(error.strerror or str(error), error.errno not in _FULL)
        return size

    def _lose(self, why: str, gone: bool = True) -> None:
        self.lost, self._gone = self.lost or why, gone

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
    closed = []
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError as error:
            if error.errno == errno.EBADF:
                closed.append(descriptor)
                null = os.open(os.devnull, os.O_RDWR)
                if null != descriptor:  # pragma: no cover - the lowest free one is taken
                    os.dup2(null, descriptor)
                    os.close(null)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None or (name not in _streams and _descriptor(stream) == descriptor):
            raw = _streams[name] = _Outlasting(descriptor, descriptor in closed)
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


def say_at_once(sentence: str) -> None:
    """Write a line to stderr from a thread that must wait for nobody, such as one that ends the process."""
    with contextlib.suppress(OSError):
        poll = select.poll()
        poll.register(2, select.POLLOUT)
        if poll.poll(1000):  # else a pipe is full, and who reads it stands still
            os.write(2, f"{printable(sentence)}\n".encode(errors="backslashreplace"))


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
    elif console.width < _NARROWEST:  # COLUMNS=0, as some terminals have it: a table would be empty lines
        console.width = 80
    return console


def show(text: object) -> None:
    """Print a result in a line of its own to stdout, as it is; on a terminal, control characters are spelled out."""
    stream = result_stream()
    print(printable(str(text)) if stream.isatty() else text, file=stream)


def result_stream() -> TextIO:
    """stdout, for a result that is written bit by bit."""
    global _results_shown
    _results_shown = True
    return sys.stdout


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
