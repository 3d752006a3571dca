"""Sweeps: what a file is refused for, a real one stopped, resumed and finished, tuning, job arrays, and the fits."""

import io
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from rich.console import Console

from peer_dist.config import ConfigError, load_config
from peer_dist.machine import process_start
from peer_dist.measures.metrics import read_metrics
from peer_dist.ranks import exit_codes
from peer_dist.ranks.lock import RunLock
from peer_dist.reading import as_yaml
from peer_dist.slurm.script import SubmitError
from peer_dist.sweep import spec
from peer_dist.sweep.array import submit_array
from peer_dist.sweep.fit import differences, fit_parabola, mean_interval, optima, student_t
from peer_dist.sweep.results import read_results, write_results
from peer_dist.sweep.runner import _check_table, finished, run_sweep, runs_table, select, start_process
from peer_dist.sweep.spec import SweepFile, load_sweep
from peer_dist.sweep.tuning import choose_rates
from tests.ranks import Forked, run_command
from tests.results import SIZES, losses_around, make_row, result_rows
from tests.test_slurm import sbatch_reads


@pytest.fixture(scope="module")
def sweep_tree(text):
    """Two models in two sizes, one seed."""
    return {
        "base": {
            "model": {"num_layers": 3, "num_attention_heads": 2, "seq_length": 32},
            "peer": {"num_experts": 225, "heads": 3, "top_k": 4, "key_dim": 8},
            "data": {"prefix": str(text), "split": "96,2,2"},
            "train": {"micro_batch_size": 8, "global_batch_size": 8, "precision": "fp32"},
        },
        "budgets": [3e9],
        "models": {"dense": None, "peer": {"model.mlp": ["dense", "peer", "dense"]}},
        "sizes": {
            "h16": {"model.hidden_size": 16, "model.ffn_hidden_size": 48},
            "h32": {"model.hidden_size": 32, "model.ffn_hidden_size": 96},
        },
    }


def written(tree, folder):
    path = folder / "tiny.yaml"
    path.write_text(as_yaml(tree))
    return path


def forked(arguments, environment, log):
    """A run's process, without the seconds in which libraries are imported."""
    assert arguments[:2] == ["peer_dist", "train"]
    assert environment.keys() >= os.environ.keys() | {"OMP_NUM_THREADS"}
    return Forked(list(arguments[1:]), log)


def quiet():
    return Console(file=io.StringIO(), soft_wrap=True)  # paths stay whole, however long


# ---------------------------------------------------------------- the file


def test_a_budget_is_spent_by_every_run(sweep_tree, tmp_path):
    sweep = load_sweep(written({**sweep_tree, "budgets": [1e10, 3e10], "seeds": [1, 2]}, tmp_path), tmp_path / "out")
    assert len({run.name for run in sweep.runs}) == 2 * 2 * 2 * 2
    for run in sweep.runs:
        train, schedule = run.config.train, run.config.optimizer
        step = run.cost.train_flops_per_token * train.global_batch_size * run.config.model.seq_length
        assert abs(train.steps * step - run.budget) <= step / 2, "to the nearest step"
        assert (schedule.decay_steps, schedule.warmup_steps) == (train.steps, round(0.05 * train.steps))
        assert train.seed == run.seed
        assert run.config.checkpoint.dir == str(tmp_path / "out" / run.name / "checkpoints")
    assert sweep.runs[0].name == "dense-h16-1e10-s1"
    console = Console(width=160, file=io.StringIO())
    console.print(runs_table(sweep, sweep.runs))
    shown = console.file.getvalue()
    assert all(run.name in shown and f"{run.config.train.steps:,}" in shown for run in sweep.runs)


def test_tokens_instead_of_a_budget(sweep_tree, tmp_path):
    tree = {key: value for key, value in sweep_tree.items() if key not in ("budgets", "sizes")}
    tree |= {"tokens": 25_600, "variants": {"few": {"peer.top_k": 2}, "many": {"peer.top_k": 8}}}
    sweep = load_sweep(written(tree, tmp_path), tmp_path)
    assert [run.name for run in sweep.runs] == ["dense-few-s1", "dense-many-s1", "peer-few-s1", "peer-many-s1"]
    assert {(run.config.train.steps, run.tokens) for run in sweep.runs} == {(100, 25_600)}
    assert sweep.runs[3].config.peer.top_k == 8


RATES = {"dense": [1e-3, 2e-3], "peer": [[1e-3, 1e-3], [2e-3, 4e-3]]}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tokens": 1e6}, "exactly one of budgets and tokens"),
        ({"budget": [1e9]}, "budget: unknown key; did you mean budgets?"),
        ({"models": {"a b": {}}}, "models"),
        ({"models": {"wide": {"model.hiden_size": 3}}}, "tiny.yaml: wide-h16-3e09-s1: model.hiden_size: unknown key"),
        ({"models": {"long": {"train.steps": 3}}}, "models.long: train.steps is set by the sweep itself"),
        ({"budgets": [1e6]}, "dense-h16-1e06-s1: budgets: 9 tokens are 0.03 steps of 256; raise it"),
        ({"seeds": [1, 1]}, "seeds lists a value twice"),
        (
            {"budgets": [3e9, 3.0000001e9]},
            "the runs of budget 3000000000.0 and 3000000100.0 would have one folder, dense-h16-",
        ),
        ({"tune": {"size": "h16", "seeds": [7, 7], "learning_rates": RATES}}, "tune.seeds lists a value twice"),
        ({"models": {"m" * 250: {}}}, "folder whose name has 262 bytes, and at most 255 can be; shorten the names"),
        ({"models": {"\u4e2d" * 84: {}}}, "folder whose name has 264 bytes, and at most 255 can be"),
        ({"tune": {"learning_rates": RATES}}, "tune.size: '' is none of the sizes"),
        ({"tune": {"size": "h16", "learning_rates": {"dense": [1]}}}, "is for dense, and the models are dense, peer"),
        (
            {"tune": {"size": "h16", "learning_rates": {**RATES, "dense": [1e-3]}}},
            "same number of trials, at least 1; got dense 1, peer 2",
        ),
    ],
)
def test_a_file_that_cannot_be_is_one_sentence(sweep_tree, tmp_path, changes, sentence):
    with pytest.raises(ConfigError) as error:
        load_sweep(written({**sweep_tree, **changes}, tmp_path), tmp_path)
    assert sentence in str(error.value)
    assert str(tmp_path / "tiny.yaml") in str(error.value)


def test_no_two_runs_have_one_folder():
    """Whatever the names, budgets and seeds: all differ, or the file is refused for it."""
    drawn = random.Random(1)
    names, budgets = (
        ["a", "b", "a.b", "a+b", "3e09", "s1", "trial0", "A"],
        [3e9, 3.0000001e9, 3e10, 30e9, 1e18, 12345678.0],
    )
    refused = 0
    for _ in range(300):
        file = SweepFile(
            base={},
            models={name: {} for name in drawn.sample(names, 3)},
            sizes={name: {} for name in drawn.sample(names, 2)},
            **({"variants": {name: {} for name in drawn.sample(names, 2)}} if drawn.random() < 0.5 else {}),
            budgets=drawn.sample(sorted(set(budgets)), 2),
            seeds=drawn.sample(range(12), 2),
        )
        cells = [cell for cell, _ in spec._cells(file)]
        try:
            spec._check_names(Path("f.yaml"), cells)
        except ConfigError:
            refused += 1
            assert len({cell.name for cell in cells}) < len(cells)
        else:
            assert len({cell.name for cell in cells}) == len(cells) == 3 * 2 * len(file.variants) * 2 * 2
    assert 0 < refused < 100


SHIPPED = sorted(Path(__file__).parent.parent.glob("configs/sweeps/*.yaml"))


def shipped(name, text, folder):
    """The sweeps of the repository, on other data."""
    for path in SHIPPED:
        content = re.sub("data/(corpus|tinyshakespeare)", str(text), path.read_text())
        (folder / path.name).write_text(content.replace("96,1,3", "90,5,5"))
    return load_sweep(folder / name, folder / "out")


@pytest.mark.parametrize("name", [path.name for path in SHIPPED if path.name != "base.yaml"])
def test_sweeps_that_ship(name, text, tmp_path):
    """Each is one; a model is run as often as any other."""
    runs = [run for run in shipped(name, text, tmp_path).runs if run.trial is None]
    assert len(set(Counter(run.model for run in runs).values())) == 1


def test_the_isoflop_sweep(text, tmp_path):
    """Four models, five sizes, three seeds, and as many trials for each."""
    sweep = shipped("isoflop.yaml", text, tmp_path)
    assert len([run for run in sweep.runs if run.trial is None]) == 4 * 5 * 3
    assert {len(sweep.trials(model)) for model in ("dense", "moe", "pkm", "peer")} == {5}


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def swept(sweep_tree, tmp_path_factory):
    """A whole sweep that met a failing run and a signal on its way; what was seen then, and its folder."""
    folder = tmp_path_factory.mktemp("sweep")
    path, out = written(sweep_tree, folder), folder / "out"
    sweep = load_sweep(path, out)
    seen = {"sweep": sweep, "out": out, "console": quiet()}
    blocked = out / "peer-h32-3e09-s1" / "checkpoints"
    blocked.parent.mkdir(parents=True)
    blocked.touch()  # a file where a folder should be
    seen["failed"] = run_sweep(sweep, select(sweep, task=3), 1, 1, None, seen["console"], forked)
    seen["after failing"] = {p.name for p in out.iterdir() if p.is_dir()}
    blocked.unlink()
    seen["at once"] = run_sweep(sweep, sweep.runs, 1, 1, 0, quiet())
    command = [sys.executable, "-m", "peer_dist", "sweep", str(path), "-o", str(out), "--jobs", "2", "--only", "h16"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    metrics = out / "dense-h16-3e09-s1" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) >= 3) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    seen["words"] = process.communicate(timeout=120)[1]
    seen["stopped"] = process.returncode
    seen["checkpoint"] = sorted(p.name for p in (out / "dense-h16-3e09-s1" / "checkpoints").glob("step-*"))
    seen["resumed"] = run_sweep(sweep, sweep.runs, 2, 1, None, seen["console"], forked)
    seen["said"] = " ".join(seen["console"].file.getvalue().split())
    return seen


def test_a_failing_run_is_told_and_is_alone(swept):
    assert swept["failed"] == 1
    assert swept["after failing"] == {"peer-h32-3e09-s1"}, "a task is one run"
    assert "peer-h32-3e09-s1: failed (exit code 2): error: checkpoint.dir: nothing can be written" in swept["said"]


def test_a_stopped_sweep_goes_on_from_checkpoints(swept):
    assert swept["at once"] == exit_codes.STOPPED
    assert swept["stopped"] == exit_codes.STOPPED
    assert "the same command goes on" in swept["words"]
    (step,) = swept["checkpoint"]
    stopped_at = int(step.removeprefix("step-"))
    assert 2 <= stopped_at < swept["sweep"].runs[0].config.train.steps
    assert f"going on from step {stopped_at}" in (swept["out"] / "dense-h16-3e09-s1" / "log.txt").read_text()
    assert swept["resumed"] == exit_codes.DONE


def test_results_are_the_runs_own_numbers(swept):
    rows = {row.run: row for row in read_results(swept["out"] / "results.csv")}
    assert list(rows) == [run.name for run in swept["sweep"].runs]
    for run in swept["sweep"].runs:
        row, metrics = rows[run.name], read_metrics(swept["out"] / run.name / "metrics.jsonl")
        steps = metrics[1:]
        assert [line["step"] for line in steps] == list(range(1, run.config.train.steps + 1))
        assert (row.val_loss, row.train_loss) == (steps[-1]["val/loss"], steps[-1]["train/loss"])
        assert row.val_perplexity == pytest.approx(math.exp(row.val_loss))
        assert row.unevenness == steps[-1].get("experts/layer2_unevenness")
        assert (row.unevenness is None) == (run.model == "dense")
        assert row.train_seconds == pytest.approx(sum(line["time/step"] for line in steps))
        assert row.tokens == run.tokens == run.config.train.steps * 8 * 32
        assert row.tokens_per_second == pytest.approx(row.tokens / row.train_seconds)
        assert (row.num_experts, row.active_experts) == ((225, 12) if run.model == "peer" else (None, None))
        assert not (swept["out"] / run.name / "checkpoints").exists()


def test_a_finished_sweep_does_nothing(swept, sweep_tree, tmp_path):
    out = shutil.copytree(swept["out"], tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("metrics.jsonl")}
    (out / "results.csv").unlink()
    sweep = load_sweep(written(sweep_tree, tmp_path), out)
    assert run_sweep(sweep, sweep.runs, 2, 1, None, quiet()) == exit_codes.DONE
    assert {path: path.stat().st_mtime_ns for path in out.rglob("metrics.jsonl")} == before
    assert len(read_results(out / "results.csv")) == 4
    other = {**sweep_tree, "models": {**sweep_tree["models"], "dense": {"optimizer.weight_decay": 0.2}}}
    sweep = load_sweep(written(other, tmp_path), out)
    with pytest.raises(ConfigError, match=r"dense-h16-3e09-s1: was run with optimizer.weight_decay 0.1, .* gives 0.2"):
        run_sweep(sweep, sweep.runs, 2, 1, None, quiet())


def test_only_some_runs(sweep_tree, tmp_path):
    tree = {**sweep_tree, "tune": {"size": "h16", "learning_rates": RATES}}
    sweep = load_sweep(written(tree, tmp_path), tmp_path)
    names = [run.name for run in select(sweep, ["peer-h32*"])]
    assert names == ["peer-h16-3e09-s1-trial0", "peer-h16-3e09-s1-trial1", "peer-h32-3e09-s1"], "and their trials"
    assert {run.model for run in select(sweep, ["dense"])} == {"dense"}
    for mistake, sentence in (
        ({"patterns": ["x"]}, "--only: x is no run"),
        ({"patterns": [""]}, "--only: is empty"),
        ({"task": 8}, "--task: 8 is not below 8"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            select(sweep, **mistake)


class Idle:
    """A run's process that does nothing until it is asked to leave."""

    def __init__(self, code=None):
        self.returncode, self.asked = code, []

    def poll(self):
        return self.returncode

    def send_signal(self, number):
        self.asked.append(number)
        self.returncode = exit_codes.STOPPED


def test_two_sweeps_do_not_make_one_run(sweep_tree, tmp_path):
    """What another one is making is left to it, and told; what it has made meanwhile is not made again."""
    sweep = load_sweep(written(sweep_tree, tmp_path), tmp_path / "out")
    first, console, started = sweep.runs[0], quiet(), []

    def start(arguments, environment, log):
        started.append(log.parent.name)
        return Idle(code=1)

    with RunLock(sweep.folder / first.name):
        assert run_sweep(sweep, sweep.runs, 1, 1, None, console, start) == 1
    said = " ".join(console.file.getvalue().split())
    assert f"{first.name}: {sweep.folder / first.name}: another run writes there" in said
    assert f"1 not started, because another sweep runs them: {first.name}" in said
    assert started == [run.name for run in sweep.runs[1:]]
    assert list(sweep.folder.rglob("run.lock")) == []


def test_a_run_is_started_with_the_config_that_was_checked(sweep_tree, text, tmp_path, monkeypatch):
    """Also where a name looks like a number of YAML 1.2, which PyYAML's own dumper does not put in quotes."""
    for file in text.parent.glob(f"{text.name}.*"):
        if file.is_file():
            shutil.copyfile(file, tmp_path / file.name.replace(text.name, "1e3", 1))
    monkeypatch.chdir(tmp_path)
    base = {**sweep_tree["base"], "data": {"prefix": "1e3", "split": "96,2,2"}}
    sweep = load_sweep(written({**sweep_tree, "base": base}, tmp_path), tmp_path / "out")

    def start(arguments, environment, log):
        assert load_config(arguments[-1]) in [run.config for run in sweep.runs]
        return Idle(code=1)

    assert run_sweep(sweep, sweep.runs, 1, 1, None, quiet(), start) == 1


def test_an_error_leaves_no_run_behind(sweep_tree, tmp_path):
    sweep = load_sweep(written(sweep_tree, tmp_path), tmp_path / "out")
    running = Idle()
    answers = iter([running, ConfigError("no process can be started")])

    def start(arguments, environment, log):
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with pytest.raises(ConfigError, match="no process can be started"):
        run_sweep(sweep, sweep.runs, 2, 1, None, quiet(), start)
    assert running.asked == [signal.SIGTERM]
    assert list(sweep.folder.rglob("run.lock")) == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's end")
def test_a_killed_sweep_leaves_no_run_behind(tmp_path):
    program = tmp_path / "idle_run.py"
    program.write_text(
        "import os, time\nopen('pid.part', 'w').write(str(os.getpid()))\nos.rename('pid.part', 'pid')\ntime.sleep(99)"
    )
    sweep = os.fork()
    if sweep == 0:
        os.chdir(tmp_path)
        start_process(["idle_run"], {**os.environ, "PYTHONPATH": str(tmp_path)}, tmp_path / "log")
        time.sleep(100)
        os._exit(0)
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    run = int((tmp_path / "pid").read_text())
    assert process_start(run)
    os.kill(sweep, signal.SIGKILL)
    os.waitpid(sweep, 0)
    while process_start(run) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not process_start(run)


@pytest.mark.parametrize(
    "damaged",
    [
        *(b"", b"null", b"[]", b"{}", b"5", b'{"run": 1}', b"\xff", b"[" * 5000, b"{", b"\0", b'{"val_loss": NaN}'),
        *("cut", "another", "nan"),
    ],
)
def test_a_damaged_result_is_told_and_kept(sweep_tree, tmp_path, damaged):
    sweep = load_sweep(written(sweep_tree, tmp_path), tmp_path / "out")
    name = sweep.runs[0].name
    path = sweep.folder / name / "result.json"
    path.parent.mkdir(parents=True)
    whole = make_row(run=name, val_loss=2.0).model_dump_json().encode()
    path.write_bytes(whole)
    assert finished(sweep)[name].val_loss == 2.0
    named = {
        "cut": whole[:-9],
        "another": whole.replace(name.encode(), b"other"),
        "nan": whole.replace(b'"val_loss":2.0', b'"val_loss":NaN'),
    }
    path.write_bytes(named[damaged] if isinstance(damaged, str) else damaged)
    with pytest.raises(ConfigError) as told:
        run_sweep(sweep, sweep.runs, 1, 1, None, quiet())
    assert str(told.value).startswith(f"{path}: ")
    assert str(told.value).endswith("; restore it, or delete it to have the run made again")
    assert "\n" not in str(told.value)
    assert not (sweep.folder / "results.csv").exists()


def test_a_table_that_is_not_this_sweeps_is_kept(sweep_tree, tmp_path):
    sweep = load_sweep(written(sweep_tree, tmp_path), tmp_path / "out")
    sweep.folder.mkdir()
    table = sweep.folder / "results.csv"
    write_results(table, [make_row(run=sweep.runs[0].name), make_row(run="of another file")])
    for content, sentence in (
        (table.read_bytes(), f"has runs such as of another file, which {sweep.path} has not; choose another --output"),
        (b"date,price\n1,2\n", "is no table of peer-dist sweep (it has no column active_experts); choose another"),
        (b"", "is no table of peer-dist sweep"),
        (b"\xff\xfe", "is not a text file in UTF-8; choose another"),
    ):
        table.write_bytes(content)
        with pytest.raises(ConfigError, match=re.escape(sentence)):
            run_sweep(sweep, sweep.runs, 1, 1, None, quiet())
        assert table.read_bytes() == content
    write_results(table, [make_row(run=sweep.runs[0].name), make_row(run="of the longer file")])
    (sweep.folder / "of the longer file").mkdir()
    (sweep.folder / "of the longer file" / "result.json").touch()
    _check_table(sweep)  # the file has been made shorter


@pytest.mark.parametrize("place", ["file", "file/out", "/proc/nothing"])
def test_a_folder_that_cannot_be_is_one_sentence(sweep_tree, tmp_path, place):
    (tmp_path / "file").touch()
    sweep = load_sweep(written(sweep_tree, tmp_path), tmp_path / place)
    with pytest.raises(ConfigError, match=r"cannot be written \(.*\); .*another") as told:
        run_sweep(sweep, sweep.runs, 1, 1, None, quiet())
    assert "\n" not in str(told.value)


def test_a_folder_with_too_long_a_name_is_refused(sweep_tree, tmp_path):
    with pytest.raises(ConfigError, match="holds a name of 300 bytes, and file systems take 255; shorten it"):
        load_sweep(written(sweep_tree, tmp_path), tmp_path / ("n" * 300))


@pytest.mark.slow
def test_tuned_runs_use_the_best_trial_and_the_loss_is_the_whole_splits(sweep_tree, tmp_path):
    tree = {**sweep_tree, "models": {"peer": sweep_tree["models"]["peer"]}, "keep_checkpoints": True}
    tree["tune"] = {"size": "h32", "learning_rates": {"peer": [[1e-6, 1e-6], [3e-3, 3e-3]]}}
    sweep = load_sweep(written(tree, tmp_path), tmp_path / "out")
    assert run_sweep(sweep, sweep.runs, 2, 1, None, quiet(), forked) == exit_codes.DONE
    rows = {row.run: row for row in read_results(tmp_path / "out" / "results.csv")}
    assert rows["peer-h16-3e09-s1"].lr == rows["peer-h16-3e09-s1"].table_lr == 3e-3
    assert rows["peer-h32-3e09-s1"].val_loss == rows["peer-h32-3e09-s1-trial1"].val_loss, "the same run"
    checkpoints = str(tmp_path / "out" / "peer-h16-3e09-s1" / "checkpoints")
    told = json.loads(run_command("evaluate", "--checkpoint", checkpoints, "--json").stdout)
    assert told["loss"] == pytest.approx(rows["peer-h16-3e09-s1"].val_loss, rel=1e-6)


# ---------------------------------------------------------------- tuning


def test_the_best_mean_is_chosen_and_edges_are_told(sweep_tree, tmp_path):
    rates = {"dense": [1e-3, 2e-3, 4e-3], "peer": [[1e-3, 1e-3], [2e-3, 4e-3], [2e-3, 2e-3]]}
    tree = {**sweep_tree, "seeds": [7, 8], "tune": {"size": "h16", "seeds": [7, 8], "learning_rates": rates}}
    sweep = load_sweep(written(tree, tmp_path), tmp_path)
    rows = {}

    def finish(model, losses):
        for run, loss in zip(sweep.trials(model), losses):
            rows[run.name] = make_row(run=run.name, val_loss=loss)

    finish("dense", [2.0, 1.9, 1.8, 2.0, 1.9])
    assert choose_rates(sweep, "dense", rows) is None, "one is missing"
    finish("dense", [2.0, 1.9, 1.8, 2.0, 1.9, None])  # the last one diverged
    choice = choose_rates(sweep, "dense", rows)
    assert (choice.rates, choice.loss, choice.edges) == ((2e-3, None), pytest.approx(1.9), ())
    finish("peer", [2.0, 1.7, 1.8, 2.0, 1.7, 1.8])
    choice = choose_rates(sweep, "peer", rows)
    assert (choice.rates, choice.edges) == ((2e-3, 4e-3), ("dense", "table"))
    assert "at the edge of the dense and table rates" in str(choice)
    assert sweep.runs[0].config.optimizer.lr == 1e-3


# ---------------------------------------------------------------- Slurm


def test_job_arrays(sweep_tree, tmp_path, monkeypatch):
    sweep = load_sweep(written({**sweep_tree, "tune": {"size": "h16", "learning_rates": RATES}}, tmp_path), tmp_path)
    script = submit_array(sweep, 2, 3, ["--time=60"], dry_run=True)
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    assert "#SBATCH --cpus-per-task=2" in script
    assert script.index("signal=B:USR1@120") < script.index("#SBATCH --time=60"), "the user's options win"
    assert f'--output {tmp_path} --ranks 2 --task "$SLURM_ARRAY_TASK_ID"' in script
    assert not (tmp_path / "slurm").exists(), "a dry run writes nothing"
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "sbatch"
    command.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/asked\nwc -l <{tmp_path}/asked\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:/usr/bin:/bin")
    assert submit_array(sweep, 2, 3, [], dry_run=False).startswith("submitted 8 runs as job array 1, then 2")
    first, second = (tmp_path / "asked").read_text().splitlines()
    assert "--array=0-3%3 " in first
    assert "--array=4-7%3 --dependency=afterany:1 " in second


@pytest.mark.parametrize(
    "odd",
    [
        "two words",
        "it's",
        'a"b',
        "$(touch x)",
        "`touch x`",
        "a;touch x",
        "%A",
        "#x",
        "{ranks}",
        "-x",
        "caf\u00e9",
        "a\\b",
    ],
)
def test_an_arrays_values_arrive_as_they_are(sweep_tree, tmp_path, monkeypatch, odd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / odd).mkdir()
    path = tmp_path / odd / f"{odd}.yaml"
    path.write_text(yaml.safe_dump(sweep_tree))
    out = tmp_path / odd.replace("\\", "")
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\nprintf "%s\\0" "$@" >{tmp_path}/asked\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    script = submit_array(load_sweep(path, out), 2, 3, [f"--comment={odd}"], dry_run=True)
    options = sbatch_reads(script)
    assert f"--job-name={odd}" in options
    assert f"--comment={odd}" in options
    assert f"--output={str(out).replace('%', '%%')}/slurm/%A_%a.log" in options
    done = subprocess.run(["bash"], input=script, text=True, env={**os.environ, "SLURM_ARRAY_TASK_ID": "3"}, timeout=60)
    assert done.returncode == 0
    asked = (tmp_path / "asked").read_text().split("\0")[:-1]
    assert asked == ["-m", "peer_dist", "sweep", str(path), "--output", str(out), "--ranks", "2", "--task", "3"]
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "option", ["--comment=a\ntouch x", "--array=1-2", "-a1", "--signal=USR1", "exclusive", "--wrap=x"]
)
def test_options_that_an_array_cannot_have_are_one_sentence(sweep_tree, tmp_path, option):
    sweep = load_sweep(written(sweep_tree, tmp_path), tmp_path)
    with pytest.raises(SubmitError, match=r"^--sbatch: ") as told:
        submit_array(sweep, 1, 1, [option], dry_run=True)
    assert len(str(told.value).splitlines()) == 1
    assert "#SBATCH --nodes=1" in submit_array(sweep, 1, 1, ["--nodes=1"], dry_run=True), "runs are of one node"


# ---------------------------------------------------------------- fits


def test_student_t_is_the_tables():
    for degrees, want in ((1, 12.7062), (2, 4.30265), (5, 2.57058), (10, 2.22814), (1000, 1.96234)):
        assert student_t(degrees) == pytest.approx(want, rel=1e-5)
    assert math.isnan(student_t(0))
    interval = mean_interval([1.0, 2.0, 3.0])
    assert (interval.value, interval.half_width) == (2.0, pytest.approx(4.30265 / math.sqrt(3), rel=1e-5))


def test_a_parabola_without_noise_is_found_exactly():
    optimum = fit_parabola("m", 1.0, *losses_around(3e6))
    assert optimum.where == "inside"
    assert optimum.size == pytest.approx(3e6)
    assert optimum.loss.value == pytest.approx(2.0)
    assert optimum.size_interval == (pytest.approx(3e6), pytest.approx(3e6)), "seeds' levels are no noise"
    assert optimum.curve(np.array([3e6, 6e6])) == pytest.approx([2.0, 2 + 0.05 * math.log(2) ** 2])
    for best, where in ((0.5e6, "below"), (40e6, "above")):
        assert fit_parabola("m", 1.0, *losses_around(best)).where == where
    sizes, seeds, losses = losses_around(3e6)
    assert fit_parabola("m", 1.0, sizes, seeds, [-loss for loss in losses]).where == "none"
    with pytest.raises(ValueError, match="three sizes of one seed"):
        fit_parabola("m", 1.0, SIZES[:3], [1, 2, 3], [2.0, 1.9, 2.0])


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(1)
    fits = [fit_parabola("m", 1.0, *losses_around(3e6, noise=0.01, rng=rng)) for _ in range(1000)]
    sizes = np.mean([fit.size_interval[0] <= 3e6 <= fit.size_interval[1] for fit in fits])
    losses = np.mean([abs(fit.loss.value - 2.0) <= fit.loss.half_width for fit in fits])
    assert sizes == pytest.approx(0.95, abs=0.02)
    assert losses == pytest.approx(0.95, abs=0.02)


def test_optima_and_paired_differences(tmp_path):
    rows = [*result_rows(), make_row(model="b", trial=0, val_loss=9), make_row(model="b", status="diverged")]
    write_results(tmp_path / "results.csv", rows)
    rows = read_results(tmp_path / "results.csv")
    found = {(fit.label, fit.budget): fit for fit in optima(rows)}
    assert found["b", 1e12].size == pytest.approx(3e6)
    assert found["b", 1e12].loss.value == pytest.approx(1.9)
    assert [found["a", budget].where for budget in (1e12, 2e12)] == ["inside", "above"]
    told = {(each.budget, each.size): each for each in differences(rows)}
    best = {1e12: "4e+06 / 4e+06", 2e12: "1.6e+07 / 1.6e+07"}
    sizes = [None, *(f"{size:g}" for size in SIZES)]
    assert set(told) == {(budget, size) for budget in best for size in [*sizes, best[budget]]}
    assert told[2e12, best[2e12]].loss.value == pytest.approx(-0.2)
    assert {(each.label, each.baseline, each.pairs) for each in told.values()} == {("b", "a", 3)}
    assert told[1e12, "1e+06"].loss.value == pytest.approx(-0.1)
    assert told[1e12, "1e+06"].loss.half_width == pytest.approx(0, abs=1e-9)
    assert told[2e12, None].loss.value == pytest.approx(-0.2)
    assert told[2e12, None].loss.half_width == pytest.approx(0.1 * 4.30265 / math.sqrt(3), rel=1e-5)
    ablation = [
        make_row(model=model, variant=variant, budget=None, size="", val_loss=loss)
        for model, variant, loss in (("a", "few", 3.0), ("b", "few", 3.5), ("a", "many", 2.0), ("b", "many", 2.25))
    ]
    assert [(each.label, each.baseline, each.loss.value) for each in differences(ablation)] == [
        ("b few", "a few", 0.5),
        ("a many", "a few", -1.0),
        ("b many", "a many", 0.25),
    ]


def test_damaged_tables_are_one_sentence_or_rows(tmp_path):
    """Cut, flipped, retyped and foreign: what is read can be fitted, and what cannot be is told with its line."""
    path = tmp_path / "results.csv"
    write_results(path, [*result_rows(), make_row(run="last", status="diverged")])
    whole = path.read_bytes()
    lines = whole.split(b"\r\n")
    cells = lines[1].split(b",")
    columns = lines[0].split(b",")

    def with_cell(column, value):
        changed = list(cells)
        changed[columns.index(column)] = value
        return b"\r\n".join([lines[0], b",".join(changed), *lines[2:]])

    drawn = random.Random(1)
    damaged = [whole[: drawn.randrange(len(whole))] for _ in range(60)]
    for _ in range(120):
        content = bytearray(whole)
        content[drawn.randrange(len(whole))] = drawn.choice(b'\0\xff"\n,x-9e\r')
        damaged.append(bytes(content))
    for column in columns:
        damaged += [
            with_cell(column, value) for value in (b"", b"x", b"nan", b"inf", b"-1", b"1e400", b"9" * 5000, b"true")
        ]
    damaged += [
        lines[0],
        b"",
        b"\n",
        b"\xef\xbb\xbf" + whole,
        whole + b"a,b\r\n",
        whole + whole,
        whole[:-1] + b",1,2,3\r\n",
    ]
    damaged += [b'"' + whole, whole.replace(b"\r\n", b"\n"), b"a" * 200_000, lines[0] + b'\r\n"' + b"a" * 200_000]
    told = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            rows = read_results(path)
        except ConfigError as error:
            sentence, told = str(error), told + 1
            if not (sentence.startswith(f"{path}: ") and len(sentence.splitlines()) == 1 and ";" in sentence):
                pytest.fail(sentence)
        else:
            assert optima(rows) is not None
            assert differences(rows) is not None
    assert told > 100
    path.write_bytes(with_cell(b"val_loss", b"nan"))
    with pytest.raises(
        ConfigError, match=r"results.csv: line 2: val_loss: input should be a finite number, not 'nan'; name"
    ):
        read_results(path)
    path.write_text("run,loss\na,1\n")
    with pytest.raises(ConfigError, match="is no table of peer-dist sweep"):
        read_results(path)
