"""How many rows a pass picks, and how many of them a cache of the hottest rows has.

Rows are picked by Zipf's law: the one of rank ``i`` in proportion to ``i ** -exponent``; 0 is uniform. A row shard has
ranks at equal distances, and so the same law over its own rows. A cache that keeps the rows picked most often holds the
first ranks. Its hit rate is that of the distinct rows of a pass, each of which is fetched once however often it is
picked: lower than the share of picks, because hot rows are picked many times.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

_EXACT = 4096  # ranks that are reckoned with one by one; beyond, so many groups of neighbours


@dataclass(frozen=True)
class Distinct:
    """Expected distinct rows of a pass.

    Attributes:
        rows: all of them.
        missed: those that the cache does not have.
    """

    rows: float
    missed: float

    @property
    def hit_rate(self) -> float:
        """The share that the cache has; 1 where nothing is picked."""
        return 1 - self.missed / self.rows if self.rows else 1.0


def distinct(rows: int, picks: float, cached: int = 0, exponent: float = 0.0) -> Distinct:
    """The distinct rows among ``picks`` picks of ``rows`` rows, of which the ``cached`` hottest are in a cache."""
    share, members = _ranks(rows, exponent)
    touched = -np.expm1(-picks * share) * members
    return Distinct(float(touched.sum()), float((touched * _outside(members, cached)).sum()))


def share_of_picks(rows: int, cached: int, exponent: float) -> float:
    """The share of all picks that are of the ``cached`` hottest rows."""
    share, members = _ranks(rows, exponent)
    return float((share * members * (1 - _outside(members, cached))).sum())


def _outside(members: np.ndarray, cached: int) -> np.ndarray:
    """The share of each group of rows that is not among the ``cached`` first ones."""
    return np.clip((np.cumsum(members) - cached) / members, 0.0, 1.0)


@functools.lru_cache(64)
def _ranks(rows: int, exponent: float) -> tuple[np.ndarray, np.ndarray]:
    """Probability of a row, and number of rows, of groups of neighbouring ranks: float64 ``[groups]`` each."""
    starts = np.arange(min(rows, _EXACT) + 1, dtype=np.float64)  # ranks from 0; a group goes up to the next start
    if rows > _EXACT:
        starts = np.append(starts, np.unique(np.geomspace(_EXACT, rows, _EXACT + 1).round())[1:])
    members = np.diff(starts)
    middle = starts[:-1] + (members + 1) / 2  # of ranks from 1
    weight = middle**-exponent
    return weight / (weight * members).sum(), members


@dataclass(frozen=True)
class Skew:
    """What is known of how unevenly rows are picked.

    Attributes:
        exponent: of Zipf's law.
        hit_rate: of the distinct rows of a pass, as a run measured it with its own cache; None: what the law says.
    """

    exponent: float = 0.0
    hit_rate: float | None = None

    def distinct(self, rows: int, picks: float, cached: int) -> Distinct:
        """As :func:`distinct`."""
        expected = distinct(rows, picks, cached, self.exponent)
        return expected if self.hit_rate is None else Distinct(expected.rows, (1 - self.hit_rate) * expected.rows)


EVEN = Skew()
"""All rows alike."""
