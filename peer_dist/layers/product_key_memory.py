"""Product-key memory: a layer of a million values (Lample 2019; improved by Csordas 2023, arXiv 2310.10837)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from peer_dist.layers.initialisation import has_numbers
from peer_dist.layers.product_key_layer import ProductKeyLayer, check_choices
from peer_dist.sharding import ExpertGroups, Shard, release, routed_values
from peer_dist.tracing import span

INITS = ("memory", "dense")


class ProductKeyMemory(ProductKeyLayer):
    """``y = sum over heads and retrieved values i of g_i * value_i``: what :class:`peer_dist.PEER` retrieves, with one
    table of values in the place of experts.

    Lample's layer has a query network with BatchNorm and softmax gates. The sigma-MoE paper's improved one has ReLU
    gates, which do not compete, ``query_projection=False`` with ``query_norm="none"``, and ``init="dense"``.

    Initialisation. Queries, if projected, are drawn from N(0, 1/dim) either way.

    - ``memory``: values from N(0, 1/dim), keys uniformly from +-1/sqrt(key_dim/2) (Lample 2019).
    - ``dense``: that of the feed-forward block that the layer stands for, one hidden unit a value, so that its ``d_ff``
      is ``num_values`` (not the ``heads * top_k`` that a token picks): keys from N(0, 2/(key_dim * num_layers)), as the
      first matrix, of which a key is a row (of width dim without a projection); values from
      N(0, 2/(num_values * num_layers)), as the second.

    Sharding: as in :class:`peer_dist.PEER`, with ``values`` for its tables. Tokens do not travel: picks and gates do,
    and sums of values come home.

    Args:
        dim: width of input and output.
        num_values: N, the square of a whole number.
        heads: query heads h.
        top_k: values k per head, at most sqrt(N).
        key_dim: width of queries and product keys, even; without ``query_projection`` it is ``dim`` instead.
        query_norm: as in :class:`peer_dist.PEER`; ``none`` without ``query_projection``.
        query_projection: queries are a linear map of the input; else the query of every head is the input, its first
            half for the first sub-keys, its second half for the second.
        gate: ``softmax`` over the k retrieved scores, ``sigmoid`` or ``relu``.
        shared_keys: one set of keys for all heads, or one per head; not without ``query_projection``, where all heads
            would pick the same.
        init: ``memory`` or ``dense``.
        num_layers: of the whole model, for ``dense``.
        group, data_group: as in :class:`peer_dist.PEER`.
        table_dtype, table_memory, table_cache_gb, table_folder, table_resident_gb, table_fetch: of ``values``, as in
            :class:`peer_dist.PEER`.
        sparse_grad: give ``values`` a sparse gradient, of the picked rows only.
        seed: as in :class:`peer_dist.PEER`.
        device, dtype: as everywhere in torch.

    State dict: ``query.weight [heads*key_dim, dim]`` if projected, ``keys [heads, 2, sqrt(N), key_dim/2]``
    (``[2, ...]`` if shared), ``values`` ``[num_values, dim]``, a DTensor if it is spread, and the norm's.

    Raises:
        ValueError: an impossible size, an unknown option, options that exclude each other, a mesh that is no grid, or
            ranks with different seeds.
        TypeError: as in :class:`peer_dist.PEER`.
    """

    rows_name = "num_values"
    table_names = ("values",)
    values: nn.Parameter

    def __init__(
        self,
        dim: int,
        num_values: int = 1024**2,
        heads: int = 4,
        top_k: int = 32,
        key_dim: int = 128,
        query_norm: str = "batch",
        gate: str = "softmax",
        *,
        query_projection: bool = True,
        shared_keys: bool = False,
        init: str = "memory",
        num_layers: int = 1,
        group: dist.ProcessGroup | dist.DeviceMesh | ExpertGroups | None = None,
        data_group: dist.ProcessGroup | None = None,
        table_dtype: torch.dtype | None = None,
        table_memory: str = "device",
        table_cache_gb: float = 1.0,
        table_folder: str = "",
        table_resident_gb: float = 1.0,
        table_fetch: str = "direct",
        sparse_grad: bool = False,
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not query_projection and (query_norm != "none" or shared_keys):
            raise ValueError(
                "without query_projection query_norm must be none and shared_keys false, "
                f"not {query_norm!r} and {shared_keys}"
            )
        super().__init__(
            dim,
            num_values,
            heads,
            top_k,
            key_dim if query_projection else dim,
            query_norm,
            gate,
            query_projection=query_projection,
            shared_keys=shared_keys,
            group=group,
            data_group=data_group,
            table_memory=table_memory,
            table_cache_gb=table_cache_gb,
            table_folder=table_folder,
            table_resident_gb=table_resident_gb,
            table_fetch=table_fetch,
            seed=seed,
            device=device,
            dtype=dtype,
        )
        check_choices(("init", init, INITS))
        self.init, self.num_layers, self.sparse_grad = init, num_layers, sparse_grad
        self._make_tables(table_dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, seed: int | None = None) -> None:
        """Draw all weights anew; see the class. For a given ``seed`` they are the same in any sharding, and those of
        the table on devices of one model, which draw them. On meta nothing is drawn.

        Args:
            seed: as in the class, for this and later calls; by default what it was before. A layer without a seed draws
                another one each time.

        Raises:
            ValueError: ranks over which the layer is spread were given different seeds.
        """
        if not has_numbers(self.keys):
            return
        seed = self._agreed_seed(seed)
        self._reset_retrieval(seed)
        dense = self.init == "dense"
        std = (2 / (self.num_experts * self.num_layers)) ** 0.5 if dense else self.dim**-0.5
        self.flush()
        self._draw_rows(self.values, std, seed + 1)

    def _draw_keys(self, keys: Tensor, generator: torch.Generator) -> Tensor:
        keys = super()._draw_keys(keys, generator)
        if self.init == "dense":
            keys.normal_(0, (2 / (self.key_dim * self.num_layers)) ** 0.5, generator=generator)
        return keys

    def shards(self) -> dict[str, Shard]:
        """This rank's block of ``values``."""
        return {"values": Shard.of_table(self.values, self.layout)}

    def release_shards(self) -> None:
        """Take ``values`` out of the module's parameters (:func:`peer_dist.sharding.release`)."""
        release(self, self.table_names)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output ``[..., dim]`` for ``x [..., dim]``, in ``x``'s dtype.

        Scores, gates and sums of values are in at least float32, under autocast too: there only the query projection
        computes in fewer bits.

        Raises:
            ValueError: an input of another width, or on another device than the layer; one token in all under batch
                norm in training.
            NotImplementedError: an export to ONNX, or a forward-mode derivative.
        """
        tokens = self._tokens(x)
        with span("retrieve"):
            if self.query is None:
                query = tokens[:, None].expand(-1, self.heads, -1)
            else:
                query = self._queries(self.query(tokens))
            indices, gates = self._pick(query, self.keys)
        y = routed_values(
            indices.flatten(1), gates.flatten(1), self.values, x.dtype, self.layout, self.traffic, self.sparse_grad
        )
        return self._shaped(y, x)

    def extra_repr(self) -> str:
        """The options that printing a model shows."""
        return (
            f"dim={self.dim}, num_values={self.num_experts}, heads={self.heads}, top_k={self.top_k}, "
            f"gate={self.gate}, rows={self.layout.rows}, columns={self.layout.columns}"
        )
