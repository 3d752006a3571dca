"""Optimizers of the expert tables, which no engine of the dense part sees."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


class TableAdam:
    """Dense Adam (decoupled decay) over table shards, in float32.

    A float32 table is stepped in place. A table of lower precision has a float32 master beside it, of which it
    is the rounding.

    Args:
        tables: name to parameter, ``[rows, dim]`` each.
    """

    def __init__(
        self,
        tables: Mapping[str, Tensor],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        self.tables = dict(tables)
        self._masters = {
            name: table if table.dtype == torch.float32 else table.detach().float().requires_grad_()
            for name, table in self.tables.items()
        }
        # fused: one pass over weight, gradient and both moments
        self._adam = torch.optim.AdamW(
            list(self._masters.values()), lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True
        ) if self.tables else None  # fmt: skip
        for master in self._masters.values():
            self._state(master)

    def _state(self, master: Tensor) -> dict[str, Tensor]:
        assert self._adam is not None
        state: dict[str, Tensor] = self._adam.state[master]
        if not state:  # what AdamW itself would make at its first step
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
            state["exp_avg"] = torch.zeros_like(master, memory_format=torch.preserve_format).detach()
            state["exp_avg_sq"] = torch.zeros_like(master, memory_format=torch.preserve_format).detach()
        return state

    def set_lr(self, lr: float) -> None:
        if self._adam is not None:
            for group in self._adam.param_groups:
                group["lr"] = lr

    @torch.no_grad()
    def step(self, grad_scale: float) -> None:
        """One update with the tables' gradients times ``grad_scale``; the gradients are freed."""
        if self._adam is None:
            return
        for name, table in self.tables.items():
            assert table.grad is not None, name
            grad = table.grad.float()
            table.grad = None
            self._masters[name].grad = grad.mul_(grad_scale) if grad_scale != 1.0 else grad
        self._adam.step()
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
        """``(table name, part, tensor [rows, dim])`` of all that a checkpoint needs beside the tables.

        Parts are ``exp_avg``, ``exp_avg_sq`` and, where there is one, ``master``. Writing into the tensors
        loads them.
        """
        for name, table in self.tables.items():
            master = self._masters[name]
            state = self._state(master)
            yield name, "exp_avg", state["exp_avg"]
            yield name, "exp_avg_sq", state["exp_avg_sq"]
            if master is not table:
                yield name, "master", master.detach()
