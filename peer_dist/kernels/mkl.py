"""The three products on CPU in float32 and float64, as sparse-dense products of MKL: no row is ever copied.

Serves float64, and float32 where there is no C compiler for the native backend.

The picks are the sparsity pattern of a ``[tokens, rows]`` matrix ``W``: the dots are ``x @ table.T`` sampled
at the pattern, the mix is ``W @ table`` and a table's gradient is ``W.T @ x``.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from peer_dist.kernels import reference
from peer_dist.kernels.picks import Picks

warnings.filterwarnings("ignore", message=".*Sparse CSR tensor support is in beta")


def available(*tensors: Tensor) -> bool:
    """Whether this backend can serve these tensors: on a CPU, all float32 or all float64."""
    dtypes = {tensor.dtype for tensor in tensors}
    return (
        torch.backends.mkl.is_available()
        and len(dtypes) == 1
        and dtypes <= {torch.float32, torch.float64}
        and all(tensor.device.type == "cpu" for tensor in tensors)
    )


def _csr(offsets: Tensor, columns: Tensor, values: Tensor, width: int) -> Tensor:
    size = (offsets.numel() - 1, width)
    return torch.sparse_csr_tensor(
        offsets, columns, values, size=size, dtype=values.dtype, device=values.device, check_invariants=False
    )


def dots(x: Tensor, table: Tensor, picks: Picks) -> Tensor:
    """See :func:`peer_dist.kernels.reference.dots`."""
    if picks.expert.numel() == 0:
        return x.new_empty(0)
    if picks.expert.numel() > x.shape[0] * table.shape[0]:  # torch refuses more entries than the matrix has
        return reference.dots(x, table, picks)
    pattern = _csr(picks.offsets, picks.expert, x.new_zeros(picks.expert.numel()), table.shape[0])
    return torch.sparse.sampled_addmm(pattern, x, table.t(), beta=0.0).values()


def mix(weight: Tensor, table: Tensor, picks: Picks, *, dtype: torch.dtype | None = None) -> Tensor:
    """See :func:`peer_dist.kernels.reference.mix`."""
    if picks.expert.numel() == 0:
        return table.new_zeros(picks.tokens, table.shape[1], dtype=dtype)
    return (_csr(picks.offsets, picks.expert, weight, table.shape[0]) @ table).to(dtype or table.dtype)


def table_grad(weight: Tensor, x: Tensor, picks: Picks, out: Tensor) -> None:
    """See :func:`peer_dist.kernels.reference.table_grad`."""
    if picks.expert.numel() == 0:
        return
    ordered = picks.by_expert
    offsets = torch.zeros(out.shape[0] + 1, dtype=torch.int32, device=out.device)
    torch.cumsum(torch.bincount(ordered.expert, minlength=out.shape[0]), 0, out=offsets[1:])
    out.addmm_(_csr(offsets, ordered.token, weight[ordered.pick], x.shape[0]), x)
