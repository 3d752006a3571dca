"""Optimizers of tables and experts, and the learning rate over a run."""

from peer_dist.optim.held_bytes import HeldBytes
from peer_dist.optim.learning_rate import learning_rate_factor
from peer_dist.optim.tables import TableOptimizer, TableRule

__all__ = ["HeldBytes", "TableOptimizer", "TableRule", "learning_rate_factor"]
