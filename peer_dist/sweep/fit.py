"""Fits results: compute-optimal sizes for each budget, and differences between models. Pure functions of rows."""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from peer_dist.sweep.results import Row

Measure = Literal["train_flops_per_token", "active_parameters", "parameters"]


@dataclass(frozen=True)
class Interval:
    """A value and the half-width of its 95% interval by Student's t, which is NaN if there are too few values."""

    value: float
    half_width: float

    def __str__(self) -> str:
        """The value and half-width to four decimals, such as ``2.3456 ± 0.0123``."""
        return f"{self.value:.4f}" + ("" if math.isnan(self.half_width) else f" ± {self.half_width:.4f}")


@dataclass(frozen=True)
class Optimum:
    """The parabola ``loss = a (x - x0)^2 + b (x - x0) + c`` of one model at one budget; ``x`` is the log of the size.

    Attributes:
        label: the model's label.
        budget: training FLOPs; None if tokens are fixed.
        coefficients: ``a``, ``b`` and ``c``, which is the mean over seeds.
        center: ``x0``.
        span: the smallest and the largest size tried.
        log_size: the log of the size at the minimum; NaN if the parabola has none.
        loss: the loss at the minimum, in nats per token; NaN if there is none.
        where: whether the minimum lies inside the span, below it or above it; "none" if the parabola opens downwards.
    """

    label: str
    budget: float | None
    coefficients: tuple[float, float, float]
    center: float
    span: tuple[float, float]
    log_size: Interval
    loss: Interval
    where: Literal["inside", "below", "above", "none"]

    @property
    def size(self) -> float:
        """The size with the least loss; NaN if the parabola has no minimum."""
        return math.exp(self.log_size.value)

    @property
    def size_interval(self) -> tuple[float, float]:
        """The 95% interval of the size; it is not symmetric, because it is symmetric for the size's log."""
        low, high = (self.log_size.value + sign * self.log_size.half_width for sign in (-1, 1))
        return math.exp(low), math.exp(min(high, 700.0))

    def curve(self, sizes: np.ndarray) -> np.ndarray:
        """The parabola's losses, in nats per token, at ``sizes``; both are float64 ``[points]``."""
        return np.polyval(self.coefficients, np.log(sizes) - self.center)


@dataclass(frozen=True)
class Difference:
    """The loss of ``label`` minus that of ``baseline``, over pairs of runs with the same budget, size and seed.

    Attributes:
        label, baseline: the labels compared.
        budget: training FLOPs of the runs; None if tokens are fixed.
        size: the size of the runs. None: the losses of a seed are averaged over sizes, and pairs are seeds. A size such
            as ``a / b`` compares the best of the sizes tried: ``a`` has the least mean loss of ``label``, and ``b``
            that of ``baseline``.
        loss: the mean difference, in nats per token.
        pairs: number of pairs.
    """

    label: str
    baseline: str
    budget: float | None
    size: str | None
    loss: Interval
    pairs: int


@lru_cache
def student_t(degrees: int, level: float = 0.95) -> float:
    """The half-width, in standard errors, of a two-sided interval by Student's t; NaN without degrees of freedom."""
    if degrees < 1:
        return math.nan
    # with t = sqrt(degrees) tan(angle) the density is that of cos(angle)^(degrees - 1)
    angle = np.linspace(0, np.pi / 2, 200_001)
    density = np.cos(angle) ** (degrees - 1)
    mass = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return float(math.sqrt(degrees) * np.tan(np.interp(level * mass[-1], mass, angle)))


def mean_interval(values: Sequence[float]) -> Interval:
    """The mean of independent values with its 95% interval."""
    count = len(values)
    if count < 2:
        return Interval(float(np.mean(values)), math.nan)
    return Interval(float(np.mean(values)), student_t(count - 1) * float(np.std(values, ddof=1)) / math.sqrt(count))


def grid_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows to compare: those of runs that are no trials and have not diverged."""
    return [row for row in rows if row.trial is None and row.val_loss is not None]


def loss_of(row: Row) -> float:
    """A row's held-out loss, in nats per token; the row must have one, as those of :func:`grid_rows` do."""
    assert row.val_loss is not None
    return row.val_loss


def fit_parabola(
    label: str, budget: float | None, sizes: Sequence[float], seeds: Sequence[int], losses: Sequence[float]
) -> Optimum:
    """Fit a parabola of loss against the log of the size by least squares, with a level of its own for every seed.

    Uncertainties follow from the residuals' variance by the delta method. A seed that shifts the whole curve does not
    count as noise, because the models compared have the same seeds.

    Args:
        label, budget: the model's label and budget, which the result has.
        sizes, seeds, losses: of each run, in the same order; losses in nats per token.

    Raises:
        ValueError: there are too few sizes, or too few of one seed, to tell a parabola from the seeds' levels.
    """
    log_sizes = np.log(np.asarray(sizes, dtype=np.float64))
    center = float(log_sizes.mean())
    x, y = log_sizes - center, np.asarray(losses, dtype=np.float64)
    levels = np.asarray(seeds)[:, None] == np.unique(seeds)[None, :]
    design = np.column_stack([x**2, x, levels])
    solution, _, rank, _ = np.linalg.lstsq(design, y, rcond=None)
    if rank < design.shape[1]:
        raise ValueError(f"{label}: a parabola needs three sizes of one seed")
    count = levels.shape[1]
    a, b, c = float(solution[0]), float(solution[1]), float(solution[2:].mean())
    span = (float(min(sizes)), float(max(sizes)))
    if a <= 0:
        unknown = Interval(math.nan, math.nan)
        return Optimum(label, budget, (a, b, c), center, span, unknown, unknown, "none")
    degrees = len(y) - design.shape[1]
    variance = float(((y - design @ solution) ** 2).sum()) / degrees if degrees else math.nan
    covariance = variance * np.linalg.inv(design.T @ design)
    minimum = -b / (2 * a)
    place_gradient = np.concatenate([[b / (2 * a**2), -1 / (2 * a)], np.zeros(count)])
    loss_gradient = np.concatenate([[minimum**2, minimum], np.full(count, 1 / count)])

    def interval(value: float, gradient: np.ndarray) -> Interval:
        return Interval(value, student_t(degrees) * math.sqrt(float(gradient @ covariance @ gradient)))

    log_size = center + minimum
    where: Literal["inside", "below", "above"] = "inside"
    if not log_sizes.min() <= log_size <= log_sizes.max():
        where = "below" if log_size < log_sizes.min() else "above"
    return Optimum(
        label,
        budget,
        (a, b, c),
        center,
        span,
        interval(log_size, place_gradient),
        interval(c + minimum * b / 2, loss_gradient),
        where,
    )


def optima(rows: Sequence[Row], measure: Measure = "train_flops_per_token") -> list[Optimum]:
    """The compute-optimal size of every model at every budget with enough sizes (see :func:`fit_parabola`).

    Args:
        rows: a sweep's results.
        measure: the column that is the size.
    """
    groups: dict[tuple[float | None, str], list[Row]] = defaultdict(list)
    for row in grid_rows(rows):
        groups[row.budget, row.label].append(row)
    fits = []
    for (budget, label), group in groups.items():
        sizes = [float(getattr(row, measure)) for row in group]
        with contextlib.suppress(ValueError):
            fits.append(
                fit_parabola(label, budget, sizes, [row.seed for row in group], [loss_of(row) for row in group])
            )
    return fits


def differences(rows: Sequence[Row]) -> list[Difference]:
    """Paired differences of each model from the first one with its variant, and of that one from its first variant.

    In an ablation of the models ``batch`` and ``none`` with variants ``n1k`` and ``n4k``, ``none n4k`` is compared
    with ``batch n4k``, and ``batch n4k`` with ``batch n1k``.

    Returns:
        By budget and label: a difference for every size with common seeds and, if there are several sizes, those of
        their mean and of the best sizes (see :class:`Difference`).
    """
    rows = grid_rows(rows)
    result: list[Difference] = []
    for budget in dict.fromkeys(row.budget for row in rows):
        losses: dict[str, _Losses] = defaultdict(dict)  # by label
        for row in rows:
            if row.budget == budget:
                losses[row.label][row.size, row.seed] = loss_of(row)
        for label, baseline in _baselines(rows).items():
            result += _compared(label, baseline, budget, losses[label], losses[baseline])
    return result


_Losses = dict[tuple[str, int], float]
"""Losses of one label at one budget, by size and seed."""


def _baselines(rows: Sequence[Row]) -> dict[str, str]:
    """The label with which each label is compared; the first row's own label has none."""
    labels = {row.label: row for row in rows}
    baselines = {}
    for label, row in labels.items():
        first = rows[0]
        same_variant = f"{first.model} {row.variant}".strip()
        baseline = same_variant if row.model != first.model and same_variant in labels else first.label
        if baseline != label:
            baselines[label] = baseline
    return baselines


def _compared(label: str, baseline: str, budget: float | None, own: _Losses, other: _Losses) -> Iterator[Difference]:
    """Yield the differences of one label from its baseline, at one budget."""
    pairs: dict[str, dict[int, float]] = defaultdict(dict)  # by size and seed
    for size, seed in own:
        if (size, seed) in other:
            pairs[size][seed] = own[size, seed] - other[size, seed]

    def difference(size: str | None, values: Sequence[float]) -> Difference:
        return Difference(label, baseline, budget, size, mean_interval(values), len(values))

    for size, by_seed in pairs.items():
        yield difference(size, list(by_seed.values()))
    common = sorted(set.intersection(*map(set, pairs.values()))) if len(pairs) > 1 else []
    if not common:
        return
    yield difference(None, [float(np.mean([by_seed[seed] for by_seed in pairs.values()])) for seed in common])
    best, best_other = (
        min(pairs, key=lambda size: float(np.mean([losses[size, seed] for seed in common]))) for losses in (own, other)
    )
    yield difference(f"{best} / {best_other}", [own[best, seed] - other[best_other, seed] for seed in common])
