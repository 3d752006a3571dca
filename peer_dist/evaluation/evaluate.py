"""``peer-dist evaluate``: a checkpoint on held-out text."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from rich.table import Table

from peer_dist.data.stream import SplitStreams
from peer_dist.evaluation.loading import check_text, load_model, open_text, read_settings
from peer_dist.measures.held_out import held_out_loss, perplexity_of, unigram_loss
from peer_dist.measures.usage import ExpertUsage, WindowSummary
from peer_dist.megatron import sparse_layers
from peer_dist.ranks.world import World


@dataclass(frozen=True)
class HeldOutReport:
    """A checkpoint's loss on held-out text, and its use of experts there.

    Attributes:
        loss: mean, in nats per token.
        bits_per_byte: of the text in UTF-8, without end-of-document tokens.
        unigram_loss: loss of the training split's token frequencies, in nats per token; None for the split ``all``.
        usage: by number of the layer, for layers with experts.
    """

    checkpoint: str
    step: int
    data: str
    split: str
    tokens: int
    loss: float
    bits_per_byte: float
    unigram_loss: float | None
    usage: dict[int, WindowSummary]

    def json(self) -> str:
        """All of it as one JSON object, with the perplexity."""
        return json.dumps({**asdict(self), "perplexity": perplexity_of(self.loss)})

    def tables(self) -> Iterator[Table]:
        """One table, for people."""
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        for name, value in self._rows():
            table.add_row(name, value)
        yield table

    def _rows(self) -> Iterator[tuple[str, str]]:
        yield "checkpoint", f"{self.checkpoint} (step {self.step})"
        yield "text", f"{self.data}, {self.split}: {self.tokens:,} tokens"
        yield "loss", f"{self.loss:.4f} nats per token, {self.bits_per_byte:.4f} bits per byte"
        yield "perplexity", f"{perplexity_of(self.loss):.3f}"
        if self.unigram_loss is not None:
            yield (
                "unigram perplexity",
                f"{math.exp(self.unigram_loss):.3f} (token frequencies of the training split)",
            )
        for layer, usage in self.usage.items():
            yield (
                f"experts, layer {layer}",
                f"{usage.usage_percent:.1f}% used, {usage.top1_usage_percent:.1f}% ever first; unevenness "
                f"{usage.unevenness:.3f} (uniform picks: {usage.unevenness_if_uniform:.3f})",
            )


def evaluate(checkpoint: str, prefix: str | None, split: str, batch_size: int) -> HeldOutReport | None:
    """Evaluate on every rank; rank 0 has the report, the others None.

    Args:
        prefix: a prepared data set; None for the one that the checkpoint was trained on.
        split: one of :data:`peer_dist.evaluation.loading.SPLITS`; ``all`` takes every document of the data set.

    Raises:
        DataError: the data set cannot be read, has another tokenizer, or has no such split.
        CheckpointError: the checkpoint cannot be read.
    """
    check_text(read_settings(checkpoint), prefix, split)
    world = World.from_environment()
    with world.joined():
        loaded = load_model(checkpoint, world.world_size)
        text = open_text(loaded, prefix, split)
        usage = {
            number: ExpertUsage(layer.num_experts, loaded.parallel.device)
            for number, layer in sparse_layers(loaded.model).items()
        }
        result = held_out_loss(
            loaded.model, text.stream, loaded.parallel, loaded.tokenizer, batch_size, observers=usage
        )
        summaries = {
            number: counter.summary(world.world_size, loaded.parallel.token_group) for number, counter in usage.items()
        }
    if world.rank != 0:
        return None
    labels = text.stream.batch(range(len(text.stream)))[:, 1:]
    text_bytes = len(loaded.tokenizer.decode(labels[labels != loaded.tokenizer.eod].tolist()).encode())
    return HeldOutReport(
        checkpoint=str(loaded.path),
        step=loaded.step,
        data=text.name,
        split=split,
        tokens=result.tokens,
        loss=result.loss,
        bits_per_byte=result.loss * labels.numel() / math.log(2) / max(1, text_bytes),
        unigram_loss=None if split == "all" else _unigram(text.streams, labels, loaded.tokenizer.padded_vocab_size),
        usage=summaries,
    )


def _unigram(streams: SplitStreams, labels: torch.Tensor, vocab_size: int) -> float:
    """The loss of ``labels [sequences, tokens]`` under the training split's token frequencies (first few million)."""
    sequences = min(sum(len(dataset) for dataset in streams.train.datasets), 2**22 // labels.shape[1] + 1)
    return unigram_loss(streams.train.batch(range(sequences))[:, 1:], labels, vocab_size)
