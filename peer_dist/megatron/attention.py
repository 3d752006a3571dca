"""Core attention for Megatron's layer specs: torch's scaled_dot_product_attention."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from peer_dist.tracing import span

from .repeatable import varies, with_repeatable_backward

# cuDNN's kernel, which torch would prefer on new GPUs, is not among them: nothing makes its gradients repeatable.
_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class SDPAttention(torch.nn.Module):
    """Softmax attention over the rank's heads.

    Used everywhere, TransformerEngine or not: its fused kernels take no [b, 1, s, s] mask, which documents
    that do not see each other need, while torch picks a flash kernel when there is no mask.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any = None,
        attention_type: str = "self",
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: Any = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__()
        channels = config.kv_channels or config.hidden_size // config.num_attention_heads
        self.scale = softmax_scale if softmax_scale is not None else 1 / math.sqrt(channels)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.sequence_parallel = config.sequence_parallel

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: [sq, b, heads, channels].
            key, value: [sk, b, groups, channels]; groups divide heads (grouped-query attention).
            attention_mask: bool [b or 1, 1, sq, sk], True where a query must not see a key. None: causal, with as many
                queries as keys; or one query, which sees every key.

        Returns:
            [sq, b, heads * channels].

        Raises:
            NotImplementedError: an attention bias or packed sequences were given.
        """
        if attention_bias is not None or packed_seq_params is not None:
            raise NotImplementedError("SDPAttention takes neither an attention bias nor packed sequences")
        dropout = self.dropout if self.training else 0.0
        # Without sequence parallelism the tensor ranks share the default stream, and their heads must not.
        forked = dropout > 0 and not self.sequence_parallel
        with span("attention"), get_cuda_rng_tracker().fork() if forked else contextlib.nullcontext():
            context = _attend(
                query.permute(1, 2, 0, 3),
                key.permute(1, 2, 0, 3),
                value.permute(1, 2, 0, 3),
                attn_mask=None if attention_mask is None else ~attention_mask,
                dropout_p=dropout,
                is_causal=attention_mask is None and len(query) > 1,
                scale=self.scale,
                enable_gqa=query.shape[2] != key.shape[2],
            )
        return context.permute(2, 0, 1, 3).flatten(2)


def _attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """torch's attention, with the same bits each time, gradients included."""
    if not varies(query.device):
        return F.scaled_dot_product_attention(query, key, value, **options)
    with sdpa_kernel(_KERNELS):
        if options["enable_gqa"] and not _fused(query, key, value, **options):
            # The fused kernel for masks and for float32 takes no groups; without one all scores would be held.
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
            options["enable_gqa"] = False
        attend: Callable[..., Tensor] = functools.partial(F.scaled_dot_product_attention, **options)
        if _fused(query, key, value, **options):
            return with_repeatable_backward(attend, query, key, value)
        return attend(query, key, value)  # plain products, which repeat, and which torch's flag would refuse


def _fused(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> bool:
    """Whether torch would take a fused kernel."""
    return torch._fused_sdp_choice(query, key, value, **options) != SDPBackend.MATH.value
