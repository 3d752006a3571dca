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
from peer_dist.data.files import open_index
from peer_dist.data.prepare import PreparedSet, describe_prepared, read_prepared
from peer_dist.data.tokenizer import TextTokenizer, load_tokenizer
from peer_dist.machine import private_folder
from peer_dist.megatron.indexed_data import (
    CacheError,
    SplitDataset,
    blend_indices,
    build_split_datasets,
    check_split_datasets,
    exhaustive_blend_indices,
    split_documents,
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
    describe_prepared(first)  # raises a clearer error if there is no such data set at all
    return load_tokenizer(f"{first}.tokenizer.json")


@dataclass(frozen=True)
class CheckedData:
    """What is known of a run's data before any of it is opened.

    Attributes:
        tokenizer: the tokenizer that the data sets were made with.
        sequences: number of whole sequences in the ``training``, ``validation`` and ``test`` splits of all data sets.
        remarks: a sentence for each thing that does not stop the run, but may not be meant.
    """

    tokenizer: TextTokenizer
    sequences: dict[str, int]
    remarks: list[str]


def check_data(
    config: DataConfig, seq_length: int, seed: int, cache_dir: str | os.PathLike[str] | None = None
) -> CheckedData:
    """Refuse what :func:`open_data` would, before any process group exists. Nothing is made or written.

    Args:
        config, seq_length, seed, cache_dir: as in :func:`open_data`.

    Raises:
        DataError: as in :func:`open_data`.
    """
    tokenizer, summaries = _read_all(config)
    sequences, remarks = dict.fromkeys(("training", "validation", "test"), 0), []
    for prefix, summary in summaries.items():
        index = open_index(prefix, summary.documents)
        for name, documents in zip(sequences, split_documents(config.split, summary.documents)):
            tokens = index.tokens(documents.start, documents.stop, summary.sizes[".bin"])
            sequences[name] += max(0, tokens - 1) // seq_length
            if name == "training":
                _check_length(prefix, tokens, seq_length)
            elif name == "validation" and float(config.split.split(",")[1]) > 0 and tokens <= seq_length:
                remarks.append(
                    f"{prefix}: the validation split has {len(documents)} documents and {tokens} tokens, too few for "
                    f"one sequence ({seq_length + 1}): no loss is measured on it; prepare more documents, or give it a "
                    "larger share in data.split"
                )
        cache = _cache_folder(prefix, cache_dir)
        try:
            if cache.private and os.path.lexists(cache.path):
                cache.make()
            check_split_datasets(prefix, config.split, seq_length, seed, tokenizer, cache.path, summary.fingerprint)
        except CacheError as error:
            raise DataError(str(error)) from None
    return CheckedData(tokenizer, sequences, remarks)


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
    tokenizer, summaries = _read_all(config)
    train: list[SplitDataset] = []
    held_out: tuple[list[SplitDataset], list[SplitDataset]] = ([], [])
    for prefix, summary in summaries.items():
        cache = _cache_folder(prefix, cache_dir)
        try:
            first, *others = build_split_datasets(
                prefix, config.split, seq_length, seed, tokenizer, cache.make(), summary.fingerprint
            )
        except CacheError as error:
            raise DataError(str(error)) from None
        _check_length(prefix, 0 if first is None else first.tokens, seq_length)
        assert first is not None
        train.append(first)
        for splits, split in zip(held_out, others):
            if split is not None and len(split):
                splits.append(split)
    validation, test = (HeldOutStream(datasets) if datasets else None for datasets in held_out)
    return SplitStreams(TokenStream(train, list(config.weights.values()), seed), validation, test, tokenizer)


def _read_all(config: DataConfig) -> tuple[TextTokenizer, dict[str, PreparedSet]]:
    """The run's tokenizer and the description of each data set, whose files are sound and were made with it."""
    tokenizer = open_tokenizer(config)
    summaries = {prefix: read_prepared(prefix) for prefix in config.weights}
    for prefix, summary in summaries.items():
        _check_tokenizer(prefix, summary, tokenizer)
    return tokenizer, summaries


def _check_tokenizer(prefix: str, summary: PreparedSet, tokenizer: TextTokenizer) -> None:
    """Refuse a data set that was made with another tokenizer."""
    what, known = f"{summary.tokenizer} ({summary.vocab_size} tokens)", f"({tokenizer.vocab_size} tokens)"
    if (summary.vocabulary, summary.vocab_size, summary.eod) == (
        tokenizer.digest,
        tokenizer.vocab_size,
        tokenizer.eod,
    ):
        if load_tokenizer(f"{prefix}.tokenizer.json").works_as(tokenizer):
            return
        known = "(the same tokens, but another way of dividing texts into them)"
    raise DataError(
        f"{prefix}: was prepared with the tokenizer {what}, which is not data.tokenizer {tokenizer.name} {known}; "
        f"set data.tokenizer to {prefix}.tokenizer.json or prepare the data again"
    )


def _check_length(prefix: str, tokens: int, seq_length: int) -> None:
    """Refuse a training split without a whole sequence."""
    if tokens <= seq_length:
        raise DataError(
            f"{prefix}: the training split has {tokens} tokens, too few for one sequence "
            f"({seq_length + 1}); prepare more text, give it a larger share or lower model.seq_length"
        )


@dataclass(frozen=True)
class _CacheFolder:
    """Where a data set's index goes. One under the folder of temporary files must be this user's alone."""

    path: Path
    private: bool = False

    def make(self) -> Path:
        """The path; a private folder is made, or checked if it is there.

        Raises:
            DataError: it is not private.
        """
        if self.private:
            try:
                private_folder(self.path)
            except OSError as error:
                raise DataError(
                    f"{self.path}: cannot be this user's folder for Megatron's index of data that lie where one cannot "
                    f"write ({error.strerror or error}); remove it, or set TMPDIR to a folder of your own"
                ) from None
        return self.path


def _cache_folder(prefix: str, chosen: str | os.PathLike[str] | None) -> _CacheFolder:
    """The folder that was chosen, else one beside the data if it can be written there, else a temporary one."""
    if chosen is not None:
        return _CacheFolder(Path(chosen))
    beside = Path(f"{prefix}.cache")
    if os.access(beside if beside.is_dir() else beside.parent, os.W_OK):
        return _CacheFolder(beside)
    user = os.getuid() if hasattr(os, "getuid") else "user"
    return _CacheFolder(Path(tempfile.gettempdir()) / f"peer_dist-{user}", private=True)
