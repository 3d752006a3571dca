"""Modules with tables of which each rank has a block, and what the world sees of these: state dicts of DTensors.

The blocks are plain parameters, for kernels, engines and sparse gradients. Which parameters they are is looked up among
the modules that are alive, so that nothing is lost when a module is cast, moved, copied or loaded, all of which may put
other parameters into the places of the first ones.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peer_dist.kernels import huge_pages
from peer_dist.kernels.eight_bit import is_eight_bit, let_scales
from peer_dist.kernels.far import FarRows, Place, is_held
from peer_dist.kernels.pending import forget_sums
from peer_dist.sharding import optimizer_state, wrappers
from peer_dist.sharding.blocks import as_dtensor, block_of, is_dtensor
from peer_dist.sharding.grid import GridLayout
from peer_dist.sharding.held import blocks, flush, read_values, write_values

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

    Far tables, of a module with a :attr:`place`, stay there when the module moves; kernels meet them on its new device.
    Tables of eight bits are parameters of codes that autograd knows no gradients of, beside buffers ``NAME_scales``,
    which no cast changes; state dicts hold their values in bfloat16, and any values are loaded, rounded to the nearest.
    """

    table_names: ClassVar[tuple[str, ...]] = ()
    """Attributes that are tables, released ones included."""
    layout: GridLayout
    sparse_grad: bool = False
    """Whether the tables' gradients are sparse."""
    owns_tables: bool = True
    """Whether the tables are its own, rather than another module's."""
    place: Place | None = None
    """Where the tables' rows lie, if not on the module's device."""

    def tables(self) -> dict[str, nn.Parameter]:
        """The tables by name, those of another module that are shared with it and released ones included."""
        values = ((name, getattr(self, name, None)) for name in self.table_names)
        return {name: value for name, value in values if isinstance(value, nn.Parameter)}

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.table_names and (self.layout.spread or self.sparse_grad):
            if is_dtensor(value):  # so does fully_shard put its own into the parameter's place
                raise ValueError(wrappers.refusal("fully_shard", name, self))
            before = self._parameters.get(name)
            kept = before is not None and (self.place is not None or is_eight_bit(before))  # on meta too
            if kept and isinstance(value, nn.Parameter) and not (is_held(value) or value.is_meta):
                raise ValueError(
                    f"{name} of {type(self).__name__} lies elsewhere or has eight bits, and an ordinary parameter "
                    "cannot take its place, as from_pretrained of transformers lets it: build the layer, and load "
                    "values with load_state_dict"
                )
            self._watch()
        super().__setattr__(name, value)

    @property
    def held(self) -> bool:
        """Whether the tables are more than tensors of numbers on the module's device."""
        return self.place is not None or any(map(is_eight_bit, self.tables().values()))

    def new_tables(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        """Make the tables, of ``shape`` and without values: where :attr:`place` says, or on the device."""
        for name in self.table_names:
            table = nn.Parameter(self._rows(shape, dtype, device), requires_grad=dtype.is_floating_point)
            setattr(self, name, table)
            if is_eight_bit(table):
                scales = self._rows(shape[:1], torch.float32, device).fill_(1.0)
                self.register_buffer(wrappers.scales_name(name), scales, persistent=False)
        self._bind()

    def _rows(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        if self.place is not None and device.type != "meta":
            return self.place.zeros(shape, dtype)
        return huge_pages(torch.empty(shape, dtype=dtype, device=device))

    def _bind(self) -> None:
        """Let each table know its scales, and what brings its rows to the kernels."""
        tables = self.tables()
        for name, table in tables.items():
            if is_eight_bit(table):
                let_scales(table, getattr(self, wrappers.scales_name(name)))
        if self.place is not None and not any(table.is_meta for table in tables.values()):
            FarRows(self.place, list(tables.values()))

    def __getstate__(self) -> dict[str, Any]:  # for a copy
        self.flush()
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:  # of a copy
        super().__setstate__(state)
        if self.layout.spread or self.sparse_grad:
            self._watch()
        if self.owns_tables:
            for table in self.tables().values():
                forget_sums(table)
        if self.held and self.owns_tables:
            if self.place is not None:
                for table in self.tables().values():
                    if not table.is_meta:
                        table.data = self._placed(table, table.dtype)
            self._bind()

    def flush(self) -> None:
        """Let the tables' memory be what their rows are, for whoever reads it or writes to it by himself: of far tables
        the newest rows may be near the kernels.
        """
        for table in self.tables().values():
            flush(table)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TableModule:
        if not self.held:
            super()._apply(fn, recurse)
            return self
        self.flush()
        parameters, buffers = dict(self._parameters), dict(self._buffers)
        hidden = {wrappers.scales_name(name) for name in self.table_names}
        if self.place is not None:
            hidden |= set(self.table_names)
        self._parameters = {name: value for name, value in parameters.items() if name not in hidden}
        self._buffers = {name: value for name, value in buffers.items() if name not in hidden}
        try:
            super()._apply(fn, recurse)
        finally:  # in the order of before, which optimizers number parameters by
            self._parameters = {name: self._parameters.get(name, value) for name, value in parameters.items()}
            self._buffers = {name: self._buffers.get(name, value) for name, value in buffers.items()}
        if self.owns_tables and self._follow(fn):
            self._bind()
        return self

    def _follow(self, fn: Callable[[Tensor], Tensor]) -> bool:
        """Let far tables have the dtype that ``fn`` gives them, and scales be where their tables are; whether anything
        is another now. What was released stays as it is.
        """
        device = self._own_device()
        before = self.place, [(id(table), table.dtype) for table in self.tables().values()]
        if self.place is not None:
            self.place = replace(self.place, device=device)
            for name, table in self.tables().items():
                if name not in self._parameters:
                    continue
                dtype = fn(torch.empty(0, dtype=table.dtype, device="cpu")).dtype
                if table.is_meta == (device.type == "meta"):
                    if dtype != table.dtype:
                        table.data = self._placed(table, dtype)
                    continue
                rows = self._rows(tuple(table.shape), dtype, device)
                self._parameters[name] = nn.Parameter(rows, requires_grad=table.requires_grad)
        for name, table in self.tables().items():
            scales = self._buffers.get(wrappers.scales_name(name))
            if scales is None:
                continue
            if scales.is_meta != table.is_meta:
                scales = self._rows(tuple(scales.shape), torch.float32, device).fill_(1.0)
            self._buffers[wrappers.scales_name(name)] = scales if self.place is not None else scales.to(table.device)
        after = self.place, [(id(table), table.dtype) for table in self.tables().values()]
        return self.place is None or before != after

    def _own_device(self) -> torch.device:
        """The device of what is no table."""
        own = (value for name, value in self._parameters.items() if name not in self.table_names and value is not None)
        return next(own).device

    def _placed(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """A copy of a table's memory in the place."""
        assert self.place is not None
        placed = self.place.zeros(tuple(rows.shape), dtype)
        for block in blocks(rows):
            placed[block] = rows.detach()[block].to(dtype)
        return placed

    def _watch(self) -> None:
        wrappers.install()
        if self.layout.spread:
            _with_shards.add(self)
            optimizer_state.install(layouts)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.flush()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key, table in self._tables_in(destination, prefix).items():
            if is_eight_bit(table) and not keep_vars:
                destination[key] = read_values(table, slice(0, len(table)))
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
        if self.held:
            self.flush()
            for key, table in self._tables_in(state_dict, prefix).items():
                values = state_dict[key]
                if isinstance(values, Tensor) and values.shape == table.shape and not table.is_meta:
                    for block in blocks(table) if values is not table else ():
                        write_values(table, block, values.detach()[block])
                    state_dict[key] = table  # in whose place no other may come
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _tables_in(self, state_dict: dict[str, Any], prefix: str) -> dict[str, nn.Parameter]:
        """The tables by their keys in a state dict that has them."""
        return {key: self.tables()[key[len(prefix) :]] for key in self._table_keys(prefix) if key in state_dict}

    def _table_keys(self, prefix: str) -> list[str]:
        return [prefix + name for name in self.table_names if name in self._parameters]
