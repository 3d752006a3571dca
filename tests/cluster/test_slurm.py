"""The life of a run on a Slurm cluster of three nodes: submitted, stopped, preempted, cut off, cancelled.

Every case but the first trains more steps than it will be given time for, and is told its last step when Slurm has
done what the case is about: nothing depends on how fast the machine is.
"""

from __future__ import annotations

import re
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from peer_dist.measures.metrics import read_metrics
from tests.cluster.slurm import Lab, missing, wait_until
from tests.ranks import run_ranks
from tests.runs import in_folder, losses_of, run_to_the_end, small_config, with_keys

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
MANY = 100_000
START = 420  # seconds that a job may take to its first step, on a busy machine


@pytest.fixture(scope="module")
def lab():
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    with Lab() as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def no_jobs(lab):
    """What a case leaves running does not take the next one's nodes."""
    yield
    lab.run("scancel", "--full", "--signal=KILL", "--user=root")
    lab.run("scancel", "--user=root")
    wait_until(lambda: not lab.run("squeue", "-h"), 90, "an empty queue")


class Run:
    """A run's folder, and what its jobs left there."""

    def __init__(self, lab: Lab, text: Path, folder: Path, **sections: dict) -> None:
        self.lab, self.folder = lab, folder
        self.tree = with_keys(
            small_config(text, folder),
            **{"model": {"dropout": 0.1}, "parallel": {"expert": 2}, "evaluation": {"interval": MANY}, **sections},
        )
        (folder / "run.yaml").write_text(yaml.safe_dump(self.tree))

    def submit(self, *options: str) -> list[str]:
        """`peer-dist submit`: the jobs' numbers."""
        root = Path(__file__).parents[2]
        done = subprocess.run(
            [sys.executable, "-m", "peer_dist", "submit", "--config", "run.yaml", "--local-disk", self.folder / "disk"]
            + list(options),
            cwd=self.folder,
            env={**self.lab.environment, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return re.findall(r"\d+", done.stdout.split(":")[0])

    def log(self, job: str) -> str:
        path = self.folder / "logs" / "slurm" / f"{job}.log"
        return path.read_text() if path.exists() else ""

    def losses(self) -> dict[int, float]:
        path = self.folder / "logs" / "metrics.jsonl"
        lines = read_metrics(path) if path.exists() else []
        return {int(line["step"]): line["train/loss"] for line in lines if "train/loss" in line}

    def wait_for_step(self, job: str, step: int, since: int = 0) -> None:
        """Until the run has come that far, in text that the job wrote after ``since`` characters of its log."""

        def there() -> bool:
            state = self.lab.job(job)["JobState"]
            assert state in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"), f"{state}\n{self.log(job)}"
            return "first step done" in self.log(job)[since:] and max(self.losses(), default=0) >= step

        wait_until(there, START, f"step {step}")

    def stopped_at(self, job: str) -> int:
        """The step at which the run was last saved by a signal."""
        found = re.findall(r"stopped at step (\d+)", self.log(job))
        return int(found[-1]) if found else 0

    def end_at(self, step: int) -> None:
        """The job, when it starts again, has this as its last step."""
        (kept,) = (self.folder / "logs" / "slurm").glob("*-run.yaml")
        kept.write_text(yaml.safe_dump(with_keys(self.tree, train={"steps": step})))

    def undisturbed(self, steps: int) -> dict[int, float]:
        """The losses of the same run at the same layout, left alone."""
        quiet = in_folder(self.tree, self.folder / "quiet")
        quiet = with_keys(quiet, train={"steps": steps}, checkpoint={"interval": MANY})
        run_ranks(run_to_the_end, 4, quiet, timeout=600)
        return losses_of(quiet)


def environment(folder: Path) -> Path:
    """A small Python environment that says where it lies when it is started."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    speaks = "import sys; sys.stderr.write(f'Python of {sys.prefix}\\n')"
    (packages / "this.pth").write_text("\n".join([*site.getsitepackages(), speaks]) + "\n")
    return folder


def newest_checkpoint(run: Run) -> int:
    return max(int(path.name.removeprefix("step-")) for path in (run.folder / "checkpoints").glob("step-*"))


@pytest.mark.cluster_quick
def test_submit_trains_to_the_losses_of_one_process(lab, text, tmp_path):
    """Two nodes with two ranks each; a chained job finds nothing left to do; rank 0 speaks in the job's log."""
    run = Run(lab, text, tmp_path, model={"dropout": 0.0})
    stage = environment(tmp_path / "env")
    (tmp_path / "site.sh").write_text('echo "set up on $SLURMD_NODENAME" >&2')
    options = ("--time=30", "--chain=1", f"--stage={stage}", "--setup=site.sh")
    first, second = run.submit("--nodes=2", "--ranks-per-node=2", *options)
    assert lab.wait_for(first, "COMPLETED", START)["NumNodes"] == "2"
    log = run.log(first)
    assert "Slurm (srun): 4 rank(s)" in log
    assert f"Python of {tmp_path}/disk/peer_dist-{first}/node" in log, "from the node's disk"
    assert "set up on node" in log
    assert "first step done" in log
    assert {path.name for path in (tmp_path / "logs/slurm" / f"{first}.0").iterdir()} == {
        f"rank-{rank}-node-{rank // 2}.log" for rank in range(4)
    }
    alone = with_keys(
        run.tree,
        parallel={"expert": 1},
        train={"micro_batch_size": 8},
        checkpoint={"dir": str(tmp_path / "alone")},
        logging={"dir": str(tmp_path / "alone-logs")},
    )
    run_ranks(run_to_the_end, 1, alone)
    want = {int(x["step"]): x["train/loss"] for x in read_metrics(tmp_path / "alone-logs" / "metrics.jsonl")[1:]}
    assert run.losses() == pytest.approx(want, rel=1e-5)
    lab.wait_for(second, "COMPLETED", START)
    assert "nothing to do" in run.log(second)
    assert not (tmp_path / "checkpoints" / "run.lock").exists()
    assert not any((tmp_path / "disk").glob("*")), "the nodes' disks are left clean"


@pytest.mark.cluster_quick
def test_a_time_limit_saves_requeues_and_changes_nothing(lab, text, tmp_path):
    """Slurm's signal before the limit: a checkpoint, the same job again, the losses of a run left alone."""
    run = Run(lab, text, tmp_path, train={"steps": MANY}, checkpoint={"interval": MANY})
    (job,) = run.submit("--nodes", "2", "--ranks-per-node", "2", "--time", "60", "--signal-lead", "600")
    run.wait_for_step(job, 3)
    seconds = sum(int(part) * 60**power for power, part in enumerate(reversed(lab.job(job)["RunTime"].split(":"))))
    lab.run("scontrol", "update", f"JobId={job}", f"TimeLimit={seconds // 60 + 5}")  # less than the lead is left
    stopped = int(wait_until(lambda: run.stopped_at(job), 120, "saved before the limit"))
    run.end_at(stopped + 10)
    lab.wait_for(job, "PENDING", 60)
    lab.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    state = lab.wait_for(job, "COMPLETED", START)
    assert state["Restarts"] == "1", run.log(job)
    log = run.log(job)
    assert "SIGUSR1: the run is asked to save and leave" in log
    assert "requeued" in log
    assert f"going on from step {stopped}" in log
    losses = run.losses()
    assert max(losses) == stopped + 10
    assert losses == run.undisturbed(stopped + 10)


def test_a_second_job_is_refused_and_a_cancelled_one_has_saved(lab, text, tmp_path):
    """One writer per folder; scancel leaves a checkpoint, no lock, and no job that comes again."""
    run = Run(lab, text, tmp_path, train={"steps": MANY}, checkpoint={"interval": MANY})
    packed = shutil.make_archive(str(tmp_path / "env"), "gztar", environment(tmp_path / "env"))
    (job, follower) = run.submit("--nodes=1", "--ranks-per-node=2", "--time=60", f"--stage={packed}", "--chain=1")
    run.wait_for_step(job, 3)
    assert f"Python of {tmp_path}/disk/peer_dist-{job}/node" in run.log(job), "from the node's disk"
    (duplicate,) = run.submit("--nodes", "2", "--ranks-per-node", "2", "--time", "60")
    assert lab.wait_for(duplicate, "FAILED", START)["ExitCode"] == "2:0"
    assert re.search(rf"error: {tmp_path}/checkpoints: another run writes there \(Slurm job {job},", run.log(duplicate))
    assert "another attempt would not mend" in run.log(duplicate)
    lab.run("scancel", job)
    lab.wait_for(job, "CANCELLED", 120)
    wait_until(lambda: not lab.run("squeue", "-h", "-j", job), 90, "the job has left its nodes")
    stopped = run.stopped_at(job)
    assert stopped == newest_checkpoint(run) == max(run.losses())
    assert not (tmp_path / "checkpoints" / "run.lock").exists()
    assert lab.job(job)["Restarts"] == "0"
    assert not (tmp_path / "disk" / f"peer_dist-{job}").exists(), "its nodes' disks are left clean"
    lab.wait_for(follower, "FAILED", 60)
    assert "the chain was ended by a job before (code 75)" in run.log(follower)


def test_a_signal_while_the_doctor_examines_is_no_finding(lab, text, tmp_path):
    run = Run(lab, text, tmp_path, train={"steps": MANY})
    (job,) = run.submit("--nodes=2", "--ranks-per-node=1", "--time=30", "--doctor")
    wait_until((tmp_path / "logs/slurm" / f"{job}.0" / "doctor-1.log").exists, START, "the doctor")
    lab.run("scancel", "--signal=USR1", "--batch", job)
    wait_until(lambda: "ended with code 75 before its last step; requeued" in run.log(job), 60, "requeued")
    assert lab.wait_for(job, "PENDING", 60)["Restarts"] == "1"


def test_a_preempted_job_saves_and_comes_back(lab, text, tmp_path):
    """A job of a higher partition wants all nodes; the run leaves within its grace time, and goes on afterwards."""
    run = Run(lab, text, tmp_path, train={"steps": MANY}, checkpoint={"interval": MANY})
    (job,) = run.submit("--nodes", "2", "--ranks-per-node", "2", "--time", "60")
    run.wait_for_step(job, 3)
    seen = len(run.log(job))
    urgent = ["sbatch", "--parsable", "-p", "high", "-N3", "-n6", "-t5", "-o", "/dev/null", "--wrap", "srun hostname"]
    high = lab.run(*urgent)
    lab.wait_for(high, "COMPLETED", 180)
    stopped = int(wait_until(lambda: run.stopped_at(job), 60, "saved when preempted"))
    run.end_at(stopped + 10)
    state = lab.wait_for(job, "COMPLETED", START)
    assert state["Restarts"] == "1", run.log(job)
    assert f"going on from step {stopped}" in run.log(job)[seen:]
    losses = run.losses()
    assert max(losses) == stopped + 10
    assert losses == run.undisturbed(stopped + 10)


def test_the_doctor_goes_first(lab, text, tmp_path):
    """On the ranks that will train; a rank far slower than others, as here where the machine is busy, ends the job."""
    run = Run(lab, text, tmp_path, train={"steps": 2})
    (job,) = run.submit("--nodes=2", "--ranks-per-node=1", "--time=30", "--doctor")
    state = wait_until(lambda: lab.job(job)["JobState"] in ("COMPLETED", "FAILED") and lab.job(job), START, "its end")
    log, logs = run.log(job), {path.name for path in (tmp_path / "logs/slurm" / f"{job}.0").iterdir()}
    assert {"doctor-0.log", "doctor-1.log"} <= logs
    if state["JobState"] == "COMPLETED":
        assert re.search(r"ready: \d+ ok, \d+ warn, 0 fail", log)
        assert max(run.losses()) == 2
    else:
        assert re.findall(r"^(.+?)\s+fail\b", log, re.MULTILINE) == ["speed of ranks"]
        assert "peer-dist doctor found something (code 1)" in log
        assert not run.losses()


def test_a_power_cut_moves_the_run_to_other_nodes(lab, text, tmp_path):
    """The node of rank 0 and of the batch script is gone; the job starts again on the others, from its checkpoint."""
    run = Run(lab, text, tmp_path, train={"steps": MANY}, checkpoint={"interval": 25})
    (job,) = run.submit("--nodes", "2", "--ranks-per-node", "2", "--time", "60")
    run.wait_for_step(job, 30)
    seen = len(run.log(job))
    (victim, *_) = lab.run("scontrol", "show", "hostnames", lab.job(job)["NodeList"]).split()
    lab.power_cut(victim)
    try:
        reached = max(run.losses())
        run.end_at(reached + 30)
        state = lab.wait_for(job, "COMPLETED", START)
        nodes = lab.run("scontrol", "show", "hostnames", state["NodeList"]).split()
        assert victim not in nodes
        assert int(state["Restarts"]) >= 1
        log = run.log(job)[seen:]
        assert "taken over from a run that was this job before it was requeued" in log
        assert re.search(r"going on from step \d*(25|50|75|00)\b", log)
        losses = run.losses()
        assert max(losses) == reached + 30
        assert losses == run.undisturbed(reached + 30)
    finally:
        lab.power_on(victim)
        wait_until(lambda: lab.run("sinfo", "-h", "-n", victim, "-p", "debug", "-o", "%t") == "idle", 90, "it is back")
