"""`peer-dist prepare` turns text files into one tokenized data set, which is complete or absent.

``PREFIX.bin`` and ``PREFIX.idx`` are Megatron's; ``PREFIX.tokenizer.json`` is the tokenizer; ``PREFIX.json``
describes the set. It is written last: if it is there, so is the rest.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from peer_dist.data.documents import MAX_DOCUMENT, DataError, cut, input_files, read_documents
from peer_dist.data.files import holds_tokens, open_index, sound_digests
from peer_dist.data.tokenizer import MOST_TOKENS, TextTokenizer, file_digest, load_tokenizer
from peer_dist.data.tokenizer import train_bpe as learn_bpe
from peer_dist.megatron.indexed_data import IndexedWriter
from peer_dist.mistake import in_words, printable
from peer_dist.output import messages
from peer_dist.reading import read_object, reading
from peer_dist.writing import no_empty_folders

_BATCH = 1 << 18  # characters tokenized at a time: the tokenizer takes some hundred bytes of memory for each
_ENDINGS = (".bin", ".idx", ".tokenizer.json", ".json")

Count = Annotated[int, Field(ge=1, lt=2**63)]
Size = Annotated[int, Field(ge=0, lt=2**63)]


@dataclass(frozen=True)
class PreparedSet:
    """The description of a prepared data set, which ``PREFIX.json`` holds."""

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")

    documents: Count
    """Number of documents."""
    tokens: Count
    """Number of tokens, one end-of-document token per document included."""
    vocab_size: Annotated[int, Field(ge=1, le=MOST_TOKENS)]
    """Token ids are below this."""
    eod: Size
    """The id of the end-of-document token."""
    tokenizer: str
    """The tokenizer's name: `byte`, a file, or `bpe` if it was trained on these inputs."""
    vocabulary: str
    """:attr:`TextTokenizer.digest` of the tokenizer."""
    fingerprint: str
    """SHA-256 of all tokens as int32, in hexadecimal digits."""
    inputs: list[dict[str, str | int]]
    """``path`` and ``bytes`` of each file that was read."""
    sizes: dict[Literal[".bin", ".idx"], Size]
    """Bytes of the files ``.bin`` and ``.idx``."""
    digests: dict[str, str] | None = None
    """What the files held when they were written: :func:`~peer_dist.data.files.sound_digests` of both, and
    :func:`~peer_dist.data.tokenizer.file_digest`. None in a set that an earlier version made."""


def prepare(
    inputs: Sequence[str | os.PathLike[str]] | None,
    output: str | os.PathLike[str],
    tokenizer: str = "byte",
    train_bpe: int | None = None,
    max_document: int = MAX_DOCUMENT,
    *,
    force: bool = False,
    console: Console | None = None,
) -> PreparedSet:
    """Tokenize text files into the data set ``output``, showing progress.

    Args:
        inputs: .txt and .jsonl files (key "text"), plain or .gz; None for the text that ships with the package.
        output: the prefix of the files to write; its folder is created if need be.
        tokenizer: `byte`, or the path of a tokenizer.json.
        train_bpe: size of a byte-level BPE vocabulary to learn from the inputs instead; None to learn none.
        max_document: the most characters of a document of a .txt file; longer files are cut, at blank lines if they
            have some, so that documents can be divided between training, validation and test.
        force: whether to replace a data set that is there.
        console: where progress and warnings go; by default stderr.

    Returns:
        The description of the data set.

    Raises:
        DataError: an input or the tokenizer cannot be used, or the output exists or cannot be written. Nothing is left
            behind, and a data set that was there is unchanged.
    """
    output = Path(output)
    console = console or messages()
    if max_document < 1:
        raise DataError(f"documents need at least 1 character; max_document is {max_document}")
    if train_bpe is not None and tokenizer != "byte":
        raise DataError(f"either train a BPE vocabulary (--train-bpe) or use {tokenizer}, not both")
    if os.path.isdir(output) or not output.name:
        raise DataError(f"{output}: is a folder; give a prefix for the files to write, such as {output / 'text'}")
    present = [f"{output}{ending}" for ending in _ENDINGS if os.path.lexists(f"{output}{ending}")]
    if present and not force:
        raise DataError(f"{present[0]}: is there already; choose another output or replace it with --force")
    for path in present:
        if os.path.isdir(path) and not os.path.islink(path):
            raise DataError(f"{path}: is a folder, which no file can replace; move it away or choose another output")
    with input_files(inputs) as paths, no_empty_folders(output.parent):
        loaded = load_tokenizer(tokenizer) if train_bpe is None else None
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as partial:
                with _progress(console) as progress:
                    if loaded is None:
                        loaded = _learn(paths, train_bpe or 0, Path(partial), max_document, progress)
                    summary = _write(paths, Path(partial) / "set", loaded, max_document, progress)
                _publish(Path(partial) / "set", output)
        except DataError:
            raise
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) and error.strerror else in_words(error)
            raise DataError(f"{output}: cannot be written ({why})") from None
    return summary


def read_prepared(prefix: str | os.PathLike[str]) -> PreparedSet:
    """Read the description of a prepared data set, and check the files beside it: all of .idx, a part of a large .bin.

    Args:
        prefix: the prefix of the data set's files.

    Raises:
        DataError: a file is missing, damaged, or not what was written.
    """
    summary = describe_prepared(prefix)
    digests = content_digests(os.fspath(prefix), summary)
    changed = [ending for ending, digest in (summary.digests or {}).items() if digest != digests[ending]]
    if summary.digests is None and not holds_tokens(os.fspath(prefix), summary.documents, summary.fingerprint):
        changed = [".bin"]
    if changed:
        raise DataError(
            f"{prefix}{changed[0]}: does not hold what was written, by its digest in {prefix}.json; copy it again, or "
            "prepare the data again"
        )
    return summary


def describe_prepared(prefix: str | os.PathLike[str]) -> PreparedSet:
    """Read the description of a prepared data set, and see that the files beside it are there.

    Args:
        prefix: the prefix of the data set's files.

    Raises:
        DataError: a file is missing or has another size, or the description is not one.
    """
    prefix = os.fspath(prefix)
    for ending in _ENDINGS:
        if not os.path.isfile(prefix + ending):
            raise DataError(
                f"{prefix}{ending}: there is no such file of prepared data; name a data set by its files without their "
                f"endings, or make one with `peer-dist prepare FILE... --output {prefix}`"
            )
    path, advice = f"{prefix}.json", "copy it again, or prepare the data again"
    tree = read_object(path, DataError, advice)
    with reading(path, DataError, "what `peer-dist prepare` writes", advice):
        try:
            summary = TypeAdapter(PreparedSet).validate_json(json.dumps(tree))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ValueError(f"{where}: {first['msg']}") from None
        if summary.sizes.keys() != {".bin", ".idx"}:
            raise ValueError("sizes: must have those of .bin and .idx")
        if not (summary.digests or {}).keys() <= {".bin", ".idx", ".tokenizer.json"}:
            raise ValueError("digests: are those of other files")
        if summary.eod >= summary.vocab_size or summary.tokens < summary.documents:
            raise ValueError("its numbers contradict each other")
    for ending, size in summary.sizes.items():
        with reading(prefix + ending, DataError):
            present = os.path.getsize(prefix + ending)
        if present != size:
            raise DataError(f"{prefix}{ending}: has {present} bytes where {size} were written; copy it again")
    open_index(prefix, summary.documents)
    return summary


def content_digests(prefix: str, summary: PreparedSet) -> dict[str, str]:
    """A digest of what each file of a data set holds now, by the file's ending; the files are checked on the way.

    Raises:
        DataError: a file is not sound.
    """
    digests = sound_digests(prefix, summary.documents, summary.tokens, summary.vocab_size)
    return {**digests, ".tokenizer.json": file_digest(f"{prefix}.tokenizer.json")}


def _write(
    paths: list[Path], prefix: Path, tokenizer: TextTokenizer, max_document: int, progress: Progress
) -> PreparedSet:
    """Write the four files of a data set under ``prefix``, and return its description."""
    tokenizer.save(f"{prefix}.tokenizer.json")
    if not load_tokenizer(f"{prefix}.tokenizer.json").works_as(tokenizer):
        raise DataError(
            f"{tokenizer.name}: its tokens get other ids when it is saved and loaded again; number them from 0 without "
            "holes"
        )
    task = progress.add_task("tokenize", total=_total(paths), note="")
    documents = tokens = 0
    digest = hashlib.sha256()
    blank = True

    def noted(texts: Iterator[str]) -> Iterator[str]:
        nonlocal blank
        for text in texts:
            blank = blank and text.isspace()
            yield text

    with IndexedWriter(prefix, tokenizer.vocab_size) as writer:
        for path in paths:
            before = documents
            texts = read_documents(path, max_document, lambda count: progress.advance(task, count))
            for ids in tokenized(noted(texts), tokenizer):
                writer.add(ids)
                digest.update(ids.tobytes())
                documents += 1
                tokens += len(ids)
                elapsed = progress.tasks[task].elapsed or 0.0
                progress.update(task, note=f"{tokens / elapsed:,.0f} tokens/s" if elapsed else "")
            if documents == before:
                _warn(progress, f"{path}: holds no text and is skipped")
        if blank:
            raise DataError(f"no text in {', '.join(map(str, paths))}; there is nothing to prepare")
        if tokens == documents:
            raise DataError(f"the tokenizer {tokenizer.name} has no token for any of the text; use another one")
    summary = PreparedSet(
        documents=documents,
        tokens=tokens,
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
        tokenizer=printable(tokenizer.name),
        vocabulary=tokenizer.digest,
        fingerprint=digest.hexdigest(),
        inputs=[{"path": printable(str(path)), "bytes": path.stat().st_size} for path in paths],
        sizes={ending: os.path.getsize(f"{prefix}{ending}") for ending in (".bin", ".idx")},
    )
    summary = replace(summary, digests=content_digests(str(prefix), summary))
    Path(f"{prefix}.json").write_text(json.dumps(asdict(summary), indent=2) + "\n", encoding="utf-8")
    return summary


def tokenized(documents: Iterable[str], tokenizer: TextTokenizer) -> Iterator[np.ndarray]:
    """Yield each document's tokens with the end-of-document token, int32; long documents are tokenized in pieces."""
    batch: list[str] = []
    ends: list[bool] = []
    document: list[np.ndarray] = []

    def flush() -> Iterator[np.ndarray]:
        for ids, last in zip(tokenizer.encode_batch(batch), ends):
            document.append(np.array(ids, dtype=np.int32))
            if last:
                yield np.append(np.concatenate(document), np.int32(tokenizer.eod))
                document.clear()
        batch.clear()
        ends.clear()

    characters = 0  # in the batch
    for text in documents:
        pieces = [text] if len(text) <= _BATCH else list(cut(iter([text]), _BATCH))
        for number, piece in enumerate(pieces, start=1):
            batch.append(piece)
            ends.append(number == len(pieces))
            characters += len(piece)
            if characters >= _BATCH:
                yield from flush()
                characters = 0
    yield from flush()


def _learn(paths: list[Path], vocab_size: int, folder: Path, max_document: int, progress: Progress) -> TextTokenizer:
    """Learn a byte-level BPE vocabulary from the documents of the files, showing progress."""
    task = progress.add_task("learn BPE", total=_total(paths), note="")
    file = folder / "bpe.json"
    tokenizer = learn_bpe(paths, vocab_size, file, max_document, lambda count: progress.advance(task, count))
    if tokenizer.vocab_size < vocab_size:
        _warn(progress, f"the text gives {tokenizer.vocab_size} of the {vocab_size} tokens asked for")
    return replace(tokenizer, name="bpe")


def _publish(written: Path, output: Path) -> None:
    """Rename the finished files. An old PREFIX.json is removed first and the new one comes last: it marks a set as
    complete."""
    for ending in _ENDINGS:
        with open(f"{written}{ending}", "rb") as file:
            os.fsync(file.fileno())
    Path(f"{output}.json").unlink(missing_ok=True)
    for ending in _ENDINGS:
        os.replace(f"{written}{ending}", f"{output}{ending}")


def _warn(progress: Progress, message: str) -> None:
    progress.console.print(f"warning: {message}", soft_wrap=True, markup=False, emoji=False, highlight=False)


def _total(paths: list[Path]) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in paths)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeRemainingColumn(),
        console=console,
    )
