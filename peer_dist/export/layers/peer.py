"""PEER: experts of one neuron each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peer_dist.export.layers.product_keys import ProductKeyLayer
from peer_dist.export.peer_model import ACTIVATIONS, choice, flag, linear, whole, wide


class PEER(ProductKeyLayer):
    """``sum of g_i * act(down_i . x) * up_i`` over heads and retrieved experts.

    Args:
        tables_of: the layer whose tables this one reads, if they are not its own.
    """

    routed = True

    def __init__(self, width: int, section: Mapping[str, Any], state_size: int, tables_of: PEER | None) -> None:
        rows = whole(section, "num_experts")
        super().__init__(width, rows, section, state_size)
        self.activation = ACTIVATIONS[choice(section, "activation", ACTIVATIONS)]
        self._tables_of = () if tables_of is None else (tables_of,)  # in a tuple: no sub-module of this
        if tables_of is None:
            self.down = nn.Parameter(torch.empty(rows, width))
            self.up = nn.Parameter(torch.empty(rows, width))
        hidden, gated = whole(section, "dense_hidden", 0), flag(section, "output_gate")
        self.dense_in = linear(width, hidden) if hidden else None
        self.dense_out = linear(hidden, width) if hidden else None
        self.gate_in = linear(width, width) if gated else None
        self.gate_out = linear(width, width) if gated else None

    def forward(self, x: Tensor, state: Tensor | None = None, picked: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """As in every layer; of ``picked`` rows and gates, it mixes those experts' outputs and does nothing else."""
        return super().forward(x, state) if picked is None else self._experts(x, *picked)

    def mixed(self, x: Tensor, rows: Tensor, gates: Tensor) -> Tensor:
        """Mix the picked experts' outputs."""
        if not self._tables_of:
            return self._experts(x, rows, gates)
        (owner,) = self._tables_of
        return owner(x, picked=(rows, gates))  # called, so that whoever keeps its tables elsewhere brings them

    def _experts(self, x: Tensor, rows: Tensor, gates: Tensor) -> Tensor:
        hidden = self.activation(wide(self.down[rows] @ x[:, :, None].to(self.down.dtype)))[..., 0] * gates
        return (hidden[:, None].to(self.up.dtype) @ self.up[rows])[:, 0]

    def finished(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the dense block, and apply the output gate, where the layer has them."""
        if self.dense_in is not None and self.dense_out is not None:
            y = y + self.dense_out(self.activation(self.dense_in(x)))
        if self.gate_in is not None and self.gate_out is not None:
            y = self.gate_out(y * F.silu(self.gate_in(x)))
        return y

    @classmethod
    def of(
        cls, config: Mapping[str, Any], section: Mapping[str, Any], state_size: int, tables_of: nn.Module | None
    ) -> PEER:
        """Build a layer, with its own tables or those of ``tables_of``."""
        assert tables_of is None or isinstance(tables_of, PEER)
        return cls(whole(config, "hidden_size"), section, state_size, tables_of)
