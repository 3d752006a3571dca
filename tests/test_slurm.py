"""The batch script of peer-dist submit, and what is refused before one is made. Jobs that run: tests/cluster."""

import dataclasses
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from peer_dist.cli import app
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
        signal_lead=300,
        options=["--account=physics", "--partition=gpu", "--qos=long", "--job-name=large", "--constraint=h100&ib"],
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
    assert [line for line in asked if line.startswith("job-name")][-1] == "job-name=large", "the later of two wins"
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
        ({"stage": Path("/usr/lib")}, "/usr/lib has no bin/python"),
        ({"setup": Path("nowhere")}, "--setup: nowhere is not there"),
        ({"container": "nowhere.sif"}, "--container: nowhere.sif is not there"),
        ({"container": " "}, "--container: is empty"),
        ({"local_disk": Path("scratch")}, "--local-disk: scratch is no absolute path"),
        ({"nodes": 0}, "--nodes: 0 is too few"),
        ({"ranks_per_node": 0}, "--ranks-per-node: 0 is too few"),
        ({"options": ["exclusive"]}, "'exclusive' is no option"),
        ({"options": ["--"]}, "'--' is no option"),
        ({"options": ["--array=0-3"]}, "--array cannot be passed on: the script is written for the job"),
        ({"options": ["-a", "-a0-3"]}, "-a cannot be passed on"),
        ({"options": ["--signal=TERM@60"]}, "--signal cannot be passed on: .* give --signal-lead"),
        ({"options": ["--chdir /"]}, "--chdir cannot be passed on: .* change to another before that"),
        ({"options": ["-N4"]}, "-N cannot be passed on, because the run is checked for it; give --nodes"),
        ({"time_limit": "9" * 5000}, "is no time limit"),
        ({"setup": Path("n" * 5000)}, "is not there"),
        ({"stage": Path("n" * 300)}, "is not there"),
        ({"container": "n" * 300 + ".sif"}, "is not there"),
    ],
)
def test_a_job_that_cannot_be_is_one_sentence(config, job, sentence):
    with pytest.raises(SubmitError, match=sentence):
        submit(config, [], Job(**job), dry_run=True)


@pytest.mark.parametrize("option", ["--partition=gpu", "--account=a", "--qos=long", "--name=a", "--cpus-per-rank=8"])
def test_what_sbatch_has_is_no_option_of_submit(config, option):
    told = CliRunner().invoke(app, ["submit", "--config", str(config), option, "--dry-run"])
    assert told.exit_code == 2
    assert f"No such option: {option.partition('=')[0]}" in told.output


def test_a_run_that_cannot_be_is_refused_before_it_waits(config):
    with pytest.raises(ConfigError, match="64 is not a multiple"):
        submit(config, [], Job(nodes=3), dry_run=True)
    with pytest.raises(ConfigError, match="unknown key; did you mean steps"):
        submit(config, ["train.step=3"], Job(), dry_run=True)
    with pytest.raises(ConfigError, match="other is no prepared data set"):
        submit(config, ["data.prefix=other"], Job(), dry_run=True)


def test_folders_that_cannot_be_written_are_refused_before_it_waits(config, sbatch):
    asked = sbatch("echo 12")
    with pytest.raises(ConfigError, match=r"^checkpoint.dir: nothing can be written to run.yaml/checkpoints; choose"):
        submit(config, ["checkpoint.dir=run.yaml/checkpoints"], Job())
    assert not asked.exists()


def test_a_container_sees_all_that_the_run_reads_and_writes(config, sbatch, tmp_path_factory):
    sbatch("echo 12")
    far = tmp_path_factory.mktemp("far")
    for name in ("data", "links", "weights/step-00000001", "etc"):
        (far / name).mkdir(parents=True)
    for ending in (".bin", ".idx", ".json", ".tokenizer.json"):
        (far / "data" / f"text{ending}").touch()
        (far / "links" / f"text{ending}").symlink_to(far / "data" / f"text{ending}")
    (far / "etc/site.sh").touch()
    (config.parent / "runs").symlink_to(far / "runs")
    (far / "runs").mkdir()
    (config.parent / "image.sif").touch()
    overrides = [
        f"data.prefix={far}/links/text",
        f"data.tokenizer={far}/tokenizer/bpe.json",
        f"checkpoint.init_from={far}/weights/step-00000001",
        "checkpoint.dir=runs/checkpoints",
        "logging.dir=../logs",
    ]
    submit(config, overrides, Job(container="image.sif", runtime="apptainer", setup=far / "etc/site.sh"))
    (path,) = (config.parent.parent / "logs/slurm").glob("*.sbatch")
    script = path.read_text()
    bound = script.partition('--bind "$PWD,$LOGS,$LOCAL_DISK,')[2].partition('"')[0].split(",")
    names = ("data", "etc", "links", "runs/checkpoints", "tokenizer", "weights/step-00000001")
    assert bound == sorted([*(f"{far}/{name}" for name in names), f"{config.parent.parent}/logs"])
    assert (far / "runs/checkpoints").is_dir()
    assert f"IMAGE={config.parent}/image.sif\n" in script


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
    "apptainer": Job(gpus_per_node=8, container="/images/a b.sif", runtime="apptainer", setup=Path("the site's.sh")),
    "chain": Job(chain=3, time_limit="10:00:00", options=["--job-name=a run"]),
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


# Every character that a shell, sbatch, Slurm's names of logs or the template could take for more than itself.
ODD = [
    "two words", "it's", 'say "x"', "back\\slash", "a\\'b", "$(touch x)", "`touch x`", "$HOME", "${LOGS}", "a;touch x",
    "a&&b", "a|b>c", "#SBATCH --x", "# x", "@TRAIN@", "@LOGS@", "%j", "50%", "*?[a]", "~", "!x", "{a,b}", "(x)",
    "\u00e9\u4e2d", "[red]x", ":smile:", "-x", "'; touch x; '", "\\", "a=b", "\u200b",
]  # fmt: skip


def sbatch_reads(script):
    """The options that `sbatch` reads: it knows quotes, backslashes and comments, and stops at the first command."""
    options = []
    for line in script.split("\n")[1:]:
        if line.startswith("#SBATCH"):
            options += _words(line.removeprefix("#SBATCH"))
        elif line.strip() and not line.startswith("#"):
            break
    return options


def _words(line):
    words, word, quote, escaped = [], None, "", False
    for char in line:
        if escaped:
            word, escaped = (word or "") + char, False
        elif char == "\\":
            word, escaped = word or "", True
        elif quote:
            quote, word = ("", word) if char == quote else (quote, word + char)
        elif char in "'\"":
            quote, word = char, word or ""
        elif char == "#":
            break
        elif char.isspace():
            words += [] if word is None else [word]
            word = None
        else:
            word = (word or "") + char
    assert not quote, line
    return words + ([] if word is None else [word])


def _assigned(script, folder):
    """What bash makes of the script's values and of its arrays of words, run with nothing but that."""
    values = script[script.index("set -uo pipefail") : script.index("attempt=")]
    runtime = script[script.index("launch=(srun") : script.index("# The ranks find each other")]
    names = ("IMAGE", "SETUP", "STAGE", "LOCAL_DISK", "LOGS", "CHECKPOINTS", "CHAIN", "PYTHON", "RUNTIME")
    prints = "".join(f'printf "%s\\0" {name} 1 "${name}"\n' for name in names)
    prints += "".join(
        f'printf "%s\\0" {name} "${{#{name}[@]}}" "${{{name}[@]}}"\n' for name in ("TRAIN", "launch", "inside")
    )
    done = subprocess.run(
        ["bash", "-c", f"{values}\n{runtime}\n{prints}"], capture_output=True, cwd=folder, check=True, timeout=60
    )
    assert done.stderr == b""
    parts, found = iter(done.stdout.decode().split("\0")), {}
    for name in parts:
        if name:
            found[name] = [next(parts) for _ in range(int(next(parts)))]
    return found


@pytest.mark.parametrize("runtime", ["none", "pyxis", "apptainer"])
def test_every_value_arrives_as_it_is(runtime, tmp_path, monkeypatch):
    """In bash, and in sbatch: one odd text after the other in all places at once, and nothing is run or added."""
    monkeypatch.chdir(tmp_path)
    plain = None
    for odd in ["plain", *ODD]:
        logs = tmp_path / (odd.replace("\\", "") or "logs")  # Slurm's names of logs know no backslash
        folders = [] if any(char in odd for char in ",:") else [f"/data/{odd}"]
        job = Job(
            container=None if runtime == "none" else f"{odd} image",
            runtime="apptainer" if runtime == "apptainer" else "pyxis",
            setup=Path(odd),
            stage=Path(odd),
            local_disk=Path("/disk" if folders == [] else f"/disk/{odd}"),
            chain=1,
            python=f"/env/{odd}",
            options=[f"--comment={odd}", f"--wckey {odd}x", f"-A{odd}", "--exclusive"],
        )
        if ":" in str(logs) or "," in str(logs):
            logs = tmp_path / "logs"
        script = render(job, ["--config", odd, f"a.b={odd}"], logs, Path("/c") / odd, folders, Path("/e") / odd)
        lines = script.split("\n")
        plain = plain or lines
        assert [line[:5] for line in lines] == [line[:5] for line in plain], "no line is added"
        options = sbatch_reads(script)
        assert f"--comment={odd}" in options
        assert f"--wckey={odd}x" in options
        assert f"-A{odd}" in options
        assert f"--output={str(logs).replace('%', '%%')}/%j.log" in options
        found = _assigned(script, tmp_path)
        assert found["TRAIN"] == ["--config", odd, f"a.b={odd}"]
        assert found["SETUP"] == found["STAGE"] == [str(Path(odd).absolute())]
        assert found["LOGS"] == [str(logs)]
        assert found["CHECKPOINTS"] == [f"/c/{odd}"]
        assert found["CHAIN"] == [f"/e/{odd}"]
        assert found["LOCAL_DISK"] == [str(job.local_disk)]
        assert found["PYTHON"] == (["python"] if job.container else [f"/env/{odd}"])
        assert found["IMAGE"] == [job.container or ""]
        shown = [str(tmp_path), str(logs), str(job.local_disk), *folders]
        if runtime == "pyxis":
            assert f"--container-image={job.container}" in found["launch"]
            assert f"--container-mounts={','.join(f'{folder}:{folder}' for folder in shown)}" in found["launch"]
        if runtime == "apptainer":
            assert found["inside"][:4] == ["apptainer", "exec", "--bind", ",".join(shown)]
            assert found["inside"][-1] == job.container
    assert list(tmp_path.iterdir()) == [], "nothing was run"


BREAKS = ["\n", "\r", "\0", "\t", "\x1b", "\x7f", "\x85", "\u2028", "\ud800"]


@pytest.mark.parametrize("broken", BREAKS)
def test_a_line_break_is_refused_wherever_it_stands(broken, tmp_path):
    odd = f"a{broken}touch x"
    well = {"job": Job(container="i"), "train": ["a"], "logs": tmp_path, "checkpoints": tmp_path}
    for place in (
        {"job": Job(container=odd)},
        {"job": Job(setup=Path(odd))},
        {"job": Job(stage=Path(odd))},
        {"job": Job(local_disk=Path(odd))},
        {"job": Job(python=odd)},
        {"job": Job(time_limit=odd)},
        {"job": Job(options=[f"--comment={odd}"])},
        {"job": Job(options=[f"--comment=a{broken}"])},
        {"job": Job(options=[f"{broken}--comment=a"])},
        {"job": Job(options=[f"--ex{broken}clusive"])},
        {"train": ["--config", odd]},
        {"train": [f"a.b={broken}"]},
        {"logs": tmp_path / odd},
        {"checkpoints": tmp_path / odd},
        {"chain": tmp_path / odd},
        {"folders": [f"/{odd}"]},
    ):
        with pytest.raises(
            SubmitError, match=r"holds a line break or another control character, .*; leave it out"
        ) as told:
            render(**{**well, **place})
        assert len(str(told.value).splitlines()) == 1
        assert str(told.value).isprintable()


@pytest.mark.parametrize("name", ["a,b", "a:b"])
def test_what_a_list_of_mounts_cannot_hold_is_refused(name, tmp_path, monkeypatch):
    (tmp_path / name).mkdir()
    for runtime in ("pyxis", "apptainer"):
        job = Job(container="image", runtime=runtime)
        with pytest.raises(
            SubmitError, match="cannot be shown to a container, because its name has a comma or a colon"
        ):
            render(job, [], tmp_path, tmp_path, [f"/{name}"])
        with pytest.raises(SubmitError, match="cannot be shown"):
            render(job, [], tmp_path / name, tmp_path)
        with pytest.raises(SubmitError, match="cannot be shown"):
            render(dataclasses.replace(job, local_disk=Path(name)), [], tmp_path, tmp_path)
    monkeypatch.chdir(tmp_path / name)
    with pytest.raises(SubmitError, match="cannot be shown"):
        render(job, [], tmp_path, tmp_path)
    assert name in render(Job(), [], tmp_path / name, tmp_path)
    with pytest.raises(SubmitError, match=r"^logging.dir: .* has a backslash"):
        render(Job(), [], tmp_path / "a\\b", tmp_path)


def test_a_dry_runs_script_is_one_to_submit(config):
    """It names a config that is there, and says which folder must be."""
    script = submit(config, ["train.steps=7"], Job(), dry_run=True)
    assert f"TRAIN=(--config {config} train.steps=7)" in script
    assert script.splitlines()[-2].endswith(f"mkdir -p '{config.parent}/a run/logs/slurm'")
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


def test_two_submissions_in_one_second_keep_their_configs_apart(config, sbatch):
    sbatch("echo 12")
    long = config.with_name("r" * 250 + ".yaml")
    config.rename(long)
    for steps in (7, 8):
        submit(long, [f"train.steps={steps}"], Job())
    logs = config.parent / "a run/logs/slurm"
    assert len(list(logs.glob("*.yaml"))) == len(list(logs.glob("*.sbatch"))) == 2


def test_what_sbatch_says_is_told_whatever_it_is(config, sbatch, monkeypatch):
    asked = sbatch("printf 'nonsense\\377\\n'")
    with pytest.raises(SubmitError, match=r"^sbatch: said 'nonsense.*' where a job's number should be; ask squeue"):
        submit(config, [], Job())
    (asked.parent / "bin/sbatch").write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(SubmitError, match=r"^sbatch: failed with exit code 3 and gave no reason; ask"):
        submit(config, [], Job())
    (asked.parent / "bin/sbatch").write_text("#!/no/such/shell\n")
    with pytest.raises(SubmitError, match=r"^sbatch: .*/sbatch cannot be started \(No such file or directory\)"):
        submit(config, [], Job())


@pytest.fixture
def batch(tmp_path):
    """Runs the batch script here: `srun` starts one task on one node, and `python` is a shell script's text."""

    def run(job: Job, python: str, state: str = "RUNNING Reason=None", stop: int = 0):
        logs, programs = tmp_path / "logs", tmp_path / "programs"
        programs.mkdir(exist_ok=True)
        task = "SLURM_STEP_ID=0 SLURM_LOCALID=0 SLURM_NTASKS_PER_NODE=1 SLURMD_NODENAME=node1"
        for program, text in {
            "python": python,
            "srun": f'while [ "${{1#-}}" != "$1" ]; do shift; done\nexport {task}\n"$@" &\n'
            'trap "kill -USR1 $!" USR1\nwait $! || wait $!',
            "scontrol": f'[ "$1" != show ] || exec echo "JobId=7 JobState={state} PreemptTime=None "\n'
            f'echo "$@" >>{tmp_path}/asked; exit 1',  # so that the script does not wait to be ended
        }.items():
            (programs / program).write_text(f"#!/bin/bash\n{text}\n")
            (programs / program).chmod(0o755)
        job = dataclasses.replace(job, python=str(programs / "python"), local_disk=tmp_path / "disk")
        script = subprocess.Popen(
            [
                "bash",
                "-c",
                render(job, [], logs, tmp_path / "checkpoints", chain=tmp_path / "chain.ended" if job.chain else None),
            ],
            env={**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_NTASKS": "1"}
            | {"SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "node1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        while stop and script.poll() is None and not (tmp_path / "ready").exists():
            time.sleep(0.05)
        if stop:
            script.send_signal(stop)
        said = script.communicate(timeout=60)[0]
        asked = tmp_path / "asked"
        requeued = asked.exists() and asked.read_text() == "requeue 7\n"
        asked.unlink(missing_ok=True)
        return script.returncode, requeued, said

    return run


SLEEPS = 'touch "${0%/*}/../ready"; exec sleep 60'


def test_only_what_the_doctor_found_fails_the_job(batch):
    doctor = Job(doctor=True)
    for code in (1, 2):
        assert batch(doctor, f"[ $3 = doctor ] && exit {code}")[:2] == (2, False)
    assert batch(doctor, "[ $3 = doctor ] && exit 139")[:2] == (139, True), "a crash is started again"
    assert batch(doctor, "[ $3 != doctor ] || kill -TERM $$")[:2] == (75, True), "Slurm's own signal to the step"
    assert batch(doctor, f"[ $3 = doctor ] && {{ {SLEEPS}; }}", stop=signal.SIGUSR1)[:2] == (75, True)
    assert batch(doctor, "exit 0")[:2] == (0, False)


def test_the_sites_own_setup_is_read_first(batch, tmp_path):
    setup = tmp_path / "site.sh"
    setup.write_text("export NCCL_SOCKET_IFNAME=eno7 MASTER_PORT=4321")
    said = '[ "$NCCL_SOCKET_IFNAME $MASTER_PORT" = "eno7 4321" ]'
    assert batch(Job(setup=setup), said)[0] == 0
    assert batch(Job(), said)[0] == 1
    setup.write_text("false")
    assert batch(Job(setup=setup), said)[:2] == (2, False)


def test_a_port_that_was_chosen_wins(batch, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "4321")
    assert batch(Job(), '[ "$MASTER_PORT" = 4321 ]')[0] == 0
    monkeypatch.setenv("RANK", "0")
    assert batch(Job(), '[ -z "$MASTER_PORT" ]')[0] == 0, "what another launcher left does not"


def test_a_chain_ends_where_another_job_would_not_mend(batch, tmp_path):
    chain = Job(chain=1)
    for python, state, ends in (
        ("exit 2", "RUNNING Reason=None", True),
        ("exit 70", "RUNNING Reason=None", True),
        ("exit 75", "COMPLETING Reason=None", True),  # scancel
        ("exit 75", "RUNNING Reason=None", False),  # before the time limit
        ("exit 75", "COMPLETING Reason=TimeLimit", False),
        ("exit 1", "RUNNING Reason=None", False),
    ):
        code, requeued, _ = batch(chain, python, state)
        assert not requeued
        ended = tmp_path / "chain.ended"
        assert ended.exists() == ends, (python, state)
        if ends:
            after, _, said = batch(chain, "exit 0")
            assert after == code
            assert "the chain was ended" in said
            ended.unlink()


def test_the_last_rank_of_a_stopped_job_cleans_its_node(tmp_path):
    """scancel: Slurm starts no further step then."""
    script = render(Job(ranks_per_node=2), [], tmp_path, tmp_path)
    on_node = script.partition("ON_NODE='")[2].partition("'\n")[0]
    env = {**os.environ, "NODE_FOLDER": str(tmp_path / "disk/job"), "SLURMD_NODENAME": "node1", "SLURM_STEP_ID": "0"}
    ranks = [
        subprocess.Popen(
            ["bash", "-c", on_node, "_", "sh", "-c", "trap 'kill $!; exit 75' TERM; echo; sleep 60 & wait"],
            env={**env, "SLURM_LOCALID": str(rank), "SLURM_NTASKS_PER_NODE": "2"},
            stdout=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    for rank, folder_is_there in zip(ranks, (True, False)):
        rank.stdout.readline()
        rank.terminate()
        assert rank.wait(30) == 75
        assert (tmp_path / "disk/job/node1").exists() == folder_is_there
    assert not any((tmp_path / "disk").iterdir())
