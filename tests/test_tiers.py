"""Runs whose tables lie in host memory or on a disk, or have eight bits, from the config to what is made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.runs import make_trainer, small_config, with_keys

STEPS = 10
ROW = 2 * 32 * 4 / 1e9  # GB of a row of both tables of the small model


@pytest.fixture
def small(text: Path, tmp_path: Path) -> dict[str, Any]:
    tree = with_keys(small_config(text, tmp_path), model={"num_layers": 2, "mlp": "peer"})
    return with_keys(tree, peer={"table_folder": str(tmp_path)}, table_optimizer={"lazy": True}, zero={"stage": 0})


def on(tree: dict[str, Any], memory: str, rows: float = 1e6) -> dict[str, Any]:
    """The run with its tables in this memory, with room for about so many rows' weights near the kernels."""
    return with_keys(tree, peer={"table_memory": memory, "table_cache_gb": rows * ROW})


def each(
    rank: int, world_size: int, trees: list[dict[str, Any]], steps: int
) -> list[tuple[list[float], list[float], float]]:
    """Losses, gradient norms and the held-out loss after some steps of each run, one after the other."""
    results = []
    for tree in trees:
        trainer = make_trainer(tree)
        values = [trainer.step() for _ in range(steps)]
        held_out = trainer.validate()["val/loss"]
        results.append(([v["train/loss"] for v in values], [v["optimizer/grad_norm"] for v in values], held_out))
        trainer.parallel.destroy()
    return results


SETTINGS: dict[str, tuple[int, dict[str, Any]]] = {
    "adam": (1, {}),
    "rowwise_adam": (1, {"table_optimizer": {"name": "rowwise_adam"}}),
    "rowwise_adagrad": (1, {"table_optimizer": {"name": "rowwise_adagrad"}}),
    "one_pass": (1, {"train": {"global_batch_size": 2}, "zero": {"stage": 1}}),
    "recomputed": (1, {"train": {"recompute_layers": 2}}),
    "shared": (1, {"peer": {"layers_per_pool": 2}}),
    "bfloat16": (
        1,
        {
            "train": {"precision": "bf16"},
            "peer": {"table_dtype": "bfloat16"},
            "table_optimizer": {"stochastic_rounding": True},
        },
    ),
    "masters": (1, {"train": {"precision": "bf16"}, "peer": {"table_dtype": "bfloat16"}}),
    "int8": (1, {"peer": {"table_dtype": "int8"}, "table_optimizer": {"stochastic_rounding": True}}),
    "values": (1, {"model": {"mlp": "pkm"}}),
    "rows": (2, {"parallel": {"expert": 2}, "zero": {"stage": 1}}),
    "columns": (2, {"parallel": {"expert_tensor": 2}, "table_optimizer": {"name": "rowwise_adam"}}),
    "copies": (2, {"parallel": {"expert": 1}}),
    "stages": (2, {"parallel": {"pipeline": 2}, "table_optimizer": {"name": "rowwise_adagrad"}}),
    "float8_e4m3": (
        2,
        {
            "parallel": {"expert_tensor": 2},
            "peer": {"table_dtype": "float8_e4m3"},
            "table_optimizer": {"stochastic_rounding": True, "name": "rowwise_adagrad"},
        },
    ),
    "values of ranks": (2, {"model": {"mlp": "pkm"}, "parallel": {"expert": 2}}),
    "grid": (4, {"parallel": {"expert": 2, "expert_tensor": 2}, "peer": {"dispatch_chunks": 2}}),
    "rows and copies": (4, {"parallel": {"expert": 2}, "train": {"recompute_layers": 1}}),
}


PLACES = [[("host", 0), ("disk", 400)], [("host", 200), ("disk", 1e6)]]


def as_values(tree: dict[str, Any]) -> dict[str, Any]:
    """The run with the keys of its PEER layers for its memories of values, if it has some."""
    if tree["model"]["mlp"] != "pkm":
        return tree
    places = {key: value for key, value in tree["peer"].items() if key.startswith("table_")}
    return with_keys(tree, pkm={"num_values": 225, "heads": 2, "top_k": 4, "key_dim": 8, **places})


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_losses_do_not_depend_on_where_tables_lie(small: dict[str, Any], ranks: int) -> None:
    """Bit for bit: on the device, in host memory and on a disk, with caches of no row, of some and of all."""
    runs: dict[tuple[str, str], dict[str, Any]] = {}
    for name, (of_ranks, settings) in SETTINGS.items():
        if of_ranks == ranks:
            tree = with_keys(small, **settings)
            runs[name, "device"] = as_values(tree)
            for memory, rows in PLACES[len(runs) // 3 % 2]:
                runs[name, f"{memory} with {rows}"] = as_values(on(tree, memory, rows))
    for rank in run_ranks(each, ranks, list(runs.values()), STEPS):
        results = dict(zip(runs, rank, strict=True))
        for (name, place), result in results.items():
            wanted = results[name, "device"]
            assert wanted[0][-1] < wanted[0][0] - 0.1, f"{name} learns"
            assert result == wanted, f"{name}, {place}"
