"""The only importer of deepspeed: ZeRO over the dense part, tables beside it."""

from peer_dist.zero.engine import ZeroEngine

__all__ = ["ZeroEngine"]
