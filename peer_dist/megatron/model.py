"""The transformer: Megatron-core's GPTModel from a layer spec, with PEER layers where the config says so."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
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

from peer_dist.config import Config
from peer_dist.config.schema import ModelConfig
from peer_dist.layers.peer import PEER, activation_second_moment

from .attention import SDPAttention
from .norm import RMSNorm
from .parallel import Parallel

INIT_STD = 0.02  # of every dense matrix; those that write to the residual stream have 1/sqrt(2 layers) of it


class PEERMLP(MegatronModule):
    """A PEER layer in the place of Megatron's MLP; the layer spec's ``params`` are PEER's arguments."""

    def __init__(self, config: TransformerConfig, submodules: Any = None, **peer: Any) -> None:
        super().__init__(config=config)
        self.peer = PEER(**peer)
        self.layer_number = 0

    def set_layer_number(self, layer_number: int) -> None:
        """Called by TransformerLayer with the layer's number in the whole model, from 1."""
        self.layer_number = layer_number

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        """``hidden: [s, b, d]`` to ``(output [s, b, d], no bias)``."""
        return self.peer(hidden), None


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
        sequence_parallel=config.parallel.sequence,
        # The schedule must not divide the loss: the caller knows the step's number of tokens.
        calculate_per_token_loss=True,
        # Off: needs apex's kernels; wrong on CPU; wrong with overlapped sends.
        gradient_accumulation_fusion=False,
        cross_entropy_loss_fusion=False,
        deallocate_pipeline_outputs=False,
        batch_p2p_comm=False,
        cuda_graph_scope=[],  # the default's deprecation warning
    )


def _peer_arguments(config: Config, parallel: Parallel, dtype: torch.dtype, layer_number: int) -> dict[str, Any]:
    return {
        "dim": config.model.hidden_size,
        **config.peer.model_dump(exclude={"table_dtype"}),
        "group": parallel.experts,
        "data_group": parallel.data_parallel_group,
        "output_std": dense_output_std(config.model),
        "table_dtype": getattr(torch, config.peer.table_dtype),
        "sparse_grad": config.table_optimizer.lazy,
        "seed": config.train.seed + 1_000_003 * layer_number,  # its own, so that no other layer moves it
        "device": parallel.device,
        "dtype": dtype,
    }


def _layer_spec(mlp: ModuleSpec) -> ModuleSpec:
    return ModuleSpec(
        module=TransformerLayer,
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


def build_model(config: Config, parallel: Parallel, vocab_size: int, dtype: torch.dtype) -> GPTModel:
    """This rank's part of the model, on its device, in training mode.

    Weights depend on ``config.train.seed`` only: not on the data- or expert-parallel layout, and not on
    random numbers drawn before; torch's random state is left as it was.

    Args:
        config: the run; ``model``, ``peer``, ``parallel.sequence``, ``table_optimizer.lazy`` and ``train.seed``
            are read.
        parallel: from :meth:`Parallel.initialize`.
        vocab_size: rows of the embedding, padding included; a multiple of the tensor-parallel size.
        dtype: of parameters and activations, float32 or bfloat16 (float64 in tests).
    """
    megatron = _transformer_config(config, parallel, dtype)
    dense = ModuleSpec(
        module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    )
    first = get_transformer_layer_offset(megatron, pp_rank=parallel.pipeline_rank)
    layers = [
        _layer_spec(
            ModuleSpec(module=PEERMLP, params=_peer_arguments(config, parallel, dtype, number + 1))
            if config.model.mlp_kinds[number] == "peer"
            else dense
        )
        for number in range(first, first + get_num_layers_to_build(megatron, pp_rank=parallel.pipeline_rank))
    ]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.train.seed)  # torch.manual_seed would reset CUDA's too
        model = GPTModel(
            config=megatron,
            transformer_layer_spec=TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm),
            vocab_size=vocab_size,
            max_sequence_length=config.model.seq_length,
            pre_process=parallel.is_first_stage,
            post_process=parallel.is_last_stage,
            share_embeddings_and_output_weights=config.model.tied_embeddings,
            position_embedding_type="rope",
        )
    return model.to(parallel.device)


def peer_layers(model: GPTModel) -> dict[int, PEER]:
    """This rank's PEER layers in layer order, by their number in the whole model, from 1."""
    mlps = [layer.mlp for layer in model.decoder.layers]
    return {mlp.layer_number: mlp.peer for mlp in mlps if isinstance(mlp, PEERMLP)}


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


def forward_logits(model: GPTModel, tokens: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Next-token logits ``[b, s, vocab]`` (padding rows included) of ``tokens: int64 [b, s]``.

    Needs the whole model on every rank (one pipeline stage). Gradients and dropout are the caller's.
    """
    return model(tokens, None, attention_mask, runtime_gather_output=True)


def token_losses(
    model: GPTModel, tokens: torch.Tensor, labels: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Cross-entropy of every token: float32 ``[b, s]`` from ``tokens, labels: int64 [b, s]``."""
    return model(tokens, None, attention_mask, labels=labels).float()
