"""What layers have in common that route tokens to coarse experts, feed-forwards of their own behind a router."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeVar

from peer_dist.kinds.cost import FLOAT, Cost, Parts, Shape, matrix
from peer_dist.kinds.kind import Experts, Kind
from peer_dist.kinds.routing import logits_shapes, projector_shapes, router_cost
from peer_dist.kinds.section import Section

if TYPE_CHECKING:
    from peer_dist.config import Config

S = TypeVar("S", bound=Section)


class CoarseKind(Kind[S]):
    """A kind of layer with coarse experts."""

    sparse = True
    routed = True
    sizes = ("num_experts", "expert_hidden_size", "top_k")
    module = "moe"

    @abstractmethod
    def experts(self, config: Config) -> Experts:
        """The layer's experts."""

    @abstractmethod
    def expert_activations(self, config: Config) -> int:
        """Tensors as wide as an expert's hidden layer that a token's pass through it keeps."""

    def cost(self, config: Config) -> Parts:
        """The router, and ``top_k`` experts a token."""
        experts = self.experts(config)
        one = matrix(config.model.hidden_size, experts.outputs + experts.hidden)
        picked = Cost(experts.number * one.parameters, experts.top_k * one.active, experts.top_k * one.flops)
        return {**router_cost(config, experts.number), "experts": picked}

    def shapes(self, config: Config, tensor: int) -> Iterator[Shape]:
        """The router's parameters; those of experts are counted with them."""
        yield from projector_shapes(config)
        yield from logits_shapes(config, self.experts(config).number)

    def kept(self, config: Config, itemsize: int) -> tuple[float, float]:
        """A copy of a token for each of its experts; about six numbers in float32 a router's logit."""
        experts, d = self.experts(config), config.model.hidden_size
        copies = d + self.expert_activations(config) * experts.hidden
        kept = 6 * experts.number * FLOAT + experts.top_k * copies * itemsize
        return kept, experts.top_k * (2 * experts.hidden + d) * itemsize


def check_top_k(top_k: int, num_experts: int) -> None:
    """Refuse more experts a token than there are.

    Raises:
        ValueError: naming both keys.
    """
    if top_k > num_experts:
        raise ValueError(f"top_k ({top_k}) must be at most num_experts ({num_experts})")
