"""The tables' optimizers and the learning-rate schedule."""

from peer_dist.optim.schedule import learning_rate_factor
from peer_dist.optim.tables import TableOptimizer

__all__ = ["TableOptimizer", "learning_rate_factor"]
