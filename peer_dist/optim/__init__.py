"""Optimizers of dense parameters and tables, one global norm over both, and the learning-rate schedule."""

from peer_dist.optim.engine import MOMENTS, PARTS, DenseAdam, Engine, StepResult
from peer_dist.optim.memory import Memory
from peer_dist.optim.schedule import learning_rate_factor
from peer_dist.optim.tables import TableOptimizer

__all__ = ["MOMENTS", "PARTS", "DenseAdam", "Engine", "Memory", "StepResult", "TableOptimizer", "learning_rate_factor"]
