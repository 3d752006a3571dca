"""The papers' test sets, read from the files in which they are published."""

from __future__ import annotations

import codecs
import csv
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from peer_dist.data.documents import DataError, lines_of, read_json_lines, read_text
from peer_dist.mistake import in_words

Advance = Callable[[int], None]
_HUB = "hf:"
_ENWIK8_BYTES = 10**8
_TITLE = re.compile(r" ?= [^=\s][^=]* = ?")  # of an article; sections have more of the =
_SPACING = [  # of WikiText's tokens, undone in this order
    (re.compile(r" @([-,.])@ "), r"\1"),
    (re.compile(r" ([.,;:!?%)\]])(?=\s|$)"), r"\1"),
    (re.compile(r"([(\[$£€]) "), r"\1"),
    (re.compile(r'" ([^"\n]*?) ?"(?=[\s.,;:!?)\]]|$)'), r'"\1"'),
    (re.compile(r" '(s|t|re|ve|ll|d|m)\b"), r"'\1"),
    (re.compile(r"(?<=\s)' ([^'\n]*?) '(?=[\s.,;:!?)\]]|$)"), r"'\1'"),
    (re.compile(r"s '(?=[\s.,;:!?)\]]|$)"), "s'"),
    (re.compile(r" n't\b"), "n't"),
    (re.compile(r"(?<=\S) {2,}"), " "),
    (re.compile(r"^ +| +$", re.MULTILINE), ""),
]


@dataclass(frozen=True)
class Document:
    """One document of a test set, with the counts by which its loss is divided.

    Attributes:
        text: what the model reads.
        words: number of words, split by whitespace, in the text as published.
        characters: number of characters of ``text``; in enwik8 of its bytes.
        context: ``text`` without its last word, where that is scored by itself.
    """

    text: str
    words: int
    characters: int
    context: str | None = None


@dataclass(frozen=True)
class EvaluationSet:
    """A test set and where it comes from.

    Attributes:
        unit: the set's main metric, a key of :meth:`peer_dist.evaluation.suite.Result.metrics`.
        note: what a reader of the results must know.
    """

    name: str
    source: str
    unit: str
    note: str
    _format: _Format

    @property
    def size(self) -> int | None:
        """Bytes of the file, None if there is none."""
        return None if self.source.startswith(_HUB) else Path(self.source).stat().st_size

    def documents(self, advance: Advance | None = None) -> Iterator[Document]:
        """Read the documents, one at a time; ``advance`` is called with the number of bytes read since the last call.

        Raises:
            DataError: the source is missing or not of the format.
        """
        if self.source.startswith(_HUB):
            texts = _hub_texts(self.source, self._format.column, self._format.split)
        else:
            texts = self._format.texts(Path(self.source), advance)
        return self._format.documents(texts)


@dataclass(frozen=True)
class _Format:
    """How a file becomes texts, and texts documents; ``column`` and ``split`` are those of the HF data set."""

    texts: Callable[[Path, Advance | None], Iterator[str]]
    documents: Callable[[Iterator[str]], Iterator[Document]]
    unit: str = "token_perplexity"
    column: str | None = "text"
    split: str = "test"


def parse_sets(specs: Sequence[str]) -> list[EvaluationSet]:
    """The test sets of ``NAME=FILE`` and ``NAME=hf:REPO[/CONFIG][:SPLIT]``; wikitext103 is two.

    Raises:
        DataError: a name that is not known, a file that is missing, or one without a document of its format.
    """
    sets: list[EvaluationSet] = []
    for spec in specs:
        name, equals, source = spec.partition("=")
        if not equals or not source:
            raise DataError(f"--dataset {spec}: must be NAME=FILE, with NAME one of {', '.join(_FORMATS)}")
        if name not in _FORMATS:
            raise DataError(f"--dataset {spec}: {name} is not known; known are {', '.join(_FORMATS)}")
        if not source.startswith(_HUB) and not os.path.isfile(source):
            raise DataError(f"--dataset {spec}: there is no file {source}")
        for member in (name, f"{name}_detokenized"):
            if form := _FORMATS.get(member):
                title = Path(source).name if name == "text" else member
                sets.append(EvaluationSet(title, source, form.unit, _note(name, source), form))
                if next(sets[-1].documents(), None) is None:
                    raise DataError(f"--dataset {spec}: {source} holds no text")
    return sets


def _note(name: str, source: str) -> str:
    if name.startswith("enwik8") and not source.startswith(_HUB) and Path(source).stat().st_size < _ENWIK8_BYTES:
        return f"{source} is smaller than {_ENWIK8_BYTES:,} bytes: split 90/5/5 by its own size"
    return ""


# ---------------------------------------------------------------- files to texts


def _csv_articles(path: Path, advance: Advance | None) -> Iterator[str]:
    """Curation Corpus as its web_scraper.py writes it: the column article_content; failed downloads are left out."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    rows = csv.DictReader((line + "\n" for line in lines_of(read_text(path, advance))), strict=True)
    try:
        if "article_content" not in (columns := list(rows.fieldnames or [])):
            raise DataError(
                f"{path}: has no column article_content, only {in_words(', '.join(columns[:8]))}; the corpus's "
                "web_scraper.py adds it to the published table of titles, summaries and urls"
            )
        for row in rows:
            if row["article_content"] is None:
                raise DataError(f"{path}: line {rows.line_num}: has fewer columns than the first line")
            yield row["article_content"]
    except csv.Error as error:
        raise DataError(f"{path}: line {rows.reader.line_num}: is not CSV ({error})") from None


def _enwik8_part(path: Path, advance: Advance | None, begin: int, end: int) -> Iterator[str]:
    """Bytes from ``begin`` to ``end`` percent of the first 10^8, moved to where a character starts."""
    size = min(path.stat().st_size, _ENWIK8_BYTES)
    first, last = size * begin // 100, size * end // 100
    try:
        with open(path, "rb") as file:
            file.seek(first)
            data = file.read(last - first + 3)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    start, stop = _character(data, 0), _character(data, last - first)
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(data[start:stop])  # the file may end in a character
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 at byte {first + start + error.start}; it is not enwik8") from None
    if advance is not None:
        advance(path.stat().st_size)
    yield text


def _character(data: bytes, at: int) -> int:
    """Where the next character starts, from ``at`` on."""
    while at < len(data) and data[at] & 0xC0 == 0x80:
        at += 1
    return at


def _hub_texts(source: str, column: str | None, split: str) -> Iterator[str]:
    """A column of a data set of the Hugging Face hub."""
    match = re.fullmatch(r"([^/:]+/[^/:]+)(?:/([^/:]+))?(?::(.+))?", source.removeprefix(_HUB))
    if column is None or match is None:
        raise DataError(
            f"--dataset {source}: "
            + ("enwik8 is split by bytes and needs the file" if match else "must be hf:OWNER/NAME[/CONFIG][:SPLIT]")
        )
    try:
        import datasets
    except ImportError:
        raise DataError(f"--dataset {source}: needs the package datasets; pip install 'peer_dist[eval]'") from None
    repository, config, given = match.groups()
    try:
        for row in datasets.load_dataset(repository, config, split=given or split, streaming=True):
            yield row[column]
    except Exception as error:  # the library and its network raise all sorts
        raise DataError(
            f"--dataset {source}: Hugging Face datasets cannot read column {column} of split {given or split} "
            f"({type(error).__name__}: {' '.join(str(error).split())[:300]}); see whether this machine reaches the "
            "hub, or give a file"
        ) from None


# ---------------------------------------------------------------- texts to documents


def _each(texts: Iterator[str]) -> Iterator[Document]:
    for text in texts:
        if text and text != "Exception":  # what Curation Corpus's scraper writes for a page that it did not get
            yield _document(text)


def _whole(texts: Iterator[str]) -> Iterator[Document]:
    if text := "".join(texts):
        yield _document(text)


def _bytes(texts: Iterator[str]) -> Iterator[Document]:
    for text in texts:
        yield Document(text, len(text.split()), len(text.encode()))


def _document(text: str, context: str | None = None) -> Document:
    return Document(text, len(text.split()), len(text), context)


def _passages(texts: Iterator[str]) -> Iterator[Document]:
    """LAMBADA's passages, whose last word is scored by itself; white space after it is cut off."""
    for text in texts:
        if passage := text.rstrip():
            yield _document(passage, passage[: len(passage) - len(passage.split()[-1])].rstrip())


def _articles(texts: Iterator[str]) -> Iterator[Document]:
    """WikiText's articles, each from its title, which stands between blank lines. An end of line counts as a word."""
    # The hub's rows are the file's lines, blank ones emptied.
    lines = lines_of(text or " \n" for text in texts)
    article: list[str] = []

    def finished() -> Iterator[Document]:
        text = "\n".join(article)
        if text:
            yield Document(text, len(text.split()) + text.count("\n"), len(text))

    for line in lines:
        blank = not line.strip()
        if blank and len(article) > 1 and _TITLE.fullmatch(article[-1].rstrip("\r")) and not article[-2].strip():
            title = article.pop()
            if any(part.strip() for part in article):
                article.append("")
                yield from finished()
                article.clear()
            article.append(title)
        article.append(line)
    yield from finished()


def _detokenized(texts: Iterator[str]) -> Iterator[Document]:
    for document in _articles(texts):
        text = document.text
        for pattern, replacement in _SPACING:
            text = pattern.sub(replacement, text)
        yield Document(text, document.words, len(text))


_ENWIK8_TEST = _Format(partial(_enwik8_part, begin=95, end=100), _bytes, "bits_per_character", column=None)
_FORMATS = {
    "curation_corpus": _Format(_csv_articles, _each, column="article_content"),
    "lambada": _Format(read_json_lines, _passages),
    "pile": _Format(read_json_lines, _each),
    "wikitext103": _Format(read_text, _articles, unit="word_perplexity"),
    "wikitext103_detokenized": _Format(read_text, _detokenized, unit="word_perplexity"),
    "c4": _Format(read_json_lines, _each, split="validation"),
    "enwik8": _ENWIK8_TEST,
    "enwik8:test": _ENWIK8_TEST,
    "enwik8:validation": _Format(partial(_enwik8_part, begin=90, end=95), _bytes, "bits_per_character", column=None),
    "text": _Format(read_text, _whole),
}
