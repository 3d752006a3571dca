"""Gradients of tables that autograd does not carry, because to write them out and read them again costs more than they.

Who asks for the sums (:func:`ask_for_sums`) finds on the table, after a backward pass, what its sparse gradient is the
sum of, and no gradient. Who lets a dense one grow (:func:`let_gradient_grow`) has the rows that were picked added to
where they are, from the second backward pass on. Where nobody asks, where hooks or
``torch.autograd.grad`` wait for it, or where a table meets autograd as another tensor (compiled, or detached by a
checkpoint), there is a gradient as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from peer_dist.kernels import updates
from peer_dist.kernels.eight_bit import gradient_dtype, is_eight_bit
from peer_dist.kernels.far import is_held
from peer_dist.kernels.picks import Picks
from peer_dist.kernels.rounding import Rounding


class PendingSums:
    """The gradients of one or two tables that the same picks read: of each row ``sum w_i x_t``, not taken yet.

    Args:
        backend: what makes gradients of them (:func:`peer_dist.kernels.backend`).
        sums: of each table the weights ``[picks]`` and ``[tokens, dim]``.
        picks: the rows that each token read.
        tables: ``[rows, dim]``, of one dtype, which gradients are rounded to.
    """

    def __init__(
        self, backend: Any, sums: Sequence[tuple[Tensor, Tensor]], picks: Picks, tables: Sequence[Tensor]
    ) -> None:
        self._backend, self._sums, self._picks, self._tables = backend, list(sums), picks, list(tables)
        self._versions = [tensor._version for tensor in self.tensors()]
        self.backward_pass: int = torch._C._current_graph_task_id()
        """Which one left them: others of the same one are what autograd would add up first."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()  # what is pickled along with a table

    def tensors(self) -> Iterator[Tensor]:
        """What is kept for the sums."""
        yield from (self._picks.offsets, self._picks.expert)
        for weight, x in self._sums:
            yield from (weight, x)

    def _check(self) -> None:
        if [tensor._version for tensor in self.tensors()] != self._versions:
            raise RuntimeError("what a table's gradient is to be summed of was written to after the backward pass")

    def _which(self, table: Tensor) -> int:
        return next(number for number, each in enumerate(self._tables) if each is table)

    @property
    def in_registers(self) -> bool:
        """Whether :meth:`squares` and :meth:`update` can be had: where Triton serves, of tables that are not held."""
        return not is_held(self._tables[0]) and all(
            hasattr(updates.backend(x, table), "update_runs") for (_, x), table in zip(self._sums, self._tables)
        )

    @cached_property
    def _runs(self) -> Any:
        self._check()
        return self._backend.run_sums(self._sums, self._picks, len(self._tables[0]))

    @cached_property
    def _squares(self) -> list[Tensor]:
        squares: list[Tensor] = updates.backend(self._sums[0][1]).run_squares(self._runs, self._tables[0].dtype)
        return squares

    def squares(self, table: Tensor) -> Tensor:
        """The sums of the squares of each row of a table's gradient, ``[rows]`` float32; 0 of rows without picks.

        Asks nothing of the device.
        """
        return self._squares[self._which(table)]

    def update(
        self,
        step: updates.Step,
        table: Tensor,
        moments: Mapping[str, Tensor],
        *,
        master: Tensor | None = None,
        rounding: Rounding | None = None,
    ) -> None:
        """:func:`~peer_dist.kernels.updates.update_rows` of the rows with picks, by the same sums. They are taken in
        registers: there is no gradient in memory, and nothing is asked of the device.
        """
        which, squares = self._which(table), self.squares(table)
        updates.backend(self._sums[which][1], table).update_runs(
            step, self._runs, which, squares, table, moments, master, rounding
        )
        torch.autograd.graph.increment_version(table)

    @cached_property
    def _gradients(self) -> tuple[Tensor, list[Tensor]]:
        self._check()
        table = self._tables[0]
        found: tuple[Tensor, list[Tensor]] = self._backend.sparse_table_grads(
            self._sums, self._picks, len(table), dtype=gradient_dtype(table)
        )
        return found

    def gradient(self, table: Tensor) -> tuple[Tensor, Tensor]:
        """A table's gradient, as other optimizers take it: its rows with picks, ``[touched]`` int64 ascending, and
        their gradients ``[touched, dim]`` in :func:`~peer_dist.kernels.eight_bit.gradient_dtype`. On a GPU it waits for
        their number.
        """
        rows, values = self._gradients
        return rows, values[self._which(table)]


def ask_for_sums(table: Tensor, arrived: Callable[[Tensor], None] | None = None) -> None:
    """Let backward passes leave the sums of a table's sparse gradient in :func:`pending_sums`.

    Args:
        arrived: called with the table after each that has.
    """
    table.pending_sums = []  # type: ignore[attr-defined]
    table.sums_arrived = arrived  # type: ignore[attr-defined]


def leave_sums(sums: PendingSums, tables: Sequence[Tensor]) -> None:
    """Leave them on these tables, all of which were asked for them."""
    for table in tables:
        table.pending_sums.append(sums)  # type: ignore[attr-defined]
    for table in tables:
        if table.sums_arrived is not None:  # type: ignore[attr-defined]
            table.sums_arrived(table)  # type: ignore[attr-defined]


def pending_sums(table: Tensor) -> list[PendingSums] | None:
    """What backward passes have left of a table, to be taken from this list; None where nobody asked for it."""
    return getattr(table, "pending_sums", None)


def place_for_sums(table: Tensor) -> list[PendingSums] | None:
    """Where the backward pass that is under way may leave sums; None where it owes a gradient."""
    places = pending_sums(table)
    return places if places is not None and _only_adds_up(table) else None


def let_gradient_grow(table: Tensor) -> None:
    """Let backward passes add to a table's dense gradient in place, once there is one, and hand none to autograd.

    A pass would else write a gradient of the whole table and read it again, for the few rows that its tokens picked.
    """
    table.gradient_grows = True  # type: ignore[attr-defined]


def gradient_that_grows(table: Tensor) -> Tensor | None:
    """The gradient that the backward pass under way may add to; None where there is none yet, or it owes one."""
    grad = table.grad if getattr(table, "gradient_grows", False) else None
    fits = grad is not None and not grad.is_sparse and grad.dtype == table.dtype and grad.is_contiguous()
    return grad if fits and _only_adds_up(table) else None


def asks_for_sums(table: Tensor) -> bool:
    """Whether the sums of a held table are to be left on it: somebody asked, and it is not frozen. Codes cannot say
    that they are; who is not to train them gives them to no optimizer.
    """
    return pending_sums(table) is not None and (table.requires_grad or is_eight_bit(table))


def edge_of(*tables: Tensor) -> Tensor | None:
    """What stands for held tables in autograd's graph, if their sums were asked for: a leaf of no elements.

    It leads backward passes to tables of eight bits where nothing else requires a gradient, and tells by
    :func:`reached` which ones are not meant for them.
    """
    if not is_held(tables[0]) or not any(map(asks_for_sums, tables)):
        return None
    return torch.empty(0, dtype=torch.float32, device="cpu", requires_grad=True)


def reached(edge: Tensor | None) -> bool:
    """Whether the backward pass under way adds up gradients at an :func:`edge_of` tables, rather than serving
    ``torch.autograd.grad`` of something else.
    """
    return edge is None or _only_adds_up(edge)


def forget_sums(table: Tensor) -> None:
    """Let a copy of a table be nobody's, of whose original an optimizer had asked for sums."""
    for name in ("pending_sums", "sums_arrived", "gradient_grows", "summed_gradient", "gradient_of_pass"):
        table.__dict__.pop(name, None)


def _only_adds_up(table: Tensor) -> bool:
    """Whether all that the backward pass under way does with a table's gradient is to add it up: no hook sees it, and
    it is not what ``torch.autograd.grad`` was asked for.
    """
    if table._backward_hooks or getattr(table, "_post_accumulate_grad_hooks", None):
        return False
    try:
        added: bool = torch._C._will_engine_execute_node(torch.autograd.graph.get_gradient_edge(table).node)
    except RuntimeError:  # what it says in torch.autograd.grad, for which it does not serve
        return False
    return added
