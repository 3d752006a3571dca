"""The routed layer: tokens and their picks in, the sum of the picked experts out, wherever these live."""

from __future__ import annotations

from torch import Tensor

from peer_dist.kernels import Picks, expert_mix
from peer_dist.sharding.exchange import Traffic, combine, dispatch, merge_picks, plan_exchange
from peer_dist.sharding.layout import GridLayout
from peer_dist.tracing import span


def routed_experts(
    x: Tensor,
    indices: Tensor,
    gates: Tensor,
    down: Tensor,
    up: Tensor,
    activation: str,
    layout: GridLayout,
    traffic: Traffic,
    sparse_grad: bool = False,
) -> Tensor:
    """``y_t = sum_i gate_i * act(x_t . down_{e_i}) * up_{e_i}`` with the tables spread over a grid of ranks.

    Every rank of the layout's domain must call it, with any number of tokens, none included.

    Args:
        x: ``[tokens, dim]``, this rank's tokens.
        indices: ``[tokens, picks]`` int64 global expert numbers.
        gates: ``[tokens, picks]``.
        down, up: ``[rows, columns]``, this rank's shard.
        traffic: adds up what was sent.
        sparse_grad: see :func:`peer_dist.kernels.expert_mix`.

    Returns:
        ``[tokens, dim]``. The gradients of ``down`` and ``up`` are summed over the tokens of all ranks of the
        domain: those of the SUM of the ranks' losses.
    """
    if layout.row_shards * layout.column_shards == 1:
        traffic.picks_received += indices.numel()
        return expert_mix(x, Picks.even(indices), gates.reshape(-1), down, up, activation, sparse_grad)
    with span("dispatch"):
        token, expert, gate = merge_picks(indices, gates)
        plan, order = plan_exchange(token, expert, x.shape[0], layout, traffic)
        gate = gate[order]
    x_owned, gate_owned = dispatch(x, gate, plan)
    y_owned = expert_mix(
        x_owned,
        plan.picks,
        gate_owned,
        down,
        up,
        activation,
        sparse_grad,
        plan.sum_columns if layout.column_shards > 1 else None,
    )
    return combine(y_owned, plan)
