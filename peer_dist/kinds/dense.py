"""The dense feed-forward: Megatron-core's MLP, described by keys of ``model``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from peer_dist.kinds.cost import Parts, Shape, matrix
from peer_dist.kinds.kind import Kind, Mode
from peer_dist.kinds.section import LARGEST

if TYPE_CHECKING:
    from megatron.core.transformer import ModuleSpec

    from peer_dist.config import Config
    from peer_dist.config.schema import ModelConfig
    from peer_dist.export.peer_model import ExportedLayer
    from peer_dist.megatron.build_context import BuildContext


class DenseKind(Kind[Any]):
    """Dense layers, whose matrices the tensor ranks share."""

    name = "dense"
    sizes = ("ffn_hidden_size",)

    def keys(self, config: Config) -> ModelConfig:
        """The section ``model``: a dense layer has none of its own."""
        return config.model

    def cost(self, config: Config) -> Parts:
        """Hidden units beyond ``ffn_top_k`` are set to 0, but multiplied all the same."""
        model = config.model
        d, hidden = model.hidden_size, model.ffn_hidden_size
        down = matrix(hidden, d)
        if model.ffn_top_k:
            down = replace(down, active=min(model.ffn_top_k, hidden) * d)
        return {"feed_forward": matrix(d, activation_outputs(config) * hidden) + down}

    def shapes(self, config: Config, tensor: int) -> Iterator[Shape]:
        """The two matrices, of whose hidden units each tensor rank has a part."""
        d, hidden = config.model.hidden_size, config.model.ffn_hidden_size
        yield activation_outputs(config) * hidden // tensor, d
        yield d, hidden // tensor

    def kept(self, config: Config, itemsize: int) -> tuple[float, float]:
        """SwiGLU keeps both halves and the product; GELU input and output."""
        hidden, swiglu = config.model.ffn_hidden_size * itemsize, config.model.ffn_activation == "swiglu"
        return (3 if swiglu else 2) * hidden, (4 if swiglu else 2) * hidden

    def check(self, config: Config) -> None:
        """Refuse the largest hidden units of a layer that tensor ranks divide."""
        tensor = config.parallel.tensor
        if tensor > 1 and config.model.ffn_top_k:
            raise ValueError(
                f"parallel.tensor must be 1 with model.ffn_top_k (got {tensor}): the largest are sought among all "
                "hidden units"
            )

    def free_sizes(self, config: Config, mode: Mode) -> list[tuple[str, Sequence[int]]]:
        """The width of all dense layers of the model, which tensor ranks divide."""
        tensor = config.parallel.tensor
        return [(self.key("ffn_hidden_size"), range(tensor, LARGEST, tensor))]

    def build(self, context: BuildContext, number: int) -> ModuleSpec:
        """Megatron's own MLP."""
        from peer_dist.megatron.feed_forward import dense_spec

        return dense_spec(context)

    def exported(self) -> type[ExportedLayer]:
        """A block of two matrices."""
        from peer_dist.export.layers.dense import MLP

        return MLP

    def stored_key(self, name: str, number: int) -> str:
        """The layer's matrices have their names in Megatron's checkpoints."""
        return f"decoder.layers.{number - 1}.mlp.linear_{name}"


def activation_outputs(config: Config) -> int:
    """Outputs of a feed-forward's first matrix for each hidden unit: with SwiGLU there is a gate's too."""
    return 2 if config.model.ffn_activation == "swiglu" else 1
