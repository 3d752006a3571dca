"""`peer-dist plot`: reads the inputs, and writes every figure that can be drawn of them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import get_args

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from peer_dist.config import ConfigError
from peer_dist.measures.metrics import metrics_file, read_metrics
from peer_dist.plots import figures
from peer_dist.plots.panels import style
from peer_dist.reading import check_regular, reading
from peer_dist.sweep.fit import Measure, differences, optima
from peer_dist.sweep.results import RESULTS, Row, read_results
from peer_dist.writing import no_empty_folders, whole, why_unwritten

_MOST_BYTES = 1 << 30  # of an array of a usage.npz, which may be compressed
KINDS = ("isoflop", "models", "loss", "experts", "hk", "usage")


def plot(inputs: Sequence[Path], output: Path, kinds: Sequence[str], against: str) -> list[Path]:
    """Draw the figures of ``kinds``, or all that the inputs allow, and return the paths of the files.

    Args:
        inputs: results.csv or a sweep's folder; folders of runs; .npz files of expert usage (``mass_layer<N>``).
        output: folder of the figures.
        against: the measure of size in isoFLOP figures (see :data:`Measure`).

    Raises:
        ConfigError: an input is none of these, or has nothing for a figure asked for.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise ConfigError(f"--kind: {kind!r} is not known; {', '.join(KINDS)}")
    measure = _measure(against)
    rows, curves = results_of(inputs), _curves(inputs)
    makers: list[tuple[str, str, Callable[[], Figure | None]]] = []  # kind, name of the file, figure
    if rows:
        makers.append(("isoflop", "isoflop", lambda: figures.isoflop(rows, measure)))
        makers.append(("models", "models", lambda: figures.loss_by_model(rows)))
        makers.append(("experts", "experts", lambda: figures.usage_by_experts(rows)))
        makers.append(("hk", "hk", lambda: figures.loss_by_picks(rows)))
    if curves:
        makers.append(("loss", "loss-time", lambda: figures.loss_curves(curves, "seconds")))
        makers.append(("loss", "loss-tokens", lambda: figures.loss_curves(curves, "tokens")))
    for path in inputs:
        if path.suffix == ".npz":
            name = path.stem if path.stem.startswith("usage") else f"usage-{path.stem}"
            makers.append(("usage", name, partial(figures.usage_distribution, _masses(path))))
    with style():
        drawn = [(kind, name, make()) for kind, name, make in makers if not kinds or kind in kinds]
        figure_of = {name: (kind, figure) for kind, name, figure in drawn if figure is not None}
        missing = [kind for kind in kinds if kind not in [kind_drawn for kind_drawn, _ in figure_of.values()]]
        if missing or not figure_of:
            names = ", ".join(map(str, inputs))
            raise ConfigError(f"{names}: has nothing for {', '.join(missing) or 'any figure'}; {_NEEDS}")
        with no_empty_folders(output):
            try:
                output.mkdir(parents=True, exist_ok=True)
            except (OSError, ValueError) as error:
                raise ConfigError(f"--output {output}: {why_unwritten(error)}; name a folder") from None
            paths = []
            for name, (_, figure) in figure_of.items():
                for ending in ("png", "svg"):
                    paths.append(output / f"{name}.{ending}")
                    with whole(paths[-1], ConfigError, f"--output {output}") as path:
                        figure.savefig(path, format=ending)
        plt.close("all")
    return paths


_NEEDS = (
    "isoflop needs a sweep with budgets and three sizes, models one with tokens and two models, experts and hk two "
    "numbers of them, loss the folders of runs, usage an .npz file"
)


def results_of(inputs: Sequence[Path]) -> list[Row]:
    """The rows of all results tables among the inputs.

    Raises:
        ConfigError: an input is nothing that can be drawn.
    """
    rows: list[Row] = []
    for path in inputs:
        if path.suffix == ".csv" or os.path.isfile(path / RESULTS):
            rows += read_results(path if path.suffix == ".csv" else path / RESULTS)
        elif path.suffix != ".npz" and metrics_file(path) is None:
            raise ConfigError(f"{path}: is no results.csv, no folder with one or with metrics.jsonl, and no .npz file")
    return rows


def tables(rows: Sequence[Row], against: str) -> list[Table]:
    """Tables of the fits: optima by budget and model, and paired differences; none of what cannot be fitted."""
    measure = _measure(against)
    fit_tables: list[Table] = []
    fits = optima(rows, measure)
    if fits:
        table = Table(title=f"Compute-optimal size ({measure}), 95% intervals by the delta method", box=None)
        for column in ("FLOPs", "model", "size", "interval", "loss", ""):
            table.add_column(column)
        for fit in fits:
            low, high = fit.size_interval
            budget = "" if fit.budget is None else f"{fit.budget:.3g}"
            where = {
                "inside": "",
                "below": "below the sizes tried: extrapolated",
                "above": "above the sizes tried: extrapolated",
                "none": "no minimum: the parabola opens downwards",
            }[fit.where]
            shown = (
                ("", "", "") if fit.where == "none" else (f"{fit.size:.3g}", f"{low:.3g} to {high:.3g}", str(fit.loss))
            )
            table.add_row(budget, fit.label, *shown, where)
        fit_tables.append(table)
    compared = differences(rows)
    if compared:
        table = Table(title="Differences of loss, runs of one seed paired, 95% intervals", box=None)
        rows_of = [
            {
                "FLOPs": "" if difference.budget is None else f"{difference.budget:.3g}",
                "model": difference.label,
                "minus": difference.baseline,
                "size": "mean" if difference.size is None else difference.size,
                "difference": str(difference.loss),
                "pairs": str(difference.pairs),
            }
            for difference in compared
        ]
        columns = [name for name in rows_of[0] if any(cells[name] for cells in rows_of)]  # no budgets, no sizes
        for name in columns:
            table.add_column(name)
        for cells in rows_of:
            table.add_row(*(cells[name] for name in columns))
        fit_tables.append(table)
    return fit_tables


def _measure(name: str) -> Measure:
    known: Measure
    for known in get_args(Measure):
        if name == known:
            return known
    raise ConfigError(f"--against: {name!r} is not known; {', '.join(get_args(Measure))}")


def _curves(inputs: Sequence[Path]) -> list[figures.Curve]:
    """Held-out losses if every run was validated three times or more after its start, else training losses."""
    runs = {path: read_metrics(metrics) for path in inputs if (metrics := metrics_file(path))}
    times = ("time/step", "speed/tokens_per_second")
    steps = {
        path: [line for line in lines if all(line.get(name) is not None for name in times)]
        for path, lines in runs.items()
    }
    held_out = all(sum(line.get("val/loss") is not None for line in lines) >= 3 for lines in steps.values())
    return [_curve(path, lines, held_out) for path, lines in steps.items() if lines]


def _curve(path: Path, lines: Sequence[dict[str, float]], held_out: bool) -> figures.Curve:
    """A run's held-out loss, or its training loss as a running mean over a fiftieth of the run."""
    step = np.array([line["step"] for line in lines])
    seconds = np.cumsum([line["time/step"] for line in lines])
    tokens = np.cumsum([line["time/step"] * line["speed/tokens_per_second"] for line in lines])
    loss = np.array([_number(line.get("val/loss" if held_out else "train/loss")) for line in lines])
    if not held_out:
        window = max(1, len(lines) // 50)
        loss = np.convolve(loss, np.ones(window) / window)[: len(loss)]
        loss[: window - 1] = np.nan  # not a whole window yet
    there = np.isfinite(loss)
    folder = path.parent if path.name == "logs" else path
    label = re.sub(r"-s\d+$", "", folder.absolute().name)
    return figures.Curve(label, step[there], seconds[there], tokens[there], loss[there], held_out)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _masses(path: Path) -> dict[str, np.ndarray]:
    """The gates' sums of each layer, ``[experts]``, by the layer's name.

    Raises:
        ConfigError: the file is no usage.npz, or holds none.
    """
    masses: dict[str, np.ndarray] = {}
    with reading(path, ConfigError, "a usage.npz of `peer-dist usage`"):
        check_regular(path)
        with np.load(path, allow_pickle=False) as arrays:
            if not isinstance(arrays, np.lib.npyio.NpzFile):
                raise ValueError("it is a single array")
            layers = (re.fullmatch(r"mass_layer([1-9][0-9]{0,5})", name) for name in arrays.files)
            for number in sorted(int(layer[1]) for layer in layers if layer):
                name = f"mass_layer{number}"
                if arrays.zip is None or arrays.zip.getinfo(f"{name}.npy").file_size > _MOST_BYTES:
                    raise ValueError(f"its {name} is larger than any")
                mass = arrays[name]
                if (
                    mass.ndim != 1
                    or mass.dtype.kind not in "fiu"
                    or not (np.isfinite(mass.sum(dtype=np.float64)) and (mass >= 0).all())
                ):
                    raise ValueError(f"its {name} is no list of sums of gates")
                if mass.sum() > 0:
                    masses[f"layer {number}"] = mass
    if not masses:
        raise ConfigError(f"{path}: has no array mass_layer<N> with any mass in it; peer-dist usage writes them")
    return masses
