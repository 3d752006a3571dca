"""The training loop, and what it shows and watches while it goes on."""

from peer_dist.training.trainer import Trainer, train

__all__ = ["Trainer", "train"]
