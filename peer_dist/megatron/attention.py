"""Core attention for Megatron's layer specs: torch's kernels, between documents too."""

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

from .documents import visible
from .repeatable import varies, with_repeatable_backward

# cuDNN's kernel, which torch would prefer on new GPUs, is not among them: nothing makes its gradients repeatable.
_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class SDPAttention(torch.nn.Module):
    """Softmax attention over the rank's heads.

    Used everywhere, TransformerEngine or not: torch has flash kernels as well. Where one takes them (on a GPU, 16
    bits), documents are its sequences, of any lengths, and nothing is computed between them. Elsewhere they become a
    mask.
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
            attention_mask: documents of sequences, from :func:`~peer_dist.megatron.documents.pack_documents`; or bool
                [b or 1, 1, sq, sk], True where a query must not see a key. None: causal, with as many queries as keys;
                or one query, which sees every key.

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
            mask = attention_mask
            if mask is not None and mask.dtype == torch.int32:
                if _flash_takes(query, key, value, dropout):
                    return _attend_packed(query, key, value, mask, dropout, self.scale)
                mask = visible(mask, query.shape[1], len(query))
            elif mask is not None:
                mask = ~mask
            context = _attend(
                query.permute(1, 2, 0, 3),
                key.permute(1, 2, 0, 3),
                value.permute(1, 2, 0, 3),
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None and len(query) > 1,
                scale=self.scale,
                enable_gqa=query.shape[2] != key.shape[2],
            )
        return context.permute(2, 0, 1, 3).flatten(2)


def _flash_takes(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether torch would take CUDA's flash kernel for these ``[s, b, heads or groups, channels]`` without a mask."""
    if query.device.type != "cuda" or query.shape[-1] % 8:  # torch pads channels for whole sequences only
        return False
    options: dict[str, Any] = {"dropout_p": dropout, "is_causal": True, "enable_gqa": query.shape[2] != key.shape[2]}
    with sdpa_kernel(_KERNELS):
        return _choice(*(x.permute(1, 2, 0, 3) for x in (query, key, value)), **options) == SDPBackend.FLASH_ATTENTION


def _attend_packed(
    query: Tensor, key: Tensor, value: Tensor, documents: Tensor, dropout: float, scale: float
) -> Tensor:
    """What :class:`SDPAttention` gives, by the flash kernel for sequences that lie end to end: here, the documents."""
    attend = functools.partial(
        _flash, offsets=documents[:, 0], longest=documents.shape[1], dropout=dropout, scale=scale
    )
    packed = (x.transpose(0, 1).flatten(0, 1) for x in (query, key, value))
    context = with_repeatable_backward(attend, *packed)
    return context.unflatten(0, (query.shape[1], -1)).transpose(0, 1).flatten(2)


def _flash(
    query: Tensor, key: Tensor, value: Tensor, *, offsets: Tensor, longest: int, dropout: float, scale: float
) -> Tensor:
    """Causal attention within stretches of ``query: [tokens, heads, channels]``, which begin at ``offsets``."""
    # the operator itself: torch.nn.attention.varlen is not in torch 2.6, and has no dropout
    return torch.ops.aten._flash_attention_forward(
        query, key, value, offsets, offsets, longest, longest, dropout, True, False, scale=scale
    )[0]


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
    return _choice(query, key, value, **options) != SDPBackend.MATH


def _choice(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> SDPBackend:
    """The kernel that torch would take for ``[b, heads, s, channels]``."""
    return SDPBackend(torch._fused_sdp_choice(query, key, value, **options))
