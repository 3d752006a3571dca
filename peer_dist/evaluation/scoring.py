"""The log-probability of every token of a text: sliding windows, batched, shared among the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from peer_dist.evaluation.loading import LoadedModel
from peer_dist.measures.held_out import make_micro_batch
from peer_dist.megatron import forward_logits


@dataclass(frozen=True)
class Request:
    """A document's token ids, int [n]; those from ``start`` on are scored."""

    ids: np.ndarray
    start: int = 0


@dataclass(frozen=True)
class Scores:
    """The model's scores of a request's tokens from ``start`` on, in their order.

    Attributes:
        nats: minus the log-probability of each, float32 [n - start].
        greedy: whether it was the likeliest token, bool [n - start].
    """

    nats: np.ndarray
    greedy: np.ndarray


class _Window(NamedTuple):
    """Tokens ``begin`` to ``end`` of a request, of which those from ``scored`` on count."""

    request: int
    begin: int
    scored: int
    end: int

    @property
    def length(self) -> int:
        return self.end - self.begin


def windows(tokens: int, start: int, seq_length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Ranges ``(begin, scored, end)`` that score each of the tokens from ``start`` on once.

    A token sees at least ``seq_length - stride`` tokens before it, or all of them; the last window of a long text
    is a whole one.
    """
    scored = start
    while scored < tokens:
        end = min(tokens, max(scored + stride, seq_length))
        yield max(0, end - seq_length), scored, end
        scored = end


@torch.no_grad()
def score(
    loaded: LoadedModel,
    requests: Sequence[Request],
    stride: int,
    batch_size: int,
    advance: Callable[[float], None] = lambda share: None,
) -> list[Scores]:
    """Score documents that do not see each other, each after an end-of-document token.

    Every rank calls it with the same requests and gets all scores: the ranks share the windows, not the documents,
    so that one long document keeps all of them busy, and all make as many forward passes.

    Args:
        stride: tokens scored per window (but the first), 1 to ``seq_length``.
        batch_size: windows per rank and forward pass; only windows of one length share a pass, nothing is padded.
        advance: called after every pass with its share of all passes, 0 to 1.
    """
    parallel, eod, seq_length = loaded.parallel, loaded.tokenizer.eod, loaded.config.model.seq_length
    todo = [
        _Window(number, *window)
        for number, request in enumerate(requests)
        for window in windows(len(request.ids), request.start, seq_length, stride)
    ]
    todo.sort(key=lambda window: -window.length)
    batches = [
        alike[first : first + batch_size]
        for alike in (list(group) for _, group in groupby(todo, key=lambda window: window.length))
        for first in range(0, len(alike), batch_size)
    ]
    inputs = [np.concatenate([[eod], request.ids]) for request in requests]
    offsets = np.cumsum([0, *(len(request.ids) for request in requests)])
    scored = torch.zeros(2, int(offsets[-1]), dtype=torch.float32, device=parallel.device)
    for first in range(0, len(batches), parallel.data_parallel_size):
        mine = first + parallel.data_parallel_rank
        batch = batches[min(mine, len(batches) - 1)]  # beyond the end: to take part in the pass
        sequences = np.stack([inputs[window.request][window.begin : window.end + 1] for window in batch])
        micro_batch = make_micro_batch(torch.from_numpy(sequences).long(), eod, parallel.device)
        tokens, labels = micro_batch["tokens"], micro_batch["labels"]
        assert tokens is not None
        assert labels is not None
        logits = forward_logits(loaded.model, tokens, micro_batch["documents"])
        if mine < len(batches):
            for row, window in enumerate(batch):
                new = slice(window.scored - window.begin, None)
                at = slice(int(offsets[window.request]) + window.scored, int(offsets[window.request]) + window.end)
                scored[0, at] = F.cross_entropy(logits[row, new].float(), labels[row, new], reduction="none")
                scored[1, at] = (logits[row, new, : loaded.tokenizer.vocab_size].argmax(-1) == labels[row, new]).float()
        advance(1 / -(-len(batches) // parallel.data_parallel_size))
    nats, greedy = parallel.total(scored).cpu().numpy()
    return [
        Scores(nats[offset + request.start : end], greedy[offset + request.start : end] > 0)
        for request, offset, end in zip(requests, offsets, offsets[1:])
    ]
