"""What layers that pick rows by product keys share: queries and keys, gates, and how weights are drawn."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from peer_dist.layers.initialisation import draws, has_numbers, own_block, redraw, write
from peer_dist.layers.product_keys import retrieve
from peer_dist.layers.query_norm import QUERY_NORMS, VectorNorm, make_query_norm
from peer_dist.layers.recomputation import is_recomputation
from peer_dist.sharding import ExpertGroups, GridLayout, TableModule, Traffic, agreed_seed
from peer_dist.sharding.blocks import is_dtensor
from peer_dist.sharding.held import FETCHES, MEMORIES, code_dtype, place_of, write_values

GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda scores: scores.softmax(-1),
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
}

DEVICES = ("cpu", "cuda", "meta")
"""Kinds of devices that the layers run on; on meta they give shapes."""

_INIT_BLOCK = 4096  # rows drawn from one generator, so that any sharding draws the same tables


def check_choices(*choices: tuple[str, str, tuple[str, ...] | dict[str, Callable[[Tensor], Tensor]]]) -> None:
    """Refuse options ``(name, value, known values)``.

    Raises:
        ValueError: naming the first whose value is not known.
    """
    for name, value, known in choices:
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}")


class ProductKeyLayer(TableModule):
    """The base of :class:`peer_dist.PEER` and :class:`peer_dist.ProductKeyMemory`, whose options these are: all but
    their tables. Without ``query_projection`` the query of every head is the input itself.

    Raises:
        ValueError: an impossible size, or an unknown option.
    """

    rows_name = "num_experts"
    """What the layer calls its number of rows."""

    def __init__(
        self,
        dim: int,
        num_experts: int,
        heads: int,
        top_k: int,
        key_dim: int,
        query_norm: str,
        gate: str,
        *,
        query_projection: bool,
        shared_keys: bool,
        group: dist.ProcessGroup | dist.DeviceMesh | ExpertGroups | None,
        data_group: dist.ProcessGroup | None,
        table_memory: str,
        table_cache_gb: float,
        table_folder: str,
        table_resident_gb: float,
        table_fetch: str,
        seed: int | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        n = math.isqrt(num_experts)
        if n * n != num_experts or n == 0:
            raise ValueError(f"{self.rows_name} must be the square of a whole number, not {num_experts}")
        if not 1 <= top_k <= n:
            raise ValueError(f"top_k must be between 1 and sqrt({self.rows_name}) = {n}, not {top_k}")
        if key_dim < 2 or key_dim % 2:
            raise ValueError(f"key_dim must be even, not {key_dim}")
        if dim < 1 or heads < 1:
            raise ValueError(f"dim and heads must be at least 1, not {dim} and {heads}")
        check_choices(
            ("query_norm", query_norm, QUERY_NORMS),
            ("gate", gate, GATES),
            ("table_memory", table_memory, MEMORIES),
            ("table_fetch", table_fetch, FETCHES),
        )
        self.dim, self.num_experts, self.heads, self.top_k, self.key_dim = dim, num_experts, heads, top_k, key_dim
        self.gate = gate
        groups = None if group is None else ExpertGroups.of(group)
        self.layout = GridLayout(num_experts, dim, groups)
        self.traffic = Traffic()
        self.on_route: Callable[[Tensor, Tensor], None] | None = None
        """Called with the indices and gates ``[tokens, heads, top_k]`` of every forward pass (but recomputed ones)."""

        if data_group is None and groups is not None:
            data_group = groups.domain
        self.query: nn.Linear | None = None
        if query_projection:
            self.query = draws(nn.Linear(dim, heads * key_dim, bias=False, device=device, dtype=dtype), 0)
        self.norm = make_query_norm(query_norm, heads, key_dim, data_group, device, dtype)
        keys_shape = (2, n, key_dim // 2) if shared_keys else (heads, 2, n, key_dim // 2)
        self.keys = nn.Parameter(torch.empty(keys_shape, device=device, dtype=dtype))
        self.place = place_of(
            table_memory, self.keys.device, table_cache_gb, table_folder, table_resident_gb, table_fetch
        )
        self._seed = seed

    def _make_tables(self, dtype: torch.dtype | None) -> None:
        """Make this rank's blocks of the tables, without values; by default of the keys' dtype.

        Raises:
            ValueError: tables cannot be of such a dtype.
        """
        kept = code_dtype(dtype or self.keys.dtype)
        # before there are tables: wrappers are told to leave them
        self.sparse_grad = self.sparse_grad or self.place is not None or not kept.is_floating_point
        self.new_tables(self.shard_shape, kept, self.keys.device)

    @property
    def shard_shape(self) -> tuple[int, int]:
        """Rows and columns of this rank's block of a table."""
        return len(self.layout.rows), len(self.layout.columns)

    def _tokens(self, x: Tensor) -> Tensor:
        """``x [..., dim]`` as ``[tokens, dim]``.

        Raises:
            NotImplementedError: ONNX is asked for, or a trace of a layer whose tables are held elsewhere or in eight
                bits.
            ValueError: not dense floating-point numbers, another width, or a device that the layer is not on, or that
                it has no kernels for.
        """
        if torch.onnx.is_in_onnx_export():
            raise NotImplementedError(
                f"{type(self).__name__} has no form in ONNX, which has no operators for its retrieval and its sums "
                "over picks; torch.export and torch.jit.trace keep them as operators of peer_dist"
            )
        if self.held and (torch.jit.is_tracing() or torch.compiler.is_exporting()):
            raise NotImplementedError(
                f"{type(self).__name__} is not exported or traced with tables in host memory, on a disk or of eight "
                "bits: load its state_dict() into a layer with table_memory device and a table_dtype of more bits"
            )
        if x.is_nested or x.layout is not torch.strided or not x.is_floating_point():
            kind = "nested" if x.is_nested else x.layout
            raise ValueError(f"the input must be dense and of floating-point numbers, not {kind} and of {x.dtype}")
        if x.dim() == 0 or x.shape[-1] != self.dim:
            raise ValueError(f"the input must be [..., dim] with dim = {self.dim}, not of shape {tuple(x.shape)}")
        if x.device != self.keys.device:
            raise ValueError(f"the input is on {x.device}, but the layer is on {self.keys.device}; move one of them")
        if x.device.type not in DEVICES:
            raise ValueError(f"{type(self).__name__} runs on {' and '.join(DEVICES[:2])} devices, not on {x.device}")
        return x.reshape(-1, self.dim)

    @staticmethod
    def _shaped(y: Tensor, x: Tensor) -> Tensor:
        """The output ``y [tokens, dim]`` in the shape of ``x``; no view, as no linear map's is.

        What is computed in place on a view loses the hooks that wrappers (FSDP2) put on an output.
        """
        return torch.ops.aten._unsafe_view(y, x.shape)

    def _pick(self, query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Indices and gates ``[tokens, heads, top_k]`` for queries ``[tokens, heads, key_dim]`` before their norm."""
        if isinstance(self.norm, VectorNorm):
            indices, scores = self.norm(query, keys, self.top_k)
        else:
            indices, scores = retrieve(self.norm(query), keys, self.top_k)
        gates = GATES[self.gate](scores)
        if self.on_route is not None and not is_recomputation():
            self.on_route(indices, gates.detach())
        return indices, gates

    def _queries(self, raw: Tensor) -> Tensor:
        """``[tokens, heads * key_dim]`` as ``[tokens, heads, key_dim]``."""
        # not Tensor.unflatten, which the compiler does not know where a default device is set
        return raw.reshape(*raw.shape[:-1], self.heads, self.key_dim)

    def _reset_retrieval(self, seed: int) -> Tensor:
        """Queries from N(0, 1/dim), keys by :meth:`_draw_keys`; the keys, whole, on the CPU and in float32.

        What all ranks have alike is drawn on the CPU: GPUs of another model would draw other numbers.
        """
        redraw(self.query, seed, self.dim**-0.5)
        generator = torch.Generator().manual_seed(seed)
        if self.query is not None:  # whose numbers come first
            shape = (self.heads * self.key_dim, self.dim)
            torch.empty(shape, dtype=torch.float32, device="cpu").normal_(generator=generator)
        keys = self._draw_keys(torch.empty(self.keys.shape, dtype=torch.float32, device="cpu"), generator)
        keys = keys.to(self.keys.dtype)
        write(self.keys, keys)
        if not isinstance(self.norm, nn.Identity):
            self.norm.reset_parameters()  # type: ignore[operator]
        return keys.float()

    def _draw_keys(self, keys: Tensor, generator: torch.Generator) -> Tensor:
        """Fill ``keys``, uniformly from +-1/sqrt(key_dim/2)."""
        bound = (self.key_dim / 2) ** -0.5
        return keys.uniform_(-bound, bound, generator=generator)

    def _agreed_seed(self, seed: int | None) -> int:
        """``seed``, from now on the layer's own, or its own, or one from the first rank's generator: all but the tables
        is replicated.

        Raises:
            ValueError: ranks were given different ones.
        """
        if seed is not None:
            self._seed = seed
        seed = self._seed
        drawn = int(torch.randint(2**31, (), dtype=torch.int64, device="cpu")) if seed is None else seed
        groups: list[dist.ProcessGroup] = []
        if self.layout.groups is not None:
            groups = [self.layout.groups.domain]
        elif is_dtensor(self.keys):  # by fully_shard
            groups = self.keys.device_mesh.get_all_groups()
        return agreed_seed(seed, drawn, groups)

    def _draw_rows(self, table: Tensor, std: float, seed: int) -> None:
        """Fill this rank's part of a table from N(0, std^2), in blocks of rows with a generator each."""
        if not has_numbers(table):
            return
        local, offset = own_block(table)
        device = local.device if self.place is None else self.place.device  # the same numbers wherever they lie
        first_row, first_column = (begin + more for begin, more in zip(self.layout.offset, offset))
        rows = range(first_row, first_row + local.shape[0])
        columns = slice(first_column, first_column + local.shape[1])
        for block in range(rows.start // _INIT_BLOCK, -(-rows.stop // _INIT_BLOCK)):
            begin, end = block * _INIT_BLOCK, min((block + 1) * _INIT_BLOCK, self.num_experts)
            generator = torch.Generator(device).manual_seed(seed * 1_000_003 + block)
            # in float32 whatever the dtype, so that the dtype only rounds
            drawn = torch.empty(end - begin, self.dim, dtype=torch.float32, device=device)
            drawn.normal_(0, std, generator=generator)
            mine = range(max(begin, rows.start), min(end, rows.stop))
            place = slice(mine.start - rows.start, mine.stop - rows.start)
            write_values(local, place, drawn[mine.start - begin : mine.stop - begin, columns])
