"""Mistakes in a config: one sentence with file and key, before anything is started."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import peer_dist
from peer_dist.config import ConfigError, check_world, load_config, parse_config
from peer_dist.mistake import unimportable
from tests.ranks import run_command


def load(tmp_path, text, *overrides):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return load_config(path, overrides)


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("model: {hiden_size: 3}", [], "run.yaml: model.hiden_size: unknown key; did you mean hidden_size?"),
        ("modle: {}", [], "run.yaml: modle: unknown key; did you mean model?"),
        ("", [], "run.yaml: data: is missing; it has no default"),
        ("data: {}", [], "run.yaml: data: give exactly one of prefix and blend"),
        ("data: {prefix: a, blend: {b: 1}}", [], "run.yaml: data: give exactly one of prefix and blend"),
        ("data: {blend: {a: 0}}", [], "run.yaml: data.blend: needs at least one prefix, and every weight above 0"),
        ("data: {prefix: a, split: '1,2'}", [], "data.split: must be three numbers such as 90,5,5"),
        ("peer: {num_experts: 1000}", [], "run.yaml: peer.num_experts: must be the square of a whole number; 1000"),
        ("peer: {num_experts: 16}", [], "run.yaml: peer: top_k (16) must be at most sqrt(num_experts) (4)"),
        ("parallel: {expert: 0}", [], "run.yaml: parallel.expert: input should be greater than or equal to 1; got 0"),
        ("parallel: {expert: some}", [], "run.yaml: parallel.expert: "),
        ("peer: {key_dim: 7}", [], "run.yaml: peer.key_dim: must be even"),
        ("peer: {gate: tanh}", [], "run.yaml: peer.gate: input should be 'softmax', 'sigmoid' or 'relu'; got 'tanh'"),
        ("model: {hidden_size: 10}", [], "run.yaml: model: hidden_size (10) must be a multiple of"),
        ("model: {mlp: [peer]}", [], "run.yaml: model: mlp lists 1 kinds for 4 layers"),
        (
            "model: {mlp: mixture}",
            [],
            "run.yaml: model.mlp: 'mixture' is no kind of layer; known: dense, peer, moe, pkm, sigma_moe",
        ),
        ("model: {num_query_groups: 3}", [], "model: num_query_groups (3) must divide num_attention_heads (4)"),
        ("model: {ffn_top_k: 600}", [], "run.yaml: model: ffn_top_k (600) must be at most ffn_hidden_size (512)"),
        ("moe: {top_k: 9}", [], "run.yaml: moe: top_k (9) must be at most num_experts (8)"),
        ("sigma_moe: {top_k: 17}", [], "run.yaml: sigma_moe: top_k (17) must be at most num_experts (16)"),
        ("moe: {top_k: 1}", [], "run.yaml: moe: normalize must be false with top_k 1"),
        ("moe: {expert_bias: true}", [], "run.yaml: moe: expert_bias needs score sigmoid (got softmax)"),
        ("moe: {expert_bias: true, routing: expert_choice}", [], "run.yaml: moe: expert_bias must be false with"),
        (
            "data: {prefix: a}\nmodel: {mlp: moe}\nparallel: {expert_tensor: 2}",
            [],
            "run.yaml: parallel.expert_tensor must be 1 for model.mlp moe (got 2)",
        ),
        (
            "data: {prefix: a}\nmodel: {mlp: sigma_moe}\nparallel: {tensor: 2}",
            [],
            "run.yaml: parallel.sequence must be true for model.mlp sigma_moe with parallel.tensor (2)",
        ),
        (
            "data: {prefix: a}\nmodel: {mlp: peer}\nparallel: {tensor: 2}\nrouter: {kind: mlp}",
            [],
            "run.yaml: parallel.sequence must be true for router.kind mlp with parallel.tensor (2)",
        ),
        (
            "data: {prefix: a}\nmodel: {ffn_top_k: 64}\nparallel: {tensor: 2}",
            [],
            "run.yaml: parallel.tensor must be 1 with model.ffn_top_k (got 2)",
        ),
        (
            "data: {prefix: a}\nmodel: {mlp: peer}\nrouter: {kind: cosine}",
            [],
            "run.yaml: router.kind cosine is for moe and sigma_moe, but model.mlp has peer layers",
        ),
        ("parallel: {tensor: 3}", [], "run.yaml: parallel: tensor must be a power of two up to 128 (got 3)"),
        (
            "parallel: {context: 2}",
            [],
            "run.yaml: parallel.context: unknown key; known: tensor, pipeline, virtual_pipeline",
        ),
        ("parallel: {sequence: true}", [], "run.yaml: parallel: sequence must be false: it splits the tensor-parallel"),
        ("parallel: {virtual_pipeline: 2}", [], "run.yaml: parallel: virtual_pipeline must be 1 (got 2): there is one"),
        (
            "parallel: {pipeline: 2, virtual_pipeline: 2, batch_p2p: true}",
            [],
            "run.yaml: parallel: batch_p2p must be false with 2 interleaved stages",
        ),
        (
            "data: {prefix: a}\nparallel: {tensor: 8}",
            [],
            "run.yaml: parallel.tensor (8) must divide model.num_attention_heads (4)",
        ),
        (
            "data: {prefix: a}\nparallel: {tensor: 2}\nmodel: {seq_length: 31}",
            [],
            "run.yaml: parallel.tensor (2) must divide model.seq_length (31)",
        ),
        (
            "data: {prefix: a}\nparallel: {pipeline: 2, virtual_pipeline: 4}",
            [],
            "run.yaml: parallel.pipeline x virtual_pipeline (2 x 4) must divide model.num_layers (4)",
        ),
        (
            "data: {prefix: a}\nparallel: {pipeline: 2}",
            ["zero.stage=3"],
            "command line (zero.stage=3): zero.stage 3 cannot be used with parallel.pipeline (2)",
        ),
        (
            "data: {prefix: a}\nparallel: {pipeline: 2}\nmodel: {mlp: peer}\npeer: {layers_per_pool: 3}",
            [],
            "run.yaml: peer.layers_per_pool (3) has layers [1, 2, 3] share tables, but parallel.pipeline (2) puts "
            "them on stages [0, 1]",
        ),
        ("zero: {stage: 0, offload: true}", [], "run.yaml: zero: offload needs stage 1, 2 or 3 (got 0)"),
        ("zero: {stage: 4}", [], "run.yaml: zero.stage: input should be less than or equal to 3"),
        ("data: {prefix: a}", ["parallel.tensor=5"], "command line (parallel.tensor=5): parallel: tensor must be"),
        ("optimizer: {lr: fast}", [], "run.yaml: optimizer.lr: input should be a valid number"),
        ("optimizer: {lr: .inf}", [], "run.yaml: optimizer.lr: "),
        ("table_optimizer: {lr: .inf}", [], "run.yaml: table_optimizer.lr: "),
        ("optimizer: {betas: [0.9, 1.0]}", [], "run.yaml: optimizer.betas: "),
        ("table_optimizer: {betas: [-0.1, 0.9]}", [], "run.yaml: table_optimizer.betas: "),
        ("data: {prefix: a}\ntrain: {seed: 4294967296}", [], "run.yaml: train.seed: "),
        ("optimizer: {warmup_steps: 9, decay_steps: 9}", [], "warmup_steps (9) must be less than decay_steps (9)"),
        (
            "data: {prefix: a}\noptimizer: {decay_steps: 50}\ntable_optimizer: {warmup_steps: 50}",
            [],
            "run.yaml: table_optimizer.warmup_steps (50) must be less than table_optimizer.decay_steps (50); each is",
        ),
        (
            "data: {prefix: a}",
            ["model.mlp=peer", "table_optimizer.stochastic_rounding=true"],
            "command line (table_optimizer.stochastic_rounding=true): table_optimizer.stochastic_rounding rounds to "
            "bfloat16 or eight bits, but peer.table_dtype is float32; set that to bfloat16",
        ),
        (
            "data: {prefix: a}\nmodel: {mlp: pkm}\npeer: {table_dtype: bfloat16}",
            ["table_optimizer.stochastic_rounding=true"],
            "rounds to bfloat16 or eight bits, but pkm.table_dtype is float32; set that to bfloat16",
        ),
        *(
            (
                f"data: {{prefix: a}}\nmodel: {{mlp: {kind}}}",
                [f"{kind}.{key}={value}", f"table_optimizer.lazy={lazy}", *more],
                f"{kind}.{key} {value} needs table_optimizer.{needed} true",
            )
            for kind in ("peer", "pkm")
            for key, value, lazy, needed, more in (
                ("table_memory", "host", "false", "lazy", []),
                ("table_memory", "disk", "false", "lazy", []),
                ("table_dtype", "int8", "false", "lazy", ["table_optimizer.stochastic_rounding=true"]),
                ("table_dtype", "float8_e4m3", "true", "stochastic_rounding", []),
            )
        ),
        (
            "data: {prefix: a}\nmodel: {mlp: peer}\npeer: {table_memory: host}",
            ["parallel.transport=symmetric_memory", "table_optimizer.lazy=true"],
            "peer.table_memory must be device, and peer.table_dtype float32 or bfloat16, with parallel.transport "
            "symmetric_memory",
        ),
        (
            "data: {prefix: a}",
            ["peer.table_memory=tape"],
            "peer.table_memory: input should be 'device',",
        ),
        (
            "data: {prefix: a}",
            ["peer.table_cache_gb=-1"],
            "peer.table_cache_gb: input should be greater than",
        ),
        ("data: {prefix: a}", ['peer.table_folder="a\\tb"'], "holds control characters"),
        ("data: {prefix: a}", ["pkm.num_values=1000"], "pkm.num_values: must be the square of a whole number"),
        ("data: {prefix: a}", ["pkm.num_values=961"], "pkm: top_k (32) must be at most sqrt(num_values) (31)"),
        ("data: {prefix: a}", ["pkm.key_dim=7"], "pkm.key_dim: must be even"),
        (
            "data: {prefix: a}\npkm: {query_projection: false}",
            [],
            "run.yaml: pkm: query_norm (batch) must be none where query_projection is false",
        ),
        (
            "data: {prefix: a}\npkm: {query_projection: false, query_norm: none, shared_keys: true}",
            [],
            "pkm: shared_keys must be false where query_projection is false",
        ),
        ("model: [", [], "run.yaml: is not valid YAML at line 1"),
        ("- model", [], "run.yaml: must hold sections such as 'model:', not a list"),
        ("data: {prefix: a}", ["train.steps=0"], "command line (train.steps=0): train.steps: input should be greater"),
        ("data: {prefix: a}", ["train.stepz=1"], "command line (train.stepz=1): train.stepz: unknown key"),
        ("data: {prefix: a}", ["steps"], "command line: 'steps' is not of the form section.key=value"),
        ("data: {prefix: a}", ["data.prefix.x=1"], "'prefix' is a value, not a section"),
    ],
)
def test_one_sentence_with_file_and_key(tmp_path, text, overrides, message):
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text, *overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["x" * 3000, "model." + "y" * 3000, '{"a":' * 400, "a\tb", "a\x1b[31m\nb"])
def test_a_key_that_nobody_would_write_is_shown_short_and_in_one_line(tmp_path, key):
    with pytest.raises(ConfigError) as error:
        load(tmp_path, "data: {prefix: a}", f"{key}=1")
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 600


def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere.yaml: cannot be read \(No such file or directory\)"):
        load_config(tmp_path / "nowhere.yaml")


def test_overrides_are_yaml_and_win(tmp_path):
    config = load(tmp_path, "data: {prefix: a}\nmodel: {num_layers: 2}", "model.mlp=[peer, dense]", "peer.heads=3")
    assert load(tmp_path, "data: {prefix: a}\ntrain: {seed: 4294967295}").train.seed == 2**32 - 1
    assert config.model.mlp_kinds == ["peer", "dense"]
    assert config.peer.heads == 3
    assert load(tmp_path, yaml.safe_dump(config.model_dump(mode="json"))) == config, "a dumped config loads again"


@pytest.mark.parametrize(
    ("sections", "world_size", "message"),
    [
        ({"parallel": {"expert": 2}}, 3, "parallel.expert: 2 does not divide the 3 rank(s)"),
        ({"train": {"global_batch_size": 12}}, 1, "train.global_batch_size: 12 is not a multiple of"),
        ({"train": {"global_batch_size": 16}}, 4, "train.global_batch_size: 16 is not a multiple of"),
        (
            {"parallel": {"expert": 9}, "model": {"mlp": "peer"}, "peer": {"num_experts": 4, "top_k": 2}},
            9,
            "9 shards for 4 experts",
        ),
        (
            {"parallel": {"expert": 2, "expert_tensor": 3}},
            4,
            "parallel.expert x expert_tensor: 2 x 3 does not divide the 4 rank(s)",
        ),
        (
            {"parallel": {"tensor": 2, "pipeline": 2}},
            6,
            "parallel.tensor x pipeline: 2 x 2 does not divide the 6",
        ),
        (
            {"parallel": {"tensor": 2, "pipeline": 2}},
            12,
            "train.global_batch_size: 16 is not a multiple of micro_batch_size * data-parallel ranks (8 * 3 = 24)",
        ),
        (
            {"parallel": {"pipeline": 2, "expert": 4}},
            4,
            "parallel.expert x pipeline: 4 x 2 does not divide the 4 rank(s)",
        ),
        (
            {"parallel": {"pipeline": 4, "virtual_pipeline": 1}, "model": {"num_layers": 4}},
            6,
            "parallel.pipeline: 4 does not divide the 6 rank(s)",
        ),
        (
            {"parallel": {"pipeline": 4, "virtual_pipeline": 2}, "model": {"num_layers": 8}},
            4,
            "parallel.virtual_pipeline: the interleaved schedule needs a multiple of 4",
        ),
        (
            {"parallel": {"expert": 9}, "model": {"mlp": "pkm"}, "pkm": {"num_values": 4, "top_k": 2}},
            9,
            "9 shards for 4 values",
        ),
        ({"parallel": {"expert_tensor": 500}}, 500, "parallel.expert_tensor: 500 shards for"),
        (
            {"parallel": {"expert": "auto", "expert_tensor": 2, "pipeline": 2}},
            6,
            "parallel.expert_tensor x pipeline: 2 x 2 does not divide the 6 rank(s)",
        ),
        (
            {"parallel": {"expert": "auto"}, "model": {"mlp": "peer"}, "peer": {"num_experts": 4, "top_k": 2}},
            9,
            "9 shards for 4 experts",
        ),
        ({"train": {"global_batch_size": 48}}, 5, "(8 * 5 = 40); worlds that fit: 1, 2, 3, 6 rank(s)"),
        ({"train": {"global_batch_size": 12}}, 1, "no number of ranks fits, because it is not a multiple of micro"),
        (
            {"parallel": {"expert": 2}, "train": {"global_batch_size": 48}},
            4,
            "(8 * 4 = 32); worlds that fit: 2, 6 rank(s)",
        ),
        (
            {"model": {"mlp": "sigma_moe"}, "parallel": {"expert": "auto"}, "train": {"global_batch_size": 24}},
            3,
            "parallel.expert: 3 shards do not divide the 16 experts of sigma_moe.num_experts; set it to a divisor",
        ),
        (
            {"parallel": {"tensor": 2, "expert": "auto"}, "train": {"global_batch_size": 32}},
            6,
            "(8 * 3 = 24); worlds that fit: 2, 4, 8 rank(s)",
        ),
        (
            {"parallel": {"pipeline": 2, "virtual_pipeline": 2}, "train": {"global_batch_size": 96}},
            8,
            "worlds that fit: 2, 4, 6, 12 rank(s)",
        ),
    ],
)
def test_worlds_that_do_not_fit(sections, world_size, message):
    config = parse_config({"data": {"prefix": "a"}, **sections}, "test")
    with pytest.raises(ConfigError) as error:
        check_world(config, world_size)
    assert message in str(error.value)


def test_automatic_row_shards():
    config = parse_config({"data": {"prefix": "a"}, "parallel": {"expert": "auto", "expert_tensor": 2}}, "test")
    check_world(config, 2)
    assert [config.parallel.expert_rows(world) for world in (1, 2, 4, 6)] == [1, 1, 2, 3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: {prefix: a}\npeer: {num_experts: 5}", "peer.num_experts: must be the square"),
        ("data: {prefix: nowhere}", "peer-dist prepare"),
        ("data: {prefix: a}\nparallel: {expert: 2}", "parallel.expert: 2 does not divide the 1 rank(s)"),
    ],
)
def test_the_command_says_so_and_leaves(tmp_path, text, message):
    """Exit code 2, the sentence alone on stderr, and no process group (it would write where there is no such host)."""
    path = tmp_path / "run.yaml"
    path.write_text(text)
    result = run_command("train", "--config", str(path), timeout=60)
    assert result.returncode == 2, result.stderr
    assert message in " ".join(result.stderr.split())
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_a_fresh_process_says_nothing_else(tmp_path):
    """Nor does what it imports: the mistake is found after the libraries are there."""
    (tmp_path / "run.yaml").write_text("data: {prefix: a}\nparallel: {expert: 2}")
    command = [sys.executable, "-m", "peer_dist", "train", "--config", str(tmp_path / "run.yaml")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: parallel.expert: 2 does not divide the 1 rank(s)")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("variables", "arguments", "begin"),
    [
        ({"TORCH_LOGS": "foo"}, ["plan", "--config", "run.yaml"], "torch cannot be imported (ValueError: Invalid log"),
        ({"MPLBACKEND": "foo"}, ["plot", ".", "-o", "f"], "matplotlib cannot be imported (ValueError: Key backend"),
    ],
)
def test_what_other_packages_cannot_read_is_a_sentence(tmp_path, variables, arguments, begin):
    """Variables that they look at while they are imported."""
    (tmp_path / "run.yaml").write_text("data: {prefix: a}")
    command = [sys.executable, "-m", "peer_dist", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(peer_dist.__file__).parents[1]), **variables}
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, env=environment)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {begin}")
    assert len(result.stderr.splitlines()) == 1


def test_only_another_packages_import_is_told_as_one():
    def import_of(text, file):
        try:
            exec(compile(text, file, "exec"), {})
        except ArithmeticError as error:
            return unimportable(error)

    assert import_of("1 / 0", f"{Path(yaml.__file__).parents[1]}/odd/inner.py").startswith(
        "odd cannot be imported (ZeroDivisionError: division by zero); "
    )
    assert import_of("1 / 0", str(Path(peer_dist.__file__).with_name("own.py"))) is None
    assert import_of("def fail(): 1 / 0\nfail()", "<string>") is None


def test_a_package_that_is_not_there_is_named(monkeypatch, capsys):
    """Also where nothing says what this one needs, as in a clone that was not installed."""
    from peer_dist import __main__, cli

    def fail():
        raise ModuleNotFoundError("No module named 'odd.part'", name="odd.part")

    monkeypatch.setattr(cli, "main", fail)
    monkeypatch.setattr(__main__, "_missing", list)
    with pytest.raises(SystemExit, match=r"^2$"):
        __main__.main()
    assert capsys.readouterr().err.endswith("pip install 'peer_dist[train]' (missing: odd)\n")


def test_a_working_folder_that_was_removed_is_a_sentence(tmp_path):
    (tmp_path / "gone").mkdir()
    command = f"cd gone; rmdir ../gone; exec {sys.executable} -m peer_dist doctor"
    environment = {**os.environ, "PYTHONPATH": str(Path(peer_dist.__file__).parents[1])}
    result = subprocess.run(
        command, shell=True, capture_output=True, text=True, timeout=60, cwd=tmp_path, env=environment
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: the working folder is not there any more; go to one that is (cd), and start again\n"


def test_help_lists_every_key():
    result = run_command("train", "--help")
    for key in ("num_experts", "table_dtype", "global_batch_size", "init_from", "decay_steps", "expert_tensor"):
        assert key in result.stdout
