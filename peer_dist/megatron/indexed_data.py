"""Megatron's indexed data sets: writing one, and reading its splits as shuffled sequences.

A thin seam; Megatron is imported on first use, because that takes seconds.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import os
import shutil
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist

from peer_dist.machine import file_stamp
from peer_dist.mistake import Mistake, in_words
from peer_dist.ranks.rank_zero import on_rank_zero
from peer_dist.reading import reading
from peer_dist.writing import no_empty_folders


class CacheError(Mistake, RuntimeError):
    """Megatron's index of a data set cannot be built or read. Raised by every rank of the process group."""


class TokenError(Mistake, ValueError):
    """A sequence of a data set holds what is no token."""


class Vocabulary(Protocol):
    """What a data set needs to know of its tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""

    @property
    def eod(self) -> int:
        """The id of the end-of-document token."""


class IndexedWriter:
    """Writes ``PREFIX.bin`` and ``PREFIX.idx``, document by document; the .idx when the ``with`` ends well.

    Tokens take two bytes each where ``vocab_size`` allows, else four.
    """

    def __init__(self, prefix: str | os.PathLike[str], vocab_size: int) -> None:
        indexed = _megatron("indexed_dataset")
        self.bin, self.idx = f"{os.fspath(prefix)}.bin", f"{os.fspath(prefix)}.idx"
        self._builder = indexed.IndexedDatasetBuilder(self.bin, indexed.DType.optimal_dtype(vocab_size))

    def add(self, tokens: np.ndarray) -> None:
        """Append one document, ``tokens`` [n] of any integer dtype, its end-of-document token included."""
        self._builder.add_document(tokens, [len(tokens)])

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._builder.finalize(self.idx)
        else:
            self._builder.data_file.close()


class SplitDataset:
    """The sequences of one split, each once (one epoch), in the order of Megatron's shuffle for the seed."""

    def __init__(self, dataset: Any, vocab_size: int) -> None:
        self._dataset, self._vocab_size = dataset, vocab_size

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> torch.Tensor:
        """Sequence ``index`` as int64 [seq_length + 1]; its last token is the first of another sequence.

        Raises:
            TokenError: a token in it is not of the vocabulary.
        """
        sample = self._dataset[index]
        tokens = torch.cat([sample["tokens"], sample["labels"][-1:]])
        least, most = (int(value) for value in torch.aminmax(tokens))
        if least < 0 or most >= self._vocab_size:
            odd = least if least < 0 else most
            raise TokenError(
                f"{self._dataset.dataset_path}.bin: is damaged: a sequence holds the token {odd}, and the vocabulary "
                f"has {self._vocab_size} ids; copy it again, or prepare the data again"
            )
        return tokens

    @property
    def documents(self) -> np.ndarray:
        """Indices into the file's documents, int32 [documents of this split], in the order of the file."""
        return self._dataset.indices

    @property
    def tokens(self) -> int:
        """Tokens of this split, those included that do not fill a sequence."""
        return int(self._dataset.dataset.sequence_lengths[self.documents].sum())


def build_split_datasets(
    prefix: str | os.PathLike[str],
    split: str,
    seq_length: int,
    seed: int,
    tokenizer: Vocabulary,
    cache_dir: str | os.PathLike[str],
    fingerprint: str = "",
) -> tuple[SplitDataset | None, SplitDataset | None, SplitDataset | None]:
    """The training, validation and test sequences of one data set; None for a share of 0.

    In a process group all ranks call it, and rank 0 builds the index first. It lies under ``cache_dir`` in a
    folder of its own, moved there complete, so that neither runs that start together nor a killed one can
    leave a broken index; ranks that do not see rank 0's file system build theirs.

    Args:
        prefix: path without .bin / .idx; both exist.
        split: three shares such as `90,5,5`, by documents.
        seq_length: tokens of a sequence; consecutive ones share a token.
        seed: of Megatron's shuffles of documents and of sequences.
        tokenizer: the one that the data set was made with.
        cache_dir: folder for the index; created if need be.
        fingerprint: names the data set's content; another fingerprint never meets an old index.

    Raises:
        CacheError: the index cannot be built, on this rank or on rank 0.
    """
    index = _Index(os.fspath(prefix), split, seq_length, seed, tokenizer, Path(cache_dir), fingerprint)
    on_rank_zero(index.ensure, raises=CacheError)
    index.ensure()  # where a rank does not see rank 0's file system
    train, valid, test = (None if one is None else SplitDataset(one, tokenizer.vocab_size) for one in index.open())
    return train, valid, test


def check_split_datasets(
    prefix: str | os.PathLike[str],
    split: str,
    seq_length: int,
    seed: int,
    tokenizer: Vocabulary,
    cache_dir: str | os.PathLike[str],
    fingerprint: str = "",
) -> None:
    """Make sure that :func:`build_split_datasets` can read the index if there is one already. Nothing is written.

    Raises:
        CacheError: it cannot.
    """
    index = _Index(os.fspath(prefix), split, seq_length, seed, tokenizer, Path(cache_dir), fingerprint)
    if index.folder.parent.exists() and not index.folder.parent.is_dir():
        raise CacheError(f"{index.folder.parent}: Megatron's index cannot be written there (it is no folder)")
    if index.folder.is_dir():
        index.open()


def split_documents(split: str, documents: int) -> list[range]:
    """Which of a data set's documents are for training, validation and test, as Megatron divides them.

    Args:
        split: three shares such as `90,5,5`.
        documents: number of documents of the data set.
    """
    config = _megatron("blended_megatron_dataset_config")
    matrix = config.convert_split_vector_to_split_matrix(config.parse_and_normalize_split(_plain_shares(split)))
    ends = [(0.0, 0.0) if part is None else part for part in matrix]
    return [range(round(begin * float(documents)), round(end * float(documents))) for begin, end in ends]


def _plain_shares(split: str) -> str:
    """The shares as Megatron reads them, which is without exponents."""
    return ",".join(f"{float(share):.12f}" for share in split.split(","))


_known: set[object] = set()  # what would change if an index that was found sound did


@dataclass(frozen=True)
class _Index:
    """Megatron's index of a data set's splits for a sequence length and a seed: a folder of arrays."""

    prefix: str
    split: str
    seq_length: int
    seed: int
    tokenizer: Vocabulary
    cache_dir: Path
    fingerprint: str

    @property
    def folder(self) -> Path:
        """Where it is, or will be."""
        tokens = self.tokenizer.vocab_size
        key = [self.prefix, _plain_shares(self.split), self.seq_length, self.seed, tokens, self.fingerprint]
        return self.cache_dir / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]

    def ensure(self) -> None:
        """Build it if there is none.

        Raises:
            CacheError: it cannot be built or written.
        """
        cache = self.folder
        if cache.is_dir():
            return
        try:
            with no_empty_folders(cache.parent):
                cache.parent.mkdir(parents=True, exist_ok=True)
                partial = Path(tempfile.mkdtemp(prefix=f".{cache.name}-", dir=cache.parent))
                try:
                    with _apart(writes=True):
                        self._build(partial)
                    partial.chmod(0o755)
                    partial.rename(cache)
                except OSError:
                    if not cache.is_dir():  # else another run was faster
                        raise
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
        except (OSError, ValueError) as error:
            raise CacheError(f"{cache.parent}: Megatron's index cannot be written there ({in_words(error)})") from None

    def open(self) -> list[Any]:
        """Megatron's data sets of the three splits, None for a share of 0, from an index that is sound.

        Nothing in its files can run, and nothing but what Megatron would build leads to a sequence.

        Raises:
            CacheError: it is not.
        """
        cache = self.folder
        with reading(cache, CacheError, "Megatron's index of these data", "delete this folder"):
            stamp = file_stamp(cache, *sorted(cache.iterdir()), f"{self.prefix}.idx")
            with _apart(writes=False):
                datasets = self._build(cache)
            if stamp is None or stamp not in _known:
                for dataset in filter(None, datasets):
                    _check_order(dataset, self.seq_length)
                _known.update(() if stamp is None else [stamp])
        return datasets

    def _build(self, folder: Path) -> list[Any]:
        gpt, builder = _megatron("gpt_dataset"), _megatron("blended_megatron_dataset_builder")
        config = gpt.GPTDatasetConfig(
            random_seed=self.seed % 2**32,
            sequence_length=self.seq_length,
            blend=([self.prefix], None),
            split=_plain_shares(self.split),
            path_to_cache=str(folder),
            # Megatron keys its index by what it is told of the data, and the tokenizer is the one place for more
            tokenizer=_Described(self.tokenizer.vocab_size, self.tokenizer.eod, {"fingerprint": self.fingerprint}),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        sizes = [None, None, None]  # one epoch
        whole = builder.BlendedMegatronDatasetBuilder(gpt.GPTDataset, sizes, lambda: True, config)
        # `build` would do the same with a barrier per split, at which the others hang if one rank fails
        with _plain_arrays():
            datasets: list[Any] = whole._build_megatron_dataset_splits(self.prefix, config.split_matrix, sizes, False)
        return datasets


def _load_plain(path: str, mmap_mode: str | None = None, allow_pickle: bool = False) -> np.ndarray:
    """The array in a .npy file, mapped into memory, as Megatron asks numpy for it; without what numpy would unpickle.

    Raises:
        ValueError: the file is not whole, no plain array of numbers, or no file at all.
    """
    # a pipe would be waited for
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb") as file:
        status = os.fstat(file.fileno())
        name = os.path.basename(path)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{name} is no file")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # about headers that Megatron does not write
                version = np.lib.format.read_magic(file)
                shape, columns_first, dtype = np.lib.format.read_array_header_1_0(file)
        except Exception:  # of many kinds, with texts about Python's parser
            raise ValueError(f"{name} does not begin as an array's file") from None
        if version != (1, 0):
            raise ValueError(f"{name} is of another version")
        if dtype.str not in ("<i4", "<i8", "<u4") or columns_first or not 1 <= len(shape) <= 2:
            raise ValueError(f"{name} holds no order of sequences but {dtype} {shape}")
        size = dtype.itemsize
        for length in shape:
            size *= length
        if min(shape) < 0 or status.st_size != file.tell() + size:
            raise ValueError(f"{name} has {status.st_size} bytes, which its header does not tell of")
        return np.memmap(file, dtype, "r", file.tell(), shape)


@contextmanager
def _plain_arrays() -> Iterator[None]:
    """A context in which Megatron's data sets load arrays by :func:`_load_plain`: numpy's own would run pickles."""
    gpt = _megatron("gpt_dataset")

    class Plain(ModuleType):
        load = staticmethod(_load_plain)

        def __getattr__(self, name: str) -> Any:
            return getattr(np, name)

    kept = gpt.numpy
    try:
        gpt.__dict__["numpy"] = Plain("numpy")
        yield
    finally:
        gpt.__dict__["numpy"] = kept


_CHUNK = 1 << 16  # documents or sequences looked at together: what stays in cache


def _check_order(dataset: Any, seq_length: int) -> None:
    """Refuse an index that does not lead through each of a split's documents and sequences once.

    Raises:
        ValueError: it does not.
    """
    order, starts, shuffle = dataset.document_index, dataset.sample_index, dataset.shuffle_index
    documents = range(int(dataset.indices[0]), int(dataset.indices[-1]) + 1) if len(dataset.indices) else range(0)
    _check_permutation("document", order, documents)
    lengths = dataset.dataset.sequence_lengths
    tokens = int(lengths[documents.start : documents.stop].sum(dtype=np.int64))
    sequences = max(0, tokens - 1) // seq_length
    _check_permutation("shuffle", shuffle, range(sequences))
    if starts.shape != (sequences + 1, 2):
        raise ValueError(f"the sample index has the shape {starts.shape}, not {(sequences + 1, 2)}")
    before = 0  # tokens of the documents before the chunk
    for at in range(0, len(order), _CHUNK):
        own = lengths[order[at : at + _CHUNK]].astype(np.int64)
        begins = before + np.cumsum(own) - own
        end = before + int(own.sum())
        for first in range(-(-before // seq_length), min(sequences + 1, -(-end // seq_length)), _CHUNK):
            position = np.arange(first, min(first + _CHUNK, sequences + 1, -(-end // seq_length))) * seq_length
            document, offset = starts[first : first + len(position)].astype(np.int64).T
            document = document - at
            if ((document < 0) | (document >= len(own))).any():
                raise ValueError("the sample index leads to other documents")
            if ((offset < 0) | (offset >= own[document]) | (begins[document] + offset != position)).any():
                raise ValueError("the sample index leads to other tokens")
        before = end


def _check_permutation(name: str, order: np.ndarray, wanted: range) -> None:
    """Refuse an order that does not have each of the numbers ``wanted`` once, as far as sums can tell."""
    if order.shape != (len(wanted),):
        raise ValueError(f"the {name} index has the shape {order.shape}, not {(len(wanted),)}")
    total = squares = 0
    for at in range(0, len(order), _CHUNK):
        part = order[at : at + _CHUNK].astype(np.int64)
        if int(part.min()) < wanted.start or int(part.max()) >= wanted.stop:
            raise ValueError(f"the {name} index has a number that is out of range")
        total += int((part - wanted.start).sum())
        squares += int(((part - wanted.start).astype(np.uint64) ** 2).sum(dtype=np.uint64))
    count = len(wanted)
    if total != count * (count - 1) // 2 or (squares - (count - 1) * count * (2 * count - 1) // 6) % 2**64:
        raise ValueError(f"the {name} index has a number twice")


def blend_indices(weights: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """For each of ``size`` positions a data set (int16) and which of its draws this is (int64), both [size].

    Megatron's greedy rule, always the data set furthest behind its share: a longer result begins with the
    shorter one. ``weights`` [data sets] float64 sum to 1.
    """
    which, draw = np.zeros(size, dtype=np.int16), np.zeros(size, dtype=np.int64)
    _megatron("helpers").build_blending_indices(which, draw, weights, len(weights), size, False)
    return which, draw


def exhaustive_blend_indices(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As :func:`blend_indices`, but every draw of every data set once, spread evenly. ``sizes``: int64."""
    total = int(sizes.sum())
    which, draw = np.zeros(total, dtype=np.int16), np.zeros(total, dtype=np.int64)
    _megatron("helpers").build_exhaustive_blending_indices(which, draw, sizes, len(sizes))
    return which, draw


@dataclass(frozen=True)
class _Described:
    """What Megatron's data sets ask of a tokenizer. No token is its padding, so none is replaced by another."""

    vocab_size: int
    eod: int
    unique_identifiers: dict[str, str]
    pad: int = field(default=-(2**62), init=False)


@contextmanager
def _apart(writes: bool) -> Iterator[None]:
    """A context in which Megatron's data sets see no process group, so that they write an index; or one in which this
    is not its first rank, so that they only read.
    """
    kept: tuple[Callable[..., Any], Callable[..., Any]] = dist.is_initialized, dist.get_rank
    try:
        dist.is_initialized, dist.get_rank = (lambda: not writes), (lambda group=None: 1)
        yield
    finally:
        dist.is_initialized, dist.get_rank = kept


def _megatron(module: str) -> ModuleType:
    """A module of Megatron's data sets, imported without its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about accelerators' libraries that the data sets do not need
        loaded = importlib.import_module(f"megatron.core.datasets.{module}")
    logging.getLogger("megatron.core.datasets").setLevel(logging.WARNING)
    return loaded
