"""Inputs of sharded layers, and their shards put together."""

import torch


def tokens_of(counts, dim=10):
    torch.manual_seed(5)
    return [torch.randn(sum(counts), dim, dtype=torch.float64) for _ in ("x", "dy")]


def whole_table(shards, columns):
    """Of a grid's shards in the domain's order."""
    return torch.cat([torch.cat(shards[first : first + columns], 1) for first in range(0, len(shards), columns)])


def assert_as_whole(results, want, columns, tolerance):
    """What the ranks of a grid had (output, dx, ddown, dup, the replicated gradients, evaluation's output), against the
    same of the whole layer.
    """
    for part in (0, 1, 2, 3, 5):
        parts = [result[part] for result in results]
        got = whole_table(parts, columns) if part in (2, 3) else torch.cat(parts)
        torch.testing.assert_close(got, want[part], rtol=tolerance, atol=tolerance)
    for result in results:
        assert result[4].keys() == want[4].keys()
        for key, grad in result[4].items():
            torch.testing.assert_close(grad, want[4][key], rtol=tolerance, atol=tolerance)


def dense_grads(result):
    return [part.to_dense() if part.is_sparse else part for part in result]
