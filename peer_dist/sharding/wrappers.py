"""Wrappers that synchronise parameters (DDP, FSDP) around tables that must not be: refused, and told to leave them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel

from peer_dist.kernels.eight_bit import is_eight_bit
from peer_dist.kernels.pending import asks_for_sums

if TYPE_CHECKING:
    from peer_dist.sharding.table_module import TableModule

_IGNORED = "_ddp_params_and_buffers_to_ignore"


def exempt_tables(model: nn.Module) -> list[nn.Parameter]:
    """Tell DDP to leave alone the tables that are spread over ranks: it neither broadcasts nor averages them.

    So it does with the scales of those of eight bits. They stay in ``parameters()`` and ``state_dict()``. Give it the
    very module that is then wrapped; names that torch was already told to ignore stay ignored. FSDP2 takes what is
    returned: ``fully_shard(model, ignored_params=set(tables))``.

    Returns:
        The tables, each once, released ones included. Their gradients are those of the SUM of the ranks' losses:
        divide them by the number of ranks where each loss is a mean. (Ranks outside of the tables' group that have
        copies of them must average these themselves.)
    """
    names: list[str] = list(getattr(model, _IGNORED, ()))
    tables: dict[int, nn.Parameter] = {}
    for prefix, module in _table_modules(model, remove_duplicate=False):
        if module.layout.spread:
            tables |= {id(table): table for table in module.tables().values()}
        elif module.layout.groups is None or not module.sparse_grad:
            continue
        # on one rank too, where an optimizer of their own may step what DDP broadcasts in each pass: buffers
        names += [name for table in module.tables() for name in _names_for_ddp(prefix, table)]
        names += [prefix + scales_name(name) for name, table in module.tables().items() if is_eight_bit(table)]
    # torch's wrapper of checkpointing hides its own name from named_parameters, by which DDP broadcasts
    names += [name for name, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in tables]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(dict.fromkeys(names)))
    return list(tables.values())


@functools.cache
def install() -> None:
    """Look at every module that is put into another from now on."""
    register_module_module_registration_hook(_check)


def refusal(wrapper: str, name: str, module: TableModule) -> str:
    """Why ``wrapper`` must not have the module's table ``name``, and what to do."""
    if not module.layout.spread and module.held:
        return (
            f"{wrapper} cannot keep {name} alike on the ranks, whose rows lie elsewhere or have eight bits: spread the "
            "table over the ranks with group=, or build the layer with table_memory device and a dtype of more bits"
        )
    if not module.layout.spread:
        return (
            f"{wrapper} cannot synchronise the sparse gradient of {name}: spread the table over the ranks with group=, "
            "or build the layer without sparse_grad"
        )
    way_out = {
        "DistributedDataParallel": "call peer_dist.exempt_tables(model) before wrapping that model",
        "fully_shard": "pass ignored_params=set(peer_dist.exempt_tables(model))",
        "FullyShardedDataParallel": "pass ignored_states=peer_dist.exempt_tables(model)",
    }[wrapper]
    return f"{wrapper} would take {name}, this rank's block of a table spread over ranks, for the whole: {way_out}"


def _table_modules(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, TableModule]]:
    from peer_dist.sharding.table_module import TableModule

    for name, module in model.named_modules(remove_duplicate=remove_duplicate):
        if isinstance(module, TableModule):
            yield f"{name}." if name else "", module


def scales_name(table: str) -> str:
    """What the buffer with the scales of a table of eight bits is called."""
    return f"{table}_scales"


def _names_for_ddp(prefix: str, table: str) -> list[str]:
    """What DDP calls a table: that of the wrapped module itself ``.down`` to average it, ``down`` to broadcast it."""
    return [prefix + table] if prefix else [table, f".{table}"]


def _check(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """Refuse a wrapper at the moment at which it takes the model."""
    if child is None:
        return
    if isinstance(parent, DistributedDataParallel):
        ignored = getattr(child, _IGNORED, ())
        for prefix, module in _table_modules(child):
            for table, parameter in module.tables().items():
                told = all(name in ignored for name in _names_for_ddp(prefix, table))
                mine = table in module._parameters and not told
                trained = parameter.requires_grad or asks_for_sums(parameter)
                if mine and (module.layout.spread or (module.sparse_grad and trained)):
                    raise ValueError(refusal("DistributedDataParallel", prefix + table, module))
    elif "torch.distributed.fsdp" in sys.modules:
        _check_fsdp1(parent)


def _check_fsdp1(parent: Any) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    from peer_dist.sharding.table_module import TableModule

    handle = getattr(parent, "_handle", None) if isinstance(parent, FullyShardedDataParallel) else None
    for info in handle.flat_param._param_infos if handle is not None else ():
        module, name = info.module, info.param_name
        is_table = isinstance(module, TableModule) and name in module.table_names
        if is_table and (module.layout.spread or module.sparse_grad):
            raise ValueError(refusal("FullyShardedDataParallel", name, module))
