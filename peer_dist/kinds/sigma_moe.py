"""sigma-MoE (Csordas 2023): a sigmoid router without competition, and ReLU experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from peer_dist.kinds.coarse import CoarseKind, check_top_k
from peer_dist.kinds.kind import Experts, Mode
from peer_dist.kinds.section import LARGEST, MOST_EXPERTS, Coefficient, Section, Size

if TYPE_CHECKING:
    from megatron.core.transformer import ModuleSpec

    from peer_dist.config import Config
    from peer_dist.export.peer_model import ExportedLayer
    from peer_dist.megatron.build_context import BuildContext


class SigmaMoESection(Section):
    """sigma-MoE layers (model.mlp: sigma_moe; Csordas 2023): sigmoid router, ReLU experts, no softmax."""

    num_experts: int = Field(16, ge=2, le=MOST_EXPERTS, description="experts N_E")
    expert_hidden_size: Size = Field(128, description="hidden width G of an expert")
    top_k: Size = Field(4, description="experts K per token")
    entropy_loss: Coefficient = Field(
        1e-3, description="gamma of the entropy regulariser, over a forward pass of all ranks"
    )
    expert_dropout: float = Field(0.0, ge=0, lt=1, description="delta: share of scores set to 0 in training")

    @model_validator(mode="after")
    def _check(self) -> SigmaMoESection:
        check_top_k(self.top_k, self.num_experts)
        return self


class SigmaMoEKind(CoarseKind[SigmaMoESection]):
    """sigma-MoE layers, whose experts are two matrices with ReLU between them."""

    name = "sigma_moe"
    section = SigmaMoESection

    def experts(self, config: Config) -> Experts:
        """Experts of two matrices without a gate."""
        sigma = self.keys(config)
        return Experts(sigma.num_experts, sigma.top_k, sigma.expert_hidden_size, sigma.expert_hidden_size)

    def expert_activations(self, config: Config) -> int:
        """ReLU keeps its output alone, and the weighted one is kept beside it."""
        return 2

    def free_sizes(self, config: Config, mode: Mode) -> list[tuple[str, Sequence[int]]]:
        """``top_k`` for equal FLOPs, the number of experts for equal parameters; then the experts' width."""
        sigma = self.keys(config)
        width: tuple[str, Sequence[int]] = (self.key("expert_hidden_size"), range(1, LARGEST))
        if mode == "params":
            return [(self.key("num_experts"), range(max(2, sigma.top_k), MOST_EXPERTS)), width]
        return [(self.key("top_k"), range(1, sigma.num_experts + 1)), width]

    def build(self, context: BuildContext, number: int) -> ModuleSpec:
        """Experts of Megatron's behind a router of sigmoid scores."""
        from peer_dist.megatron.feed_forward import CoarseMLP, sparse_spec
        from peer_dist.megatron.moe import sigma_moe

        return sparse_spec(CoarseMLP, context, number, build=sigma_moe)

    def exported(self) -> type[ExportedLayer]:
        """A σ-MoE layer."""
        from peer_dist.export.layers.moe import SigmaMoE

        return SigmaMoE
