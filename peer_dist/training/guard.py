"""Steps that would spoil the model are left out, counted, and end the run when there is no end to them."""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peer_dist.config.schema import GuardConfig

_REMEMBERED = 100  # steps in a report


class Diverged(RuntimeError):
    """Too many steps in a row had to be left out; the message says where the report is. The same on every rank."""


@dataclass(frozen=True)
class _Step:
    """What a report tells of a step.

    Attributes:
        step: its number, counted from 1 as in metrics.jsonl.
        sequences: the first of the training order that it read, and the one after its last.
        outcome: "applied", or why it was not: "gradients not finite", "loss spike".
        loss: null where not finite.
        grad_norm: before clipping; null where not finite, and of a loss spike, whose norm nobody has computed.
        not_finite: tensors whose gradients were not finite, where looked for: from the second step in a row on.
    """

    step: int
    sequences: tuple[int, int]
    outcome: str
    loss: float | None
    grad_norm: float | None
    not_finite: tuple[str, ...]


class Guard:
    """Decides which steps are left out, from numbers that are the same on every rank.

    A loss is a spike when it exceeds the median of the last ``spike_window`` losses that were applied by more than
    ``spike_factor``. The counts and the window survive in the checkpoint, so that a resumed run decides alike.
    """

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.not_finite, self.spikes, self.in_a_row = 0, 0, 0
        self._losses: deque[float] = deque(maxlen=config.spike_window)
        self._steps: deque[_Step] = deque(maxlen=_REMEMBERED)

    @property
    def skipped(self) -> int:
        """Steps left out since the run's first."""
        return self.not_finite + self.spikes

    def is_spike(self, loss: float) -> bool:
        """Whether a batch of this loss is to be left out; nan is not: its gradients are not finite either."""
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
        """Count what became of a step."""
        self.spikes += spike
        self.not_finite += not applied and not spike
        self.in_a_row = 0 if applied else self.in_a_row + 1
        if applied and math.isfinite(loss):
            self._losses.append(loss)
        outcome = "applied" if applied else "loss spike" if spike else "gradients not finite"
        self._steps.append(
            _Step(step, sequences, outcome, _known(loss), _known(grad_norm), tuple(sorted(set(not_finite))))
        )

    @property
    def given_up(self) -> bool:
        """Whether the run is to stop."""
        return 0 < self.config.max_skipped_steps <= self.in_a_row

    def state(self) -> dict[str, Any]:
        """For the checkpoint's manifest."""
        return {
            "not_finite": self.not_finite,
            "spikes": self.spikes,
            "in_a_row": self.in_a_row,
            "losses": list(self._losses),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.not_finite, self.spikes, self.in_a_row = state["not_finite"], state["spikes"], state["in_a_row"]
        self._losses.extend(state["losses"])

    def explain(self, checkpoint: Path | None) -> str:
        """A paragraph on why the run stops, and where it can go on from."""
        row = list(self._steps)[-self.in_a_row :]
        kinds = sorted({step.outcome for step in row})
        culprits = sorted({name for step in row for name in step.not_finite})
        losses = [step.loss for step in self._steps if step.outcome == "applied" and step.loss is not None]
        parts = [
            f"{self.in_a_row} steps in a row, up to step {row[-1].step}, were left out ({', '.join(kinds)}), so the "
            f"run has stopped (guard.max_skipped_steps = {self.config.max_skipped_steps})."
        ]
        if losses:
            parts.append(f"The last loss that was applied is {losses[-1]:.4f}.")
        if culprits:
            shown = ", ".join(culprits[:5]) + (f" and {len(culprits) - 5} more" if len(culprits) > 5 else "")
            parts.append(f"Gradients that were not finite: {shown}.")
        parts.append(f"The steps read the sequences {row[0].sequences[0]} to {row[-1].sequences[1] - 1} of the order.")
        parts.append(
            f"The last good checkpoint is {checkpoint}: go on from it with a lower learning rate or "
            "optimizer.grad_clip, or look at these data."
            if checkpoint is not None
            else "There is no checkpoint from before: start again with a lower learning rate or more warm-up."
        )
        return " ".join(parts)

    def write_report(self, folder: Path, text: str) -> Path:
        """``diverged-step-NNNNNNNN.json`` and the same as ``.txt`` in a sentence or two; the first one's path."""
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


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
