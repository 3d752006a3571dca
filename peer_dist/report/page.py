"""The page of `peer-dist report`: what it shows of one run or several."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import yaml
from jinja2 import Environment, PackageLoader

from peer_dist import __version__
from peer_dist.config import ConfigError
from peer_dist.measures.metrics import time_of
from peer_dist.measures.record import RunRecord, read_run
from peer_dist.plots import charts
from peer_dist.reading import opened, reading
from peer_dist.writing import whole

_CENTURY = 3.2e9  # seconds: no run takes as long
_EVENTS = 100  # shown of a run, the newest


def write_report(folders: Sequence[Path], output: Path | None) -> Path:
    """Write one self-contained page of HTML, and return its path.

    Args:
        folders: of runs, or their logs; several are compared.
        output: a file; by default report.html in the run's folder, or in the working directory for several.

    Raises:
        ConfigError: a folder holds no run, or the page cannot be written, or would replace what is none.
    """
    runs = [read_run(folder) for folder in folders]
    if len({run.name for run in runs}) < len(runs):
        runs = [replace(run, name=str(folder)) for run, folder in zip(runs, folders)]
    output = output or (folders[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    _check_replaceable(output)
    text = page(runs)
    with whole(output, ConfigError, f"--output {output}") as path:
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
    return output


def _check_replaceable(output: Path) -> None:
    """Refuse to write a page over what is none, such as a run's own logs.

    Raises:
        ConfigError: that is so, or what is there cannot be read.
    """
    if not os.path.isfile(output):
        return
    with reading(f"--output {output}", ConfigError, advice="name another file"), opened(output) as file:
        begin = file.read(64).lstrip().lower()
    if begin and not begin.startswith((b"<!doctype html", b"<html")):
        raise ConfigError(f"--output {output}: is there and is no page of HTML; name another file, or remove it")


def page(runs: Sequence[RunRecord]) -> str:
    """The page's HTML."""
    drawn: dict[str, list[charts.Chart | None]] = {
        "Learning": [charts.loss(runs), charts.gradient_norm(runs)],
        "Experts": [
            charts.of_layers(runs, "Experts used", "% of the experts", "usage_percent"),
            charts.of_layers(
                runs,
                "Unevenness",
                "nats",
                "unevenness",
                even="unevenness_if_uniform",
                note="KL divergence of the gates from even use; dotted: what uniform picks would show.",
            ),
        ],
        "Speed and memory": [
            charts.throughput(runs),
            charts.step_split(runs),
            charts.memory(runs),
            charts.exchange(runs),
        ],
    }
    environment = Environment(loader=PackageLoader("peer_dist.report", "."), autoescape=True, trim_blocks=True)
    return environment.get_template("page.html").render(
        runs=runs,
        version=__version__,
        colors=charts.COLORS,
        title=", ".join(run.name for run in runs),
        subtitle=_subtitle(runs),
        figures=[(label, [value(run) for run in runs]) for label, value in _FIGURES.items()],
        sections={name: [chart for chart in row if chart is not None] for name, row in drawn.items()},
        maps={run.name: {layer: base64.b64encode(png).decode() for layer, png in run.maps.items()} for run in runs},
        layers={run.name: list(_layer_rows(run)) for run in runs if run.layers},
        differing=_differing(runs),
        circumstances={run.name: run.starts[-1]["environment"] for run in runs if run.starts},
        events={run.name: list(_events(run)) for run in runs},
        checkpoints={run.name: {step: _bytes(size) for step, size in run.checkpoints.items()} for run in runs},
        configs={run.name: yaml.safe_dump(run.config, sort_keys=False) for run in runs if run.config},
    )


def _subtitle(runs: Sequence[RunRecord]) -> str:
    if len(runs) > 1:
        return f"{len(runs)} runs compared"
    begun = time_of(runs[0].starts[0]) if runs[0].starts else None
    return "" if begun is None else f"begun {begun:%d %B %Y, %H:%M}"


# The figures at the top, one function from a run to its text for each.


def _last(name: str, form: str) -> Callable[[RunRecord], str]:
    def value(run: RunRecord) -> str:
        points = run.series(name)
        return form.format(points.last) if points else "–"

    return value


def _steps(run: RunRecord) -> str:
    done, wanted = run.lines[-1]["step"], run.planned_steps
    return f"{done:,}" + (f" of {wanted:,}" if wanted > done else "")


def _tokens(run: RunRecord) -> float:
    return float(run.together(["time/step", "speed/tokens_per_second"]).value.prod(1).sum())


def _parameters(run: RunRecord) -> str:
    if not run.starts:
        return "–"
    all_of_them, experts = (run.starts[-1][name] for name in ("parameters", "expert_parameters"))
    return _count(all_of_them) + (f", {_count(experts)} in experts" if experts else "")


def _speed(run: RunRecord) -> str:
    speed = run.series("speed/tokens_per_second")
    if not speed:
        return "–"
    median = float(np.median(speed.value))
    planned = run.planned_speed
    return f"{median:,.0f}" + (f" ({median / planned:.0%} of the plan)" if planned else "")


def _time(run: RunRecord) -> str:
    seconds = run.series("time/step").value.sum()
    return str(timedelta(seconds=round(seconds))) if abs(seconds) < _CENTURY else "–"


def _interruptions(run: RunRecord) -> str:
    skipped = sum(int(points.last) for name in _SKIPPED if (points := run.series(name)))
    counts = {"restarts": len(run.starts) - 1, "steps left out": skipped}
    parts = [f"{what}: {count}" for what, count in counts.items() if count > 0]
    return ", ".join(parts) or "none"


_SKIPPED = {"optimizer/skipped_steps": "gradients not finite", "optimizer/skipped_spikes": "loss spike"}
_FIGURES: dict[str, Callable[[RunRecord], str]] = {
    "held-out perplexity": _last("val/perplexity", "{:,.2f}"),
    "held-out loss": _last("val/loss", "{:.4f}"),
    "training loss": _last("train/loss", "{:.4f}"),
    "steps": _steps,
    "training tokens": lambda run: _count(_tokens(run)),
    "parameters": _parameters,
    "tokens per second": _speed,
    "time in steps": _time,
    "peak memory of rank 0": _last("memory/peak_gib", "{:.2f} GiB"),
    "bytes exchanged per token": _last("exchange/bytes_per_token", "{:,.0f}"),
    "interruptions": _interruptions,
}


# The tables.


def _layer_rows(run: RunRecord) -> Iterator[list[str]]:
    """A row per layer: its number, and the last window's numbers in the order of the template's headings."""
    names = {
        "usage_percent": "{:.1f}%",
        "top1_usage_percent": "{:.1f}%",
        "dead_experts": "{:,.0f}",
        "unevenness": "{:.3f}",
        "unevenness_if_uniform": "{:.3f}",
        "picks_per_expert": "{:,.1f}",
        "picks_per_shard_max_over_mean": "{:.2f}",
    }
    for layer in run.layers:
        yield [str(layer), *(_last(f"experts/layer{layer}_{name}", form)(run) for name, form in names.items())]


def _differing(runs: Sequence[RunRecord]) -> dict[str, list[str]]:
    """Keys of the config whose values differ between runs, with the value in each; folders and logs left out."""
    trees = [
        {f"{section}.{key}": str(value) for section, keys in run.config.items() for key, value in keys.items()}
        for run in runs
    ]
    keys = [key for key in dict.fromkeys(key for tree in trees for key in tree) if not key.startswith(_FOLDERS)]
    values = {key: [tree.get(key, "–") for tree in trees] for key in keys}
    known = [place for place, tree in enumerate(trees) if tree]  # runs of older versions have no config
    return {key: of_runs for key, of_runs in values.items() if len({of_runs[place] for place in known}) > 1}


_FOLDERS = ("checkpoint.", "logging.")


def _events(run: RunRecord) -> list[tuple[str, str, str]]:
    """Time, step and what happened, in the order of steps; checkpoints are left out: they have a line of their own."""
    entries: list[tuple[int, str, str]] = []
    for number, event in enumerate(run.events):
        kind, step = event["event"], event["step"]
        text = f"{kind}: {event['told']}" if "told" in event else kind
        if kind == "start":
            ranks = event["environment"]["layout"].get("ranks", "?")
            before = run.events[number - 1]["event"] if number else ""
            text = f"began, {ranks} rank(s)"
            if number:
                lost = "" if before in ("done", "stopped by a signal") else " after it had been cut off"
                text = f"went on{lost}, {ranks} rank(s)"
        if kind != "checkpoint":
            entries.append((step, f"{time_of(event):%d %b %H:%M:%S}", text))
    for name, why in _SKIPPED.items():
        points = run.series(name)
        grows = np.flatnonzero(np.diff(points.value, prepend=0.0) > 0)
        entries += [(int(points.step[place]), "", f"step left out: {why}") for place in grows]
    # events of one step stay in their order
    return [(when, f"{step:,}", text) for step, when, text in sorted(entries, key=lambda entry: entry[0])][-_EVENTS:]


def _count(value: float) -> str:
    """17600000 as 17.6M."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.0f}"


def _bytes(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
