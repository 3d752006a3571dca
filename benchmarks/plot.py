"""Sweeps of benchmarks/kernels.py as one picture, a panel for each.

python benchmarks/plot.py docs/measurements/cpu-{experts,density,skew,picks,dim,tokens}.json --output FILE.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LINES = {  # key of a row: label and style
    "forward_ms": ("expert_mix, forward", {"color": "C0", "marker": "o"}),
    "both_ms": ("expert_mix, forward + backward", {"color": "C0", "marker": "s", "linestyle": "--"}),
    "gather_forward_ms": ("gather + einsum, forward", {"color": "C7", "marker": "o"}),
    "gather_both_ms": ("gather + einsum, forward + backward", {"color": "C7", "marker": "s", "linestyle": "--"}),
}
AXES = {"experts": "experts N", "dim": "dim d", "tokens": "tokens", "picks": "picks a token", "zipf": "Zipf exponent"}


def main() -> None:
    """Draw the sweeps that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True, help=".png or .svg")
    options = parser.parse_args()
    sweeps = [json.loads(path.read_text()) for path in options.sweeps]
    columns = min(3, len(sweeps))
    lines = -(-len(sweeps) // columns)
    figure, panels = plt.subplots(lines, columns, figsize=(4 * columns, 3 * lines), layout="constrained", squeeze=False)
    for panel in panels.flat[len(sweeps) :]:
        panel.set_visible(False)
    for panel, sweep in zip(panels.flat, sweeps):
        rows = sorted(sweep["rows"], key=lambda row: row[sweep["over"]])
        x = [row[sweep["over"]] for row in rows]
        panel.set_yscale("log")
        if sweep["over"] != "zipf":
            panel.set_xscale("log", base=2)
            panel.minorticks_off()
        for key, (label, style) in LINES.items():
            panel.plot(x, [row[key] for row in rows], label=label, **style)
        panel.set_xticks(x, [f"{value:g}" if value < 10_000 else f"{value / 1024:g}k" for value in x])
        fixed = {
            name: rows[0][name] for name in ("experts", "dim", "tokens", "picks") if len({r[name] for r in rows}) == 1
        }
        panel.set_title(", ".join(f"{name} {value}" for name, value in fixed.items()), fontsize=8)
        panel.set(xlabel=AXES.get(sweep["over"], sweep["over"].replace("_", " ")), ylabel="ms")
        panel.grid(alpha=0.3, which="both")
    figure.suptitle(sweeps[0]["device"])
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(options.output, dpi=110)


if __name__ == "__main__":
    main()
