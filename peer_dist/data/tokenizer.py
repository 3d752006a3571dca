"""Turns text into tokens and back, with Hugging Face tokenizers: by default bytes, so that nothing is downloaded."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from peer_dist.config.schema import VOCAB_MULTIPLE
from peer_dist.data.documents import MAX_DOCUMENT, DataError, input_files, read_documents

END_OF_DOCUMENT = "<|endoftext|>"


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

    @property
    def vocabulary(self) -> dict[str, int]:
        """The ids of all tokens, by the tokens as the tokenizer's file spells them."""
        return self._tokenizer.get_vocab(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """The token ids of ``text``, without an end-of-document token."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """:meth:`encode` of each text, in parallel where there are cores."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``.

        Ids without a token (of the padded vocabulary) are left out, and bytes that are not UTF-8 become U+FFFD. For
        byte-level vocabularies ``decode(encode(text)) == text``.
        """
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a tokenizer.json, which :func:`load_tokenizer` reads."""
        Path(path).write_text(self._tokenizer.to_str(pretty=True), encoding="utf-8")


def load_tokenizer(name: str) -> TextTokenizer:
    """Load a tokenizer.

    Args:
        name: `byte` (257 tokens, whose ids are byte values, and 256 ends a document), or the path of a tokenizer.json.

    Raises:
        DataError: the file is missing, is no tokenizer, or has no `<|endoftext|>` token.
    """
    if name == "byte":
        return _wrap(_byte_tokenizer(), name)
    if not Path(name).is_file():
        raise DataError(f"{name}: there is no such tokenizer file; name a tokenizer.json, or use 'byte'")
    try:
        tokenizer = Tokenizer.from_file(name)
    except Exception as error:  # the library raises nothing narrower
        raise DataError(f"{name}: is not a tokenizer.json of Hugging Face tokenizers ({error})") from None
    return _wrap(tokenizer, name)


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
        DataError: a file cannot be used, ``vocab_size`` is below 257, or ``output`` cannot be written.
    """
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

    with input_files(files) as paths:
        tokenizer.train_from_iterator(documents(paths), trainer)
    result = _wrap(tokenizer, os.fspath(output))
    partial = f"{os.fspath(output)}.partial-{os.getpid()}"
    try:
        result.save(partial)
        os.replace(partial, output)
    except OSError as error:
        raise DataError(f"{output}: cannot be written ({error.strerror or error})") from None
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
    digest = hashlib.sha256(json.dumps(sorted(vocabulary.items())).encode()).hexdigest()
    return TextTokenizer(name, max(vocabulary.values()) + 1, eod, digest, tokenizer)


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
