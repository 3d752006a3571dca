"""Optimizers of tables and experts, and the learning rate over a run."""

from peer_dist.optim.memory import Memory
from peer_dist.optim.schedule import learning_rate_factor
from peer_dist.optim.tables import TableOptimizer

__all__ = ["Memory", "TableOptimizer", "learning_rate_factor"]
