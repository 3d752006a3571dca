"""Expert usage, the unigram line, held-out loss and generation, and the commands around them."""

import contextlib
import io
import itertools
import json
import math
import os
import re
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.distributed as dist

from peer_dist.data.prepare import read_prepared
from peer_dist.evaluation.usage_report import HeadUsage
from peer_dist.measures.held_out import unigram_loss
from peer_dist.measures.usage import ExpertUsage, share_histogram, uniform_unevenness
from tests.ranks import Command, run_command, run_ranks
from tests.runs import metrics_of, run_to_the_end, small_config, with_keys

# ---------------------------------------------------------------- usage


def unevenness(picks, experts):
    """Of equal picks, from its definition: log N minus the entropy."""
    shares = [picks.count(expert) / len(picks) for expert in range(experts)]
    return math.log(experts) + sum(share * math.log(share) for share in shares if share)


def test_usage_by_hand():
    """Three tokens of one head over four experts; the last pick has a gate of 0."""
    indices = torch.tensor([[[0, 1]], [[0, 2]], [[0, 3]]])
    gates = torch.tensor([[[0.75, 0.25]], [[0.5, 0.5]], [[1.0, 0.0]]])
    usage = ExpertUsage(4, torch.device("cpu"))
    usage(indices[:1], gates[:1])
    usage(indices[1:], gates[1:])
    summary = usage.summary(2)
    assert summary.usage_percent == 75
    assert summary.top1_usage_percent == 25
    shares = [0.75, 1 / 12, 1 / 6]  # gates 2.25, 0.25 and 0.5 of 3
    assert summary.unevenness == pytest.approx(math.log(4) + sum(z * math.log(z) for z in shares), rel=1e-12)
    assert summary.picks_per_shard_max_over_mean == pytest.approx(4 / 3)  # 4 picks and 2
    every = [unevenness(picks, 4) for picks in itertools.product(range(4), repeat=6)]
    assert summary.unevenness_if_uniform == pytest.approx(sum(every) / len(every), rel=1e-9)
    usage.reset()
    empty = usage.summary(2)
    assert (empty.usage_percent, empty.top1_usage_percent, empty.unevenness) == (0, 0, 0)


def test_uniform_unevenness_is_the_mean_over_draws():
    """Exactly, over all draws of a few picks; in a sample of many; and its limit."""
    for experts, picks in ((1, 3), (2, 10), (3, 5), (5, 2)):
        every = [unevenness(drawn, experts) for drawn in itertools.product(range(experts), repeat=picks)]
        assert uniform_unevenness(experts, picks) == pytest.approx(sum(every) / len(every), rel=1e-9, abs=1e-12)
    drawn = torch.randint(1000, (200, 3000), generator=torch.Generator().manual_seed(1))
    sample = [unevenness_of_counts(torch.bincount(row, minlength=1000)) for row in drawn]
    assert uniform_unevenness(1000, 3000) == pytest.approx(sum(sample) / len(sample), rel=0.01)
    assert uniform_unevenness(1000, 10**6) == pytest.approx(999 / (2 * 10**6), rel=0.01)


def unevenness_of_counts(counts):
    z = counts.double() / counts.sum()
    return math.log(len(z)) + float(torch.special.xlogy(z, z).sum())


def routed(tokens):
    generator = torch.Generator().manual_seed(2)
    indices = torch.randint(50, (tokens, 2, 3), generator=generator)
    return indices, torch.rand(tokens, 2, 3, generator=generator)


def usage_of_a_share(rank, world_size):
    usage = ExpertUsage(50, torch.device("cpu"))
    usage(*(part.split([3, 5])[rank] for part in routed(8)))
    return usage.summary(4, dist.group.WORLD)


def test_usage_over_ranks_is_that_of_all_tokens():
    usage = ExpertUsage(50, torch.device("cpu"))
    usage(*routed(8))
    want = usage.summary(4)
    assert want.top1_usage_percent < want.usage_percent < 100
    for summary in run_ranks(usage_of_a_share, 2):
        assert summary.unevenness == pytest.approx(want.unevenness, rel=1e-12)
        assert {**vars(summary), "unevenness": want.unevenness} == vars(want)


EXPERTS = 64


def distinct_picks(tokens, heads, top_k, experts):
    """Picks that differ within a head; a few gates are 0, and sums of gates are exact in any order."""
    generator = np.random.default_rng(3)
    indices = np.stack(
        [generator.choice(experts, (top_k,), replace=False, p=np.arange(experts) / sum(range(experts)))
         for _ in range(tokens * heads)]
    ).reshape(tokens, heads, top_k)  # fmt: skip
    return indices, generator.integers(0, 4, indices.shape) / 8


def head_usage_of_a_share(rank, world_size, indices, gates):
    usage, live = HeadUsage(EXPERTS, torch.device("cpu")), ExpertUsage(EXPERTS, torch.device("cpu"))
    begin, end = (len(indices) * part // world_size for part in (rank, rank + 1))
    for middle in (begin, end):  # two passes, one of them empty
        usage(torch.tensor(indices[begin:middle]), torch.tensor(gates[begin:middle]))
        live(torch.tensor(indices[begin:middle]), torch.tensor(gates[begin:middle]))
    usage.reduce(dist.group.WORLD)
    summary, spread = live.summary(2, dist.group.WORLD), live.head_spread(dist.group.WORLD)
    arrays = {name: value.numpy() for name, value in usage.arrays(7, 8)}
    return asdict(usage.layer_usage(8)), arrays, asdict(summary), asdict(spread)


def test_usage_of_heads_against_numpy():
    """Everything of 11 heads from saved picks, in loops; and two ranks' is exactly one's."""
    tokens, heads, top_k = 50, 11, 3
    indices, gates = distinct_picks(tokens, heads, top_k, EXPERTS)
    mass = np.zeros((heads, EXPERTS))
    np.add.at(mass, (np.arange(heads)[None, :, None], indices), gates)
    first = np.array([np.isin(range(EXPERTS), indices[:, head, 0]) for head in range(heads)])
    overlap = [
        [np.mean([len({*t[a]} & {*t[b]}) for t in indices.tolist()]) / top_k for b in range(heads)]
        for a in range(heads)
    ]
    z = mass / mass.sum(1, keepdims=True)
    uneven = np.log(EXPERTS) + np.sum(z * np.log(np.where(z > 0, z, 1)), axis=1)

    one = run_ranks(head_usage_of_a_share, 1, indices, gates)[0]
    layer, arrays, summary, spread = one
    for head, got in enumerate(layer["heads"]):
        assert got["usage_percent"] == 100 * np.mean(mass[head] > 0)
        assert got["dead_experts"] == np.sum(mass[head] == 0) > 0
        assert got["top1_usage_percent"] == 100 * np.mean(first[head])
        assert got["never_first_experts"] == np.sum(~first[head])
        assert got["unevenness"] == pytest.approx(uneven[head], rel=1e-12)
        assert got["picks_per_expert"] == tokens * top_k / EXPERTS
    for got in (layer["together"], summary):
        assert got["dead_experts"] == np.sum(mass.sum(0) == 0)
        assert got["top1_usage_percent"] == 100 * np.mean(first.any(0))
        assert got["picks_per_expert"] == tokens * heads * top_k / EXPERTS
        assert got["unevenness"] == pytest.approx(float(np.log(64) + np.sum(z_log_z(mass.sum(0)))), rel=1e-12)
    np.testing.assert_allclose(layer["overlap"], overlap, rtol=1e-12)
    norms = np.linalg.norm(mass, axis=1)
    np.testing.assert_allclose(layer["similarity"], mass @ mass.T / norms / norms[:, None], rtol=1e-12)
    np.testing.assert_array_equal(arrays["counts_layer7"], np.bincount(indices.ravel(), minlength=EXPERTS))
    np.testing.assert_array_equal(arrays["head_mass_layer7"], mass)
    np.testing.assert_array_equal(arrays["mass_layer7"], mass.sum(0))
    pairs = mass.reshape(heads, 8, 8)
    np.testing.assert_array_equal(arrays["subkey_mass_layer7"], np.stack([pairs.sum(2), pairs.sum(1)], 1))
    assert layer["subkeys"][0]["usage_percent"] == 100 * np.mean(pairs.sum((0, 2)) > 0)

    assert spread["head_top1_usage_percent_min"] == 100 * first.mean(1).min() < spread["head_top1_usage_percent_max"]
    apart = ~np.eye(heads, dtype=bool)
    assert spread["head_overlap"] == pytest.approx(np.array(overlap)[apart].mean(), rel=1e-12)

    for other in run_ranks(head_usage_of_a_share, 2, indices, gates):
        for got, want in zip((other[0], *other[2:]), (one[0], *one[2:]), strict=True):
            assert got == want
        for name, array in arrays.items():
            np.testing.assert_array_equal(other[1][name], array)


def z_log_z(mass):
    z = mass[mass > 0] / mass.sum()
    return z * np.log(z)


def test_a_layer_of_one_head_has_no_spread():
    single = ExpertUsage(4, torch.device("cpu"))
    single(torch.tensor([[[0]], [[2]]]), torch.ones(2, 1, 1))
    assert single.head_spread() is None


def test_histogram_of_shares():
    """Experts with 2, 1 and 0 times an even share."""
    usage = ExpertUsage(3, torch.device("cpu"))
    usage(torch.tensor([[[0, 1]]]), torch.tensor([[[2.0, 1.0]]]))
    counts, limits = share_histogram(usage.shares())
    assert [(round(limit, 1), count) for count, limit in zip(counts, limits) if count] == [(0.2, 1), (0.4, 1)]


def test_unigram_loss_by_hand():
    """Three tokens: counts 2, 1, 0 of the training text, and one more of each."""
    loss = unigram_loss(torch.tensor([[0, 1, 0]]), torch.tensor([[0, 1], [2, 2]]), 3)
    assert loss == pytest.approx(-(math.log(3 / 6) + math.log(2 / 6) + 2 * math.log(1 / 6)) / 4, rel=1e-12)


# ---------------------------------------------------------------- a trained model


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    """The config of a run that two ranks made."""
    tree = small_config(text, tmp_path_factory.mktemp("run"))
    tree = with_keys(tree, parallel={"expert": 2}, data={"split": "96,2,2"})
    run_ranks(run_to_the_end, 2, tree)
    return tree


def evaluated(rank, world_size, tree):
    from peer_dist.data.stream import open_data
    from peer_dist.evaluation.generate import generate
    from peer_dist.evaluation.loading import load_model
    from peer_dist.measures.held_out import held_out_loss

    loaded = load_model(tree["checkpoint"]["dir"], world_size)
    stream = open_data(loaded.config.data, 32, loaded.config.train.seed).validation
    losses = [
        held_out_loss(loaded.model, stream, loaded.parallel, loaded.tokenizer, 3, sequences=sequences)
        for sequences in (8, 32)  # those of the run's own evaluation; more than one pass on three ranks
    ]
    text = "".join(piece for (piece,) in generate(loaded, ["ROMEO:"], 20, seed=1))
    greedy = "".join(piece for (piece,) in generate(loaded, ["ROMEO:"], 5, temperature=0))
    return [loss.loss for loss in losses], [loss.tokens for loss in losses], text, greedy


def counted_once(rank, world_size, tree, layout):
    """Picks per expert and layer over 13 held-out sequences, which no layout divides."""
    from peer_dist.measures.held_out import held_out_loss
    from tests.runs import make_trainer

    trainer = make_trainer(with_keys(tree, parallel=layout, checkpoint={"dir": f"{tree['checkpoint']['dir']}-none"}))
    parallel, usage = trainer.parallel, trainer._new_usage()
    held_out_loss(trainer.model, trainer.data.validation, parallel, trainer.data.tokenizer, 4, 13, usage)
    assert all(layer.on_route is None for layer in trainer.layers.values())
    for each in usage.values():
        dist.all_reduce(each._counts, group=parallel.token_group)
    return {number: each._counts.tolist() for number, each in usage.items()}


def test_every_token_counts_once_in_any_layout(run):
    (one,) = run_ranks(counted_once, 1, run, {"expert": 1})
    assert {number: sum(counts) for number, counts in one.items()} == dict.fromkeys((1, 3), 13 * 32 * 3 * 4)
    for ranks, layout in [
        (2, {"expert": 2}),
        (3, {"expert": 3}),
        (2, {"tensor": 2, "expert": 2}),
        (2, {"tensor": 2, "sequence": True, "expert": 2}),
    ]:
        for got in run_ranks(counted_once, ranks, run, layout):
            assert got == one, layout


def test_every_token_counts_once_in_a_pipeline(run):
    """Two stages of two interleaved layers each: several micro-batches are on their way at a time."""
    deep = with_keys(run, model={"num_layers": 4, "mlp": ["peer", "dense", "peer", "peer"]})
    (one,) = run_ranks(counted_once, 1, deep, {"expert": 1})
    stages = run_ranks(counted_once, 2, deep, {"pipeline": 2, "virtual_pipeline": 2, "expert": 1})
    assert {**stages[0], **stages[1]} == one


def test_usage_command(run, tmp_path):
    """On one rank and on three, with a batch that does not divide the text; as JSON and as tables."""
    folder = run["checkpoint"]["dir"]
    arrays = {}
    for ranks in (1, 3):
        options = ["usage", "--checkpoint", folder, "--batch-size", "7", "-o", str(tmp_path / f"{ranks}"), "--json"]
        with Command(ranks, options, tmp_path / f"said-{ranks}") as command:
            assert command.codes(60) == [0] * ranks
        report = json.loads(command.outputs[0].read_text())
        with np.load(tmp_path / f"{ranks}" / "usage.npz") as saved:
            arrays[ranks] = {**saved}
        assert set(report["layers"]) == {"1", "3"}
        for number, layer in report["layers"].items():
            mass, counts = arrays[ranks][f"mass_layer{number}"], arrays[ranks][f"counts_layer{number}"]
            assert counts.sum() == report["tokens"] * 12
            assert mass.sum() == pytest.approx(report["tokens"] * 3), "softmax gates of 3 heads"
            got = layer["together"]
            assert got["unevenness"] == pytest.approx(math.log(225) + z_log_z(mass).sum())
            assert got["usage_percent"] == 100 * np.mean(mass != 0)
            assert len(layer["heads"]) == 3
            assert len(layer["subkeys"]) == 2
            assert layer["warning"] is None
    np.testing.assert_array_equal(arrays[3]["counts_layer1"], arrays[1]["counts_layer1"])
    np.testing.assert_allclose(arrays[3]["mass_layer1"], arrays[1]["mass_layer1"], rtol=1e-5)
    # what comes home from three shards is added up in another order, which can turn a tie in the next layer
    assert np.abs(arrays[3]["counts_layer3"] - arrays[1]["counts_layer3"]).sum() <= 8
    with Command(1, ["usage", "--checkpoint", folder, "--split", "test"], tmp_path / "table") as command:
        assert command.codes(60) == [0]
    said = command.outputs[0].read_text()
    assert all(part in said for part in ("layer 1", "layer 3", "all heads", "head 3", "sub-keys 2"))


def test_usage_is_logged(run):
    """Per window: dead experts and the spread of heads; per validation: a histogram."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    last = metrics_of(run)[-1]
    for layer in (1, 3):
        values = {name: last[f"experts/layer{layer}_{name}"] for name in ("dead_experts", "usage_percent")}
        assert values["usage_percent"] == pytest.approx(100 * (1 - values["dead_experts"] / 225))
        low, high = (last[f"experts/layer{layer}_head_top1_usage_percent_{end}"] for end in ("min", "max"))
        assert 0 < low <= high <= 100
        assert 0 < last[f"experts/layer{layer}_head_overlap"] < 1
    board = EventAccumulator(run["logging"]["dir"], {"histograms": 0}).Reload()
    histograms = board.Histograms("experts/layer3_log10_share")
    assert [event.step for event in histograms] == [0, 5, 10]
    assert 0 < histograms[-1].histogram_value.num <= 225


def test_evaluation_and_generation_at_any_number_of_ranks(run):
    last = metrics_of(run)[-1]
    one = run_ranks(evaluated, 1, run)[0]
    assert one[0][0] == pytest.approx(last["val/loss"], rel=1e-6)
    assert one[1] == [8 * 32, 32 * 32]
    for result in run_ranks(evaluated, 3, run):
        assert result[0] == pytest.approx(one[0], rel=1e-6)
        assert result[1:] == one[1:]


# ---------------------------------------------------------------- commands


def test_commands(run, tmp_path):
    """prepare, evaluate and generate as a user starts them, one after the other's files."""

    def output(*arguments):
        done = run_command(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    (tmp_path / "in.txt").write_text("To be, or not to be.\n\n" * 100)
    trained = "--checkpoint", run["checkpoint"]["dir"]
    # of a model that has learnt little: a seed whose first token is neither half a letter nor the text's end
    text, speed = output("generate", *trained, "--prompt", "ROMEO:", "--tokens", "9", "--seed", "2")
    _, said = output("prepare", "-o", str(tmp_path / "set"), str(tmp_path / "in.txt"))
    tokens = read_prepared(str(tmp_path / "set")).tokens
    assert f"{tokens:,} tokens" in " ".join(said.split())
    assert re.search(r"^\d tokens in .* tokens/s$", speed, re.MULTILINE)
    assert text.startswith("ROMEO:")
    assert len(text) > len("ROMEO:\n")
    report = json.loads(output("evaluate", *trained, "--data", str(tmp_path / "set"), "--split", "all", "--json")[0])
    assert (report["step"], report["split"], report["tokens"]) == (10, "all", (tokens - 1) // 32 * 32)
    assert report["perplexity"] == pytest.approx(math.exp(report["loss"]))
    assert 1 < report["perplexity"] < 257
    assert set(report["usage"]) == {"1", "3"}
    assert all(0 < usage["usage_percent"] <= 100 for usage in report["usage"].values())


def mistakes(rank, world_size, tree, folder):
    """The commands' own entry point, in a process that belongs to no group; then a world of one."""
    from peer_dist import cli
    from peer_dist.ranks.world import World

    dist.destroy_process_group()
    join, World.join = World.join, lambda self: pytest.fail("nothing may be started")
    file = f"{folder}/file"
    open(file, "w").close()
    path = f"{folder}/run.yaml"
    with open(path, "w") as config:
        json.dump(with_keys(tree, parallel={"expert": 1}), config)  # JSON is YAML
    good = ["--checkpoint", tree["checkpoint"]["dir"]]
    said = []
    for arguments in (
        ["prepare", "-o", f"{folder}/set", f"{folder}/nowhere.txt"],
        ["evaluate", "--checkpoint", f"{folder}/nowhere"],
        ["evaluate", *good, "--split", "some"],
        ["evaluate", *good, "--data", f"{folder}/nowhere"],
        ["usage", "--checkpoint", f"{folder}/nowhere"],
        ["usage", *good, "--output", f"{file}/usage"],
        ["generate", "--checkpoint", f"{folder}/nowhere"],
        ["generate", *good, "--prompt-file", f"{folder}/nowhere.txt"],
        ["train", "-c", path, f"checkpoint.dir={file}/checkpoints"],
        ["train", "-c", path, f"checkpoint.dir={folder}/new", f"logging.dir={file}/logs"],
    ):
        sys.argv = ["peer-dist", *arguments]
        with contextlib.redirect_stderr(io.StringIO()) as errors, pytest.raises(SystemExit) as leaving:
            cli.main()
        assert leaving.value.code == 2, arguments
        said.append(" ".join(errors.getvalue().split()))

    World.join = join
    assert "RANK" not in os.environ
    world = World.from_environment()
    assert world == World(rank=0, world_size=1, local_rank=0, local_world_size=1)
    with world.joined():
        total = torch.ones(3)
        dist.all_reduce(total)
        assert (dist.get_rank(), dist.get_world_size(), total.tolist()) == (0, 1, [1, 1, 1])
    assert not dist.is_initialized()
    return said


def test_wrong_names_are_told_in_one_sentence(run, tmp_path):
    """Exit code 2 and the name, before any process group; and a process that no launcher started is a world."""
    (said,) = run_ranks(mistakes, 1, run, str(tmp_path))
    named = ["nowhere.txt: ", "nowhere: ", "--split some: ", "nowhere"]
    named += ["nowhere: ", "--output", "nowhere: ", "--prompt-file", "checkpoint.dir", "logging.dir"]
    for sentence, name in zip(said, named, strict=True):
        assert sentence.startswith("error: ")
        assert name in sentence
        assert "Traceback" not in sentence


def test_texts_are_refused_before_ranks_meet(run, tmp_path):
    """In this process, which has no process group: a split without a sequence, other tokens, a damaged set."""
    from peer_dist.data.documents import DataError
    from peer_dist.data.prepare import prepare
    from peer_dist.evaluation.loading import check_text, read_settings

    settings = read_settings(run["checkpoint"]["dir"])
    for split in ("validation", "test", "all"):
        check_text(settings, None, split)
    (tmp_path / "short.txt").write_text("Many sheep crossed the river, and some of them came back.\n\n" * 20)
    for name, chosen in (("short", {}), ("other", {"train_bpe": 300}), ("cut", {})):
        prepare([tmp_path / "short.txt"], tmp_path / name, max_document=1000, **chosen)
    (tmp_path / "cut.bin").write_bytes((tmp_path / "cut.bin").read_bytes()[:-2])
    check_text(settings, str(tmp_path / "short"), "all")
    for name, said in (
        ("short", "the test split has no whole"),
        ("other", "was prepared with the tokenizer"),
        ("cut", "cut.bin: has "),
    ):
        with pytest.raises(DataError, match=said):
            check_text(settings, str(tmp_path / name), "test")
    assert not list(tmp_path.glob("*.cache"))
