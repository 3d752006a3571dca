"""Coarse mixture of experts: Megatron-core's MoELayer behind a router of ours (Shazeer 2017; Switch, Fedus 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from peer_dist.kinds.coarse import CoarseKind, check_top_k
from peer_dist.kinds.dense import activation_outputs
from peer_dist.kinds.kind import Experts, Mode, NotCausal
from peer_dist.kinds.section import LARGEST, MOST_EXPERTS, Coefficient, Rate, Section, Size

if TYPE_CHECKING:
    from megatron.core.transformer import ModuleSpec

    from peer_dist.config import Config
    from peer_dist.export.peer_model import ExportedLayer
    from peer_dist.megatron.build_context import BuildContext


class MoESection(Section):
    """Coarse mixture-of-experts layers (model.mlp: moe): Megatron-core's MoELayer, without dropped tokens."""

    num_experts: int = Field(8, ge=2, le=MOST_EXPERTS, description="experts, each a feed-forward of its own")
    expert_hidden_size: Size | None = Field(None, description="hidden width; null: model.ffn_hidden_size")
    top_k: Size = Field(2, description="experts per token (expert_choice: on average)")
    routing: Literal["token_choice", "expert_choice"] = Field(
        "token_choice",
        description="who chooses whom; expert_choice (per sequence) lets later tokens change earlier ones: it is not "
        "causal, and its losses are no language model's",
    )
    score: Literal["softmax", "sigmoid"] = Field("softmax", description="router logit to score")
    normalize: bool = Field(
        True,
        description="gates add up to 1 over the experts chosen; false: the scores as they are (Switch, with top_k 1)",
    )
    balance_loss: Coefficient = Field(
        0.01, description="coefficient of the load-balance loss, over a forward pass of all ranks"
    )
    z_loss: Coefficient = Field(0.0, description="coefficient of the router's z-loss")
    expert_bias: bool = Field(False, description="balance by a bias on the scores (DeepSeek-V3); needs sigmoid")
    expert_bias_rate: Rate = Field(1e-3, description="change of that bias per step")

    @model_validator(mode="after")
    def _check(self) -> MoESection:
        by_tokens = self.routing == "token_choice"
        check_top_k(self.top_k, self.num_experts)
        if by_tokens and self.top_k == 1 and self.normalize:
            raise ValueError("normalize must be false with top_k 1: every gate would be 1 and the router learn nothing")
        if self.expert_bias and not by_tokens:
            raise ValueError("expert_bias must be false with routing expert_choice: its experts are balanced already")
        if self.expert_bias and self.score != "sigmoid":
            raise ValueError(f"expert_bias needs score sigmoid (got {self.score}): the bias is added to the scores")
        return self


class MoEKind(CoarseKind[MoESection]):
    """Mixtures of coarse experts, which are feed-forwards of the model's activation."""

    name = "moe"
    section = MoESection

    def experts(self, config: Config) -> Experts:
        """The experts; with expert choice, ``top_k`` a token on average."""
        moe, hidden = self.keys(config), self.size(config)["expert_hidden_size"]
        return Experts(moe.num_experts, moe.top_k, activation_outputs(config) * hidden, hidden)

    def expert_activations(self, config: Config) -> int:
        """As in a dense layer, and once more weighted."""
        return 4 if config.model.ffn_activation == "swiglu" else 3

    def size(self, config: Config) -> dict[str, int]:
        """The values of :attr:`sizes`; experts without a width of their own are as wide as a dense layer."""
        hidden = self.keys(config).expert_hidden_size or config.model.ffn_hidden_size
        return {**super().size(config), "expert_hidden_size": hidden}

    def not_causal(self, config: Config) -> NotCausal | None:
        """Experts that choose tokens look at all of a sequence."""
        if self.keys(config).routing == "token_choice":
            return None
        return NotCausal("its experts choose tokens", "moe.routing expert_choice", "token_choice")

    def free_sizes(self, config: Config, mode: Mode) -> list[tuple[str, Sequence[int]]]:
        """The experts' width; for equal parameters their number before it."""
        width: tuple[str, Sequence[int]] = (self.key("expert_hidden_size"), range(1, LARGEST))
        fewest = max(2, self.keys(config).top_k)
        return [(self.key("num_experts"), range(fewest, MOST_EXPERTS)), width] if mode == "params" else [width]

    def build(self, context: BuildContext, number: int) -> ModuleSpec:
        """Experts of Megatron's behind our router."""
        from peer_dist.megatron.feed_forward import CoarseMLP, sparse_spec
        from peer_dist.megatron.moe import moe

        return sparse_spec(CoarseMLP, context, number, build=moe)

    def exported(self) -> type[ExportedLayer]:
        """A mixture of experts."""
        from peer_dist.export.layers.moe import MoE

        return MoE
