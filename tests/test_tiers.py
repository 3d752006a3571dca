"""Runs whose tables lie in host memory or on a disk, or have eight bits, from the config to what is made of them."""

from __future__ import annotations

import json
import math
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from peer_dist.config import parse_config
from peer_dist.kernels.disk import FolderError
from peer_dist.shortage import shortage
from peer_dist.training.readiness import check_ready
from tests.ranks import run_command, run_ranks
from tests.runs import (
    in_folder,
    losses_of,
    make_trainer,
    metrics_of,
    run_to_the_end,
    small_config,
    with_keys,
)

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


PLACES = [("host", 0), ("disk", 400), ("host", 200), ("disk", 1e6)]


def as_values(tree: dict[str, Any]) -> dict[str, Any]:
    """The run with the keys of its PEER layers for its memories of values, if it has some."""
    if tree["model"]["mlp"] != "pkm":
        return tree
    places = {key: value for key, value in tree["peer"].items() if key.startswith("table_")}
    return with_keys(tree, pkm={"num_values": 225, "heads": 2, "top_k": 4, "key_dim": 8, **places})


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["one each", "every"])
def test_losses_do_not_depend_on_where_tables_lie(small: dict[str, Any], ranks: int, every: bool) -> None:
    """Bit for bit: on the device, in host memory and on a disk, with caches of no row, of some and of all."""
    runs: dict[tuple[str, str], dict[str, Any]] = {}
    for number, (name, (of_ranks, settings)) in enumerate(SETTINGS.items()):
        if of_ranks == ranks:
            tree = with_keys(small, **settings)
            runs[name, "device"] = as_values(tree)
            for memory, rows in PLACES if every else [PLACES[number % len(PLACES)]]:
                runs[name, f"{memory} with {rows}"] = as_values(on(tree, memory, rows))
    for rank in run_ranks(each, ranks, list(runs.values()), STEPS, timeout=400):
        results = dict(zip(runs, rank, strict=True))
        for (name, place), result in results.items():
            wanted = results[name, "device"]
            assert wanted[0][-1] < wanted[0][0] - 0.1, f"{name} learns"
            assert result == wanted, f"{name}, {place}"


def in_turn(
    rank: int, world_size: int, trees: list[dict[str, Any]], steps: list[int]
) -> tuple[list[float], list[dict[str, tuple[tuple[int, int], Any]]]]:
    """Losses of runs of which each goes on from the checkpoint of the one before, and this rank's tables after each."""
    from peer_dist.megatron import shards_of
    from peer_dist.sharding.held import flush, read_values

    losses, tables = [], []
    for tree, count in zip(trees, steps, strict=True):
        trainer = make_trainer(tree)
        losses += [trainer.step()["train/loss"] for _ in range(count)]
        if count:
            trainer.save()
        blocks = {}
        for name, shard in shards_of(trainer.model).items():
            flush(shard.parameter)
            blocks[name] = (shard.offset, read_values(shard.parameter, slice(None)).float().clone().numpy())
        tables.append(blocks)
        trainer.parallel.destroy()
    return losses, tables


ROUNDED = {"train": {"precision": "bf16"}, "table_optimizer": {"stochastic_rounding": True, "name": "rowwise_adam"}}
RESUMED: dict[str, tuple[int, dict[str, Any]]] = {
    "float32": (1, {"zero": {"stage": 1}}),
    "bfloat16": (2, {**ROUNDED, "peer": {"table_dtype": "bfloat16"}, "parallel": {"expert": 2}}),
    "int8": (2, {**ROUNDED, "peer": {"table_dtype": "int8"}, "parallel": {"expert_tensor": 2}}),
    "float8_e4m3": (1, {**ROUNDED, "peer": {"table_dtype": "float8_e4m3", "layers_per_pool": 2}}),
}


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_on_other_tiers_bit_for_bit(small: dict[str, Any], tmp_path: Path, name: str) -> None:
    """From the device to host memory, to a disk and back, two steps each, some rows near the kernels."""
    ranks, settings = RESUMED[name]
    small = with_keys(small, **settings)
    whole = in_folder(small, tmp_path / "whole")
    turns = [small, on(small, "host", 300), on(small, "disk", 0), small]
    wanted, _ = run_ranks(in_turn, ranks, [whole], [8])[0]
    for losses, _ in run_ranks(in_turn, ranks, turns, [2, 2, 2, 2]):
        assert losses == wanted


def test_eight_bits_in_other_layouts(small: dict[str, Any]) -> None:
    """The values of tables are the same however their rows are spread, and training goes on from them."""
    small = with_keys(small, peer={"table_dtype": "float8_e4m3"}, table_optimizer={"stochastic_rounding": True})
    rows, host = with_keys(small, parallel={"expert": 2}), on(small, "host", 100)
    ranks = run_ranks(in_turn, 2, [rows, with_keys(host, parallel={"expert": 1}), rows], [3, 0, 0])
    _, (last,) = run_ranks(in_turn, 1, [host], [0])[0]
    for name, (_, table) in last.items():
        for run in range(3):
            for _, tables in ranks:
                (row, column), block = tables[run][name]
                assert (block == table[row : row + len(block), column : column + block.shape[1]]).all(), (name, run)


def test_killed_and_resumed_on_another_tier(small: dict[str, Any], tmp_path: Path) -> None:
    """Rank 1 dies in step 7; another tier goes on from step 4 as if nothing had happened, and no file is left."""
    from peer_dist.megatron.reader import StoredTensors

    small = with_keys(small, parallel={"expert": 2})
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    quiet = in_folder(small, tmp_path / "quiet")
    run_ranks(run_to_the_end, 2, quiet)
    there = with_keys(on(small, "disk", 200), peer={"table_folder": str(scratch)})
    with pytest.raises(AssertionError, match="rank 1 of 2 died"):
        run_ranks(run_to_the_end, 2, there, 7)
    assert list(scratch.iterdir()) == []
    asynchronous = with_keys(on(small, "host", 200), checkpoint={"asynchronous": True})
    run_ranks(run_to_the_end, 2, asynchronous)
    assert losses_of(small) == losses_of(quiet)
    numbers = metrics_of(small)[-1]
    assert 0 < numbers["tables/cache_hit_rate"] < 1
    assert numbers["tables/far_read_bytes_per_token"] > 0
    assert numbers["tables/far_written_bytes_per_token"] > 0
    assert numbers["memory/far_gb"] > 0
    assert not any(name.startswith("tables/") for name in metrics_of(quiet)[-1])
    name = "step-00000010"
    saved, wanted = (StoredTensors(Path(tree["checkpoint"]["dir"]) / name) for tree in (small, quiet))
    assert saved.shapes == wanted.shapes
    for key in saved.shapes:
        assert all(map(torch.equal, saved.rows(key, 1 << 20), wanted.rows(key, 1 << 20))), key


@pytest.mark.parametrize(
    ("memory", "dtype"), [("host", "float32"), ("disk", "bfloat16"), ("device", "int8"), ("disk", "float8_e4m3")]
)
def test_what_is_made_of_a_run(small: dict[str, Any], tmp_path: Path, memory: str, dtype: str) -> None:
    """Its checkpoint is evaluated, generates text and is exported, where its scratch folder no longer is; another run
    begins from its weights.
    """
    rounding = {"stochastic_rounding": dtype != "float32", "lazy": True}
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    own = {"table_dtype": dtype, "table_folder": str(scratch)}
    tree = with_keys(on(small, memory, 100), peer=own, table_optimizer=rounding)
    run_ranks(run_to_the_end, 1, with_keys(tree, train={"steps": 4}, evaluation={"interval": 4}))
    scratch.rmdir()
    folder = tree["checkpoint"]["dir"]
    report = run_command("evaluate", "--checkpoint", folder, "--json")
    assert report.returncode == 0, report.stderr
    report = json.loads(report.stdout)
    assert report["loss"] > 0
    text = run_command("generate", "--checkpoint", folder, "--prompt", "a", "--tokens", "3")
    assert text.returncode == 0, text.stderr
    made = run_command("export", "--checkpoint", folder, "--output", str(tmp_path / "exported"))
    assert made.returncode == 0, made.stderr
    assert "table_folder" not in (tmp_path / "exported" / "config.json").read_text()
    begun = with_keys(in_folder(small, tmp_path / "begun"), checkpoint={"init_from": folder})
    (values,) = run_ranks(each, 1, [begun], 0)
    assert values[0][2] == pytest.approx(metrics_of(tree)[-1]["val/loss"], rel=1e-5)


def test_folders_of_scratch_files(small: dict[str, Any], tmp_path: Path) -> None:
    """What cannot hold the tables of this machine's ranks is refused in a sentence, before anything is started."""
    config = tmp_path / "run.yaml"
    for keys, said in (
        ({"table_folder": str(tmp_path / "nowhere")}, "nowhere does not exist"),
        ({"table_folder": "/dev/shm"}, "/dev/shm is in memory (tmpfs"),
        ({"table_folder": str(tmp_path / "run.yaml" / "within")}, "within does not exist"),
        ({"num_experts": (1 << 18) ** 2}, "free"),
    ):
        config.write_text(yaml.safe_dump(with_keys(on(small, "disk"), peer=keys)))
        ended = run_command("train", "--config", str(config))
        assert ended.returncode == 2
        assert said in " ".join(ended.stderr.split()), ended.stderr
        assert "Traceback" not in ended.stderr


def test_a_disk_has_room_for_the_tables_of_all_kinds(small: dict[str, Any], tmp_path: Path) -> None:
    """Also where each kind has a folder of its own on it; the sentence names the kind's key."""
    (tmp_path / "other").mkdir()
    free = shutil.disk_usage(tmp_path).free

    def placed(folder: str, key: str, tables: int) -> dict[str, Any]:
        """Keys with which a layer's tables and their two moments take 0.6 of what is free."""
        rows = math.isqrt(int(0.6 * free / (3 * 4 * 32 * tables))) ** 2
        return {"table_memory": "disk", "table_folder": str(tmp_path / folder), key: rows}

    alone = with_keys(small, model={"mlp": ["peer", "dense"]}, peer=placed(".", "num_experts", 2))
    check_ready(parse_config(alone, "test"), 1)
    both = with_keys(alone, model={"mlp": ["peer", "pkm"]}, pkm=placed("other", "num_values", 1))
    with pytest.raises(FolderError, match=r"GB free, the tables need .* in peer\.table_folder"):
        check_ready(parse_config(both, "test"), 1)
    values = with_keys(both, model={"mlp": ["dense", "pkm"]}, pkm={"table_folder": str(tmp_path / "nowhere")})
    with pytest.raises(FolderError, match=r"nowhere does not exist; .* in pkm\.table_folder"):
        check_ready(parse_config(values, "test"), 1)


def limited(rank: int, world_size: int, tree: dict[str, Any]) -> str:
    """What is said of a run whose scratch files are larger than this process's files may be."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, resource.RLIM_INFINITY))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        make_trainer(tree)
    except OSError as error:
        return str(shortage(error))
    return ""


def test_what_a_disk_has_too_little_of_is_named_with_its_limit(small: dict[str, Any], tmp_path: Path) -> None:
    """Also where Megatron-core, which was making the layer, says it again in words of its own."""
    (said,) = run_ranks(limited, 1, with_keys(on(small, "disk"), peer={"num_experts": 16384}))
    assert said == f"{tmp_path}: a file may not be larger than ulimit -f allows (0.5 MB); raise it"
