"""Figures, each a function from numbers to a matplotlib figure. Bars and bands are 95% intervals (Student's t)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from peer_dist.plots.panels import as_written, band, empty_panels, short_numbers
from peer_dist.sweep.fit import Interval, Measure, grid_rows, loss_of, mean_interval, optima
from peer_dist.sweep.results import Row

# Okabe and Ito's, told apart by colour-blind readers; markers say the same again
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX"
_COLUMN = 3.4  # inches: a column of a two-column page
_MEASURES = {
    "train_flops_per_token": "training FLOPs per token",
    "active_parameters": "active parameters",
    "parameters": "parameters",
}
_LOSS = "held-out loss (nats per token)"


@dataclass(frozen=True)
class Curve:
    """A run's loss along its steps: float64 [steps] each; ``seconds`` and ``tokens`` since its start."""

    label: str
    step: np.ndarray
    seconds: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray
    held_out: bool


def isoflop(rows: Sequence[Row], measure: Measure) -> Figure | None:
    """Loss against size, a panel for each budget, with the fitted parabolas and their minima; None without any."""
    rows = [row for row in grid_rows(rows) if row.budget is not None]
    fits = optima(rows, measure)
    budgets = sorted({fit.budget for fit in fits if fit.budget is not None})
    if not fits:
        return None
    looks = _looks([row.label for row in rows])
    figure, panels = _panels(len(budgets))
    for panel, budget in zip(panels, budgets):
        for label, look in looks.items():
            own = [row for row in rows if row.label == label and row.budget == budget]
            points = _means(own, attrgetter(measure), loss_of)
            _errorbar(panel, points, look, linestyle="none")
            for fit in (fit for fit in fits if fit.label == label and fit.budget == budget):
                sizes = np.geomspace(*fit.span, 200)
                panel.plot(sizes, fit.curve(sizes), color=look["color"])
                if fit.where == "inside":
                    low, high = fit.size_interval
                    error = [[fit.size - low], [high - fit.size]]
                    panel.errorbar(
                        [fit.size],
                        [fit.loss.value],
                        xerr=None if np.isnan(low) or high > 10 * fit.span[1] else error,
                        yerr=_half_widths([fit.loss]),
                        color=look["color"],
                        marker="*",
                        markersize=10,
                        markeredgecolor="white",
                        markeredgewidth=0.5,
                        zorder=5,
                    )
        _log_axis(panel)
        panel.set(title=f"{_power(budget)} FLOPs", xlabel=_MEASURES[measure])
    panels[0].set_ylabel(_LOSS)
    star = Line2D([], [], color="0.4", marker="*", markersize=9, linestyle="none", label="fitted minimum")
    _legend(figure, panels, [star])
    return figure


def loss_by_model(rows: Sequence[Row]) -> Figure | None:
    """Loss of every model, variant and size after equally many tokens: a row each, with every seed, the mean and its
    interval; None with fewer than two rows.
    """
    losses_of: dict[str, list[float]] = {}
    for row in grid_rows(rows):
        if row.budget is None:
            losses_of.setdefault(f"{row.label} {row.size}".strip(), []).append(loss_of(row))
    if len(losses_of) < 2:
        return None
    labels = list(losses_of)
    figure, (panel,) = _panels(1)
    figure.set_figheight(0.9 + 0.26 * len(labels))
    for place, (losses, look) in enumerate(zip(losses_of.values(), _looks(labels).values())):
        mean = mean_interval(losses)
        panel.plot(losses, [place] * len(losses), color=look["color"], marker=".", linestyle="none", alpha=0.5)
        marks: dict[str, Any] = {"color": look["color"], "marker": look["marker"], "capsize": 2, "elinewidth": 0.8}
        panel.errorbar([mean.value], [place], xerr=_half_widths([mean]), **marks)
    panel.set_yticks(range(len(labels)), [as_written(label) for label in labels])
    panel.set_ylim(len(labels) - 0.5, -0.5)
    panel.set_xlabel(_LOSS)
    return figure


def loss_curves(curves: Sequence[Curve], over: str) -> Figure:
    """Loss against ``over`` (``seconds`` or ``tokens``). Curves with one label are seeds, drawn as their mean and its
    interval.
    """
    figure, (panel,) = _panels(1)
    for label, look in _looks([curve.label for curve in curves]).items():
        seeds = [curve for curve in curves if curve.label == label]
        steps = sorted(set.intersection(*(set(curve.step.tolist()) for curve in seeds)))
        chosen = [np.isin(curve.step, steps) for curve in seeds]
        x = np.mean([getattr(curve, over)[keep] for curve, keep in zip(seeds, chosen)], axis=0)
        losses = [mean_interval(list(values)) for values in zip(*(c.loss[keep] for c, keep in zip(seeds, chosen)))]
        mean = np.array([loss.value for loss in losses])
        mark = look["marker"] if len(x) <= 30 else None
        panel.plot(x, mean, color=look["color"], marker=mark, label=look["label"])
        if len(seeds) > 1:
            width = np.array([loss.half_width for loss in losses])
            band(panel, x, mean - width, mean + width, look["color"])
    held_out = all(curve.held_out for curve in curves)
    panel.set_ylabel(_LOSS if held_out else "training loss (nats per token)")
    panel.set_xlabel("training time (s)" if over == "seconds" else "training tokens")
    panel.set_xlim(left=0)
    if over == "tokens":
        short_numbers(panel.xaxis)
    _legend(figure, [panel])
    return figure


def usage_by_experts(rows: Sequence[Row]) -> Figure | None:
    """Usage and unevenness against the number of experts; None unless some model was run with two such numbers."""
    rows = [row for row in grid_rows(rows) if row.num_experts and row.unevenness is not None]
    lines = _lines(rows, lambda row: row.num_experts, lambda row: (f"h·k {row.active_experts}",))
    if not lines:
        return None
    figure, panels = _panels(2)
    axes = (("experts used (%)", "usage_percent"), ("unevenness (nats)", "unevenness"))
    for panel, (name, field) in zip(panels, axes):
        for own, look in zip(lines.values(), _looks(list(lines)).values()):
            points = _means(own, lambda row: float(row.num_experts or 0), attrgetter(field))
            _errorbar(panel, points, look)
        # neither can be negative: with few seeds intervals would be most of the figure
        panel.set_ylim(0, 1.1 * max(getattr(row, field) for own in lines.values() for row in own))
        _log_axis(panel, {_count(row.num_experts or 0): row.num_experts or 0 for row in rows})
        panel.set(xlabel="experts N", ylabel=name)
    _legend(figure, panels)
    return figure


def loss_by_picks(rows: Sequence[Row]) -> Figure | None:
    """Loss against experts per token, h k; None unless some model was run with two such numbers."""
    rows = [row for row in grid_rows(rows) if row.active_experts]
    lines = _lines(
        rows, lambda row: row.active_experts, lambda row: (f"N {_count(row.num_experts or 0)}", f"h {row.heads}")
    )
    if not lines:  # no two numbers of picks with equally many heads: then heads may differ along a line
        lines = _lines(rows, lambda row: row.active_experts, lambda row: (f"N {_count(row.num_experts or 0)}",))
    if not lines:
        return None
    figure, (panel,) = _panels(1)
    for own, look in zip(lines.values(), _looks(list(lines)).values()):
        _errorbar(panel, _means(own, lambda row: float(row.active_experts or 0), loss_of), look)
    _log_axis(panel, {str(row.active_experts): row.active_experts or 0 for own in lines.values() for row in own})
    panel.set(xlabel="experts per token h·k", ylabel=_LOSS)
    _legend(figure, [panel])
    return figure


def usage_distribution(mass: Mapping[str, np.ndarray]) -> Figure:
    """How evenly the gates' mass is spread over experts: shares in descending order, and their histogram.

    Args:
        mass: by name of the layer, the sum of gates per expert: float64 [num_experts].
    """
    figure, (ranked, histogram) = _panels(2)
    looks = _looks(list(mass))
    shares = {name: np.sort(values / values.sum() * len(values))[::-1] for name, values in mass.items()}
    # a thousandth of the experts may lie below what is drawn; the first bin counts them
    least = min(float(np.log10(np.quantile(share[share > 0], 1e-3))) for share in shares.values())
    most = max(float(np.log10(share.max())) for share in shares.values())
    bins = np.linspace(least, max(most, least + 0.1), 41)
    for name, share in shares.items():
        used = share[share > 0]
        color = looks[name]["color"]
        unused = 100 * (1 - len(used) / len(share))
        label = f"{as_written(name)}: {len(share):,} experts" + (
            f", {unused:.1f}% unused" if len(used) < len(share) else ""
        )
        ranked.plot(np.arange(1, len(used) + 1), used, color=color, label=label)
        weights = np.full(len(used), 100 / len(share))
        histogram.hist(
            np.clip(np.log10(used), *bins[[0, -1]]),
            list(bins),
            weights=weights,
            histtype="step",
            color=color,
            linewidth=1.2,
        )
    ranked.axhline(1, color="0.4", linestyle=":", linewidth=1)
    histogram.axvline(0, color="0.4", linestyle=":", linewidth=1)
    _log_axis(ranked)
    ranked.set_yscale("log")
    ranked.set_ylim(bottom=10**least)
    ranked.set(xlabel="rank of the expert", ylabel="usage over the mean expert's")
    histogram.set(xlabel="usage over the mean expert's", ylabel="experts (%)")
    histogram.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"$10^{{{value:g}}}$"))
    _legend(figure, [ranked], [Line2D([], [], color="0.4", linestyle=":", linewidth=1, label="even usage")])
    return figure


def _lines(
    rows: Sequence[Row], x: Callable[[Row], int | None], others: Callable[[Row], tuple[str, ...]]
) -> dict[str, list[Row]]:
    """Rows that agree in model, size, budget and ``others``, by a label of what varies between groups; groups with
    fewer than two values of ``x`` are left out.
    """
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        budget = "" if row.budget is None else f"{_power(row.budget)} FLOPs"
        key = (row.model, row.size, budget, *others(row))
        groups[key].append(row)
    groups = {key: own for key, own in groups.items() if len({x(row) for row in own}) > 1}
    varies = [len(set(parts)) > 1 for parts in zip(*groups)]
    return {
        " ".join(part for part, wanted in zip(key, varies) if wanted and part) or key[0]: own
        for key, own in groups.items()
    }


def _means(rows: Sequence[Row], x: Callable[[Row], float], y: Callable[[Row], float]) -> list[tuple[float, Interval]]:
    """The mean of y over the seeds, for every x and variant, in order of x."""
    values: dict[tuple[float, str], list[float]] = defaultdict(list)
    for row in rows:
        values[x(row), row.variant].append(y(row))
    return [(place[0], mean_interval(values[place])) for place in sorted(values)]


def _half_widths(intervals: Sequence[Interval]) -> list[float]:
    return [0.0 if np.isnan(interval.half_width) else interval.half_width for interval in intervals]


def _errorbar(panel: Axes, points: Sequence[tuple[float, Interval]], look: dict[str, str], **more: Any) -> None:
    intervals = [interval for _, interval in points]
    panel.errorbar(
        [x for x, _ in points],
        [interval.value for interval in intervals],
        yerr=_half_widths(intervals),
        capsize=2,
        elinewidth=0.8,
        **{**look, **more},
    )


def _looks(labels: Sequence[str]) -> dict[str, dict[str, str]]:
    """A colour and a marker for every label, in order of appearance."""
    return {
        label: {"color": _COLORS[n % len(_COLORS)], "marker": _MARKERS[n % len(_MARKERS)], "label": as_written(label)}
        for n, label in enumerate(dict.fromkeys(labels))
    }


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """Panels side by side, each a bit narrower than a column; alone, as wide as one."""
    return empty_panels(count, width=_COLUMN if count == 1 else 2.6 * count, height=2.7)


def _log_axis(panel: Axes, ticks: Mapping[str, int] | None = None) -> None:
    panel.set_xscale("log")
    panel.xaxis.set_minor_formatter(NullFormatter())
    if ticks is not None:
        panel.set_xticks(list(ticks.values()), list(ticks))
        panel.xaxis.set_minor_locator(NullLocator())
        return
    low, high = panel.get_xlim()
    if high < 30 * low:  # less than a decade or so: powers of ten alone would leave the axis bare
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        short_numbers(panel.xaxis)


def _count(experts: int) -> str:
    """1048576 as 1024²."""
    root = math.isqrt(experts)
    return f"{root}²" if root * root == experts and root > 9 else f"{experts:,}"


def _power(value: float) -> str:
    """4e12 as 4·10¹²."""
    digits, _, exponent = f"{value:.3g}".partition("e")
    if not exponent:
        return digits
    power = str(int(exponent)).translate(str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻"))
    return f"10{power}" if digits == "1" else f"{digits}·10{power}"


def _legend(figure: Figure, panels: Sequence[Axes], more: Sequence[Line2D] = ()) -> None:
    """Below the panels, each label once."""
    entries: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels()):
            entries.setdefault(label, handle)
    entries |= {str(line.get_label()): line for line in more}
    longest = max(map(len, entries))
    columns = max(1, min(len(entries), int(figure.get_figwidth() * 14 / (longest + 6))))
    figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=columns)
