"""Expert tables over many ranks: who owns a row, what travels, and the routed layer on top."""

from peer_dist.sharding.dispatch import routed_experts, routed_values
from peer_dist.sharding.exchange import Traffic
from peer_dist.sharding.gradients import clip_grad_norm_
from peer_dist.sharding.grid import ExpertGroups, GridLayout, agreed_seed
from peer_dist.sharding.shard import Shard, release
from peer_dist.sharding.table_module import TableModule
from peer_dist.sharding.wrappers import exempt_tables

__all__ = [
    "ExpertGroups",
    "GridLayout",
    "Shard",
    "TableModule",
    "Traffic",
    "agreed_seed",
    "clip_grad_norm_",
    "exempt_tables",
    "release",
    "routed_experts",
    "routed_values",
]
