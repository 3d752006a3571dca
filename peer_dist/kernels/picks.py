"""Which rows of a table each token reads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from peer_dist.kernels.custom_ops import caller

MOST = (1 << 31) - 1
"""The most picks that are sorted in one call; their numbers, and those of rows, are int32."""

_known = WeakTensorKeyDictionary()  # Picks.expert to the order that it was found in, and to what it was found of


@dataclass(frozen=True)
class ByExpert:
    """Picks in ascending order of their expert, those of one expert in the order of their tokens.

    Attributes:
        expert: ``[picks]`` int32, ascending.
        pick: ``[picks]`` int32, the number of the pick at each place.
        token: ``[picks]`` int32, its token.
    """

    expert: Tensor
    pick: Tensor
    token: Tensor

    @classmethod
    def of(cls, picks: Picks) -> ByExpert:
        """The order of these picks; :attr:`Picks.by_expert` makes it once.

        The sort is torch's, of 32-bit keys: on a GPU cub's, four passes of 8 bits over 12 bytes a pick.

        Raises:
            ValueError: there are more than 2**31 - 1 picks.
        """
        picks.count()  # refuses too many
        expert, pick = torch.sort(picks.expert.to(torch.int32), stable=True)
        return cls(expert, pick.to(torch.int32), picks.token.index_select(0, pick))


@dataclass(frozen=True)
class Picks:
    """Token ``t`` reads the rows ``expert[offsets[t]:offsets[t + 1]]`` (compressed sparse rows).

    Attributes:
        offsets: ``[tokens + 1]`` int64, ascending from 0 to the number of picks.
        expert: ``[picks]`` int64 row numbers in the local table; a row may appear twice in one token. For the kernels
            of a GPU there may be more, of no token and of the row -1: room for picks that are not there. What comes
            out for them has no meaning.
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
    def of_rows(cls, token: Tensor, tokens: int) -> Picks:
        """The picks where row ``i`` is read by ``token[i]`` alone, ``[rows]`` int64; by each in ascending order.

        Asks nothing of the device.
        """
        ascending, row = torch.sort(token.to(torch.int32), stable=True)
        numbers = torch.arange(tokens + 1, dtype=torch.int32, device=token.device)
        return cls(torch.searchsorted(ascending, numbers), row)

    def count(self) -> int:
        """The number of picks, which are to be numbered by int32.

        Raises:
            ValueError: there are more than 2**31 - 1.
        """
        count = self.expert.numel()
        if count > MOST:
            raise ValueError(f"{count} picks in one call are more than 2**31 - 1; take the tokens in parts")
        return count

    @property
    def tokens(self) -> int:
        """The number of tokens, those without picks included."""
        return self.offsets.numel() - 1

    @cached_property
    def token(self) -> Tensor:
        """``[picks]`` int32: the token of each pick, ascending."""
        counts = F.pad(self.offsets, (0, 1), value=self.expert.numel()).diff().to(torch.int32)  # and those of no token
        return torch.repeat_interleave(counts, output_size=self.expert.numel())

    @cached_property
    def by_expert(self) -> ByExpert:
        """These picks by expert. What operators sort is found again by others of the same :attr:`expert`, the tensor
        itself, while it lives.

        So the backward pass finds the order that the forward pass made, if it made one, in the tensor that autograd
        kept; and what autograd lets go of takes the order along. The operators of a compiled graph sort for themselves.
        """
        if not caller.python or self.expert.is_inference():  # nobody counts the changes of these
            return ByExpert.of(self)
        made = _known.get(self.expert)
        # what is captured for a CUDA graph was not computed yet, and its replays take no order from outside
        state = self.expert._version, self.expert.is_cuda and torch.cuda.is_current_stream_capturing()
        if made is None or made[0] != state or made[1] is not self.offsets:
            made = _known[self.expert] = state, self.offsets, ByExpert.of(self)
        order: ByExpert = made[2]
        return order

    @cached_property
    def segments(self) -> tuple[Tensor, Tensor]:
        """The rows that are read at all, ``[touched]`` int64 ascending, and the places in :attr:`by_expert` where the
        picks of each begin, and their end, ``[touched + 1]`` int32. Waits for their number.
        """
        touched, counts = torch.unique_consecutive(self.by_expert.expert, return_counts=True)
        return touched.long(), F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
