"""Surrounds the steps of a run: prints and records what happens and, in a fixed order, does what follows each step."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.text import Text

from peer_dist.measures.metrics import METRICS, Metrics, along
from peer_dist.megatron import CheckpointError, fuses_weight_gradients
from peer_dist.mistake import Mistake
from peer_dist.output import lost, messages
from peer_dist.ranks.environment import environment
from peer_dist.ranks.exit_codes import DONE, stopped_code
from peer_dist.ranks.lock import LockError, RunLock
from peer_dist.ranks.signals import StopRequest
from peer_dist.tracing import position
from peer_dist.training.guard import Diverged
from peer_dist.training.progress import Progress

if TYPE_CHECKING:
    from peer_dist.training.trainer import Trainer


class Run:
    """One call of :meth:`Trainer.run`. All ranks construct it and call its methods together.

    Args:
        trainer: the trainer whose steps the run makes.
        stop: knows whether a signal has asked this process to save and leave.
        lock: the lock of the run's folder; None on ranks other than 0.
    """

    def __init__(self, trainer: Trainer, stop: StopRequest, lock: RunLock | None) -> None:
        self._trainer, self._config = trainer, trainer.config
        self._stop, self._lock = stop, lock
        self._first = trainer.steps_done + 1
        fused = fuses_weight_gradients(trainer.config, trainer.parallel.device)
        self._fused = "apex: weight gradients" if fused else "none"
        self._console = messages(quiet=trainer.parallel.rank != 0)
        self._metrics: Metrics | None = None  # on rank 0, once the run has begun
        self._values: dict[str, float] = {}  # numbers to record for the step that has just ended
        self._saved: dict[str, float] = {}  # numbers of a save, recorded in the next step's line
        self._unheard: set[str] = set()  # streams that took no more words, once an event says so
        self._stopped = False  # whether some rank has received a signal
        self._writing = False  # whether some rank is still writing a checkpoint
        trainer.flags = self._flags

    @property
    def over(self) -> bool:
        """Whether no step follows: ``train.steps`` are done, or a signal came. It is the same on every rank."""
        return self._trainer.steps_done >= self._config.train.steps or self._stopped

    def introduce(self) -> None:
        """Print what is trained, where, and from which step on."""
        trainer = self._trainer
        if self._lock is not None and self._lock.note:
            self._say(self._lock.note)
        dtype = str(trainer.dtype).removeprefix("torch.")
        self._say(
            Text.assemble(
                ("peer_dist", "bold"),
                f" {trainer.parameters / 1e6:.1f}M parameters, "
                f"{trainer.expert_parameters / 1e6:.1f}M of them in experts; "
                f"{trainer.parallel.world_size} x {trainer.parallel.device.type}, {dtype}; "
                + (f"going on from step {trainer.steps_done}" if trainer.steps_done else "starting at step 0"),
            )
        )
        if self._fused != "none":
            self._say(f"used of {self._fused}")
        if reason := self._config.not_causal:
            self._say(f"{reason.setting} is not causal: its losses are no language model's")

    def begin(self) -> Progress:
        """Open the metrics and, in a new run, validate the untrained model; return the progress display."""
        trainer, config = self._trainer, self._config
        hosts = environment(trainer.parallel)
        if trainer.parallel.rank == 0:
            resumed_at = trainer.steps_done if trainer.resumed else None
            self._metrics = Metrics(Path(config.logging.dir), resumed_at, self._say, config.far_tables)
            tree = config.model_dump(mode="json")
            if not trainer.resumed:
                self._metrics.config(tree)
            self._event(
                "start",
                resumed=trainer.resumed,
                parameters=trainer.parameters,
                expert_parameters=trainer.expert_parameters,
                dtype=str(trainer.dtype).removeprefix("torch."),
                fused=self._fused,
                environment=hosts,
                config=tree,
            )
        if not trainer.resumed:
            self._values = trainer.validate(self._metrics)
            self._record()
            trainer.startup.ended("validation")
        if trainer.parallel.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # a start holds more than a step: weights twice, for one
        self._progress = Progress(self._console, trainer.steps_done, config.train.steps)
        return self._progress

    def after_step(self, values: dict[str, float]) -> None:
        """Do all that follows a step. The order matters: each line says why it has its place.

        Args:
            values: the step's numbers, from :meth:`Trainer.step`.

        Raises:
            LockError: another run has taken over the folder; this run has written nothing since.
            CheckpointError: the last checkpoint could not be written.
            Diverged: too many steps in a row were skipped.
        """
        self._values, self._saved = self._saved | values, {}
        in_order: tuple[Callable[[], None], ...] = (
            self._report_startup,  # first: the time to the first step includes nothing of what follows
            self._hear_ranks,  # before anything is written: a run that lost its folder writes no more; and all that
            # follows asks whether this step is the last
            self._finish_save,  # after the ranks said whether they still write; before a new save, which would wait
            self._add_usage,  # before a validation: the routers' losses are those of the last forward pass
            self._compare_ranks,  # together with usage: both cover the last logging.interval steps
            self._validate,  # before the metrics and the progress, which show its perplexity
            self._record,  # with all numbers; before a save: a run that goes on from it finds this step recorded
            self._show,
            self._give_up,  # after the step is recorded; before a save: earlier checkpoints are better ones
            self._save,  # last: a checkpoint holds a step of which nothing is left to do
        )
        for act in in_order:
            act()

    def end(self) -> int:
        """Wait for a checkpoint that is still being written, print what was reached, and return the exit code."""
        trainer = self._trainer
        position.at("save", trainer.steps_done)
        trainer.store.finish()
        self._event("stopped by a signal" if self._stopped else "done")
        if self._metrics is not None:
            self._metrics.close()
        if trainer.profile is not None:
            trainer.profile.conclude(self._console)
        if self._stopped:
            self._say(f"stopped at step {trainer.steps_done} by a signal; the same command goes on from there")
        self._conclude()
        return DONE if trainer.steps_done == self._config.train.steps else stopped_code()

    def nothing_to_do(self) -> int:
        """Print that all steps were done before; return the exit code."""
        self._say(f"nothing to do: train.steps is {self._config.train.steps}; raise it to go on")
        return DONE

    # The parts of `after_step`, in its order.

    def _report_startup(self) -> None:
        """After the first step, print and record how long it and the phases before it took."""
        startup = self._trainer.startup
        if self._trainer.steps_done != self._first:
            return
        startup.ended("first step")
        self._say(str(startup))
        self._values |= {f"startup/{phase.replace(' ', '_')}": seconds for phase, seconds in startup.seconds.items()}

    def _hear_ranks(self) -> None:
        """Learn whether any rank got a signal, still writes, or lost the lock: signals reach some ranks a step earlier.

        Raises:
            LockError: rank 0 has lost the lock.
        """
        self._stopped, self._writing, lost = self._trainer.flagged
        if lost:
            folder = self._config.checkpoint.dir
            raise LockError(f"{folder}: another run has taken it over; this one wrote no more")

    def _flags(self) -> list[bool]:
        """What :meth:`_hear_ranks` hears of this rank; it travels with the step's own numbers, in one call."""
        lost = self._lock is not None and self._lock.lost
        return [self._stop.received is not None, self._trainer.store.writing, lost]

    def _finish_save(self) -> None:
        """Complete the checkpoint that was begun, if all ranks have written their parts."""
        store = self._trainer.store
        if store.unfinished and not self._writing:
            self._attempt(store.finish)

    @property
    def _logged(self) -> bool:
        """Whether a window of ``logging.interval`` steps ends here."""
        return self._trainer.steps_done % self._config.logging.interval == 0 or self.over

    def _add_usage(self) -> None:
        """Add the usage of experts at the end of a window."""
        if self._logged:
            self._values |= self._trainer.usage_values()

    def _compare_ranks(self) -> None:
        """At the end of a window, print and record ranks that hold up the others."""
        if not self._logged:
            return
        ratio, lines = self._trainer.stragglers.report()
        for line in lines:
            self._say(line)
            self._event("slow rank", told=line.removeprefix("slow rank: "))
        self._values["speed/slowest_rank_ratio"] = ratio

    def _validate(self) -> None:
        """Validate at each ``evaluation.interval`` and after the last step."""
        step = self._trainer.steps_done
        if step % self._config.evaluation.interval == 0 or step == self._config.train.steps:
            self._values |= self._trainer.validate(self._metrics)

    def _record(self) -> None:
        """Write the step's numbers to the metrics."""
        if self._metrics is not None and self._values:
            self._metrics.write(self._trainer.steps_done, self._values)
        for stream, why in lost().items():
            if stream not in self._unheard:
                self._unheard.add(stream)
                self._event("output lost", told=f"{stream}: {why}")

    def _show(self) -> None:
        self._progress.update(self._trainer.steps_done, self._values)

    def _give_up(self) -> None:
        """If too many steps in a row were skipped, write a report; the checkpoints stay as they are.

        Raises:
            Diverged: too many steps in a row were skipped.
        """
        trainer = self._trainer
        if not trainer.guard.given_up:
            return
        self._attempt(trainer.store.finish)
        steps = trainer.store.agreed_steps()
        text = trainer.guard.explain(trainer.store.path(steps[-1]) if steps else None)
        if self._metrics is not None:  # rank 0
            try:
                text += f" The report is {trainer.guard.write_report(Path(self._config.logging.dir), text)}."
            except OSError as error:
                text += f" No report could be written to {self._config.logging.dir} ({error.strerror})."
            self._event("diverged", told=text)
            self._metrics.close()
        raise Diverged(text)

    def _save(self) -> None:
        """Save at the end, and at each ``checkpoint.interval`` unless the last step was skipped.

        Raises:
            CheckpointError: the last state could not be saved.
        """
        trainer = self._trainer
        due = trainer.steps_done % self._config.checkpoint.interval == 0 and not trainer.guard.in_a_row
        if not (self.over or due):
            return
        self._progress.say("saving a checkpoint")
        begin = time.perf_counter()
        self._attempt(trainer.store.finish)  # of the save before: this one must be tried all the same
        if self.over:
            trainer.save()
        elif not self._attempt(trainer.save):
            return
        self._saved = trainer.last_save
        self._event("checkpoint", seconds=time.perf_counter() - begin)  # training waited that long

    def _attempt(self, save: Callable[[], object]) -> bool:
        """Make or complete a checkpoint; where that fails, on every rank alike, say so and go on without.

        What was saved before stays, the disk may have room again when the next one is due, and ending here would lose
        the steps since. Only the last state must be saved.

        Returns:
            Whether it was done.
        """
        try:
            save()
        except CheckpointError as error:
            self._say(f"no checkpoint was saved: {error}; the run goes on, and saves again when the next one is due")
            self._event("checkpoint not saved", told=str(error))
            return False
        return True

    # Printing and recording.

    def _say(self, text: str | Text) -> None:
        """Print on rank 0."""
        self._console.print(text)

    def _event(self, name: str, **details: object) -> None:
        """Write an event on rank 0."""
        if self._metrics is not None:
            self._metrics.event(name, self._trainer.steps_done, **details)

    def _conclude(self) -> None:
        """Print in a few lines what the run reached and where everything is."""
        trainer = self._trainer
        if trainer.parallel.rank != 0:
            return
        folder = Path(self._config.logging.dir)
        validations: list[tuple[int, float]] = []
        with contextlib.suppress(Mistake):  # logs that could not be written
            validations = list(along(folder / METRICS, "val/perplexity").items())
        if validations:
            ends = validations[:1] if len(validations) == 1 else [validations[0], validations[-1]]
            shown = "  ->  ".join(f"{value:.2f} (step {step})" for step, value in ends)
            self._say(f"held-out perplexity  {shown}")
        self._say(f"checkpoint           {trainer.store.path(trainer.steps_done)}")
        self._say(f"watch it with        tensorboard --logdir {folder}")
