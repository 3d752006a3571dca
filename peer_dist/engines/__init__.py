"""What updates a model's parameters: the dense ones by Megatron or DeepSpeed, shards beside them, under one norm."""

from peer_dist.engines.engine import MOMENTS, PARTS, DenseAdam, Engine, StepResult

__all__ = ["MOMENTS", "PARTS", "DenseAdam", "Engine", "StepResult"]
