"""Dead and hung ranks: every other one leaves, in time, saying which it was."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from peer_dist.ranks.exit_codes import DIVERGED, DONE, PEER_LOST
from peer_dist.ranks.watchdog import record_nccl
from tests.ranks import run_ranks
from tests.runs import command, losses_of, with_keys


def misbehave(rank, who, at, where, how, *more):
    """Make rank ``who`` do something in a phase of step ``at``."""
    from peer_dist.checkpoints import store
    from peer_dist.tracing import position
    from peer_dist.training import Trainer, trainer

    if rank != who:
        return
    acts = {
        "die": lambda: (time.sleep(1), os.kill(os.getpid(), signal.SIGKILL)),  # a second: to be heard of
        "freeze": lambda: (time.sleep(1), os.kill(os.getpid(), signal.SIGSTOP)),
        "hang": lambda: time.sleep(3600),
        "raise": lambda: (time.sleep(1), [].pop()),
        "pause": lambda: time.sleep(more[0]),
    }

    def wrap(owner, name):
        real = getattr(owner, name)

        def wrapped(*args, **kwargs):
            if position.step == at:
                acts[how]()
            return real(*args, **kwargs)

        setattr(owner, name, wrapped)

    if where == "step":
        wrap(Trainer, "_micro_batches")
    elif where == "experts":
        from peer_dist.sharding import dispatch

        wrap(dispatch, "expert_mix_forward")
    elif where == "save":
        wrap(store, "sync_and_checksum")
    elif where == "validation":
        wrap(trainer, "held_out_loss")


@pytest.fixture
def watched(small):
    return with_keys(small, parallel={"expert": 2}, train={"watchdog_seconds": 4, "steps": 8})


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("where", ["step", "save"])
def test_a_rank_that_dies_is_named(watched, tmp_path, who, where):
    """By the other one, whichever hosts the store; the same command goes on."""
    with command(watched, tmp_path, (misbehave, who, 6 if where == "step" else 4, where, "die")) as run:
        codes = run.codes(60)
        assert codes[who] == -signal.SIGKILL
        assert codes[1 - who] == PEER_LOST, run.words(1 - who)
        assert f"rank {who} is gone: " in run.words(1 - who)
        assert f"last in {'step 6' if where == 'step' else 'save'}" in run.words(1 - who)
        assert "Traceback" not in run.words(1 - who)
    with command(watched, tmp_path) as run:
        assert run.codes(60) == [DONE, DONE], run.words(0)
    assert sorted(losses_of(watched)) == list(range(1, 9))


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("where", ["step", "experts"])
def test_a_rank_that_hangs_is_named_and_all_leave(watched, tmp_path, who, where):
    with command(watched, tmp_path, (misbehave, who, 6, where, "hang")) as run:
        begin = time.monotonic()
        assert run.codes(90) == [PEER_LOST, PEER_LOST], run.words(0) + run.words(1)
        for rank in range(2):
            assert f"rank {who} hangs: nothing for 4" in run.words(rank)
            assert "last in step 6" in run.words(rank)
            assert f"(rank {1 - who})" in run.words(rank)
        assert time.monotonic() - begin < 60


@pytest.mark.parametrize("who", [0, 1])
def test_a_rank_that_is_frozen_is_named(watched, tmp_path, who):
    """Its threads stand still too; woken, it leaves as well."""
    with command(watched, tmp_path, (misbehave, who, 6, "step", "freeze")) as run:
        deadline = time.monotonic() + 60
        while run.processes[1 - who].is_alive() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert run.processes[1 - who].exitcode == PEER_LOST, run.words(1 - who)
        assert f"rank {who} is gone: no " in run.words(1 - who)
        assert "last in step 6" in run.words(1 - who)
        os.kill(run.processes[who].pid, signal.SIGCONT)
        assert run.codes(60)[who] == PEER_LOST, run.words(who)


def test_a_rank_that_fails_is_quoted(watched, tmp_path):
    with command(watched, tmp_path, (misbehave, 1, 6, "step", "raise")) as run:
        assert run.codes(60) == [PEER_LOST, 1], run.words(0)
        assert "rank 1 is gone: it failed with IndexError: pop from empty list, last in step 6" in run.words(0)
        assert "IndexError: pop from empty list" in run.words(1)


@pytest.mark.parametrize(("where", "at"), [("save", 4), ("validation", 5)])
def test_long_saves_and_validations_are_no_hangs(watched, tmp_path, where, at):
    watched = with_keys(watched, train={"watchdog_seconds": 2})
    with command(watched, tmp_path, (misbehave, 1, at, where, "pause", 5)) as run:
        assert run.codes(90) == [DONE, DONE], run.words(0)


def test_without_a_watchdog_a_broken_connection_is_still_one_sentence(watched, tmp_path):
    watched = with_keys(watched, train={"watchdog_seconds": 0})
    with command(watched, tmp_path, (misbehave, 1, 6, "step", "die")) as run:
        assert run.codes(60) == [PEER_LOST, -signal.SIGKILL]
        assert "error: another rank is gone: " in run.words(0)
        assert "Traceback" not in run.words(0)


def threads_left(rank, world_size):
    """Names of the watchdog's threads after it, each of whose turns had taken a while."""
    from peer_dist.ranks.watchdog import Watchdog

    class Slow(Watchdog):
        def _turn(self, beat, passed):
            super()._turn(beat, passed)
            time.sleep(0.5)

    with Slow(4):
        time.sleep(0.3)
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("watchdog")]


def test_its_threads_end_before_python_does():
    """One that is inside the store when Python shuts down would abort a process that has done its work."""
    assert run_ranks(threads_left, 2) == [[], []]


def die_where_nccl_does_not_answer(rank, who):
    from peer_dist.ranks import watchdog

    watchdog._DUMP_SECONDS = 0.5
    watchdog.Watchdog._dump_nccl = lambda self: time.sleep(3600)
    misbehave(rank, who, 2, "step", "die")


def test_nobody_waits_for_the_record_of_nccl(watched, tmp_path):
    """The sentence comes first, and the process leaves even if the record never does."""
    with command(watched, tmp_path, (die_where_nccl_does_not_answer, 1)) as run:
        assert run.codes(60) == [PEER_LOST, -signal.SIGKILL], run.words(0)
        assert "rank 1 is gone: " in run.words(0)


def test_nccl_is_told_where_to_write_its_record(tmp_path, monkeypatch):
    """By the names of every version of torch, into a folder that is there; what the launcher said stays."""
    names = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
    for name in (*names, "TORCH_NCCL_DUMP_ON_TIMEOUT"):  # so that what is set here is undone
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    record_nccl(tmp_path / "new" / "logs")
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    record_nccl(tmp_path / "new" / "logs")
    assert [os.environ[name] for name in names] == ["2000", "2000", str(tmp_path / "new" / "logs" / "nccl_trace_rank_")]
    assert (tmp_path / "new" / "logs").is_dir()
    del os.environ["TORCH_NCCL_TRACE_BUFFER_SIZE"]
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "20000")
    monkeypatch.setenv("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", str(tmp_path / "theirs" / "nccl-trace-"))
    record_nccl(tmp_path / "other")
    assert (os.environ["TORCH_NCCL_TRACE_BUFFER_SIZE"], (tmp_path / "theirs").is_dir()) == ("20000", True)
    assert not (tmp_path / "other").exists()


def diverge(rank):
    from peer_dist.training.guard import Guard

    Guard.is_spike = lambda self, loss: True


def test_a_run_that_diverges_leaves_with_its_own_code(watched, tmp_path):
    with command(with_keys(watched, guard={"max_skipped_steps": 2}), tmp_path, (diverge,)) as run:
        assert run.codes(60) == [DIVERGED, DIVERGED], run.words(0) + run.words(1)
        assert "2 steps in a row, up to step 2, were left out (loss spike)" in run.words(0)
        assert run.words(1).count("left out") == 0
    report = Path(watched["logging"]["dir"]) / "diverged-step-00000002.json"
    assert json.loads(report.read_text())["spikes"] == 2
