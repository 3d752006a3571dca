"""Coarse experts behind a router."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peer_dist.export.layers.dense import MLP, activation_of
from peer_dist.export.peer_model import GATES, ExportedLayer, choice, flag, unmixed, whole, wide


class LinearLogits(nn.Module):
    """Logits that are a linear map, in float32 or wider."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, width))

    def forward(self, x: Tensor) -> Tensor:
        """``x: [tokens, width]`` to logits ``[tokens, experts]``."""
        return F.linear(wide(x), wide(self.weight))


class CosineLogits(nn.Module):
    """Cosines between projected tokens and experts' embeddings, over a learnt temperature (XMoE, section 3.2)."""

    def __init__(self, width: int, experts: int, size: int) -> None:
        super().__init__()
        self.projection = nn.Parameter(torch.empty(size, width))
        self.weight = nn.Parameter(torch.empty(experts, size))
        self.log_temperature = nn.Parameter(torch.empty(1))

    def forward(self, x: Tensor) -> Tensor:
        """``x: [tokens, width]`` to logits ``[tokens, experts]``."""
        projected = F.normalize(F.linear(wide(x), wide(self.projection)), dim=-1)
        return F.linear(projected, F.normalize(wide(self.weight), dim=-1)) * torch.exp(-wide(self.log_temperature))


class Router(nn.Module):
    """Chooses the ``top_k`` experts of the largest scores; a bias, if there is one, counts in the choice only."""

    expert_bias: Tensor | None

    def __init__(self, logits: nn.Module, experts: int, top_k: int, score: str, normalize: bool, bias: bool) -> None:
        super().__init__()
        self.logits, self.top_k, self.score, self.normalize = logits, top_k, GATES[score], normalize
        self.register_buffer("expert_bias", torch.zeros(experts) if bias else None)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[tokens, width]`` to experts and gates ``[tokens, top_k]``."""
        with unmixed(x):
            scores = self.score(self.logits(x))
        experts = (scores if self.expert_bias is None else scores + self.expert_bias).topk(self.top_k, -1).indices
        gates = scores.gather(-1, experts)
        if self.normalize:
            gates = gates / gates.sum(-1, keepdim=True).clamp(min=torch.finfo(gates.dtype).tiny)
        return experts, gates


class MixtureOfExperts(ExportedLayer):
    """Coarse experts, of which a router chooses some for each token."""

    routed = True

    def __init__(self, router: Router, experts: list[MLP]) -> None:
        super().__init__()
        self.router, self.experts = router, nn.ModuleList(experts)

    @classmethod
    def least_tensors(cls, section: Mapping[str, Any]) -> int:
        """Those of the experts."""
        return 2 * whole(section, "num_experts")

    def forward(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        """``x: [tokens, width]`` through the experts that are chosen by it or, if there is one, by the state."""
        chosen, gates = self.router(x if state is None else state)
        y = torch.zeros_like(x, dtype=gates.dtype)
        for number, expert in enumerate(self.experts):
            tokens, places = (chosen == number).nonzero(as_tuple=True)
            y = y.index_add(0, tokens, expert(x[tokens]) * gates[tokens, places, None])
        return y.to(x.dtype)


class MoE(MixtureOfExperts):
    """Experts of the model's activation."""

    @classmethod
    def of(
        cls, config: Mapping[str, Any], section: Mapping[str, Any], state_size: int, tables_of: nn.Module | None
    ) -> MoE:
        """Build a layer whose experts are as wide as a dense one unless its section says otherwise."""
        own = section["expert_hidden_size"] is not None
        hidden = whole(section, "expert_hidden_size") if own else whole(config, "intermediate_size")
        score = choice(section, "score", GATES)
        router = _router(config, section, state_size, score, flag(section, "normalize"), flag(section, "expert_bias"))
        return cls(router, _experts(config, section, hidden, activation_of(config)))


class SigmaMoE(MixtureOfExperts):
    """ReLU experts under sigmoid scores that do not compete."""

    @classmethod
    def of(
        cls, config: Mapping[str, Any], section: Mapping[str, Any], state_size: int, tables_of: nn.Module | None
    ) -> SigmaMoE:
        """Build a layer of ReLU experts, whose router has no bias and whose scores are not normalized."""
        router = _router(config, section, state_size, "sigmoid", normalize=False, bias=False)
        return cls(router, _experts(config, section, whole(section, "expert_hidden_size"), "relu"))


def _router(
    config: Mapping[str, Any], section: Mapping[str, Any], state_size: int, score: str, normalize: bool, bias: bool
) -> Router:
    width, experts = whole(config, "hidden_size"), whole(section, "num_experts")
    logits: nn.Module = LinearLogits(state_size or width, experts)
    if config["router"]["kind"] == "cosine":
        logits = CosineLogits(width, experts, whole(config["router"], "state_size"))
    return Router(logits, experts, whole(section, "top_k", 1, experts), score, normalize, bias)


def _experts(config: Mapping[str, Any], section: Mapping[str, Any], hidden: int, activation: str) -> list[MLP]:
    return [MLP(whole(config, "hidden_size"), hidden, activation) for _ in range(whole(section, "num_experts"))]
