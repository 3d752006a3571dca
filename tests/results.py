"""Rows of a sweep's results, made up."""

import math

import numpy as np

from peer_dist.sweep.results import Row

SIZES = [1e6, 2e6, 4e6, 8e6, 16e6]


def make_row(**values):
    known = dict.fromkeys(Row.model_fields)
    known |= {"run": "r", "status": "done", "model": "m", "variant": "", "size": "", "seed": 1, "lr": 1, "table_lr": 1}
    known |= {"parameters": 1, "active_parameters": 1, "train_flops_per_token": 1, "tokens": 1, "steps": 1}
    return Row(**{**known, "train_seconds": 1, "tokens_per_second": 1, **values})


def losses_around(best, seeds=(1, 2, 3), noise=0.0, rng=None):
    """Of a parabola with its minimum 2.0 at ``best``; a seed shifts the whole curve by a tenth of its number."""
    points = [(size, seed) for size in SIZES for seed in seeds]
    exact = [2 + 0.1 * (seed - 2) + 0.05 * math.log(size / best) ** 2 for size, seed in points]
    drawn = np.zeros(len(points)) if rng is None else rng.normal(0, noise, len(points))
    return [size for size, _ in points], [seed for _, seed in points], list(exact + drawn)


def result_rows():
    """Two models at two budgets: b is better by 0.1 at 1e12 and by as much as the seed at 2e12, in tenths."""
    rows = []
    for budget, best in ((1e12, 3e6), (2e12, 40e6)):
        for model in ("a", "b"):
            for size, seed, loss in zip(*losses_around(best)):
                gain = 0.1 * (1 if budget == 1e12 else seed) if model == "b" else 0.0
                values = {"model": model, "budget": budget, "size": f"{size:g}", "seed": seed, "val_loss": loss - gain}
                rows.append(make_row(train_flops_per_token=size, **values))
    return rows
