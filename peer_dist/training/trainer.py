"""A training run, from the config to the last checkpoint. :meth:`Trainer.step` is one step of it."""

from __future__ import annotations

import math
import platform
import resource
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from rich.text import Text

from peer_dist import __version__
from peer_dist.checkpoints.manifest import read_manifest
from peer_dist.checkpoints.resuming import check_resumable, data_identity
from peer_dist.checkpoints.sources import open_source
from peer_dist.checkpoints.state import restore_run, run_state
from peer_dist.checkpoints.store import CheckpointStore
from peer_dist.config import Config
from peer_dist.data.stream import open_data
from peer_dist.engines import StepResult
from peer_dist.engines.building import dtype_of, join_groups, make_engine
from peer_dist.engines.revival import Revival
from peer_dist.kernels.far import FarRows, FarTraffic, far_rows_of
from peer_dist.kinds import PEER
from peer_dist.layers.sparse_layer import RouteObserver
from peer_dist.measures.held_out import MicroBatches, held_out_loss, perplexity_of
from peer_dist.measures.metrics import Metrics
from peer_dist.measures.usage import ExpertUsage, share_histogram
from peer_dist.measures.usage_map import usage_map
from peer_dist.megatron import build_model, count_parameters, routers, run_forward_backward, shards_of, sparse_layers
from peer_dist.mistake import Mistake
from peer_dist.optim import HeldBytes, learning_rate_factor
from peer_dist.output import messages
from peer_dist.ranks.exit_codes import DIVERGED
from peer_dist.ranks.lock import RunLock, run_lock
from peer_dist.ranks.rank_zero import from_every_rank
from peer_dist.ranks.signals import StopRequest
from peer_dist.ranks.watchdog import Watchdog, record_nccl
from peer_dist.ranks.world import World
from peer_dist.tracing import StepTimes, listen, position, span
from peer_dist.training.guard import Diverged, Guard
from peer_dist.training.profiling import Profile
from peer_dist.training.readiness import check_ready
from peer_dist.training.run import Run
from peer_dist.training.startup import Startup
from peer_dist.training.stragglers import Stragglers
from peer_dist.writing import no_empty_folders

Value = TypeVar("Value")
_NO_SPIKES = {"spikes": 0, "in_a_row": 0, "losses": []}  # for checkpoints older than the guard
_SPANS = ("retrieve", "dispatch", "experts", "combine", "optimizer")


def train(config: Config, profile: range | None = None) -> int:
    """Train as the config says, from the newest checkpoint if there is one.

    Args:
        config: the run's config.
        profile: the steps to trace, counted from 1 (see :class:`~peer_dist.training.profiling.Profile`).

    Returns:
        The process's exit code, from :mod:`peer_dist.ranks.exit_codes`.

    Raises:
        Mistake: the run cannot begin, or not go on (:func:`~peer_dist.training.readiness.check_ready`); nothing has
            been started yet.
        LockError: another run writes to this one's folder.
        CheckpointError: a checkpoint cannot be written or read.
    """
    startup = Startup()
    startup.ended("import")
    world = World.from_environment()
    remarks = check_ready(config, world.world_size, world.local_world_size)
    with no_empty_folders(config.checkpoint.dir, config.logging.dir):
        record_nccl(config.logging.dir)
        with world.joined(), StopRequest() as stop, Watchdog(config.train.watchdog_seconds):
            startup.ended("join")
            if world.rank == 0:
                ranks = f": {world.world_size} rank(s)" if world.master_port else ""
                messages().print(f"{world.launcher}{ranks}")
                for remark in remarks:
                    messages().print(remark)
            with run_lock(config.checkpoint.dir, world.rank) as lock:
                try:
                    code = Trainer(config, startup, profile).run(stop, lock)
                except Diverged as error:  # on every rank
                    messages(quiet=world.rank != 0).print(Text.assemble(("stopped:", "red"), f" {error}"))
                    code = DIVERGED
    return code


class Trainer:
    """One run on this rank. All ranks construct it together.

    Args:
        config: the run's config.
        startup: the phases of the process's start that have been timed so far; by default none.
        profile: the steps to trace, counted from 1; by default none.

    Attributes:
        steps_done: number of steps since the run's first, those before a resumption included.
        resumed: whether the run goes on from a checkpoint of its own.
        parameters: number of trained parameters of the whole model, those in experts included.
        expert_parameters: number of those that are in tables and experts' weights.
        layers: this rank's layers with experts, by number in the whole model.
        last_save: ``checkpoint/...`` numbers of the last :meth:`save`, for the metrics.
        flags: asked in each step for what this rank wants the others to know; as many flags on every rank.
        flagged: for each of them, whether any rank had it in the last step.

    Raises:
        DataError, CheckpointError: see :func:`train`.
    """

    def __init__(self, config: Config, startup: Startup | None = None, profile: range | None = None) -> None:
        self.config = config
        self.profile = None if profile is None else Profile(profile, Path(config.logging.dir) / "profile")
        self.startup = startup or Startup()
        self.parallel = join_groups(config)
        self.dtype = dtype_of(config, self.parallel.device.type)
        self.data_identity = data_identity(config)  # read now: the files may be moved or replaced during the run
        self.data = open_data(config.data, config.model.seq_length, config.train.seed)
        self.startup.ended("data")
        self.model = build_model(config, self.parallel, self.data.tokenizer.padded_vocab_size, self.dtype)
        self.layers, self.routers = sparse_layers(self.model), routers(self.model)
        own = sum(shard.parameter.numel() for shard in shards_of(self.model).values())
        owned = torch.tensor(own, dtype=torch.int64, device=self.parallel.device)
        dist.all_reduce(owned)
        self.expert_parameters = int(owned) // self.parallel.expert_data_size
        self.parameters = count_parameters(self.model, self.parallel) + self.expert_parameters
        for layer in self.layers.values():
            layer.release_shards()
        self.revive_interval = PEER.keys(config).revive_interval
        self.revival = Revival(self.model, self.parallel, config.train.seed) if self.revive_interval else None
        self.store = CheckpointStore(config.checkpoint.dir, config.checkpoint.keep)
        self.steps_done = 0
        self.last_save: dict[str, float] = {}
        self.flags: Callable[[], Sequence[bool]] = tuple  # no flags
        self.flagged: list[bool] = []
        self.guard = Guard(config.guard)
        self._ahead: dict[int, MicroBatches] = {}  # of the step to come

        console = messages(quiet=self.parallel.rank != 0)
        resumed = self.store.newest(config.checkpoint.fall_back, console.print)
        if resumed is None and config.checkpoint.init_from is not None:
            open_source(config, self.data.tokenizer).restore(self.model, self.parallel)
        self.engine = make_engine(config, self.model, self.parallel, self.dtype)
        self.startup.ended("build")
        self.resumed = resumed is not None
        if resumed is not None:
            self._resume(resumed)
            self.startup.ended("resume")

        self.times = StepTimes(self.parallel.device)
        self.stragglers = Stragglers(self.parallel, columns=config.parallel.expert_tensor > 1)
        self.usage = self._new_usage()

    def _new_usage(self) -> dict[int, ExpertUsage]:
        """Empty usage of each of this rank's layers with experts, by number in the whole model."""
        return {n: ExpertUsage(layer.num_experts, self.parallel.device) for n, layer in self.layers.items()}

    def _resume(self, step: int) -> None:
        """Restore everything from this run's checkpoint of step ``step``."""
        path = self.store.path(step)
        manifest = read_manifest(path)
        check_resumable(path, self.config, self.data_identity, manifest)
        updates = manifest.get("updates", step)
        restore_run(path, self.model, self.engine, self.parallel, updates, self.revival)
        self.steps_done = step
        self.guard.load({"not_finite": step - updates, **_NO_SPIKES, **manifest.get("guard", {})})

    def run(self, stop: StopRequest, lock: RunLock | None = None) -> int:
        """Train to ``train.steps``, or until a signal; the last state is saved either way.

        Args:
            stop: knows whether a signal has asked this process to save and leave.
            lock: the lock of the run's folder; None on ranks other than 0.

        Returns:
            The process's exit code.

        Raises:
            LockError, CheckpointError, Diverged: see :meth:`Run.after_step`.
        """
        run = Run(self, stop, lock)
        run.introduce()
        if run.over:
            return run.nothing_to_do()
        first = self.steps_done
        with run.begin():
            while not run.over:
                position.at("first step" if self.steps_done == first else "step", self.steps_done + 1)
                with self.profile.step(self.steps_done + 1) if self.profile else nullcontext():
                    values = self.step()
                run.after_step(values)
        return run.end()

    def step(self) -> dict[str, float]:
        """Make one optimizer step over a global batch.

        Returns:
            The step's numbers, by their names in metrics.jsonl. Losses, learning rates and norms are the same on every
            rank; times and memory are this rank's.
        """
        begin = time.perf_counter()
        config, parallel, step = self.config, self.parallel, self.steps_done
        parallel.seed_step(config.train.seed, step)
        micro_batches = self._ahead.pop(step, None) or self._micro_batches(step)
        factor = learning_rate_factor(
            step, config.optimizer.warmup_steps, config.optimizer.decay_steps, config.optimizer.min_lr_ratio
        )
        lr = config.optimizer.lr * factor
        table_lr = config.table_optimizer.lr * learning_rate_factor(step, *config.table_schedule)
        tokens = config.train.global_batch_size * config.model.seq_length

        logged = (step + 1) % config.logging.interval == 0
        self.times.reset()
        listen(self.times)
        for number, layer in self.layers.items():
            layer.on_route = self.route_observer(number)
        with self.engine.accumulate():
            # engines average gradients over data-parallel ranks: with their number in the scale it is the mean loss's
            losses = run_forward_backward(self.model, micro_batches, parallel.data_parallel_size / tokens)
            memory = HeldBytes.sum(self.engine.memory().values()) if logged else None
        if step + 1 < config.train.steps:  # before the host waits for the device, which has all of the passes to do
            self._ahead = {step + 1: self._micro_batches(step + 1)}
            self._ahead[step + 1].make_first()
        numbers = self._numbers(losses)
        with span("optimizer"):
            total, *traffic = self.engine.read(numbers)
            loss = total / tokens
            spike = self.guard.is_spike(loss)
            not_finite = self._not_finite() if self.guard.in_a_row or not math.isfinite(loss) else []
            if spike:
                self.engine.skip()
                result = StepResult(math.nan, applied=False)
            else:
                result = self.engine.step(lr, table_lr)
        listen(None)
        for router in self.routers.values():
            router.end_step(result.applied)
        for layer in self.layers.values():
            layer.on_route = None
        revived: dict[str, float] = {}
        if self.revival is not None and (step + 1) % self.revive_interval == 0:
            revived["experts/revived_subkeys"] = self.revival.revive(self.engine, step + 1)
        first = step * config.train.global_batch_size
        sequences = (first, first + config.train.global_batch_size)
        self.steps_done += 1
        self.guard.record(self.steps_done, sequences, loss, result.grad_norm, result.applied, spike, not_finite)

        spent = self.times.read()  # waits for the device, which may have the whole update still before it
        seconds = time.perf_counter() - begin
        values = self._step_values(loss, result, lr, table_lr, tokens, seconds, spent)
        values |= self._traffic(traffic, tokens) | _peak_memory(parallel.device)
        if memory is not None:
            parts = ("weights", "gradients", "optimizer", *(("far",) if memory.far else ()))
            values |= {f"memory/{part}_gb": getattr(memory, part) / 1e9 for part in parts}
        return values | revived

    def route_observer(self, number: int) -> RouteObserver:
        """The function that is called with layer ``number``'s picks and gates while it trains."""
        usage, revival = self.usage[number], self.revival
        if revival is None:
            return usage

        def both(indices: torch.Tensor, gates: torch.Tensor) -> None:
            usage(indices, gates)
            revival.observe(number, indices, gates)

        return both

    def _numbers(self, losses: torch.Tensor) -> torch.Tensor:
        """What the host wants to know of all ranks in a step, in one sum that nobody waits for. A collective call.

        Args:
            losses: this rank's, of the micro-batches.

        Returns:
            float64 ``[n]``: the loss of all tokens, and what :meth:`_traffic` takes.
        """
        traffic = [layer.traffic for layer in self.layers.values()]
        known = (
            sum(layer_traffic.bytes_sent for layer_traffic in traffic),
            sum(layer_traffic.tokens_received for layer_traffic in traffic),
            sum(layer_traffic.tokens for layer_traffic in traffic),
            *sum((pool.traffic() for pool in self._pools()), FarTraffic(0, 0, 0, 0)),
            *self.flags(),
        )
        for layer_traffic in traffic:
            if self.profile is not None:
                self.profile.add_traffic(layer_traffic)
            layer_traffic.reset()
        numbers = torch.tensor([0.0, *known], dtype=torch.float64, device="cpu", pin_memory=losses.is_cuda)
        numbers = numbers.to(losses.device, non_blocking=True)
        if self.parallel.counts_losses:
            numbers[0] = losses.sum()
        dist.all_reduce(numbers)
        return numbers

    def _pools(self) -> set[FarRows]:
        """This rank's rows of tables that lie elsewhere."""
        rows = (far_rows_of(shard.parameter) for shard in shards_of(self.model).values())
        return {pool for pool in rows if pool is not None}

    def _not_finite(self) -> list[str]:
        """Names of the tensors whose gradients are not finite on some rank. A collective call."""
        return [name for names in from_every_rank(self.engine.not_finite()) for name in names]

    def _micro_batches(self, step: int) -> MicroBatches:
        """This rank's micro-batches of a step; data-parallel ranks have consecutive sequences of each pass."""
        train, parallel = self.config.train, self.parallel
        per_pass = train.micro_batch_size * parallel.data_parallel_size
        first = step * train.global_batch_size + parallel.data_parallel_rank * train.micro_batch_size
        positions = [
            range(begin, begin + train.micro_batch_size)
            for begin in range(first, first + train.global_batch_size, per_pass)
        ]
        return MicroBatches(self.data.train, positions, self.data.tokenizer.eod, parallel.device)

    def _step_values(
        self,
        loss: float,
        result: StepResult,
        lr: float,
        table_lr: float,
        tokens: int,
        seconds: float,
        spent: dict[str, float],
    ) -> dict[str, float]:
        """The numbers of a step by their names in metrics.jsonl."""
        values = {
            "train/loss": loss,
            "train/perplexity": perplexity_of(loss),
            "optimizer/lr": lr,
            "optimizer/table_lr": table_lr,
            "optimizer/grad_norm": result.grad_norm,
            "optimizer/skipped_steps": float(self.guard.not_finite),
            "optimizer/skipped_spikes": float(self.guard.spikes),
            "speed/tokens_per_second": tokens / seconds,
            "time/step": seconds,
        }
        self.stragglers.add(spent)
        values |= {f"time/{name}": spent.get(name, 0.0) for name in _SPANS}
        values["time/other"] = max(0.0, seconds - sum(spent.get(name, 0.0) for name in _SPANS))
        return values

    def _traffic(self, sums: list[float], tokens: int) -> dict[str, float]:
        """The exchange's numbers of a step, from the sums over all ranks; flags are heard too."""
        sent, received, routed, hits, misses, read, written, *flagged = sums
        self.flagged = [ranks > 0 for ranks in flagged]
        values: dict[str, float] = {}
        if self.expert_parameters:
            values["exchange/bytes_per_token"] = sent / tokens
            if routed:
                values["exchange/row_shards_hit"] = received / routed / self.config.parallel.expert_tensor
        if self.config.far_tables:
            if hits + misses:
                values["tables/cache_hit_rate"] = hits / (hits + misses)
            values["tables/far_read_bytes_per_token"] = read / tokens
            values["tables/far_written_bytes_per_token"] = written / tokens
        return values

    def usage_values(self) -> dict[str, float]:
        """Numbers of every layer, by their names in metrics.jsonl. A collective call.

        They are the usage of experts since the last call, and the routers' losses in the last forward pass.
        """
        values: dict[str, float] = {}
        for number, usage in self.usage.items():
            summary = usage.summary(self.parallel.expert_size, self.parallel.token_group)
            spread = usage.head_spread(self.parallel.token_group)
            values |= {
                f"experts/layer{number}_{name}": value
                for part in (summary, spread)
                for name, value in (asdict(part) if part is not None else {}).items()
            }
            usage.reset()
        for number, router in self.routers.items():
            values |= {f"experts/layer{number}_{name}": float(value) for name, value in router.losses.items()}
        return self._of_all_stages(values)

    def _of_all_stages(self, values: dict[str, Value]) -> dict[str, Value]:
        """The values of all pipeline stages together, on each rank. A collective call."""
        stages = from_every_rank(values, self.parallel.pipeline_group)
        return {name: value for stage in stages for name, value in stage.items()}

    def validate(self, metrics: Metrics | None = None) -> dict[str, float]:
        """Measure the loss and perplexity of the validation split. A collective call.

        Args:
            metrics: where to write histograms and pictures of how the gates are spread over experts; None elsewhere
                than on rank 0.

        Returns:
            ``val/loss``, in nats per token, and ``val/perplexity``; nothing if there is no validation split.
        """
        if self.data.validation is None:
            return {}
        config, usage = self.config, self._new_usage()
        position.at("validation", self.steps_done)
        result = held_out_loss(
            self.model,
            self.data.validation,
            self.parallel,
            self.data.tokenizer,
            config.train.micro_batch_size,
            config.evaluation.batches * config.train.global_batch_size,
            usage,
        )
        shares = {number: layer_usage.shares(self.parallel.token_group) for number, layer_usage in usage.items()}
        pictures = self._of_all_stages(
            {
                f"experts/layer{number}": (share_histogram(layer_shares), usage_map(layer_shares))
                for number, layer_shares in shares.items()
            }
        )
        for name, (histogram, pixels) in pictures.items():
            if metrics is not None:
                metrics.histogram(f"{name}_log10_share", self.steps_done, *histogram)
                metrics.image(f"{name}_map", self.steps_done, pixels)
        for layer in self.layers.values():
            layer.traffic.reset()
        return {"val/loss": result.loss, "val/perplexity": result.perplexity}

    def save(self) -> Path:
        """Write a checkpoint of the present state, or begin to if asynchronous; return its folder. Collective."""
        position.at("save", self.steps_done)
        begin, wait = time.perf_counter(), not self.config.checkpoint.asynchronous
        info: dict[str, Any] = {
            "updates": self.steps_done - self.guard.skipped,
            "guard": self.guard.state(),
            "sequences": self.steps_done * self.config.train.global_batch_size,
            "config": self.config.model_dump(mode="json"),
            "data": self.data_identity,
            "dtype": str(self.dtype).removeprefix("torch."),
            "versions": {
                "peer_dist": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }
        state = run_state(self.model, self.engine, self.parallel, self.revival)
        path = self.store.save(self.steps_done, state, info, self.data.tokenizer, wait)
        self.last_save = {"checkpoint/seconds": time.perf_counter() - begin}
        if wait and self.parallel.rank == 0:
            with suppress(Mistake):  # this rank alone may run short of files: the save is complete
                size = sum(size for size, _ in read_manifest(path)["files"].values())
                self.last_save["checkpoint/gb_per_second"] = size / 1e9 / self.last_save["checkpoint/seconds"]
        return path


def _peak_memory(device: torch.device) -> dict[str, float]:
    """GiB of memory at most: on a GPU allocated and, what must fit, reserved by torch; on a CPU of this process."""
    if device.type == "cuda":
        bytes_held = {
            "peak": torch.cuda.max_memory_allocated(device),
            "reserved": torch.cuda.max_memory_reserved(device),
        }
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        bytes_held = {"peak": peak if sys.platform == "darwin" else peak * 1024}
    return {f"memory/{name}_gib": held / 2**30 for name, held in bytes_held.items()}
