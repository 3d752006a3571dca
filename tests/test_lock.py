"""The lock of a run's folder: one writer, and those that are gone lose it."""

import dataclasses
import json
import os
import time

import pytest

from peer_dist.ranks import lock as lock_module
from peer_dist.ranks.lock import Holder, LockError, RunLock, run_lock
from tests.ranks import run_ranks


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "TORCHELASTIC_"))]:
        monkeypatch.delenv(name)


def holds(folder, **changes):
    """Write a lock as another run would have."""
    holder = dataclasses.replace(Holder.current(), **changes)
    folder.mkdir(exist_ok=True)
    (folder / "run.lock").write_text(json.dumps(dataclasses.asdict(holder)))
    return folder


def squeue(monkeypatch, tmp_path, script):
    """A Slurm that answers so."""
    command = tmp_path / "bin" / "squeue"
    command.parent.mkdir()
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")


ELSEWHERE = {"host": "node7", "machine": "another boot pid:[1]", "pid": 1}


def test_one_writer(tmp_path):
    with RunLock(tmp_path) as first:
        assert not first.note
        with pytest.raises(LockError, match=f"process {os.getpid()} on .*delete .*run.lock"), RunLock(tmp_path):
            pass
    assert not list(tmp_path.iterdir())
    with RunLock(tmp_path) as again:
        assert not again.note


def test_a_process_that_has_ended_loses_it(tmp_path):
    child = os.fork()
    if child == 0:
        RunLock(tmp_path).__enter__()
        os._exit(0)
    os.waitpid(child, 0)
    with RunLock(tmp_path) as mine:
        assert "has ended (process" in mine.note


def test_a_later_process_with_its_pid_is_not_it(tmp_path):
    with RunLock(holds(tmp_path, started="1")) as mine:
        assert "has ended" in mine.note


def test_elsewhere_only_silence_counts(tmp_path):
    holds(tmp_path, **ELSEWHERE)
    with pytest.raises(LockError, match=r"process 1 on node7.*last seen 0 s ago"), RunLock(tmp_path):
        pass
    old = time.time() - lock_module.STALE_SECONDS - 60
    os.utime(tmp_path / "run.lock", (old, old))
    with RunLock(tmp_path) as mine:
        assert "no life for 11 minutes" in mine.note


def test_a_silent_process_of_this_machine_that_is_there_keeps_it(tmp_path):
    holds(tmp_path)
    os.utime(tmp_path / "run.lock", (0, 0))
    with pytest.raises(LockError), RunLock(tmp_path):
        pass


def test_a_requeued_job_takes_its_own_over(tmp_path, monkeypatch):
    holds(tmp_path, **ELSEWHERE, job="12@lab", restart=0)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "lab")
    with pytest.raises(LockError, match="Slurm job 12, process"), RunLock(tmp_path):
        pass
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with RunLock(tmp_path) as mine:
        assert "before it was requeued" in mine.note
        # what the job before still runs on a lost node must not stop this one
        monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
        with pytest.raises(LockError, match=r"12 \(restart 1\)"), RunLock(tmp_path):
            pass


def test_torchrun_goes_on_without_the_node_of_rank_0(tmp_path, monkeypatch):
    """Within one run: the others of its nodes would otherwise wait for the lost one's silence."""
    holds(tmp_path, **ELSEWHERE, elastic="mine@node1:29400")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    monkeypatch.setenv("RDZV_ENDPOINT", "node2:29400")
    with pytest.raises(LockError), RunLock(tmp_path):
        pass
    monkeypatch.setenv("RDZV_ENDPOINT", "node1:29400")
    with RunLock(tmp_path) as mine:
        assert "torchrun has lost or left out" in mine.note


@pytest.mark.parametrize(
    ("script", "free"),
    [
        ("echo RUNNING", False),
        ("echo COMPLETING", False),
        ("echo PENDING", True),
        ("echo TIMEOUT", True),
        ("echo slurm_load_jobs error: Invalid job id specified >&2; exit 1", True),
        ("echo slurm_load_jobs error: Unable to contact slurm controller >&2; exit 1", False),
    ],
)
def test_slurm_says_whether_another_job_runs(tmp_path, monkeypatch, script, free):
    squeue(monkeypatch, tmp_path, script)
    folder = holds(tmp_path / "run", **ELSEWHERE, job="12@lab")
    monkeypatch.setenv("SLURM_JOB_ID", "13")
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "lab")
    if free:
        with RunLock(folder) as mine:
            assert "Slurm job 12" in mine.note
    else:
        with pytest.raises(LockError, match="Slurm job 12"), RunLock(folder):
            pass


def test_a_lock_cut_off_while_written(tmp_path):
    (tmp_path / "run.lock").touch()
    with pytest.raises(LockError, match="unnamed"), RunLock(tmp_path):
        pass
    os.utime(tmp_path / "run.lock", (0, 0))
    with RunLock(tmp_path) as mine:
        assert "left no name" in mine.note


def test_it_is_renewed_and_its_loss_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "HEARTBEAT_SECONDS", 0.05)
    with RunLock(tmp_path) as mine:
        os.utime(mine.path, (0, 0))
        wait_for(lambda: mine.path.stat().st_mtime > 0)
        assert not mine.lost
        holds(tmp_path, **ELSEWHERE)
        wait_for(lambda: mine.lost)
    assert (tmp_path / "run.lock").exists(), "another's lock is left alone"


def wait_for(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def race(rank, world_size, folder):
    """All ranks, each for itself, find the same dead run's lock."""
    import torch.distributed as dist

    dist.barrier()
    try:
        with RunLock(folder):
            dist.barrier()
            return "has it"
    except LockError:
        dist.barrier()
        return "refused"


def test_one_of_many_takes_a_stale_lock(tmp_path):
    for attempt in range(3):
        folder = holds(tmp_path / str(attempt), started="1")
        assert sorted(run_ranks(race, 4, str(folder))) == ["has it"] + ["refused"] * 3


def lock_together(rank, world_size, folder):
    try:
        with run_lock(folder, rank) as lock:
            return lock is not None
    except LockError as error:
        return str(error)


def test_all_ranks_go_on_or_none(tmp_path):
    assert run_ranks(lock_together, 2, str(tmp_path)) == [True, False]
    with RunLock(tmp_path):
        first, second = run_ranks(lock_together, 2, str(tmp_path))
    assert first == second
    assert "another run writes there" in first
