"""The training loop, its checkpoints and its numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peer_dist.training.trainer import Trainer, train

__all__ = ["Trainer", "train"]


def __getattr__(name: str) -> Any:
    # Late: the doctor needs this package's World, not Megatron and DeepSpeed.
    if name in __all__:
        from peer_dist.training import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
