"""The transformer: Megatron-core's GPTModel from a layer spec, with PEER layers where the config says so."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from torch import nn

from peer_dist.config import Config
from peer_dist.kinds import KINDS
from peer_dist.layers.peer import PEER
from peer_dist.layers.recurrence import RouterCore
from peer_dist.layers.router import Router
from peer_dist.layers.sparse_layer import SparseLayer
from peer_dist.sharding import Shard

from .attention import SDPAttention
from .build_context import BuildContext, layer_seed
from .cross_entropy import cross_entropy
from .feed_forward import INIT_STD, SparseMLP, sparse_mlps
from .fused import fuses_weight_gradients
from .gradients import finalize_gradients
from .moe import CoarseMoE
from .norm import RMSNorm
from .parallel import Parallel
from .rotation import RotatedAttention


class _Layer(TransformerLayer):
    """A layer that draws its weights from a seed of its own, so that they do not depend on the stage it is on.

    With a ``state_size`` what goes from layer to layer, through recomputation and from stage to stage, is
    ``[s, b, hidden_size + state_size]``: the routers' state travels behind the hidden one. Before the first layer there
    is none.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        *args: Any,
        seed: int,
        state_size: int,
        **kwargs: Any,
    ) -> None:
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reset CUDA's too
        if getattr(submodules.mlp.submodules, "activation_func", None) is not None:
            config = copy.copy(config)
            config.use_te_activation_func = True  # the spec's, whoever's it is: it takes both halves of a gated unit
        super().__init__(config, submodules, *args, **kwargs)
        self.state_size = state_size

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        if not self.state_size:
            return super().forward(hidden_states, *args, **kwargs)
        width = self.config.hidden_size
        hidden, state = hidden_states[..., :width], hidden_states[..., width:]
        if not state.shape[-1]:
            state = hidden.new_zeros(*hidden.shape[:-1], self.state_size)
        if isinstance(self.mlp, SparseMLP):
            self.mlp.state = state
        hidden, context = super().forward(hidden, *args, **kwargs)
        if isinstance(self.mlp, SparseMLP) and self.mlp.state is not None:
            state, self.mlp.state = self.mlp.state, None
        return torch.cat([hidden, state], -1), context


class _FinalNorm(RMSNorm):
    """The routers' state ends here."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x[..., : len(self.weight)])


class _Model(GPTModel):
    """A GPTModel with a cross-entropy of our own: Megatron's holds all logits in float32 besides."""

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Losses ``[b, s]`` of ``labels [b, s]``, from ``logits [s, b, words]`` of this rank, which are used up."""
        return cross_entropy(logits, labels.t().contiguous(), self.pg_collection.tp).t().contiguous()


def _transformer_config(config: Config, parallel: Parallel, dtype: torch.dtype) -> TransformerConfig:
    model = config.model
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.query_groups,
        ffn_hidden_size=model.ffn_hidden_size,
        gated_linear_unit=model.ffn_activation == "swiglu",
        activation_func=F.silu if model.ffn_activation == "swiglu" else F.gelu,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        add_bias_linear=False,
        hidden_dropout=model.dropout,
        attention_dropout=model.dropout,
        attention_softmax_in_fp32=True,
        init_method_std=INIT_STD,
        # Whole matrices drawn on the CPU and then cut: the same weights in every layout and on every device.
        use_cpu_initialization=True,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Expert parallelism is not named here: TransformerConfig refuses it without its own MoE layers.
        tensor_model_parallel_size=parallel.tensor_size,
        pipeline_model_parallel_size=parallel.pipeline_size,
        virtual_pipeline_model_parallel_size=(
            parallel.virtual_pipeline_size if parallel.virtual_pipeline_size > 1 else None
        ),
        sequence_parallel=config.parallel.sequence,
        recompute_granularity="full" if config.train.recompute_layers else None,
        recompute_method="block" if config.train.recompute_layers else None,
        recompute_num_layers=config.train.recompute_layers or None,
        # The schedule must not divide the loss: the caller knows the step's number of tokens.
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=fuses_weight_gradients(config, parallel.device),
        deallocate_pipeline_outputs=False,  # wrong with overlapped sends
        batch_p2p_comm=config.parallel.batch_p2p,
        batch_p2p_sync=False,  # what streams wait for, hosts need not
        finalize_model_grads_func=finalize_gradients,
        cuda_graph_scope=[],  # the default's deprecation warning
    )


def _layer_spec(context: BuildContext, number: int) -> ModuleSpec:
    return ModuleSpec(
        module=_Layer,
        params={
            "seed": context.seed(number) + 500_000,  # sparse layers take some of the first
            "state_size": 0 if context.core is None else context.core.state_size,
        },
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=RotatedAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=SDPAttention,
                    linear_proj=RowParallelLinear,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=KINDS[context.config.model.mlp_kinds[number - 1]].build(context, number),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def build_model(config: Config, parallel: Parallel, vocab_size: int, dtype: torch.dtype) -> nn.ModuleList:
    """This rank's part of the model, on its device, in training mode: a GPTModel, or one per virtual stage.

    Weights depend on ``config.train.seed`` only: not on the layout, and not on random numbers drawn before;
    torch's random state is left as it was. On the meta device there are none, only their shapes.

    Args:
        config: the run; ``model``, the layers' sections, ``parallel``, ``table_optimizer.lazy`` and ``train`` are read.
        parallel: from :meth:`Parallel.initialize`.
        vocab_size: rows of the embedding, padding included; a multiple of the tensor-parallel size.
        dtype: of parameters and activations, float32 or bfloat16 (float64 in tests).
    """
    megatron = _transformer_config(config, parallel, dtype)
    pools: dict[int, PEER] = {}
    chunks = []
    # Megatron names no device where it makes weights on the CPU, to move them: those of a large model on meta would
    # not fit
    made_on = torch.device("meta" if parallel.device.type == "meta" else "cpu")
    with torch.random.fork_rng(devices=[]), made_on:
        for number in range(parallel.virtual_pipeline_size):
            context = BuildContext(config, parallel, dtype, _router_core(config, parallel, number, dtype), pools)
            chunks.append(_build_chunk(megatron, context, number, vocab_size))
    return nn.ModuleList(chunks).to(parallel.device)


def _build_chunk(megatron: TransformerConfig, context: BuildContext, number: int, vocab_size: int) -> GPTModel:
    run, parallel = context.config, context.parallel
    virtual = number if parallel.virtual_pipeline_size > 1 else None
    first = get_transformer_layer_offset(megatron, virtual, parallel.pipeline_rank) + 1
    layers = get_num_layers_to_build(megatron, virtual, parallel.pipeline_rank)
    specs = [_layer_spec(context, layer) for layer in range(first, first + layers)]
    torch.default_generator.manual_seed(run.train.seed)
    model = _Model(
        config=megatron,
        transformer_layer_spec=TransformerBlockSubmodules(
            layer_specs=specs, layer_norm=RMSNorm if context.core is None else _FinalNorm
        ),
        vocab_size=vocab_size,
        max_sequence_length=run.model.seq_length,
        pre_process=parallel.is_first_stage and number == 0,
        post_process=parallel.is_last_stage and number == parallel.virtual_pipeline_size - 1,
        share_embeddings_and_output_weights=run.model.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=run.model.rope_base,
        vp_stage=virtual,
    )
    if context.core is not None:
        model.router_core = context.core
        model.config = copy.copy(megatron)  # whose hidden_size is what the schedule sends between stages
        model.config.hidden_size += context.core.state_size
    return model


def _router_core(config: Config, parallel: Parallel, chunk: int, dtype: torch.dtype) -> RouterCore | None:
    """A chunk's copy of what the routers of all layers share; the first stage's first counts as the parameter."""
    router = config.router
    if not config.has_router_core:
        return None
    torch.default_generator.manual_seed(layer_seed(config, 0))
    core = RouterCore(
        router.state_size, router.kind == "recurrent", config.model.hidden_size if router.shared_projector else 0
    ).to(dtype)
    for parameter in core.parameters():
        parameter.sequence_parallel = parallel.tensor_size > 1  # type: ignore[attr-defined]
        parameter.shared = not parallel.is_first_stage or chunk > 0  # type: ignore[attr-defined]
    return core


def chunks_of(model: nn.ModuleList) -> list[GPTModel]:
    """The GPTModels that :func:`build_model` made."""
    return list(model)


def sparse_layers(model: nn.ModuleList) -> dict[int, SparseLayer]:
    """This rank's layers that pick experts or values, in layer order, by their number in the whole model, from 1."""
    return {number: mlp.layer for number, mlp in sparse_mlps(model).items()}


def peer_layers(model: nn.ModuleList) -> dict[int, PEER]:
    """Those of :func:`sparse_layers` that are PEER layers."""
    return {number: layer for number, layer in sparse_layers(model).items() if isinstance(layer, PEER)}


def routers(model: nn.ModuleList) -> dict[int, Router]:
    """The routers of those of :func:`sparse_layers` that have coarse experts."""
    return {number: layer.router for number, layer in sparse_layers(model).items() if isinstance(layer, CoarseMoE)}


def shards_of(model: nn.ModuleList) -> dict[str, Shard]:
    """All that this rank owns of the model's sparse layers, by layer and name."""
    return {
        f"layer{number}.{name}": shard
        for number, layer in sparse_layers(model).items()
        for name, shard in layer.shards().items()
    }


def count_parameters(model: nn.ModuleList, parallel: Parallel) -> int:
    """Numbers in the whole model that are trained, shards left out. Collective."""
    owned = {id(shard.parameter) for shard in shards_of(model).values()}
    own = sum(
        parameter.numel() * (parallel.tensor_size if getattr(parameter, "tensor_model_parallel", False) else 1)
        for parameter in model.parameters()
        if id(parameter) not in owned and not getattr(parameter, "shared", False)
    )
    total = torch.tensor(own, dtype=torch.int64, device=parallel.device)
    dist.all_reduce(total, group=parallel.pipeline_group)
    return int(total)


def forward_logits(model: nn.ModuleList, tokens: torch.Tensor, documents: torch.Tensor | None = None) -> torch.Tensor:
    """Next-token logits ``[b, s, vocab]`` (padding rows included) of ``tokens: int64 [b, s]``.

    ``documents`` are from :func:`~peer_dist.megatron.documents.pack_documents`; None: each sequence is one. Needs the
    whole model on every rank (one pipeline stage). Gradients and dropout are the caller's.
    """
    (whole,) = chunks_of(model)
    return whole(tokens, None, documents, runtime_gather_output=True)


def token_losses(
    model: nn.ModuleList, tokens: torch.Tensor, labels: torch.Tensor, documents: torch.Tensor | None = None
) -> torch.Tensor:
    """Cross-entropy of every token: float32 ``[b, s]`` from ``tokens, labels: int64 [b, s]``.

    ``documents`` are as for :func:`forward_logits`.
    """
    (whole,) = chunks_of(model)
    return whole(tokens, None, documents, labels=labels).float()
