"""How routers see the layers before theirs: the section ``router``, and what it adds to a layer.

RMoE (Qiu 2024) has a GRU over layers, whose state is projected from each layer's input; XMoE (Chi 2022) has cosine
scores of low rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from peer_dist.kinds.cost import Cost, Parts, Shape, matrix, vectors
from peer_dist.kinds.section import Section, Size

if TYPE_CHECKING:
    from peer_dist.config import Config


class RouterSection(Section):
    """How routers see the layers before theirs (RMoE, Qiu 2024), in moe, sigma_moe and peer layers alike."""

    kind: Literal["linear", "recurrent", "mlp", "cosine"] = Field(
        "linear",
        description="linear: of the layer's input; recurrent: of a GRU's state over layers (peer: added to the query); "
        "mlp: as large as recurrent, without a state; cosine: low-rank cosine scores (XMoE)",
    )
    state_size: Size = Field(
        128, description="width of the state, of the perceptron in its place (mlp), and of cosine's projection"
    )
    passing: Literal["full", "detached", "none"] = Field(
        "full", description="the state goes from layer to layer with its gradient, without, or starts anew in each"
    )
    shared_projector: bool = Field(False, description="one projection into the state for all layers, or one per layer")

    @property
    def has_core(self) -> bool:
        """Whether the routers of all layers share a core: a GRU, or the perceptron in its place."""
        return self.kind in ("recurrent", "mlp")


def router_cost(config: Config, outputs: int) -> Parts:
    """Parameters and FLOPs of a layer's router, without biases but for the GRU's.

    Cosine scores are of projected inputs with expert embeddings of ``state_size``, over a learnt temperature.

    Args:
        outputs: logits of the router, or the width of the query that a map of the state is added to.
    """
    router, d = config.router, config.model.hidden_size
    p = router.state_size
    if router.kind == "linear":
        return {"router": matrix(d, outputs)}
    state = {} if router.kind == "cosine" else {"state": _core_cost(router)}
    temperature = vectors(1 if router.kind == "cosine" else 0)
    return {"projector": matrix(d, p), **state, "router": matrix(p, outputs) + temperature}


def _core_cost(router: RouterSection) -> Cost:
    """What routers share (:class:`peer_dist.layers.recurrence.RouterCore`): a GRU, of six matrices and two biases of
    ``3 * state_size``, or a perceptron with as many weights.
    """
    p = router.state_size
    if router.kind == "recurrent":
        return matrix(p, 6 * p) + vectors(6 * p)
    return matrix(p, 3 * p) + matrix(3 * p, p) + vectors(4 * p)


def core_shapes(config: Config) -> Iterator[Shape]:
    """Shapes of the core's parameters, with the projection that all layers share, if they do."""
    router, p = config.router, config.router.state_size
    if router.kind == "recurrent":
        yield from ((3 * p, p), (3 * p, p), (3 * p,), (3 * p,))
    else:
        yield from ((3 * p, p), (3 * p,), (p, 3 * p), (p,))
    if router.shared_projector:
        yield p, config.model.hidden_size


def projector_shapes(config: Config) -> Iterator[Shape]:
    """The shape of a layer's own projection into the state, where it has one."""
    if config.router.has_core and not config.router.shared_projector:
        yield config.router.state_size, config.model.hidden_size


def logits_shapes(config: Config, num_experts: int) -> Iterator[Shape]:
    """Shapes of a router's logits of ``num_experts`` experts."""
    router, d = config.router, config.model.hidden_size
    if router.kind == "cosine":
        yield from ((router.state_size, d), (num_experts, router.state_size), (1,))
    else:
        yield num_experts, router.state_size if router.has_core else d
