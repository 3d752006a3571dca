"""The data that training reads: a sequence of tokens at every position of an endless stream.

The sequence at a position depends on the data, their weights and the seed, but not on the length of the run. So a run
that is resumed, or that goes on for more steps than it was started with, reads what it would have read anyway, and a
checkpoint only has to save the number of sequences read.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from peer_dist.config.schema import DataConfig
from peer_dist.data.documents import DataError
from peer_dist.data.prepare import PreparedSet, read_prepared
from peer_dist.data.tokenizer import TextTokenizer, load_tokenizer
from peer_dist.megatron.indexed_data import (
    CacheError,
    SplitDataset,
    blend_indices,
    build_split_datasets,
    exhaustive_blend_indices,
)


class Dataset(Protocol):
    """One epoch of a data set's sequences, each int64 ``[seq_length + 1]``."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> torch.Tensor: ...


class Stream:
    """Sequences by position. A subclass says which sequence of which data set is at a position.

    Args:
        datasets: one epoch of each data set.

    Raises:
        DataError: there is no data set, or one without a sequence.
    """

    def __init__(self, datasets: Sequence[Dataset]) -> None:
        if not datasets or not all(len(dataset) for dataset in datasets):
            raise DataError("a stream needs data sets with at least one sequence each")
        self.datasets = list(datasets)

    def locate(self, position: int) -> tuple[int, int]:
        """The number of the data set at ``position`` (0, 1, ...), and the index of the sequence in it."""
        raise NotImplementedError

    def sample(self, position: int) -> torch.Tensor:
        """The tokens at ``position``, int64 ``[seq_length + 1]``: inputs and, shifted by one, labels."""
        dataset, index = self.locate(position)
        return self.datasets[dataset][index]

    def batch(self, positions: Iterable[int]) -> torch.Tensor:
        """The tokens at each of ``n`` positions, int64 ``[n, seq_length + 1]``."""
        return torch.stack([self.sample(int(position)) for position in positions])


class TokenStream(Stream):
    """Endless training data: data sets blended by weight, each repeated epoch by epoch in a new order.

    Args:
        datasets: one epoch of each data set.
        weights: the data sets' shares of the sequences; they need not sum to 1.
        seed: seed of the orders from the second epoch on; the first epoch has the data set's own order.

    Raises:
        DataError: a data set has no sequence, or there are not as many weights above 0 as data sets.
    """

    def __init__(self, datasets: Sequence[Dataset], weights: Sequence[float], seed: int) -> None:
        super().__init__(datasets)
        if len(weights) != len(datasets) or min(weights) <= 0:
            raise DataError(f"{len(datasets)} data sets need as many weights above 0; got {list(weights)}")
        self._weights = np.array(weights, dtype=np.float64) / sum(weights)
        self._seed = seed
        self._which, self._draw = np.empty(0, np.int16), np.empty(0, np.int64)
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    def locate(self, position: int) -> tuple[int, int]:
        """Find the data set by Megatron's blend, and the sequence by the order of the data set's epoch."""
        dataset, draw = self._blend(position)
        epoch, index = divmod(draw, len(self.datasets[dataset]))
        return dataset, index if epoch == 0 else int(self._order(dataset, epoch)[index])

    def _blend(self, position: int) -> tuple[int, int]:
        """The number of the data set at ``position``, and how many sequences of it come before."""
        if len(self.datasets) == 1:
            return 0, position
        if position >= len(self._which):  # each blend is computed from the start: doubling its size keeps that cheap
            size = max(1 << 14, 1 << (position + 1).bit_length())
            self._which, self._draw = blend_indices(self._weights, size)
        return int(self._which[position]), int(self._draw[position])

    def _order(self, dataset: int, epoch: int) -> np.ndarray:
        """The indices of a data set's sequences in the order of an epoch, int64; the last one is cached."""
        cached = self._orders.get(dataset)
        if cached is None or cached[0] != epoch:
            # RandomState: NumPy promises that its streams never change
            low, high = self._seed % 2**32, self._seed // 2**32 % 2**32
            order = np.random.RandomState([low, high, dataset, epoch]).permutation(len(self.datasets[dataset]))
            cached = self._orders[dataset] = (epoch, order)
        return cached[1]


class HeldOutStream(Stream):
    """Validation or test data: every sequence once, with data sets evenly interleaved, then the same again.

    Its ``len()`` is the number of distinct sequences.
    """

    def __init__(self, datasets: Sequence[Dataset]) -> None:
        super().__init__(datasets)
        sizes = np.array([len(dataset) for dataset in datasets], dtype=np.int64)
        self._length = int(sizes.sum())
        self._blend = exhaustive_blend_indices(sizes) if len(datasets) > 1 else None

    def __len__(self) -> int:
        return self._length

    def locate(self, position: int) -> tuple[int, int]:
        """Find the data set and the sequence in the even interleaving, which repeats."""
        position %= self._length
        if self._blend is None:
            return 0, position
        which, draw = self._blend
        return int(which[position]), int(draw[position])


@dataclass(frozen=True)
class SplitStreams:
    """The data of a run.

    Attributes:
        train: the training split of all data sets.
        validation: their validation splits; None if none of them has a whole sequence.
        test: their test splits; likewise.
        tokenizer: the tokenizer that the data sets were made with.
    """

    train: TokenStream
    validation: HeldOutStream | None
    test: HeldOutStream | None
    tokenizer: TextTokenizer


def open_tokenizer(config: DataConfig) -> TextTokenizer:
    """Load the configured tokenizer, or else the one beside the first data set.

    Raises:
        DataError: the tokenizer is missing or cannot be used.
    """
    if config.tokenizer is not None:
        return load_tokenizer(config.tokenizer)
    first = next(iter(config.weights))
    read_prepared(first)  # raises a clearer error if there is no such data set at all
    return load_tokenizer(f"{first}.tokenizer.json")


def open_data(
    config: DataConfig, seq_length: int, seed: int, cache_dir: str | os.PathLike[str] | None = None
) -> SplitStreams:
    """Open the prepared data sets that ``config`` names. A collective call in a process group.

    Args:
        config: the data sets' prefixes and weights, the tokenizer and the split.
        seq_length: number of tokens of a sequence.
        seed: seed of the order of the training data.
        cache_dir: the folder for Megatron's index; by default ``PREFIX.cache``, or a temporary folder if that cannot be
            written.

    Raises:
        DataError: a data set is missing, damaged, made with another tokenizer, or too short for one training sequence;
            or the tokenizer cannot be used.
    """
    tokenizer = open_tokenizer(config)
    train: list[SplitDataset] = []
    held_out: tuple[list[SplitDataset], list[SplitDataset]] = ([], [])
    for prefix in config.weights:
        summary = read_prepared(prefix)
        _check_tokenizer(prefix, summary, tokenizer)
        cache = Path(cache_dir) if cache_dir is not None else _cache_folder(prefix)
        try:
            first, *others = build_split_datasets(
                prefix, config.split, seq_length, seed, tokenizer, cache, summary.fingerprint
            )
        except CacheError as error:
            raise DataError(str(error)) from None
        if first is None or not len(first):
            tokens = 0 if first is None else first.tokens
            raise DataError(
                f"{prefix}: the training split has {tokens} tokens, too few for one sequence "
                f"({seq_length + 1}); prepare more text, give it a larger share or lower model.seq_length"
            )
        train.append(first)
        for splits, split in zip(held_out, others):
            if split is not None and len(split):
                splits.append(split)
    validation, test = (HeldOutStream(datasets) if datasets else None for datasets in held_out)
    return SplitStreams(TokenStream(train, list(config.weights.values()), seed), validation, test, tokenizer)


def _check_tokenizer(prefix: str, summary: PreparedSet, tokenizer: TextTokenizer) -> None:
    """Refuse a data set that was made with another tokenizer."""
    if (summary.vocabulary, summary.eod) != (tokenizer.digest, tokenizer.eod):
        raise DataError(
            f"{prefix}: was prepared with the tokenizer {summary.tokenizer} ({summary.vocab_size} tokens), "
            f"which is not data.tokenizer {tokenizer.name} ({tokenizer.vocab_size} tokens); "
            f"set data.tokenizer to {prefix}.tokenizer.json or prepare the data again"
        )


def _cache_folder(prefix: str) -> Path:
    """The folder of a data set's index: beside the data if it can be written there, else a temporary one."""
    beside = Path(f"{prefix}.cache")
    if os.access(beside if beside.is_dir() else beside.parent, os.W_OK):
        return beside
    user = os.getuid() if hasattr(os, "getuid") else "user"
    return Path(tempfile.gettempdir()) / f"peer_dist-{user}"
