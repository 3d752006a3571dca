"""The three products in plain PyTorch, for any device and dtype: what the faster backends must equal.

Rows are gathered in chunks, so that nothing of size ``[tokens, picks, dim]`` exists.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from peer_dist.kernels.picks import Picks

CHUNK_ELEMENTS = 1 << 22  # gathered table elements at a time: 16 MB in float32


def _wide(*tensors: Tensor) -> torch.dtype:
    """The dtype to accumulate in: at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _chunks(picks: Picks, dim: int) -> Iterator[slice]:
    step = max(1, CHUNK_ELEMENTS // max(1, dim))
    for start in range(0, picks.expert.numel(), step):
        yield slice(start, start + step)


def dots(x: Tensor, table: Tensor, picks: Picks) -> Tensor:
    """``x_t . table_e`` of each pick: ``[tokens, dim], [rows, dim] -> [picks]``, at least float32."""
    out = torch.empty(picks.expert.numel(), dtype=_wide(x, table), device=x.device)
    for part in _chunks(picks, table.shape[1]):
        rows, tokens = table[picks.expert[part]], x[picks.token[part]]
        out[part] = (rows.to(out.dtype) * tokens.to(out.dtype)).sum(-1)
    return out


def mix(weight: Tensor, table: Tensor, picks: Picks) -> Tensor:
    """``sum_i w_i table_{e_i}`` of each token: ``[picks], [rows, dim] -> [tokens, dim]``."""
    out = torch.zeros(picks.tokens, table.shape[1], dtype=_wide(weight, table), device=table.device)
    for part in _chunks(picks, table.shape[1]):
        rows = table[picks.expert[part]].to(out.dtype)
        out.index_add_(0, picks.token[part], rows * weight[part, None].to(out.dtype))
    return out


def table_grad(weight: Tensor, x: Tensor, picks: Picks, rows: int) -> Tensor:
    """``sum over picks of row e of w_i x_t``: ``[picks], [tokens, dim] -> [rows, dim]``."""
    out = torch.zeros(rows, x.shape[1], dtype=_wide(weight, x), device=x.device)
    for part in _chunks(picks, x.shape[1]):
        tokens = x[picks.token[part]].to(out.dtype)
        out.index_add_(0, picks.expert[part], tokens * weight[part, None].to(out.dtype))
    return out
