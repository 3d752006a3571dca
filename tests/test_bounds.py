"""Odd values of every key, of devices, sweeps and options: one sentence at once, or a plan of a second."""

import itertools
import math
import os
import time
from typing import get_args, get_type_hints

import pytest
import yaml

from peer_dist import cli
from peer_dist.config import ConfigError, load_config, parse_config
from peer_dist.config.schema import Config
from peer_dist.mistake import Mistake
from peer_dist.planning.hardware import Hardware, load_hardware
from peer_dist.planning.plan import plan
from peer_dist.reading import as_yaml, parse_yaml

_WORDS = """
.nan .inf -.inf 1e400 -1e400 -1 0 1 2 1.5 true yes 1:30 010 0x10 1e18 1e19 1e-320 1e300 -1e300 1_000 2020-99-99
'' null ~ [] {} [1] [[[1]]] '1' '0.5' auto [0.9] [true,true] ['0.9',0.9] [dense,3] !!python/name:os.system
"""
WRITTEN = [*_WORDS.split(), *("1" + "0" * zeros for zeros in (18, 19, 38, 400)), "-" + "9" * 30, "x" * 300, "", "💥"]
WRITTEN += [r'"a\0b"', r'"\ud800"', r'"a\nb"', r'"\e[31m"', "a\0b", "\udcff"]
WRITTEN += ["!!int foo", "!!float x", "&a [*a]", "{a: {b: 1}}"]
PLAIN = [math.nan, math.inf, -math.inf, 10**5000, -(10**5000), 10**19, 1e300, 5e-324, True, b"x", "a\0b", "\ud800"]
PLAIN += [object(), (1, 2), {1: 2}, [None], "", " ", "x" * 300, float(2**70), complex(1, 2), {"a": math.nan}]

KEYS = [(section, key) for section, field in Config.model_fields.items() for key in field.annotation.model_fields]
HARDWARE = load_hardware("h100")


def check_sentence(error):
    text = str(error)
    assert "\n" not in text, text
    assert text.isprintable(), text
    assert len(text) < 2100


def accepted(make, *args):
    """What ``make`` returns, or None after a sentence; whatever else it raises fails the test."""
    try:
        return make(*args)
    except Mistake as error:
        check_sentence(error)
        return None


def check_plan(config, ranks=1, devices=8):
    """The plan of a config takes no time, and all its figures are numbers."""
    begin = time.process_time()
    found = accepted(plan, config, ranks, devices, HARDWARE, 50304)
    if found is not None:
        figures = [*found.values()["seconds"].values(), found.days, found.mfu, found.memory.peak]
        assert all(math.isfinite(figure) for figure in figures if not isinstance(figure, str))
    assert time.process_time() - begin < 3


def bounds(field):
    """The largest and the least values that the schema allows for a key."""
    annotations = [field, *(part for part in get_args(field.annotation) if hasattr(part, "__metadata__"))]
    metadata = [m for one in annotations for m in getattr(one, "metadata", getattr(one, "__metadata__", ()))]
    metadata += [m for each in metadata for m in getattr(each, "metadata", ())]
    return {getattr(m, name) for m in metadata for name in ("le", "ge", "gt") if getattr(m, name, None) is not None}


@pytest.mark.parametrize("kind", ["dense", "peer", "pkm", "moe", "sigma_moe"])
def test_any_value_of_any_key(tmp_path, kind):
    """Thousands of values, written and plain; those that are accepted are planned."""
    path = tmp_path / "run.yaml"
    path.write_text(f"data: {{prefix: a}}\nmodel: {{mlp: {kind}}}\n")
    tried = planned = 0
    for section, key in (each for each in KEYS if kind == "dense" or each[0] in (kind, "router")):
        begin = time.process_time()
        for value in WRITTEN:
            tried += 1
            config = accepted(load_config, path, [f"{section}.{key}={value}"])
            if config is not None and section not in ("data", "logging", "checkpoint"):
                planned += 1
                check_plan(config)
        for value in PLAIN:
            tried += 1
            tree = {"data": {"prefix": "a"}, "model": {"mlp": kind}}
            tree[section] = {**tree.get(section, {}), key: value}
            accepted(parse_config, tree, "manifest.json")
        assert time.process_time() - begin < 10, f"{section}.{key}"
    assert tried > 300
    assert planned > 10


@pytest.mark.parametrize("kind", ["dense", "peer", "pkm", "moe", "sigma_moe"])
def test_the_largest_values_are_planned_at_once(kind):
    """Every bound of every key, on one device and on as many as there can be."""
    base = {"data": {"prefix": "a"}, "model": {"mlp": kind}, "train": {"global_batch_size": 1 << 20}}
    edges = [
        (section, key, value)
        for section, field in Config.model_fields.items()
        for key, own in field.annotation.model_fields.items()
        for value in bounds(own)
        if kind == "dense" or section in (kind, "model", "router", "parallel", "train", "table_optimizer")
    ]
    assert len(edges) > 40
    for section, key, value in edges:
        tree = {**base, section: {**base.get(section, {}), key: value}}
        for rows in ({}, {"expert": "auto"}):
            config = accepted(parse_config, {**tree, "parallel": {**rows, **tree.get("parallel", {})}}, "x")
            if config is not None:
                for ranks in (1, 1 << 17):
                    check_plan(config, ranks)


def test_large_models_that_people_have():
    """Sixty-four nodes with billions of experts, and the largest dense ones, are within the bounds."""
    for model, peer, train in (
        (
            {"num_layers": 64, "hidden_size": 16384, "num_attention_heads": 128, "mlp": "peer"},
            {"num_experts": 65536**2},
            {},
        ),
        ({"num_layers": 126, "hidden_size": 16384, "num_attention_heads": 128, "ffn_hidden_size": 53248}, {}, {}),
        ({"num_layers": 2000, "seq_length": 1 << 20}, {}, {"steps": 10**9, "global_batch_size": 4096}),
    ):
        tree = {"data": {"prefix": "a"}, "model": model, "peer": peer, "train": train}
        check_plan(parse_config(tree, "large"), 1)


@pytest.mark.parametrize(
    ("tree", "sentence"),
    [
        (
            {"peer": {"num_experts": 2**40, "top_k": 1}, "model": {"mlp": "peer", "hidden_size": 1 << 20}},
            "peer.num_exp",
        ),
        ({"model": {"seq_length": 1 << 24}, "train": {"micro_batch_size": 1 << 24}}, "train.micro_batch_size x model"),
        ({"model": {"seq_length": 1 << 24}, "train": {"steps": 10**12}}, "train.steps x train.global_batch_size x"),
        (
            {"model": {"num_layers": 10**9}},
            "model.num_layers: input should be less than or equal to 4096; got 1000000000",
        ),
        ({"model": {"hidden_size": 10**12}}, "model.hidden_size: input should be less than or equal to 16777216"),
        ({"peer": {"num_experts": (10**15 + 1) ** 2}}, "peer.num_experts: input should be less than"),
        (
            {"peer": {"num_experts": 10**12 - 1}},
            "must be the square of a whole number; 999999999999 is not, 9999980000",
        ),
        ({"optimizer": {"betas": [0.9]}}, "optimizer.betas: input should be a list of 2 numbers; got [0.9]"),
        ({"optimizer": {"betas": [0.9, "0.9"]}}, "optimizer.betas: input should be a valid number; got '0.9'"),
        ({"peer": {"heads": None}}, "peer.heads: input should be a whole number; got null (no value)"),
        ({"model": None}, "model: input should be a section of keys and values; got null"),
        ({"model": [3]}, "model: input should be a section of keys and values; got [3]"),
        ({"zero": {"offload": "yes"}}, "zero.offload: input should be true or false; got 'yes'"),
        ({"optimizer": {"lr": True}}, "optimizer.lr: input should be a valid number; got true"),
        ({"parallel": {"expert": "some"}}, "parallel.expert: input should be a whole number or 'auto'; got 'some'"),
        ({"parallel": {"expert": True}}, "parallel.expert: input should be a whole number; got true"),
        ({"model": {"num_layers": {"x": 1}}}, "model.num_layers: input should be a whole number; got a mapping"),
        ({"checkpoint": {"dir": "a" * 256}}, "holds a name of 256 bytes, and file systems take 255"),
        ({"checkpoint": {"init_from": "a\tb"}}, r"checkpoint.init_from: 'a\tb' holds control characters"),
        ({"optimizer": {"eps": 1e-300}}, "optimizer.eps: input should be greater than or equal to "),
        ({"data": {"blend": {"a": 1e308, "b": 1e308}}}, "data.blend: "),
        ({"data": {"blend": {"a": 1e-320}}}, "data.blend: every weight must lie between 1e-30 and 1e30"),
        ({"data": {"blend": {f"a{i}": 1 for i in range(20_000)}}}, "data.blend: has 20,000 prefixes"),
        *(
            ({"data": {"prefix": "a", "split": split}}, "data.split: must be three numbers such as 90,5,5")
            for split in (
                "nan,1,1",
                "inf,1,1",
                "1e400,1,1",
                "0,0,0",
                "0,1,1",
                "1,-1,1",
                "1,1",
                "1,1,1,1",
                "a",
                ",,",
                "1,1,\n1",
            )
        ),
    ],
)
def test_what_is_said(tree, sentence):
    with pytest.raises(ConfigError) as error:
        parse_config({"data": {"prefix": "a"}, **tree}, "run.yaml")
    assert sentence in str(error.value)
    check_sentence(error.value)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model=3", "command line (model=3): model: input should be a section"),
        (
            "model.num_layers.x=1",
            "command line (model.num_layers.x=1): model.num_layers: input should be a whole number",
        ),
        ("=3", "command line: '=3' is not of the form section.key=value"),
        ("a..b=1", "command line: 'a..b=1' is not of the form section.key=value"),
        ("peer.heads=", "command line (peer.heads=): peer.heads: input should be a whole number; got null (no value)"),
        ("data.prefix=a\0b", "the character U+0000 is not allowed"),
        (os.fsdecode(b"data.prefix=\xff"), "the character U+DCFF is not allowed"),
        ("train.steps=1e400", "command line: 'train.steps=1e400': line 1: the number 1e400 is too large"),
        ("x\ny=1", "unknown key; known: model, "),
        ("model.mlp=[" + "dense," * 5000 + "]", "model.mlp: "),
    ],
)
def test_overrides(tmp_path, override, sentence):
    path = tmp_path / "run.yaml"
    path.write_text("data: {prefix: a}\n")
    with pytest.raises(ConfigError) as error:
        load_config(path, [override])
    assert sentence in str(error.value)
    check_sentence(error.value)


def test_the_working_folder_is_a_path():
    assert parse_config({"data": {"prefix": "a"}, "checkpoint": {"dir": "."}}, "test").checkpoint.dir == "."


def test_whole_numbers_may_be_floats_and_lists_tuples():
    config = parse_config(
        {"data": {"prefix": "a"}, "train": {"steps": 1e3}, "optimizer": {"lr": 1, "betas": [0, 0.5]}}, "x"
    )
    assert (config.train.steps, config.optimizer.lr, config.optimizer.betas) == (1000, 1.0, (0.0, 0.5))
    assert type(config.train.steps) is int
    assert parse_config(config.model_dump(mode="json"), "a manifest") == config


def test_aliases_are_values_of_their_own(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("data: {prefix: a}\noptimizer: &o {lr: 2.0}\ntable_optimizer: *o\n")
    config = load_config(path, ["optimizer.lr=3"])
    assert (config.optimizer.lr, config.table_optimizer.lr) == (3, 2)


@pytest.mark.parametrize(
    "text", ["1e3", "0o10", "1:30", "yes", "010", "null", "~", "1_0", "2020-01-01", "a: b", "ü💥", "'", ".nan"]
)
def test_what_is_written_is_read(text):
    value = {"section": {"key": text, text: [text, 1, 1.5, 1e-5, 1e22, True, None]}}
    assert parse_yaml(as_yaml(value), "x", ConfigError) == value
    assert yaml.safe_load(as_yaml(value)) == value, "by other readers too"


# ---------------------------------------------------------------- devices


def test_devices(tmp_path):
    """Every figure of a device file with every odd value; what is accepted is planned with."""
    path, config = tmp_path / "mine.yaml", parse_config({"data": {"prefix": "a"}, "model": {"mlp": "peer"}}, "x")
    entry = HARDWARE.model_dump(mode="json", exclude={"name"})
    tried = 0
    for key in [*Hardware.model_fields, "flops_per_s.float32", "achievable.flops", "other", "achievable.x"]:
        name, _, inner = key.partition(".")
        own = yaml.safe_dump({k: v for k, v in entry.items() if k != name})
        for value in WRITTEN:
            if "\0" in value or "\udcff" in value:
                continue
            line = f"{name}: {value}" if not inner else f"{name}: {{{inner}: {value}}}"
            path.write_text("mine:\n" + "".join(f"  {each}\n" for each in [*own.splitlines(), line]))
            device = accepted(load_hardware, str(path))
            tried += 1
            if device is not None:
                found = plan(config, 2, 2, device, 50304) if config.train.global_batch_size % 2 == 0 else None
                assert math.isfinite(found.days)
                found.tables()
    assert tried > 500
    for text in (
        "",
        "a: 1",
        "a: {}",
        "a: {}\nb: {}",
        "[1]",
        "a: {memory_bytes: 1, memory_bytes: 2}",
        "a: &a {name: *a}",
        "\0",
    ):
        path.write_text(text)
        assert accepted(load_hardware, str(path)) is None
    for name in ("nothing", "no.yaml", "", str(tmp_path), f"{tmp_path}/x.yaml/y.yaml"):
        assert accepted(load_hardware, name) is None


# ---------------------------------------------------------------- sweeps


def test_sweep_files(text, tmp_path):
    from peer_dist.sweep.spec import SweepFile, load_sweep

    base = {
        "base": {"data": {"prefix": str(text)}, "train": {"global_batch_size": 8}},
        "budgets": [1e12],
        "models": {"dense": None},
    }
    path = tmp_path / "sweep.yaml"

    def load(changes):
        tree = {key: value for key, value in {**base, **changes}.items() if value is not ...}
        path.write_text(as_yaml(tree))
        begin = time.process_time()
        loaded = accepted(load_sweep, path, tmp_path / "out")
        assert time.process_time() - begin < 5
        return loaded

    assert load({}) is not None
    values = [
        math.nan,
        math.inf,
        0,
        -1,
        1e300,
        10**30,
        True,
        "x",
        None,
        [],
        {},
        [math.nan],
        [math.inf],
        [0],
        [-1],
        [1e300],
    ]
    values += [[True], ["1e12"], [1e-320], [10**30], [[1]], [None], {"a": 1}, {"a": {"b": 1}}, {"": {}}, {"a/b": {}}]
    values += [
        {"a" * 300: None},
        {"a": {"..": 1}},
        {"a": {"": 1}},
        {"a": {"model": 3}},
        {"a": {"model.num_layers.x": 3}},
    ]
    for key in SweepFile.model_fields:
        for value in values:
            load({key: value, **({"budgets": ...} if key == "tokens" else {})})
    for section in ("train", "optimizer", "evaluation", "checkpoint", "logging"):
        for value in (None, [], 3, "x"):
            assert load({"base": {**base["base"], section: value}}) is None
    for changes in (
        {"budgets": [1e9, 1e9 + 1]},
        {"seeds": [2**32]},
        {"seeds": [*range(10_001)]},
        {"sizes": {f"s{i}": {} for i in range(1000)}, "variants": {f"v{i}": {} for i in range(1000)}},
        {"tune": {"learning_rates": {"dense": [math.nan]}}},
        {"tune": {"learning_rates": {"dense": [1e300]}}},
        {"tune": {"learning_rates": {"dense": [True]}}},
        {"tune": {"learning_rates": {"dense": [["1e-3", 1e-3]]}}},
        {"tune": {"learning_rates": {"dense": [1e-3]}, "seeds": [1, 1]}},
        {"tune": {"learning_rates": {"dense": [1e-3]}, "seeds": [-1]}},
        {"budgets": ..., "tokens": 1e30},
        {"base": "a\0b"},
        {"base": "../nowhere.yaml"},
    ):
        assert load(changes) is None, changes
    shared = (
        "base: {data: {prefix: %s}, optimizer: &o {lr: 0.5}, table_optimizer: *o}\nmodels: {dense: {}}\ntokens: 1e5\n"
    )
    path.write_text(shared % text)
    (run,) = load_sweep(path, tmp_path / "out").runs
    assert run.config.table_optimizer.warmup_steps is None, "the sweep's own keys are the dense optimizer's"


# ---------------------------------------------------------------- options

NUMBERS = [
    "nan",
    "inf",
    "-inf",
    "1e400",
    "-1e400",
    "1" + "0" * 30,
    "9" * 5000,
    "-1",
    "x",
    "",
    "1e-320x",
    "\udcff",
    "１e999",
]
OPTIONS = {
    "generate": ["--tokens", "--temperature", "--top-k", "--top-p", "--seed", "--batch-size", "--tensor", "--pipeline"],
    "evaluate": ["--stride", "--batch-size"],
    "usage": ["--batch-size"],
    "prepare": ["--train-bpe", "--max-document"],
    "plan": ["--gpus", "--gpus-per-node", "--tokens", "--price", "--hits", "--zipf", "--hit-rate", "--vocab-size"],
    "match": ["--tolerance", "--vocab-size"],
    "sweep": ["--jobs", "--ranks", "--limit-minutes", "--task"],
    "submit": ["--nodes", "--gpus-per-node", "--ranks-per-node", "--signal-lead", "--chain", "--max-restarts"],
    "doctor": ["--seconds"],
}  # fmt: skip


def test_every_number_of_the_command_line():
    """Refused while the command line is read: nothing is opened, and no command begins."""
    import typer

    from peer_dist.cli import app

    commands = typer.main.get_command(app).commands
    for name, command in commands.items():
        hints = get_type_hints(command.callback)
        numeric = [p.opts[-1] for p in command.params if {int, float} & {hints[p.name], *get_args(hints[p.name])}]
        assert set(numeric) == set(OPTIONS.get(name, [])), "add a new one here, and make it by cli.options"
    for command, options in OPTIONS.items():
        for option, value in itertools.product(options, NUMBERS):
            with pytest.raises(Mistake) as error:
                commands[command].main([f"{option}={value}"], standalone_mode=False)
            check_sentence(error.value)
            assert str(error.value).startswith(f"{option} "), (command, option, value)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["trian"], "error: No such command 'trian'. Did you mean 'train'?\n"),
        (["train", "--[red]x"], "error: No such option: --[red]x; see `peer-dist train --help`\n"),
        (["train"], "error: Missing option '--config' / '-c'; see `peer-dist train --help`\n"),
        (["train", "-c"], "error: Option '-c' requires an argument\n"),
        (["plot", "--json=\x1b[2J"], "error: No such option: --json; see `peer-dist plot --help`\n"),
        (["prepare", "a\nb"], "error: Missing option '--output' / '-o'; see `peer-dist prepare --help`\n"),
        (["plan", "--json=3"], "error: Option '--json' does not take a value\n"),
    ],
)
def test_a_command_line_that_cannot_be_is_one_sentence(arguments, sentence, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["peer-dist", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert capsys.readouterr() == ("", sentence)
