"""The only importer of deepspeed: ZeRO over the dense part, tables beside it."""

from peer_dist.zero.engine import StepResult, ZeroEngine

__all__ = ["StepResult", "ZeroEngine"]
