"""Optimizers of the expert tables, which no engine of the dense part sees."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from peer_dist.kernels import row_gradient, wide
from peer_dist.optim.held_bytes import HeldBytes
from peer_dist.optim.rounding import random_bits, round_stochastically, stream_key
from peer_dist.optim.sparse import merge, sum_over_copies

KINDS = ("adam", "rowwise_adam", "rowwise_adagrad")

# Elements of a block of rows, which bound a step's temporaries: on a CPU they stay in its cache, and a GPU
# gets enough to do for each launch.
BLOCKS = {"cpu": 1 << 18, "cuda": 1 << 24}


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
    (:mod:`peer_dist.optim.rounding`).

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
    ) -> None:
        self.tables = dict(tables)
        self._rule, self._lr, self._offsets = rule, rule.lr, offsets or {}
        self._dim, self._columns, self._copies, self._data_parallel_size = dim, columns, copies, data_parallel_size
        self._steps = 0
        self._masters = {
            name: table
            if table.dtype == torch.float32 or rule.rounding_seed is not None
            else table.detach().float().requires_grad_()
            for name, table in self.tables.items()
        }
        self._moments = {name: self._new_moments(table) for name, table in self.tables.items()}
        self._adamw: torch.optim.AdamW | None = None
        if rule.kind == "adam" and not rule.lazy and rule.rounding_seed is None and self.tables:
            # fused: one pass over weight, gradient and both moments
            self._adamw = torch.optim.AdamW(
                self._masters.values(),
                lr=rule.lr,
                betas=rule.betas,
                eps=rule.eps,
                weight_decay=rule.weight_decay,
                fused=True,
            )
            for name, master in self._masters.items():
                step = torch.zeros((), dtype=torch.float32, device=master.device)
                self._adamw.state[master] = {"step": step, **self._moments[name]}
        if rule.lazy:
            for table in self.tables.values():
                _merge_as_it_comes(table)

    @property
    def lazy(self) -> bool:
        """Whether gradients are sparse, and only rows that were touched are updated."""
        return self._rule.lazy

    def _new_moments(self, table: Tensor) -> dict[str, Tensor]:
        moments = {}
        if self._rule.kind != "rowwise_adagrad":
            moments["exp_avg"] = torch.zeros_like(table, dtype=torch.float32, requires_grad=False)
        if self._rule.kind == "adam":
            moments["exp_avg_sq"] = torch.zeros_like(table, dtype=torch.float32, requires_grad=False)
        else:
            moments["row_sq"] = torch.zeros(len(table), dtype=torch.float32, device=table.device)
        return moments

    def set_lr(self, lr: float) -> None:
        """Use this learning rate from the next step on."""
        self._lr = lr
        if self._adamw is not None:
            for group in self._adamw.param_groups:
                group["lr"] = lr

    def _grad(self, table: Tensor) -> Tensor:
        """The table's gradient, merged if it is sparse; where there is none, a gradient that touches no row or is 0."""
        if table.grad is None:
            if self.lazy:
                none = torch.empty(0, dtype=torch.int64, device=table.device)
                return row_gradient(none, table.new_empty(0, table.shape[1]), len(table))
            return torch.zeros_like(table, requires_grad=False)
        return merge(table.grad) if self.lazy else table.grad

    @torch.no_grad()
    def grad_norm(self, device: torch.device) -> Tensor:
        """Reduce the gradients over the copies and average them; their norm over all shards of all ranks.

        A collective call of the whole world, with tables or without. The norm, a float32 number on ``device``, is the
        very same on every rank.
        """
        copies = 1 if self._copies is None else dist.get_world_size(self._copies)
        squares = torch.zeros((), dtype=torch.float32, device=device)
        for table in self.tables.values():
            grad = self._grad(table)
            if copies > 1 and self.lazy:
                assert self._copies is not None
                grad = sum_over_copies(grad, self._copies)
            elif copies > 1:
                dist.all_reduce(grad, group=self._copies)
            values = grad.values() if self.lazy else grad
            if self._data_parallel_size > 1:
                values.div_(self._data_parallel_size)
            squares += torch.linalg.vector_norm(values, dtype=wide(values)).square()
            table.grad = grad
        dist.all_reduce(squares)
        return (squares / copies).sqrt()

    @torch.no_grad()
    def step(self, grad_scale: float) -> None:
        """One update with the tables' gradients times ``grad_scale``; the gradients are freed."""
        self._steps += 1
        if self._adamw is not None:
            self._step_adamw(self._adamw, grad_scale)
            return
        for name, table in self.tables.items():
            grad = self._grad(table)
            table.grad = None
            if self.lazy:
                self._update(name, grad.indices()[0], grad.values(), grad_scale)
            else:
                self._update(name, None, grad, grad_scale)

    def _step_adamw(self, adamw: torch.optim.AdamW, grad_scale: float) -> None:
        # one table after the other, so that one gradient at a time is there in float32: AdamW leaves out the others
        grads = {name: table.grad for name, table in self.tables.items()}
        self.zero_grad()
        for name, table in self.tables.items():
            master, table.grad = self._masters[name], grads.pop(name)
            grad = self._grad(table).float()
            table.grad = None
            master.grad = grad.mul_(grad_scale) if grad_scale != 1.0 else grad
            del grad
            adamw.step()
            master.grad = None
            if master is not table:
                table.copy_(master)

    def _update(self, name: str, rows: Tensor | None, values: Tensor, grad_scale: float) -> None:
        """Step one table, a block of rows after the other.

        Args:
            rows: ``[touched]``, those that ``values`` are of; None: all.
            values: ``[touched, columns]``, their gradients; written to.
        """
        table, master, moments = self.tables[name], self._masters[name], self._moments[name]
        size = max(1, BLOCKS["cuda" if table.is_cuda else "cpu"] // table.shape[1])
        blocks = [slice(first, min(first + size, len(values))) for first in range(0, len(values), size)]
        mean = self._row_mean(values, blocks, grad_scale) if "row_sq" in moments else None
        for block in blocks:
            grad = values[block].float()
            if grad_scale != 1.0:
                grad.mul_(grad_scale)
            if rows is None:  # views: float32 is stepped in place
                weight, state = master[block].float(), {part: value[block] for part, value in moments.items()}
            else:
                touched = rows[block]
                weight = master.index_select(0, touched).float()
                state = {part: value.index_select(0, touched) for part, value in moments.items()}
            self._apply(weight, grad, state, None if mean is None else mean[block])
            if rows is not None:
                for part, value in state.items():
                    moments[part].index_copy_(0, touched, value)
                if master.dtype == torch.float32:
                    master.index_copy_(0, touched, weight)
            if table.dtype == torch.float32:
                continue
            if self._rule.rounding_seed is None:
                rounded = weight.to(table.dtype)
            else:
                if rows is None:
                    touched = torch.arange(block.start, block.stop, dtype=torch.int64, device=table.device)
                rounded = self._round(name, touched, weight)
            if rows is None:
                table[block] = rounded
            else:
                table.index_copy_(0, touched, rounded)

    def _row_mean(self, values: Tensor, blocks: list[slice], grad_scale: float) -> Tensor:
        """``[touched]``: the mean of the squared gradients over the columns of the whole table."""
        mean = torch.empty(len(values), dtype=torch.float32, device=values.device)
        for block in blocks:
            torch.linalg.vector_norm(values[block].float(), dim=1, out=mean[block])
        mean.mul_(grad_scale).square_()
        if self._columns is not None and dist.get_world_size(self._columns) > 1:
            dist.all_reduce(mean, group=self._columns)
        return mean.div_(self._dim)

    def _apply(self, weight: Tensor, grad: Tensor, state: dict[str, Tensor], mean: Tensor | None) -> None:
        """Step some rows in place: ``[n, columns]`` float32, a number a row ``[n]``."""
        if self._rule.weight_decay:
            weight.mul_(1 - self._lr * self._rule.weight_decay)
        if self._rule.kind == "rowwise_adagrad":
            assert mean is not None
            root = state["row_sq"].add_(mean).sqrt().add_(self._rule.eps)
            weight.addcdiv_(grad, root[:, None], value=-self._lr)
            return
        first, second = self._rule.betas
        moment = state["exp_avg"].lerp_(grad, 1 - first)
        correction, eps = 1 - second**self._steps, self._rule.eps
        if mean is None:
            square = state["exp_avg_sq"].mul_(second).addcmul_(grad, grad, value=1 - second)
            eps /= math.sqrt(correction) if self.lazy else 1.0
        else:
            square = state["row_sq"].lerp_(mean, 1 - second)[:, None]
        root = (square / correction).sqrt_().add_(eps)
        weight.addcdiv_(moment, root, value=-self._lr / (1 - first**self._steps))

    def _round(self, name: str, rows: Tensor, weight: Tensor) -> Tensor:
        """``weight [n, columns]`` of the shard's ``rows [n]`` in bfloat16."""
        assert self._rule.rounding_seed is not None
        row, column = self._offsets.get(name, (0, 0))
        key = stream_key(self._rule.rounding_seed, name, self._steps)
        return round_stochastically(weight, random_bits(key, rows + row, range(column, column + weight.shape[1])))

    def zero_grad(self) -> None:
        """Free the tables' gradients."""
        for table in self.tables.values():
            table.grad = None

    @property
    def steps(self) -> int:
        """The number of updates so far."""
        return self._steps

    @steps.setter
    def steps(self, value: int) -> None:
        self._steps = value
        if self._adamw is not None:
            for state in self._adamw.state.values():
                state["step"].fill_(float(value))

    def state(self) -> Iterator[tuple[str, str, Tensor]]:
        """``(table name, part, tensor)`` of all that a checkpoint needs beside the tables.

        Parts are, as the kind has them, ``exp_avg`` and ``exp_avg_sq`` ``[rows, columns]``, ``row_sq`` ``[rows]`` (the
        same on every column shard) and ``master`` ``[rows, columns]``. Writing into the tensors loads them.
        """
        for name, table in self.tables.items():
            for part, value in self._moments[name].items():
                yield name, part, value
            master = self._masters[name]
            if master is not table:
                yield name, "master", master.detach()

    def memory(self) -> HeldBytes:
        """What this rank holds of the tables; the fused ``adam`` copies a gradient to float32 in a step besides."""
        gradients = (table.grad for table in self.tables.values() if table.grad is not None)
        return HeldBytes.of(self.tables.values(), gradients, (value for _, _, value in self.state()))


def _merge_as_it_comes(table: Tensor) -> None:
    """Keep the gradient merged after each micro-batch, so that it is no longer than the rows touched by any.

    The first one of a step is merged as a layer made it. Accumulation forgets that, and to see it in the rows would be
    to wait for the device.
    """
    merged = False

    def before(grad: Tensor) -> None:
        nonlocal merged
        merged = table.grad is None and grad.is_coalesced()

    def after(_: Tensor) -> None:
        assert table.grad is not None
        table.grad = table.grad._coalesced_(True) if merged else merge(table.grad)

    table.register_hook(before)
    table.register_post_accumulate_grad_hook(after)
