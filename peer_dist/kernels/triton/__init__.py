"""The kernels on GPUs, in Triton: a backend of :mod:`peer_dist.kernels`."""

from peer_dist.kernels.triton import dense, rows, updates
from peer_dist.kernels.triton.experts import (
    backward,
    dots,
    forward,
    mix,
    run_sums,
    sparse_table_grads,
    table_grad,
    table_grads,
)
from peer_dist.kernels.triton.launching import available
from peer_dist.kernels.triton.retrieval import search, search_backward

__all__ = [
    "available",
    "backward",
    "dense",
    "dots",
    "forward",
    "mix",
    "rows",
    "run_sums",
    "search",
    "search_backward",
    "sparse_table_grads",
    "table_grad",
    "table_grads",
    "updates",
]
