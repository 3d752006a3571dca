"""The page's charts: matplotlib's SVG without colours of its own, so that the page can be light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from peer_dist.measures.record import RunRecord, Series
from peer_dist.plots.panels import as_written, band, empty_panels, short_numbers, style

COLORS = 6  # of the page's series: --c0 to --c5
SPLIT = ("retrieve", "dispatch", "experts", "combine", "optimizer", "other")  # of a step's time
_INK, _GRID = "#010203", "#010204"  # stand for the page's colours, as _color(n) does
_POINTS = 240  # of a line: more are not seen


@dataclass(frozen=True)
class Chart:
    """A chart as the page shows it.

    Attributes:
        svg: to be put into HTML as it is.
        legend: number of a colour and what has it.
        note: what a reader needs to know besides.
    """

    title: str
    svg: str
    legend: list[tuple[int, str]]
    note: str = ""


@dataclass(frozen=True)
class _Line:
    label: str
    points: Series
    color: int
    look: str = "-"
    faint: bool = False
    among: tuple[np.ndarray, np.ndarray] | None = None  # least and largest of those that the line stands for


def loss(runs: Sequence[RunRecord]) -> Chart:
    """Training and held-out loss."""
    lines, one = [], len(runs) == 1
    for number, run in enumerate(runs):
        training, held_out = run.series("train/loss"), run.series("val/loss")
        lines.append(_Line("training" if one else "", _thinned(training), number, faint=not one))
        if held_out:
            label, color = ("held-out", 1) if one else (run.name, number)
            # with few points a line would suggest values that were not measured
            lines.append(_Line(label, _thinned(held_out), color, "o" if len(held_out.step) < 4 else "-o"))
    note = "" if one else "With dots: held-out; faint: training."
    return _lines("Loss", "nats per token", lines, note=note, zero=False)


def gradient_norm(runs: Sequence[RunRecord]) -> Chart:
    """The gradient's norm before clipping."""
    return _of_runs(runs, "Gradient norm", "norm before clipping", "optimizer/grad_norm")


def of_layers(
    runs: Sequence[RunRecord], title: str, unit: str, name: str, even: str = "", note: str = ""
) -> Chart | None:
    """A metric ``experts/layerL_NAME``: of one run a line per layer, of several a line per run, the mean of its layers.

    Args:
        name: of the metric, without its prefix.
        even: name of the metric for uniform picks, drawn as a dotted line; empty: none.

    Returns:
        The chart; None if no run has experts.
    """
    lines = []
    for number, run in enumerate(runs):
        names = [f"experts/layer{layer}_{name}" for layer in run.layers]
        if not names:
            continue
        if len(runs) == 1 and len(names) <= COLORS:
            for color, (layer, series) in enumerate(zip(run.layers, names)):
                lines.append(_Line(f"layer {layer}", _thinned(run.series(series)), color))
        else:
            layers = _thinned(run.together(names))
            mean = Series(layers.step, layers.value.mean(1))
            label = f"mean of {len(names)} layers, and their range" if len(runs) == 1 else run.name
            among = (layers.value.min(1), layers.value.max(1)) if len(runs) == 1 else None
            lines.append(_Line(label, mean, number, among=among))
        if even:
            lines.append(_Line("", _thinned(run.series(f"experts/layer{run.layers[0]}_{even}")), number, ":"))
    return _lines(title, unit, lines, note=note) if lines else None


def throughput(runs: Sequence[RunRecord]) -> Chart:
    """Tokens per second, and as a dotted line what was planned."""
    plans = [run.planned_speed for run in runs]
    note = "Dotted: as planned (plan.json)." if any(plans) else ""
    return _of_runs(runs, "Throughput", "tokens per second", "speed/tokens_per_second", plans, note=note)


def memory(runs: Sequence[RunRecord]) -> Chart:
    """The largest memory use of rank 0 so far."""
    return _of_runs(runs, "Peak memory of rank 0", "GiB", "memory/peak_gib")


def exchange(runs: Sequence[RunRecord]) -> Chart | None:
    """A chart of the bytes per token that ranks exchange; None if they exchange none."""
    if not any(run.series("exchange/bytes_per_token").value.any() for run in runs):
        return None
    note = "Sent to other ranks by all layers, forward and backward."
    return _of_runs(runs, "Experts' exchange", "bytes per token", "exchange/bytes_per_token", note=note)


def step_split(runs: Sequence[RunRecord]) -> Chart:
    """A step's time by its parts: over the steps of one run, or for several runs the median of each."""

    def draw_one(panel: Axes) -> None:
        parts = _thinned(runs[0].together([*(f"time/{part}" for part in SPLIT), "time/step"]))
        panel.set(xlabel="step", ylabel="ms of a step")
        if not parts:
            return
        *times, whole = parts.value.T * 1e3
        panel.stackplot(parts.step, times, colors=[_color(n) for n in range(COLORS)], linewidth=0)
        panel.set_xlim(parts.step[0], parts.step[-1])
        panel.set_ylim(0, 1.5 * float(np.quantile(whole, 0.9)))  # a slow first step would flatten all others

    def draw_all(panel: Axes) -> None:
        left = np.zeros(len(runs))
        for number, part in enumerate(SPLIT):
            times = [run.series(f"time/{part}") for run in runs]
            width = np.array([np.median(series.value) * 1e3 if series else 0.0 for series in times])
            panel.barh([as_written(run.name) for run in runs], width, left=left, color=_color(number), height=0.6)
            left += width
        panel.invert_yaxis()
        panel.grid(axis="y", visible=False)
        panel.set_xlabel("ms of a step, medians")

    svg = _svg(draw_one if len(runs) == 1 else draw_all)
    return Chart("Where a step's time goes", svg, list(enumerate(SPLIT)), "Forward and backward together, on rank 0.")


def _of_runs(
    runs: Sequence[RunRecord],
    title: str,
    unit: str,
    name: str,
    levels: Sequence[float | None] = (),
    note: str = "",
) -> Chart:
    """A line per run, and a dotted one at the run's entry in ``levels``."""
    lines = []
    for number, run in enumerate(runs):
        points = _thinned(run.series(name))
        lines.append(_Line(run.name if len(runs) > 1 else "", points, number))
        level = levels[number] if levels else None
        if level is not None and points:
            lines.append(_Line("", Series(points.step[[0, -1]], np.full(2, level)), number, ":"))
    return _lines(title, unit, lines, note)


def _lines(title: str, unit: str, lines: Sequence[_Line], note: str = "", zero: bool = True) -> Chart:
    def draw(panel: Axes) -> None:
        for line in lines:
            color = _color(line.color % COLORS)
            alpha = 0.5 if line.faint else 1
            panel.plot(line.points.step, line.points.value, line.look, color=color, alpha=alpha)
            if line.among is not None:
                band(panel, line.points.step, *line.among, color)
        panel.set(xlabel="step", ylabel=unit)
        panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        short_numbers(panel.yaxis)
        if zero:
            panel.set_ylim(0, 1.05 * panel.get_ylim()[1])

    legend = [(line.color % COLORS, line.label) for line in lines if line.label]
    return Chart(title, _svg(draw), legend, note)


def _svg(draw: Callable[[Axes], None]) -> str:
    look: dict[str, Any] = {"font.size": 10, "axes.labelsize": 10, "xtick.labelsize": 9.5, "ytick.labelsize": 9.5}
    look |= dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), _INK)
    look |= dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), _GRID) | {"grid.alpha": 1}
    file = io.StringIO()
    with style(), matplotlib.rc_context(look):  # type: ignore[arg-type]
        figure, (panel,) = empty_panels(1, width=4.6, height=2.6)
        draw(panel)
        figure.savefig(file, format="svg", transparent=True)
        plt.close(figure)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' id="[a-z_.0-9]+_\d+"', "", text)  # they would be there once per chart
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text)
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "inherit", text)
    for color, variable in [(_INK, "ink"), (_GRID, "grid"), *((_color(n), f"c{n}") for n in range(COLORS))]:
        text = text.replace(color, f"var(--{variable})")
    return text


def _color(number: int) -> str:
    return f"#0102f{number}"


def _thinned(points: Series) -> Series:
    """At most ``_POINTS`` points, each the mean of neighbours, so that a page stays small."""
    size = -(-len(points.step) // _POINTS)
    if size <= 1:
        return points
    starts = np.arange(0, len(points.step), size)
    counts = np.diff(starts, append=len(points.step))
    return Series(points.step[starts + counts - 1], (np.add.reduceat(points.value, starts).T / counts).T)
