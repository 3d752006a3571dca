"""Product-key memory (Lample 2019): PEER's retrieval, of values instead of experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator, model_validator

from peer_dist.kinds.cost import Cost, Parts, Shape
from peer_dist.kinds.product_keys import (
    ProductKeyKind,
    TableCache,
    TableDtype,
    TableFetch,
    TableFolder,
    TableMemory,
    TableResident,
    check_picks,
    even,
    square,
)
from peer_dist.kinds.section import LARGEST, Heads, Rows, Section

if TYPE_CHECKING:
    from megatron.core.transformer import ModuleSpec

    from peer_dist.config import Config
    from peer_dist.export.peer_model import ExportedLayer
    from peer_dist.megatron.build_context import BuildContext


class PKMSection(Section):
    """Product-key memory layers (model.mlp: pkm; Lample 2019): PEER's retrieval, of values instead of experts."""

    num_values: Rows = Field(65536, description="values; the square of a whole number")
    heads: Heads = Field(4, description="query heads")
    top_k: Heads = Field(32, description="values per head; at most sqrt(num_values)")
    key_dim: int = Field(
        128,
        ge=2,
        le=LARGEST,
        description="width of a query and of a product key; without effect where query_projection is false",
    )
    query_norm: Literal["batch", "layer", "rms", "none"] = Field(
        "batch", description="query normalisation; none where query_projection is false"
    )
    query_projection: bool = Field(
        True, description="queries are a linear map of the input; false: the input itself, its halves for the sub-keys"
    )
    gate: Literal["softmax", "sigmoid", "relu"] = Field("softmax", description="score to weight")
    shared_keys: bool = Field(False, description="all heads share the product keys; not without query_projection")
    init: Literal["memory", "dense"] = Field(
        "memory",
        description="of keys and values: memory: values N(0, 1/d) (Lample); dense: as the two matrices of a "
        "feed-forward as wide as num_values",
    )
    table_dtype: TableDtype = Field(
        "float32", description="dtype of the values; all others than float32 as with peer.table_dtype"
    )
    table_memory: TableMemory = "device"
    table_cache_gb: TableCache = 1.0
    table_folder: TableFolder = ""
    table_resident_gb: TableResident = 1.0
    table_fetch: TableFetch = "direct"

    _square = field_validator("num_values")(square)
    _even = field_validator("key_dim")(even)

    @model_validator(mode="after")
    def _check(self) -> PKMSection:
        check_picks(self.top_k, self.num_values, "num_values")
        if not self.query_projection and self.query_norm != "none":
            raise ValueError(
                f"query_norm ({self.query_norm}) must be none where query_projection is false: the query is the "
                "layer's input, which is normalised already"
            )
        if not self.query_projection and self.shared_keys:
            raise ValueError(
                "shared_keys must be false where query_projection is false: all heads would pick the same values"
            )
        return self


class PKMKind(ProductKeyKind[PKMSection]):
    """Product-key memory layers: a pick is a row of ``values``, which is added up under the pick's weight."""

    name = "pkm"
    section = PKMSection
    sizes = ("num_values", "heads", "top_k", "key_dim")
    module = "pkm"
    table_names = ("values",)
    rows_key = "num_values"
    tokens_travel = False

    def projected(self, config: Config) -> bool:
        """Whether queries are projected; otherwise they are the input's halves."""
        return self.keys(config).query_projection

    def cost(self, config: Config) -> Parts:
        """As PEER, but a pick reads and adds one row. Without a query projection the input's halves are the queries."""
        pkm, d = self.keys(config), config.model.hidden_size
        picks = pkm.heads * pkm.top_k
        values = Cost(pkm.num_values * d, min(picks, pkm.num_values) * d, 2 * picks * d)
        return {**self.retrieval_cost(config), "values": values}

    def shapes(self, config: Config, tensor: int) -> Iterator[Shape]:
        """Those of the retrieval alone."""
        return self.retrieval_shapes(config)

    def build(self, context: BuildContext, number: int) -> ModuleSpec:
        """A product-key memory on the model's expert groups."""
        from peer_dist.megatron.feed_forward import PKMMLP, sparse_spec

        return sparse_spec(PKMMLP, context, number)

    def exported(self) -> type[ExportedLayer]:
        """A product-key memory."""
        from peer_dist.export.layers.product_key_memory import ProductKeyMemory

        return ProductKeyMemory
