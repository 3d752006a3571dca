"""Seconds per training step of a sweep's models, as ratios to the first of them: all take turns in one process.

    python benchmarks/steps.py configs/sweeps/routers.yaml [--json FILE]

Of every model, variant and size the run of the first seed is built and takes whole steps (data, forward, backward,
optimizer) on a rank alone, by ZeRO-0, whose step has no buckets and partitions beside what models need. Beside them:
FLOPs per token of a training step, the most memory that a step takes beyond what is held between steps, and what the
tables and the states of their optimizer take. ``--processor-time`` counts that instead of the time that passes, for
machines that others use too.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measure import device_name, extra_bytes, seconds, show, write_json

from peer_dist.ranks.world import World
from peer_dist.sweep.runner import select
from peer_dist.sweep.spec import load_sweep
from peer_dist.training.trainer import Trainer


def main() -> None:
    """Measure what the command line asks for, and show it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--only", action="append", help="a run, model, size or variant, with * and ?; repeatable")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--processor-time", action="store_true", help="of all threads of this process")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, World(0, 1, 0, 1).joined():
        from megatron.core import parallel_state

        sweep = load_sweep(options.sweep, folder)
        runs = [run for run in select(sweep, options.only or []) if run.trial is None]
        runs = [run for run in runs if run.seed == sweep.file.seeds[0]]
        trainers: dict[str, Trainer] = {}
        for run in runs:
            parallel_state.destroy_model_parallel()  # forgets Megatron's set of groups; trainers have theirs
            zero = run.config.zero.model_copy(update={"stage": 0})
            trainers[run.name] = Trainer(run.config.model_copy(update={"zero": zero}))
        device = next(iter(trainers.values())).parallel.device
        extra = {name: extra_bytes(trainer.step, device) for name, trainer in trainers.items()}
        clock = time.process_time if options.processor_time else time.perf_counter
        steps = {name: trainer.step for name, trainer in trainers.items()}
        taken = seconds(steps, device, options.rounds, clock=clock)
        tables = {name: trainer.engine.memory()["tables"] for name, trainer in trainers.items()}
    first = runs[0]
    rows: list[dict[str, Any]] = [
        {
            "run": run.name,
            "ms_per_step": 1e3 * taken[run.name],
            "ratio": taken[run.name] / taken[first.name],
            "tables_MB": tables[run.name].weights / 1e6,
            "table_states_MB": tables[run.name].optimizer / 1e6,
            "FLOPs_per_token": run.cost.train_flops_per_token,
            "extra_MB": extra[run.name] / 1e6,
            "extra_ratio": extra[run.name] / extra[first.name],
            "FLOPs_ratio": run.cost.train_flops_per_token / first.cost.train_flops_per_token,
            "parameters": run.cost.total.parameters,
        }
        for run in runs
    ]
    kind = ", processor time" if options.processor_time else ""
    title = f"Training steps on {device_name(device)}{kind}: {options.sweep}"
    show(title, rows)
    write_json(options.json, {"title": title, "torch": torch.__version__, "rows": rows})


if __name__ == "__main__":
    main()
