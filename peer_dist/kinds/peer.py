"""PEER (He 2024): product-key retrieval of experts of one neuron each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator, model_validator

from peer_dist.kinds.cost import Cost, Parts, Shape, matrix
from peer_dist.kinds.kind import Tables
from peer_dist.kinds.product_keys import (
    PLACEMENT,
    ProductKeyKind,
    TableCache,
    TableDtype,
    TableFetch,
    TableFolder,
    TableMemory,
    TableResident,
    check_picks,
    even,
    norm_shapes,
    square,
    vector_norm,
)
from peer_dist.kinds.routing import projector_shapes, router_cost
from peer_dist.kinds.section import LARGEST, Heads, Rows, Section

if TYPE_CHECKING:
    from megatron.core.transformer import ModuleSpec

    from peer_dist.config import Config
    from peer_dist.export.peer_model import ExportedLayer
    from peer_dist.megatron.build_context import BuildContext


class PEERSection(Section):
    """The PEER layers (model.mlp: peer): product-key retrieval of single-neuron experts."""

    num_experts: Rows = Field(65536, description="experts N per layer; the square of a whole number")
    heads: Heads = Field(8, description="query heads h; each retrieves top_k experts")
    top_k: Heads = Field(16, description="experts k per head; at most sqrt(num_experts)")
    key_dim: int = Field(128, ge=2, le=LARGEST, description="width of a query and of a product key; even")
    query_norm: Literal["batch", "layer", "rms", "none"] = Field("batch", description="query normalisation")
    gate: Literal["softmax", "sigmoid", "relu"] = Field("softmax", description="router score to gate")
    activation: Literal["gelu", "relu", "silu"] = Field("gelu", description="the experts' activation")
    shared_keys: bool = Field(True, description="all heads share the product keys (the paper); false: per head")
    key_norm: Literal["none", "layer", "rms"] = Field("none", description="normalisation of the sub-keys (UltraMem)")
    output_gate: bool = Field(False, description="y becomes (y * silu(x W1)) W2 (Memory+)")
    dense_hidden: int = Field(
        0, ge=0, le=LARGEST, description="hidden width of a dense block beside the experts; 0: none"
    )
    dispatch_chunks: Heads = Field(
        1, description="parts in which tokens travel, so that exchange and experts overlap; may change on resume"
    )
    layers_per_pool: int = Field(
        1, ge=1, description="PEER layers, counted from the first, that share one pair of tables; on one pipeline stage"
    )
    revive_interval: int = Field(
        0,
        ge=0,
        description="steps after which sub-keys that were hardly picked become near copies of well-used ones, so "
        "that their experts are picked; 0: never",
    )
    table_dtype: TableDtype = Field(
        "float32",
        description="dtype of the down and up tables; bfloat16 keeps float32 masters beside them, unless "
        "table_optimizer.stochastic_rounding; float8_e4m3 and int8 have a scale a row, and need that",
    )
    table_memory: TableMemory = "device"
    table_cache_gb: TableCache = 1.0
    table_folder: TableFolder = ""
    table_resident_gb: TableResident = 1.0
    table_fetch: TableFetch = "direct"

    _square = field_validator("num_experts")(square)
    _even = field_validator("key_dim")(even)

    @model_validator(mode="after")
    def _check(self) -> PEERSection:
        check_picks(self.top_k, self.num_experts, "num_experts")
        return self


class PEERKind(ProductKeyKind[PEERSection]):
    """PEER layers: a pick is a row of ``down`` and one of ``up``."""

    name = "peer"
    section = PEERSection
    sizes = ("num_experts", "heads", "top_k", "key_dim")
    routed = True
    begins_at_zero = True
    resumable = PLACEMENT | {"dispatch_chunks"}  # when things travel, not what is computed
    module = "peer"
    table_names = ("down", "up")
    rows_key = "num_experts"
    tokens_travel = True

    def cost(self, config: Config) -> Parts:
        """Retrieval, and per pick two rows: ``x . down`` and ``hidden * up``."""
        peer, d = self.keys(config), config.model.hidden_size
        picks = peer.heads * peer.top_k
        parts = self.retrieval_cost(config)
        parts["keys"] += vector_norm(peer.key_norm, self.sets(config) * peer.key_dim)
        parts["experts"] = Cost(2 * peer.num_experts * d, 2 * min(picks, peer.num_experts) * d, 4 * picks * d)
        if peer.output_gate:
            parts["output_gate"] = matrix(d, 2 * d)
        if peer.dense_hidden:
            parts["feed_forward"] = matrix(d, 2 * peer.dense_hidden)
        if config.router.has_core:  # a map of the state is added to the query
            parts |= router_cost(config, peer.heads * peer.key_dim)
        return parts

    def shapes(self, config: Config, tensor: int) -> Iterator[Shape]:
        """Those of the retrieval, and of what else the layer has: key norm, output gate, dense block, router."""
        peer, d = self.keys(config), config.model.hidden_size
        yield from projector_shapes(config)
        yield from self.retrieval_shapes(config)
        yield from norm_shapes(peer.key_norm, self.sets(config) * peer.key_dim)
        yield from [(d, d)] * (2 * peer.output_gate)
        if peer.dense_hidden:
            yield from ((peer.dense_hidden, d), (d, peer.dense_hidden))
        if config.router.has_core:
            yield peer.heads * peer.key_dim, config.router.state_size

    def kept(self, config: Config, itemsize: int) -> tuple[float, float]:
        """That of the retrieval, and the output gate's, the dense block's and the router's activations."""
        peer, d = self.keys(config), config.model.hidden_size
        kept, working = super().kept(config, itemsize)
        if peer.output_gate:
            kept += 4 * d * itemsize
        if peer.dense_hidden:
            kept += 2 * peer.dense_hidden * itemsize
        if config.router.has_core:
            kept += 12 * config.router.state_size * itemsize
        return kept, working

    def tables(self, config: Config) -> Tables:
        """The experts' down and up tables, to whose owners tokens travel in ``dispatch_chunks`` parts."""
        return replace(super().tables(config), chunks=self.keys(config).dispatch_chunks)

    def layers_per_pool(self, config: Config) -> int:
        """The section's ``layers_per_pool``."""
        return self.keys(config).layers_per_pool

    def check(self, config: Config) -> None:
        """Refuse a router that picks no rows of tables."""
        if config.router.kind == "cosine":
            raise ValueError("router.kind cosine is for moe and sigma_moe, but model.mlp has peer layers; use another")

    def build(self, context: BuildContext, number: int) -> ModuleSpec:
        """A PEER layer on the model's expert groups."""
        from peer_dist.megatron.feed_forward import PEERMLP, sparse_spec

        return sparse_spec(PEERMLP, context, number)

    def exported(self) -> type[ExportedLayer]:
        """A PEER layer."""
        from peer_dist.export.layers.peer import PEER

        return PEER
