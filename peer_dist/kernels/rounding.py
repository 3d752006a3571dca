"""Stochastic rounding to bfloat16 with bits that depend on what is rounded and not on who does it."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

_DRAWS = 4  # of 16 bits, in a word of 64


class Rounding(NamedTuple):
    """How a shard is rounded in a step.

    Attributes:
        key: see :func:`stream_key`.
        row: the first of the shard's rows, numbered in the whole table.
        column: the first of its columns.
    """

    key: int
    row: int
    column: int


def stream_key(seed: int, name: str, step: int) -> int:
    """A signed 64-bit number that differs with each argument, whatever the process or the machine."""
    digest = hashlib.blake2b(f"{seed}/{step}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def random_bits(key: int, rows: Tensor, columns: range) -> Tensor:
    """16 uniform bits for each place of a table: a counter-based generator, the same on every device.

    A word of SplitMix64, the counter being the row and a quarter of the column, serves four columns.

    Args:
        key: see :func:`stream_key`.
        rows: ``[n]`` int64, numbers in the whole table, below 2**31.
        columns: numbers in the whole table.

    Returns:
        ``[n, len(columns)]`` int32 from 0 to 65535.
    """
    first, last = columns.start // _DRAWS, -(-columns.stop // _DRAWS)
    counter = (rows << 32)[:, None] + torch.arange(first, last, dtype=torch.int64, device=rows.device)
    word = counter.mul_(_signed(0x9E3779B97F4A7C15)).add_(key)
    word ^= _shifted(word, 30)
    word *= _signed(0xBF58476D1CE4E5B9)
    word ^= _shifted(word, 27)
    word *= _signed(0x94D049BB133111EB)
    word ^= _shifted(word, 31)
    skipped = columns.start - _DRAWS * first
    draws = word.flatten().view(torch.int16).view(len(rows), _DRAWS * (last - first))
    return draws[:, skipped : skipped + len(columns)].to(torch.int32).bitwise_and_(0xFFFF)


def _signed(word: int) -> int:
    """The unsigned 64-bit ``word`` as int64: torch multiplies modulo 2**64, but takes constants with a sign only."""
    return word - (1 << 64)


def _shifted(word: Tensor, by: int) -> Tensor:
    """``word`` shifted right by ``by`` bits, with zeros from the left, where ``>>`` repeats the sign."""
    return (word >> by).bitwise_and_((1 << (64 - by)) - 1)


def round_stochastically(values: Tensor, bits: Tensor) -> Tensor:
    """One of the two bfloat16 neighbours of each value, the nearer the likelier, so that the mean is the value.

    Values that bfloat16 has stay, infinities and NaN among them.

    Args:
        values: ``[rows, columns]`` float32.
        bits: ``[rows, columns]`` int32, see :func:`random_bits`; written to.

    Returns:
        ``[rows, columns]`` bfloat16.
    """
    # A bfloat16 is the upper half of a float32, the sign apart from the magnitude: added to the lower half, the bits
    # carry into the upper one as often as the lower half is large.
    upper = bits.add_(values.view(torch.int32)).bitwise_right_shift_(16).to(torch.int16)
    return torch.where(values.isfinite(), upper.view(torch.bfloat16), values.to(torch.bfloat16))
