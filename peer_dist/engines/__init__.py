"""Engines update a model's parameters: Megatron or DeepSpeed the dense ones, and shards beside them, by one norm."""

from peer_dist.engines.engine import MOMENTS, PARTS, DenseAdam, Engine, StepResult

__all__ = ["MOMENTS", "PARTS", "DenseAdam", "Engine", "StepResult"]
