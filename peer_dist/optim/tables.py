"""Optimizers of the expert tables, which no engine of the dense part sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

KINDS = ("adam", "rowwise_adam", "rowwise_adagrad")


class TableOptimizer:
    """An optimizer with decoupled decay over table shards, in float32.

    - ``adam``: AdamW, two moments an element;
    - ``rowwise_adam``: its second moment is one number a row, the mean of the elements' squared gradients;
    - ``rowwise_adagrad``: no first moment, and the sum of these means over the steps instead.

    A float32 table is stepped in place. A table of lower precision has a float32 master beside it, of which it
    is the rounding.

    Args:
        tables: name to parameter, ``[rows, columns]`` each.
        kind: one of :data:`KINDS`.
        dim: columns of the whole tables, which a row's mean is over.
        columns: ranks that hold the other columns of these rows; None if there are none.
        copies: ranks that hold copies of these shards; None if there are none.
        data_parallel_size: what gradients are averaged over.
    """

    def __init__(
        self,
        tables: Mapping[str, Tensor],
        kind: str,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        dim: int,
        columns: dist.ProcessGroup | None = None,
        copies: dist.ProcessGroup | None = None,
        data_parallel_size: int = 1,
    ) -> None:
        self.tables = dict(tables)
        self._copies, self._data_parallel_size = copies, data_parallel_size
        self._masters = {
            name: table if table.dtype == torch.float32 else table.detach().float().requires_grad_()
            for name, table in self.tables.items()
        }
        masters = list(self._masters.values())
        options: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "eps": eps}
        self._optimizer: torch.optim.Optimizer | None = None
        if kind == "adam" and masters:
            # fused: one pass over weight, gradient and both moments
            self._optimizer = torch.optim.AdamW(masters, betas=betas, fused=True, **options)
        elif masters:
            self._optimizer = _Rowwise(masters, kind == "rowwise_adam", betas, dim, columns, options)
        for master in masters:
            self._state(master)

    def _state(self, master: Tensor) -> dict[str, Tensor]:
        assert self._optimizer is not None
        state: dict[str, Tensor] = self._optimizer.state[master]
        if not state:  # what AdamW itself would make at its first step
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
            state["exp_avg"] = torch.zeros_like(master, memory_format=torch.preserve_format).detach()
            state["exp_avg_sq"] = torch.zeros_like(master, memory_format=torch.preserve_format).detach()
        return state

    def set_lr(self, lr: float) -> None:
        if self._optimizer is not None:
            for group in self._optimizer.param_groups:
                group["lr"] = lr

    @torch.no_grad()
    def grad_norm(self, device: torch.device) -> Tensor:
        """Reduce the gradients over the copies and average them; their norm over all shards of all ranks.

        A collective call of the whole world, with tables or without. The norm, a float32 number on ``device``, is the
        very same on every rank.
        """
        copies = 1 if self._copies is None else dist.get_world_size(self._copies)
        squares = torch.zeros((), dtype=torch.float32, device=device)
        for table in self.tables.values():
            if table.grad is None:
                table.grad = torch.zeros_like(table)
            if copies > 1:
                dist.all_reduce(table.grad, group=self._copies)
            table.grad.div_(self._data_parallel_size)
            squares += torch.linalg.vector_norm(table.grad, dtype=torch.float32).square()
        dist.all_reduce(squares)
        return (squares / copies).sqrt()

    @torch.no_grad()
    def step(self, grad_scale: float) -> None:
        """One update with the tables' gradients times ``grad_scale``; the gradients are freed."""
        if self._optimizer is None:
            return
        for name, table in self.tables.items():
            assert table.grad is not None, name
            grad = table.grad.float()
            table.grad = None
            self._masters[name].grad = grad.mul_(grad_scale) if grad_scale != 1.0 else grad
        self._optimizer.step()
        for name, table in self.tables.items():
            master = self._masters[name]
            master.grad = None
            if master is not table:
                table.copy_(master)

    def zero_grad(self) -> None:
        for table in self.tables.values():
            table.grad = None

    @property
    def steps(self) -> int:
        """Updates made."""
        return int(self._state(next(iter(self._masters.values())))["step"]) if self.tables else 0

    @steps.setter
    def steps(self, value: int) -> None:
        for master in self._masters.values():
            self._state(master)["step"].fill_(float(value))

    def state(self) -> Iterator[tuple[str, str, Tensor]]:
        """``(table name, part, tensor)`` of all that a checkpoint needs beside the tables.

        Parts are, as the kind has them, ``exp_avg`` and ``exp_avg_sq`` ``[rows, columns]``, ``row_sq`` ``[rows]`` (the
        same on every column shard) and ``master`` ``[rows, columns]``. Writing into the tensors loads them.
        """
        for name, table in self.tables.items():
            master = self._masters[name]
            for part, value in self._state(master).items():
                if part != "step":
                    yield name, part, value
            if master is not table:
                yield name, "master", master.detach()


class _Rowwise(torch.optim.Optimizer):
    """``rowwise_adam`` (with ``momentum``) and ``rowwise_adagrad``; makes nothing of a table's size in a step."""

    def __init__(
        self,
        tables: list[Tensor],
        momentum: bool,
        betas: tuple[float, float],
        dim: int,
        columns: dist.ProcessGroup | None,
        options: dict[str, Any],
    ) -> None:
        super().__init__(tables, options)
        self.momentum, self.betas, self.dim, self.columns = momentum, betas, dim, columns
        for table in tables:
            state = self.state[table]
            state["step"] = torch.zeros((), dtype=torch.float32, device=table.device)
            if momentum:
                state["exp_avg"] = torch.zeros_like(table).detach()
            state["row_sq"] = torch.zeros(len(table), device=table.device)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for table in group["params"]:
                self._step(table, group["lr"], group["weight_decay"], group["eps"])

    def _step(self, table: Tensor, lr: float, weight_decay: float, eps: float) -> None:
        state, grad = self.state[table], table.grad
        assert grad is not None
        state["step"] += 1
        mean = torch.linalg.vector_norm(grad, dim=1).square_()
        if self.columns is not None and dist.get_world_size(self.columns) > 1:
            dist.all_reduce(mean, group=self.columns)
        mean /= self.dim
        table.mul_(1 - lr * weight_decay)
        if not self.momentum:
            state["row_sq"] += mean
            table.addcdiv_(grad, (state["row_sq"].sqrt() + eps)[:, None], value=-lr)
            return
        first, second = self.betas
        steps = float(state["step"])
        state["row_sq"].lerp_(mean, 1 - second)
        state["exp_avg"].lerp_(grad, 1 - first)
        root = (state["row_sq"] / (1 - second**steps)).sqrt_().add_(eps)
        table.addcdiv_(state["exp_avg"], root[:, None], value=-lr / (1 - first**steps))
