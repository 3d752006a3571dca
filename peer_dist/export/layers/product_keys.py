"""Retrieval by product keys."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peer_dist.export.peer_model import EPS, GATES, ExportedLayer, choice, flag, linear, unmixed, whole, wide

NORMS = ("none", "layer", "rms")
ELEMENTS = 1 << 23  # held at a time by a layer that looks at many keys and rows per token


class VectorNorm(nn.Module):
    """LayerNorm or RMSNorm of each vector of ``[..., sets, width]``, with weights per set."""

    def __init__(self, kind: str, sets: int, width: int) -> None:
        super().__init__()
        self.kind, self.shape = kind, (sets, width)
        self.weight = nn.Parameter(torch.ones(sets * width))
        self.bias = nn.Parameter(torch.zeros(sets * width)) if kind == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        """``x: [..., sets, width]``, each vector normalised."""
        norm = F.layer_norm if self.kind == "layer" else F.rms_norm
        y = norm(wide(x), self.shape[1:], eps=EPS) * self.weight.view(self.shape)
        return (y if self.bias is None else y + self.bias.view(self.shape)).to(x.dtype)


class KeyNorm(nn.Module):
    """Normalises sub-keys ``[..., 2, n, half]``, with weights per set of them."""

    def __init__(self, kind: str, sets: int, half: int) -> None:
        super().__init__()
        self.norm = VectorNorm(kind, sets, half)

    def forward(self, keys: Tensor) -> Tensor:
        """``keys: [..., 2, n, half]``, each sub-key normalised."""
        per_key = keys.movedim(-2, 0)
        return self.norm(per_key.flatten(1, -2)).view_as(per_key).movedim(0, -2)


class QueryBatchNorm(nn.Module):
    """BatchNorm of queries ``[tokens, heads, key_dim]`` with the statistics that training kept."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    def forward(self, query: Tensor) -> Tensor:
        """``query: [tokens, heads, key_dim]``, each feature normalised."""
        x = (wide(query.flatten(1)) - self.running_mean) * torch.rsqrt(wide(self.running_var) + EPS)
        return (x * self.weight + self.bias).view_as(query).to(query.dtype)


class ProductKeyLayer(ExportedLayer):
    """Retrieves ``top_k`` of ``n * n`` rows per head, key ``(a, b)`` being ``[keys[0, a], keys[1, b]]``."""

    def __init__(self, width: int, rows: int, section: Mapping[str, Any], state_size: int = 0) -> None:
        super().__init__()
        self.heads, self.n = whole(section, "heads"), math.isqrt(rows)
        self.top_k = whole(section, "top_k", 1, self.n)
        projected, shared = (
            flag({"query_projection": True, **section}, "query_projection"),
            flag(section, "shared_keys"),
        )
        key_dim = whole(section, "key_dim") if projected else width
        if self.n**2 != rows or key_dim % 2:
            raise ValueError(f"config.json: {rows} rows are no square, or queries of {key_dim} numbers have no halves")
        self.gate = GATES[choice(section, "gate", GATES)]
        self.query = linear(width, self.heads * key_dim) if projected else None
        self.state_query = linear(state_size, self.heads * key_dim) if state_size else None
        kind, sets = choice(section, "query_norm", ("batch", *NORMS)), 2 if shared else 2 * self.heads
        self.norm: nn.Module = nn.Identity() if kind == "none" else VectorNorm(kind, self.heads, key_dim)
        if kind == "batch":
            self.norm = QueryBatchNorm(self.heads * key_dim)
        shape = (2, self.n, key_dim // 2)
        self.keys = nn.Parameter(torch.empty(shape if shared else (self.heads, *shape)))
        kind = choice({"key_norm": "none", **section}, "key_norm", NORMS)
        self.key_norm = None if kind == "none" else KeyNorm(kind, sets, key_dim // 2)
        self.step = max(1, ELEMENTS // max(self.heads * self.top_k * width, 2 * self.heads * self.n))  # tokens

    def forward(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        """``x: [tokens, width]``, ``state: [tokens, state_size]``, to ``[tokens, width]``, some tokens at a time."""
        keys = self.keys if self.key_norm is None else self.key_norm(self.keys)
        states = [None] * -(-len(x) // self.step) if state is None else state.split(self.step)
        return torch.cat([self._some(*part, keys) for part in zip(x.split(self.step), states)])

    def _some(self, x: Tensor, state: Tensor | None, keys: Tensor) -> Tensor:
        if self.query is None:
            query = x[:, None].expand(-1, self.heads, -1)
        else:
            query = self.query(x) if self.state_query is None else self.query(x) + self.state_query(state)
            query = self.norm(query.unflatten(-1, (self.heads, -1)))
        with unmixed(x):
            mixed = self.mixed(x, *self.retrieve(wide(query), wide(keys)))
        return self.finished(x, mixed)

    def retrieve(self, query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and gates ``[tokens, heads * top_k]`` of queries ``[tokens, heads, key_dim]``."""
        halves = query.unflatten(-1, (2, -1)).permute(1, 2, 0, 3)  # [heads, 2, tokens, half]
        scores, numbers = (halves @ keys.expand(self.heads, *keys.shape[-3:]).mT).topk(self.top_k, -1)
        pairs = (scores[:, 0, :, :, None] + scores[:, 1, :, None, :]).flatten(-2)
        best, places = pairs.topk(self.top_k, -1)  # [heads, tokens, top_k]
        first = numbers[:, 0].gather(-1, places // self.top_k)
        second = numbers[:, 1].gather(-1, places % self.top_k)
        rows, gates = first * self.n + second, self.gate(best)
        return rows.transpose(0, 1).flatten(1), gates.transpose(0, 1).flatten(1)

    def mixed(self, x: Tensor, rows: Tensor, gates: Tensor) -> Tensor:
        """The sum over the rows that tokens picked; the kind of layer says how. Autocast is off."""
        raise NotImplementedError

    def finished(self, x: Tensor, y: Tensor) -> Tensor:
        """The output of tokens, of that sum ``y``."""
        return y
