"""Optimizers of the expert tables, which no engine of the dense part sees."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from peer_dist.kernels import row_gradient
from peer_dist.kernels.eight_bit import gradient_dtype, is_eight_bit, scales_of
from peer_dist.kernels.far import FarRows, RowStep, far_rows_of, is_held
from peer_dist.kernels.far.rows import Parts
from peer_dist.kernels.pending import PendingSums, ask_for_sums, let_gradient_grow, pending_sums
from peer_dist.kernels.rounding import Rounding, stream_key
from peer_dist.kernels.updates import Step, row_squares, update_rows
from peer_dist.optim.held_bytes import HeldBytes
from peer_dist.optim.sparse import merge, sum_over_copies

_NO_PASS: tuple[int, Tensor | None] = -1, None
_BLOCK = 1 << 14  # rows of a far table that are read at a time
KINDS = ("adam", "rowwise_adam", "rowwise_adagrad")


@dataclass(frozen=True)
class TableRule:
    """How a table is updated.

    Attributes:
        kind: one of :data:`KINDS`.
        lr: learning rate of the first step (:meth:`TableOptimizer.set_lr` changes it).
        betas: decay of the first and the second moment; ``rowwise_adagrad`` has none.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay.
        lazy: gradients are sparse, and only rows that were touched are updated.
        rounding_seed: of stochastic rounding; None rounds a master to the nearest.
    """

    kind: str
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    lazy: bool = False
    rounding_seed: int | None = None


class TableOptimizer:
    """An optimizer with decoupled decay over table shards, in float32.

    - ``adam``: AdamW, two moments an element;
    - ``rowwise_adam``: its second moment is one number a row, the mean of the elements' squared gradients;
    - ``rowwise_adagrad``: no first moment, and the sum of these means over the steps instead.

    A lazy one has the semantics of :class:`torch.optim.SparseAdam`: it takes sparse gradients, and rows without a
    gradient keep weight and moments, decay included, while the one count of steps that corrects the moments' bias
    goes on. Its ``adam`` adds ``eps`` where SparseAdam does, before this correction. Time and memory of a step
    are those of the rows touched.

    A float32 table is stepped in place. A table of lower precision has a float32 master beside it, of which it
    is the rounding; with ``rounding_seed`` there is none, and the new weights are rounded stochastically to bfloat16
    (:mod:`peer_dist.kernels.rounding`), or to eight bits under a new scale of their row
    (:mod:`peer_dist.kernels.eight_bit`). :mod:`peer_dist.kernels.updates` has the formulas.

    Args:
        tables: name to parameter, ``[rows, columns]`` each.
        rule: how they are updated.
        dim: columns of the whole tables, which a row's mean is over.
        columns: ranks that hold the other columns of these rows; None if there are none. The same rows must be
            touched on all of them.
        copies: ranks that hold copies of these shards; None if there are none. Each may touch rows of its own.
        data_parallel_size: what gradients are averaged over.
        offsets: name to the row and column at which the shard begins in the whole table: with them the same bits
            round a place in every layout. (0, 0) by default.
        one_pass: a table meets one backward pass in a step. A lazy one then has its gradient summed where it is used,
            in registers, if kernels for that serve it (:mod:`peer_dist.kernels.pending`), unless other ranks have
            copies or columns of it. The step of a far table begins in the backward pass, unless others have copies.

    Raises:
        ValueError: a far table, and a rule that is not lazy; or a table of eight bits, and one that is not lazy or has
            no ``rounding_seed``.

    Attributes:
        steps: the number of updates so far; setting it goes on from there.
    """

    def __init__(
        self,
        tables: Mapping[str, Tensor],
        rule: TableRule,
        dim: int,
        *,
        columns: dist.ProcessGroup | None = None,
        copies: dist.ProcessGroup | None = None,
        data_parallel_size: int = 1,
        offsets: Mapping[str, tuple[int, int]] | None = None,
        one_pass: bool = False,
    ) -> None:
        self.tables = dict(tables)
        for name, table in self.tables.items():
            if is_eight_bit(table) and (not rule.lazy or rule.rounding_seed is None):
                raise ValueError(
                    f"{name}: a table of eight bits needs a lazy optimizer that rounds stochastically: "
                    "set table_optimizer.lazy and table_optimizer.stochastic_rounding to true"
                )
            if far_rows_of(table) is not None and not rule.lazy:
                raise ValueError(f"{name}: a far table needs a lazy optimizer: set table_optimizer.lazy to true")
        self._rule, self._lr, self._offsets = rule, rule.lr, offsets or {}
        self._dim, self._columns, self._copies, self._data_parallel_size = dim, columns, copies, data_parallel_size
        self.steps = 0
        self._masters = {
            name: table
            if table.dtype == torch.float32 or rule.rounding_seed is not None or is_eight_bit(table)
            else _new_master(table)
            for name, table in self.tables.items()
        }
        self._moments = {name: self._new_moments(table) for name, table in self.tables.items()}
        pools = self._pools()
        alone, own = (
            all(group is None or dist.get_world_size(group) == 1 for group in groups)
            for groups in ((columns, copies), (copies,))
        )
        early = one_pass and own  # else a step has other rows, and another gradient, than a backward pass
        for pool in pools:  # the other half of what may be resident is for mappings
            pool.ahead_bytes = pool.place.resident_bytes // (2 * len(pools)) if early else 0
        for table in self.tables.values():
            if rule.lazy and is_held(table):
                ask_for_sums(table, self._send_ahead if early else None if one_pass else self._add_up)
            elif rule.lazy:
                (ask_for_sums if one_pass and alone else _merge_as_it_comes)(table)
            else:
                let_gradient_grow(table)

    @property
    def lazy(self) -> bool:
        """Whether gradients are sparse, and only rows that were touched are updated."""
        return self._rule.lazy

    def _new_moments(self, table: Tensor) -> dict[str, Tensor]:
        moments = {}
        if self._rule.kind != "rowwise_adagrad":
            moments["exp_avg"] = _zeros(table, table.shape)
        if self._rule.kind == "adam":
            moments["exp_avg_sq"] = _zeros(table, table.shape)
        else:
            moments["row_sq"] = _zeros(table, table.shape[:1])
        return moments

    def set_lr(self, lr: float) -> None:
        """Use this learning rate from the next step on."""
        self._lr = lr

    def _grad(self, table: Tensor) -> Tensor:
        """The table's gradient, merged if it is sparse; where there is none, a gradient that touches no row or is 0."""
        self._sum_up(table)
        grad = _gradient(table)
        if grad is None:
            if self.lazy:
                pool = far_rows_of(table)
                device = table.device if pool is None else pool.device
                none = torch.empty(0, dtype=torch.int64, device=device)
                values = torch.empty(0, table.shape[1], dtype=gradient_dtype(table), device=device)
                return row_gradient(none, values, len(table))
            return torch.zeros_like(table, requires_grad=False)
        return merge(_sparse(grad)) if self.lazy else grad

    def _pending(self, table: Tensor) -> PendingSums | None:
        """The sums of all of the table's gradient, if a step can take them in registers."""
        pending = pending_sums(table) or []
        return pending[0] if len(pending) == 1 and _gradient(table) is None and pending[0].in_registers else None

    @staticmethod
    @torch.no_grad()
    def _sum_up(table: Tensor) -> None:
        """Make a gradient of what backward passes have left of it, as they would have done."""
        TableOptimizer._add_up(table)
        _end_pass(table)

    @staticmethod
    @torch.no_grad()
    def _send_ahead(table: Tensor) -> None:
        """Let the step of a far table begin while the backward pass goes on with earlier layers."""
        pool, pending = far_rows_of(table), pending_sums(table)
        if pool is not None and pool.sends_ahead and pending:
            pool.send_ahead(table, *pending[-1].gradient(table))

    @staticmethod
    @torch.no_grad()
    def _add_up(table: Tensor) -> None:
        """Add up what backward passes have left of a table's gradient, that of the last pass on its own: where several
        layers share the table, autograd adds up theirs before it adds them to those of the passes before.
        """
        pending = pending_sums(table)
        while pending:
            sums = pending.pop(0)
            grad = row_gradient(*sums.gradient(table), len(table))
            number, before = getattr(table, "gradient_of_pass", _NO_PASS)
            if before is not None and number == sums.backward_pass:
                grad = merge(before + grad)
            else:
                _end_pass(table)
            table.gradient_of_pass = sums.backward_pass, grad  # type: ignore[attr-defined]

    def gradients(self) -> Iterator[tuple[str, Tensor | None]]:
        """``(name, gradient)`` of each table, None without one. Summed up now, so only to find out what is in them."""
        for name, table in self.tables.items():
            self._sum_up(table)
            yield name, _gradient(table)

    @torch.no_grad()
    def grad_norm(self, device: torch.device) -> Tensor:
        """Add up the gradients over the copies; the norm of their averages over all shards of all ranks.

        A collective call of the whole world, with tables or without. The norm, a float32 number on ``device``, is the
        very same on every rank. The gradients stay sums, which :meth:`step` averages.
        """
        copies = 1 if self._copies is None else dist.get_world_size(self._copies)
        squares = torch.zeros((), dtype=torch.float32, device=device)
        for table in self.tables.values():
            pending = self._pending(table)
            if pending is not None:
                squares += pending.squares(table).sum()
                continue
            grad = self._grad(table)
            if copies > 1 and self.lazy:
                assert self._copies is not None
                grad = sum_over_copies(grad, self._copies)
            elif copies > 1:
                dist.all_reduce(grad, group=self._copies)
            squares += row_squares(grad.values() if self.lazy else grad).sum()
            _let_gradient(table, grad)
        if dist.is_initialized():  # else this process is the world
            dist.all_reduce(squares)
        return (squares / copies).sqrt() / self._data_parallel_size

    @torch.no_grad()
    def step(self, grad_scale: float) -> None:
        """One update with the averages of the tables' gradients times ``grad_scale``; the gradients are freed."""
        self.steps += 1
        rule = self._rule
        step = Step.of(
            rule.kind,
            self._lr,
            rule.betas,
            rule.eps,
            rule.weight_decay,
            count=self.steps,
            scale=grad_scale / self._data_parallel_size,
            dim=self._dim,
            lazy=rule.lazy,
        )
        for name, table in self.tables.items():
            if far_rows_of(table) is not None:
                continue
            pending = self._pending(table)
            if pending is not None:
                moments, master = self._moments[name], None if self._masters[name] is table else self._masters[name]
                pending.update(step, table, moments, master=master, rounding=self._rounding(name))
                _drop(table)
                continue
            rows, values, squares = self._take(name)
            _step_rows(step, self._rounding(name), self._parts(name), values, rows, None, squares)
        pools = self._pools()
        for pool in pools:  # the first one's step waits for no reading for others
            pool.stop_ahead()
        for pool, names in pools.items():
            steps = []
            for name in names:
                rows, values, squares = self._take(name)
                assert rows is not None
                if squares is None and "row_sq" in self._moments[name] and values.is_cuda:
                    squares = row_squares(values)  # summed in one order, wherever rows are stepped
                update = partial(_step_rows, step, self._rounding(name))
                steps.append(RowStep(self.tables[name], rows, values, squares, update))
            pool.step(steps)

    def _take(self, name: str) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Rows (None: all), gradients and, where the table has some of the columns, the whole rows' sums of squares of
        a table's gradient, which is freed.
        """
        table = self.tables[name]
        grad = self._grad(table)
        _drop(table)
        rows, values = (grad.indices()[0], grad.values()) if self.lazy else (None, grad)
        squares = None
        if "row_sq" in self._moments[name] and self._columns is not None and dist.get_world_size(self._columns) > 1:
            squares = row_squares(values)
            dist.all_reduce(squares, group=self._columns)
        return rows, values, squares

    def _rounding(self, name: str) -> Rounding | None:
        """How a table is rounded in this step, if it is at random."""
        if self._rule.rounding_seed is None or self.tables[name].dtype == torch.float32:
            return None
        return Rounding(stream_key(self._rule.rounding_seed, name, self.steps), *self._offsets.get(name, (0, 0)))

    def zero_grad(self) -> None:
        """Free the tables' gradients."""
        for table in self.tables.values():
            _drop(table)
        for pool in self._pools():
            pool.drop_ahead()

    def state(self) -> Iterator[tuple[str, str, Tensor]]:
        """``(table name, part, tensor)`` of all that a checkpoint needs beside the tables.

        Parts are, as the kind has them, ``exp_avg`` and ``exp_avg_sq`` ``[rows, columns]``, ``row_sq`` ``[rows]`` (the
        same on every column shard) and ``master`` ``[rows, columns]``. Writing into the tensors loads them, before the
        next pass. Far tables and their states are of the last step from this call on, until the next one.

        Raises:
            BaseException: what the last step of far rows failed with.
        """
        for pool in self._pools():
            pool.flush()
        return ((name, part, value) for name in self.tables for part, value in self._states(name).items())

    def _pools(self) -> dict[FarRows, list[str]]:
        """The names of far tables by what holds their rows, which knows what is kept beside them from now on."""
        pools: dict[FarRows, list[str]] = {}
        for name, table in self.tables.items():
            pool = far_rows_of(table)
            if pool is not None:
                pool.keep(table, self._states(name))
                pools.setdefault(pool, []).append(name)
        return pools

    def _states(self, name: str) -> dict[str, Tensor]:
        """What is kept of a table's rows beside the weights and their scales."""
        master = self._masters[name]
        return {**self._moments[name], **({} if master is self.tables[name] else {"master": master})}

    def _parts(self, name: str) -> dict[str, Tensor]:
        table = self.tables[name]
        scales = scales_of(table)
        return {"weights": table, **({} if scales is None else {"scales": scales}), **self._states(name)}

    def memory(self) -> HeldBytes:
        """What this rank holds of the tables, of which a step needs no more. With the weights are the rows of far ones
        that are near the kernels, with all that the optimizer keeps of them; with what is far, what was brought to the
        host for the next step.
        """
        tables = self.tables.values()
        of_pass = (getattr(table, "gradient_of_pass", _NO_PASS)[1] for table in tables)
        gradients = [grad for grad in (*map(_gradient, tables), *of_pass) if grad is not None]
        gradients += [part for table in tables for sums in pending_sums(table) or () for part in sums.tensors()]
        near = (tensor for pool in self._pools() for tensor in pool.near_tensors())
        states = (value for name in self.tables for value in self._states(name).values())
        away = [name for name, table in self.tables.items() if far_rows_of(table) is not None]
        far = [tensor for name in away for tensor in self._parts(name).values()]
        far += [tensor for pool in self._pools() for tensor in pool.ahead_tensors()]
        scales = (scales for table in tables if (scales := scales_of(table)) is not None)
        return HeldBytes.of((*tables, *scales, *near), gradients, states, far=far)


def _zeros(table: Tensor, shape: Sequence[int]) -> Tensor:
    """Float32 numbers where the table's rows are."""
    far = far_rows_of(table)
    if far is not None:
        return far.place.zeros(shape, torch.float32)
    return torch.zeros(*shape, dtype=torch.float32, device=table.device)


def _new_master(table: Tensor) -> Tensor:
    if far_rows_of(table) is None:
        return table.detach().float()
    master = _zeros(table, table.shape)
    for to, part in zip(master.split(_BLOCK), table.detach().split(_BLOCK)):
        to.copy_(part)
    return master


def _step_rows(
    step: Step,
    rounding: Rounding | None,
    parts: Parts,
    values: Tensor,
    rows: Tensor | None,
    numbers: Tensor | None,
    squares: Tensor | None,
) -> None:
    """Step rows of all that is kept of a table, by their gradients; see :func:`update_rows`."""
    update_rows(
        step,
        values,
        parts["weights"],
        {part: value for part, value in parts.items() if part not in ("weights", "scales", "master")},
        master=parts.get("master"),
        rows=rows,
        squares=squares,
        rounding=rounding,
        scales=parts.get("scales"),
        numbers=numbers,
    )


def _gradient(table: Tensor) -> Tensor | None:
    """What has been summed up of a table's gradient."""
    grad: Tensor | None = getattr(table, "summed_gradient", None) if is_held(table) else table.grad
    return grad


def _let_gradient(table: Tensor, grad: Tensor | None) -> None:
    """Keep a gradient until the step. Torch lets no tensor of integers have one, and none on another device."""
    if is_held(table):
        table.summed_gradient = grad  # type: ignore[attr-defined]
    else:
        table.grad = grad


def _end_pass(table: Tensor) -> None:
    """Add what the last backward pass left of a table's gradient to that of the passes before."""
    _, grad = getattr(table, "gradient_of_pass", _NO_PASS)
    if grad is not None:
        before = _gradient(table)
        _let_gradient(table, grad if before is None else merge(before + grad))
        table.gradient_of_pass = _NO_PASS  # type: ignore[attr-defined]


def _drop(table: Tensor) -> None:
    """Free a table's gradient, or what it is the sum of."""
    _let_gradient(table, None)
    table.gradient_of_pass = _NO_PASS  # type: ignore[attr-defined]
    pending = pending_sums(table)
    if pending is not None:
        pending.clear()


def _sparse(grad: Tensor) -> Tensor:
    """A gradient that is sparse.

    Raises:
        ValueError: it is not.
    """
    if not grad.is_sparse:
        raise ValueError(
            f"a lazy table optimizer needs sparse gradients, and that of a table {list(grad.shape)} is dense: build "
            "the layer with sparse_grad=True"
        )
    return grad


def _merge_as_it_comes(table: Tensor) -> None:
    """Keep the gradient merged after each micro-batch, so that it is no longer than the rows touched by any.

    The first one of a step is merged as a layer made it. Accumulation forgets that, and to see it in the rows would be
    to wait for the device.
    """
    merged = False

    def before(grad: Tensor) -> None:
        nonlocal merged
        merged = table.grad is None and _sparse(grad).is_coalesced()

    def after(_: Tensor) -> None:
        assert table.grad is not None
        table.grad = table.grad._coalesced_(True) if merged else merge(table.grad)

    table.register_hook(before)
    table.register_post_accumulate_grad_hook(after)
