"""Parameters and FLOPs of the model that a config describes, part by part.

What counts as a FLOP is said in :mod:`peer_dist.kinds.cost`. ``torch.utils.flop_counter`` does not see all that is
counted here: PEER's experts and the weighted sum of product-key memory's values are kernels of their own (on the
reference backend gathers and element-wise products).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from peer_dist.config import Config
from peer_dist.kinds import KINDS
from peer_dist.kinds.cost import SHARDED_PARTS, Cost, Parts, matrix, merged, total, vectors

TRAIN_OVER_FORWARD = 3  # a backward pass counts as two forward passes (recomputation is not counted)


@dataclass(frozen=True)
class LayerCounts:
    """One transformer layer."""

    kind: str
    block: Parts
    """``attention`` (its four projections), ``attention_scores``, ``norms``."""
    feed_forward: Parts
    """The parts of the layer's kind (:meth:`peer_dist.kinds.Kind.cost`)."""


@dataclass(frozen=True)
class Counts:
    """A whole model; see the module for what a FLOP is here."""

    outside: Parts
    """``embedding``, ``final_norm`` and ``logits``."""
    layers: tuple[LayerCounts, ...]
    causal_attention_flops: int
    """What ``attention_scores`` would be in all layers if only pairs that may see each other were computed."""

    @property
    def parts(self) -> Parts:
        """The model part by part, layers added up."""
        return merged([self.outside, *(parts for layer in self.layers for parts in (layer.block, layer.feed_forward))])

    @property
    def total(self) -> Cost:
        """The whole model's parameters, active parameters and forward FLOPs per token."""
        return total(self.parts)

    @property
    def train_flops_per_token(self) -> int:
        """Forward and backward: three times the forward FLOPs, the convention of the papers' budgets.

        Sparse gradients cost less: of the sub-keys' scores, a backward pass visits only those that were picked.
        """
        return TRAIN_OVER_FORWARD * self.total.flops


def count(config: Config, vocab_size: int) -> Counts:
    """Parameters and FLOPs of the model that ``build_model`` makes, all ranks together.

    Attention's scores and weighted sums are counted over the whole sequence, ``4 * seq_length * hidden_size`` per
    token, as the implementation computes them where documents need a mask and as the flop counter counts them.

    Args:
        config: ``model``, ``router`` and the sections of the layers' kinds are read.
        vocab_size: rows of the embedding, padding included.
    """
    model = config.model
    d, embedding = model.hidden_size, vocab_size * model.hidden_size
    tied = model.tied_embeddings
    keys = d // model.num_attention_heads * model.query_groups  # wide, and so are values
    block = {
        "attention": matrix(d, 2 * (d + keys)),
        "attention_scores": Cost(flops=4 * model.seq_length * d),
        "norms": vectors(2 * d),
    }
    return Counts(
        outside={
            "embedding": Cost(embedding, embedding if tied else d),
            "final_norm": vectors(d),
            "logits": Cost(flops=2 * embedding) if tied else matrix(d, vocab_size),
        },
        layers=tuple(LayerCounts(kind, block, parts) for kind, parts in zip(model.mlp_kinds, _feed_forwards(config))),
        causal_attention_flops=model.num_layers * 2 * (model.seq_length + 1) * d,
    )


def _feed_forwards(config: Config) -> Iterator[Parts]:
    """The feed-forward of each layer. Shared parameters are those of the first layer that has them."""
    of_kinds = {kind.name: kind.cost(config) for kind in config.kinds}
    pooled = {number for pool in config.pools for number in pool[1:]}
    routed = False  # whether there was a layer whose router has what they share
    for number, kind in enumerate(config.model.mlp_kinds):
        parts: dict[str, Cost] = {**of_kinds[kind]}
        if number in pooled:
            for name in parts.keys() & set(SHARDED_PARTS):
                parts[name] = replace(parts[name], parameters=0)
        if "state" in parts and routed:
            for name in ("state", "projector") if config.router.shared_projector else ("state",):
                parts[name] = Cost(flops=parts[name].flops)
        routed = routed or KINDS[kind].routed
        yield parts
