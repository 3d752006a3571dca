"""How weights are drawn: the same numbers whatever their dtype, and however the parameters are spread over ranks."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from peer_dist.sharding.blocks import is_dtensor


class Drawn:
    """The ``reset_parameters`` of a linear map inside a layer, which draws what the layer drew last: N(0, std^2).

    In the place of torch's own, so that a loop over all modules leaves the layer's own weights.

    Args:
        linear: whose method this becomes; it has no bias.
        offset: added to the layer's seed.
        after: shape of what the same generator draws before.
    """

    def __init__(self, linear: nn.Linear, offset: int, after: tuple[int, ...]) -> None:
        self.linear, self.offset, self.after = linear, offset, after
        self.drawn: tuple[int, float] | None = None
        """The layer's seed and the standard deviation; None until the layer draws."""

    def __call__(self) -> None:
        """Draw the weights again."""
        if self.drawn is None or not has_numbers(self.linear.weight):
            return
        seed, std = self.drawn
        generator = torch.Generator().manual_seed(seed + self.offset)
        if self.after:
            _normal(self.after, std, generator)
        write(self.linear.weight, _normal(tuple(self.linear.weight.shape), std, generator))


def draws(linear: nn.Linear, offset: int, after: tuple[int, ...] = ()) -> nn.Linear:
    """``linear`` with :class:`Drawn` for its ``reset_parameters``."""
    linear.reset_parameters = Drawn(linear, offset, after)  # type: ignore[method-assign]
    return linear


def redraw(module: nn.Module | None, seed: int, std: float) -> None:
    """Draw the weights of a module by :func:`draws`; what was put into its place, an adapter say, is left alone."""
    reset = getattr(module, "reset_parameters", None)
    if isinstance(reset, Drawn):
        reset.drawn = seed, std
        reset()


def has_numbers(parameter: Tensor) -> bool:
    """Whether a parameter is more than its shape: not on ``meta``, nor one of torch's fake tensors."""
    fakes = sys.modules.get("torch._subclasses.fake_tensor")
    return not parameter.is_meta and not (fakes is not None and isinstance(parameter, fakes.FakeTensor))


def _normal(shape: tuple[int, ...], std: float, generator: torch.Generator) -> Tensor:
    # on the CPU and in float32 whatever the parameter is: GPUs of another model would draw other numbers
    return torch.empty(shape, dtype=torch.float32, device="cpu").normal_(0, std, generator=generator)


@torch.no_grad()
def write(parameter: Tensor, values: Tensor) -> None:
    """Copy ``values``, of the whole parameter's shape, into it; into this rank's part if it is a ``DTensor``."""
    local, offset = own_block(parameter)
    local.copy_(values[tuple(slice(begin, begin + size) for begin, size in zip(offset, local.shape))])


def own_block(parameter: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The part of a parameter that is here, and where in the whole it begins: all of it, but for a ``DTensor``."""
    if not is_dtensor(parameter):
        return parameter, (0,) * parameter.dim()
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return parameter.to_local(), tuple(offset)
