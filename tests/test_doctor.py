"""The doctor on real ranks: what is well passes, and each trouble names the rank that has it."""

import dataclasses
import json
import re
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml

from peer_dist.config.schema import Config
from peer_dist.doctor import checks
from peer_dist.planning import calibration
from peer_dist.planning.state import checkpoint_bytes
from peer_dist.ranks.examination import Check, Examination, Finding, Ranks, examine
from peer_dist.ranks.world import World
from tests.ranks import Command, run_command, run_ranks
from tests.runs import small_config


def _examined(rank, world_size, trouble=None, folder=None, seconds=20.0):
    """What the rank's report says after ``trouble`` was made on the last rank."""
    ours = list(checks.CHECKS)
    # Ranks of a busy machine differ for no fault of theirs.
    _replace(ours, "speed of ranks", lambda here: {"product": 0.01, "copy": 0.01})
    if trouble is not None:
        checks.WRITTEN_BYTES, checks.COLLECTIVE_BYTES = 1 << 20, (1 << 10, 1 << 12, 1 << 14)
    if trouble is not None and rank == world_size - 1:
        trouble(ours)
    config = None
    if folder is not None:
        values = small_config(Path("data"), Path(folder))
        values["train"]["global_batch_size"] = 12  # fits 1, 2 and 3 ranks
        config = Config(**values)
    start = time.monotonic()
    report = examine(World(rank, world_size, rank, world_size), ours, config, seconds)
    return report.json(), time.monotonic() - start


def _replace(ours, name, measure):
    number = next(number for number, check in enumerate(ours) if check.name == name)
    ours[number] = dataclasses.replace(ours[number], measure=measure)


def _reports(world_size, *args):
    texts = [text for text, _ in run_ranks(_examined, world_size, *args)]
    assert len(set(texts)) == 1  # the same on every rank, and so the same exit code
    return Examination.parse(texts[0])


def _failures(report):
    return {finding.check: finding.told for finding in report.findings if finding.verdict == "fail"}


@pytest.mark.parametrize("world_size", [1, 3])
def test_well(world_size, tmp_path):
    report = _reports(world_size, None, str(tmp_path))
    assert report.ok, report
    said = {finding.check: finding.told for finding in report.findings}
    assert set(said) == {"ranks", *(check.name for check in checks.CHECKS)}
    assert f"{world_size} rank" in said["ranks"]
    assert world_size == 1 or "GB/s" in said["collectives"]
    assert all(finding.advice or finding.verdict == "ok" for finding in report.findings)
    assert list(tmp_path.iterdir()) == []  # nothing is left behind, and the run's folders were not made
    assert json.loads(report.json())["ok"] is True


def _another_torch(ours):
    _replace(ours, "versions", lambda here: {**checks._versions(here), "torch": "2.6.0"})


def _elsewhere(ours, folder, **changes):
    """This rank's checkpoint.dir is another."""

    def measure(here):
        own = here.config.checkpoint.model_copy(update={"dir": folder(here)})
        here = dataclasses.replace(here, config=here.config.model_copy(update={"checkpoint": own}), **changes)
        return checks._shared(here)

    _replace(ours, "shared folders", measure)


def _unwritable(ours):
    _elsewhere(ours, lambda here: "/proc/nothing/checkpoints")  # where root cannot write either


def _own_folder(ours):
    """As if this rank's node had mounted something else there."""

    def folder(here):
        own = Path(here.config.checkpoint.dir).parent / "elsewhere"
        own.mkdir()
        return str(own)

    _elsewhere(ours, folder, seconds=4.0)


def _slow(ours):
    _replace(ours, "speed of ranks", lambda here: {"product": 0.05, "copy": 0.01})


def _clock_ahead(ours):
    real = checks._clock

    def measure(here):
        now = time.time
        checks.time.time = lambda: now() + 3600
        return real(here)

    _replace(ours, "clocks", measure)


def _corrupts(ours):
    def measure(here):
        real = dist.all_to_all_single

        def wrong(out, sent):
            real(out, sent)
            out[0] += 1

        dist.all_to_all_single = wrong
        return checks._collectives(here)

    _replace(ours, "collectives", measure)


@pytest.mark.parametrize(
    ("trouble", "check", "says"),
    [
        (_another_torch, "versions", ["rank 1 (", "torch 2.6.0, elsewhere"]),
        (_unwritable, "shared folders", ["rank 1 (", "nothing can be written to /proc (No such file"]),
        (_own_folder, "shared folders", ["does not see what", "rank 0 (", "rank 1 ("]),
        (_slow, "speed of ranks", ["rank 1 (", "5.0 times the median"]),
        (_clock_ahead, "clocks", ["rank 1 (", "3600", "ahead of rank 0"]),
        (_corrupts, "collectives", ["rank 1 (", "wrong result of all-to-all"]),
    ],
)
def test_trouble_is_named(trouble, check, says, tmp_path):
    report = _reports(2, trouble, str(tmp_path), 15.0)
    failures = _failures(report)
    assert set(failures) == {check}, report
    assert all(words in failures[check] for words in says), failures
    assert not report.ok


def _hangs(ours):
    _replace(ours, "writing", lambda here: time.sleep(600))


def _hangs_in_a_collective(ours):
    _replace(ours, "clocks", lambda here: time.sleep(600))


@pytest.mark.parametrize(
    ("trouble", "late"), [(_hangs, {"writing": {"rank 2"}}), (_hangs_in_a_collective, {"clocks": {"ranks 0"}})]
)
def test_a_check_that_hangs_is_reported_and_the_rest_goes_on(trouble, late, tmp_path):
    results = run_ranks(_examined, 3, trouble, str(tmp_path), 6.0)
    report = Examination.parse(results[0][0])
    assert all(text == results[0][0] for text, _ in results)
    failures = _failures(report)
    assert set(failures) == set(late)
    for check, who in late.items():
        assert all(failures[check].startswith(name) for name in who), failures
    assert max(seconds for _, seconds in results) < 60
    skipped = {finding.check for finding in report.findings if "not tried" in finding.told}
    assert "collectives" in skipped
    assert any(finding.check == "speed of ranks" and finding.verdict == "ok" for finding in report.findings)


def _examined_but_one(rank, world_size, folder):
    """The last rank joins and then does nothing, until the others are done."""
    done = Path(folder, "done")
    if rank == world_size - 1:
        while not done.exists():
            time.sleep(0.05)
        return None
    text, seconds = _examined(rank, world_size, None, None, 1.0)
    if rank == 0:
        done.touch()
    return text, seconds


def test_a_rank_that_is_silent_is_named(tmp_path):
    text, seconds = run_ranks(_examined_but_one, 3, str(tmp_path))[0]
    failures = _failures(Examination.parse(text))
    assert list(failures) == ["ranks"]
    assert failures["ranks"].startswith("rank 2: no answer within")
    assert seconds < 30


def _without_the_first(rank, world_size):
    return None if rank == 0 else _examined(rank, world_size, None, None, 0.2)[0]


def test_without_rank_0(monkeypatch):
    text = run_ranks(_without_the_first_patient, 2)[1]
    assert _failures(Examination.parse(text)) == {"ranks": "rank 0 stopped answering at the start"}


def _without_the_first_patient(rank, world_size):
    if rank == 0:
        time.sleep(7)
        return None
    return _without_the_first(rank, world_size)


def _ranks(hosts, **parallel):
    values = small_config(Path("data"), Path("runs"))
    values["parallel"] = parallel
    return Ranks(len(hosts), dict(enumerate(hosts)), "gloo", Config(**values))


def test_groups_that_cross_hosts():
    """Column and tensor groups are of neighbouring ranks; see test_neighbours for Megatron's word on it."""
    judge = checks._judge_layout
    assert [f.verdict for f in judge({}, _ranks("aabb", expert=2, expert_tensor=2))] == ["ok"]
    (finding,) = judge({}, _ranks("abab", expert=2, expert_tensor=2))
    assert finding.verdict == "warn"
    assert "expert_tensor = 2: 2 of 2 groups cross hosts, such as ranks 0 (a), 1 (b)" in finding.told
    (finding,) = judge({}, _ranks("aabb", expert_tensor=4))
    assert "1 of 1 groups" in finding.told
    (finding,) = judge({}, _ranks("aab", expert=2))
    assert finding.verdict == "fail"
    assert "does not divide the 3 rank(s)" in finding.told
    assert judge({}, dataclasses.replace(_ranks("aab", expert=2), config=None)) == []


def _neighbours(rank, world_size):
    from peer_dist.megatron import Parallel

    parallel = Parallel.initialize(tensor=2, expert=2, expert_tensor=2)
    return [dist.get_process_group_ranks(group) for group in (parallel.tensor_group, parallel.experts.columns)]


def test_neighbours():
    first = [[0, 1], [0, 1]]
    last = [[2, 3], [2, 3]]
    assert run_ranks(_neighbours, 4) == [first, first, last, last]


def test_gpus_are_judged():
    """Two ranks on one device, memory in use, and another kind of GPU."""
    ranks = Ranks(3, {0: "a", 1: "a", 2: "b"}, "nccl", None)
    gpu = {"name": "H100", "unique": "u0", "free": 79 << 30, "total": 80 << 30}
    values = {0: gpu, 1: gpu, 2: {**gpu, "name": "A100", "free": 10 << 30}}
    found = {finding.told: finding.verdict for finding in checks._judge_devices(values, ranks)}
    assert found == {
        "ranks differ: 2 x H100, 1 x A100": "warn",
        "ranks 0 (a), 1 (a) share one H100": "fail",
        "rank 2 (b): device memory is in use already, 10 GB free at the least": "warn",
    }
    assert checks._judge_devices({0: gpu, 1: {**gpu, "unique": "u1"}}, ranks)[0].verdict == "ok"


def test_room_is_judged(tmp_path):
    ranks = _ranks("ab")
    assert ranks.config is not None
    needed = checkpoint_bytes(ranks.config, 0, 4)  # there are no data, and so no embedding
    assert needed > 2 * 2 * 225 * 32 * 3 * 4  # two PEER layers, two tables, weights and two moments in float32
    disks = {"checkpoint.dir": ["/c", 10 * needed + (2 << 30), True], "/dev/shm": ["/dev/shm", 8 << 30, True]}
    well = {"memory": 64 << 30, "disks": disks}
    assert [f.verdict for f in checks._judge_room({0: well, 1: well}, ranks)] == ["ok"]
    for name, free, verdict, says in (
        ("checkpoint.dir", needed // 2, "fail", "a checkpoint takes"),
        ("checkpoint.dir", needed * 2, "warn", "3 at once"),
        ("/dev/shm", 64 << 20, "warn", "rank 1 (b): 64 MB of shared memory"),
    ):
        ill = {"memory": 64 << 30, "disks": {**disks, name: [name, free, True]}}
        (finding,) = checks._judge_room({0: well, 1: ill}, ranks)
        assert finding.verdict == verdict
        assert says in finding.told


def test_the_command(tmp_path):
    """On two ranks: one JSON object; alone: a table; and the exit codes."""
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(small_config(Path("data"), tmp_path)))
    with Command(2, ["doctor", "--config", str(config), "--json"], tmp_path / "out") as command:
        codes = command.codes(120)
        report = Examination.parse(command.outputs[0].read_text())
        assert report.ranks == 2
        assert codes == [0 if report.ok else 1] * 2, command.words(0)
    done = run_command("doctor", "--config", str(config), "parallel.expert=2")
    assert done.returncode == 1, done.stderr
    assert "does not divide the 1 rank(s)" in " ".join(done.stdout.split())
    assert "not ready" in done.stdout


def test_names_of_many_ranks():
    ranks = Ranks(20, dict.fromkeys(range(20), "n"), "gloo", None)
    assert ranks.named([3]) == "rank 3 (n)"
    assert ranks.named(range(10)).endswith("7 (n) and 2 more")
    assert Examination(1, [Finding("a", "warn", "b", "c")]).ok
    assert isinstance(checks.CHECKS[0], Check)


def _calibrated(rank, world_size, path, hosts):
    calibration.socket.gethostname = lambda: hosts[rank]
    calibration.SIZES["cpu"] = calibration.Sizes((64, 128), 1 << 16, 32**2, 64, 64, torch.float32)
    return calibration.calibrate(
        World(rank, world_size, rank, world_size), Path(path), 60.0, turns=2 if world_size == 1 else 1
    ).json()


@pytest.mark.parametrize("hosts", ["aab", "a"])
def test_calibration_writes_the_rates_of_these_machines(hosts, tmp_path):
    path = tmp_path / "new" / "hardware.yaml"
    reports = run_ranks(_calibrated, len(hosts), str(path), hosts)
    report = Examination.parse(reports[0])
    assert reports == [reports[0]] * len(hosts)
    assert report.ok, report
    ((name, entry),) = yaml.safe_load(path.read_text()).items()
    assert re.fullmatch(r"[a-z0-9-]+", name)
    assert entry["device"] == "cpu"
    assert entry["gpus_per_node"] == max(1, hosts.count("a"))
    assert 1e8 < entry["memory_bytes"] < 1e13
    rates = [entry[f"{key}_bytes_per_s"] for key in ("hbm", "gather", "node_link", "network", "activation")]
    assert all(1e4 < rate < 1e13 for rate in [*rates, *entry["flops_per_s"].values()]), entry
    assert list(entry["flops_per_s"]) == ["float32", "bfloat16"]
    assert 0 < entry["step_overhead_s"] < 30
    assert 0 <= entry["layer_overhead_s"] < 10
    latencies = [entry["node_link_latency_s"], entry["network_latency_s"]]
    if len(hosts) == 1:
        assert latencies == [0, 0]
        assert "network_latency_s: not measured, 0 stands there" in path.read_text()
    else:
        assert all(0 < latency < 5 for latency in latencies)
        assert "not measured" not in path.read_text()
    (links,) = (finding for finding in report.findings if finding.check == "links")
    assert links.verdict == ("warn" if len(hosts) == 1 else "ok")


def test_a_hardware_file_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "folder.yaml").mkdir()
    for name, says in (("folder.yaml", "cannot be written"), ("file", "must end in .yaml")):
        with Command(1, ["doctor", "--calibrate", str(tmp_path / name)], tmp_path / "out") as command:
            assert command.codes(60) == [2]
            assert f"--calibrate {tmp_path / name}: {says}" in command.words(0)
