"""Weights of the package PEER-pytorch (tried with 0.2.2) in this package's layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from peer_dist.layers.peer import PEER


@torch.no_grad()
def load_peer_pytorch(
    state_dict: Mapping[str, Tensor],
    *,
    num_experts_per_head: int = 16,
    non_competing_scores: bool = True,
    product_key_topk: int | None = None,
    activation: str = "gelu",
) -> PEER:
    """The :class:`PEER` layer that computes what a ``PEER_pytorch.PEER`` does, with copies of its weights.

    Its keys are each head's own and its queries have no norm; dropout, which weights do not tell of, is left out.

    Args:
        state_dict: of that layer.
        num_experts_per_head, non_competing_scores, product_key_topk: as that layer was built with; the defaults are
            its own. With ``non_competing_scores`` it activates one expert per head, under a ReLU.
        activation: its ``activation``: ``gelu``, ``relu`` or ``silu``.

    Raises:
        ValueError: the weights are not that layer's, or it has a part that PEER has not: a norm of its input
            (``pre_rmsnorm``), experts of each head's own (``separate_embed_per_head``), or fewer sub-keys than picks
            (``product_key_topk``).
    """
    names = ("to_queries.0.weight", "keys", "weight_down_embed.weight", "weight_up_embed.weight")
    if "norm.gamma" in state_dict:
        raise ValueError(
            "norm.gamma: PEER does not normalise its input (pre_rmsnorm); leave this key out, and put an RMSNorm of "
            "weight gamma + 1 before the layer"
        )
    if different := sorted(set(names) ^ state_dict.keys()):
        raise ValueError(
            f"{', '.join(different)}: missing or unknown; the state_dict of one PEER_pytorch.PEER is needed"
        )
    queries, keys, down, up = (state_dict[name] for name in names)
    heads, n, _, half = keys.shape
    if len(down) != n * n:
        raise ValueError(
            f"weight_down_embed.weight: has {len(down)} experts for {n * n} keys; PEER's heads share their experts "
            "(separate_embed_per_head=False)"
        )
    top_k = 1 if non_competing_scores else num_experts_per_head
    if product_key_topk is not None and product_key_topk < top_k:
        raise ValueError(
            f"product_key_topk ({product_key_topk}) is less than num_experts_per_head ({top_k}): its picks are then "
            "not the best keys, which PEER's are"
        )
    layer = PEER(
        down.shape[1],
        n * n,
        heads,
        top_k,
        2 * half,
        query_norm="none",
        gate="relu" if non_competing_scores else "softmax",
        activation=activation,
        shared_keys=False,
        seed=0,
        device=down.device,
        dtype=down.dtype,
    )
    assert layer.query is not None
    layer.query.weight.copy_(queries.unflatten(0, (2, heads, half)).transpose(0, 1).flatten(0, 2))
    layer.keys.copy_(keys.transpose(1, 2))
    layer.down.copy_(down)
    layer.up.copy_(up)
    return layer
