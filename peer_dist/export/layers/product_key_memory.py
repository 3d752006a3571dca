"""Product-key memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peer_dist.export.layers.product_keys import ProductKeyLayer
from peer_dist.export.peer_model import whole


class ProductKeyMemory(ProductKeyLayer):
    """``sum of g_i * value_i`` over heads and retrieved values."""

    def __init__(self, width: int, section: Mapping[str, Any]) -> None:
        rows = whole(section, "num_values")
        super().__init__(width, rows, section)
        self.values = nn.Parameter(torch.empty(rows, width))

    def mixed(self, x: Tensor, rows: Tensor, gates: Tensor) -> Tensor:
        """Sum the picked values, weighted by their gates."""
        return (gates[:, None].to(self.values.dtype) @ self.values[rows])[:, 0]

    @classmethod
    def of(
        cls, config: Mapping[str, Any], section: Mapping[str, Any], state_size: int, tables_of: nn.Module | None
    ) -> ProductKeyMemory:
        """Build a layer; it shares its values with no other one."""
        return cls(whole(config, "hidden_size"), section)
