"""Turns text into tokens and back, with Hugging Face tokenizers: by default bytes, so that nothing is downloaded."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from peer_dist.config.schema import VOCAB_MULTIPLE
from peer_dist.data.documents import MAX_DOCUMENT, DataError, input_files, read_documents
from peer_dist.reading import parse_json, read_text, reading
from peer_dist.writing import whole

END_OF_DOCUMENT = "<|endoftext|>"
MOST_TOKENS = 1 << 22  # of a vocabulary: more than any has, and an embedding of as many rows still fits somewhere
_MOST_BYTES = 1 << 28  # of a tokenizer.json
_KIND = "a tokenizer.json of Hugging Face tokenizers"
_PROBE = (
    "The quick brown Fox, 0123.5 times:\n\n\tjumps over\r\n na\u00efve \u65e5\u672c\u8a9e \U0001f642 \0 <|endoftext|>"
)


@dataclass(frozen=True, eq=False)
class TextTokenizer:
    """A tokenizer with an end-of-document token that no text can produce.

    Where `<|endoftext|>` is spelled out in a text, it is thirteen ordinary characters.
    """

    name: str
    """`byte`, or the file that the tokenizer was loaded from."""
    vocab_size: int
    """Token ids are below this."""
    eod: int
    """The id that ends every document of a prepared data set."""
    digest: str
    """A digest of the vocabulary: equal if tokens and their ids are, wherever the file is."""
    _tokenizer: Tokenizer

    @property
    def padded_vocab_size(self) -> int:
        """``vocab_size`` rounded up to a multiple of 128: the number of the embedding's rows, in any layout."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @cached_property
    def content(self) -> str:
        """A digest of all that it does to a text: vocabulary, merges, normalizer and so on, wherever the file is.

        It is to be compared with another's in the same process; the library's next version may write another text.
        """
        return _digest(json.loads(self._tokenizer.to_str()))

    def works_as(self, other: TextTokenizer) -> bool:
        """Whether it does the same as another to every text, wherever their files are."""
        return self._tokenizer is other._tokenizer or (self.eod, self.content) == (other.eod, other.content)

    @property
    def vocabulary(self) -> dict[str, int]:
        """The ids of all tokens, by the tokens as the tokenizer's file spells them."""
        return self._tokenizer.get_vocab(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """The token ids of ``text``, without an end-of-document token.

        Raises:
            DataError: the tokenizer has no token for a part of it, and none for what it does not know.
        """
        with self._working():
            return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """:meth:`encode` of each text, in parallel where there are cores."""
        with self._working():
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``.

        Ids without a token (of the padded vocabulary) are left out, and bytes that are not UTF-8 become U+FFFD. For
        byte-level vocabularies ``decode(encode(text)) == text``.
        """
        with self._working():
            return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def _working(self) -> Any:
        return reading(
            f"the tokenizer {self.name}", DataError, "one for this text", "use another tokenizer or another text"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a tokenizer.json, which :func:`load_tokenizer` reads."""
        Path(path).write_text(self._tokenizer.to_str(pretty=True), encoding="utf-8")


def load_tokenizer(name: str) -> TextTokenizer:
    """Load a tokenizer.

    Args:
        name: `byte` (257 tokens, whose ids are byte values, and 256 ends a document), or the path of a tokenizer.json.

    Raises:
        DataError: the file is missing, is no tokenizer, has no `<|endoftext|>` token, or ids that are far too large.
    """
    if name == "byte":
        return _wrap(_byte_tokenizer(), name)
    if not os.path.isfile(name):
        raise DataError(f"{name}: there is no such tokenizer file; name a tokenizer.json, or use 'byte'")
    return replace(_loaded(_read_file(name)), name=name)


def file_digest(path: str | os.PathLike[str]) -> str:
    """A digest of a tokenizer.json's content, in hexadecimal digits.

    It is the same for a file that was written anew in another layout, whatever the versions of the libraries.

    Raises:
        DataError: the file is missing, or is no tokenizer.json.
    """
    return _digest_of(_read_file(path))


@dataclass(frozen=True)
class _File:
    """A tokenizer.json that was read. A start asks for the same ones several times, and some take seconds to parse."""

    text: str
    path: str = field(compare=False)  # for messages


def _read_file(path: str | os.PathLike[str]) -> _File:
    return _File(read_text(path, DataError, most=_MOST_BYTES), os.fspath(path))


@lru_cache(maxsize=2)
def _loaded(file: _File) -> TextTokenizer:
    _check_file(parse_json(file.text, file.path, DataError), file.path)
    with reading(file.path, DataError, _KIND), _silent():
        tokenizer = Tokenizer.from_str(file.text)
        _probe(tokenizer)
    return _wrap(tokenizer, file.path)


@lru_cache(maxsize=2)
def _digest_of(file: _File) -> str:
    tree = parse_json(file.text, file.path, DataError)
    _check_file(tree, file.path)
    with reading(file.path, DataError, _KIND):
        return _digest(tree)


def _digest(tree: dict[str, Any]) -> str:
    """The SHA-256 of a tokenizer's JSON without what does not matter to tokens, or is written in more ways than one."""
    tree = {key: value for key, value in tree.items() if key not in ("version", "truncation", "padding")}
    merges = tree["model"].get("merges")
    if isinstance(merges, list):  # "a b", or ["a", "b"]
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
        tree["model"] = {**tree["model"], "merges": pairs}
    text = json.dumps(_said(tree), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _said(value: Any) -> Any:
    """A tree without keys that are null or false, which mean the same as no key."""
    if isinstance(value, dict):
        return {key: _said(part) for key, part in value.items() if part is not None and part is not False}
    if isinstance(value, list) and any(isinstance(part, dict) for part in value):
        return [_said(part) for part in value]
    return value


def _check_file(tree: Any, name: str) -> None:
    """Refuse JSON of another kind, and what ends the library's process instead of raising an error."""
    model = tree.get("model") if isinstance(tree, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict | list):
        raise DataError(f'{name}: is not {_KIND}: it has no "model" with a "vocab"')
    prefix, merges = model.get("continuing_subword_prefix"), model.get("merges")
    if isinstance(prefix, str) and prefix and isinstance(merges, list):
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
        if not all(isinstance(pair, list) and len(pair) == 2 and str(pair[1]).startswith(prefix) for pair in pairs):
            raise DataError(f"{name}: is not {_KIND}: a merge's second part does not begin with {prefix!r:.40}")


def _probe(tokenizer: Tokenizer) -> None:
    """Find a part that cannot work at all, such as a table of characters that is none, before it meets a long text."""
    tokenizer.no_truncation()
    tokenizer.no_padding()  # to any number of tokens
    with suppress(Exception):  # at a text that it has no tokens for; a panic is none, and passes
        tokenizer.decode(tokenizer.encode(_PROBE, add_special_tokens=False).ids)


@contextmanager
def _silent() -> Iterator[None]:
    """A context in which nothing comes to stderr: the library prints its panics there, beside raising them."""
    try:
        kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    except OSError:  # there is no stderr
        yield
        return
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def train_bpe(
    files: Sequence[str | os.PathLike[str]] | None,
    vocab_size: int,
    output: str | os.PathLike[str],
    max_document: int = MAX_DOCUMENT,
    advance: Callable[[int], None] | None = None,
) -> TextTokenizer:
    """Learn a byte-level BPE vocabulary from the documents of ``files``, and write it to ``output``.

    Args:
        files: as in :func:`peer_dist.data.prepare.prepare`; None for the text that ships with the package.
        vocab_size: number of tokens, `<|endoftext|>` and the 256 bytes included; a short text gives fewer.
        output: the tokenizer.json to write; its folder must exist.
        max_document: the most characters of a document of a plain text.
        advance: a function called with the number of bytes of the files read since its last call.

    Raises:
        DataError: a file cannot be used, ``vocab_size`` is below 257 or far too large, or ``output`` cannot be written.
    """
    if vocab_size > MOST_TOKENS:
        raise DataError(f"a vocabulary has at most {MOST_TOKENS:,} tokens; {vocab_size} were asked for")
    if vocab_size < 257:
        raise DataError(f"a byte-level vocabulary has at least 257 tokens; {vocab_size} were asked for")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def documents(paths: list[Path]) -> Iterator[str]:
        for path in paths:
            yield from read_documents(path, max_document, advance)

    with input_files(files) as paths, reading("the text", DataError, "one that a vocabulary can be learnt from"):
        tokenizer.train_from_iterator(documents(paths), trainer)
    result = _wrap(tokenizer, os.fspath(output))
    with whole(output, DataError, os.fspath(output)) as path:
        result.save(path)
    return result


def _wrap(tokenizer: Tokenizer, name: str) -> TextTokenizer:
    """The tokenizer as this package uses it: without truncation, padding and special tokens in texts."""
    eod = tokenizer.token_to_id(END_OF_DOCUMENT)
    if eod is None:
        raise DataError(f"{name}: has no {END_OF_DOCUMENT} token; add it to the tokenizer as a special token")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # special tokens spelled out in a text are text
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    largest = max(vocabulary.values())
    if largest >= MOST_TOKENS:
        raise DataError(f"{name}: has the token id {largest}; ids are below {MOST_TOKENS:,}, without large holes")
    digest = hashlib.sha256(json.dumps(sorted(vocabulary.items())).encode()).hexdigest()
    return TextTokenizer(name, largest + 1, eod, digest, tokenizer)


def _byte_tokenizer() -> Tokenizer:
    """A tokenizer of single bytes, whose ids are their values."""
    # ByteLevel writes each byte as one printable character: itself if it is printable, else one from 256 on
    characters = {byte: chr(byte) for byte in (*range(33, 127), *range(161, 173), *range(174, 256))}
    others = [byte for byte in range(256) if byte not in characters]
    characters |= {byte: chr(256 + number) for number, byte in enumerate(others)}
    vocabulary = {character: byte for byte, character in characters.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_DOCUMENT])
    return tokenizer
