"""The feed-forward part of a layer as a module of Megatron's, and its spec, for each kind of layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import MegatronModule, ModuleSpec, TransformerConfig
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from torch import Tensor, nn

from peer_dist import kinds
from peer_dist.config.schema import ModelConfig
from peer_dist.kernels.dense import swiglu
from peer_dist.kinds.product_keys import ProductKeyKind, ProductKeySection
from peer_dist.layers.peer import PEER, activation_second_moment
from peer_dist.layers.product_key_memory import ProductKeyMemory
from peer_dist.layers.recurrence import RouterState
from peer_dist.layers.sparse_layer import SparseLayer

from .build_context import BuildContext
from .moe import CoarseMoE

INIT_STD = 0.02  # of every dense matrix; those that write to the residual stream have 1/sqrt(2 layers) of it


class SparseMLP(MegatronModule):
    """A sparse layer in the place of Megatron's MLP.

    Attributes:
        state: of the routers, ``[s, b, state_size]``: set before the forward pass by the transformer layer, replaced in
            it by a layer that has a ``router_state``.
    """

    layer: SparseLayer
    """The layer, also a sub-module of this under the name of its kind."""

    def __init__(self, config: TransformerConfig, context: BuildContext, routed: bool) -> None:
        super().__init__(config=config)
        self.layer_number = 0
        self.state: Tensor | None = None
        self.router_state = None
        if routed and context.core is not None:
            self.router_state = RouterState(context.core, config.hidden_size, context.config.router.passing)
            self.router_state.to(context.dtype)
        self.splits_tokens = config.tensor_model_parallel_size > 1 and not config.sequence_parallel

    def on_own_tokens(self, layer: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        """``layer`` of ``[s, b, d]``, of which each tensor rank takes its share, so that nothing is computed twice:
        under sequence parallelism the tokens it has, else its slice of them all, gathered again afterwards.
        """
        if not self.splits_tokens:
            return layer(hidden)
        tokens = hidden.flatten(0, 1)
        missing = -len(tokens) % self.config.tensor_model_parallel_size
        if missing:  # not in training: a generated text's next token is one
            tokens = F.pad(tokens, (0, 0, 0, missing))
        out = layer(scatter_to_sequence_parallel_region(tokens))
        # all ranks go on with all tokens, and so have the same gradient
        out = gather_from_sequence_parallel_region(out, tensor_parallel_output_grad=False)
        return out[: hidden.shape[0] * hidden.shape[1]].view_as(hidden)

    def mark_replicated(self) -> None:
        """Each tensor rank sees its own tokens: the gradients of all that is not a shard add up (see RMSNorm)."""
        owned = {id(shard.parameter) for shard in self.layer.shards().values()}
        for parameter in self.parameters():
            if id(parameter) not in owned:
                parameter.sequence_parallel = self.config.tensor_model_parallel_size > 1

    def next_state(self, hidden: Tensor) -> Tensor | None:
        """This layer's router state, ``[s, b, state_size]``, which the layers after it see too."""
        if self.router_state is None:
            return None
        assert self.state is not None
        self.state = self.router_state(hidden, self.state)
        return self.state

    def set_layer_number(self, layer_number: int) -> None:
        """Called by TransformerLayer with the layer's number in the whole model, from 1."""
        self.layer_number = layer_number


class PEERMLP(SparseMLP):
    """A PEER layer; the first of a pool puts itself into the context's ``pools``, and later ones share its tables."""

    def __init__(
        self, config: TransformerConfig, submodules: Any = None, *, context: BuildContext, number: int
    ) -> None:
        super().__init__(config, context, routed=True)
        run, parallel, section = context.config, context.parallel, kinds.PEER.keys(context.config)
        (pool,) = (layers[0] for layers in run.pools if number - 1 in layers)
        self.peer = PEER(
            dim=run.model.hidden_size,
            **section.model_dump(exclude={"table_dtype", "table_cache_gb", "layers_per_pool", "revive_interval"}),
            group=parallel.experts,
            data_group=parallel.token_group,
            output_std=dense_output_std(run.model),
            table_dtype=table_dtype(section),
            table_cache_gb=cache_gb(context, kinds.PEER),
            sparse_grad=run.table_optimizer.lazy,
            tables_of=context.pools.get(pool),
            state_size=0 if context.core is None else context.core.state_size,
            seed=context.seed(number),
            device=parallel.device,
            dtype=context.dtype,
        )
        context.pools.setdefault(pool, self.peer)
        self.layer = self.peer
        self.mark_replicated()

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """``hidden: [s, b, d]`` to ``(output [s, b, d], no bias)``."""
        return self.on_own_tokens(lambda tokens: self.peer(tokens, self.next_state(tokens)), hidden), None


class PKMMLP(SparseMLP):
    """A product-key memory layer."""

    def __init__(
        self, config: TransformerConfig, submodules: Any = None, *, context: BuildContext, number: int
    ) -> None:
        super().__init__(config, context, routed=False)
        run, parallel, section = context.config, context.parallel, kinds.PKM.keys(context.config)
        self.pkm = ProductKeyMemory(
            dim=run.model.hidden_size,
            **section.model_dump(exclude={"table_dtype", "table_cache_gb"}),
            num_layers=run.model.num_layers,
            group=parallel.experts,
            data_group=parallel.token_group,
            table_dtype=table_dtype(section),
            table_cache_gb=cache_gb(context, kinds.PKM),
            sparse_grad=run.table_optimizer.lazy,
            seed=context.seed(number),
            device=parallel.device,
            dtype=context.dtype,
        )
        self.layer = self.pkm
        self.mark_replicated()

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """``hidden: [s, b, d]`` to ``(output [s, b, d], no bias)``."""
        return self.on_own_tokens(self.pkm, hidden), None


class CoarseMLP(SparseMLP):
    """Coarse experts behind a router.

    Args:
        build: :func:`peer_dist.megatron.moe.moe` or :func:`~peer_dist.megatron.moe.sigma_moe`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: Any = None,
        *,
        context: BuildContext,
        number: int,
        build: Callable[[TransformerConfig, BuildContext, int], CoarseMoE],
    ) -> None:
        super().__init__(config, context, routed=True)
        self.moe = build(config, context, context.seed(number))
        self.layer = self.moe
        self.mark_replicated()

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """``hidden: [s, b, d]`` to ``(output [s, b, d], no bias)``."""
        state = self.next_state(hidden)
        return self.moe(hidden, hidden if state is None else state), None


class TopKRowParallelLinear(RowParallelLinear):
    """The second matrix of a dense feed-forward, of whose hidden units a token keeps the ``top_k`` largest."""

    def __init__(self, *args: Any, top_k: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.top_k = top_k

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """``hidden: [s, b, ffn_hidden_size]``, all but each token's ``top_k`` largest set to 0, to ``[s, b, d]``."""
        kept = hidden.topk(min(self.top_k, hidden.shape[-1]), dim=-1)
        return super().forward(torch.zeros_like(hidden).scatter(-1, kept.indices, kept.values))


def table_dtype(section: ProductKeySection) -> torch.dtype:
    """The dtype of a layer's tables by its keys."""
    name = {"float8_e4m3": "float8_e4m3fn"}.get(section.table_dtype, section.table_dtype)
    return cast(torch.dtype, getattr(torch, name))


def cache_gb(context: BuildContext, kind: ProductKeyKind[Any]) -> float:
    """What each pool of tables of a kind has of the rank's memory for hot rows."""
    run, stage = context.config, context.parallel.pipeline_rank
    here = [pool for pool in run.pools if run.stage_of(pool[0]) == stage]
    return kind.keys(run).table_cache_gb / sum(run.kind_of(pool[0]) is kind for pool in here)


def dense_output_std(model: ModelConfig) -> float:
    """Standard deviation of the dense feed-forward's output at initialisation, for unit-variance input.

    A pre-activation is normal with standard deviation ``s = INIT_STD * sqrt(d)``. The mean square of a hidden
    unit is ``E[gelu(s z)^2]`` or, for SwiGLU, ``E[silu(s z)^2] * s^2``, by quadrature; the output adds
    ``ffn_hidden_size`` of them under weights of standard deviation ``INIT_STD / sqrt(2 layers)``.
    """
    s = INIT_STD * math.sqrt(model.hidden_size)
    if model.ffn_activation == "swiglu":
        mean_square = activation_second_moment(F.silu, s) * s**2
    else:
        mean_square = activation_second_moment(F.gelu, s)
    return INIT_STD / math.sqrt(2 * model.num_layers) * math.sqrt(model.ffn_hidden_size * mean_square)


def dense_spec(context: BuildContext) -> ModuleSpec:
    """The spec of a dense feed-forward."""
    top_k = context.config.model.ffn_top_k
    second = ModuleSpec(module=TopKRowParallelLinear, params={"top_k": top_k}) if top_k else RowParallelLinear
    activation = swiglu if context.config.model.ffn_activation == "swiglu" else None  # None: the config's
    return ModuleSpec(module=MLP, submodules=MLPSubmodules(ColumnParallelLinear, activation, second))


def sparse_spec(module: type[SparseMLP], context: BuildContext, number: int, **arguments: Any) -> ModuleSpec:
    """The spec of a sparse layer: ``module`` of layer ``number``, from 1, with more ``arguments``, if it takes some."""
    return ModuleSpec(module=module, params={"context": context, "number": number, **arguments})


def sparse_mlps(model: nn.Module) -> dict[int, SparseMLP]:
    """This rank's sparse layers in layer order, by their number in the whole model, from 1."""
    layers = [module for module in model.modules() if isinstance(module, SparseMLP)]
    return {module.layer_number: module for module in sorted(layers, key=lambda module: module.layer_number)}
