"""The training loop, its checkpoints and its numbers."""

from peer_dist.training.trainer import Trainer, train

__all__ = ["Trainer", "train"]
