"""The tables' optimizers and the learning-rate schedule."""

from peer_dist.optim.schedule import learning_rate_factor
from peer_dist.optim.tables import TableAdam

__all__ = ["TableAdam", "learning_rate_factor"]
