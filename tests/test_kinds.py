"""Every kind of layer, with every key of its section: counted as it is built, exported as it is trained."""

from __future__ import annotations

import ast
import importlib
import itertools
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import peer_dist
from peer_dist.config import Config, parse_config
from peer_dist.config.schema import ModelConfig
from peer_dist.export.folder import model_settings, stored_key
from peer_dist.export.joined import joined_source
from peer_dist.kernels.eight_bit import CODES, is_eight_bit
from peer_dist.kinds import DENSE, KINDS, PEER, KindError
from peer_dist.kinds.routing import RouterSection
from peer_dist.megatron import Parallel, build_model, forward_logits, shards_of
from peer_dist.megatron.dist_checkpoint import dense_blocks
from peer_dist.planning.counts import count
from peer_dist.planning.layout import Layout, Place
from peer_dist.planning.state import dense_shapes, shards
from peer_dist.sharding.held import read_values

VOCAB = 128
BASE: dict[str, Any] = {
    "model": {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 48, "seq_length": 16},
    "peer": {"num_experts": 64, "heads": 2, "top_k": 3, "key_dim": 8},
    "pkm": {"num_values": 81, "heads": 2, "top_k": 5, "key_dim": 8},
    "moe": {"num_experts": 6, "top_k": 2},
    "sigma_moe": {"num_experts": 10, "expert_hidden_size": 12, "top_k": 3},
    "router": {"state_size": 8},
    "data": {"prefix": "unused"},
}

PLACE = {
    "table_cache_gb": 0.5,
    "table_resident_gb": 0.5,
    "table_folder": tempfile.gettempdir(),
    "table_fetch": "copied",
}
# For each key of a section, values beside that of BASE; keys that a value needs with it are in the same dict.
OTHERS: dict[str, list[dict[str, Any]]] = {
    "peer": [
        {"num_experts": 100},
        {"heads": 3},
        {"top_k": 4},
        {"key_dim": 12},
        *({"query_norm": name} for name in ("layer", "rms", "none")),
        *({"gate": name} for name in ("sigmoid", "relu")),
        *({"activation": name} for name in ("relu", "silu")),
        {"shared_keys": False},
        *({"key_norm": name, "shared_keys": shared} for name in ("layer", "rms") for shared in (True, False)),
        {"output_gate": True},
        {"dense_hidden": 20},
        {"dispatch_chunks": 2},
        {"layers_per_pool": 2},
        {"layers_per_pool": 3},
        {"revive_interval": 5},
        {"table_dtype": "bfloat16"},
        *({"table_dtype": name} for name in ("float8_e4m3", "int8")),
        *({"table_memory": name, **PLACE} for name in ("host", "disk")),
    ],
    "pkm": [
        {"num_values": 100},
        {"heads": 3},
        {"top_k": 4},
        {"key_dim": 12},
        *({"query_norm": name} for name in ("layer", "rms", "none")),
        {"query_projection": False, "query_norm": "none"},
        *({"gate": name} for name in ("sigmoid", "relu")),
        {"shared_keys": True},
        {"init": "dense"},
        {"table_dtype": "bfloat16"},
        *({"table_dtype": name} for name in ("float8_e4m3", "int8")),
        *({"table_memory": name, **PLACE} for name in ("host", "disk")),
    ],
    "moe": [
        {"num_experts": 7},
        {"expert_hidden_size": 20},
        {"top_k": 3},
        {"routing": "expert_choice"},
        {"score": "sigmoid"},
        {"normalize": False},
        {"balance_loss": 0.5},
        {"z_loss": 0.5},
        {"expert_bias": True, "score": "sigmoid"},
        {"expert_bias": True, "score": "sigmoid", "expert_bias_rate": 0.5},
    ],
    "sigma_moe": [
        {"num_experts": 11},
        {"expert_hidden_size": 20},
        {"top_k": 4},
        {"entropy_loss": 0.5},
        {"expert_dropout": 0.5},
    ],
    "dense": [
        {"num_layers": 3},
        {"hidden_size": 40},
        {"num_attention_heads": 2},
        {"num_query_groups": 1},
        {"num_query_groups": 2},
        {"rope_base": 100.0},
        {"norm_eps": 0.1},
        {"ffn_hidden_size": 40},
        {"ffn_activation": "gelu"},
        {"ffn_top_k": 7},
        {"seq_length": 12},
        {"tied_embeddings": False},
        {"dropout": 0.5},
    ],
    "router": [
        *({"kind": name} for name in ("recurrent", "mlp", "cosine")),
        {"kind": "recurrent", "state_size": 12},
        *({"kind": "recurrent", "passing": name} for name in ("detached", "none")),
        *({"kind": name, "shared_projector": True} for name in ("recurrent", "mlp")),
    ],
}


def cases() -> list[tuple[str, dict[str, Any]]]:
    """A kind, and what is changed of :data:`BASE` in a model with layers of it."""
    own: list[tuple[str, dict[str, Any]]] = []
    for name, kind in KINDS.items():
        own.append((name, {}))
        own += [(name, {kind.section_name: changes}) for changes in OTHERS[name]]
        if kind.routed:
            own += [(name, {"router": changes}) for changes in OTHERS["router"] if _allowed(name, changes)]
        own.append((name, {"model": {"ffn_activation": "gelu"}}))
    return own


def _allowed(name: str, router: dict[str, Any]) -> bool:
    return not (name == PEER.name and router["kind"] == "cosine")


def make(name: str, changes: dict[str, Any]) -> Config:
    """A config whose layers are of the kind, but for one of another kind that a state passes by."""
    tree = {section: dict(keys) for section, keys in BASE.items()}
    for section, keys in changes.items():
        tree[section] |= keys
    other = DENSE.name if name != DENSE.name else "pkm"
    layers = tree["model"]["num_layers"]
    tree["model"]["mlp"] = [name, other, name, name][:layers] if name != DENSE.name else [name] * layers
    held = any(keys.get("table_memory") or keys.get("table_dtype") in CODES for keys in changes.values())
    return parse_config({**tree, "table_optimizer": {"lazy": held, "stochastic_rounding": rounds(changes)}}, "test")


def rounds(changes: dict[str, Any]) -> bool:
    return any(keys.get("table_dtype") in CODES for keys in changes.values())


def perturbed(config: Config, parallel: Parallel) -> torch.nn.ModuleList:
    """The model in evaluation, none of whose parameters and statistics has the value that it begins with."""
    model = build_model(config, parallel, VOCAB, torch.float32).eval()
    generator = torch.Generator().manual_seed(3)
    tables = {id(shard.parameter): shard.parameter for shard in shards_of(model).values()}
    with torch.no_grad():
        for parameter in {**tables, **{id(one): one for one in model.parameters()}}.values():
            if is_eight_bit(parameter):  # as its codes come
                continue
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if "running" in name or "expert_bias" in name:
                buffer.add_(torch.rand(buffer.shape, generator=generator))
    return model


@pytest.mark.parametrize("name", KINDS)
def test_every_key_has_another_value_here(name: str) -> None:
    """Else what follows would not try it: a new key is added to :data:`OTHERS`."""
    section = ModelConfig if name == DENSE.name else KINDS[name].section
    assert section is not None
    tried = set(itertools.chain.from_iterable(OTHERS[name]))
    assert tried == set(section.model_fields) - {"mlp"}
    assert set(itertools.chain.from_iterable(OTHERS["router"])) == set(RouterSection.model_fields)


@pytest.mark.parametrize(("name", "changes"), cases(), ids=lambda value: str(value))
def test_counted_as_built(parallel: Parallel, name: str, changes: dict[str, Any]) -> None:
    """Parameters in all, the shapes of those that are no shards, and the sizes of shards."""
    config = make(name, changes)
    model = build_model(config, parallel, VOCAB, torch.float32)
    owned = {id(shard.parameter): shard.parameter for shard in shards_of(model).values()}
    others = [parameter for parameter in model.parameters() if id(parameter) not in owned]
    everything = sum(parameter.numel() for parameter in [*owned.values(), *others])
    assert count(config, VOCAB).total.parameters == everything
    layout = Layout(config, 1, 1)
    planned = [shape for part in dense_shapes(layout, 0, VOCAB).values() for shape in part]
    assert Counter(map(math.prod, planned)) == Counter(parameter.numel() for parameter in others)
    blocks = [block for part in shards(layout, Place()).values() for block in part]
    assert sum(block.size for block in blocks) == sum(parameter.numel() for parameter in owned.values())
    for kind in config.kinds:
        tables = kind.tables(config)
        if tables:
            dtypes = {shard.parameter.dtype for shard in shards_of(model).values() if shard.table}
            assert dtypes == {CODES.get(tables.dtype) or getattr(torch, tables.dtype)}


@pytest.mark.parametrize(("name", "changes"), cases(), ids=lambda value: str(value))
def test_exported_as_trained(parallel: Parallel, name: str, changes: dict[str, Any]) -> None:
    """The exported code with the trained model's weights has its logits."""
    config = make(name, changes)
    if config.not_causal:
        pytest.skip("has no next-token logits, and is refused (tests/test_export.py)")
    model = perturbed(config, parallel)
    blocks: dict[str, list[torch.Tensor]] = {}
    for key, _, block in dense_blocks(model):  # SwiGLU's two matrices are a block each
        blocks.setdefault(key, []).append(block.detach())
    stored = {key: torch.cat(parts) if len(parts) > 1 else parts[0] for key, parts in blocks.items()}
    for key, shard in shards_of(model).items():
        stored[f"tables.{key}"] = read_values(shard.parameter, slice(None))

    class Tokenizer:
        padded_vocab_size = vocab_size = VOCAB
        eod = VOCAB - 1

    settings = model_settings(config, Tokenizer, "float32")  # type: ignore[arg-type]
    code = joined_source({kind.name: kind.exported() for kind in config.kinds})
    module = ModuleType("exported")
    exec(compile(code, "peer_model.py", "exec"), module.__dict__)
    exported = module.LanguageModel(settings)
    exported.load_state_dict(
        {key: stored[stored_key(key, config.model.mlp_kinds)].float() for key in exported.state_dict()}
    )
    tokens = torch.randint(VOCAB - 1, (3, config.model.seq_length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted, logits = forward_logits(model, tokens), exported.eval()(tokens)
    assert wanted.std() > 0.01
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4 * float(wanted.std()))


def test_no_kind_is_known_by_name_elsewhere() -> None:
    """A kind's name is written in its own module; the word "dense" is also that of all that is no table."""
    root = Path(peer_dist.__file__).parent
    names = set(KINDS) - {DENSE.name}
    places = [
        f"{path.relative_to(root)}:{node.lineno}: {node.value}"
        for path in sorted(root.rglob("*.py"))
        if path.relative_to(root).parts[0] != "kinds"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in names
    ]
    assert places == []


COMMANDS = """
import os, shlex, sys
import tests.preload  # once for all commands
from peer_dist.cli import main
for line in sys.argv[1:]:
    print(">", line, flush=True)
    child = os.fork()
    if not child:
        sys.argv, code = shlex.split(line), 0
        try:
            main()
        except SystemExit as end:
            code = end.code
        sys.stdout.flush()
        os._exit(code or 0)  # tearing all libraries down takes a second
    _, status = os.waitpid(child, 0)
    assert status == 0, line
"""


def test_a_kind_of_ones_own(text: Path, tmp_path: Path) -> None:
    """The tutorial's package, by the tutorial's commands: what the trained model says, the exported one says too."""
    page = (Path(__file__).parents[1] / "docs" / "tutorials" / "kind.md").read_text(encoding="utf-8")
    files = dict(re.findall(r"^\*\*`(\S+)`\*\*\n\n```\w+\n(.*?)^```", page, re.DOTALL | re.MULTILINE))
    assert sorted(files) == ["bilinear/exported.py", "bilinear/kind.py", "bilinear/module.py", "pyproject.toml"]
    for name, words in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(words, encoding="utf-8")
    (group,) = re.findall(r'^\[project\.entry-points\."(.+)"\]\n(.+)$', files["pyproject.toml"], re.MULTILINE)
    installed = tmp_path / "bilinear-1.0.dist-info"  # what pip makes of it
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: bilinear\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text("[{}]\n{}\n".format(*(part.replace('"', "") for part in group)))
    (config,) = re.findall(r"<<'EOF'\n(.*?)^EOF$", page, re.DOTALL | re.MULTILINE)
    (tmp_path / "kind.yaml").write_text(config.replace("data/shakespeare", str(text)))
    commands = re.findall(r"^peer-dist (?!prepare).*$", page, re.MULTILINE)
    assert [line.split()[1] for line in commands] == ["train", "plan", "match", "export", "generate"]
    more = [
        "peer-dist plan --config kind.yaml --gpu cpu --gpus 2 --construct stages",
        "peer-dist match --config kind.yaml --mode flops --reference-kind bilinear",
        "peer-dist evaluate --checkpoint runs/kind/checkpoints",
    ]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[1]}", "OMP_NUM_THREADS": "1"}
    run = partial(subprocess.run, cwd=tmp_path, env=environment, capture_output=True, text=True)
    more.append("peer-dist generate --checkpoint runs/kind/checkpoints --prompt ROMEO: --tokens 20 --temperature 0")
    done = run([sys.executable, "-c", COMMANDS, *commands, *more])
    assert done.returncode == 0, done.stdout + done.stderr
    alone = {**environment, "PYTHONPATH": str(tmp_path / "exported" / "kind")}
    script = (
        "import torch; from peer_model import LanguageModel; from tokenizers import Tokenizer\n"
        "model, tokenizer = LanguageModel.load('exported/kind'), Tokenizer.from_file('exported/kind/tokenizer.json')\n"
        "tokens = torch.tensor([tokenizer.encode('ROMEO:').ids])\n"
        "print(tokenizer.decode(model.generate(tokens, 20, temperature=0)[0].tolist()))\n"
        "import sys; assert not any(name.startswith(('peer_dist', 'bilinear')) for name in sys.modules)"
    )
    home = run([sys.executable, "-c", script], env=alone)
    assert home.returncode == 0, home.stderr
    assert home.stdout.strip() in done.stdout


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import nowhere", "cannot be imported (ModuleNotFoundError: No module named 'nowhere'); mend or uninstall it"),
        ("Mine = dict", "is no peer_dist.kinds.Kind; name a class derived from it"),
        ("from peer_dist.kinds.peer import PEERKind as Mine", "has the name 'peer', which another kind has"),
    ],
)
def test_a_kind_that_cannot_be_used_is_named(tmp_path: Path, code: str, says: str) -> None:
    (tmp_path / "mine.py").write_text(code)
    installed = tmp_path / "mine-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text("[peer_dist.kinds]\nmine = mine:Mine\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[1]}"}
    command = [sys.executable, "-m", "peer_dist", "plan", "--config", "run.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    said = " ".join(done.stderr.split())
    assert said.startswith("error: the kind of layer 'mine' (mine:Mine, of an installed package's peer_dist.kinds)")
    assert says in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("from peer_dist.layers import PEER", "imports peer_dist.layers, which an exported model does not have"),
        ("from peer_dist.export.peer_model import linear as line", "renames what it imports from"),
        ("class RMSNorm: ...", "defines RMSNorm, as peer_dist.export.peer_model does"),
    ],
)
def test_what_cannot_go_home_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, says: str) -> None:
    (tmp_path / "goes_home.py").write_text(
        f"from peer_dist.export.peer_model import ExportedLayer\n{code}\nclass Mine(ExportedLayer): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "goes_home", raising=False)
    layer = importlib.import_module("goes_home").Mine
    with pytest.raises(KindError, match=says):
        joined_source({"mine": layer})
