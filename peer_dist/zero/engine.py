"""DeepSpeed ZeRO for the dense part, and the expert tables stepped beside it under one global norm.

The tables are no parameters of the module that DeepSpeed sees: it would broadcast and average what is
already sharded. What ties the two together is the gradient norm: the tables' part enters DeepSpeed's own
norm, so that clipping, and skipping a step with non-finite gradients, happen to both alike.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.ops
from deepspeed.runtime.utils import combine_grad_norm_groups
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)

from peer_dist.optim import TableOptimizer

# A shared-memory extension for CPU collectives, compiled for a minute at first use; gloo serves as well.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*torch.distributed.*is deprecated", category=FutureWarning)

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step did.

    Attributes:
        grad_norm: the norm of all gradients, dense and table, before clipping; inf or nan if not finite.
        applied: False where non-finite gradients made every rank skip the step.
    """

    grad_norm: float
    applied: bool


class ZeroEngine:
    """AdamW over a model's dense parameters with ZeRO-1, and a table optimizer in step with it.

    Args:
        model: without its tables (released).
        tables: the optimizer of the expert tables.
        mpu: Megatron's groups in the form that DeepSpeed asks for.
        grad_clip: global norm to clip at; 0 never clips.
        dtype: of the model's parameters, float32 or bfloat16.

    DeepSpeed averages gradients over data parallel ranks, and so are the tables' here: scale each rank's loss
    so that the average over ranks is the loss meant.
    """

    def __init__(
        self,
        model: nn.Module,
        tables: TableOptimizer,
        *,
        mpu: Any,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        grad_clip: float,
        dtype: torch.dtype,
    ) -> None:
        self.tables = tables
        self._grad_clip = grad_clip
        parameters = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        adam = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, eps=eps, fused=True)
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,  # counted by us: the schedule runs all micro-batches
            "gradient_accumulation_steps": 1,
            "gradient_clipping": grad_clip,
            "steps_per_print": 2**60,
            "zero_optimization": {"stage": 1},
        }
        if dtype == torch.bfloat16:
            config["bf16"] = {"enabled": True}
        os.environ.setdefault("LOCAL_RANK", str(torch.cuda.current_device() if torch.cuda.is_available() else 0))
        with _quiet():
            self._engine, *_ = deepspeed.initialize(
                model=model, optimizer=adam, config=config, mpu=mpu, dist_init_required=False
            )
        self._zero = self._engine.optimizer
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._init_state()
        dense_norm = self._zero.scaled_global_norm
        self._zero.scaled_global_norm = lambda *args, **kwargs: combine_grad_norm_groups(
            [dense_norm(*args, **kwargs), self._table_norm()]
        )

    def _init_state(self) -> None:
        """Make Adam's state before the first step, so that it can be saved and loaded at any step."""
        inner = self._zero.optimizer
        for group in inner.param_groups:
            for flat in group["params"]:
                inner.state[flat] = {
                    "step": torch.zeros((), dtype=torch.float32, device=flat.device),
                    "exp_avg": torch.zeros_like(flat.data),
                    "exp_avg_sq": torch.zeros_like(flat.data),
                }
        self._zero._lazy_init_hp_params_optimizer_state()

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """Forward and backward passes inside add up; the reduction over ranks happens once, on leaving."""
        with self._engine.coalesce_grad_reduction():
            yield

    def _table_norm(self) -> Tensor:
        """Called by DeepSpeed inside its step."""
        norm = self.tables.grad_norm(next(iter(self._parameters.values())).device)
        # -1 is how DeepSpeed marks a norm that is not finite
        return torch.where(torch.isfinite(norm), norm, torch.full_like(norm, -1.0))

    def step(self, lr: float, table_lr: float) -> StepResult:
        """Clip and update everything, or, with non-finite gradients, nothing on any rank."""
        for group in self._zero.optimizer.param_groups:
            group["lr"] = lr
        self.tables.set_lr(table_lr)
        self._engine.step()
        applied = bool(self._engine.was_step_applied())
        norm = float(self._engine.get_global_grad_norm())
        if not applied:
            self.tables.zero_grad()
            return StepResult(norm, applied)
        clip = (norm + 1e-6) / self._grad_clip if self._grad_clip > 0 else 0.0
        self.tables.step(1 / clip if clip > 1 else 1.0)
        return StepResult(norm, applied)

    # What follows turns ZeRO's partitions into whole parameters and back, so that checkpoints fit any layout.

    @property
    def steps(self) -> int:
        """Updates made."""
        return int(next(iter(self._zero.optimizer.state.values()))["step"])

    @steps.setter
    def steps(self, value: int) -> None:
        for state in self._zero.optimizer.state.values():
            state["step"].fill_(float(value))
        self.tables.steps = value

    def dense_state(self) -> Iterator[tuple[str, str, Tensor]]:
        """``(parameter name, part, whole float32 tensor)`` for the parts exp_avg, exp_avg_sq and master.

        A collective over the data parallel group: take every item on every rank.
        """
        for name, parameter in self._parameters.items():
            for moment in MOMENTS:
                yield name, moment, safe_get_full_optimizer_state(parameter, moment)
            yield name, "master", safe_get_full_fp32_param(parameter)

    @torch.no_grad()
    def load_dense_state(self, name: str, part: str, value: Tensor) -> None:
        """Put back what :meth:`dense_state` gave."""
        parameter = self._parameters[name]
        if part == "master":
            safe_set_full_fp32_param(parameter, value)
            parameter.copy_(value)
        else:
            safe_set_full_optimizer_state(parameter, value, part)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed prints its set-up to stdout."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
