"""What a run's model costs, which a budget is divided by."""

from __future__ import annotations

from dataclasses import dataclass

from peer_dist.config import Config


@dataclass(frozen=True)
class Cost:
    """Parameters, those of them that a token meets, and FLOPs of a token in training (forward and backward)."""

    parameters: int
    active_parameters: int
    train_flops_per_token: float


def cost_of(config: Config, vocab_size: int) -> Cost:
    """Estimated from the config: matrix products only, two FLOPs per multiply-add, backward twice the forward.

    Args:
        vocab_size: padded, as the model has it.
    """
    model, d = config.model, config.model.hidden_size
    matrices = 3 if model.ffn_activation == "swiglu" else 2
    total = active = flops = d * vocab_size
    total += 0 if model.tied_embeddings else d * vocab_size
    for kind in model.mlp_kinds:
        everything, met = {
            "dense": lambda: (matrices * d * model.ffn_hidden_size,) * 2,
            "peer": lambda: _retrieved(
                d, config.peer.num_experts, config.peer.heads, config.peer.top_k, config.peer.key_dim, 2
            ),
            "pkm": lambda: _retrieved(
                d, config.pkm.num_values, config.pkm.heads, config.pkm.top_k, config.pkm.key_dim, 1
            ),
            "moe": lambda: _routed(
                d,
                config.moe.num_experts,
                config.moe.top_k,
                config.moe.expert_hidden_size or model.ffn_hidden_size,
                matrices,
            ),
            "sigma_moe": lambda: _routed(
                d, config.sigma_moe.num_experts, config.sigma_moe.top_k, config.sigma_moe.expert_hidden_size, 2
            ),
        }[kind]()
        attention = 4 * d * d
        total, active = total + attention + everything, active + attention + met
        flops += attention + met + 2 * d * model.seq_length
    return Cost(int(total), int(active), 6.0 * flops)


def _retrieved(d: int, rows: int, heads: int, top_k: int, key_dim: int, tables: int) -> tuple[int, int]:
    root = int(rows**0.5)
    retrieval = d * heads * key_dim
    return retrieval + root * key_dim + tables * rows * d, (
        retrieval + heads * root * key_dim + tables * heads * top_k * d
    )


def _routed(d: int, experts: int, top_k: int, hidden: int, matrices: int) -> tuple[int, int]:
    return d * experts + experts * matrices * d * hidden, d * experts + top_k * matrices * d * hidden
