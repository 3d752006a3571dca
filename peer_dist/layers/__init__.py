"""What a token meets: product keys, query networks, PEER, product-key memory."""

from peer_dist.layers.peer import PEER, activation_second_moment
from peer_dist.layers.peer_pytorch import load_peer_pytorch
from peer_dist.layers.product_key_memory import ProductKeyMemory

__all__ = ["PEER", "ProductKeyMemory", "activation_second_moment", "load_peer_pytorch"]
