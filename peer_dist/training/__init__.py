"""The training loop, with its progress display, its profiler and its guards."""

from peer_dist.training.trainer import Trainer, train

__all__ = ["Trainer", "train"]
