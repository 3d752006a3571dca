"""Whatever the system has no more of is named in a sentence with its limit, and no process waits for it for ever."""

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from peer_dist.shortage import ShortageError, check_room, shortage
from tests.ranks import run_each, run_ranks
from tests.runs import in_folder, losses_of, make_trainer, run_to_the_end, with_keys

NO_FILE = "/somewhere/file"
ERRORS = {
    "memory: more was asked for": [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("std::bad_alloc"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
    ],
    "memory: 17.2 GB more was asked for": [
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
            "allocate 17179869184 bytes. Error code 12 (Cannot allocate memory)"
        )
    ],
    "memory of the GPU: 2.00 GiB was asked for": [
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB")
    ],
    "open files: ": [
        OSError(errno.EMFILE, "Too many open files", NO_FILE),
        OSError(errno.ENFILE, "Too many open files in system"),
        RuntimeError("[enforce fail at gloo/transport/tcp/loop.cc:105] fd_ != -1. epoll_create: Too many open files"),
    ],
    "threads: ": [
        RuntimeError("can't start new thread"),
        RuntimeError("Resource temporarily unavailable"),
        OSError(errno.EAGAIN, "Resource temporarily unavailable")
        if not hasattr(os, "fork")
        else RuntimeError("thread constructor failed: Resource temporarily unavailable"),
    ],
    f"{NO_FILE}: no space is left on the disk": [OSError(errno.ENOSPC, "No space left on device", NO_FILE)],
    f"{NO_FILE}: the disk quota is used up": [OSError(errno.EDQUOT, "Disk quota exceeded", NO_FILE)],
    f"{NO_FILE}: a file may not be larger than ulimit -f": [OSError(errno.EFBIG, "File too large", NO_FILE)],
}


@pytest.mark.parametrize("sentence", ERRORS)
def test_each_is_named_however_a_library_says_it(sentence):
    """Also where the error is another one's cause."""
    for error in ERRORS[sentence]:
        outer = ValueError("something else")
        outer.__context__ = error
        for said in (shortage(error), shortage(outer)):
            assert said is not None, error
            assert said.startswith(sentence)
            assert "\n" not in said


def test_nothing_else_is_taken_for_one():
    for error in (ValueError("x"), OSError(errno.ENOENT, "No such file"), RuntimeError("gloo: read: again")):
        assert shortage(error) is None


LIMITS = {  # a limit of this process: its name, and how far above what it has
    "open files: this process may have no more than ulimit -n": (resource.RLIMIT_NOFILE, 40),
    "memory: 1.6 GB more was asked for than this process can have (ulimit -v": (resource.RLIMIT_AS, 1 << 30),
}


def room_said(number, value):
    """What is said under a limit; it is of this process, which ends."""
    if number == resource.RLIMIT_AS:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        value += pages * resource.getpagesize()
    resource.setrlimit(number, (value, value))
    try:
        check_room()
    except ShortageError as error:
        return str(error)
    return "there is room"


@pytest.mark.parametrize("sentence", LIMITS)
def test_a_limit_is_known_before_ranks_meet(sentence):
    ((said),) = run_each(room_said, [LIMITS[sentence]])
    assert said.startswith(sentence)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of Linux")
@pytest.mark.parametrize(("option", "value"), [("v", 150_000), ("v", 1_205_000), ("n", 40)])
def test_a_command_ends_by_a_sentence(small, tmp_path, option, value):
    """From the start of the interpreter on: imports, groups that are half made, the end of the process."""
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(small))
    line = f"ulimit -{option} {value}; exec {sys.executable} -m peer_dist train -c {config}"
    ended = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert f"ulimit -{option}" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "checkpoints").exists()
    assert not (tmp_path / "logs").exists()


def with_full_disk(rank, world_size, tree, full, most, asynchronous):
    """A run in which one rank, ``full``, can in saves of some steps write no file larger than ``most`` says.

    Its exit code, or the error. A limit of the system stands for the disk.
    """
    from peer_dist.config import parse_config
    from peer_dist.megatron import CheckpointError
    from peer_dist.ranks.signals import StopRequest
    from peer_dist.training import Trainer

    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Full(Trainer):
        def save(self):
            if rank == full and self.steps_done in most:
                resource.setrlimit(resource.RLIMIT_FSIZE, (most[self.steps_done], unlimited[1]))
            try:
                path = super().save()
                if asynchronous and self.store._unfinished is not None:
                    self.store._unfinished.writer.join()
                return path
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)

    tree = with_keys(tree, checkpoint={"asynchronous": asynchronous})
    try:
        with StopRequest() as stop:
            return Full(parse_config(tree, "test")).run(stop)
    except CheckpointError as error:
        return str(error)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_outlives_a_full_disk(small, ranks, asynchronous):
    """A save that fails leaves nothing and changes nothing; the next one is made."""
    tree = with_keys(small, train={"steps": 6}, checkpoint={"interval": 2, "keep": 3}, evaluation={"interval": 9})
    quiet = in_folder(tree, Path(small["logging"]["dir"]).parent / "quiet")
    run_ranks(run_to_the_end, ranks, quiet)
    assert run_ranks(with_full_disk, ranks, tree, ranks - 1, {4: 20_000}, asynchronous) == [0] * ranks
    assert sorted(os.listdir(small["checkpoint"]["dir"])) == ["step-00000002", "step-00000006"]
    assert losses_of(tree) == losses_of(quiet)
    assert len(unsaved(tree)) == 1


def saves_without_room(rank, world_size, tree, full, limits):
    """What is said of a save under each limit on the size of a file, of rank ``full`` alone, and what is left then."""
    from peer_dist.megatron import CheckpointError

    trainer, said = make_trainer(tree), []
    trainer.step()
    trainer.save()
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    for most in limits:
        trainer.step()
        if rank == full:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, unlimited[1]))
        try:
            trainer.save()
            said.append("saved")
        except CheckpointError as error:
            said.append(str(error))
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    return said


@pytest.mark.parametrize(("ranks", "full"), [(1, 0), (2, 0), (2, 1)])
def test_every_file_of_a_checkpoint_can_be_the_one_without_room(small, ranks, full):
    """Each rank hears of it, nothing is left of it, and what was saved before stays."""
    limits = [0, 100, 1_000, 4_000, 20_000, 100_000]
    said = run_ranks(saves_without_room, ranks, small, full, limits)
    assert all(of_rank == said[0] for of_rank in said)
    for sentence in said[0]:
        assert "a file may not be larger than ulimit -f allows" in sentence
        assert "\n" not in sentence
    assert "(20000 bytes)" in said[0][4]
    assert os.listdir(small["checkpoint"]["dir"]) == ["step-00000001"]
    assert run_ranks(resumed_at, 1, small) == [1]


def test_the_last_save_must_be_made(small):
    """Or the run ends by the sentence."""
    tree = with_keys(small, train={"steps": 4}, checkpoint={"interval": 2}, evaluation={"interval": 9})
    (said,) = run_ranks(with_full_disk, 1, tree, 0, {4: 20_000}, False)
    assert "ulimit -f" in said
    assert os.listdir(small["checkpoint"]["dir"]) == ["step-00000002"]


def unsaved(tree):
    """What the events say of saves that failed."""
    lines = (Path(tree["logging"]["dir"]) / "events.jsonl").read_text().splitlines()
    return [event["told"] for event in map(json.loads, lines) if event["event"] == "checkpoint not saved"]


def resumed_at(rank, world_size, tree):
    return make_trainer(tree).steps_done


def looked_at(rank, world_size, folder):
    """What a run that would fall back makes of a sound checkpoint, on ranks of which one can open no file."""
    from peer_dist.checkpoints.store import CheckpointStore
    from peer_dist.megatron import CheckpointError

    store, before = CheckpointStore(folder), resource.getrlimit(resource.RLIMIT_NOFILE)
    if rank == world_size - 1:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        return str(store.newest(fall_back=True, say=print))
    except CheckpointError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_file_that_cannot_be_opened_now_is_not_taken_for_damaged(small, ranks):
    tree = with_keys(small, train={"steps": 4}, checkpoint={"interval": 2}, evaluation={"interval": 9})
    run_ranks(run_to_the_end, 1, tree)
    for said in run_ranks(looked_at, ranks, small["checkpoint"]["dir"]):
        assert "open files: this process may have no more than ulimit -n allows (3)" in said
    assert sorted(os.listdir(small["checkpoint"]["dir"])) == ["step-00000002", "step-00000004"]
