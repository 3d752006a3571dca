"""The dense feed-forward block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peer_dist.export.peer_model import ACTIVATIONS, ExportedLayer, choice, linear, whole


class MLP(ExportedLayer):
    """A dense feed-forward block (``gelu``, ``relu`` or ``swiglu``), with its ``top_k`` largest hidden units or all."""

    def __init__(self, width: int, hidden: int, activation: str, top_k: int = 0) -> None:
        super().__init__()
        self.activation, self.top_k = activation, top_k
        self.fc1 = linear(width, 2 * hidden if activation == "swiglu" else hidden)
        self.fc2 = linear(hidden, width)

    def forward(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        """``x: [tokens, width]`` to ``[tokens, width]``; the state is not looked at."""
        hidden = self.fc1(x)
        if self.activation == "swiglu":
            gate, hidden = hidden.chunk(2, -1)
            hidden = F.silu(gate) * hidden
        else:
            hidden = ACTIVATIONS[self.activation](hidden)
        if self.top_k:
            kept = hidden.topk(self.top_k, -1)
            hidden = torch.zeros_like(hidden).scatter(-1, kept.indices, kept.values)
        return self.fc2(hidden)

    @classmethod
    def of(
        cls, config: Mapping[str, Any], section: Mapping[str, Any], state_size: int, tables_of: nn.Module | None
    ) -> MLP:
        """Build a block as wide as the model's ``intermediate_size``."""
        hidden = whole(config, "intermediate_size")
        return cls(whole(config, "hidden_size"), hidden, activation_of(config), whole(config, "ffn_top_k", 0, hidden))


def activation_of(config: Mapping[str, Any]) -> str:
    """The name of the model's activation."""
    return choice(config, "ffn_activation", ("swiglu", *ACTIVATIONS))
