"""How many of the rows that a training model picks are in a cache of the hottest ones, by the size of that cache.

    python benchmarks/hit_rate.py [--steps N] [--recorded N] [--picks FILE.npz] [--json FILE] [--plot FILE.png]
        [section.key=value ...]

Trains the model of configs/quickstart.yaml on one rank and records which rows each pass of its last steps picks; with
checkpoint.dir=FOLDER a run goes on from its newest checkpoint. These picks are then replayed through the policy of the
cache of far tables, from an empty cache; the second half of the steps counts. A row that a pass picks several times is
fetched once, so that the share of distinct rows is what counts; the share of picks is drawn beside it. They are
compared with the best rows in hindsight, which a cache would have to know from the start and never change, and with
Zipf's law, whose exponent is fitted to the shares of distinct rows: it is what `peer-dist plan --zipf` takes.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.distributed as dist
from measure import device_name, show, write_json

from peer_dist.config import load_config
from peer_dist.data.prepare import prepare
from peer_dist.kernels.far.hot import Hot
from peer_dist.planning.hit_rate import distinct, share_of_picks

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
PARTS = (64, 32, 16, 8, 4, 2, 1)
"""Sizes of the cache, as parts of the rows."""
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Pass:
    """What one forward pass of a layer picked: its distinct rows, ascending, and how often each; int64 ``[n]``."""

    step: int
    rows: np.ndarray
    counts: np.ndarray


def record(steps: int, recorded: int, overrides: list[str]) -> tuple[int, list[Pass]]:
    """Train, and record the passes of the first layer with experts; the number of its rows, and the passes."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        from peer_dist.training import Trainer

        own = ["parallel.expert=1", f"checkpoint.dir={folder}/checkpoints"]
        own += [f"data.prefix={folder}/text", f"logging.dir={folder}/logs", f"train.steps={steps}"]
        prepare(None, Path(folder, "text"))
        trainer = Trainer(load_config(CONFIG, [*own, *overrides]))
        layer = min(trainer.layers)
        passes: list[Pass] = []
        steps_before = trainer.steps_done + steps - recorded
        observe = trainer.route_observer

        def observer(number: int) -> Any:
            seen = observe(number)

            def both(indices: torch.Tensor, gates: torch.Tensor) -> None:
                seen(indices, gates)
                if number == layer and trainer.steps_done >= steps_before:
                    rows, counts = np.unique(indices.numpy(), return_counts=True)
                    passes.append(Pass(trainer.steps_done, rows, counts))

            return both

        trainer.route_observer = observer  # type: ignore[method-assign]
        for _ in range(steps):
            values = trainer.step()
        print(f"step {trainer.steps_done}: loss {values['train/loss']:.3f}")
        experts = trainer.layers[layer].num_experts
        dist.destroy_process_group()
    return experts, passes


def replayed(experts: int, passes: list[Pass], capacity: int) -> tuple[float, float]:
    """Shares of distinct rows and of picks that the cache had, in the second half of the steps."""
    hot = Hot(experts, capacity, CPU)
    first = (passes[0].step + passes[-1].step + 1) // 2
    hits, rows, hit_picks, picks = 0, 0, 0, 0
    step: list[Pass] = []
    for each in passes:
        if step and each.step != step[-1].step:
            hot.step(torch.from_numpy(np.unique(np.concatenate([one.rows for one in step]))))
            step = []
        step.append(each)
        if each.step >= first:
            near = hot.slots(torch.from_numpy(each.rows)).numpy() >= 0
            hits, rows = hits + int(near.sum()), rows + len(near)
            hit_picks, picks = hit_picks + int(each.counts[near].sum()), picks + int(each.counts.sum())
    return hits / rows, hit_picks / picks


def best(experts: int, passes: list[Pass], capacity: int) -> tuple[float, float]:
    """The same of the rows that most passes picked, and of those with most picks, all of them there from the start."""
    first = (passes[0].step + passes[-1].step + 1) // 2
    counted = [each for each in passes if each.step >= first]
    times, picks = (np.zeros(experts, dtype=np.int64) for _ in range(2))
    for each in counted:
        times[each.rows] += 1
        picks[each.rows] += each.counts
    return tuple(np.sort(number)[::-1][:capacity].sum() / number.sum() for number in (times, picks))  # type: ignore[return-value]


def fitted(experts: int, picks: float, sizes: list[int], measured: list[float]) -> float:
    """The exponent whose shares of distinct rows are nearest to the measured ones, by least squares."""
    exponents = np.arange(0.0, 3.0, 0.01)
    errors = [
        sum((distinct(experts, picks, size, s).hit_rate - share) ** 2 for size, share in zip(sizes, measured))
        for s in exponents
    ]
    return round(float(exponents[int(np.argmin(errors))]), 2)


def draw(path: Path, results: dict[str, Any]) -> None:
    """Shares of distinct rows, and of picks, against the size of the cache."""
    figure, panels = plt.subplots(1, 2, figsize=(8.4, 3.4), layout="constrained", sharey=True)
    looks = {
        "cache": ("cache, replayed", {"color": "C0", "marker": "o"}),
        "best": ("best rows in hindsight", {"color": "C7", "marker": "s"}),
        "zipf": (f"Zipf's law, exponent {results['zipf']:.2f}", {"color": "C1", "linestyle": "--"}),
        "uniform": ("uniform picks", {"color": "C7", "linestyle": ":"}),
    }
    rows = results["rows"]
    for panel, of in zip(panels, ("distinct", "picks")):
        for name, (label, style) in looks.items():
            panel.plot([row["size"] for row in rows], [100 * row[f"{name}_{of}"] for row in rows], label=label, **style)
        panel.set_xscale("log", base=2)
        panel.minorticks_off()
        panel.set_xticks([row["size"] for row in rows], [f"1/{part}" if part > 1 else "1" for part in PARTS])
        panel.set(
            xlabel="cache, part of the rows", title=f"of {'distinct rows of a pass' if of == 'distinct' else 'picks'}"
        )
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("in the cache, %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Record, replay and show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="to train")
    parser.add_argument("--recorded", type=int, default=200, help="of them, the last ones, whose picks are replayed")
    parser.add_argument("--picks", type=Path, help="file of the picks: written, or if it is there replayed")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args()
    if options.picks and options.picks.exists():
        with np.load(options.picks) as stored:
            experts, ends = int(stored["experts"]), np.cumsum(stored["sizes"])[:-1]
            parts = zip(stored["steps"], np.split(stored["rows"], ends), np.split(stored["counts"], ends))
            passes = [Pass(int(step), rows.astype(np.int64), counts.astype(np.int64)) for step, rows, counts in parts]
    else:
        experts, passes = record(options.steps, options.recorded, options.overrides)
        if options.picks:
            np.savez_compressed(
                options.picks,
                experts=experts,
                steps=np.array([each.step for each in passes]),
                sizes=np.array([len(each.rows) for each in passes]),
                rows=np.concatenate([each.rows for each in passes]).astype(np.int32),
                counts=np.concatenate([each.counts for each in passes]).astype(np.int32),
            )
    sizes = [experts // part for part in PARTS]
    caches = [replayed(experts, passes, size) for size in sizes]
    picks = float(np.mean([each.counts.sum() for each in passes]))
    zipf = fitted(experts, picks, sizes, [share for share, _ in caches])
    rows = []
    for size, (cache_distinct, cache_picks) in zip(sizes, caches):
        best_distinct, best_picks = best(experts, passes, size)
        rows.append(
            {
                "size": size,
                "cache_distinct": cache_distinct,
                "best_distinct": float(best_distinct),
                "zipf_distinct": distinct(experts, picks, size, zipf).hit_rate,
                "uniform_distinct": size / experts,
                "cache_picks": cache_picks,
                "best_picks": float(best_picks),
                "zipf_picks": share_of_picks(experts, size, zipf),
                "uniform_picks": size / experts,
            }
        )
    results = {
        "device": device_name(CPU),
        "torch": torch.__version__,
        "experts": experts,
        "passes": len(passes),
        "steps": [passes[0].step, passes[-1].step],
        "picks_of_a_pass": picks,
        "distinct_of_a_pass": float(np.mean([len(each.rows) for each in passes])),
        "zipf_distinct_of_a_pass": distinct(experts, picks, 0, zipf).rows,
        "zipf": zipf,
        "rows": rows,
    }
    show(f"{experts:,} rows; Zipf exponent {zipf:.2f}", rows)
    write_json(options.json, results)
    if options.plot:
        draw(options.plot, results)


if __name__ == "__main__":
    main()
