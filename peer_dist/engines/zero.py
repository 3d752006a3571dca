"""DeepSpeed ZeRO for the dense part, and the expert tables stepped beside it under one global norm.

No other module imports deepspeed.

The tables are no parameters of the module that DeepSpeed sees: it would broadcast and average what is
already sharded. What ties the two together is the gradient norm: the tables' part enters DeepSpeed's own
norm, so that clipping, and skipping a step with non-finite gradients, happen to both alike.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Container, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.ops
from deepspeed.runtime.utils import combine_grad_norm_groups
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)

from peer_dist.engines.engine import MOMENTS, DenseAdam, Engine, StepResult, names_not_finite
from peer_dist.layers.product_key_layer import ProductKeyLayer
from peer_dist.optim import TableOptimizer
from peer_dist.optim.held_bytes import BUCKET

# A shared-memory extension for CPU collectives, compiled for a minute at first use; gloo serves as well.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*torch.distributed.*is deprecated", category=FutureWarning)


class ZeroEngine(Engine):
    """See :class:`peer_dist.engines.Engine`: DeepSpeed ZeRO-1, 2 or 3.

    Args:
        model: the stage's chunks of the model, without their shards (released).
        stage: 1, 2 or 3; 3 for one chunk only.
        offload: masters and moments stay in host memory, and torch's AdamW steps them there.
        mpu: Megatron's groups in the form that DeepSpeed asks for.
        dtype: of the model's parameters, float32 or bfloat16.
    """

    def __init__(
        self,
        model: nn.ModuleList,
        tables: TableOptimizer,
        experts: TableOptimizer | None,
        adam: DenseAdam,
        *,
        stage: int,
        offload: bool,
        mpu: Any,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(model, tables, experts, adam)
        self._stage, self._skipping = stage, False
        parameters = list(self.parameters.values())
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": adam.weight_decay},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        inner = torch.optim.AdamW(groups, lr=adam.lr, betas=adam.betas, eps=adam.eps, fused=True)
        # it is allocated whole: one of DeepSpeed's default size would be most of what a small model needs
        bucket = min(BUCKET, sum(parameter.numel() for parameter in parameters))
        self._bucket_bytes = bucket * parameters[0].element_size()
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,  # counted by us: the schedule runs all micro-batches
            "gradient_accumulation_steps": 1,
            "gradient_clipping": adam.grad_clip,
            "steps_per_print": 2**60,
            "zero_optimization": {"stage": stage, "reduce_bucket_size": bucket},
        }
        if offload:
            config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
            config["zero_force_ds_cpu_optimizer"] = False  # DeepSpeed's own is compiled for minutes at first use
        if dtype == torch.bfloat16:
            config["bf16"] = {"enabled": True}
        for parameter in parameters:  # of the two copies of a tied embedding one counts in the norm
            parameter.ds_pipe_replicated = getattr(parameter, "shared", False)  # type: ignore[attr-defined]
        seen: nn.Module = model
        if stage == 3:
            (seen,) = model  # whose forward pass starts ZeRO-3's
            # such a layer reads its sub-modules' parameters itself: they are to be fetched with its own
            deepspeed.utils.set_z3_leaf_modules(seen, [ProductKeyLayer], raise_if_not_found=False)
        os.environ.setdefault("LOCAL_RANK", str(torch.cuda.current_device() if torch.cuda.is_available() else 0))
        with _quiet():
            self._engine, *_ = deepspeed.initialize(
                model=seen, optimizer=inner, config=config, mpu=mpu, dist_init_required=False
            )
        self._zero = self._engine.optimizer
        self._init_state()
        if stage == 3:
            groups_of_norms = self._zero._get_norm_groups
            self._zero._get_norm_groups = lambda: [*groups_of_norms(), self._norm_of_shards()]
        else:
            dense_norm = self._zero.scaled_global_norm
            self._zero.scaled_global_norm = lambda *args, **kwargs: combine_grad_norm_groups(
                [dense_norm(*args, **kwargs), self._norm_of_shards()]
            )

    def _masters(self) -> list[Tensor]:
        """This rank's partitions of the float32 parameters, which Adam steps."""
        if self._stage == 3:
            return list(self._zero.fp32_partitioned_groups_flat)
        return [flat for group in self._zero.optimizer.param_groups for flat in group["params"]]

    def _init_state(self) -> None:
        """Make Adam's state before the first step, so that it can be saved and loaded at any step."""
        inner = self._zero.optimizer
        for flat in self._masters():
            inner.state[flat] = {
                "step": torch.zeros((), dtype=torch.float32, device=flat.device),
                **{moment: torch.zeros_like(flat.data) for moment in MOMENTS},
            }
        if self._stage < 3:
            self._zero._lazy_init_hp_params_optimizer_state()

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        with self._engine.coalesce_grad_reduction():
            yield

    def _norm_of_shards(self) -> Tensor:
        """Called by DeepSpeed inside its step."""
        if self._skipping:
            return torch.full((), -1.0, device=next(iter(self.parameters.values())).device)
        norm = self._shard_norm(next(iter(self.parameters.values())).device)
        # -1 is how DeepSpeed marks a norm that is not finite
        return torch.where(torch.isfinite(norm), norm, torch.full_like(norm, -1.0))

    def step(self, lr: float, table_lr: float) -> StepResult:
        for group in self._zero.optimizer.param_groups:
            group["lr"] = lr
        self._set_shard_lr(lr, table_lr)
        self._engine.step()
        return self._finish(
            StepResult(float(self._engine.get_global_grad_norm()), bool(self._engine.was_step_applied()))
        )

    def skip(self) -> None:
        """By DeepSpeed's own way out of a step whose norm is not finite: it knows all that has to be cleared."""
        self._skipping = True
        try:
            self._engine.step()
        finally:
            self._skipping = False
        assert not self._engine.was_step_applied()
        self._skip_shards()

    def not_finite(self) -> list[str]:
        dense = ((name, safe_get_full_grad(parameter)) for name, parameter in self.parameters.items())
        return names_not_finite(dense) + self._shards_not_finite()

    def _dense_tensors(self) -> tuple[Iterable[Tensor], Iterable[Tensor], Iterable[Tensor]]:
        zero, parameters = self._zero, self.parameters.values()
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        moments = [part for state in zero.optimizer.state.values() for part in state.values()]
        if self._stage == 3:
            weights = [zero.lp_param_buffer, *parameters]
            return (
                weights,
                [*gradients, zero.grad_partitions_flat_buffer],
                [*zero.fp32_partitioned_groups_flat, *moments],
            )
        return zero.bit16_groups_flat, gradients, [*zero.single_partition_of_fp32_groups, *moments]

    # What follows turns ZeRO's partitions into whole parameters and back, so that checkpoints fit any layout.

    @property
    def steps(self) -> int:
        return int(next(iter(self._zero.optimizer.state.values()))["step"])

    @steps.setter
    def steps(self, value: int) -> None:
        for state in self._zero.optimizer.state.values():
            state["step"].fill_(float(value))
        self._set_shard_steps(value)

    @contextlib.contextmanager
    def whole_shapes(self) -> Iterator[None]:
        apart = [p for p in self.parameters.values() if self._stage == 3 and p.shape != p.ds_shape]  # type: ignore[attr-defined]
        data = [parameter.data for parameter in apart]
        for parameter in apart:
            parameter.data = parameter.new_empty(()).expand(parameter.ds_shape)  # type: ignore[attr-defined]
        try:
            yield
        finally:
            for parameter, value in zip(apart, data):
                parameter.data = value

    def dense_state(self, only: Container[str] | None = None) -> Iterator[tuple[str, str, Tensor]]:
        for name, parameter in self.parameters.items():
            if only is not None and name not in only:
                continue
            for moment in MOMENTS:
                yield name, moment, safe_get_full_optimizer_state(parameter, moment)
            yield name, "master", safe_get_full_fp32_param(parameter)

    @torch.no_grad()
    def load_dense_state(self, name: str, part: str, value: Tensor) -> None:
        parameter = self.parameters[name]
        if self._stage == 3:
            own = self._partition(parameter, value)
            if part == "master":
                safe_set_local_fp32_param(parameter, own)
                parameter.ds_tensor.copy_(own)  # type: ignore[attr-defined]
                if parameter.shape == value.shape:  # small ones stay whole on every rank between passes
                    parameter.copy_(value)
            else:
                safe_set_local_optimizer_state(parameter, own, part)
        elif part == "master":
            safe_set_full_fp32_param(parameter, value)
            parameter.copy_(value)
        else:
            safe_set_full_optimizer_state(parameter, value, part)

    def _partition(self, parameter: Any, value: Tensor) -> Tensor:
        """This rank's part of a parameter, as ZeRO-3 cuts it: flat, padded to equal parts."""
        size, group = parameter.ds_tensor.ds_numel, parameter.ds_process_group
        padded = torch.nn.functional.pad(value.flatten(), (0, size * dist.get_world_size(group) - value.numel()))
        return padded.narrow(0, size * dist.get_rank(group), size)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed prints its set-up to stdout."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
