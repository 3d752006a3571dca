"""Chooses a model's learning rates by its trials."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from peer_dist.sweep.results import Row
from peer_dist.sweep.spec import Rates, Sweep


@dataclass(frozen=True)
class Choice:
    """The best of a model's trials.

    Attributes:
        rates: the learning rates of the best trial.
        loss: its mean validation loss over the seeds, in nats per token; infinite if every trial diverged.
        edges: which of the rates ("dense", "table") are the least or the largest tried, so that the best ones may lie
            beyond.
    """

    rates: Rates
    loss: float
    edges: tuple[str, ...]

    def __str__(self) -> str:
        lr, table_lr = self.rates
        text = f"lr {lr:g}" + ("" if table_lr is None else f", tables {table_lr:g}") + f" (loss {self.loss:.4f})"
        if self.edges:
            text += f"; at the edge of the {' and '.join(self.edges)} rates tried: the best may lie beyond"
        return text


def choose_rates(sweep: Sweep, model: str, rows: Mapping[str, Row]) -> Choice | None:
    """The rates with the least mean loss; None as long as trials are missing. A diverged trial's loss is infinite.

    Args:
        sweep: the sweep, which tunes learning rates.
        model: the model's name.
        rows: the rows of the runs that have ended, by the runs' names.
    """
    assert sweep.file.tune is not None
    rates = sweep.file.tune.trials(model)
    losses: list[list[float]] = [[] for _ in rates]
    for run in sweep.trials(model):
        if run.name not in rows:
            return None
        loss = rows[run.name].val_loss
        assert run.trial is not None
        losses[run.trial].append(math.inf if loss is None else loss)
    means = [fmean(losses_of_seeds) for losses_of_seeds in losses]
    best = means.index(min(means))
    edges = []
    for name, rates_tried in (("dense", [lr for lr, _ in rates]), ("table", [lr for _, lr in rates if lr is not None])):
        rate = rates[best][0 if name == "dense" else 1]
        if len(set(rates_tried)) > 1 and rate in (min(rates_tried), max(rates_tried)):
            edges.append(name)
    return Choice(rates[best], means[best], tuple(edges))
