"""The transformer: Megatron-core's GPTModel from a layer spec, with PEER layers where the config says so."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import MegatronModule, ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from torch import nn

from peer_dist.config import Config
from peer_dist.config.schema import ModelConfig
from peer_dist.layers.peer import PEER, activation_second_moment
from peer_dist.layers.routing import RoutedLayer

from .attention import SDPAttention
from .gradients import finalize_gradients
from .norm import RMSNorm
from .parallel import Parallel

TABLES = (".mlp.peer.down", ".mlp.peer.up")
INIT_STD = 0.02  # of every dense matrix; those that write to the residual stream have 1/sqrt(2 layers) of it


class PEERMLP(MegatronModule):
    """A PEER layer in the place of Megatron's MLP; the layer spec's ``params`` are PEER's arguments.

    The first layer of a pool puts itself into ``pools``, and later ones share its tables.

    Each tensor rank takes its share of the tokens, so that no expert is computed twice: under sequence parallelism
    those it has, else its slice of the sequence, gathered again afterwards.
    """

    def __init__(
        self, config: TransformerConfig, submodules: Any = None, *, pools: dict[int, PEER], pool: int, **peer: Any
    ) -> None:
        super().__init__(config=config)
        self.peer = PEER(**peer, tables_of=pools.get(pool))
        pools.setdefault(pool, self.peer)
        self.layer_number = 0
        self.splits_tokens = config.tensor_model_parallel_size > 1 and not config.sequence_parallel
        for name, parameter in self.peer.named_parameters():
            if name not in ("down", "up"):  # see RMSNorm
                parameter.sequence_parallel = config.tensor_model_parallel_size > 1  # type: ignore[attr-defined]

    def set_layer_number(self, layer_number: int) -> None:
        """Called by TransformerLayer with the layer's number in the whole model, from 1."""
        self.layer_number = layer_number

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        """``hidden: [s, b, d]`` to ``(output [s, b, d], no bias)``."""
        if not self.splits_tokens:
            return self.peer(hidden), None
        out = self.peer(scatter_to_sequence_parallel_region(hidden))
        # all ranks go on with all tokens, and so have the same gradient
        return gather_from_sequence_parallel_region(out, tensor_parallel_output_grad=False), None


class _Layer(TransformerLayer):
    """A layer that draws its weights from a seed of its own, so that they do not depend on the stage it is on."""

    def __init__(self, *args: Any, seed: int, **kwargs: Any) -> None:
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reset CUDA's too
        super().__init__(*args, **kwargs)


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


def _transformer_config(config: Config, parallel: Parallel, dtype: torch.dtype) -> TransformerConfig:
    model = config.model
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        ffn_hidden_size=model.ffn_hidden_size,
        gated_linear_unit=model.ffn_activation == "swiglu",
        activation_func=F.silu if model.ffn_activation == "swiglu" else F.gelu,
        normalization="RMSNorm",
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
        # Off: needs apex's kernels; wrong on CPU; wrong with overlapped sends.
        gradient_accumulation_fusion=False,
        cross_entropy_loss_fusion=False,
        deallocate_pipeline_outputs=False,
        batch_p2p_comm=config.parallel.batch_p2p,
        finalize_model_grads_func=finalize_gradients,
        cuda_graph_scope=[],  # the default's deprecation warning
    )


def _peer_arguments(config: Config, parallel: Parallel, dtype: torch.dtype, layer_number: int) -> dict[str, Any]:
    return {
        "dim": config.model.hidden_size,
        **config.peer.model_dump(exclude={"table_dtype", "layers_per_pool", "revive_interval"}),
        "group": parallel.experts,
        "data_group": parallel.token_group,
        "output_std": dense_output_std(config.model),
        "table_dtype": getattr(torch, config.peer.table_dtype),
        "sparse_grad": config.table_optimizer.lazy,
        "seed": _layer_seed(config, layer_number),
        "device": parallel.device,
        "dtype": dtype,
    }


def _layer_spec(mlp: ModuleSpec, seed: int) -> ModuleSpec:
    return ModuleSpec(
        module=_Layer,
        params={"seed": seed},
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=SDPAttention,
                    linear_proj=RowParallelLinear,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def build_model(config: Config, parallel: Parallel, vocab_size: int, dtype: torch.dtype) -> nn.ModuleList:
    """This rank's part of the model, on its device, in training mode: a GPTModel, or one per virtual stage.

    Weights depend on ``config.train.seed`` only: not on the layout, and not on random numbers drawn before;
    torch's random state is left as it was.

    Args:
        config: the run; ``model``, ``peer``, ``parallel``, ``table_optimizer.lazy`` and ``train`` are read.
        parallel: from :meth:`Parallel.initialize`.
        vocab_size: rows of the embedding, padding included; a multiple of the tensor-parallel size.
        dtype: of parameters and activations, float32 or bfloat16 (float64 in tests).
    """
    megatron = _transformer_config(config, parallel, dtype)
    pools: dict[int, PEER] = {}
    with torch.random.fork_rng(devices=[]):
        chunks = [
            _build_chunk(config, megatron, parallel, vocab_size, dtype, chunk, pools)
            for chunk in range(parallel.virtual_pipeline_size)
        ]
    return nn.ModuleList(chunks).to(parallel.device)


def _build_chunk(
    config: Config,
    megatron: TransformerConfig,
    parallel: Parallel,
    vocab_size: int,
    dtype: torch.dtype,
    chunk: int,
    pools: dict[int, PEER],
) -> GPTModel:
    dense = ModuleSpec(
        module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    )
    virtual = chunk if parallel.virtual_pipeline_size > 1 else None
    first = get_transformer_layer_offset(megatron, virtual, parallel.pipeline_rank)
    pool_of = {number + 1: pool for pool, layers in enumerate(config.peer_pools) for number in layers}
    layers = [
        _layer_spec(
            ModuleSpec(
                module=PEERMLP,
                params={
                    **_peer_arguments(config, parallel, dtype, number),
                    "pools": pools,
                    "pool": pool_of[number],
                },
            )
            if config.model.mlp_kinds[number - 1] == "peer"
            else dense,
            _layer_seed(config, number) + 500_000,  # PEER takes some of the first
        )
        for number in range(first + 1, first + 1 + get_num_layers_to_build(megatron, virtual, parallel.pipeline_rank))
    ]
    torch.default_generator.manual_seed(config.train.seed)
    return GPTModel(
        config=megatron,
        transformer_layer_spec=TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm),
        vocab_size=vocab_size,
        max_sequence_length=config.model.seq_length,
        pre_process=parallel.is_first_stage and chunk == 0,
        post_process=parallel.is_last_stage and chunk == parallel.virtual_pipeline_size - 1,
        share_embeddings_and_output_weights=config.model.tied_embeddings,
        position_embedding_type="rope",
        vp_stage=virtual,
    )


def _layer_seed(config: Config, number: int) -> int:
    """Each layer's own, so that no other layer moves its weights."""
    return config.train.seed + 1_000_003 * number


def chunks_of(model: nn.ModuleList) -> list[GPTModel]:
    """The GPTModels that :func:`build_model` made."""
    return list(model)


def peer_layers(model: nn.ModuleList) -> dict[int, PEER]:
    """This rank's PEER layers in layer order, by their number in the whole model, from 1."""
    mlps = [layer.mlp for chunk in chunks_of(model) for layer in chunk.decoder.layers]
    return {mlp.layer_number: mlp.peer for mlp in mlps if isinstance(mlp, PEERMLP)}


def routed_layers(model: nn.ModuleList) -> dict[int, RoutedLayer]:
    """This rank's layers with experts, of whatever kind, by their number in the whole model, from 1."""
    layers = [layer for chunk in chunks_of(model) for layer in chunk.decoder.layers]
    return {
        layer.layer_number: part for layer in layers for part in layer.mlp.modules() if isinstance(part, RoutedLayer)
    }


def table_owners(model: nn.ModuleList) -> dict[int, PEER]:
    """Those of :func:`peer_layers` whose tables are not another layer's."""
    return {number: layer for number, layer in peer_layers(model).items() if layer.owns_tables}


def count_parameters(model: nn.ModuleList, parallel: Parallel) -> int:
    """Numbers in the whole model that are trained, tables left out. Collective."""
    own = sum(
        parameter.numel() * (parallel.tensor_size if getattr(parameter, "tensor_model_parallel", False) else 1)
        for name, parameter in model.named_parameters()
        if not name.endswith(TABLES) and not getattr(parameter, "shared", False)
    )
    total = torch.tensor(own, dtype=torch.int64, device=parallel.device)
    dist.all_reduce(total, group=parallel.pipeline_group)
    return int(total)


def segment_mask(tokens: torch.Tensor, eod: int) -> torch.Tensor | None:
    """Which positions must not see each other, where a sequence holds several documents.

    An ``eod`` token starts the segment of the document after it, and a token sees the earlier tokens of its
    own segment. Meant for tokens on the CPU, before their transfer: on a GPU it would wait for it.

    Args:
        tokens: int [b, s].
        eod: the id of the end-of-document token.

    Returns:
        bool [b, 1, s, s], True = masked out; None if plain causal attention does (no ``eod`` after the
        first position).
    """
    is_eod = tokens == eod
    if not bool(is_eod[:, 1:].any()):
        return None
    segment = is_eod.cumsum(1)
    future = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool, device=tokens.device).triu(1)
    return ((segment[:, :, None] != segment[:, None, :]) | future).unsqueeze(1)


def forward_logits(
    model: nn.ModuleList, tokens: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Next-token logits ``[b, s, vocab]`` (padding rows included) of ``tokens: int64 [b, s]``.

    Needs the whole model on every rank (one pipeline stage). Gradients and dropout are the caller's.
    """
    (whole,) = chunks_of(model)
    return whole(tokens, None, attention_mask, runtime_gather_output=True)


def token_losses(
    model: nn.ModuleList, tokens: torch.Tensor, labels: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Cross-entropy of every token: float32 ``[b, s]`` from ``tokens, labels: int64 [b, s]``."""
    (whole,) = chunks_of(model)
    return whole(tokens, None, attention_mask, labels=labels).float()
