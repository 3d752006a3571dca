"""Skips steps that would spoil the model, counts them, and stops the run when too many follow one another."""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peer_dist.config.schema import GuardConfig

_REMEMBERED = 100  # steps that a report lists


class Diverged(RuntimeError):
    """Too many steps in a row were skipped. Every rank raises it; rank 0's message says where the report is."""


@dataclass(frozen=True)
class _Step:
    """A report's entry for one step.

    Attributes:
        step: the step's number, counted from 1 as in metrics.jsonl.
        sequences: positions in the training order of the first sequence that the step read, and of the one after its
            last.
        outcome: "applied", or why the step was skipped: "gradients not finite" or "loss spike".
        loss: mean loss in nats per token; None if it is not finite.
        grad_norm: the gradients' norm before clipping; None if it is not finite, or after a loss spike, when it is not
            computed.
        not_finite: names of the tensors whose gradients were not finite. They are looked for only if the loss is not
            finite or the step before was skipped.
    """

    step: int
    sequences: tuple[int, int]
    outcome: str
    loss: float | None
    grad_norm: float | None
    not_finite: tuple[str, ...]


class Guard:
    """Decides which steps are skipped, from numbers that are the same on every rank.

    A loss is a spike if it is larger than ``spike_factor`` times the median of the last ``spike_window`` losses of
    applied steps. The counts and this window are saved in checkpoints, so that a resumed run decides alike.

    Attributes:
        not_finite: number of steps skipped because of gradients that were not finite.
        spikes: number of steps skipped because of a loss spike.
        in_a_row: number of steps skipped since the last one that was applied.
    """

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.not_finite, self.spikes, self.in_a_row = 0, 0, 0
        self._losses: deque[float] = deque(maxlen=config.spike_window)
        self._steps: deque[_Step] = deque(maxlen=_REMEMBERED)

    @property
    def skipped(self) -> int:
        """Number of steps skipped since the run began."""
        return self.not_finite + self.spikes

    def is_spike(self, loss: float) -> bool:
        """Whether the step of a batch with this loss is to be skipped as a spike.

        A loss of nan is no spike: its gradients are not finite either, and the step is skipped for that. Nothing is a
        spike before the window is full, or with ``spike_factor`` 0.
        """
        factor = self.config.spike_factor
        full = len(self._losses) == self.config.spike_window
        return factor > 0 and full and loss > factor * statistics.median(self._losses)

    def record(
        self,
        step: int,
        sequences: tuple[int, int],
        loss: float,
        grad_norm: float,
        applied: bool,
        spike: bool,
        not_finite: list[str],
    ) -> None:
        """Count a step by its outcome, and remember it for the report.

        Args:
            step: its number, counted from 1.
            sequences: the positions of its first sequence and of the one after its last.
            loss: mean loss in nats per token.
            grad_norm: the gradients' norm before clipping; nan if it was not computed.
            applied: whether the parameters were updated.
            spike: whether the step was skipped because of :meth:`is_spike`.
            not_finite: names of tensors whose gradients were not finite.
        """
        self.spikes += spike
        self.not_finite += not applied and not spike
        self.in_a_row = 0 if applied else self.in_a_row + 1
        if applied and math.isfinite(loss):
            self._losses.append(loss)
        outcome = "applied" if applied else "loss spike" if spike else "gradients not finite"
        culprits = tuple(sorted(set(not_finite)))
        self._steps.append(_Step(step, sequences, outcome, _finite_or_none(loss), _finite_or_none(grad_norm), culprits))

    @property
    def given_up(self) -> bool:
        """Whether ``max_skipped_steps`` steps in a row were skipped, so that the run must stop; never if that is 0."""
        return 0 < self.config.max_skipped_steps <= self.in_a_row

    def state(self) -> dict[str, Any]:
        """The counts and the window of losses, for a checkpoint's manifest."""
        return {
            "not_finite": self.not_finite,
            "spikes": self.spikes,
            "in_a_row": self.in_a_row,
            "losses": list(self._losses),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state` returned, in a guard that has recorded nothing yet."""
        self.not_finite, self.spikes, self.in_a_row = state["not_finite"], state["spikes"], state["in_a_row"]
        self._losses.extend(state["losses"])

    def explain(self, checkpoint: Path | None) -> str:
        """A paragraph that says why the run stops, and from which checkpoint it can go on.

        Args:
            checkpoint: the newest one; None if there is none.
        """
        skipped = list(self._steps)[-self.in_a_row :]
        reasons = sorted({step.outcome for step in skipped})
        culprits = sorted({name for step in skipped for name in step.not_finite})
        losses = [step.loss for step in self._steps if step.outcome == "applied" and step.loss is not None]
        sentences = [
            f"{self.in_a_row} steps in a row, up to step {skipped[-1].step}, were left out ({', '.join(reasons)}), so "
            f"the run has stopped (guard.max_skipped_steps = {self.config.max_skipped_steps})."
        ]
        if losses:
            sentences.append(f"The last loss that was applied is {losses[-1]:.4f}.")
        if culprits:
            shown = ", ".join(culprits[:5]) + (f" and {len(culprits) - 5} more" if len(culprits) > 5 else "")
            sentences.append(f"Gradients that were not finite: {shown}.")
        first, end = skipped[0].sequences[0], skipped[-1].sequences[1]
        sentences.append(f"The steps read the sequences {first} to {end - 1} of the order.")
        sentences.append(
            f"The last good checkpoint is {checkpoint}: go on from it with a lower learning rate or "
            "optimizer.grad_clip, or look at these data."
            if checkpoint is not None
            else "There is no checkpoint from before: start again with a lower learning rate or more warm-up."
        )
        return " ".join(sentences)

    def write_report(self, folder: Path, text: str) -> Path:
        """Write ``diverged-step-NNNNNNNN.json``, and ``text`` as ``.txt`` beside it; return the JSON file's path.

        Args:
            folder: where the files go; it is created if need be.
            text: from :meth:`explain`.
        """
        path = folder / f"diverged-step-{self._steps[-1].step:08d}.json"
        content = {
            "summary": text,
            "config": self.config.model_dump(),
            **{key: value for key, value in self.state().items() if key != "losses"},
            "steps": [asdict(step) for step in self._steps],
        }
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")
        return path


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
