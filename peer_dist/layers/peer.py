"""PEER: a feed-forward layer of a million single-neuron experts (He 2024, arXiv 2407.04153)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from peer_dist.kernels import ACTIVATIONS
from peer_dist.layers.initialisation import draws, has_numbers, redraw
from peer_dist.layers.product_key_layer import GATES, ProductKeyLayer, check_choices
from peer_dist.layers.product_keys import retrieve
from peer_dist.layers.query_norm import KEY_NORMS, KeyNorm
from peer_dist.sharding import ExpertGroups, GridLayout, Shard, release, routed_experts
from peer_dist.sharding.held import code_dtype
from peer_dist.tracing import span


def activation_second_moment(activation: Callable[[Tensor], Tensor], std: float = 1.0) -> float:
    """``E[activation(std * z)^2]`` for a standard normal ``z``, by quadrature.

    Args:
        activation: elementwise; it is given float64 on the CPU.
        std: standard deviation of its input.
    """
    z = torch.linspace(-12.0, 12.0, 20001, dtype=torch.float64, device="cpu")  # on meta there would be no number
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    return float((activation(std * z).square() * density).sum() * (z[1] - z[0]))


class PEER(ProductKeyLayer):
    """``PEER(x) = sum over heads h and retrieved experts i of g_i * act(down_i . x) * up_i``.

    Each of ``heads`` query networks retrieves the ``top_k`` of ``num_experts`` product keys; a router score
    becomes a gate, which multiplies the expert's output after its activation (paper, equations 1 to 3). All
    heads share one pool of experts and, by default, one set of keys.

    Initialisation. For unit-variance input ``query.weight`` and ``down`` are drawn from N(0, 1/dim), so that
    queries and pre-activations have unit variance; keys uniformly from +-1/sqrt(key_dim/2) (Lample 2019);
    ``up`` from N(0, s^2) with ``s`` such that the output's standard deviation is ``output_std``: with the
    output variance ``s^2 * E[act(z)^2] * E[sum_e (sum of e's gates)^2]``, the last term is measured on random
    queries and the layer's own keys. The default ``output_std`` is that of the FFW it replaces when the FFW's
    matrices are drawn from N(0, 1/fan_in): ``sqrt(E[act(z)^2])``.

    A dense feed-forward block beside the experts (``dense_hidden``): ``dense_out(act(dense_in(x)))`` is added to the
    experts' sum, before the output gate if there is one. With tables over several ranks it is computed while tokens and
    results travel (as OmniMoE does with its shared expert). At the start each of the two has half of the output's
    variance: ``up`` is drawn with ``s / sqrt(2)``, and no other weight changes.

    Shared tables (``tables_of``): the layer reads, and gives gradients to, the ``down`` and ``up`` of another layer. It
    does not draw them; the scale of the experts' sum is that which the other layer gave to ``up``.

    Sharding. With ``group`` the rows of ``down`` and ``up`` are spread over its ranks, or rows and columns over those
    of a mesh of two dimensions or of :class:`peer_dist.sharding.ExpertGroups`. Every rank must build the layer, reset
    it and call it (and its backward) together with the others, with any number of tokens. Table gradients are then
    those of the SUM of the ranks' losses; divide by the number of ranks where each rank's loss is a mean over its own
    tokens. All else is replicated: average its gradients as data parallelism does
    (:func:`peer_dist.exempt_tables` keeps DDP and FSDP off the tables).

    Args:
        dim: width of input and output.
        num_experts: N, the square of a whole number.
        heads: query heads h.
        top_k: experts k per head, at most sqrt(N).
        key_dim: width of queries and product keys, even.
        query_norm: ``batch`` (statistics over ``data_group`` in training, running ones in evaluation),
            ``layer``, ``rms`` or ``none``.
        gate: ``softmax`` over the k retrieved scores, ``sigmoid`` or ``relu``.
        activation: ``gelu``, ``relu`` or ``silu``.
        shared_keys: one set of keys for all heads, or one per head.
        key_norm: ``none``, or ``layer`` or ``rms`` of every sub-key (UltraMem, arXiv 2411.12364).
        output_gate: multiply the experts' sum by ``silu(gate_in(x))`` and map it by ``gate_out``, both
            ``[dim, dim]`` (Memory Layers at Scale, arXiv 2412.09764).
        dense_hidden: hidden width of a dense block beside the experts; 0 for none.
        dispatch_chunks: number of parts in which tokens travel to the experts, so that the exchange of one overlaps the
            experts of another; the same on all ranks. Outputs do not depend on it.
        group: process group over which the tables are row-sharded, or a mesh (rows, or rows and columns), or a grid of
            ranks; None keeps them whole.
        data_group: ranks that see different tokens, for batch statistics; defaults to all ranks of ``group``.
        output_std: standard deviation of an output component at initialisation.
        table_dtype: dtype of ``down`` and ``up``; defaults to ``dtype``, with ``tables_of`` to that layer's. Those
            of ``torch.int8`` and ``torch.float8_e4m3fn`` have a power of two for each row beside them, and are frozen
            for torch's optimizers.
        table_memory: ``device``; or ``host`` or ``disk``, where rows lie in host memory or in scratch files that are
            gone with the process, and those that are picked often near the kernels. Gradients of such tables are sparse
            and on the CPU (for SparseAdam, say).
        table_cache_gb: GB near the kernels for the rows of this layer's far tables.
        table_folder: of the scratch files; the system's temporary folder by default.
        table_resident_gb: GB of the scratch files that the process keeps in memory at most, beside the cache.
        table_fetch: how rows in host memory come to a GPU: ``direct``, read over the bus by a kernel; or ``copied``,
            put together by the CPU and sent in one piece.
        sparse_grad: give ``down`` and ``up`` sparse gradients, of the picked rows only (for SparseAdam, say).
        tables_of: a layer whose tables this one shares: the same parameters, registered in both.
        state_size: width p of a router's state that the layer is called with (RMoE): queries become
            ``query(x) + state_query(h)``, of which the second is 0 at the start; 0 for none.
        seed: seed of the initial weights, the same on every rank; by default drawn from torch's generator on the
            group's first rank.
        device, dtype: as everywhere in torch.

    State dict: ``query.weight [heads*key_dim, dim]``, ``keys [2, sqrt(N), key_dim/2]`` (``[heads, 2, ...]``
    if not shared), ``down`` and ``up`` ``[num_experts, dim]``, the norms', the output gate's
    ``gate_in.weight`` and ``gate_out.weight``, the dense block's ``dense_in.weight [dense_hidden, dim]`` and
    ``dense_out.weight [dim, dense_hidden]``, and ``state_query.weight [heads*key_dim, state_size]``. Layers that
    share tables both list them. Spread tables are DTensors there, of which each rank holds its rows and columns; they
    are loaded from DTensors, from whole tables, and from this rank's block.

    Raises:
        ValueError: an impossible size, an unknown option, a mesh that is no grid, ranks with different seeds, or tables
            of another layer that do not fit.
        TypeError: ``group`` is none of these, such as a group without this rank.
    """

    table_names = ("down", "up")
    down: nn.Parameter
    up: nn.Parameter

    def __init__(
        self,
        dim: int,
        num_experts: int = 1024**2,
        heads: int = 8,
        top_k: int = 16,
        key_dim: int = 128,
        query_norm: str = "batch",
        gate: str = "softmax",
        activation: str = "gelu",
        *,
        shared_keys: bool = True,
        key_norm: str = "none",
        output_gate: bool = False,
        dense_hidden: int = 0,
        dispatch_chunks: int = 1,
        group: dist.ProcessGroup | dist.DeviceMesh | ExpertGroups | None = None,
        data_group: dist.ProcessGroup | None = None,
        output_std: float | None = None,
        table_dtype: torch.dtype | None = None,
        table_memory: str = "device",
        table_cache_gb: float = 1.0,
        table_folder: str = "",
        table_resident_gb: float = 1.0,
        table_fetch: str = "direct",
        sparse_grad: bool = False,
        tables_of: PEER | None = None,
        state_size: int = 0,
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim,
            num_experts,
            heads,
            top_k,
            key_dim,
            query_norm,
            gate,
            query_projection=True,
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
        if dense_hidden < 0:
            raise ValueError(f"dense_hidden must be at least 0, not {dense_hidden}")
        if dispatch_chunks < 1:
            raise ValueError(f"dispatch_chunks must be at least 1, not {dispatch_chunks}")
        check_choices(("key_norm", key_norm, KEY_NORMS), ("activation", activation, ACTIVATIONS))
        self.activation, self.sparse_grad, self.output_gate = activation, sparse_grad, output_gate
        self.dense_hidden, self.dispatch_chunks = dense_hidden, dispatch_chunks
        self.owns_tables = tables_of is None
        if tables_of is not None:
            mine = tables_of.down.dtype if table_dtype is None else code_dtype(table_dtype)
            _check_same_tables(tables_of, self.layout, mine)
        self.output_std = output_std

        def linear(width: int, out: int, offset: int, after: tuple[int, ...] = ()) -> nn.Linear:
            return draws(nn.Linear(width, out, bias=False, device=device, dtype=dtype), offset, after)

        self.state_size = state_size
        self.state_query = linear(state_size, heads * key_dim, 0) if state_size else None
        if output_gate:
            self.gate_in = linear(dim, dim, 4)
            self.gate_out = linear(dim, dim, 4, after=(dim, dim))
        if dense_hidden:
            self.dense_in = linear(dim, dense_hidden, 5)
            self.dense_out = linear(dense_hidden, dim, 5, after=(dense_hidden, dim))
        self._key_norm_kind = key_norm
        self.key_norm = None if key_norm == "none" else self._new_key_norm(device, dtype)
        if tables_of is None:
            self._make_tables(table_dtype)
        else:
            self.place, self.sparse_grad = tables_of.place, sparse_grad or tables_of.held
            self.down, self.up = tables_of.down, tables_of.up
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, output_std: float | None = None, seed: int | None = None) -> None:
        """Draw all weights anew, but for another layer's tables; see the class. For a given ``seed`` they are the same
        in any sharding, and those of the tables on devices of one model, which draw them. On meta nothing is drawn.

        Args:
            output_std, seed: as in the class, for this and later calls; by default what they were before. A layer
                without a seed draws another one each time.

        Raises:
            ValueError: ranks over which the layer is spread were given different seeds.
        """
        if not has_numbers(self.keys):
            return
        if output_std is not None:
            self.output_std = output_std
        seed = self._agreed_seed(seed)
        keys = self._reset_retrieval(seed)
        if self.key_norm is not None:
            self.key_norm.reset_parameters()
        second_moment = activation_second_moment(ACTIVATIONS[self.activation])
        std = math.sqrt(second_moment) if self.output_std is None else self.output_std
        part_std = std * math.sqrt(0.5) if self.dense_hidden else std
        if self.owns_tables:
            self.flush()
            up_std = part_std / math.sqrt(second_moment * self._gate_energy(seed, keys))
            self._draw_rows(self.down, self.dim**-0.5, seed + 1)
            self._draw_rows(self.up, up_std, seed + 2)
        redraw(self.state_query, seed, 0.0)
        if self.output_gate:  # the output keeps its standard deviation
            redraw(self.gate_in, seed, self.dim**-0.5)
            redraw(self.gate_out, seed, (self.dim * activation_second_moment(F.silu)) ** -0.5)
        if self.dense_hidden:
            redraw(self.dense_in, seed, self.dim**-0.5)
            redraw(self.dense_out, seed, part_std * (self.dense_hidden * second_moment) ** -0.5)

    @torch.no_grad()
    def zero_output(self) -> None:
        """Let the output be 0 until ``up`` is updated, whose gradient is not: a layer put into a trained model."""
        self.flush()
        self.up.zero_()
        if self.dense_hidden:
            self.dense_out.weight.zero_()

    def _gate_energy(self, seed: int, keys: Tensor) -> float:
        """``E[sum over distinct experts of (sum of its gates)^2]`` for standard normal queries and drawn ``keys``."""
        if self.key_norm is not None:  # as it is at the start, wherever its parameters are now
            keys = self._new_key_norm("cpu", torch.float32)(keys)
        generator = torch.Generator().manual_seed(seed + 3)
        shape = 64, self.heads, self.key_dim
        query = torch.empty(shape, dtype=torch.float32, device="cpu").normal_(generator=generator)
        indices, scores = retrieve(query, keys, self.top_k)
        gates, indices = GATES[self.gate](scores).flatten(1), indices.flatten(1)
        energy = sum(float((g[:, None] * g * (index[:, None] == index)).sum()) for g, index in zip(gates, indices))
        return max(energy / len(gates), 1e-12)

    def shards(self) -> dict[str, Shard]:
        """This rank's blocks of ``down`` and ``up``; none where they are another layer's."""
        names = ("down", "up") if self.owns_tables else ()
        return {name: Shard.of_table(getattr(self, name), self.layout) for name in names}

    def release_shards(self) -> None:
        """Take ``down`` and ``up`` out of the module's parameters (:func:`peer_dist.sharding.release`)."""
        release(self, self.table_names)

    def _new_key_norm(self, device: torch.device | str | None, dtype: torch.dtype | None) -> KeyNorm:
        half, std = self.key_dim // 2, (self.key_dim / 2) ** -0.5 / math.sqrt(3)
        return KeyNorm(self._key_norm_kind, self.keys.shape[:-2].numel(), half, std, device, dtype)

    def _product_keys(self) -> Tensor:
        return self.keys if self.key_norm is None else self.key_norm(self.keys)

    def _retrieve(self, tokens: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        assert self.query is not None
        raw = self.query(tokens)
        if self.state_query is not None:
            if state is None:
                raise ValueError(f"a PEER layer of state_size={self.state_size} needs a state")
            raw = raw + self.state_query(state.reshape(-1, state.shape[-1]))
        return self._pick(self._queries(raw), self._product_keys())

    def forward(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        """The layer's output ``[..., dim]`` for ``x [..., dim]``, in ``x``'s dtype.

        Scores, gates and all sums over experts are in at least float32, under autocast too: there only the linear maps
        (queries, output gate, dense block) compute in fewer bits.

        Args:
            state: ``[..., state_size]``, if the layer has a ``state_size``.

        Raises:
            ValueError: an input of another width, or on another device than the layer; no state, where one is needed;
                one token in all under batch norm in training.
            NotImplementedError: an export to ONNX, or a forward-mode derivative.
        """
        tokens = self._tokens(x)
        with span("retrieve"):
            indices, gates = self._retrieve(tokens, state)
        y = routed_experts(
            tokens,
            indices.flatten(1),
            gates.flatten(1),
            self.down,
            self.up,
            self.activation,
            self.layout,
            self.traffic,
            self.sparse_grad,
            self.dispatch_chunks,
            (self._dense_hidden, self.dense_out) if self.dense_hidden else None,
        )
        if self.output_gate:
            y = self.gate_out(y * F.silu(self.gate_in(tokens)))
        return self._shaped(y.to(x.dtype), x)

    def _dense_hidden(self, tokens: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation](self.dense_in(tokens))

    def extra_repr(self) -> str:
        """The options that printing a model shows."""
        return (
            f"dim={self.dim}, num_experts={self.num_experts}, heads={self.heads}, top_k={self.top_k}, "
            f"gate={self.gate}, activation={self.activation}, rows={self.layout.rows}, columns={self.layout.columns}"
        )


def _check_same_tables(other: PEER, layout: GridLayout, dtype: torch.dtype) -> None:
    """Refuse to share tables of another shape, dtype or distribution over ranks."""

    def ranks(layout: GridLayout) -> list[int] | None:
        return None if layout.groups is None else dist.get_process_group_ranks(layout.groups.domain)

    for name, mine, theirs in (
        ("num_experts", layout.num_experts, other.num_experts),
        ("dim", layout.dim, other.dim),
        ("table_dtype", dtype, other.down.dtype),
        ("ranks", ranks(layout), ranks(other.layout)),
        ("column shards", layout.column_shards, other.layout.column_shards),
    ):
        if mine != theirs:
            raise ValueError(f"tables_of must be a layer with the same {name}: {theirs} there, {mine} here")
