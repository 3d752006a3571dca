"""What the files of a prepared data set hold: whether they are sound, and digests by which changed data is noticed.

``PREFIX.idx`` is read whole. Of ``PREFIX.bin`` blocks are read, spread evenly, so that a terabyte takes seconds too.
"""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from peer_dist.data.documents import DataError
from peer_dist.machine import file_stamp
from peer_dist.reading import reading

_HEADER = struct.Struct("<9sQBQQ")  # magic, version, code of the tokens' dtype, sequences, ends of documents
_MAGIC = b"MMIDIDX\0\0"
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}  # by Megatron's codes
_BLOCK, _BLOCKS = 1 << 16, 1 << 10  # bytes of a block of .bin, and how many are read of a file that has more
_CHUNK = 1 << 16  # documents looked at together: what stays in cache
_AGAIN = "copy it again, or prepare the data again"


@dataclass(frozen=True)
class TokenIndex:
    """``PREFIX.idx``, mapped into memory: which tokens of ``PREFIX.bin`` are a document's.

    Attributes:
        dtype: of a token.
        lengths: tokens of each document, int32 ``[documents]``.
        pointers: where in ``PREFIX.bin`` each begins, in bytes, int64 ``[documents]``.
        ends: Megatron's ends of documents, in sequences; here each document is a sequence. int64 ``[documents + 1]``.
    """

    dtype: np.dtype[Any]
    lengths: np.ndarray
    pointers: np.ndarray
    ends: np.ndarray

    def tokens(self, first: int, end: int, bin_bytes: int) -> int:
        """Tokens of the documents from ``first`` to before ``end``, of an index that is sound."""
        begins = [int(self.pointers[at]) if at < len(self.pointers) else bin_bytes for at in (first, end)]
        return (begins[1] - begins[0]) // self.dtype.itemsize


def open_index(prefix: str, documents: int) -> TokenIndex:
    """Open ``PREFIX.idx``. What is read of it here does not grow with the data.

    Args:
        prefix: of the data set.
        documents: number of documents that it must have.

    Raises:
        DataError: it is not such a file, or has another size than its own header asks for.
    """
    path = f"{prefix}.idx"
    with reading(path, DataError, "an index of Megatron's indexed data", _AGAIN):
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(_HEADER.size)
        if len(head) < _HEADER.size:
            raise _damaged(path, f"it has {size} bytes, fewer than its header")
        magic, version, code, sequences, ends = _HEADER.unpack(head)
        if magic != _MAGIC or version != 1 or code not in _DTYPES:
            raise _damaged(path, "its header is not that of an index of Megatron's indexed data with whole numbers")
        if sequences != documents or ends != documents + 1:
            told = f"{sequences} sequences and {ends - 1} documents"
            raise _damaged(path, f"it tells of {told} where {documents} were written")
        if size != _HEADER.size + 12 * sequences + 8 * ends:
            raise _damaged(path, f"it has {size} bytes, which {documents} documents do not take")
        buffer = np.memmap(path, mode="r")
        lengths = np.frombuffer(buffer, "<i4", sequences, _HEADER.size)
        pointers = np.frombuffer(buffer, "<i8", sequences, _HEADER.size + 4 * sequences)
        return TokenIndex(
            np.dtype(_DTYPES[code]),
            lengths,
            pointers,
            np.frombuffer(buffer, "<i8", ends, _HEADER.size + 12 * sequences),
        )


_known: dict[Any, dict[str, str]] = {}  # digests of sound files, by what would change if the files did


def sound_digests(prefix: str, documents: int, tokens: int, vocab_size: int) -> dict[str, str]:
    """Check the content of ``PREFIX.idx`` and ``PREFIX.bin``, and return a digest of each, in hexadecimal digits.

    The digest of ``.idx`` is the SHA-256 of the file; that of ``.bin`` of its size and of what is read of it: all of
    up to 64 MiB, else 1,024 blocks of 64 KiB, the first and the last among them. Tokens are checked in the same
    blocks. Files that are asked for again are not read again if they have not changed.

    Args:
        prefix: of the data set.
        documents, tokens: as many as it must have.
        vocab_size: token ids are below this.

    Raises:
        DataError: a file cannot be read, or is not what Megatron's data sets can be read from.
    """
    paths = [f"{prefix}.idx", f"{prefix}.bin"]
    with reading(prefix, DataError):
        stamp = file_stamp(*paths)
    key = (stamp, documents, tokens, vocab_size)
    if stamp is not None and key in _known:
        return _known[key]
    index = open_index(prefix, documents)
    digests = {
        ".idx": _check_index(paths[0], index, tokens),
        ".bin": _check_tokens(paths[1], index, tokens, vocab_size),
    }
    if stamp is not None:
        _known[key] = digests
    return digests


def _check_index(path: str, index: TokenIndex, tokens: int) -> str:
    """The digest of ``PREFIX.idx``, whose documents must lie one after the other and fill ``PREFIX.bin``."""
    documents, place = len(index.lengths), 0
    for first in range(0, documents, _CHUNK):
        lengths, begins = index.lengths[first : first + _CHUNK], index.pointers[first : first + _CHUNK]
        if int(lengths.min()) < 0:
            at = int((lengths < 0).argmax())
            raise _damaged(path, f"document {first + at} has a length of {lengths[at]} tokens")
        after = begins + np.multiply(lengths, index.dtype.itemsize, dtype=np.int64)
        if int(begins[0]) != place or not np.array_equal(begins[1:], after[:-1]):
            at = 0 if int(begins[0]) != place else 1 + int((begins[1:] != after[:-1]).argmax())
            raise _damaged(path, f"document {first + at} does not begin where the one before it ends")
        place = int(after[-1])
    if place != tokens * index.dtype.itemsize:
        raise _damaged(path, f"its documents have {place // index.dtype.itemsize} tokens where {tokens} were written")
    for first in range(0, documents + 1, _CHUNK):
        ends = index.ends[first : first + _CHUNK]
        if (ends != np.arange(first, first + len(ends))).any():
            raise _damaged(path, "its documents are not counted one by one")
    digest = hashlib.sha256()
    with reading(path, DataError, advice=_AGAIN), open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _check_tokens(path: str, index: TokenIndex, tokens: int, vocab_size: int) -> str:
    """The digest of ``PREFIX.bin``, whose tokens must be below ``vocab_size`` where they are read."""
    wanted, itemsize = tokens * index.dtype.itemsize, index.dtype.itemsize
    with reading(path, DataError, advice=_AGAIN), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size != wanted:
            raise DataError(f"{path}: has {size} bytes where {wanted} were written; copy it again")
        digest = hashlib.sha256(str(size).encode())
        for begin in _blocks(size, itemsize):
            block = _read_at(file, begin, min(_BLOCK, size - begin))
            digest.update(block)
            ids = np.frombuffer(block, index.dtype.newbyteorder("<"))
            if ids.size and (int(ids.max()) >= vocab_size or int(ids.min()) < 0):
                at = int(((ids >= vocab_size) | (ids < 0)).argmax())
                raise _damaged(
                    path, f"token {begin // itemsize + at} is {int(ids[at])}, and the vocabulary has {vocab_size} ids"
                )
    return digest.hexdigest()


def holds_tokens(prefix: str, documents: int, fingerprint: str) -> bool:
    """Whether ``PREFIX.bin`` holds the tokens of a fingerprint, their SHA-256 as int32.

    A file of more than 64 MiB is not read for that, and is believed: this is for sets that earlier versions made.
    """
    path, dtype = f"{prefix}.bin", open_index(prefix, documents).dtype
    digest = hashlib.sha256()
    with reading(path, DataError, advice=_AGAIN), open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size > _BLOCK * _BLOCKS:
            return True
        while block := file.read(1 << 22):
            digest.update(np.frombuffer(block, dtype.newbyteorder("<")).astype("<i4").tobytes())
    return digest.hexdigest() == fingerprint


def _blocks(size: int, itemsize: int) -> list[int]:
    """Where the blocks begin that are read of a file of ``size`` bytes: everywhere, or evenly spread and few."""
    if size <= _BLOCK * _BLOCKS:
        return list(range(0, size, _BLOCK))
    last = size - _BLOCK
    return [number * last // (_BLOCKS - 1) // itemsize * itemsize for number in range(_BLOCKS)]


def _read_at(file: IO[bytes], begin: int, size: int) -> bytes:
    file.seek(begin)
    block = file.read(size)
    if len(block) < size:
        raise EOFError("it ends too early")
    return block


def _damaged(path: str, problem: str) -> DataError:
    return DataError(f"{path}: is damaged: {problem}; {_AGAIN}")
