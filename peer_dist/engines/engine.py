"""What the training loop asks of whatever updates the parameters."""

from __future__ import annotations

import abc
from collections.abc import Container, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peer_dist.optim.held_bytes import HeldBytes
from peer_dist.optim.tables import TableOptimizer

MOMENTS = ("exp_avg", "exp_avg_sq")
PARTS = (*MOMENTS, "master")


@dataclass(frozen=True)
class DenseAdam:
    """AdamW over the dense parameters; matrices decay, norms and biases do not.

    Attributes:
        grad_clip: global norm to clip at, tables included; 0 never clips.
    """

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    grad_clip: float


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step did.

    Attributes:
        grad_norm: the norm of all gradients, dense and table, before clipping; inf or nan if not finite.
        applied: False where non-finite gradients made every rank skip the step.
    """

    grad_norm: float
    applied: bool


class Engine(abc.ABC):
    """AdamW over a model's dense parameters, and optimizers of shards in step with it under one global norm.

    Args of all engines:
        model: its shards released.
        tables: the tables' optimizer, with a learning rate of its own.
        experts: the optimizer of experts' weights, which follows the dense part's learning rate; None if there are none
            anywhere in the model.

    Gradients are averaged over data-parallel ranks: scale each rank's loss so that the average is the loss meant.

    Attributes:
        parameters: the dense ones that are trained, by their names in ``model.named_parameters()``.
    """

    grad_clip: float
    _bucket_bytes = 0
    """Bytes of the buffer in which gradients are reduced."""

    def __init__(
        self, model: nn.Module, tables: TableOptimizer, experts: TableOptimizer | None, adam: DenseAdam
    ) -> None:
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.grad_clip, self.tables, self._experts = adam.grad_clip, tables, experts
        self.shard_optimizers = [tables] if experts is None else [tables, experts]

    @abc.abstractmethod
    def accumulate(self) -> AbstractContextManager[None]:
        """Forward and backward passes inside add up; the reduction over ranks happens once, on leaving."""

    @abc.abstractmethod
    def step(self, lr: float, table_lr: float) -> StepResult:
        """Clip and update everything, or, with non-finite gradients, nothing on any rank."""

    @abc.abstractmethod
    def skip(self) -> None:
        """Drop the gradients instead of :meth:`step`, as if the passes had not been; all ranks call it."""

    @abc.abstractmethod
    def not_finite(self) -> list[str]:
        """Before :meth:`step`: what has a gradient that is not finite, by name, as far as this rank can see.

        All ranks call it. It takes time: for telling what went wrong.
        """

    def memory(self) -> dict[str, HeldBytes]:
        """What this rank holds at the moment: ``dense``, ``tables`` and, where the model has them, ``experts``."""
        shards = {name: each.memory() for name, each in zip(("tables", "experts"), self.shard_optimizers)}
        return {"dense": HeldBytes.of(*self._dense_tensors(), self._bucket_bytes), **shards}

    @abc.abstractmethod
    def _dense_tensors(self) -> tuple[Iterable[Tensor], Iterable[Tensor], Iterable[Tensor]]:
        """All that holds weights, gradients and optimizer states of the dense part on this rank."""

    def _set_shard_lr(self, lr: float, table_lr: float) -> None:
        self.tables.set_lr(table_lr)
        if self._experts is not None:
            self._experts.set_lr(lr)

    def _shard_norm(self, device: torch.device) -> Tensor:
        """Reduce the gradients of all shards; their norm over all ranks, a float32 number. Collective."""
        return torch.stack([optimizer.grad_norm(device) for optimizer in self.shard_optimizers]).norm()

    def _set_shard_steps(self, value: int) -> None:
        for optimizer in self.shard_optimizers:
            optimizer.steps = value

    def _skip_shards(self) -> None:
        for optimizer in self.shard_optimizers:
            optimizer.zero_grad()

    def _shards_not_finite(self) -> list[str]:
        grads = ((name, table.grad) for each in self.shard_optimizers for name, table in each.tables.items())
        return names_not_finite(
            (n, grad._values() if grad is not None and grad.is_sparse else grad) for n, grad in grads
        )

    def _finish(self, result: StepResult) -> StepResult:
        """The shards' part of a step, after the dense one."""
        if result.applied:
            clip = (result.grad_norm + 1e-6) / self.grad_clip if self.grad_clip > 0 else 0.0
            for optimizer in self.shard_optimizers:
                optimizer.step(1 / clip if clip > 1 else 1.0)
        else:
            self._skip_shards()
        return result

    @property
    @abc.abstractmethod
    def steps(self) -> int:
        """Updates made."""

    @steps.setter
    @abc.abstractmethod
    def steps(self, value: int) -> None: ...

    @abc.abstractmethod
    def whole_shapes(self) -> AbstractContextManager[None]:
        """Inside, every parameter has its whole (tensor-parallel) shape; one that had not has no values to be read."""

    @abc.abstractmethod
    def dense_state(self, only: Container[str] | None = None) -> Iterator[tuple[str, str, Tensor]]:
        """``(parameter name, part, whole float32 tensor)`` for each of :data:`PARTS`, the master last.

        Of all parameters, or of those whose names are in ``only``. A parameter is its master, rounded to its dtype.

        A collective over the data parallel group: take every item on every rank. One is made at a time.
        """

    @abc.abstractmethod
    def load_dense_state(self, name: str, part: str, value: Tensor) -> None:
        """Put back what :meth:`dense_state` gave, on this rank; the master also becomes the parameter's value."""


def names_not_finite(grads: Iterable[tuple[str, Tensor | None]]) -> list[str]:
    """The names of the gradients that hold a number that is not finite."""
    return [name for name, grad in grads if grad is not None and not bool(grad.isfinite().all())]
