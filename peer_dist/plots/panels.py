"""What all figures and charts share: their look, empty panels to draw on, and how bands and large numbers are drawn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from peer_dist.mistake import printable
from peer_dist.units import short

_STYLE = {
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "legend.fontsize": 7.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "legend.frameon": False,
    "svg.fonttype": "none",  # words stay words
    "savefig.dpi": 300,
}


@contextmanager
def style() -> Iterator[None]:
    """While active, figures are made and saved in the style of this package."""
    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]
        yield


def empty_panels(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of ``width`` x ``height`` inches, and its ``count`` panels side by side."""
    figure, panels = plt.subplots(1, count, figsize=(width, height), layout="constrained", squeeze=False)
    return figure, list(panels.flat)


def as_written(name: str) -> str:
    """A name as a label: matplotlib reads what is between dollars as mathematics, and hides what begins with ``_``."""
    name = printable(name).replace("$", r"\$")
    return f"\u200b{name}" if name.startswith("_") else name


def band(panel: Axes, x: np.ndarray, low: np.ndarray, high: np.ndarray, color: str) -> None:
    """Fill between ``low`` and ``high`` along ``x``, all ``[points]``, paler than the line of that colour."""
    panel.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)


def short_numbers(axis: Axis) -> None:
    """Write an axis's large numbers with units of 1000: 4.194M."""
    # rounded, because a tick at zero may be 1e-17
    axis.set_major_formatter(FuncFormatter(lambda value, _: short(round(value, 10))))
