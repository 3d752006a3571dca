"""What layers that pick rows by product keys share: queries and keys, gates, and how weights are drawn."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from peer_dist.layers.product_keys import project_and_retrieve, retrieve
from peer_dist.layers.query_norm import QUERY_NORMS, QueryBatchNorm, make_query_norm
from peer_dist.layers.recomputation import is_recomputation
from peer_dist.sharding import ExpertGroups, GridLayout, TableModule, Traffic

GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda scores: scores.softmax(-1),
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
}

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
        check_choices(("query_norm", query_norm, QUERY_NORMS), ("gate", gate, GATES))
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
            self.query = nn.Linear(dim, heads * key_dim, bias=False, device=device, dtype=dtype)
        self.norm = make_query_norm(query_norm, heads, key_dim, data_group)
        self.norm.to(device=device, dtype=dtype)
        keys_shape = (2, n, key_dim // 2) if shared_keys else (heads, 2, n, key_dim // 2)
        self.keys = nn.Parameter(torch.empty(keys_shape, device=device, dtype=dtype))

    @property
    def shard_shape(self) -> tuple[int, int]:
        """Rows and columns of this rank's block of a table."""
        return len(self.layout.rows), len(self.layout.columns)

    def _pick(self, tokens: Tensor, weight: Tensor | None, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Indices and gates ``[tokens, heads, top_k]`` for the queries ``tokens @ weight.T``."""
        if weight is None:
            indices, scores = retrieve(tokens[:, None].expand(-1, self.heads, -1), keys, self.top_k)
        elif isinstance(self.norm, QueryBatchNorm):  # its statistics need the queries of all tokens
            query = self.norm(F.linear(tokens, weight).unflatten(-1, (self.heads, self.key_dim)))
            indices, scores = retrieve(query, keys, self.top_k)
        else:
            kind = tokens.device.type
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                dtype = torch.get_autocast_dtype(kind)  # which does not see into a function of our own
                tokens, weight = tokens.to(dtype), weight.to(dtype)
            indices, scores = project_and_retrieve(tokens, weight, self.norm, keys, self.top_k, self.heads)
        gates = GATES[self.gate](scores)
        if self.on_route is not None and not is_recomputation():
            self.on_route(indices, gates.detach())
        return indices, gates

    def _reset_retrieval(self, seed: int) -> torch.Generator:
        """Queries from N(0, 1/dim), keys uniformly from +-1/sqrt(key_dim/2); the generator that drew them.

        What all ranks have alike is drawn on the CPU: GPUs of another model would draw other numbers.
        """
        generator = torch.Generator().manual_seed(seed)
        # drawn in float32 whatever the dtype, so that the dtype only rounds
        if self.query is not None:
            self._draw(self.query, self.dim**-0.5, generator)
        bound = (self.key_dim / 2) ** -0.5
        keys = torch.empty(self.keys.shape, device="cpu")
        self.keys.copy_(keys.uniform_(-bound, bound, generator=generator))
        if not isinstance(self.norm, nn.Identity):
            self.norm.reset_parameters()  # type: ignore[operator]
        return generator

    def _draw(self, linear: nn.Linear, std: float, generator: torch.Generator) -> None:
        drawn = torch.empty(linear.weight.shape, device="cpu")
        linear.weight.copy_(drawn.normal_(0, std, generator=generator))

    def _same_seed(self, seed: int | None) -> int:
        """The seed that all ranks were given, or one of the first rank's generator: all but the tables is replicated.

        Raises:
            ValueError: ranks were given different ones.
        """
        drawn = int(torch.randint(2**31, (), device="cpu")) if seed is None else seed
        return drawn if self.layout.groups is None else self.layout.groups.agreed_seed(seed, drawn)

    def _draw_rows(self, table: Tensor, std: float, seed: int) -> None:
        rows = self.layout.rows
        for block in range(rows.start // _INIT_BLOCK, -(-rows.stop // _INIT_BLOCK)):
            begin, end = block * _INIT_BLOCK, min((block + 1) * _INIT_BLOCK, self.num_experts)
            generator = torch.Generator(table.device).manual_seed(seed * 1_000_003 + block)
            drawn = torch.empty(end - begin, self.dim, device=table.device)
            drawn.normal_(0, std, generator=generator)
            mine = range(max(begin, rows.start), min(end, rows.stop))
            drawn = drawn[mine.start - begin : mine.stop - begin, self.layout.columns.start : self.layout.columns.stop]
            table[mine.start - rows.start : mine.stop - rows.start] = drawn
