"""The doctor on real ranks: what is well passes, and each trouble names the rank that has it."""

import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml

from peer_dist import machine
from peer_dist.config.schema import Config
from peer_dist.doctor import checks, console, gpu
from peer_dist.mistake import Mistake
from peer_dist.planning import calibration
from peer_dist.planning.state import checkpoint_bytes
from peer_dist.ranks.examination import Check, Examination, Finding, Here, Ranks, examine
from peer_dist.ranks.world import World
from tests.ranks import Command, run_command, run_ranks
from tests.runs import copy_checkpoint, in_folder, run_to_the_end, small_config, with_keys

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPU_CHECKS = ["driver", "Triton", "kernels", "host memory", "PEER layer"]


def _examined(rank, world_size, trouble=None, tree=None, seconds=20.0):
    """What the rank's report says of the run ``tree`` after ``trouble`` was made on the last rank."""
    ours = list(checks.CHECKS)
    # Ranks of a busy machine differ for no fault of theirs.
    _replace(ours, "speed of ranks", lambda here: {"product": 0.01, "copy": 0.01})
    if trouble is not None:
        checks.WRITTEN_BYTES, checks.COLLECTIVE_BYTES = 1 << 20, (1 << 10, 1 << 12, 1 << 14)
    if trouble is not None and rank == world_size - 1:
        trouble(ours)
    config = None if tree is None else Config(**tree)
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


@pytest.fixture
def tree(text, tmp_path):
    """A run that fits 1, 2 and 3 ranks; its folders are not there yet."""
    return with_keys(small_config(text, tmp_path), train={"global_batch_size": 12})


def _failures(report):
    return {finding.check: finding.told for finding in report.findings if finding.verdict == "fail"}


@pytest.mark.parametrize("world_size", [1, 3])
def test_well(world_size, tree, tmp_path):
    report = _reports(world_size, None, tree)
    assert report.ok, report
    said = {finding.check: finding.told for finding in report.findings}
    expected = {"ranks", *(check.name for check in checks.CHECKS)} - {"tables on disk", *GPU_CHECKS}
    assert set(said) == expected, "ranks over gloo"
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
def test_trouble_is_named(trouble, check, says, tree):
    report = _reports(2, trouble, tree, 15.0)
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
def test_a_check_that_hangs_is_reported_and_the_rest_goes_on(trouble, late, tree):
    results = run_ranks(_examined, 3, trouble, tree, 6.0)
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
    card = {"name": "H100", "unique": "u0", "free": 79 << 30, "total": 80 << 30, "users": []}
    values = {0: card, 1: card, 2: {**card, "name": "A100", "free": 10 << 30, "users": ["python (pid 7, 60 GB)"]}}
    findings = checks._judge_devices(values, ranks)
    assert {finding.told: finding.verdict for finding in findings} == {
        "ranks differ: 2 x H100, 1 x A100": "warn",
        "ranks 0 (a), 1 (a) share one H100": "fail",
        "rank 2 (b): device memory is in use already, 10 GB free at the least": "warn",
    }
    assert findings[-1].advice == "end python (pid 7, 60 GB) for rank 2 (b)"
    assert checks._judge_devices({0: card, 1: {**card, "unique": "u1"}}, ranks)[0].verdict == "ok"


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


def test_the_command(small, tmp_path):
    """On two ranks: one JSON object; alone: a table; and the exit codes."""
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(small))
    with Command(2, ["doctor", "--config", str(config), "--json"], tmp_path / "out") as command:
        codes = command.codes(120)
        report = Examination.parse(command.outputs[0].read_text())
        assert report.ranks == 2
        assert codes == [0 if report.ok else 1] * 2, command.words(0)
    without = run_command("doctor", "--config", str(config), "data.prefix=nowhere")
    said = " ".join(without.stdout.split())
    assert without.returncode == 1, without.stderr
    assert re.search(r"what it reads fail rank 0 \(.*?\): nowhere.* -> .*prepare", said), said
    assert "not ready" in said
    done = run_command("doctor", "--config", str(config), "parallel.expert=2")
    assert done.returncode == 1, done.stderr
    assert "does not divide the 1 rank(s)" in " ".join(done.stdout.split())
    assert "not ready" in done.stdout


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    """A run of four steps, with a checkpoint of the last one."""
    tree = with_keys(small_config(text, tmp_path_factory.mktemp("trained")), train={"steps": 4})
    run_ranks(run_to_the_end, 1, tree)
    return tree


def _refused(tree):
    """The findings about what the run would read."""
    config = Config(**tree)
    here = dataclasses.replace(_here("cpu"), config=config)
    return checks._judge_refusals({0: checks._refusal(here)}, Ranks(1, {0: "a"}, "gloo", config))


def _copied_data(text, folder):
    """The prepared text again, whose files may be damaged."""
    for file in text.parent.glob(f"{text.name}.*"):
        if file.is_file():
            shutil.copy(file, folder / file.name.replace(text.name, "own"))
    return str(folder / "own")


def test_what_a_run_would_be_refused_for_is_found(text, trained, tmp_path):
    """Each with one finding that says what to do; what a run could begin with, or go on from, is well."""
    tree = in_folder(trained, tmp_path / "run")
    (finding,) = _refused(tree)
    assert finding.verdict == "ok"
    assert not (tmp_path / "run").exists(), "nothing is made"
    copy_checkpoint(trained, tree, 4)
    assert _refused(tree)[0].verdict == "ok"
    assert _refused(with_keys(tree, train={"steps": 8}))[0].verdict == "ok"
    fresh = in_folder(trained, tmp_path / "fresh")
    newest = tmp_path / "run/checkpoints/step-00000004"
    cases = {
        "no data": with_keys(fresh, data={"prefix": "nowhere"}),
        "one of two": with_keys(fresh, data={"prefix": None, "blend": {str(text): 1.0, "nowhere": 2.0}}),
        "no tokenizer": with_keys(fresh, data={"tokenizer": "nowhere.json"}),
        "no tokenizer but data": with_keys(fresh, data={"tokenizer": f"{text}.json"}),
        "no source": with_keys(fresh, checkpoint={"init_from": str(tmp_path / "nowhere")}),
        "another source": with_keys(fresh, checkpoint={"init_from": str(newest)}, model={"hidden_size": 64}),
        "another model": with_keys(tree, model={"hidden_size": 64}),
        "another seed": with_keys(tree, train={"seed": 6}),
    }
    for name, case in cases.items():
        (finding,) = _refused(case)
        assert finding.verdict == "fail", name
        assert finding.told.startswith("rank 0 (a): "), name
        assert finding.advice, name
        assert "\n" not in finding.told + finding.advice, name
    own = _copied_data(text, tmp_path)
    for ending in (".bin", ".idx", ".json", ".tokenizer.json"):
        file = Path(own + ending)
        whole = file.read_bytes()
        for damaged in (whole[: len(whole) // 2], b"", None):
            file.unlink() if damaged is None else file.write_bytes(damaged)
            assert _refused(with_keys(fresh, data={"prefix": own}))[0].verdict == "fail", (ending, damaged and "cut")
        file.write_bytes(whole)
    assert _refused(with_keys(fresh, data={"prefix": own}))[0].verdict == "ok"
    manifest = newest / "manifest.json"
    for damaged in (manifest.read_bytes()[:200], b"null", b"", None):
        manifest.unlink() if damaged is None else manifest.write_bytes(damaged)
        assert _refused(tree)[0].verdict == "fail", damaged


def test_a_layout_that_does_not_fit_is_found_once(tree):
    ill = with_keys(tree, parallel={"expert": 2})
    (finding,) = _refused(ill)
    assert finding.verdict == "ok", "the check of the layout tells it"


def test_names_of_many_ranks():
    ranks = Ranks(20, dict.fromkeys(range(20), "n"), "gloo", None)
    assert ranks.named([3]) == "rank 3 (n)"
    assert ranks.named(range(10)).endswith("7 (n) and 2 more")
    assert Examination(1, [Finding("a", "warn", "b", "c")]).ok
    assert isinstance(checks.CHECKS[0], Check)


def _calibrated(rank, world_size, path, hosts):
    calibration.socket.gethostname = lambda: hosts[rank]
    calibration.SIZES["cpu"] = calibration.Sizes((64, 128), 1 << 16, 32**2, 64, 64, torch.float32, scratch=1 << 22)
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
    keys = ("hbm", "gather", "node_link", "network", "activation", "host", "disk")
    rates = [entry[f"{key}_bytes_per_s"] for key in keys]
    assert 10 < entry["disk_writes_per_s"] < 1e8
    assert 10 < entry["disk_reads_per_s"] < 1e8
    assert 1e6 < entry["disk_bytes"] < 1e15
    assert entry["bus_bytes_per_s"] is None  # there is none
    assert all(1e4 < rate < 1e13 for rate in [*rates, *entry["flops_per_s"].values()]), entry
    assert list(entry["flops_per_s"]) == ["float32", "bfloat16"]
    # either may be 0: one small time is taken from another, and other programs disturb both
    layer, step = entry["layer_overhead_s"], entry["step_overhead_s"]
    assert 0 <= layer < 10
    assert 0 <= step < 30
    assert layer + step > 0
    latencies = [entry["node_link_latency_s"], entry["network_latency_s"]]
    if len(hosts) == 1:
        assert latencies == [0, 0]
        assert "network_latency_s: not measured, 0 stands there" in path.read_text()
    else:
        assert all(0 < latency < 5 for latency in latencies)
        assert "not measured" not in path.read_text()
    (links,) = (finding for finding in report.findings if finding.check == "links")
    assert links.verdict == ("warn" if len(hosts) == 1 else "ok")


@pytest.mark.parametrize(
    ("few", "many", "layer", "step"),
    [
        (0.010, 0.022, 0.002, 0.006),
        (0.010, 0.009, 0.0, 0.010),  # the large model was luckier than the small one
        (0.010, 0.058, 0.008, 0.0),  # the large one was disturbed
    ],
)
def test_overheads_come_from_two_models(few, many, layer, step):
    rates = calibration._Rates(
        {
            "name": "a", "device": "cpu", "memory_bytes": 1e10, "hbm_bytes_per_s": 1e10, "gather_bytes_per_s": 1e9,
            "node_link_bytes_per_s": 1e9, "node_link_latency_s": 0.0, "network_bytes_per_s": 1e9,
            "network_latency_s": 0.0, "flops_per_s": {"float32": 1e10, "bfloat16": 1e10}, "gpus_per_node": 2,
        }
    )  # fmt: skip
    slowest = {"few": few, "many": many, "dense": 100.0}
    values = {0: slowest, 1: {name: seconds / 2 for name, seconds in slowest.items()}}
    (finding,) = calibration._judge_overheads(rates, values, Ranks(2, {0: "a", 1: "a"}, "gloo", None))
    assert finding.verdict == "ok"
    assert rates.values["layer_overhead_s"] == pytest.approx(layer)
    assert rates.values["step_overhead_s"] == pytest.approx(step, abs=1e-12)
    assert 0 < rates.values["activation_bytes_per_s"] <= 1e10


def test_a_hardware_file_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "folder.yaml").mkdir()
    for name, says in (("folder.yaml", "cannot be written"), ("file", "must end in .yaml")):
        with Command(1, ["doctor", "--calibrate", str(tmp_path / name)], tmp_path / "out") as command:
            assert command.codes(60) == [2]
            assert f"--calibrate {tmp_path / name}: {says}" in command.words(0)


def test_a_hardware_file_replaces_nothing_else(tmp_path):
    run, device = tmp_path / "run.yaml", tmp_path / "device.yaml"
    run.write_text("data: {prefix: a}\n")
    with pytest.raises(Mistake, match=r"run\.yaml: is there and holds no device's figures; name another file"):
        calibration.check_writable(run)
    figures = yaml.safe_load(resources.files("peer_dist.planning").joinpath("hardware.yaml").read_text())
    for text in ("", yaml.safe_dump({"mine": figures["cpu"]})):
        device.write_text(text)
        calibration.check_writable(device)


def test_overrides_without_a_config_are_refused():
    done = run_command("doctor", "model.num_layers=3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: command line: 'model.num_layers=3' changes a key of a config; give its file (--config)\n"
    )


# The checks of GPUs. Where there is none they measure a CPU, at the sizes of one.


def _here(device=DEVICE):
    if device == "cuda":
        torch.cuda.set_device(0)
        device = "cuda:0"
    return Here(0, 1, 0, 1, "single process", torch.device(device), None, "visit", 60.0)


def _measured(name):
    """What a check measures on this machine's device, as rank 0 would get it, and the findings of rank 0 alone."""
    (check,) = (check for check in gpu.gpu_checks(DEVICE) if check.name == name)
    value = json.loads(json.dumps(check.measure(_here())))
    return value, check.judge({0: value}, Ranks(1, {0: "a"}, "nccl" if DEVICE == "cuda" else "gloo", None))


@pytest.mark.gpu
def test_the_card_is_named():
    value, (finding,) = _measured("driver")
    assert finding.check == "driver"
    assert finding.figures["torch"] == torch.__version__
    if DEVICE == "cuda":
        assert finding.verdict in ("ok", "warn"), finding
        assert value["driver"]
        assert float(value["driver_cuda"]) >= 11
        assert value["nccl"]


@pytest.mark.gpu
def test_a_kernel_is_compiled():
    value, (finding,) = _measured("Triton")
    assert "error" not in value
    assert 0 < finding.figures["seconds"] < 60
    assert (value["backend"] == "triton") == (finding.verdict == "ok")


@pytest.mark.gpu
def test_the_kernels_equal_their_reference():
    value, (finding,) = _measured("kernels")
    assert finding.verdict == "ok", finding
    assert len(value) == len(finding.figures) == 3
    for name, case in value.items():
        eight = "float8" in name
        grads = set() if eight else {"gradient of down", "gradient of up"}
        assert set(case["errors"]) == {"output", "dx", "dgate"} | grads
        assert all(error < 2**-8 + 1e-4 for error in case["errors"].values()), "one rounding to bfloat16"
        assert case["errors"]["dgate"] < 2e-5, "never rounded"


@pytest.mark.gpu
def test_rows_of_the_hosts_memory_come_and_go():
    value, findings = _measured("host memory")
    if DEVICE == "cuda":
        (finding,) = findings
        assert finding.verdict == "ok", finding
        assert value["gathered_bytes_per_s"] > 1e9
        assert value["scattered_bytes_per_s"] > 1e9
    else:
        assert value == {}
        assert findings == []


def test_wrong_rows_are_told():
    ranks = Ranks(2, {0: "a", 1: "b"}, "nccl", None)
    good = {
        "right": True, "row_bytes": 2048, "gathered_bytes_per_s": 2e10, "scattered_bytes_per_s": 1.9e10,
        "copied_bytes_per_s": 2.5e10,
    }  # fmt: skip
    slow = {**good, "gathered_bytes_per_s": 1e10}
    (finding,) = gpu._judge_far({0: good, 1: slow}, ranks)
    assert finding.verdict == "ok"
    assert finding.told.startswith(
        "slowest is rank 1 (b): rows of 2,048 bytes are read from the host's memory at 10 GB/s"
    )
    (finding,) = gpu._judge_far({0: good, 1: {**good, "right": False}}, ranks)
    assert (finding.verdict, finding.told[:10]) == ("fail", "rank 1 (b)")
    assert gpu._judge_far({0: {}, 1: {}}, ranks) == []


@pytest.mark.gpu
def test_a_layer_is_timed_against_its_floor():
    value, (finding,) = _measured("PEER layer")
    sizes = gpu.SIZES[DEVICE]
    assert finding.verdict == "ok", finding
    assert "times the floor" in finding.told
    row = sizes.dim * 2
    picks = sizes.tokens * sizes.heads * sizes.top_k
    assert 0 < value["rows"] <= min(value["experts"], picks)
    least = (4 * value["rows"] + 2 * value["experts"] + 6 * sizes.tokens) * row
    assert value["floor_bytes"] == least
    figures = finding.figures
    assert figures["times_the_floor"] == pytest.approx(
        figures["seconds"] * figures["copy_bytes_per_s"] / figures["floor_bytes"]
    )
    if DEVICE == "cuda":
        assert figures["times_the_floor"] > 0.9, "nothing is faster than its floor"


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="the command on GPUs")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("several", [False, True])
def test_the_command_on_gpus(several):
    gpus = torch.cuda.device_count()
    if several and gpus < 2:
        pytest.skip("there is one GPU")
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "peer_dist", "doctor", "--json"],
        env=os.environ | ({} if several else {"CUDA_VISIBLE_DEVICES": first}),
        capture_output=True,
        text=True,
        timeout=500,
    )
    report = Examination.parse(done.stdout)
    found = {finding.check: finding for finding in report.findings}
    assert report.ranks == (gpus if several else 1)
    assert all(found[name].verdict != "fail" for name in [*GPU_CHECKS, "speed of ranks", "collectives"]), done.stdout
    assert found["speed of ranks"].figures["copy_bytes_per_s"] > 1e11
    assert found["speed of ranks"].figures["flops_per_s"] > 1e12
    assert not several or "GB/s" in found["collectives"].told
    assert time.monotonic() - begin < 120, "about a minute"


INTERPRETED = """
import dataclasses, json, sys, torch
import peer_dist.kernels
from peer_dist.doctor import gpu
from peer_dist.kernels import triton
from peer_dist.ranks.examination import Here, Ranks

peer_dist.kernels.backend = gpu.backend = lambda *tensors: triton
tables = (64, torch.float32), (4, torch.bfloat16), (64, torch.uint8)
gpu.SIZES["cpu"] = dataclasses.replace(
    gpu.SIZES["cpu"], dim=16, tables=tables, compared=4, experts=(64,), tokens=4, heads=2, top_k=4
)
here = Here(0, 1, 0, 1, "", torch.device("cpu"), None, "", 60.0)
for check in gpu.gpu_checks("cpu")[1:]:
    print(*(finding.verdict for finding in check.judge({0: check.measure(here)}, Ranks(1, {0: "a"}, "gloo", None))))
"""


def test_the_checks_of_triton_through_its_interpreter():
    pytest.importorskip("triton")
    variables = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=os.environ | variables, capture_output=True, text=True
    )
    assert done.stdout.split() == ["ok"] * 4, done.stdout + done.stderr


def _broken(rank, world_size, trouble):
    real = gpu.expert_mix
    if trouble == "memory":

        def expert_mix(*args):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore of it.")

    elif trouble == "wrong":

        def expert_mix(x, picks, gate, *args):
            return real(x, picks, 1.1 * gate, *args)

    else:

        def expert_mix(*args):
            return real(*args) + 1e-6 * torch.randn(1)

    gpu.expert_mix = expert_mix if rank == world_size - 1 else real
    return examine(World(rank, world_size, rank, world_size), gpu.gpu_checks("cpu")[1:], None, 60.0).json()


@pytest.mark.parametrize(
    ("trouble", "says"),
    [
        ("memory", {"Triton": "CUDA out of memory", "kernels": "rank 1 (.*OutOfMemoryError: CUDA out of memory"}),
        ("wrong", {"kernels": "rank 1 (.*other results than plain PyTorch's in float64.* dx by"}),
        ("unlike", {"kernels": "rank 1 (.*two passes differ: output"}),
    ],
)
def test_trouble_with_kernels_is_told_and_the_rest_goes_on(trouble, says):
    reports = run_ranks(_broken, 2, trouble)
    report = Examination.parse(reports[0])
    assert reports[0] == reports[1]
    failures = _failures(report)
    assert set(failures) == set(says), report
    for check, words in says.items():
        assert re.search(words.replace("(", r"\("), failures[check]), failures
    (layer,) = (finding for finding in report.findings if finding.check == "PEER layer")
    assert layer.verdict == "ok"
    assert layer.told.startswith("slowest is rank ")


CARD = {
    "driver": "570.1",
    "driver_cuda": "12.8",
    "torch": "2.7",
    "torch_cuda": "12.6",
    "nccl": "2.26",
    "capability": [9, 0],
    "built_for": ["sm_80", "sm_90"],
}


def test_cards_are_judged():
    ranks = Ranks(2, {0: "a", 1: "b"}, "nccl", None)
    (finding,) = gpu._judge_card({0: CARD, 1: CARD}, ranks)
    assert finding.verdict == "ok"
    assert "driver 570.1 for CUDA up to 12.8, torch built for CUDA 12.6" in finding.told
    (finding,) = gpu._judge_card({0: CARD, 1: {**CARD, "capability": [12, 0]}}, ranks)
    assert (finding.verdict, "rank 1 (b): torch 2.7 has no code for" in finding.told) == ("fail", True)
    (finding,) = gpu._judge_card({0: {**CARD, "capability": [7, 5], "built_for": ["sm_75"]}, 1: CARD}, ranks)
    assert (finding.verdict, "rank 0 (a): compute capability 7.5 has no bfloat16" in finding.told) == ("warn", True)


@pytest.mark.parametrize(
    ("built_for", "capability", "code"),
    [
        (["sm_80"], [8, 9], True),
        (["sm_80"], [9, 0], False),
        (["sm_90"], [8, 6], False),
        (["sm_80", "compute_80"], [12, 0], True),
        (["sm_90a"], [9, 0], True),
        (["sm_100a"], [10, 3], False),
        (["sm_100f"], [10, 3], True),
        (["gfx942"], [9, 4], True),
    ],
)
def test_architectures_that_serve_a_card(built_for, capability, code):
    assert gpu._has_code(built_for, capability) is code


def test_triton_is_judged():
    ranks = Ranks(2, {0: "a", 1: "b"}, "nccl", None)
    well = {"backend": "triton", "version": "3.3", "compiler": "/usr/bin/gcc", "headers": True, "seconds": 2.0}
    error = "RuntimeError: Failed to find C compiler."
    for ill, verdict, says, advice in (
        ({}, "ok", "Triton 3.3 compiles and runs a kernel", ""),
        (
            {"error": error, "compiler": None},
            "fail",
            "rank 1 (b): Triton 3.3 runs no kernel, and there is no C",
            "CC",
        ),
        ({"error": "CalledProcessError: gcc", "headers": False}, "fail", "no Python.h (Called", "python3-dev"),
        ({"error": "KeyError: 'cpu'"}, "fail", "runs no kernel (KeyError", "belongs to this torch"),
        ({"compiler": None}, "warn", "ran from Triton's cache, but there is no C compiler", "gcc"),
        ({"backend": "reference", "version": None}, "warn", "rank 1 (b): no Triton", "pip install triton"),
    ):
        (finding,) = gpu._judge_triton({0: well, 1: {**well, **ill}}, ranks)
        assert finding.verdict == verdict, finding
        assert says in finding.told
        assert advice in finding.advice


def test_a_compiler_is_looked_for_as_triton_does(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert gpu._compiler() is None
    for name in ("clang", "gcc"):
        (tmp_path / name).touch(0o755)
        assert gpu._compiler() == str(tmp_path / name)
    monkeypatch.setenv("CC", "missing -m64")
    assert gpu._compiler() is None


def test_a_layer_without_memory_or_with_nonsense_is_judged(monkeypatch):
    monkeypatch.setattr(gpu, "free_memory", lambda: 1000)
    monkeypatch.setattr(
        gpu, "SIZES", {**gpu.SIZES, "cpu": dataclasses.replace(gpu.SIZES["cpu"], experts=(32**2, 16**2))}
    )
    ranks = Ranks(1, {0: "a"}, "gloo", None)
    value = gpu._layer(_here("cpu"))
    (finding,) = gpu._judge_layer("cpu", {0: value}, ranks)
    assert (finding.verdict, finding.told) == ("warn", "rank 0 (a): not tried, 1000 B of memory is too little")
    monkeypatch.setattr(gpu, "free_memory", lambda: 4 * 16**2 * 32 * 2)
    value = gpu._layer(_here("cpu"))
    assert value["experts"] == 16**2, "the most that there is memory for"
    assert gpu._judge_layer("cpu", {0: {**value, "finite": False}}, ranks)[0].verdict == "fail"


def test_cards_below_what_plans_take_are_named():
    ranks = Ranks(2, {0: "a", 1: "b"}, "nccl", None)
    card = {"card": "NVIDIA H100 80GB HBM3", "memory": 85520809984}
    well = {**card, "product": 2 * 8192**3 / 600e12, "copy": (8 << 28) / 2.9e12}
    (finding,) = checks._judge_speed({0: well, 1: well}, ranks)
    assert finding.verdict == "ok"
    assert "bfloat16 product 1.83 ms (600 TFLOP/s), copy 0.74 ms (2,900 GB/s)" in finding.told
    assert finding.figures["copy_bytes_per_s"] == pytest.approx(2.9e12)
    (finding,) = checks._judge_speed({0: well, 1: {**well, "copy": (8 << 28) / 2e12}}, ranks)
    assert finding.verdict == "warn"
    assert finding.told == "rank 1 (b): a copy reaches 2,000 GB/s; plans take 2,680 GB/s for h100"


@pytest.mark.parametrize(
    ("name", "memory", "known"),
    [
        ("NVIDIA H100 80GB HBM3", 85520809984, "h100"),
        ("NVIDIA A100-SXM4-80GB", 85899345920, "a100"),
        ("NVIDIA H200", 150754820096, "h200"),
        ("NVIDIA B200", 192265846784, "b200"),
        ("NVIDIA A100-SXM4-40GB", 42949672960, None),
        ("NVIDIA H100 PCIe", 85520809984, None),
        ("NVIDIA GH200 480GB", 102000000000, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 10200547328, None),
        ("Tesla T4", 15000000000, None),
    ],
)
def test_known_cards(name, memory, known):
    card = gpu.known_card(name, memory)
    assert (card and card.name) == known


def test_why_torch_sees_no_gpu(monkeypatch):
    """Without CUDA in torch, with a driver that is too old, in a container that was given none, hidden on purpose."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(gpu, "has_nvidia_gpus", lambda: True)
    monkeypatch.setattr(gpu, "nvidia_driver", lambda: "535.1")
    monkeypatch.setattr(gpu, "nvidia_devices", lambda: True)
    monkeypatch.setattr(gpu, "driver_cuda", lambda: (12, 2))
    monkeypatch.setattr(torch.version, "cuda", None)
    told, advice = gpu.unseen_gpus()
    assert "is built without CUDA" in told
    assert "(CUDA 12.2 or lower): https://pytorch.org/get-started" in advice
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    told, advice = gpu.unseen_gpus()
    assert told.endswith("the driver 535.1 is too old for this torch: CUDA 12.2, not 13.0")
    assert "update the driver" in advice
    monkeypatch.setattr(torch.version, "cuda", "12.6")  # drivers serve later minor versions
    monkeypatch.setattr(torch.cuda, "init", lambda: (_ for _ in ()).throw(RuntimeError("Error 802: system not yet")))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert gpu.unseen_gpus()[0].endswith("torch sees none (CUDA_VISIBLE_DEVICES is '7'): Error 802: system not yet")
    monkeypatch.setattr(gpu, "nvidia_devices", lambda: False)
    monkeypatch.setattr(gpu, "driver_cuda", lambda: None)
    told, advice = gpu.unseen_gpus()
    assert "is shown no /dev/nvidia*" in told
    assert "--gpus all" in advice
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu.unseen_gpus() is None
    ranks = Ranks(1, {0: "a"}, "gloo", None)
    cpu = {"name": "cpu", "cores": 2, "threads": 1, "unseen": [told, advice]}
    (finding,) = checks._judge_devices({0: cpu}, ranks)
    assert (finding.verdict, finding.told, finding.advice) == ("fail", f"rank 0 (a): {told}", advice)


def test_who_holds_memory(monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\n"
        f"echo GPU-0a-1, {os.getpid()}, 400, python\n"
        "echo GPU-0a-1, 77, 12288, /usr/bin/python3, odd\n"
        "echo GPU-0a-1, 78, '[N/A]', \n"
        "echo GPU-0b-2, 79, 5, other\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert gpu.memory_users("0a-1") == ["python3, odd (pid 77, 12 GB)", "a process (pid 78, unknown memory)"]
    program.write_text("#!/bin/sh\necho No devices were found\nexit 6\n")
    assert machine.nvidia_smi("-L") == []


def test_alone_with_several_gpus_it_takes_all(monkeypatch):
    exits = "import os, sys; sys.exit(3 * (os.environ['LOCAL_RANK'] == '1' and os.environ['WORLD_SIZE'] == '2'))"
    assert console.on_ranks(2, [sys.executable, "-c", exits]) == 3
    started = []

    def on_ranks(*arguments):
        started.append(arguments)
        return 0

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(console, "on_ranks", on_ranks)
    monkeypatch.setattr(console.os, "_exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    for name in ("RANK", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS", "PMIX_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit):
        console.run(None, 20.0, as_json=True)
    ((count, command),) = started
    assert (count, command[1:]) == (4, ["-m", "peer_dist", "doctor", "--seconds", "20.0", "--json"])


def test_where_tables_on_disk_lie(tree, tmp_path):
    """Their folder's file system is named, with what it has free; one of a network is a warning."""
    disk = {"table_memory": "disk", "table_folder": str(tmp_path)}
    tree = with_keys(tree, peer=disk, table_optimizer={"name": "rowwise_adam", "lazy": True})
    config = Config(**tree)
    here = Here(0, 2, 0, 2, "test", torch.device("cpu"), config, "visit", 10.0)
    value = checks._scratch(here)
    (place,) = value.values()
    layers = sum(kind == "peer" for kind in config.model.mlp_kinds)
    rows = config.peer.num_experts // config.parallel.expert_rows(2)
    assert place["needed"] == layers * 2 * rows * config.model.hidden_size * 4 * 2  # weights and first moments
    ranks = Ranks(2, {0: "a", 1: "b"}, "gloo", config)
    (finding,) = checks._judge_scratch({0: value, 1: value}, ranks)
    assert finding.verdict == "ok"
    assert re.match(rf"{re.escape(str(tmp_path))} is on \w+ at /.* free; a rank's tables need ", finding.told)
    slow = {str(tmp_path): {**place, "kind": "nfs4", "network": True}}
    (finding,) = checks._judge_scratch({0: value, 1: slow}, ranks)
    assert finding.verdict == "warn"
    assert re.match(r"rank 1 \(b\): .* is on nfs4", finding.told)
    assert "peer.table_folder" in finding.advice
    assert checks._scratch(dataclasses.replace(here, config=None)) == {}
    missing = Config(**with_keys(tree, peer={"table_folder": str(tmp_path / "missing")}))
    assert checks._scratch(dataclasses.replace(here, config=missing)) == {}  # else it would be "ok"
    assert "missing does not exist" in checks._refusal(dataclasses.replace(here, config=missing))


def test_disks_have_room_for_the_tables_of_all_ranks_of_a_machine(tree, tmp_path):
    """And not for those of one alone."""
    disk = {"table_memory": "disk", "table_folder": str(tmp_path)}
    tree = with_keys(tree, peer=disk, table_optimizer={"lazy": True})
    here = Here(0, 2, 0, 1, "test", torch.device("cpu"), Config(**tree), "visit", 10.0)
    (place,) = checks._scratch(here).values()
    rows = here.config.peer.num_experts * 0.7 * place["free"] / place["needed"]
    large = Config(**with_keys(tree, peer={"num_experts": math.isqrt(int(rows)) ** 2}))
    assert checks._refusal(dataclasses.replace(here, config=large)) == ""
    assert "the tables need" in checks._refusal(dataclasses.replace(here, config=large, local_world_size=2))
