"""Coarse mixture-of-experts layers (model.mlp moe and sigma_moe): Megatron's MoELayer behind routers of ours."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, get_cuda_rng_tracker
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.utils import init_method_normal
from torch import Tensor, nn

from peer_dist import kinds
from peer_dist.kernels.dense import swiglu
from peer_dist.layers.recomputation import is_recomputation
from peer_dist.layers.router import CosineLogits, LinearLogits, Router, Rule
from peer_dist.sharding import Shard, Traffic, release

from .repeatable import repeatable, varies, with_repeatable_backward

if TYPE_CHECKING:
    from .build_context import BuildContext


class CoarseMoE(MoELayer):
    """Experts that are feed-forward layers of their own, whole on their ranks; no token is dropped.

    Args:
        config: the experts', from :func:`_experts_config`; ``init_method`` draws their first matrices,
            ``output_layer_init_method`` the second ones.
        router: chooses among all experts.
        seed: an expert's weights depend on it and on the expert's number.
    """

    router: Router

    def __init__(self, config: TransformerConfig, router: Router, seed: int) -> None:
        activation = swiglu if config.gated_linear_unit else None  # None: the config's
        linear = MLPSubmodules(ColumnParallelLinear, activation, RowParallelLinear)
        super().__init__(
            config,
            MoESubmodules(
                experts=ModuleSpec(module=SequentialMLP, submodules=linear), router=lambda config, pg_collection: router
            ),
        )
        self.num_experts = router.num_experts
        self.traffic = Traffic()
        self.on_route: Callable[[Tensor, Tensor], None] | None = None
        self._experts = dict(zip(self.local_expert_indices, self.experts.local_experts, strict=True))
        for number, expert in self._experts.items():  # of which other ranks have others
            torch.default_generator.manual_seed(seed + number)
            config.init_method(expert.linear_fc1.weight)
            config.output_layer_init_method(expert.linear_fc2.weight)

    def shards(self) -> dict[str, Shard]:
        """This rank's experts, each matrix whole, numbered over all ranks."""
        return {
            f"expert{number}.{name}": Shard(linear.weight, tuple(linear.weight.shape), table=False)
            for number, expert in self._experts.items()
            for name, linear in (("fc1", expert.linear_fc1), ("fc2", expert.linear_fc2))
        }

    def release_shards(self) -> None:
        """Take the experts' matrices out of the module's parameters: engines must not see them."""
        for expert in self._experts.values():
            release(expert.linear_fc1, ("weight",))
            release(expert.linear_fc2, ("weight",))

    def forward(self, hidden: Tensor, routed: Tensor) -> Tensor:
        """``hidden [s, b, d]`` through the experts that ``routed [s, b, width]`` chooses, to ``[s, b, d]``.

        ``on_route`` is not called where experts choose: tokens have different numbers of them.
        """
        rule = self.router.rule
        # dropout's tracked stream, which differs between ranks that have different tokens
        draws = get_cuda_rng_tracker().fork() if rule.dropout and self.training else contextlib.nullcontext()
        with draws:
            gates, picked = self.router(routed)
        if self.on_route is not None and not rule.expert_choice and not is_recomputation():
            best = torch.where(picked, gates.detach(), -1).topk(rule.top_k, dim=-1)  # an expert chosen may weigh 0
            self.on_route(best.indices[:, None], best.values[:, None])
        # Two addends are the same in either order; more are not, nor their gradients.
        reordered = varies(hidden.device) and (rule.expert_choice or rule.top_k > 2)
        preprocess = partial(with_repeatable_backward, self.preprocess) if reordered else self.preprocess
        tokens, weights = self.dispatch(*preprocess(hidden, gates, picked))
        self._count(tokens, weights)
        output, _ = self.routed_experts_compute(tokens, weights)
        with repeatable() if reordered else contextlib.nullcontext():
            return self.postprocess(self.combine(output), None)

    def _count(self, tokens: Tensor, weights: Tensor) -> None:
        """What this pass sends to other ranks, tokens and weights out and results home, and the gradients after it."""
        splits, received = self.token_dispatcher.input_splits, self.token_dispatcher.output_splits
        if splits is None:
            return
        own = self.ep_group.rank()
        sent, home = (int(sum(counts) - counts[own]) for counts in (splits, received))
        row, weight = tokens.shape[-1] * tokens.element_size(), weights.element_size()
        self.traffic.sent.update(x=sent * row, gates=sent * weight, y=home * row)
        if torch.is_grad_enabled():
            self.traffic.sent.update(dy=sent * row, dx=home * row, dgates=home * weight)
        self.traffic.picks_received += len(tokens)


def _experts_config(
    config: TransformerConfig, context: BuildContext, num_experts: int, hidden: int, top_k: int, **changes: Any
) -> TransformerConfig:
    """The model's config as Megatron's MoELayer wants it; the model's own knows nothing of experts."""
    return dataclasses.replace(
        config,
        num_moe_experts=num_experts,
        ffn_hidden_size=hidden,
        moe_ffn_hidden_size=hidden,
        expert_model_parallel_size=context.parallel.expert_size,
        expert_tensor_parallel_size=1,
        moe_token_dispatcher_type="alltoall",
        moe_router_topk=top_k,
        moe_router_pre_softmax=True,  # or it would refuse a top_k of 1: the router is ours
        moe_router_load_balancing_type="none",
        moe_router_dtype="fp32",
        use_te_activation_func=changes.get("gated_linear_unit", config.gated_linear_unit),  # ours, of both halves
        perform_initialization=False,
        gradient_accumulation_fusion=False,  # Megatron's buffers have no gradients of experts
        **changes,
    )


def _router(context: BuildContext, num_experts: int, rule: Rule, std: Callable[[int], float]) -> Router:
    """Args: ``std``: of linear logits' weights, by the width of the router's input."""
    width, router = context.config.model.hidden_size, context.config.router
    logits: nn.Module
    if router.kind == "cosine":
        logits = CosineLogits(width, num_experts, router.state_size)
    else:
        width = width if context.core is None else context.core.state_size
        logits = LinearLogits(width, num_experts, std(width))
    return Router(
        logits.to(context.dtype), num_experts, rule, context.parallel.token_group, context.parallel.tensor_group
    )


def moe(config: TransformerConfig, context: BuildContext, seed: int) -> CoarseMoE:
    """Experts of the dense feed-forward's form and initialisation."""
    section = kinds.MOE.keys(context.config)
    chosen_by_experts = section.routing == "expert_choice"
    rule = Rule(
        section.top_k,
        section.score,
        section.normalize,
        chosen_by_experts,
        balance_loss=0.0 if chosen_by_experts else section.balance_loss,  # they are balanced
        z_loss=section.z_loss,
        bias_rate=section.expert_bias_rate if section.expert_bias else 0.0,
    )
    hidden = section.expert_hidden_size or context.config.model.ffn_hidden_size
    # a capacity has Megatron count the tokens sent, which are not top_k of each token
    changes = {"moe_expert_capacity_factor": 1.0} if chosen_by_experts else {}
    experts = _experts_config(config, context, section.num_experts, hidden, section.top_k, **changes)
    return CoarseMoE(experts, _router(context, section.num_experts, rule, lambda width: config.init_method_std), seed)


def sigma_moe(config: TransformerConfig, context: BuildContext, seed: int) -> CoarseMoE:
    """ReLU experts under sigmoid scores (Csordas 2023), initialised as one dense layer as wide as all of them."""
    section, model = kinds.SIGMA_MOE.keys(context.config), context.config.model
    rule = Rule(
        section.top_k,
        "sigmoid",
        normalize=False,
        dropout=section.expert_dropout,
        entropy_loss=section.entropy_loss,
    )

    def std(width: int) -> float:
        return math.sqrt(2 / (width * model.num_layers))

    experts = _experts_config(
        config,
        context,
        section.num_experts,
        section.expert_hidden_size,
        section.top_k,
        gated_linear_unit=False,
        activation_func=F.relu,
        init_method=init_method_normal(std(model.hidden_size)),
        output_layer_init_method=init_method_normal(std(section.num_experts * section.expert_hidden_size)),
    )
    router = _router(context, section.num_experts, rule, std)
    if isinstance(router.logits, LinearLogits):
        router.logits.equalize()
    return CoarseMoE(experts, router, seed)
