"""The interface between the training loop and the engines that update a model's parameters."""

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
"""Adam's moments of a parameter."""
PARTS = (*MOMENTS, "master")
"""The float32 tensors of a parameter's state: its moments, and the master copy that Adam updates."""


@dataclass(frozen=True)
class DenseAdam:
    """AdamW over the dense parameters; matrices decay, norms and biases do not.

    Attributes:
        grad_clip: the global norm, tables included, at which gradients are clipped; 0 never clips.
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
        grad_norm: the norm of all gradients, dense and of shards, before clipping; inf or nan if not finite.
        applied: False if gradients that are not finite made every rank skip the step.
    """

    grad_norm: float
    applied: bool


class Engine(abc.ABC):
    """Updates a model's dense parameters by AdamW, and its shards beside them, under one global norm.

    Gradients are averaged over data-parallel ranks: each rank's loss must be scaled so that the average of the ranks'
    losses is the one to minimize.

    Args:
        model: this rank's part of the model, its shards released.
        tables: the tables' optimizer, with a learning rate of its own.
        experts: the optimizer of experts' weights, which has the dense part's learning rate; None if there are no such
            weights anywhere in the model.
        adam: the dense part's optimizer.

    Attributes:
        parameters: this rank's trained dense parameters, by their names in ``model.named_parameters()``.
        shard_optimizers: ``tables`` and, if there is one, ``experts``.
    """

    grad_clip: float
    _bucket_bytes = 0
    """Bytes of the buffer in which dense gradients are reduced; 0 if there is none beside the gradients."""

    def __init__(
        self, model: nn.Module, tables: TableOptimizer, experts: TableOptimizer | None, adam: DenseAdam
    ) -> None:
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.grad_clip, self.tables, self._experts = adam.grad_clip, tables, experts
        self.shard_optimizers = [tables] if experts is None else [tables, experts]

    @abc.abstractmethod
    def accumulate(self) -> AbstractContextManager[None]:
        """A context that adds up the gradients of the passes inside; on leaving they are reduced over ranks, once."""

    @abc.abstractmethod
    def read(self, numbers: Tensor) -> list[float]:
        """The numbers on the host. Collective; called once before each :meth:`step` or :meth:`skip`.

        Where the gradients' norm is the engine's own, it is computed first and read with them: one wait, not two.

        Args:
            numbers: float64 ``[n]``, on the model's device.
        """

    @abc.abstractmethod
    def step(self, lr: float, table_lr: float) -> StepResult:
        """Clip the gradients and update all parameters, or none on any rank if a gradient is not finite. Collective.

        Args:
            lr: learning rate of the dense parameters and of experts' weights.
            table_lr: learning rate of the tables.
        """

    @abc.abstractmethod
    def skip(self) -> None:
        """Drop the gradients instead of calling :meth:`step`, as if there had been no passes. All ranks call it."""

    @abc.abstractmethod
    def not_finite(self) -> list[str]:
        """Names of the parameters whose gradients on this rank are not finite, to be asked for before :meth:`step`.

        All ranks call it. It reads all gradients, so it is only meant to find out what went wrong.
        """

    def memory(self) -> dict[str, HeldBytes]:
        """Bytes that this rank holds now, by part: ``dense``, ``tables`` and, if the model has them, ``experts``."""
        shards = {part: optimizer.memory() for part, optimizer in zip(("tables", "experts"), self.shard_optimizers)}
        return {"dense": HeldBytes.of(*self._dense_tensors(), self._bucket_bytes), **shards}

    @abc.abstractmethod
    def _dense_tensors(self) -> tuple[Iterable[Tensor], Iterable[Tensor], Iterable[Tensor]]:
        """The tensors that hold weights, gradients and optimizer states of the dense part on this rank."""

    def _set_shard_lr(self, lr: float, table_lr: float) -> None:
        """Set the learning rates of experts' weights and of tables."""
        self.tables.set_lr(table_lr)
        if self._experts is not None:
            self._experts.set_lr(lr)

    def _shard_norm(self, device: torch.device) -> Tensor:
        """Reduce the gradients of all shards and return their norm over all ranks, a float32 scalar. Collective."""
        return torch.stack([optimizer.grad_norm(device) for optimizer in self.shard_optimizers]).norm()

    def _set_shard_steps(self, value: int) -> None:
        """Set the number of updates of all shards."""
        for optimizer in self.shard_optimizers:
            optimizer.steps = value

    def _skip_shards(self) -> None:
        """Drop the gradients of all shards."""
        for optimizer in self.shard_optimizers:
            optimizer.zero_grad()

    def _shards_not_finite(self) -> list[str]:
        """Names of the shards whose gradients are not finite."""
        grads = (named for optimizer in self.shard_optimizers for named in optimizer.gradients())
        return names_not_finite(
            (name, grad._values() if grad is not None and grad.is_sparse else grad) for name, grad in grads
        )

    def _finish(self, result: StepResult) -> StepResult:
        """Update the shards if the dense part was updated, else drop their gradients; return ``result``."""
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
        """Number of updates made; steps that were skipped do not count."""

    @steps.setter
    @abc.abstractmethod
    def steps(self, value: int) -> None: ...

    @abc.abstractmethod
    def whole_shapes(self) -> AbstractContextManager[None]:
        """A context in which every parameter has the shape that it would have without ZeRO.

        The values of parameters that ZeRO-3 has partitioned cannot be read there.
        """

    @abc.abstractmethod
    def dense_state(self, only: Container[str] | None = None) -> Iterator[tuple[str, str, Tensor]]:
        """Yield ``(parameter name, part, float32 tensor)`` for each of :data:`PARTS`, the master last.

        The tensors have the shapes of :meth:`whole_shapes`. A parameter is its master, rounded to its dtype. A
        collective call of the data-parallel group: every rank must take every item. ZeRO gathers one at a time.

        Args:
            only: names of the parameters to yield; by default all.
        """

    @abc.abstractmethod
    def load_dense_state(self, name: str, part: str, value: Tensor) -> None:
        """Put back, on this rank, what :meth:`dense_state` yielded. The master also becomes the parameter's value."""


def names_not_finite(grads: Iterable[tuple[str, Tensor | None]]) -> list[str]:
    """The names of those gradients in which some number is not finite."""
    return [name for name, grad in grads if grad is not None and not bool(grad.isfinite().all())]
