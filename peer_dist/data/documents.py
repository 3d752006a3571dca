"""Reads text files as a stream of documents, which `prepare` tokenizes and `train_bpe` learns from."""

from __future__ import annotations

import codecs
import gzip
import json
import os
import stat
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import IO, Protocol, cast

import zstandard

from peer_dist.mistake import Mistake
from peer_dist.reading import reading

SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")
MAX_DOCUMENT = 16384
_BLOCK = 1 << 20
_UNSOUND = (gzip.BadGzipFile, zlib.error, zstandard.ZstdError)


class DataError(Mistake, ValueError):
    """A text or prepared data set cannot be used; the message says what is wrong, where, and what to do."""


@contextmanager
def input_files(inputs: Sequence[str | os.PathLike[str]] | None) -> Iterator[list[Path]]:
    """A context with the paths of the files to read, which are checked before any work is done.

    Args:
        inputs: the files; None for the text that ships with the package.

    Raises:
        DataError: there is no input at all, or one is missing, a folder, or of an unknown kind.
    """
    if inputs is None:
        with resources.as_file(resources.files("peer_dist.data") / "tinyshakespeare.txt") as path:
            yield [path]
        return
    paths = [Path(path) for path in inputs]
    if not paths:
        raise DataError("no input: name at least one .txt or .jsonl file (plain or .gz)")
    for path in paths:
        with reading(path, DataError):
            try:
                mode = path.stat().st_mode
            except (FileNotFoundError, NotADirectoryError):
                raise DataError(f"{path}: there is no such file") from None
        if stat.S_ISDIR(mode):
            raise DataError(f"{path}: is a folder; name the files in it")
        if not stat.S_ISREG(mode):
            raise DataError(f"{path}: is a pipe or a device; write the text to a file, which is read twice")
        if not path.name.lower().endswith(SUFFIXES):
            raise DataError(f"{path}: its kind is not known by its name; known are {', '.join(SUFFIXES)}")
    yield paths


def read_documents(
    path: Path,
    max_document: int = MAX_DOCUMENT,
    advance: Callable[[int], None] | None = None,
    block: int = _BLOCK,
) -> Iterator[str]:
    """Yield one file's documents. None is empty, and at most a block and one document are held in memory.

    Args:
        path: a `.txt` or `.jsonl` file, or either with `.gz`. A JSON line holds one document, under the key "text";
            blank lines and empty texts are left out. A plain text is one document, or several of at most
            ``max_document`` characters, which joined give the text again.
        max_document: the most characters of a document of a plain text; a longer text is cut after a blank line,
            else after a line, else anywhere.
        advance: a function called with the number of bytes of the file (as compressed) read since its last call.
        block: number of bytes read at a time.

    Raises:
        DataError: the file has bad UTF-8, bad JSON, a line without a "text" string or a broken gzip, or is unreadable.
    """
    if path.name.lower().removesuffix(".gz").endswith(".jsonl"):
        yield from read_json_lines(path, advance, block)
    else:
        yield from cut(read_text(path, advance, block), max_document)


def cut(blocks: Iterator[str], size: int) -> Iterator[str]:
    """Cut a text that arrives in blocks into pieces of at most ``size`` characters, each at its best place.

    The pieces joined are the text, and they do not depend on where the blocks ended.
    """
    text = ""
    for block in blocks:
        text += block
        start = 0
        while len(text) - start > size:
            head = text[start : start + size]
            point = _cut_point(head)
            start += point
            yield head[:point]
        text = text[start:]
    if text:
        yield text


def _cut_point(head: str) -> int:
    """The number of characters after which to cut: after the last blank line, else the last line, else all."""
    for mark in ("\n\n", "\n\r\n", "\n"):
        at = head.rfind(mark)
        if at >= 0:
            return at + len(mark)
    return len(head)


class _Bytes(Protocol):
    def read(self, size: int, /) -> bytes: ...


class _Zstd:
    """A file of zstd frames, decompressed one after the other.

    It notices a file that ends within a frame, which zstandard's own reader does not.
    """

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw, self._frame = raw, zstandard.ZstdDecompressor().decompressobj()
        self._inside = False

    def read(self, size: int, /) -> bytes:
        """The decompressed next ``size`` bytes of the file, or of more if they yield nothing; empty at its end.

        Raises:
            EOFError: the file ends within a frame.
        """
        while data := self._raw.read(size):
            out = b""
            while data:
                out += self._frame.decompress(data)
                self._inside = not self._frame.eof
                data = self._frame.unused_data
                if self._frame.eof:
                    self._frame = zstandard.ZstdDecompressor().decompressobj()
                else:
                    break
            if out:
                return out
        if self._inside:
            raise EOFError
        return b""


def _opened(path: Path, raw: IO[bytes]) -> _Bytes:
    """A reader of a file's decompressed content, by the file's name."""
    if path.suffix.lower() == ".gz":
        return cast(_Bytes, gzip.GzipFile(fileobj=raw))
    if path.suffix.lower() != ".zst":
        return raw
    return _Zstd(raw)


def read_text(path: Path, advance: Callable[[int], None] | None = None, block: int = _BLOCK) -> Iterator[str]:
    """Yield one file's text in blocks, none of them empty. Files named `.gz` and `.zst` are decompressed.

    Args:
        path: the file.
        advance: as in :func:`read_documents`.
        block: number of bytes of the file read at a time.

    Raises:
        DataError: the file has bad UTF-8, is a broken .gz or .zst, or is unreadable.
    """
    kind = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix.lower(), "")
    within = " of the uncompressed text" if kind else ""
    decoder = codecs.getincrementaldecoder("utf-8")()
    decoded = 0  # bytes passed to the decoder, which may hold back the last few
    position = 0  # in the file, at the last call of advance
    first = True
    try:
        with open(path, "rb") as raw:
            stream = _opened(path, raw)
            while True:
                data = stream.read(block)
                held_back = len(decoder.getstate()[0])
                try:
                    text = decoder.decode(data, final=not data)
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{path}: is not UTF-8 at byte {decoded - held_back + error.start}{within} ({error.reason}); "
                        "convert the file to UTF-8"
                    ) from None
                decoded += len(data)
                if advance is not None:
                    advance(raw.tell() - position)
                    position = raw.tell()
                if first and text:  # a byte order mark is no text
                    text, first = text.removeprefix("\ufeff"), False
                if text:
                    yield text
                if not data:
                    return
    except EOFError:
        raise DataError(
            f"{path}: the {kind} file ends too early, after {decoded} bytes of text or a little more; "
            "copy or compress it again"
        ) from None
    except _UNSOUND as error:
        raise DataError(f"{path}: is not a sound {kind} file after {decoded} bytes of text ({error})") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


def read_json_lines(path: Path, advance: Callable[[int], None] | None = None, block: int = _BLOCK) -> Iterator[str]:
    """Yield the string under "text" of every JSON line; blank lines and empty texts are left out.

    Args:
        path, advance, block: as in :func:`read_text`.

    Raises:
        DataError: as in :func:`read_text`, or a line is no JSON or has no "text" string.
    """
    for number, line in enumerate(lines_of(read_text(path, advance, block)), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            raise DataError(f"{path}: line {number}: is not valid JSON ({reason})") from None
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise DataError(f'{path}: line {number}: must be an object with a string under "text"')
        if "\\u" in line:  # JSON can escape half a surrogate pair, which is no character and cannot be encoded
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise DataError(
                    f'{path}: line {number}: "text" holds half a surrogate pair at character {error.start}'
                ) from None
        if text:
            yield text


def lines_of(blocks: Iterator[str]) -> Iterator[str]:
    """Yield the lines of a text that arrives in blocks, without their line feeds; the last may be empty."""
    pending: list[str] = []
    for block in blocks:
        head, *rest = block.split("\n")
        pending.append(head)
        for part in rest:
            yield "".join(pending)
            pending = [part]
    yield "".join(pending)
