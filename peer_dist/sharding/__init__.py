"""Expert tables over many ranks: who owns a row, what travels, and the routed layer on top."""

from peer_dist.sharding.dispatch import routed_experts, routed_values
from peer_dist.sharding.exchange import Traffic
from peer_dist.sharding.grid import ExpertGroups, GridLayout
from peer_dist.sharding.shard import Shard, release

__all__ = ["ExpertGroups", "GridLayout", "Shard", "Traffic", "release", "routed_experts", "routed_values"]
