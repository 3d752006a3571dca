"""The batch script of peer-dist submit, and what is refused before one is made. Jobs that run: tests/cluster."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from peer_dist.config import ConfigError
from peer_dist.slurm.submit import Job, SubmitError, render, submit


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A run's file; the data set is only looked for."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.json").touch()
    tree = {"data": {"prefix": "text"}, "logging": {"dir": "a run/logs"}, "train": {"global_batch_size": 64}}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """Put an `sbatch` on the PATH that notes its arguments and answers so."""

    def install(script):
        command = tmp_path / "bin" / "sbatch"
        command.parent.mkdir()
        command.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/asked\n{script}\n')
        command.chmod(0o755)
        monkeypatch.setenv("PATH", f"{command.parent}:/usr/bin:/bin")
        return tmp_path / "asked"

    return install


def test_the_script_asks_for_what_was_said(config):
    job = Job(
        nodes=3,
        gpus_per_node=8,
        time_limit="1-00:00:00",
        account="physics",
        partition="gpu",
        qos="long",
        signal_lead=300,
        options=["--constraint=h100&ib"],
    )
    script = submit(config, ["train.steps=7", "train.global_batch_size=192"], job, dry_run=True)
    asked = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
    for want in (
        "nodes=3",
        "ntasks=24",
        "ntasks-per-node=8",
        "gpus-per-node=8",
        "time=1-00:00:00",
        "account=physics",
        "partition=gpu",
        "qos=long",
        "signal=B:USR1@300",
        "requeue",
        "constraint=h100&ib",
        f"output='{config.parent}/a run/logs/slurm/%j.log'",
    ):
        assert want in asked, want
    assert not [line for line in asked if line.startswith("cpus-per-task")]
    assert "train.steps=7 train.global_batch_size=192)" in script
    assert not (config.parent / "a run").exists(), "a dry run writes nothing"


@pytest.mark.parametrize(
    ("job", "sentence"),
    [
        ({"gpus_per_node": 4, "ranks_per_node": 8}, "8 ranks for 4 GPU"),
        ({"time_limit": "3"}, "120 s before a limit of 3 leaves no time"),
        ({"time_limit": "soon"}, "'soon' is no time limit"),
        ({"stage": Path("nowhere")}, "nowhere is not there"),
        ({"options": ["exclusive"]}, "'exclusive' is no option"),
    ],
)
def test_a_job_that_cannot_be_is_one_sentence(config, job, sentence):
    with pytest.raises(SubmitError, match=sentence):
        submit(config, [], Job(**job), dry_run=True)


def test_a_run_that_cannot_be_is_refused_before_it_waits(config):
    with pytest.raises(ConfigError, match="64 is not a multiple"):
        submit(config, [], Job(nodes=3), dry_run=True)
    with pytest.raises(ConfigError, match="unknown key; did you mean steps"):
        submit(config, ["train.step=3"], Job(), dry_run=True)
    with pytest.raises(ConfigError, match="other is no prepared data set"):
        submit(config, ["data.prefix=other"], Job(), dry_run=True)


def test_submitted_with_a_copy_of_the_config(config, sbatch):
    asked = sbatch("echo '12;lab'")
    told = submit(config, [], Job(nodes=2, ranks_per_node=2))
    assert told.startswith("submitted job 12: 2 node(s) x 2 rank(s)")
    assert told.endswith("a run/logs/slurm/12.log")
    (script,) = (config.parent / "a run/logs/slurm").glob("*.sbatch")
    (kept,) = (config.parent / "a run/logs/slurm").glob("*-run.yaml")
    assert asked.read_text().strip() == f"--parsable {script}"
    assert kept.read_text() == config.read_text()
    assert str(kept) in script.read_text()


def test_a_chain_waits_for_each_other_and_is_not_requeued(config, sbatch):
    asked = sbatch(f"wc -l <{config.parent}/asked")
    assert submit(config, [], Job(chain=2)).startswith("submitted job 1, then 2 3:")
    first, second, third = asked.read_text().splitlines()
    assert "dependency" not in first
    assert "--dependency=afterany:1 " in second
    assert "--dependency=afterany:2 " in third
    (script,) = (config.parent / "a run/logs/slurm").glob("*.sbatch")
    assert "#SBATCH --no-requeue" in script.read_text()
    assert "\nREQUEUE=no" in script.read_text()


def test_what_slurm_refuses_is_told(config, sbatch, monkeypatch):
    sbatch("echo 'sbatch: error: Batch job submission failed: Invalid partition name specified' >&2; exit 1")
    with pytest.raises(SubmitError, match=r"^sbatch: Batch job submission failed: Invalid partition name specified$"):
        submit(config, [], Job())
    monkeypatch.setenv("PATH", str(config.parent))
    with pytest.raises(SubmitError, match="sbatch: is not there"):
        submit(config, [], Job())


JOBS = {
    "plain": Job(nodes=2, ranks_per_node=2),
    "pyxis": Job(gpus_per_node=8, container="nvcr.io#nvidia/pytorch:25.01-py3", doctor=True),
    "apptainer": Job(gpus_per_node=8, container="/images/a b.sif", runtime="apptainer"),
    "chain": Job(chain=3, time_limit="10:00:00", name="it's a run"),
}


@pytest.mark.parametrize("kind", JOBS)
def test_the_script_is_sound_shell(tmp_path, kind):
    script = render(
        JOBS[kind], ["--config", "a b.yaml", "model.mlp=[dense, peer]"], tmp_path / "logs", tmp_path, ["/elsewhere"]
    )
    assert "@" not in script.replace("@NAMES@", "").replace('"$@"', "").replace("[@]", "").replace("USR1@", "")
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck here")
    checked = subprocess.run(["shellcheck", "-"], input=script, text=True, capture_output=True)
    assert checked.returncode == 0, checked.stdout
