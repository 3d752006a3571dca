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
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist

from peer_dist.mistake import Mistake
from peer_dist.ranks.rank_zero import on_rank_zero


class CacheError(Mistake, RuntimeError):
    """Megatron's index of a data set cannot be built or read. Raised by every rank of the process group."""


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

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> torch.Tensor:
        """Sequence ``index`` as int64 [seq_length + 1]; its last token is the first of another sequence."""
        sample = self._dataset[index]
        return torch.cat([sample["tokens"], sample["labels"][-1:]])

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
    shares = ",".join(f"{float(share):.12f}" for share in split.split(","))  # Megatron reads no exponents
    # Megatron keys its index by what it is told of the data, and the tokenizer is the one place for more
    described = _Described(tokenizer.vocab_size, tokenizer.eod, {"fingerprint": fingerprint})
    key = json.dumps([os.fspath(prefix), shares, seq_length, seed, tokenizer.vocab_size, fingerprint])
    cache = Path(cache_dir) / hashlib.sha256(key.encode()).hexdigest()[:16]

    def build(folder: Path) -> list[Any]:
        gpt, builder = _megatron("gpt_dataset"), _megatron("blended_megatron_dataset_builder")
        config = gpt.GPTDatasetConfig(
            random_seed=seed % 2**32,
            sequence_length=seq_length,
            blend=([os.fspath(prefix)], None),
            split=shares,
            path_to_cache=str(folder),
            tokenizer=described,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        sizes = [None, None, None]  # one epoch
        whole = builder.BlendedMegatronDatasetBuilder(gpt.GPTDataset, sizes, lambda: True, config)
        # `build` would do the same with a barrier per split, at which the others hang if one rank fails
        return whole._build_megatron_dataset_splits(os.fspath(prefix), config.split_matrix, sizes, False)

    def ensure() -> None:
        if cache.is_dir():
            return
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=f".{cache.name}-", dir=cache.parent))
            try:
                _as_rank_zero(build, partial)
                partial.chmod(0o755)
                partial.rename(cache)
            except OSError:
                if not cache.is_dir():  # else another run was faster
                    raise
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        except (OSError, ValueError) as error:
            raise CacheError(f"{cache.parent}: Megatron's index cannot be written there ({error})") from None

    on_rank_zero(ensure, raises=CacheError)
    ensure()  # where a rank does not see rank 0's file system
    try:
        datasets = build(cache)
    except (OSError, ValueError, EOFError) as error:
        raise CacheError(f"{cache}: Megatron's index is broken ({error}); delete this folder") from None
    train, valid, test = (None if dataset is None else SplitDataset(dataset) for dataset in datasets)
    return train, valid, test


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
    """What Megatron's data sets ask of a tokenizer. No token is -1, so none is masked as padding."""

    vocab_size: int
    eod: int
    unique_identifiers: dict[str, str]
    pad: int = field(default=-1, init=False)


def _as_rank_zero(build: Any, folder: Path) -> None:
    """Let Megatron write an index on a rank that shares no file system with rank 0, the only one it lets."""
    get_rank = dist.get_rank
    try:
        dist.get_rank = lambda group=None: 0
        build(folder)
    finally:
        dist.get_rank = get_rank


def _megatron(module: str) -> ModuleType:
    """A module of Megatron's data sets, imported without its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about accelerators' libraries that the data sets do not need
        loaded = importlib.import_module(f"megatron.core.datasets.{module}")
    logging.getLogger("megatron.core.datasets").setLevel(logging.WARNING)
    return loaded
