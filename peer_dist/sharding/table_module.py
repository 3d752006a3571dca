"""Modules with tables of which each rank has a block, and what the world sees of these: state dicts of DTensors.

The blocks are plain parameters, for kernels, engines and sparse gradients. Which parameters they are is looked up among
the modules that are alive, so that nothing is lost when a module is cast, moved, copied or loaded, all of which may put
other parameters into the places of the first ones.
"""

from __future__ import annotations

import weakref
from typing import Any, ClassVar

from torch import Tensor, nn

from peer_dist.sharding import optimizer_state, wrappers
from peer_dist.sharding.blocks import as_dtensor, block_of, is_dtensor
from peer_dist.sharding.grid import GridLayout

_with_shards: weakref.WeakSet[TableModule] = weakref.WeakSet()


def layouts() -> dict[int, GridLayout]:
    """Of every parameter alive that is this rank's block of a table, by its ``id``."""
    return {id(table): module.layout for module in list(_with_shards) for table in module.tables().values()}


class TableModule(nn.Module):
    """A module with tables ``[rows, columns]``, each spread over :attr:`layout`, or whole if that is not spread.

    Of spread tables, whose every rank has its block as a plain parameter:

    - ``state_dict()`` has them as DTensors of the whole shape (but as they are with ``keep_vars``);
    - ``load_state_dict`` takes DTensors, whole tables, and this rank's blocks;
    - optimizers' state dicts are alike (:mod:`peer_dist.sharding.optimizer_state`);
    - wrappers that would take a block for the whole are refused (:mod:`peer_dist.sharding.wrappers`).
    """

    table_names: ClassVar[tuple[str, ...]] = ()
    """Attributes that are tables, released ones included."""
    layout: GridLayout
    sparse_grad: bool = False
    """Whether the tables' gradients are sparse."""

    def tables(self) -> dict[str, nn.Parameter]:
        """The tables by name, those of another module that are shared with it and released ones included."""
        values = ((name, getattr(self, name, None)) for name in self.table_names)
        return {name: value for name, value in values if isinstance(value, nn.Parameter)}

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.table_names and (self.layout.spread or self.sparse_grad):
            if is_dtensor(value):  # so does fully_shard put its own into the parameter's place
                raise ValueError(wrappers.refusal("fully_shard", name, self))
            self._watch()
        super().__setattr__(name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:  # of a copy
        super().__setstate__(state)
        if self.layout.spread or self.sparse_grad:
            self._watch()

    def _watch(self) -> None:
        wrappers.install()
        if self.layout.spread:
            _with_shards.add(self)
            optimizer_state.install(layouts)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.layout.spread and not keep_vars:
            for key in self._table_keys(prefix):
                if key in destination:
                    destination[key] = as_dtensor(destination[key], self.layout, key)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if self.layout.spread:
            for key in self._table_keys(prefix):
                if not isinstance(state_dict.get(key), Tensor):
                    continue
                try:
                    state_dict[key] = block_of(state_dict[key], self.layout, key)
                except ValueError as error:
                    error_msgs.append(str(error))
                    state_dict[key] = self._parameters[key[len(prefix) :]]  # neither missing nor wrong once more
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _table_keys(self, prefix: str) -> list[str]:
        return [prefix + name for name in self.table_names if name in self._parameters]
