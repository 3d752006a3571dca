"""Routers that know what the layers before theirs saw (RMoE, Qiu 2024, arXiv 2408.06793)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

PASSING = ("full", "detached", "none")


class RouterCore(nn.Module):
    """What the routers of all layers have in common: ``h_i = GRU(x'_i, h_{i-1})``, per token.

    As the paper's control of equal size, a multi-layer perceptron of ``x'_i`` alone: ``6 p^2`` weights like the GRU.

    Args:
        state_size: p.
        recurrent: GRU, or the perceptron.
        projected_from: width of the layers' input if they share one projection into the state, else 0.
    """

    def __init__(self, state_size: int, recurrent: bool = True, projected_from: int = 0) -> None:
        super().__init__()
        self.state_size, self.recurrent = state_size, recurrent
        self.cell: nn.Module
        if recurrent:
            self.cell = nn.GRUCell(state_size, state_size, dtype=torch.float32, device="cpu")
        else:
            hidden = 3 * state_size
            self.cell = nn.Sequential(
                nn.Linear(state_size, hidden, dtype=torch.float32, device="cpu"),
                nn.GELU(),
                nn.Linear(hidden, state_size, dtype=torch.float32, device="cpu"),
            )
        self.projection = projection(projected_from, state_size) if projected_from else None

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        """The new state ``[tokens, p]`` from the projected input ``x`` and the ``state``, both ``[tokens, p]``."""
        return self.cell(x, state) if self.recurrent else self.cell(x)


def projection(dim: int, state_size: int) -> nn.Linear:
    """A linear map ``dim -> state_size`` into the state, whose output has its input's variance at the start."""
    linear = nn.Linear(dim, state_size, bias=False, dtype=torch.float32, device="cpu")
    nn.init.normal_(linear.weight, std=dim**-0.5)
    return linear


class RouterState(nn.Module):
    """One layer's step of the core.

    Args:
        core: shared by all layers, which is why it is no sub-module of this.
        dim: width of the layer's input.
        passing: ``full``; ``detached``: no gradient into the layers before; ``none``: each layer starts anew.

    Raises:
        ValueError: ``passing`` is none of these.
    """

    def __init__(self, core: RouterCore, dim: int, passing: str = "full") -> None:
        super().__init__()
        if passing not in PASSING:
            raise ValueError(f"passing must be one of {', '.join(PASSING)}, not {passing!r}")
        self._core, self.passing, self.state_size = (core,), passing, core.state_size
        self.projection = projection(dim, core.state_size) if core.projection is None else None

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        """This layer's state ``[..., p]`` from ``x [..., dim]`` and the state ``[..., p]`` of the layers before."""
        (core,) = self._core
        project = self.projection if self.projection is not None else core.projection
        assert project is not None
        if self.passing == "none":
            state = torch.zeros_like(state)
        elif self.passing == "detached":
            state = state.detach()
        return core(project(x).flatten(0, -2), state.flatten(0, -2)).view(state.shape)
