"""Parameters and FLOPs of the model that a config describes, part by part.

FLOPs are those of matrix products, two per multiply-add, as ``torch.utils.flop_counter`` counts them; norms,
activations, softmax, top-k, gathers and embedding look-ups count nothing. That counter does not see all that is
counted here: PEER's experts and the weighted sum of product-key memory's values are kernels of their own (on the
reference backend gathers and element-wise products), and are counted as the products that they stand for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from peer_dist.config import Config
from peer_dist.config.schema import ROUTED_KINDS, MLPKind, RouterSection

TRAIN_OVER_FORWARD = 3  # a backward pass counts as two forward passes (recomputation is not counted)


@dataclass(frozen=True)
class Cost:
    """What one part of a model, or several of them, have and do."""

    parameters: int = 0
    """Trained numbers; what layers share is counted in the first of them."""
    active: int = 0
    """Those of them that one token's forward pass reads (of tables that layers share, what each layer reads)."""
    flops: int = 0
    """Per token, forward."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.parameters + other.parameters, self.active + other.active, self.flops + other.flops)


Parts = Mapping[str, Cost]


@dataclass(frozen=True)
class LayerCounts:
    """One transformer layer."""

    kind: MLPKind
    block: Parts
    """``attention`` (its four projections), ``attention_scores``, ``norms``."""
    feed_forward: Parts
    """By the layer's kind, some of: ``feed_forward`` (dense matrices), ``query``, ``query_norm``, ``keys`` (sub-keys
    and their scores), ``experts``, ``values``, ``output_gate``, ``projector``, ``state`` (what
    routers share), ``router``.
    """


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


def merged(parts: Iterable[Parts]) -> Parts:
    """Parts of the same name added up, in the order of their first appearance."""
    sums: dict[str, Cost] = {}
    for some in parts:
        for name, cost in some.items():
            sums[name] = sums.get(name, Cost()) + cost
    return sums


def total(parts: Parts) -> Cost:
    """All parts added up."""
    return sum(parts.values(), Cost())


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
        "attention": _matrix(d, 2 * (d + keys)),
        "attention_scores": Cost(flops=4 * model.seq_length * d),
        "norms": _vectors(2 * d),
    }
    return Counts(
        outside={
            "embedding": Cost(embedding, embedding if tied else d),
            "final_norm": _vectors(d),
            "logits": Cost(flops=2 * embedding) if tied else _matrix(d, vocab_size),
        },
        layers=tuple(
            LayerCounts(kind, block, _feed_forward(config, number)) for number, kind in enumerate(model.mlp_kinds)
        ),
        causal_attention_flops=model.num_layers * 2 * (model.seq_length + 1) * d,
    )


def _matrix(inputs: int, outputs: int) -> Cost:
    return Cost(inputs * outputs, inputs * outputs, 2 * inputs * outputs)


def _vectors(numbers: int) -> Cost:
    return Cost(numbers, numbers)


def _core(router: RouterSection) -> Cost:
    """What routers share (:class:`peer_dist.layers.recurrence.RouterCore`): a GRU, of six matrices and two biases of
    ``3 * state_size``, or a perceptron with as many weights.
    """
    p = router.state_size
    if router.kind == "recurrent":
        return _matrix(p, 6 * p) + _vectors(6 * p)
    return _matrix(p, 3 * p) + _matrix(3 * p, p) + _vectors(4 * p)


def _feed_forward(config: Config, number: int) -> Parts:
    """The feed-forward of layer ``number``, from 0. Shared parameters are those of the first layer that has them."""
    kinds = config.model.mlp_kinds
    parts: dict[str, Cost] = {**_KINDS[kinds[number]](config)}
    if number in {later for pool in config.peer_pools for later in pool[1:]}:
        parts["experts"] = replace(parts["experts"], parameters=0)
    if "state" in parts and any(kind in ROUTED_KINDS for kind in kinds[:number]):
        for name in ("state", "projector") if config.router.shared_projector else ("state",):
            parts[name] = Cost(flops=parts[name].flops)
    return parts


def _dense(config: Config) -> Parts:
    """Hidden units beyond ``ffn_top_k`` are set to 0, but multiplied all the same."""
    model = config.model
    d, hidden = model.hidden_size, model.ffn_hidden_size
    down = _matrix(hidden, d)
    if model.ffn_top_k:
        down = replace(down, active=min(model.ffn_top_k, hidden) * d)
    return {"feed_forward": _matrix(d, (_matrices(config) - 1) * hidden) + down}


def _matrices(config: Config) -> int:
    """Matrices of a feed-forward with the model's activation: SwiGLU has a gate's too."""
    return 3 if config.model.ffn_activation == "swiglu" else 2


def _peer(config: Config) -> Parts:
    """Queries, scores of both sets of sub-keys, and per pick two rows: ``x . down`` and ``hidden * up``."""
    peer, d = config.peer, config.model.hidden_size
    picks = peer.heads * peer.top_k
    parts = {
        "query": _matrix(d, peer.heads * peer.key_dim),
        "query_norm": _vector_norm(peer.query_norm, peer.heads * peer.key_dim),
        "keys": _sub_keys(math.isqrt(peer.num_experts), peer.heads, peer.key_dim, peer.shared_keys)
        + _vector_norm(peer.key_norm, (1 if peer.shared_keys else peer.heads) * peer.key_dim),
        "experts": Cost(2 * peer.num_experts * d, 2 * min(picks, peer.num_experts) * d, 4 * picks * d),
    }
    if peer.output_gate:
        parts["output_gate"] = _matrix(d, 2 * d)
    if peer.dense_hidden:
        parts["feed_forward"] = _matrix(d, 2 * peer.dense_hidden)
    if config.router.kind in ("recurrent", "mlp"):  # a map of the state is added to the query
        parts |= _router(config, "peer")
    return parts


def _pkm(config: Config) -> Parts:
    """As PEER, but a pick reads and adds one row. Without a query projection the input's halves are the queries."""
    pkm, d = config.pkm, config.model.hidden_size
    key_dim, picks = pkm.key_dim if pkm.query_projection else d, pkm.heads * pkm.top_k
    return {
        "query": _matrix(d, pkm.heads * key_dim) if pkm.query_projection else Cost(),
        "query_norm": _vector_norm(pkm.query_norm, pkm.heads * key_dim),
        "keys": _sub_keys(math.isqrt(pkm.num_values), pkm.heads, key_dim, pkm.shared_keys),
        "values": Cost(pkm.num_values * d, min(picks, pkm.num_values) * d, 2 * picks * d),
    }


def _sub_keys(n: int, heads: int, key_dim: int, shared: bool) -> Cost:
    """Two sets of ``n`` sub-keys of half a query's width, each of them scored for every head."""
    parameters = (1 if shared else heads) * n * key_dim
    return Cost(parameters, parameters, 2 * heads * n * key_dim)


def _vector_norm(kind: str, width: int) -> Cost:
    """A weight and, but for RMS, a bias."""
    return _vectors({"none": 0, "rms": 1}.get(kind, 2) * width)


def _moe(config: Config) -> Parts:
    """Experts are feed-forwards of the model's activation; with expert choice, ``top_k`` a token on average."""
    moe = config.moe
    width = moe.expert_hidden_size or config.model.ffn_hidden_size
    experts = _experts(config, _matrices(config) * width, moe.num_experts, moe.top_k)
    return {**_router(config, "moe"), "experts": experts}


def _sigma_moe(config: Config) -> Parts:
    """Experts are two matrices with ReLU between them."""
    sigma = config.sigma_moe
    experts = _experts(config, 2 * sigma.expert_hidden_size, sigma.num_experts, sigma.top_k)
    return {**_router(config, "sigma_moe"), "experts": experts}


def _experts(config: Config, outputs: int, num_experts: int, top_k: int) -> Cost:
    each = _matrix(config.model.hidden_size, outputs)
    return Cost(num_experts * each.parameters, top_k * each.active, top_k * each.flops)


def _router_outputs(config: Config, kind: MLPKind) -> int:
    """Logits of a router or, in PEER layers, the width of the queries that the router's state is added to."""
    if kind == "peer":
        return config.peer.heads * config.peer.key_dim
    return config.moe.num_experts if kind == "moe" else config.sigma_moe.num_experts


def _router(config: Config, kind: MLPKind) -> Parts:
    """The router's matrices, without biases but for the GRU's. Cosine scores are of projected inputs with expert
    embeddings of ``state_size``, over a learnt temperature; PEER layers, which have no embeddings, have linear
    queries instead.
    """
    router, d = config.router, config.model.hidden_size
    outputs, p = _router_outputs(config, kind), router.state_size
    if router.kind == "linear":
        return {"router": _matrix(d, outputs)}
    state = {} if router.kind == "cosine" else {"state": _core(router)}
    temperature = _vectors(1 if router.kind == "cosine" else 0)
    return {"projector": _matrix(d, p), **state, "router": _matrix(p, outputs) + temperature}


_KINDS = {"dense": _dense, "peer": _peer, "moe": _moe, "pkm": _pkm, "sigma_moe": _sigma_moe}
