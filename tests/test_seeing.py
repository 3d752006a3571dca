"""What a run leaves to look at: TensorBoard's charts and pictures, events, the profile of some steps, the report."""

import gzip
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from peer_dist.config import ConfigError, parse_config
from peer_dist.measures.metrics import read_metrics
from peer_dist.measures.usage_map import usage_map
from peer_dist.ranks.signals import StopRequest
from peer_dist.report.page import write_report
from tests.ranks import Command, run_ranks
from tests.runs import in_folder, losses_of, metrics_of, small_config, with_keys

PROFILED = range(3, 5)


def profiled_run(rank, world_size, tree):
    """A run with two steps profiled: what its end says, and whether torch's groups are as they were."""
    from peer_dist.training import Trainer

    before = dict(vars(dist.ProcessGroup))
    trainer = Trainer(parse_config(tree, "test"), profile=PROFILED)
    with StopRequest() as stop:
        trainer.run(stop)
    said = io.StringIO()
    trainer.profile.conclude(Console(file=said, width=200))
    return said.getvalue(), dict(vars(dist.ProcessGroup)) == before


def whole_run(rank, world_size, tree):
    from peer_dist.training import Trainer

    with StopRequest() as stop:
        Trainer(parse_config(tree, "test")).run(stop)


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    """Two ranks train six steps, two of them profiled, and then four more; the config, and what the profile said."""
    tree = with_keys(small_config(text, tmp_path_factory.mktemp("run")), parallel={"expert": 2})
    said = run_ranks(profiled_run, 2, with_keys(tree, train={"steps": 6}))
    run_ranks(whole_run, 2, tree)
    return tree, said


def folder_of(tree):
    return Path(tree["logging"]["dir"])


def test_usage_map_by_hand():
    """Unused experts are black, a hundredth of an even share violet, a hundredfold one yellow; joined ones a mean."""
    pixels = usage_map(torch.tensor([0.0, 1e-3, 1.0, 1e3], dtype=torch.float64))
    assert pixels.shape == (256, 256, 3)
    corners = pixels[[0, 0, 255, 255], [0, 255, 0, 255]].tolist()
    assert corners == [[0, 0, 0], [68, 1, 84], [33, 145, 140], [253, 231, 37]]
    assert usage_map(torch.ones(6)).shape == (2 * 85, 3 * 85, 3), "as square as its divisors allow"
    shares = torch.zeros(512, 512, dtype=torch.float64)
    shares[0, 1] = 4.0
    assert usage_map(shares.flatten())[0, :2].tolist() == [[33, 145, 140], [0, 0, 0]], "mean of 0, 4, 0 and 0"


def test_tensorboard_opens_on_charts_and_maps(run):
    tree, _ = run
    board = EventAccumulator(str(folder_of(tree)), {"tensors": 0, "images": 0}).Reload()
    layout = layout_pb2.Layout()
    layout.ParseFromString(board.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    scalars = set(board.Tags()["scalars"])
    for category in layout.category:
        for chart in category.chart:
            for pattern in chart.multiline.tag:
                assert any(re.match(pattern, tag) for tag in scalars), (chart.title, pattern)
    matched = [tag for tag in scalars if re.match(layout.category[1].chart[0].multiline.tag[0], tag)]
    assert sorted(matched) == ["experts/layer1_usage_percent", "experts/layer3_usage_percent"]
    assert [event.step for event in board.Images("experts/layer1_map")] == [0, 5, 10], "ever sparser"
    summaries = board.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"table_optimizer.lr" in summaries
    assert not [path for path in folder_of(tree).rglob("events.out*") if path.parent != folder_of(tree)], "one run"
    assert Image.open(folder_of(tree) / "images" / "experts_layer3_map.png").size == (255, 255)


def test_events(run):
    tree, _ = run
    events = read_metrics(folder_of(tree) / "events.jsonl")
    # other programs on the machine may make a rank slow
    told = [(event["event"], event["step"]) for event in events if event["event"] != "slow rank"]
    saved = [("checkpoint", step) for step in (4, 6, 8, 10)]
    assert told == [("start", 0), *saved[:2], ("done", 6), ("start", 6), *saved[2:], ("done", 10)]
    start = events[0]
    assert start["config"]["peer"]["num_experts"] == 225
    assert start["environment"]["layout"]["expert rows"] == 2
    assert sum(start["environment"]["hosts"].values()) == 2
    assert start["environment"]["versions"]["torch"] == torch.__version__


def test_profile(run, tmp_path):
    tree, ((said, restored), _) = run
    assert restored, "outside of the profiled steps nothing is replaced"
    for rank in range(2):
        with gzip.open(folder_of(tree) / "profile" / f"rank-{rank}-steps-3-4.json.gz") as file:
            events = json.load(file)["traceEvents"]
        names = {event.get("name") for event in events}
        assert {f"peer/{span}" for span in ("retrieve", "dispatch", "experts", "combine", "optimizer")} <= names
        assert {name for name in names if re.match(r"step \d+$", str(name))} == {"step 3", "step 4"}
        assert any(
            re.match(r"all.?to.?all.*, expert tensor and model \(2\), [\d,]+ bytes", str(name)) for name in names
        )
        assert [event for event in events if event.get("ph") == "C" and event["name"] == "memory (MiB)"]
    table = re.search(r"^ *all +([\d,.]+) *$", said, re.MULTILINE)
    tokens = tree["train"]["global_batch_size"] * tree["model"]["seq_length"]
    both = [line["exchange/bytes_per_token"] * tokens for line in metrics_of(tree) if line["step"] in PROFILED]
    assert float(table[1].replace(",", "")) == pytest.approx(np.mean(both) / 2 / 1e3, rel=0.1), "one rank of two"
    quiet = in_folder(tree, tmp_path)
    run_ranks(whole_run, 2, quiet)
    assert losses_of(tree) == losses_of(quiet), "a profiled step computes the same"


def test_steps_to_profile_are_checked_at_once(small, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(small))
    for steps, sentence in (
        ("5:2", "the run has the steps 1 to 10 (train.steps); name some of them"),
        ("8:11", "the run has the steps 1 to 10"),
        ("x", "is no range of steps; write 10:15 for the steps 10 to 15"),
    ):
        with Command(1, ["train", "-c", str(config), "--profile", steps], tmp_path / "words") as command:
            assert command.codes(60) == [2]
            assert f"--profile {steps}: {sentence}" in command.words(0)


class Page(HTMLParser):
    """What a page says, and what it asks of the network."""

    def __init__(self, path):
        super().__init__()
        self.words, self.asked, self.pictures = [], [], 0
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.pictures += tag == "svg"
        self.asked += [
            value
            for name, value in attributes
            if name in ("src", "href", "xlink:href") and not value.startswith(("data:", "#"))
        ]

    def handle_data(self, data):
        self.words.append(data)


def test_report_of_a_run(run):
    tree, _ = run
    folder = folder_of(tree).parent
    (folder / "plan.json").write_text(json.dumps({"tokens_per_second": 1e9}))
    page = Page(write_report([folder], None))
    assert (folder / "report.html").is_file()
    assert page.asked == [], "it needs nothing else"
    assert page.pictures == 8
    perplexity = metrics_of(tree)[-1]["val/perplexity"]
    for words in (
        f"held-out perplexity {perplexity:,.2f}",
        "(0% of the plan)",
        "interruptions restarts: 1",
        "went on, 2 rank(s)",
        "expert rows 2",
        "num_experts: 225",
        "step 8 (",
        "as planned",
    ):
        assert words in page.text, words
    assert folder.name in page.text


def test_report_compares_runs(run, tmp_path):
    """One of other heads, and one of an older version: without events, with fewer layers."""
    tree, _ = run
    older, other = tmp_path / "older", tmp_path / "other"
    older.mkdir()
    shutil.copytree(folder_of(tree), other)
    events = (other / "events.jsonl").read_text()
    (other / "events.jsonl").write_text(events.replace('"heads": 3', '"heads": 2'))
    lines = [{k: v for k, v in line.items() if "layer3" not in k} for line in metrics_of(tree)]
    lines[2]["optimizer/skipped_steps"] = 1.0
    lines[3]["train/loss"] = None
    (older / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = Page(write_report([folder_of(tree).parent, other, older], tmp_path / "all.html"))
    for words in ("3 runs compared", "peer.heads 3 2 –", "step left out: gradients"):
        assert words in page.text, words
    assert "peer.top_k" not in page.text, "where they agree"


def test_what_cannot_be_reported_is_one_sentence(run, tmp_path):
    tree, _ = run
    with pytest.raises(ConfigError, match=r"has no metrics.jsonl, nor has its folder logs"):
        write_report([tmp_path], None)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "val/loss": 5.9}\n')
    with pytest.raises(ConfigError, match=r"holds no step yet"):
        write_report([tmp_path], None)
    with pytest.raises(ConfigError, match=r"--output .*none/x.html: cannot be written \(No such file"):
        write_report([folder_of(tree).parent], tmp_path / "none" / "x.html")
