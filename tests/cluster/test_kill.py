"""Runs killed with SIGKILL again and again, in any moment and inside saves, end as one that was left alone.

The same command starts again after each kill. Where it is killed is drawn from a seed: at a moment of the run's time,
or at one of the things that a save does to the disk (a file opened, synced, renamed, a folder made or removed) and then
up to some milliseconds later, inside the writing of a file.
"""

import json
import os
import random
import re
import signal
import sys
import threading
import time
import zlib
from pathlib import Path

import pytest

from peer_dist.ranks.exit_codes import DONE, PEER_LOST
from tests.ranks import Command
from tests.runs import command, in_folder, metrics_of, with_keys

STEPS = 12


def arm(rank, folder, plan):
    """Prepare this rank to be killed as planned; without a plan, write down how long it runs and what its saves do.

    A plan has: victims (ranks), watched (the one that counts), and either ``start`` or ``run``, the seconds after the
    command's start or the training's, or ``event``, how manieth of its changes to the checkpoints, and ``late``, the
    seconds after that.
    """
    from peer_dist.training import Trainer

    folder = Path(folder)
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    begin, events = time.monotonic(), [0]
    inside = re.compile(r"/checkpoints(/\.?step-.*)?$")

    def kill(late):
        time.sleep(late)
        (folder / "killed").touch()
        pids = [int((folder / f"pid-{victim}").read_text()) for victim in plan["victims"]]
        for pid in sorted(pids, key=lambda pid: pid == os.getpid()):  # itself last
            os.kill(pid, signal.SIGKILL)

    def after(seconds):
        threading.Thread(target=kill, args=(seconds,), daemon=True).start()

    def changes(path, synced=False):
        found = inside.search(str(path))
        if not found or not (found[1] or synced):  # the folder of all is made before any save
            return
        events[0] += 1
        if plan and rank == plan["watched"] and events[0] == plan.get("event"):
            after(plan["late"]) if plan["late"] else kill(0)

    def hook(name, args):
        if name in ("os.mkdir", "os.rename", "os.remove", "os.rmdir") or (
            name == "open" and isinstance(args[0], str) and isinstance(args[1], str) and set(args[1]) & set("wax+")
        ):
            changes(args[0])

    sync, run = os.fsync, Trainer.run

    def counted_sync(handle):
        changes(os.readlink(f"/proc/self/fd/{handle}"), synced=True)
        sync(handle)

    def timed_run(self, *args):
        started = time.monotonic()
        if plan and rank == plan["watched"] and "run" in plan:
            after(plan["run"])
        result = run(self, *args)
        if not plan:
            told = {"start": started - begin, "run": time.monotonic() - started, "events": events[0]}
            (folder / f"told-{rank}").write_text(json.dumps(told))
        return result

    os.fsync, Trainer.run = counted_sync, timed_run
    sys.addaudithook(hook)
    if plan and rank == plan["watched"] and "start" in plan:
        after(plan["start"])


def plans(seed, told, moments, saves):
    """So many kills in random moments, a fifth of them before training begins, and inside saves, shuffled."""
    draw = random.Random(seed)
    made = []
    for number in range(moments + saves):
        watched = draw.randrange(2)
        plan = {"watched": watched, "victims": draw.choice([[0, 1], [watched]]), "asynchronous": draw.random() < 0.5}
        if number >= moments:
            plan |= {"event": draw.randint(1, told[watched]["events"]), "late": draw.choice([0, draw.uniform(0, 0.02)])}
        elif number % 5 == 0:
            plan |= {"start": draw.uniform(0, told[watched]["start"])}
        else:
            plan |= {"run": draw.uniform(0, told[watched]["run"])}
        made.append(plan)
    draw.shuffle(made)
    return made


def complete_steps(tree):
    """The steps that have a checkpoint, each compared with its manifest byte for byte."""
    folder, steps = Path(tree["checkpoint"]["dir"]), []
    for path in sorted(folder.glob("step-*")) if folder.exists() else []:
        manifest = json.loads((path / "manifest.json").read_text())
        for name, (size, checksum) in manifest["files"].items():
            content = (path / name).read_bytes()
            assert [len(content), zlib.crc32(content)] == [size, checksum], path / name
        steps.append(manifest["step"])
    return steps


def outcome(tree):
    """All that a run leaves: its numbers, step by step, and its last checkpoint's tensors, by checksum."""
    timed = ("time/", "speed/", "memory/", "startup/", "checkpoint/")
    numbers = [{k: v for k, v in line.items() if not k.startswith(timed)} for line in metrics_of(tree)]
    manifest = json.loads((Path(tree["checkpoint"]["dir"]) / f"step-{STEPS:08d}" / "manifest.json").read_text())
    return numbers, {name: value for name, value in manifest["files"].items() if name.endswith(".distcp")}


def killed_again_and_again(small, tmp_path, seed, moments, saves):
    small = with_keys(
        small,
        model={"num_layers": 2, "mlp": ["dense", "peer"], "dropout": 0.1},
        parallel={"expert": 2},
        train={"steps": STEPS, "watchdog_seconds": 10},
        checkpoint={"interval": 3},
        evaluation={"interval": 4},
        logging={"interval": 3},  # windows of expert usage that begin where checkpoints are
    )

    def place(name):
        return in_folder(small, tmp_path / name)

    quiet = place("quiet")
    with command(quiet, tmp_path, (arm, str(tmp_path), None)) as run:
        assert run.codes(120) == [DONE, DONE], run.words(0)
    told = [json.loads((tmp_path / f"told-{rank}").read_text()) for rank in range(2)]
    wanted = outcome(quiet)

    number, kills, ends, tree = 0, {"run": 0, "start": 0, "event": 0}, 0, place("run-0")
    waiting = plans(seed, told, moments, saves)
    draw = random.Random(seed + 1)
    while True:
        plan = waiting.pop() if waiting else None
        before = complete_steps(tree)
        (tmp_path / "killed").unlink(missing_ok=True)
        tree = with_keys(tree, checkpoint={"asynchronous": bool(plan and plan["asynchronous"])})
        with command(tree, tmp_path, (arm, str(tmp_path), plan) if plan else None) as run:
            codes = wait_for(run, plan)
            words = run.words(0)
        if (tmp_path / "killed").exists():
            (kind,) = {"run", "start", "event"} & plan.keys()
            kills[kind] += 1
            print(sum(kills.values()), kind, plan["victims"], codes, flush=True)
            if kind != "start":
                survivors = [code for rank, code in enumerate(codes) if rank not in plan["victims"]]
                assert set(survivors) <= {PEER_LOST, DONE}, (plan, codes, words)
        else:
            assert codes == [DONE, DONE], (plan, codes, words)
            if plan:  # it came to its end before: the same kind of kill again, at another place
                limit = told[plan["watched"]]
                for key, most in (("start", limit["start"]), ("run", limit["run"])):
                    plan |= {key: draw.uniform(0, most)} if key in plan else {}
                plan |= {"event": draw.randint(1, limit["events"])} if "event" in plan else {}
                waiting.append(plan)
        if "going on from step" in words:
            resumed = int(words.split("going on from step ")[1].split()[0])
            assert resumed == max(before), "the newest that was complete"
        elif "starting at step 0" in words:
            assert not before
        complete_steps(tree)
        if codes == [DONE, DONE] or (DONE in codes and STEPS in complete_steps(tree)):
            for got, want in zip(outcome(tree), wanted):
                assert got == want
            ends, number = ends + 1, number + 1
            tree = place(f"run-{number}")
            if plan is None:
                break
    assert kills["event"] == saves
    assert kills["run"] + kills["start"] == moments
    print(f"{sum(kills.values())} kills ({kills}), {ends} runs came to their end")


def wait_for(run: Command, plan) -> list[int | None]:
    """Exit codes. A rank that is killed before the others have met it leaves them waiting: a launcher ends them."""
    deadline = time.monotonic() + 120
    while any(process.is_alive() for process in run.processes) and time.monotonic() < deadline:
        if plan and "start" in plan and any(process.exitcode for process in run.processes):
            for process in run.processes:
                process.kill()
        time.sleep(0.02)
    return run.codes(1)


def test_four_kills_change_nothing(small, tmp_path):
    killed_again_and_again(small, tmp_path, 1, moments=2, saves=2)


@pytest.mark.cluster
@pytest.mark.timeout(1800)
def test_fifty_kills_change_nothing(small, tmp_path):
    killed_again_and_again(small, tmp_path, 2, moments=30, saves=20)
