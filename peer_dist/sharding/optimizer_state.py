"""State dicts of torch's optimizers, in which the states of sharded tables are DTensors as the tables are.

Nothing of an optimizer is known before its first step, so that is when it gets the hooks (torch's
``get_state_dict`` and ``set_state_dict`` make a step of a fresh optimizer themselves). What was loaded before then
becomes local at that step.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from peer_dist.sharding.blocks import as_dtensor, block_of
from peer_dist.sharding.grid import GridLayout
from peer_dist.tracing import untraced

_State = dict[str, Any]
_hooked: weakref.WeakSet[Optimizer] = weakref.WeakSet()
_layouts: Callable[[], dict[int, GridLayout]] = dict


@functools.cache
def install(layouts: Callable[[], dict[int, GridLayout]]) -> None:
    """Let all optimizers know of tables from now on.

    Args:
        layouts: gives those of all tables that are spread over ranks, by the ``id`` of their parameters.
    """
    global _layouts
    _layouts = layouts
    register_optimizer_step_pre_hook(_before_step)


@untraced
def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if optimizer in _hooked:
        return
    _refuse_zero_redundancy(optimizer)
    _hooked.add(optimizer)
    optimizer.register_state_dict_post_hook(_give_dtensors)
    optimizer.register_load_state_dict_pre_hook(_take_dtensors)
    layouts = _layouts()
    for parameter, state in optimizer.state.items():
        if id(parameter) in layouts:
            optimizer.state[parameter] = _changed(state, layouts[id(parameter)], block_of)


def _refuse_zero_redundancy(optimizer: Optimizer) -> None:
    """It lets one rank step each parameter, and broadcasts that rank's: of a table, other rows."""
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    if module is None or not isinstance(optimizer, module.ZeroRedundancyOptimizer):
        return
    layouts = _layouts()
    if any(id(parameter) in layouts for group in optimizer.param_groups for parameter in group["params"]):
        raise ValueError(
            "ZeroRedundancyOptimizer would give every rank one rank's block of a table spread over ranks: give the "
            "tables, peer_dist.exempt_tables(model), an optimizer of their own"
        )


def _give_dtensors(optimizer: Optimizer, state_dict: _State) -> _State:
    return _with_states(optimizer, state_dict, as_dtensor)


def _take_dtensors(optimizer: Optimizer, state_dict: _State) -> _State:
    return _with_states(optimizer, state_dict, block_of)


def _with_states(optimizer: Optimizer, state_dict: _State, change: Callable[..., Tensor]) -> _State:
    """A state dict of ``optimizer`` with another form of the states of sharded tables."""
    layouts, states = _layouts(), dict(state_dict["state"])
    for number, parameter in _numbered(optimizer, state_dict):
        if id(parameter) in layouts and number in states:
            states[number] = _changed(states[number], layouts[id(parameter)], change)
    return {**state_dict, "state": states}


def _numbered(optimizer: Optimizer, state_dict: _State) -> Iterator[tuple[Any, nn.Parameter]]:
    """What the state dict calls each parameter, and the parameter: both have them in the same order."""
    numbers, parameters = (
        chain.from_iterable(group["params"] for group in groups)
        for groups in (state_dict["param_groups"], optimizer.param_groups)
    )
    return zip(numbers, parameters)


def _changed(state: Any, layout: GridLayout, change: Callable[..., Tensor], name: str = "") -> Any:
    """A state with its tensors changed, those in dictionaries and lists of the optimizer's own included."""
    if isinstance(state, dict):
        return {key: _changed(value, layout, change, str(key)) for key, value in state.items()}
    if isinstance(state, list):
        return [_changed(value, layout, change, name) for value in state]
    if isinstance(state, Tensor) and state.dim() > 0:
        return change(state, layout, f"the optimizer's {name!r}")
    return state
