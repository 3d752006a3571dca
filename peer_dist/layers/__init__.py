"""What a token meets: product keys, query networks, PEER."""

from peer_dist.layers.peer import PEER, activation_second_moment

__all__ = ["PEER", "activation_second_moment"]
