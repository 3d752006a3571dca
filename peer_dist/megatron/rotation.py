"""Self-attention for Megatron's layer specs, whose queries and keys are rotated as they are split off."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from peer_dist.kernels.dense import split_heads


class RotatedAttention(SelfAttention):
    """Megatron's self-attention with rotary embeddings of our own: Megatron's make a dozen passes over memory.

    With an inference context, whose positions begin where the kept keys end, Megatron rotates them.
    """

    _angles: Tensor | None = None

    def forward(self, *args: Any, rotary_pos_emb: Tensor | None, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As in Megatron; ``rotary_pos_emb``: float32 [s, 1, 1, channels]."""
        if kwargs.get("inference_context") is None and rotary_pos_emb is not None:
            self._angles, rotary_pos_emb = rotary_pos_emb[:, 0, 0], None
        return super().forward(*args, rotary_pos_emb=rotary_pos_emb, **kwargs)

    def get_query_key_value_tensors(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """Queries [s, b, heads, channels], keys and values [s, b, groups, channels] of this rank's heads."""
        angles, self._angles = self._angles, None
        if angles is None:
            return super().get_query_key_value_tensors(hidden_states, *args, **kwargs)
        mixed, _ = self.linear_qkv(hidden_states)
        return split_heads(mixed, angles, self.num_query_groups_per_partition)
