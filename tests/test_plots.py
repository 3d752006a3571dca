"""peer-dist plot: which figures come of what, opened as PNG and SVG, with the words that a reader needs."""

import json
import os
import xml.etree.ElementTree as ElementTree
import zipfile
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from peer_dist.config import ConfigError
from peer_dist.plots.command import plot, tables
from peer_dist.sweep.results import write_results
from tests.ranks import run_command
from tests.results import make_row, result_rows

SIZE = "train_flops_per_token"


def words(path):
    """What an SVG says."""
    return " ".join("".join(node.itertext()) for node in ElementTree.parse(path).iter() if node.tag.endswith("text"))


def drawn(tmp_path, rows, kinds=()):
    write_results(tmp_path / "results.csv", rows)
    paths = plot([tmp_path], tmp_path / "figures", kinds, SIZE)
    assert all(path.stat().st_size for path in paths)
    return [path.name for path in paths]


def test_isoflop_curves(tmp_path):
    assert drawn(tmp_path, result_rows()) == ["isoflop.png", "isoflop.svg"]
    image = imread(tmp_path / "figures" / "isoflop.png")
    assert image.shape == (810, 1560, 4), "two panels of 2.6 x 2.7 inches at 300 dpi"
    assert image[..., :3].std() > 0.05, "something is drawn"
    said = words(tmp_path / "figures" / "isoflop.svg")
    for word in (
        "10¹² FLOPs",
        "2·10¹² FLOPs",
        "training FLOPs per token",
        "nats per token",
        "fitted minimum",
        "a",
        "b",
    ):
        assert word in said
    told = [cell for table in tables(result_rows(), SIZE) for column in table.columns for cell in column.cells]
    assert "above the sizes tried: extrapolated" in told


def ablation_rows():
    """Four numbers of experts with one number of picks, and three numbers of picks with one of experts."""
    common = {"model": "peer", "heads": 8, "usage_percent": 99.0, "unevenness": 0.5, "val_loss": 2.0}
    rows = []
    for seed in (1, 2, 3):
        for experts in (128**2, 256**2, 512**2, 1024**2):
            rows.append(make_row(**common, seed=seed, variant=f"n{experts}", num_experts=experts, active_experts=128))
        for picks in (32, 512):
            rows.append(make_row(**common, seed=seed, variant=f"p{picks}", num_experts=1024**2, active_experts=picks))
    return rows


def test_ablations(tmp_path):
    rows = ablation_rows()
    assert drawn(tmp_path, rows) == ["models.png", "models.svg", "experts.png", "experts.svg", "hk.png", "hk.svg"]
    said = words(tmp_path / "figures" / "experts.svg")
    assert all(word in said for word in ("128²", "1024²", "experts N", "unevenness (nats)", "experts used (%)", "peer"))
    said = words(tmp_path / "figures" / "hk.svg")
    assert all(word in said for word in ("32", "128", "512", "experts per token h·k", "held-out loss"))


def run_folder(folder, validations, tokens=256):
    """The metrics of a run of 40 steps of a quarter second."""
    folder.mkdir()
    lines = [{"step": 0, "val/loss": 5.0}]
    for step in range(1, 41):
        line = {"step": step, "train/loss": 4 / step, "time/step": 0.25, "speed/tokens_per_second": tokens / 0.25}
        lines.append(line | ({"val/loss": 5 / step} if step % (40 // validations) == 0 else {}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_losses_of_runs(tmp_path):
    for name in ("peer-s1", "peer-s2", "dense-s1"):
        run_folder(tmp_path / name, validations=10)
    runs = sorted(path for path in tmp_path.iterdir() if path.is_dir())
    names = [path.name for path in plot(runs, tmp_path / "figures", [], SIZE)]
    assert names == ["loss-time.png", "loss-time.svg", "loss-tokens.png", "loss-tokens.svg"]
    assert imread(tmp_path / "figures" / "loss-time.png").shape == (810, 1020, 4), "a column wide"
    said = words(tmp_path / "figures" / "loss-time.svg")
    assert all(word in said for word in ("training time (s)", "held-out loss", "peer", "dense", "10"))
    assert "peer-s1" not in said, "seeds are one line"
    run_folder(tmp_path / "short", validations=1)
    plot([tmp_path / "short"], tmp_path / "figures", ["loss"], SIZE)
    assert "training loss" in words(tmp_path / "figures" / "loss-tokens.svg")


def test_usage_of_experts(tmp_path):
    mass = np.random.default_rng(0).gamma(1.0, size=4096)
    mass[:1024] = 0
    np.savez(tmp_path / "usage.npz", mass_layer2=mass, counts_layer2=mass)
    paths = plot([tmp_path / "usage.npz"], tmp_path / "figures", [], SIZE)
    assert [path.name for path in paths] == ["usage.png", "usage.svg"]
    said = words(tmp_path / "figures" / "usage.svg")
    assert "layer 2: 4,096 experts, 25.0% unused" in said
    assert "rank of the expert" in said


def test_models_are_compared_after_equal_tokens(tmp_path):
    rows = [row.model_copy(update={"budget": None}) for row in result_rows()]
    rows = [row for row in rows if row.size == rows[0].size]
    assert drawn(tmp_path, rows, ["models"]) == ["models.png", "models.svg"]
    said = words(tmp_path / "figures" / "models.svg")
    assert all(row.label in said for row in rows)
    assert "held-out loss" in said
    with pytest.raises(ConfigError, match="has nothing for models; "):
        drawn(tmp_path, rows[:1], ["models"])


def test_what_cannot_be_drawn_is_one_sentence(tmp_path):
    np.savez(tmp_path / "other.npz", counts=np.ones(3))
    for inputs, kinds, against, sentence in (
        ([tmp_path], [], SIZE, "is no results.csv, no folder with one"),
        ([tmp_path / "other.npz"], [], SIZE, "has no array mass_layer<N>"),
        ([tmp_path], ["bars"], SIZE, "--kind: 'bars' is not known; isoflop, models, loss, experts, hk, usage"),
        ([tmp_path], [], "size", "--against: 'size' is not known"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            plot(inputs, tmp_path / "figures", kinds, against)
    with pytest.raises(ConfigError, match="has nothing for hk; "):
        drawn(tmp_path, result_rows(), ["isoflop", "hk"])
    assert not (tmp_path / "figures").exists()


def test_the_command(tmp_path):
    write_results(tmp_path / "results.csv", result_rows())
    done = run_command("plot", str(tmp_path), "--output", str(tmp_path / "figures"))
    assert done.returncode == 0, done.stderr
    told = done.stdout
    assert "Compute-optimal size" in told
    assert "-0.2000 ± 0.2484" in told, "the seeds' differences of 0.1, 0.2 and 0.3"
    assert told.splitlines()[-1] == str(tmp_path / "figures" / "isoflop.svg")


def test_a_table_of_usage_that_is_none_is_refused(tmp_path):
    """Nothing in it is run, and nothing that is too large is unpacked."""
    mass = np.ones(9)
    tables = {
        "objects": {"mass_layer1": np.array([{}], dtype=object)},
        "words": {"mass_layer1": np.array(["a"])},
        "a matrix": {"mass_layer1": np.ones((3, 3))},
        "not finite": {"mass_layer1": np.array([1.0, np.nan])},
        "negative": {"mass_layer1": np.array([1.0, -1.0])},
        "nothing": {"mass_layer1": np.zeros(9)},
        "other names": {"mass_layer1x": mass, "mass_layer": mass, "mass_layer-1": mass, "mass_layer$x$": mass},
    }
    for name, arrays in tables.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
    np.save(tmp_path / "single.npy", mass)
    (tmp_path / "single.npy").rename(tmp_path / "single.npz")
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as bomb:
        with bomb.open("mass_layer1.npy", "w") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": (2**27 + 1,)})
            for _ in range(2**8 + 1):
                file.write(bytes(2**22))
    (tmp_path / "folder.npz").mkdir()
    os.mkfifo(tmp_path / "pipe.npz")
    (tmp_path / "loop.npz").symlink_to(tmp_path / "loop.npz")
    files = sorted(tmp_path.glob("*.npz"))
    assert len(files) == 12
    for path in files:
        with pytest.raises(ConfigError) as refusal:
            plot([path], tmp_path / "figures", [], "parameters")
        assert str(path) in str(refusal.value)
        assert "\n" not in str(refusal.value)
    assert not (tmp_path / "figures").exists()


def test_figures_that_cannot_be_written_leave_nothing(tmp_path):
    np.savez(tmp_path / "usage.npz", mass_layer1=np.ones(9))
    (tmp_path / "file").write_text("")
    there, long = tmp_path / "file", tmp_path / ("n" * 300)
    for output in (there, there / "x", long, long / "x", Path("/dev/full"), Path("/proc/x")):
        with pytest.raises(ConfigError, match="cannot be written"):
            plot([tmp_path / "usage.npz"], output, [], "parameters")
    assert sorted(os.listdir(tmp_path)) == ["file", "usage.npz"]
