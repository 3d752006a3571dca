"""Inputs of sharded layers, and their shards put together."""

import torch


def tokens_of(counts, dim=10):
    torch.manual_seed(5)
    return [torch.randn(sum(counts), dim, dtype=torch.float64) for _ in ("x", "dy")]


def whole_table(shards, columns):
    """Of a grid's shards in the domain's order."""
    return torch.cat([torch.cat(shards[first : first + columns], 1) for first in range(0, len(shards), columns)])


def dense_grads(result):
    return [part.to_dense() if part.is_sparse else part for part in result]
