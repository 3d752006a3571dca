"""ZeRO-0: Megatron's data-parallel wrapper and its Adam, with the whole state of the optimizer on every rank."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Container, Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from peer_dist.engines.engine import MOMENTS, DenseAdam, Engine, StepResult, names_not_finite
from peer_dist.megatron import Parallel, wrap_data_parallel
from peer_dist.optim import TableOptimizer


class ReplicatedEngine(Engine):
    """An :class:`Engine` without ZeRO. Gradients are added up and reduced in float32.

    Args:
        model: from :func:`peer_dist.megatron.build_model`, its shards released.
        tables, experts, adam: see :class:`Engine`.
        parallel: this rank's groups.
    """

    def __init__(
        self,
        model: nn.ModuleList,
        tables: TableOptimizer,
        experts: TableOptimizer | None,
        adam: DenseAdam,
        parallel: Parallel,
    ) -> None:
        super().__init__(model, tables, experts, adam)
        self._data_parallel_size = parallel.data_parallel_size
        self._chunks, self._optimizer = wrap_data_parallel(model, adam.lr, adam.betas, adam.eps, adam.weight_decay)
        self._inner = self._optimizer.optimizer
        for group in self._inner.param_groups:
            for main in group["params"]:
                self._inner.state[main] = {
                    "step": torch.zeros((), dtype=torch.float32, device=main.device),
                    **{moment: torch.zeros_like(main) for moment in MOMENTS},
                }

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """Add up gradients in Megatron's float32 buffers, and average them over the data-parallel ranks on leaving."""
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()
        yield
        for chunk in self._chunks:
            chunk.finish_grad_sync()
            chunk.scale_gradients(1 / self._data_parallel_size)  # they were only added up

    def read(self, numbers: Tensor) -> list[float]:
        """The numbers and, behind them, the norm of dense gradients and shards together, which :meth:`step` needs."""
        self._optimizer.prepare_grads()
        self._norm = torch.hypot(self._dense_norm(numbers.device), self._shard_norm(numbers.device))
        *values, self._norm_value = torch.cat([numbers, self._norm.double().view(1)]).tolist()
        return values

    def step(self, lr: float, table_lr: float) -> StepResult:
        """Clip by the norm of dense gradients and shards together, and update both if it is finite."""
        for group in self._inner.param_groups:
            group["lr"] = lr
        self._set_shard_lr(lr, table_lr)
        result = StepResult(self._norm_value, math.isfinite(self._norm_value))
        if result.applied:
            if self.grad_clip > 0:
                clip_grads_with_norm_(self._optimizer.get_parameters(), self.grad_clip, self._norm)
            self._optimizer.step_with_ready_grads()
        return self._finish(result)

    def _dense_norm(self, device: torch.device) -> Tensor:
        """The norm of the dense gradients over tensor and pipeline ranks, a float32 scalar. Collective.

        Megatron's own waits for the norm of each gradient, unless it has kernels of apex's or TransformerEngine's.
        """
        square = get_total_norm(self._optimizer.get_main_grads_for_grad_norm()).to(device).square()
        dist.all_reduce(square, group=self._optimizer.get_grad_stats_parallel_group())
        return square.sqrt()

    def skip(self) -> None:
        """Clear the gradients' buffers and the shards' gradients."""
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()
        self._skip_shards()

    def not_finite(self) -> list[str]:
        """Names of the parameters whose reduced gradients on this rank are not finite."""
        dense = ((name, parameter.main_grad) for name, parameter in self.parameters.items())  # type: ignore[attr-defined]
        return names_not_finite(dense) + self._shards_not_finite()

    @property
    def steps(self) -> int:
        """Number of updates, as Adam counts them."""
        return int(self._state(next(iter(self.parameters)))["step"])

    @steps.setter
    def steps(self, value: int) -> None:
        for state in self._inner.state.values():
            state["step"].fill_(float(value))
        self._set_shard_steps(value)

    def _dense_tensors(self) -> tuple[Iterable[Tensor], Iterable[Tensor], Iterable[Tensor]]:
        gradients = (buffer.grad_data for chunk in self._chunks for buffer in chunk.buffers)
        states = (part for name in self.parameters for part in (self._main(name), *self._state(name).values()))
        return self.parameters.values(), gradients, states

    @contextlib.contextmanager
    def whole_shapes(self) -> Iterator[None]:
        """A context without effect: parameters are never partitioned."""
        yield

    def _main(self, name: str) -> Tensor:
        """The float32 copy of a parameter that Adam updates, or the parameter itself if it is float32."""
        parameter = self.parameters[name]
        return parameter if parameter.dtype == torch.float32 else parameter.main_param  # type: ignore[attr-defined]

    def _state(self, name: str) -> dict[str, Tensor]:
        """Adam's state of a parameter."""
        return self._inner.state[self._main(name)]

    def dense_state(self, only: Container[str] | None = None) -> Iterator[tuple[str, str, Tensor]]:
        """Yield Adam's own tensors, which every rank has: nothing is copied or gathered."""
        for name in self.parameters:
            if only is not None and name not in only:
                continue
            for moment in MOMENTS:
                yield name, moment, self._state(name)[moment]
            yield name, "master", self._main(name).detach()

    @torch.no_grad()
    def load_dense_state(self, name: str, part: str, value: Tensor) -> None:
        """Copy ``value`` into Adam's tensor and, if it is the master, into the parameter."""
        if part == "master":
            self._main(name).copy_(value)
            self.parameters[name].copy_(value)
        else:
            self._state(name)[part].copy_(value)
