"""Which rows of a table each token reads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

_known = threading.local()


@dataclass(frozen=True)
class Picks:
    """Token ``t`` reads the rows ``expert[offsets[t]:offsets[t + 1]]`` (compressed sparse rows).

    Attributes:
        offsets: ``[tokens + 1]`` int64, ascending from 0 to the number of picks.
        expert: ``[picks]`` int64 row numbers in the local table; a row may appear twice in one token.
    """

    offsets: Tensor
    expert: Tensor

    @classmethod
    def even(cls, expert: Tensor) -> Picks:
        """The picks where each token has as many: ``expert: [tokens, picks per token]`` int64."""
        tokens, picks_per_token = expert.shape
        ends = torch.arange(tokens + 1, dtype=torch.int64, device=expert.device)
        return cls(ends * picks_per_token, expert.reshape(-1).contiguous())

    @classmethod
    def of(cls, offsets: Tensor, expert: Tensor) -> Picks:
        """Those of an operator's two tensors: the :meth:`shared` ones, with what was worked out, if they are these."""
        known: Picks | None = getattr(_known, "picks", None)
        same = known is not None and all(
            mine.data_ptr() == theirs.data_ptr() and mine.numel() == theirs.numel()
            for mine, theirs in ((known.offsets, offsets), (known.expert, expert))
        )
        return known if known is not None and same else cls(offsets, expert)

    @contextmanager
    def shared(self) -> Iterator[None]:
        """A context in which the operators that this thread calls for these picks sort them once between them."""
        before, _known.picks = getattr(_known, "picks", None), self
        try:
            yield
        finally:
            _known.picks = before

    @property
    def tokens(self) -> int:
        """The number of tokens, those without picks included."""
        return self.offsets.numel() - 1

    @cached_property
    def token(self) -> Tensor:
        """``[picks]`` int64: the token of each pick, ascending."""
        counts = self.offsets[1:] - self.offsets[:-1]
        ids = torch.arange(self.tokens, dtype=torch.int64, device=counts.device)
        return torch.repeat_interleave(ids, counts, output_size=self.expert.numel())

    @cached_property
    def _sorted(self) -> tuple[Tensor, Tensor]:
        return torch.sort(self.expert, stable=True)

    @property
    def by_expert(self) -> Tensor:
        """``[picks]`` int64: the order that sorts picks by expert, tokens ascending within one."""
        return self._sorted[1]

    @cached_property
    def segments(self) -> tuple[Tensor, Tensor]:
        """The rows that are read at all, ``[touched]`` int64 ascending, and where the picks of each begin in
        :attr:`by_expert`, ``[touched + 1]`` int64.
        """
        touched, counts = torch.unique_consecutive(self._sorted[0], return_counts=True)
        starts = counts.new_zeros(counts.numel() + 1)
        torch.cumsum(counts, 0, out=starts[1:])
        return touched, starts
