"""Ranges of a buffer's rows, taken and given back."""

from __future__ import annotations

import weakref
from collections import deque


class Range:
    """Rows ``begin`` to ``end`` of a buffer, until nothing refers to it any more."""

    def __init__(self, begin: int, end: int) -> None:
        self.begin, self.end = begin, end


class Ranges:
    """The rows of a buffer that nobody has taken. Who takes some gets the first ones that are enough.

    Args:
        begin, end: of all of them.
    """

    def __init__(self, begin: int, end: int) -> None:
        self._free = [(begin, end)]
        self._taken = 0
        self._given: deque[tuple[int, int]] = deque()  # by whichever thread lets go of a range, at any moment

    @property
    def taken(self) -> int:
        """The number of rows taken now."""
        self._collect()
        return self._taken

    def take(self, count: int) -> Range | None:
        """A range of rows; None where no gap is large enough."""
        self._collect()
        for number, (begin, end) in enumerate(self._free):
            if end - begin >= count:
                self._free[number] = begin + count, end
                self._taken += count
                taken = Range(begin, begin + count)
                weakref.finalize(taken, self._given.append, (begin, begin + count)).atexit = False
                return taken
        return None

    def _collect(self) -> None:
        given = []
        while self._given:
            given.append(self._given.popleft())
        if not given:
            return
        self._taken -= sum(end - begin for begin, end in given)
        joined: list[tuple[int, int]] = []
        for begin, end in sorted(span for span in self._free + given if span[0] < span[1]):
            if joined and joined[-1][1] == begin:
                joined[-1] = joined[-1][0], end
            else:
                joined.append((begin, end))
        self._free = joined
