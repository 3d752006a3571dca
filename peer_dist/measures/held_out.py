"""Micro-batches of sequences, and the loss over held-out ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from peer_dist.data.stream import HeldOutStream, Stream
from peer_dist.data.tokenizer import TextTokenizer
from peer_dist.layers.sparse_layer import RouteObserver
from peer_dist.megatron import MicroBatch, Parallel, run_forward_backward, segment_mask, sparse_layers


def perplexity_of(loss: float) -> float:
    """``exp(loss)``, a number whatever the loss."""
    return math.exp(min(loss, 700.0))


@dataclass(frozen=True)
class HeldOutLoss:
    """A mean loss.

    Attributes:
        loss: in nats per token.
        tokens: how many tokens it is the mean of.
    """

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """``exp(loss)``."""
        return perplexity_of(self.loss)


def make_micro_batch(sequences: torch.Tensor, eod: int, device: torch.device) -> dict[str, torch.Tensor | None]:
    """What the model takes, from ``sequences: [b, seq_length + 1]`` int64 on the CPU; every token counts."""
    tokens, labels = sequences[:, :-1].contiguous(), sequences[:, 1:].contiguous()
    mask = segment_mask(tokens, eod)
    return {
        "tokens": tokens.to(device, non_blocking=True),
        "labels": labels.to(device, non_blocking=True),
        "loss_mask": torch.ones(labels.shape, device=device),
        "attention_mask": None if mask is None else mask.to(device, non_blocking=True),
    }


class MicroBatches:
    """Micro-batches of a stream's sequences, each made and moved to the device when its turn comes.

    Args:
        positions: where in the stream the sequences of each micro-batch are.
        eod: the id of the end-of-document token.
        end: sequences from this position on have no weight in the loss; None: all have.
    """

    def __init__(
        self, stream: Stream, positions: Sequence[range], eod: int, device: torch.device, end: int | None = None
    ) -> None:
        self._stream, self._positions, self._eod, self._device, self._end = stream, positions, eod, device, end

    def __len__(self) -> int:
        return len(self._positions)

    def __iter__(self) -> Iterator[MicroBatch]:
        return map(self._make, self._positions)

    def _make(self, positions: range) -> MicroBatch:
        micro_batch = make_micro_batch(self._stream.batch(positions), self._eod, self._device)
        weights = micro_batch["loss_mask"]
        if self._end is not None and weights is not None:
            weights[max(0, self._end - positions.start) :] = 0
        return micro_batch


def held_out_loss(
    model: torch.nn.ModuleList,
    stream: HeldOutStream,
    parallel: Parallel,
    tokenizer: TextTokenizer,
    micro_batch_size: int,
    sequences: int | None = None,
    observers: Mapping[int, RouteObserver] | None = None,
) -> HeldOutLoss:
    """Mean loss per token over the first ``sequences`` of ``stream`` (at most all of it, the default).

    In evaluation mode: no dropout, running statistics. Every rank calls it; ranks share the sequences.

    Args:
        observers: by number in the whole model, what is told of the picks of this rank's layers, each token's once.
    """
    layers = sparse_layers(model) if observers else {}
    wanted = min(len(stream), sequences if sequences is not None else len(stream))
    total = torch.zeros((), dtype=torch.float64, device=parallel.device)
    was_training = model.training
    model.eval()
    try:
        per_pass = micro_batch_size * parallel.data_parallel_size
        for begin in range(0, wanted, per_pass * parallel.pipeline_size):
            own = begin + parallel.data_parallel_rank * micro_batch_size
            # Enough to fill the pipeline. Every rank takes part in every pass; what lies beyond the end has no weight.
            positions = [
                range(own + number * per_pass, own + number * per_pass + micro_batch_size)
                for number in range(parallel.pipeline_size)
            ]
            reals = [torch.tensor([position < wanted for position in part]) for part in positions]
            for number, observer in (observers or {}).items():
                layers[number].on_route = _only_real(observer, iter(reals))
            batches = MicroBatches(stream, positions, tokenizer.eod, parallel.device, end=wanted)
            total += run_forward_backward(model, batches, forward_only=True).sum()
    finally:
        model.train(was_training)
        for layer in layers.values():
            layer.on_route = None
    tokens = wanted * (len(stream.sample(0)) - 1)
    return HeldOutLoss(float(parallel.total(total)) / tokens, tokens)


def _only_real(observer: RouteObserver, reals: Iterator[torch.Tensor]) -> RouteObserver:
    """Leave out the tokens of sequences that do not count: bool ``[b]`` for each micro-batch, in order."""

    def observe(indices: torch.Tensor, gates: torch.Tensor) -> None:
        real = next(reals)
        if not real.all():
            kept = real.to(indices.device).repeat(len(indices) // len(real))  # tokens are ordered [sequence, batch]
            indices, gates = indices[kept], gates[kept]
        observer(indices, gates)

    return observe


def unigram_loss(train: torch.Tensor, held_out: torch.Tensor, vocab_size: int) -> float:
    """Nats per token of ``held_out`` under the token frequencies of ``train`` (add-one smoothing).

    What a model that ignores context reaches: the line that a trained one must be far below.
    """
    counts = torch.bincount(train.reshape(-1), minlength=vocab_size).double() + 1
    return float(-(counts / counts.sum()).log()[held_out.reshape(-1)].mean())
