"""The layers: product keys, query norms, PEER, product-key memory, routers."""

from peer_dist.layers.peer import PEER, activation_second_moment
from peer_dist.layers.peer_pytorch import load_peer_pytorch
from peer_dist.layers.product_key_memory import ProductKeyMemory

__all__ = ["PEER", "ProductKeyMemory", "activation_second_moment", "load_peer_pytorch"]
