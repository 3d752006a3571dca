"""One norm of all gradients, whatever their kind and however they are spread over ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from peer_dist.kernels import wide
from peer_dist.sharding.blocks import is_dtensor
from peer_dist.sharding.table_module import TableModule, layouts


@torch.no_grad()
def clip_grad_norm_(
    parameters: nn.Module | Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """:func:`torch.nn.utils.clip_grad_norm_` for models with tables that are spread over ranks.

    Every rank gets the norm of the whole gradient, and scales its part by the same factor. Tables count with all their
    shards, DTensors (of FSDP2, say) by their placements, and all else as what it is on every rank: average dense
    gradients, and divide those of tables, before. Sparse gradients are coalesced.

    Collective over the groups of the tables and DTensors: all of their ranks must call it, with the same parameters in
    the same order; a rank may have no gradient where others have one.

    Args:
        parameters: whose gradients are clipped, each once; of a module, all it has, released tables included.
        max_norm: of the clipped gradients.
        norm_type: p of the norm, above 0; may be ``inf``.
        error_if_nonfinite: raise if the norm is not finite, instead of scaling by it.
        foreach: as in torch, for dense gradients.

    Returns:
        The norm before clipping, a scalar in at least float32.

    Raises:
        ValueError: ``norm_type`` is not above 0, or a parameter is a part of FSDP1's.
        RuntimeError: the norm is not finite, with ``error_if_nonfinite``; on every rank.
    """
    norm_type = float(norm_type)
    if not norm_type > 0:
        raise ValueError(f"norm_type must be above 0, not {norm_type}")
    known, given = layouts(), _all_of(parameters)
    if any(getattr(parameter, "_fsdp_flattened", False) for parameter in given):
        raise ValueError(
            "the parameters of FullyShardedDataParallel (FSDP1) do not say which part of them this rank has: use "
            "fully_shard (FSDP2), or the wrapper's own clip_grad_norm_ where no tables are spread"
        )
    dense: list[Tensor] = []  # the same on every rank
    spread: dict[Any, tuple[list[dist.ProcessGroup], list[Tensor]]] = {}
    scaled: list[Tensor] = []
    device = given[0].device if given else torch.device("cpu")
    for parameter in given:
        groups = _groups_of(parameter, known)
        values = _values(parameter)
        scaled += values
        if groups:  # even without a gradient here: other ranks of the groups may have one
            key = (parameter.device, *groups)
            spread.setdefault(key, (groups, []))[1].extend(values)
        else:
            dense += values
    norms = [_norm(dense, norm_type, foreach, device)]
    for (on, *_), (groups, values) in spread.items():
        norm, other = _norm(values, norm_type, foreach, on), norms[0].to(on)
        # what is not finite on one rank alone, the others must know of too: else it would stop, and they wait for it
        norms.append(_norm_over(torch.where(other.isfinite(), norm, other), norm_type, groups))
    # of the parameters' dtype: a rank may lack the gradients that others have
    total = torch.linalg.vector_norm(torch.stack([norm.to(device, wide(*given)) for norm in norms]), norm_type)
    if error_if_nonfinite and not bool(torch.isfinite(total)):
        raise RuntimeError(f"the norm of order {norm_type} of the gradients is not finite, so they cannot be clipped")
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for on in {value.device for value in scaled}:
        torch._foreach_mul_([value for value in scaled if value.device == on], factor.to(on))
    return total


def _all_of(parameters: nn.Module | Tensor | Iterable[Tensor]) -> list[Tensor]:
    if isinstance(parameters, nn.Module):
        tables = [
            table
            for module in parameters.modules()
            if isinstance(module, TableModule)
            for table in module.tables().values()
        ]
        parameters = [*parameters.parameters(), *tables]
    elif isinstance(parameters, Tensor):
        parameters = [parameters]
    return list({id(parameter): parameter for parameter in parameters}.values())


def _groups_of(parameter: Tensor, known: dict[int, Any]) -> list[dist.ProcessGroup]:
    """The groups over which the norms of the ranks' parts add up; none of what each rank has as a whole."""
    if id(parameter) in known:
        return [known[id(parameter)].groups.domain]
    if is_dtensor(parameter):
        mesh = parameter.device_mesh
        return [mesh.get_group(dim) for dim, place in enumerate(parameter.placements) if not place.is_replicate()]
    return []


def _values(parameter: Tensor) -> list[Tensor]:
    """The memory of a parameter's gradient on this rank, of which each number is one of the gradient's."""
    grad = parameter.grad
    if grad is None:
        return []
    if is_dtensor(grad):
        assert is_dtensor(parameter)
        if grad.placements != parameter.placements:  # sums that are still to be made, say
            grad = parameter.grad = grad.redistribute(placements=parameter.placements)
        return [grad.to_local()]
    if grad.layout == torch.sparse_coo:
        if not grad.is_coalesced():
            grad = parameter.grad = grad.coalesce()
        return [grad._values()]
    return [grad]


def _norm(values: list[Tensor], norm_type: float, foreach: bool | None, device: torch.device) -> Tensor:
    """In at least float32, which torch's is not for gradients of fewer bits."""
    values = [value for value in values if value.numel()]
    if not values:
        return torch.zeros((), dtype=torch.float32, device=device)
    half = [value for value in values if value.dtype.itemsize < 4]
    norms = [torch.linalg.vector_norm(value, norm_type, dtype=torch.float32) for value in half]
    if len(half) < len(values):
        norms.append(
            get_total_norm([value for value in values if value.dtype.itemsize >= 4], norm_type, False, foreach)
        )
    return torch.linalg.vector_norm(torch.stack([norm.to(device, wide(*norms)) for norm in norms]), norm_type)


def _norm_over(norm: Tensor, norm_type: float, groups: list[dist.ProcessGroup]) -> Tensor:
    """The norm, in float64, of the parts of all ranks of the groups, of which ``norm`` is this rank's."""
    if math.isinf(norm_type):
        total, op = norm.double(), dist.ReduceOp.MAX
    else:
        total, op = norm.double() ** norm_type, dist.ReduceOp.SUM
    for group in groups:
        dist.all_reduce(total, op, group=group)
    return total if math.isinf(norm_type) else total ** (1 / norm_type)
