"""DeepSpeed ZeRO for the dense part, and shards updated beside it under one global norm.

No other module imports deepspeed.

The shards are no parameters of the module that DeepSpeed sees, because it would broadcast and average what is already
sharded. The gradient norm ties the two together: the shards' part is added to DeepSpeed's own norm, so that gradients
are clipped, and steps with gradients that are not finite are skipped, in both alike.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import warnings
from collections.abc import Callable, Container, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# DeepSpeed would ask for seven other kinds of accelerators first, and believe what the variable says of another machine
os.environ["DS_ACCELERATOR"] = "cuda" if torch.cuda.is_available() else "cpu"

import deepspeed
import deepspeed.ops
from deepspeed.accelerator import cuda_accelerator
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

# No operation of DeepSpeed's own: to read which there are starts compilers on every rank and prints to stdout. Only one
# is ever asked for, shared memory for CPU collectives, which takes a minute to compile; gloo serves as well.
deepspeed.ops.__compatible_ops__ = {}
if not all(gpu.isdecimal() for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")):
    cuda_accelerator.pynvml = None  # DeepSpeed reads numbers there, not GPU-... or MIG-...; torch knows the memory too
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*torch.distributed.*is deprecated", category=FutureWarning)


class ZeroEngine(Engine):
    """An :class:`Engine` with DeepSpeed's ZeRO-1, 2 or 3.

    Args:
        model: the pipeline stage's chunks of the model, their shards released.
        tables, experts, adam: see :class:`Engine`.
        stage: ZeRO's stage: 1, 2 or 3; 3 for a model of one chunk only.
        offload: whether masters and moments stay in host memory, where torch's AdamW updates them.
        mpu: Megatron's groups in the form that DeepSpeed asks for.
        dtype: dtype of the model's parameters, float32 or bfloat16.
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
        # the bucket is allocated whole: with DeepSpeed's default size it would take most of a small model's memory
        bucket = min(BUCKET, sum(parameter.numel() for parameter in parameters))
        self._bucket_bytes = bucket * parameters[0].element_size()
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,  # not counted by DeepSpeed: Megatron's schedule runs all micro-batches
            "gradient_accumulation_steps": 1,
            "gradient_clipping": adam.grad_clip,
            "steps_per_print": 2**60,
            "timers": {"throughput": {"enabled": False}},  # under ZeRO-3 it waits for the device before each pass
            "zero_optimization": {"stage": stage, "reduce_bucket_size": bucket},
        }
        if offload:
            # from pageable memory a copy to the device has a fraction of the bus's rate
            config["zero_optimization"]["offload_optimizer"] = {
                "device": "cpu",
                "pin_memory": torch.cuda.is_available(),
            }
            config["zero_force_ds_cpu_optimizer"] = False  # DeepSpeed's own takes minutes to compile at first use
        if dtype == torch.bfloat16:
            config["bf16"] = {"enabled": True}
        for parameter in parameters:  # only one of a tied embedding's two copies counts in the norm
            parameter.ds_pipe_replicated = getattr(parameter, "shared", False)  # type: ignore[attr-defined]
        module: nn.Module = model
        if stage == 3:
            (module,) = model  # ZeRO-3 hooks into the forward pass of the chunk itself
            # these layers read their sub-modules' parameters themselves, so they must be gathered together
            deepspeed.utils.set_z3_leaf_modules(module, [ProductKeyLayer], raise_if_not_found=False)
        if torch.cuda.is_available():
            os.environ["LOCAL_RANK"] = str(torch.cuda.current_device())  # which DeepSpeed makes the current device
        else:
            os.environ.setdefault("LOCAL_RANK", "0")
        with _quiet():
            self._engine, *_ = deepspeed.initialize(
                model=module, optimizer=inner, config=config, mpu=mpu, dist_init_required=False
            )
        self._zero = self._engine.optimizer
        self._init_state()
        self._norm = math.inf
        if stage == 3:
            self._dense_norms = self._zero._get_norm_groups
            self._zero._get_norm_groups = lambda: [self._norm_to_clip_by()]
        else:
            dense_norm = self._zero.scaled_global_norm
            self._dense_norms = lambda: [dense_norm()]
            self._zero.scaled_global_norm = self._norm_to_clip_by

    def _masters(self) -> list[Tensor]:
        """This rank's partitions of the float32 masters, which Adam updates."""
        if self._stage == 3:
            return list(self._zero.fp32_partitioned_groups_flat)
        return [flat for group in self._zero.optimizer.param_groups for flat in group["params"]]

    def _init_state(self) -> None:
        """Make Adam's state now instead of in the first step, so that it can be saved and loaded before that."""
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
        """Let DeepSpeed add up the gradients of the passes inside, and reduce them once on leaving."""
        with self._engine.coalesce_grad_reduction():
            yield

    def read(self, numbers: Tensor) -> list[float]:
        """The numbers and, behind them, the norm of all gradients, which :meth:`step` gives to DeepSpeed."""
        norm = self._global_norm(_on_host(self._dense_norms), self._shard_norm(numbers.device))
        *values, norm_read = torch.cat([numbers, norm.double().view(1).to(numbers.device)]).tolist()
        self._host_norm = torch.tensor(norm_read, dtype=norm.dtype, device="cpu")
        return values

    def _global_norm(self, dense: list[Tensor], shards: Tensor) -> Tensor:
        """The norm of all gradients, infinite if it is not finite, where DeepSpeed's own ``dense`` norms are: with
        offload in host memory.
        """
        # -1 is how DeepSpeed marks a norm that is not finite
        marked = torch.where(torch.isfinite(shards), shards, torch.full_like(shards, -1.0))
        return combine_grad_norm_groups([*dense, marked.to(dense[0].device)])

    def _norm_to_clip_by(self) -> Tensor:
        """The norm as DeepSpeed asks for it in its step, infinite to make it skip.

        It is in host memory: DeepSpeed asks several times whether it is finite, and divides gradients anywhere by it.
        """
        if self._skipping:
            return torch.full_like(self._host_norm, math.inf)
        self._norm = float(self._host_norm)
        return self._host_norm

    def step(self, lr: float, table_lr: float) -> StepResult:
        """Let DeepSpeed clip and update the dense part by the common norm, and do the same to the shards."""
        for group in self._zero.optimizer.param_groups:
            group["lr"] = lr
        self._set_shard_lr(lr, table_lr)
        self._norm = math.inf  # as long as DeepSpeed does not ask for it, having found a gradient that is not finite
        self._engine.step()
        result = self._finish(StepResult(self._norm, bool(self._engine.was_step_applied())))
        if self._stage == 3 and torch.cuda.is_available():
            # the stream on which DeepSpeed gathers parameters for the next pass does not wait for their update
            torch.cuda.synchronize()
        return result

    def skip(self) -> None:
        """Make DeepSpeed skip a step as if its norm were not finite: it knows all that has to be cleared."""
        self._skipping = True
        try:
            self._engine.step()
        finally:
            self._skipping = False
        assert not self._engine.was_step_applied()
        self._skip_shards()

    def not_finite(self) -> list[str]:
        """Names of the parameters whose gradients, gathered from all ranks, are not finite."""
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

    # The methods below turn ZeRO's partitions into whole tensors and back, so that checkpoints fit any layout.

    @property
    def steps(self) -> int:
        """Number of updates, as Adam counts them."""
        return int(next(iter(self._zero.optimizer.state.values()))["step"])

    @steps.setter
    def steps(self, value: int) -> None:
        for state in self._zero.optimizer.state.values():
            state["step"].fill_(float(value))
        self._set_shard_steps(value)

    @contextlib.contextmanager
    def whole_shapes(self) -> Iterator[None]:
        """A context in which partitioned parameters are expanded from one element without a value."""
        parameters = self.parameters.values() if self._stage == 3 else ()
        partitioned = [p for p in parameters if p.shape != p.ds_shape]  # type: ignore[attr-defined]
        data = [parameter.data for parameter in partitioned]
        for parameter in partitioned:
            parameter.data = parameter.new_empty(()).expand(parameter.ds_shape)  # type: ignore[attr-defined]
        try:
            yield
        finally:
            for parameter, value in zip(partitioned, data):
                parameter.data = value

    def dense_state(self, only: Container[str] | None = None) -> Iterator[tuple[str, str, Tensor]]:
        """Yield tensors that DeepSpeed gathers from the data-parallel ranks, one at a time."""
        for name, parameter in self.parameters.items():
            if only is not None and name not in only:
                continue
            for moment in MOMENTS:
                yield name, moment, safe_get_full_optimizer_state(parameter, moment)
            yield name, "master", safe_get_full_fp32_param(parameter)

    @torch.no_grad()
    def load_dense_state(self, name: str, part: str, value: Tensor) -> None:
        """Copy this rank's part of ``value`` into ZeRO's partition and, if it is the master, into the parameter."""
        parameter = self.parameters[name]
        if self._stage == 3:
            own = self._partition(parameter, value)
            if part == "master":
                safe_set_local_fp32_param(parameter, own)
                parameter.ds_tensor.copy_(own)  # type: ignore[attr-defined]
                if parameter.shape == value.shape:  # ZeRO-3 keeps small parameters whole on every rank
                    parameter.copy_(value)
            else:
                safe_set_local_optimizer_state(parameter, own, part)
        elif part == "master":
            safe_set_full_fp32_param(parameter, value)
            parameter.copy_(value)
        else:
            safe_set_full_optimizer_state(parameter, value, part)

    def _partition(self, parameter: Any, value: Tensor) -> Tensor:
        """This rank's part of ``value``, as ZeRO-3 partitions ``parameter``: flat, padded to equal parts."""
        size, group = parameter.ds_tensor.ds_numel, parameter.ds_process_group
        padded = torch.nn.functional.pad(value.flatten(), (0, size * dist.get_world_size(group) - value.numel()))
        return padded.narrow(0, size * dist.get_rank(group), size)


def _on_host(make: Callable[[], Any]) -> Any:
    """What ``make`` of DeepSpeed's gives, which names no device for what it makes on the CPU and moves."""
    with torch.device("cpu"):
        return make()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """A context that hides stdout, where DeepSpeed prints its set-up."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
