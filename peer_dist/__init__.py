"""peer_dist: distributed expert-parallel training of PEER, a Mixture of a Million Experts."""

from peer_dist.layers import PEER

__version__ = "0.1.0"
__all__ = ["PEER", "__version__"]
