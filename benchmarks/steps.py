"""Seconds per training step of a sweep's models, as ratios to the first of them: all take turns in one process.

    python benchmarks/steps.py configs/sweeps/routers.yaml [--json FILE]

Of every model, variant and size the run of the first seed is built and takes whole steps (data, forward, backward,
optimizer) on a rank alone. FLOPs per token are those of a training step, beside them as ratios too.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from measure import device_name, seconds, show, write_json

from peer_dist.sweep.spec import load_sweep
from peer_dist.training.trainer import Trainer
from peer_dist.training.world import World


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, World(0, 1, 0, 1).joined():
        sweep = load_sweep(options.sweep, folder)
        runs = [run for run in sweep.runs if run.trial is None and run.seed == sweep.file.seeds[0]]
        trainers: dict[str, Trainer] = {}
        for run in runs:
            for trainer in trainers.values():
                trainer.parallel.destroy()  # Megatron's groups are one set a process; of one rank, all are alike
            trainers[run.name] = Trainer(run.config)
        device = next(iter(trainers.values())).parallel.device
        taken = seconds({name: trainer.step for name, trainer in trainers.items()}, device, options.rounds)
    first = runs[0]
    rows: list[dict[str, Any]] = [
        {
            "run": run.name,
            "ms_per_step": 1e3 * taken[run.name],
            "ratio": taken[run.name] / taken[first.name],
            "FLOPs_per_token": run.cost.train_flops_per_token,
            "FLOPs_ratio": run.cost.train_flops_per_token / first.cost.train_flops_per_token,
            "parameters": run.cost.total.parameters,
        }
        for run in runs
    ]
    title = f"Training steps on {device_name(device)}: {options.sweep}"
    show(title, rows)
    write_json(options.json, {"title": title, "torch": torch.__version__, "rows": rows})


if __name__ == "__main__":
    main()
