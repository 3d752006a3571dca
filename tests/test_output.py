"""What is printed is printed as it is; output and logs that go away end no run; bad lines in logs spoil nothing."""

import contextlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import yaml
from rich.table import Table
from rich.text import Text
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import peer_dist
from peer_dist import output
from peer_dist.checkpoints.store import CheckpointStore
from peer_dist.config import ConfigError
from peer_dist.measures.metrics import Metrics, along, read_metrics, time_of
from peer_dist.measures.record import read_run
from peer_dist.mistake import Mistake, printable
from peer_dist.plots.command import plot, results_of, tables
from peer_dist.plots.panels import as_written, empty_panels
from peer_dist.ranks.signals import StopRequest
from peer_dist.report.page import write_report
from tests.ranks import run_each, run_ranks
from tests.runs import make_trainer, small_config, with_keys

NAMES = (
    "run[/v2]",
    "[red]x",
    "[bold]x[/]",
    ":smile:",
    "[link=x]",
    "a\\[b]",
    "x[1;31m",
    "$\\frac{$",
    "<script>",
    "{{ x }}",
)
CONTROLS = ("\x1b[31mred", "a\x00b", "\x9b2J", "\ud800", "\u202egpj.exe", "two\u2028lines")


def whole_run(rank, world_size, tree):
    with StopRequest() as stop:
        make_trainer(tree).run(stop)


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    """The folder of a run of six steps, with its plan."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    tree = with_keys(small_config(text, folder), train={"steps": 6}, model={"num_layers": 1, "mlp": "peer"})
    run_ranks(whole_run, 1, tree)
    (folder / "plan.json").write_text(json.dumps({"tokens_per_second": 1e4, "memory": {"parts": [1, 2]}}))
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of that run, to be damaged."""
    copy = Path(shutil.copytree(trained, tmp_path / "run"))
    events = copy / "logs" / "events.jsonl"
    events.write_text(events.read_text().replace(str(trained), str(copy)))
    return copy


# Text as it is


def test_there_is_one_way_to_print():
    package = Path(peer_dist.__file__).parent
    found = [
        f"{path.relative_to(package)}:{number}: {line.strip()}"
        for path in package.rglob("*.py")
        if path.name not in ("output.py", "__main__.py")  # which runs where rich may not be installed
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(
            r"\bConsole\(|rich\.markup|typer\.echo|(?<![.\w])print\(|TextColumn\((?!.*markup=False|\"\w+\"\))", line
        )
    ]
    assert found == []


@pytest.mark.parametrize("name", NAMES + CONTROLS)
def test_words_are_printed_as_they_are(name, capsys):
    table = Table(name, title=name, caption=name)
    table.add_row(name)
    output.messages().print(f"- {name}.")
    output.results(200).print(table)
    output.results(200).print(Text.assemble(("error:", "red"), f" {name}."))
    output.show(printable(name))
    out, err = capsys.readouterr()
    assert err == f"- {printable(name)}.\n"
    assert out.count(printable(name)) >= 5, out
    assert not set(out + err) & set("\x1b\x07\x9b\ud800")


@pytest.mark.parametrize("columns", ["0", "1", "-3", "x"])
def test_results_are_seen_whatever_width_is_said(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    table = Table("name")
    table.add_row("value")
    output.results().print(table)
    assert "value" in capsys.readouterr().out


def test_progress_shows_words_as_they_are(capsys):
    from peer_dist.evaluation.suite import _progress
    from peer_dist.training.progress import Progress

    with Progress(output.messages(), 0, 2) as progress:
        progress.say("[/x]")
    with _progress(0) as bars:
        for name in NAMES:
            bars.add_task(name, total=1, note=name)
    assert ":smile:" in capsys.readouterr().err


def test_labels_of_figures_are_names():
    """What matplotlib takes for mathematics raises when it is drawn."""
    for name in (*NAMES, *CONTROLS, "_hidden", "$x$", "\\$x", "$\\frac{$ $"):
        figure, (panel,) = empty_panels(1, 3, 2)
        panel.plot([1, 2], label=as_written(name))
        panel.legend()
        panel.set_title(as_written(name))
        file = io.StringIO()
        figure.savefig(file, format="svg")
        assert len(panel.get_legend_handles_labels()[1]) == 1, name
        plt.close(figure)
    assert "$x$" in as_written("$x$").replace("\\$", "$")


def test_runs_of_any_name_are_reported_and_plotted(trained, tmp_path, capsys):
    folders = [
        Path(shutil.copytree(trained, tmp_path / name.replace("/", "")))
        for name in ("run[v2]", ":smile:", "$\\frac{$", "_x", "<script>alert(1)<", "\x1b[31m", os.fsdecode(b"\xff"))
    ]
    page = write_report(folders, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;" in page
    assert "\x1b" not in page
    for folder in folders:
        write_report([folder], None)
    assert plot(folders, tmp_path / "figures[/b]", [], "parameters")


def test_a_page_replaces_nothing_but_a_page(trained, tmp_path):
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    logs = {path: path.read_bytes() for path in folder.rglob("*.jsonl")}
    for path in logs:
        with pytest.raises(ConfigError, match=r"\.jsonl: is there and is no page of HTML; name another file"):
            write_report([folder], path)
    assert logs
    assert logs == {path: path.read_bytes() for path in logs}
    page = tmp_path / "page.html"
    page.touch()
    for _ in range(2):
        assert write_report([folder], page).read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


# Logs with bad lines

BAD = (
    *(
        b"garbage",
        b"",
        b"\0\0\0",
        b"null",
        b"5",
        b"[]",
        b"{}",
        b'{"step": "3"}',
        b'{"train/loss": 1.0}',
        b"\xff\xfe\xff",
    ),
    *(
        b'{"step": true}',
        b'{"step": 1.5}',
        b'{"step": -1}',
        b'{"step": 1e400}',
        b'{"step": 1',
        b'{"step": %s}' % (b"1" * 5000),
    ),
    *(
        b'{"step": 2, "train/loss": "x"}',
        b'{"step": 9, "time/step": [1]}',
        b"[" * 100_000,
        b'{"step": 99999999999999999999}',
    ),
)


@pytest.mark.parametrize("place", [0, 3, -1])
def test_a_resume_keeps_what_it_cannot_read(run, place):
    path = run / "logs" / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1]
    before = read_metrics(path)
    for bad in BAD:
        for ending in (b"\n", b"\r\n"):
            damaged = [*lines[:place], bad, *lines[place:]] if place >= 0 else [*lines, bad]
            path.write_bytes(ending.join(damaged) + (b"" if place < 0 else ending))
            assert read_metrics(path) == before, bad[:40]
            said: list[str] = []
            metrics = Metrics(run / "logs", 4, said.append)
            metrics.write(5, {"train/loss": 1.0, "train/perplexity": float("nan")})
            metrics.close()
            steps = [line["step"] for line in read_metrics(path)]
            assert steps == [0, 1, 2, 3, 4, 5], bad[:40]
            assert bad in [line.removesuffix(b"\r") for line in path.read_bytes().split(b"\n")]
            assert path.read_bytes().endswith(b'{"step": 5, "train/loss": 1.0, "train/perplexity": null}\n')
            told = [sentence for sentence in said if f"{path}: line " in sentence]
            assert len(told) == bool(bad), (bad[:40], said)


def test_a_resume_holds_no_more_of_its_logs_than_it_must(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with path.open("w") as file:
        for step in range(4000):
            file.write(json.dumps({"step": step, **{f"time/{name}": step / 7 for name in range(30)}}) + "\n")
    size = path.stat().st_size
    tracemalloc.start()
    metrics = Metrics(tmp_path, 3000, [].append)
    metrics.close()
    assert along(path, "time/3") == {step: step / 7 for step in range(3001)}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0.7 * size < path.stat().st_size < 0.8 * size
    assert peak < 0.3 * size


def test_half_a_last_line_is_ended(run):
    for name in ("metrics.jsonl", "events.jsonl"):
        path = run / "logs" / name
        path.write_bytes(path.read_bytes()[:-20])
    whole = read_metrics(run / "logs" / "events.jsonl")
    metrics = Metrics(run / "logs", 6, [].append)
    metrics.event("start again", 6)
    metrics.write(7, {"train/loss": 1.0})
    metrics.close()
    assert [event["event"] for event in read_metrics(run / "logs" / "events.jsonl")[len(whole) :]] == ["start again"]
    assert [line["step"] for line in read_metrics(run / "logs" / "metrics.jsonl")] == [0, 1, 2, 3, 4, 5, 7]


def test_of_lines_of_one_step_the_last_counts_and_steps_are_in_order(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s, "a": n}) + "\n" for n, s in enumerate([3, 1, 2, 3, 1])))
    assert read_metrics(path) == [{"step": 1, "a": 4}, {"step": 2, "a": 2}, {"step": 3, "a": 3}]
    path.write_bytes(b'\xef\xbb\xbf{"step": 1, "a": NaN, "b": 1e300}\r\n{"step": 2}')
    assert read_metrics(path) == [{"step": 1, "a": None, "b": None}, {"step": 2}]


ODD = (
    None,
    5,
    -1,
    True,
    {},
    [],
    "x",
    "",
    1e308,
    -1e308,
    10**39,
    float("nan"),
    float("inf"),
    [[[]]],
    "\ud800",
    "\0",
    2**63,
)


def retyped(rng, tree):
    """A tree with a value somewhere in it of another type, or gone."""
    places = []

    def walk(part):
        for key in part if isinstance(part, dict) else range(len(part)) if isinstance(part, list) else ():
            places.append((part, key))
            walk(part[key])

    walk(tree)
    part, key = rng.choice(places) if places else ({}, "")
    if isinstance(part, dict) and rng.random() < 0.3:
        part.pop(key, None)
    else:
        part[key] = rng.choice(ODD)
    return tree


def damage(rng, path):
    """Damage a file in one of many ways."""
    data, kind = path.read_bytes(), rng.randrange(10)
    lines = data.split(b"\n")
    if kind == 0:
        data = bytes(rng.randrange(256) if rng.random() < 1e-3 else byte for byte in data)
    elif kind == 1:
        data = data[: rng.randrange(len(data) + 1)]
    elif kind == 2:
        data = b"\n".join(rng.sample(lines, len(lines)) + lines)
    elif kind == 3:
        lines.insert(rng.randrange(len(lines)), rng.choice(BAD))
        data = b"\n".join(lines)
    elif kind == 4:
        path.unlink()
        path.mkdir()
        return
    elif path.suffix == ".jsonl":
        whole = rng.random() < 0.3  # each of the lines, or one
        chosen = rng.randrange(len(lines) - 1)
        for number, line in enumerate(lines):
            if line and (whole or number == chosen):
                lines[number] = json.dumps(retyped(rng, json.loads(line))).encode()
        data = b"\n".join(lines)
    elif path.suffix == ".json":
        data = json.dumps(retyped(rng, json.loads(data))).encode()
    path.write_bytes(data)


@pytest.mark.filterwarnings("ignore")
def test_damaged_logs_are_read_or_refused_in_a_sentence(trained, tmp_path):
    """For seconds here, and for FUZZ_SECONDS by hand."""
    seconds, seed = float(os.environ.get("FUZZ_SECONDS", "4")), int(os.environ.get("FUZZ_SEED", "17"))
    rng, run, end, tried = random.Random(seed), tmp_path / "run", time.monotonic() + seconds, 0
    refused = 0
    while time.monotonic() < end:
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(trained, run)
        logs = run / "logs"
        for path in rng.sample(
            [logs / "metrics.jsonl", logs / "events.jsonl", run / "plan.json"], rng.choice([1, 1, 2])
        ):
            damage(rng, path)
        for path in [*run.glob("checkpoints/*/manifest.json"), *logs.glob("images/*")]:
            if rng.random() < 0.3:
                damage(rng, path)
        tried += 1
        shutil.rmtree(tmp_path / "kept", ignore_errors=True)
        kept = f"{shutil.copytree(run, tmp_path / 'kept')}, seed {seed}, input {tried}"
        acts = [lambda: read_run(run), lambda: tables(results_of([run]), "parameters")]
        if tried % 5 == 0:  # drawing takes long
            acts += [lambda: write_report([run], None), lambda: plot([run], tmp_path / "figures", [], "parameters")]
        for act in acts:
            try:
                act()
            except Mistake:
                refused += 1
            except Exception as error:
                raise AssertionError(kept) from error
        metrics = Metrics(logs, 3, [].append)
        metrics.event("x", 3)
        metrics.write(4, {"train/loss": 1.0})
        metrics.close()
        if (logs / "metrics.jsonl").is_file():
            assert read_metrics(logs / "metrics.jsonl")[-1] == {"step": 4, "train/loss": 1.0}, kept
        if (logs / "events.jsonl").is_file():
            assert read_metrics(logs / "events.jsonl")[-1]["event"] == "x", kept
    assert tried
    print(f"{tried} inputs, {refused} sentences")


def test_what_else_is_damaged_is_left_out_or_a_sentence(run):
    for plan in ("null", "[]", "[" * 9000, '{"tokens_per_second": "x"}', '{"tokens_per_second": -1}', "{"):
        (run / "plan.json").write_text(plan)
        with pytest.raises(ConfigError, match=r"plan.json: .*write it again by peer-dist plan --json, or remove it"):
            read_run(run)
    (run / "plan.json").unlink()
    (run / "logs" / "images" / "experts_layerx_map.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (run / "logs" / "images" / "experts_layer9_map.png").write_bytes(b"no picture")
    (run / "logs" / "images" / "experts_layer8_map.png").mkdir()
    os.mkfifo(run / "logs" / "images" / "experts_layer7_map.png")
    (run / "logs" / "images" / "experts_layer6_map.png").symlink_to("/dev/zero")
    assert list(read_run(run).maps) == ["layer 1"]
    (manifest,) = (run / "checkpoints" / "step-00000006").glob("manifest.json")
    assert list(read_run(run).checkpoints) == [4, 6]
    for text in (
        "null",
        "{}",
        '{"step": 6}',
        '{"step": 6, "files": {"a": 5}}',
        "[" * 9000,
        '{"step": [6], "files": {}}',
    ):
        manifest.write_text(text)
        assert list(read_run(run).checkpoints) == [4], text
    start = read_metrics(run / "logs" / "events.jsonl")[0]
    assert time_of(start).year > 2000


# Logs that cannot be written


def limited(rank, world_size, logs, size):
    """What is said and left of logs with room for ``size`` bytes a file, and then for more."""
    logs = Path(logs)
    said: list[str] = []
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    metrics = Metrics(logs, None, said.append)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    metrics.config({"model": {"name": "```</pre>", "lr": 1.0}})
    for step in range(40):
        metrics.write(step, {"train/loss": 0.5 * step, "val/loss": 1.0})
        if step % 10 == 0:
            metrics.image("experts/layer1", step, pixels)
            metrics.event("checkpoint", step, seconds=1.0)
            metrics._board._written_at = -100.0  # as if it were long ago
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    metrics.write(40, {"train/loss": 20.0})
    metrics.image("experts/layer1", 40, pixels)
    metrics.event("done", 40)
    metrics.close()
    return said


@pytest.mark.parametrize("size", [0, 100, 1000])
def test_logs_without_room_are_told_of_once_and_go_on_when_there_is(tmp_path, size):
    (said,) = run_ranks(limited, 1, str(tmp_path), size)
    lost = [sentence for sentence in said if "no longer written" in sentence]
    for what in ("metrics", "pictures", "TensorBoard's files"):
        assert sum(sentence.startswith(what) for sentence in lost) == 1, said
        assert sum(sentence.startswith(f"{what} are written to ") for sentence in said) == 1, said
    assert all("File too large; training goes on" in sentence for sentence in lost)
    assert read_metrics(tmp_path / "metrics.jsonl")[-1] == {"step": 40, "train/loss": 20.0}
    events = read_metrics(tmp_path / "events.jsonl")
    names = [event["event"] for event in events]
    assert [name for name in names if "logs" not in name] == ["checkpoint"] * 4 + ["done"], "they waited for room"
    assert names.count("logs lost") == len(lost)
    assert names.count("logs written again") == len(lost)
    assert not list(tmp_path.rglob("*.partial"))
    assert (tmp_path / "images" / "experts_layer1.png").is_file()
    assert [event.step for event in EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss")][-1] == 40


def test_logs_that_are_removed_are_begun_again(tmp_path):
    logs, said = tmp_path / "logs", []
    metrics = Metrics(logs, None, said.append)
    metrics.write(1, {"train/loss": 1.0})
    shutil.rmtree(logs)
    metrics.write(2, {"train/loss": 1.0})
    metrics.event("done", 2)
    metrics.close()
    assert read_metrics(logs / "metrics.jsonl") == [{"step": 2, "train/loss": 1.0}]
    assert len(read_metrics(logs / "events.jsonl")) == 1
    shutil.rmtree(logs)
    logs.write_text("no folder")
    metrics = Metrics(logs, None, said.append)
    metrics.write(1, {"train/loss": 1.0})
    metrics.image("a", 1, np.zeros((2, 2, 3), np.uint8))
    metrics.close()
    assert sorted(sentence.split(" are ")[0] for sentence in said) == [
        "TensorBoard's files",
        "events",
        "metrics",
        "pictures",
    ]


# Output that goes away


def broken_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def unread_pipe():
    _, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"x" * 4096)
    return writer


def closed_terminal():
    outer, inner = os.openpty()
    os.close(outer)
    return inner


WAYS = {
    "broken pipe": (broken_pipe, "Broken pipe"),
    "full disk": (lambda: os.open("/dev/full", os.O_WRONLY), "No space left on device"),
    "closed": (lambda: None, "Bad file descriptor"),
    "unread pipe": (unread_pipe, "nothing was taken for"),
    "closed terminal": (closed_terminal, "Input/output error"),
}


def command_without_output(way, arguments):
    """The exit code of a command whose stdout and stderr are gone."""
    from peer_dist.cli import main

    output._PATIENCE = 0.1
    descriptor = WAYS[way][0]()
    for stream in (1, 2):
        os.close(stream) if descriptor is None else os.dup2(descriptor, stream)
    streams = [None if descriptor is None else os.fdopen(stream, "w", closefd=False) for stream in (1, 2)]
    sys.stdout, sys.stderr = streams
    sys.argv = ["peer-dist", *arguments]
    try:
        main()
    except SystemExit as end:
        return end.code


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_run_outlasts_its_output(small, tmp_path):
    trees = {way: small_config(small["data"]["prefix"], tmp_path / way) for way in WAYS}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(with_keys(small, train={"steps": 3}, model={"num_layers": 1, "mlp": "peer"})))
    folders = {
        way: [f"{key}.dir={tree[key]['dir']}" for key in ("checkpoint", "logging")] for way, tree in trees.items()
    }
    calls = [(way, ["train", "-c", str(config), *folders[way]]) for way in WAYS]
    assert run_each(command_without_output, calls) == [0] * len(WAYS)
    for way, tree in trees.items():
        assert CheckpointStore(tree["checkpoint"]["dir"]).steps() == [3], way
        events = read_metrics(Path(tree["logging"]["dir"]) / "events.jsonl")
        told = [event["told"] for event in events if event["event"] == "output lost" and "stderr" in event["told"]]
        assert len(told) == 1, way
        assert told[0].startswith(f"stderr: {WAYS[way][1]}")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_results_that_cannot_be_printed_are_a_mistake_unless_nobody_reads_on(trained):
    arguments = ["report", str(trained), "-o", str(trained / "page.html")]
    codes = run_each(command_without_output, [(way, arguments) for way in WAYS])
    assert dict(zip(WAYS, codes)) == {way: 0 if way == "broken pipe" else 2 for way in WAYS}


def test_a_disk_with_room_again_gets_words_again(tmp_path):
    (said,) = run_each(words_on_a_small_disk, [(str(tmp_path / "words"),)])
    assert said == ("File too large", "one\nthree\n")


def words_on_a_small_disk(path):
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 2)
    sys.stderr = os.fdopen(2, "w", closefd=False)
    output.outlast_readers()
    console = output.messages()
    console.print("one")
    resource.setrlimit(resource.RLIMIT_FSIZE, (4, resource.RLIM_INFINITY))
    console.print("two")
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    console.print("three")
    return output.lost()["stderr"], Path(path).read_text()


# Signals and launchers


def test_hanging_up_asks_to_stop_unless_it_is_ignored():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.received == signal.SIGHUP
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


RANK = """
import signal, sys, time
from peer_dist.ranks.signals import StopRequest, end_with_torchrun
end_with_torchrun()
with StopRequest() as stop:
    print("ready", flush=True)
    while stop.received is None:
        time.sleep(0.02)
print("asked", flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells of a parent's end on Linux")
@pytest.mark.parametrize("between", ["", "/bin/sh -c '\"$@\"; true' sh "])
def test_a_rank_ends_with_a_torchrun_that_is_killed(tmp_path, between):
    """Started by it, or by a shell that goes on without it."""
    torchrun = tmp_path / "torchrun"
    torchrun.write_text(f'{between}"$@"\ntrue\n')
    environment = {**os.environ, "TORCHELASTIC_RUN_ID": "x", "PYTHONPATH": str(Path(peer_dist.__file__).parents[1])}
    command = ["/bin/sh", str(torchrun), sys.executable, "-c", RANK]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as launcher:
        assert launcher.stdout.readline() == "ready\n"
        launcher.kill()
        assert launcher.stdout.readline() == "asked\n"


def test_names_that_are_too_long_for_a_file_system_are_sentences():
    """Wherever a command looks first whether something is there."""
    from peer_dist.checkpoints.sources.llama import LlamaFolder
    from peer_dist.checkpoints.sources.megatron import MegatronFolder
    from peer_dist.evaluation.evaluation_sets import parse_sets
    from peer_dist.planning.calibration import check_writable

    for path in (Path("n" * 300), Path("a/" * 2500 + "a")):
        assert not LlamaFolder.recognizes(path)
        assert not MegatronFolder.recognizes(path)
        with pytest.raises(Mistake, match="there is no file"):
            parse_sets([f"text={path}"])
        with pytest.raises(Mistake, match="cannot be written"):
            check_writable(Path(f"{path}.yaml"))
