"""Makes micro-batches of sequences, and measures the loss over held-out ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from peer_dist.data.stream import HeldOutStream, Stream
from peer_dist.data.tokenizer import TextTokenizer
from peer_dist.layers.sparse_layer import RouteObserver
from peer_dist.megatron import MicroBatch, Parallel, pack_documents, run_forward_backward, sparse_layers


def perplexity_of(loss: float) -> float:
    """``exp(loss)`` for a loss in nats per token; finite however large the loss is."""
    return math.exp(min(loss, 700.0))


@dataclass(frozen=True)
class HeldOutLoss:
    """A mean loss over held-out tokens.

    Attributes:
        loss: the mean, in nats per token.
        tokens: the number of tokens that it is the mean of.
    """

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """``exp(loss)``."""
        return perplexity_of(self.loss)


def make_micro_batch(sequences: torch.Tensor, eod: int, device: torch.device) -> dict[str, torch.Tensor | None]:
    """The model's inputs for ``b`` sequences, on ``device``; every token counts in the loss.

    Args:
        sequences: tokens, ``[b, seq_length + 1]`` int64 on the CPU.
        eod: the id of the end-of-document token, which attention does not look beyond.

    Returns:
        ``tokens`` and ``labels``, ``[b, seq_length]`` int64; ``loss_mask``, ``[b, seq_length]`` float32; and
        ``documents``, see :func:`peer_dist.megatron.pack_documents`.
    """
    # copied from memory from which a copy does not wait for the device
    moved = (sequences.pin_memory() if device.type == "cuda" else sequences).to(device, non_blocking=True)
    tokens, labels = moved[:, :-1].contiguous(), moved[:, 1:].contiguous()
    return {
        "tokens": tokens,
        "labels": labels,
        "loss_mask": torch.ones(labels.shape, dtype=torch.float32, device=device),
        "documents": pack_documents(sequences[:, :-1], eod, device),
    }


class MicroBatches:
    """Micro-batches of a stream's sequences, each made and moved to the device when its turn comes.

    Args:
        stream: where the sequences are read from.
        positions: for each micro-batch, the positions of its sequences in the stream.
        eod: the id of the end-of-document token.
        device: where the micro-batches go.
        end: sequences from this position on have no weight in the loss; with None all count.
    """

    def __init__(
        self, stream: Stream, positions: Sequence[range], eod: int, device: torch.device, end: int | None = None
    ) -> None:
        self._stream, self._positions, self._eod, self._device, self._end = stream, positions, eod, device, end
        self._first: MicroBatch | None = None

    def __len__(self) -> int:
        return len(self._positions)

    def __iter__(self) -> Iterator[MicroBatch]:
        return map(self._take, self._positions)

    def make_first(self) -> None:
        """Make the first micro-batch now, while the device is busy with what was queued before; later ones are made
        while it computes the earlier ones anyway. What cannot be made is left to its turn, where its error belongs.
        """
        with suppress(Exception):
            self._first = self._make(self._positions[0])

    def _take(self, positions: range) -> MicroBatch:
        first, self._first = self._first, None
        return self._make(positions) if first is None else first

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
    """Measure the mean loss per token over held-out sequences. A collective call: ranks share the sequences.

    The model runs in evaluation mode, without dropout and with running statistics.

    Args:
        model: this rank's part of the model.
        stream: where the sequences are read from.
        tokenizer: the tokenizer of the stream's data.
        micro_batch_size: sequences per micro-batch.
        sequences: number of sequences to read, from the stream's first on; by default, and at most, all of them.
        observers: functions called with the picks and gates of this rank's layers, once for each token; by the layers'
            numbers in the whole model.
    """
    layers = sparse_layers(model) if observers else {}
    count = min(len(stream), sequences if sequences is not None else len(stream))
    total = torch.zeros((), dtype=torch.float64, device=parallel.device)
    was_training = model.training
    model.eval()
    try:
        per_pass = micro_batch_size * parallel.data_parallel_size
        for begin in range(0, count, per_pass * parallel.pipeline_size):
            own = begin + parallel.data_parallel_rank * micro_batch_size
            # enough to fill the pipeline; all ranks take part in all passes, and sequences past the end have no weight
            positions = [
                range(own + number * per_pass, own + number * per_pass + micro_batch_size)
                for number in range(parallel.pipeline_size)
            ]
            reals = [
                torch.tensor([position < count for position in part], dtype=torch.bool, device="cpu")
                for part in positions
            ]
            for number, observer in (observers or {}).items():
                layers[number].on_route = _only_real(observer, iter(reals))
            batches = MicroBatches(stream, positions, tokenizer.eod, parallel.device, end=count)
            total += run_forward_backward(model, batches, forward_only=True).sum()
    finally:
        model.train(was_training)
        for layer in layers.values():
            layer.on_route = None
    tokens = count * (len(stream.sample(0)) - 1)
    return HeldOutLoss(float(parallel.total(total)) / tokens, tokens)


def _only_real(observer: RouteObserver, reals: Iterator[torch.Tensor]) -> RouteObserver:
    """A wrapper of ``observer`` that leaves out the tokens of sequences that do not count.

    Args:
        reals: for each micro-batch in order, bool ``[b]``: whether a sequence counts.
    """

    def observe(indices: torch.Tensor, gates: torch.Tensor) -> None:
        real = next(reals)
        if not real.all():
            counted = real.to(indices.device).repeat(len(indices) // len(real))  # tokens are ordered [sequence, batch]
            indices, gates = indices[counted], gates[counted]
        observer(indices, gates)

    return observe


def unigram_loss(train: torch.Tensor, held_out: torch.Tensor, vocab_size: int) -> float:
    """The mean loss of ``held_out``, in nats per token, under the token frequencies of ``train`` (add-one smoothing).

    A model that ignores context reaches this loss; a trained one must be far below it.

    Args:
        train, held_out: tokens, int64 of any shape.
        vocab_size: tokens are below this.
    """
    counts = torch.bincount(train.reshape(-1), minlength=vocab_size).double() + 1
    return float(-(counts / counts.sum()).log()[held_out.reshape(-1)].mean())
