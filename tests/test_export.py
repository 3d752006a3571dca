"""A trained model in a folder of its own: read by torch alone, by transformers, and what is refused."""

import importlib.util
import json
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.checkpoints import seal
from tests.layouts import COSINE, IMPROVED, MEMORY, MOE, PER_HEAD, PERCEPTRON, RECURRENT, SHARED, SIGMA, SWITCH, Layout
from tests.layouts import base_config as layouts_base
from tests.ranks import Command, run_ranks
from tests.runs import with_keys

# matrices, layers and columns of tables on different ranks
SPREAD = Layout(
    4,
    {"tensor": 2, "pipeline": 2, "sequence": True, "expert_tensor": 2},
    settings={
        "model": {"mlp": ["peer", "dense", "pkm", "peer"]},
        "peer": {"query_norm": "batch", "output_gate": True, "dense_hidden": 24, "key_norm": "layer"},
        "router": {"kind": "recurrent", "state_size": 12},
    },
)
COARSE = Layout(
    4,
    {"tensor": 2, "pipeline": 2, "sequence": True, "expert": 2},
    settings={
        "model": {"mlp": ["peer", "moe", "sigma_moe", "moe"]},
        "moe": {"num_experts": 4, "score": "sigmoid", "expert_bias": True, "expert_bias_rate": 0.2},
        "sigma_moe": {"num_experts": 6, "expert_hidden_size": 16, "top_k": 2},
        "router": {"kind": "recurrent", "state_size": 12, "shared_projector": True},
    },
)
TABLES = Layout(
    4,
    {"expert": 2, "expert_tensor": 2},
    settings={
        "model": {"mlp": ["peer", "pkm", "dense", "peer"], "ffn_top_k": 20, "tied_embeddings": False},
        "peer": {"query_norm": "rms", "shared_keys": False, "gate": "sigmoid", "layers_per_pool": 2},
    },
)
GELU = {"model": {"ffn_activation": "gelu"}}
BF16_TABLES = {"peer": {"table_dtype": "bfloat16", "query_norm": "layer", "gate": "relu", "activation": "silu"}}
OTHERS = [
    COARSE,
    TABLES,
    Layout(2, {"tensor": 2, "expert": 2}, settings={**PER_HEAD, **GELU}),
    Layout(4, {"pipeline": 2, "virtual_pipeline": 2, "expert": 2}, 1, settings={"peer": {"activation": "relu"}}),
    Layout(4, {"expert": 2, "expert_tensor": 2}, 3, settings=SHARED),
    Layout(3, {"expert_tensor": 3}, sequences=6, settings=BF16_TABLES),
    Layout(4, {"pipeline": 2, "expert": 2}, settings=MEMORY),
    Layout(4, {"expert": 2, "expert_tensor": 2}, settings=IMPROVED),
    Layout(2, {"expert": 2}, settings={**SWITCH, **COSINE}),
    Layout(4, {"pipeline": 2, "expert": 2}, settings={**SIGMA, **PERCEPTRON}),
    Layout(
        2,
        {"pipeline": 2, "virtual_pipeline": 2},
        0,
        settings={**MOE, "router": {**RECURRENT["router"], "passing": "none"}},
    ),
]

READ = """
import json, sys
for absent in ("peer_dist", "transformers", "megatron", "deepspeed", "tokenizers"):
    sys.modules[absent] = None  # an import of it fails
import torch
torch.set_num_threads(1)
apart = {}
for folder in sys.argv[1:]:
    sys.path.insert(0, folder)
    sys.modules.pop("peer_model", None)
    import peer_model
    assert peer_model.__file__.startswith(folder)
    model, wanted = peer_model.LanguageModel.load(folder), torch.load(folder + ".wanted")
    with torch.no_grad():
        apart[folder] = [float((model(wanted["tokens"]) - wanted["logits"]).abs().max())]
        documents = model(wanted["documents"], mask=~wanted["mask"])
        apart[folder].append(float((documents - wanted["document_logits"]).abs().max()))
        cache, tokens = peer_model.KVCache(), wanted["tokens"]
        parts = [model(part, cache) for part in (tokens[:, :3], tokens[:, 3:4], tokens[:, 4:])]
        apart[folder].append(float((torch.cat(parts, 1) - wanted["logits"]).abs().max()))
    greedy = wanted["greedy"]
    assert model.generate(greedy[:, :7], greedy.shape[1] - 7, temperature=0).equal(greedy)
    assert model.generate(greedy[:, :7].repeat(3, 1), 9, 0.7, top_k=1)[2].equal(greedy[0, :16])  # one to draw from
print(json.dumps(apart))
"""


def trained(rank, world_size, tree):
    from tests.runs import make_trainer

    trainer = make_trainer(tree)
    for _ in range(2):
        trainer.step()
    trainer.save()


def written(rank, world_size, checkpoint, folder, options):
    """Export, and beside the folder what the trained model itself gives."""
    from peer_dist.evaluation.loading import load_model
    from peer_dist.export.folder import export
    from peer_dist.megatron import forward_logits, pack_documents
    from peer_dist.megatron.documents import visible

    export(checkpoint, folder, **options)
    loaded = load_model(checkpoint, world_size)
    tokenizer, length = loaded.tokenizer, loaded.config.model.seq_length
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(tokenizer.vocab_size - 1, (3, length), generator=generator)
    tokens[:, 0] = tokenizer.eod
    documents = tokens.clone()
    documents[:, [5, 9]] = tokenizer.eod
    packed = pack_documents(documents, tokenizer.eod)
    with torch.no_grad():
        wanted = {
            "tokens": tokens,
            "logits": forward_logits(loaded.model, tokens),
            "documents": documents,
            "mask": ~visible(packed, *documents.shape),
            "document_logits": forward_logits(loaded.model, documents, packed),
        }
        greedy = [tokenizer.eod, *tokenizer.encode("ROMEO:")]
        while len(greedy) < 2 * length and (len(greedy) == 7 or greedy[-1] != tokenizer.eod):  # beyond the window
            logits = forward_logits(loaded.model, torch.tensor([greedy[-length:]]))
            greedy.append(int(logits[0, -1, : tokenizer.vocab_size].argmax()))
    torch.save({**wanted, "greedy": torch.tensor([greedy])}, f"{folder}.wanted")


def exported(layouts, text, folder, **options):
    """The folders of a model of each layout, trained for a few steps."""
    folders = []
    for number, layout in enumerate(layouts):
        own = folder / str(number)
        tree = layout.config(layouts_base(text, own))
        run_ranks(trained, layout.ranks, tree)
        run_ranks(written, 1, tree["checkpoint"]["dir"], str(own / "model"), options)
        folders.append(own / "model")
    return folders


def alone(script, folders, home):
    """What a fresh Python prints that runs ``script`` in ``home``, and nothing of this checkout in its path."""
    names = {"PYTHONPATH", "PYTHONHOME"}
    environment = {key: value for key, value in os.environ.items() if key not in names}
    environment |= {"HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, folders)], cwd=home, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def apart(script, folders, home):
    """Folders whose model gives something else than the trained one, and the largest difference."""
    found = alone(script, folders, home)
    assert len(found) == len(folders)
    return {folder: max(differences) for folder, differences in found.items() if not max(differences) < 1e-5}


@pytest.fixture(scope="module")
def folder(text, tmp_path_factory):
    (made,) = exported([SPREAD], text, tmp_path_factory.mktemp("export"), shard_size="50KB")
    return made


def test_torch_alone_reads_it(folder, tmp_path):
    """Logits of one document and of several, in one pass and by parts through the cache, and text beyond the window."""
    assert apart(READ, [folder], tmp_path) == {}
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
    assert len(sizes) > 2
    assert max(sizes) < 60_000


TRANSFORMERS = """
import json, sys
sys.modules["peer_dist"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
apart = {}
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    wanted = torch.load(folder + ".wanted")
    tokens, greedy = wanted["tokens"], wanted["greedy"]
    with torch.no_grad():
        output = model(tokens, labels=tokens)
    apart[folder] = [float((output.logits - wanted["logits"]).abs().max())]
    loss = torch.nn.functional.cross_entropy(wanted["logits"][:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    apart[folder].append(abs(float(output.loss - loss)))
    prompt = tokenizer("ROMEO:", return_tensors="pt")
    assert prompt["input_ids"].equal(greedy[:, :7]), prompt
    assert len(tokenizer("<|endoftext|>")["input_ids"]) == 14  # spelled out it is text
    for cached in (True, False):
        made = model.generate(**prompt, max_new_tokens=9, do_sample=False, use_cache=cached)
        assert made.equal(greedy[:, : made.shape[1]]), (made, greedy)
    both = tokenizer(["ROMEO:", "To be, or not"], return_tensors="pt", padding=True)
    made = model.generate(**both, max_new_tokens=9, do_sample=False)
    assert made[0, 7:].equal(greedy[0, :16]), (made, greedy)  # behind padding
    half = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
    assert {value.dtype for value in half.parameters()} == {torch.bfloat16}
    assert {value.dtype for value in half.buffers()} <= {torch.float32}
    model.save_pretrained(folder + "-again")
    again = AutoModelForCausalLM.from_pretrained(folder + "-again", trust_remote_code=True)
    with torch.no_grad():
        assert again(tokens).logits.equal(output.logits)
print(json.dumps(apart))
"""


ODD = (None, True, -1, 0, 1.5, 10**30, "3", [], "gone")


def test_odd_settings(folder, tmp_path):
    """Whatever stands in config.json, the model is refused in a sentence at once, or works."""
    shutil.copytree(folder, tmp_path / "odd")
    path, load = tmp_path / "odd" / "config.json", code_of(folder).LanguageModel.load
    good = json.loads(path.read_text())
    unread = ("architectures", "auto_map", "dtype", "bos_token_id", "pad_token_id", "model_type")
    places = [(name,) for name in good if name not in unread]
    places += [(name, key) for name in ("peer", "pkm", "router") for key in good[name]]
    tokens, said = torch.tensor([[1, 2, 3]]), []
    for place in places:
        for value in ODD:
            tree = json.loads(json.dumps(good))
            home = tree[place[0]] if len(place) > 1 else tree
            home.pop(place[-1])
            if value != "gone":
                home[place[-1]] = value
            path.write_text(json.dumps(tree))
            try:
                load(path.parent).generate(tokens, 1)
            except ValueError as error:
                said.append(str(error))
    assert len(said) > 5 * len(places)
    assert [text for text in said if not re.fullmatch(r".{20,300}", text)] == []
    for key, value in (("heads", True), ("shared_keys", "yes")):  # neither 1 nor true
        path.write_text(json.dumps({**good, "peer": {**good["peer"], key: value}}))
        with pytest.raises(ValueError, match=rf"config.json: {key} must be "):
            load(path.parent)
    path.write_text(json.dumps({**good, "mlp": ["dense"] * 4000, "num_hidden_layers": 4000}))
    with pytest.raises(ValueError, match=r"asks for more layers or experts than the \d+ tensors there are"):
        load(path.parent)


def needs_transformers():
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed: pip install 'peer_dist[dev]'")


def test_transformers_reads_it(folder, tmp_path):
    """Logits, loss, greedy text with its cache, without and behind padding; written again by it, and read again."""
    needs_transformers()
    assert apart(TRANSFORMERS, [folder], tmp_path) == {}


def test_stored_tensors_are_read_by_rows(tmp_path):
    from torch.distributed import checkpoint

    from peer_dist.megatron.reader import StoredTensors

    state = {"table": torch.randn(11, 3, 2), "half": torch.randn(5).bfloat16(), "turned": torch.randn(4, 3).t()}
    checkpoint.save(state, checkpoint_id=tmp_path, no_dist=True)
    stored = StoredTensors(tmp_path)
    assert stored.shapes == {"table": (11, 3, 2), "half": (5,), "turned": (3, 4)}
    assert [len(rows) for rows in stored.rows("table", 25)] == [4, 4, 3]
    assert torch.cat(list(stored.rows("table", 25))).equal(state["table"])
    assert torch.cat(list(stored.rows("half", 2))).equal(state["half"])
    with pytest.raises(pickle.UnpicklingError, match="row-major"):
        next(stored.rows("turned", 99))


def refused(rank, world_size, cases):
    """What is said to each of these calls; the last one finds no room on the disk."""
    from peer_dist.config import ConfigError
    from peer_dist.data.documents import DataError
    from peer_dist.export.folder import export
    from peer_dist.megatron import CheckpointError

    said = []
    for case in cases:
        if case is cases[-1]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        try:
            export(**case)
        except (ConfigError, DataError, CheckpointError) as error:
            said.append(str(error))
    return said


def test_mistakes_leave_nothing(folder, tmp_path):
    good = next((folder.parent / "checkpoints").iterdir())
    steps = {name: tmp_path / name / good.name for name in ("cut", "ungated", "untied", "chosen")}
    for step in steps.values():
        shutil.copytree(good, step)
    data = steps["cut"] / "__1_0.distcp"
    data.write_bytes(data.read_bytes()[:-1])
    for name, section, change in (
        ("ungated", "peer", {"output_gate": False}),
        ("untied", "model", {"tied_embeddings": False}),
        ("chosen", "moe", {"routing": "expert_choice"}),
    ):
        path = steps[name] / "manifest.json"
        manifest = json.loads(path.read_text())
        manifest["config"][section] |= change
        if name == "chosen":
            manifest["config"]["model"]["mlp"][0] = "moe"
        path.write_text(json.dumps(manifest))
        seal(steps[name])
    (tmp_path / "there").mkdir()
    new = str(tmp_path / "new")
    cases = [
        ({"output": tmp_path / "there"}, "is there already, and nothing is replaced"),
        ({"output": good / "manifest.json" / "new"}, "manifest.json is no folder); name another place"),
        ({"dtype": "float16"}, "--dtype float16: must be one of float32, bfloat16"),
        ({"shard_size": "5 apples"}, "--shard-size 5 apples: must be a number of KB, MB or GB"),
        ({"checkpoint": str(tmp_path / "there")}, "holds no complete checkpoint"),
        ({"checkpoint": str(tmp_path / "cut")}, "__1_0.distcp: is damaged"),
        ({"checkpoint": str(tmp_path / "ungated")}, "gate_in.weight is in the checkpoint"),
        ({"checkpoint": str(tmp_path / "untied")}, "output_layer.weight is missing from the checkpoint"),
        ({"checkpoint": str(tmp_path / "chosen")}, "its experts choose tokens"),
        ({}, "a file may not be larger than ulimit -f allows"),
    ]
    (said,) = run_ranks(refused, 1, [{"checkpoint": str(good), "output": new, **options} for options, _ in cases])
    for sentence, (options, words) in zip(said, cases, strict=True):
        assert words in sentence, (options, sentence)
    assert sorted(os.listdir(tmp_path)) == sorted([*steps, "there"])


def code_of(folder):
    """The module that lies in a folder."""
    spec = importlib.util.spec_from_file_location("exported_model", folder / "peer_model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_exported(folder):
    """The model of a folder, by the code that lies in it."""
    return code_of(folder).LanguageModel.load(folder)


def test_the_command(folder, tmp_path):
    """In bfloat16, all but statistics; a second time it does not replace what is there."""
    options = ["export", "--checkpoint", str(folder.parent / "checkpoints"), "-o", str(tmp_path / "made" / "half")]
    with Command(1, [*options, "--dtype", "bfloat16"], tmp_path / "said") as command:
        assert command.codes(60) == [0]
        assert re.search(r"half: \d+ tensors, 0\.\d MB, of .*step-00000002 \(step 2\)", command.words(0))
    with Command(1, options, tmp_path / "said") as command:
        assert command.codes(60) == [2]
        assert "is there already" in command.words(0)
    model, wanted = load_exported(tmp_path / "made" / "half"), torch.load(f"{folder}.wanted")
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
    assert {value.dtype for value in model.buffers()} == {torch.float32}
    with torch.no_grad():
        difference = model(wanted["tokens"]).float() - wanted["logits"]
    assert difference.abs().mean() < 0.1 * wanted["logits"].std()  # a pick in a near tie may be another one


LIMITED = """
import json, resource, sys
limit = 640 * 2**20
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
from peer_dist.cli import main
try:
    main()
finally:
    print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))
"""


def large(rank, world_size, tree):
    """A checkpoint of weights that were not trained; some rows of a table."""
    from peer_dist.checkpoints.state import weights_state
    from peer_dist.checkpoints.store import CheckpointStore
    from peer_dist.config import parse_config
    from peer_dist.data.tokenizer import load_tokenizer
    from peer_dist.megatron import Parallel, build_model, shards_of

    config, tokenizer = parse_config(tree, "test"), load_tokenizer("byte")
    parallel = Parallel.initialize(seed=1)
    model = build_model(config, parallel, tokenizer.padded_vocab_size, torch.float32)
    info = {"config": config.model_dump(mode="json"), "dtype": "float32"}
    CheckpointStore(config.checkpoint.dir).save(1, weights_state(model, parallel), info, tokenizer)
    return shards_of(model)["layer3.up"].parameter[[0, 123_456, -1]].tolist()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_model_larger_than_memory(small, tmp_path):
    """2.6 GB, each table 0.66 GB, by a process that may have 0.67 GB, most of which libraries take."""
    tree = with_keys(small, model={"hidden_size": 256}, peer={"num_experts": 800**2})
    (rows,) = run_ranks(large, 1, tree, timeout=600)
    folder = tmp_path / "model"
    options = ["export", "--checkpoint", tree["checkpoint"]["dir"], "--output", str(folder), "--shard-size", "1GB"]
    done = subprocess.run([sys.executable, "-c", LIMITED, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sum(path.stat().st_size for path in folder.iterdir()) > 2.6e9
    assert int(done.stdout.splitlines()[-1]) < 0.7e9  # the libraries' own files among it
    name = "model.layers.2.mlp.up"
    home = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    with safe_open(folder / home, framework="pt") as tensors:
        table = tensors.get_slice(name)
        assert [table[place].tolist() for place in (0, 123_456, 800**2 - 1)] == rows
    shutil.rmtree(folder)
    shutil.rmtree(tree["checkpoint"]["dir"])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_kind_of_layer(text, tmp_path):
    folders = exported(OTHERS, text, tmp_path / "runs", shard_size="1MB")
    assert apart(READ, folders, tmp_path) == {}
    needs_transformers()
    assert apart(TRANSFORMERS, folders, tmp_path) == {}


INDEXES = {
    "names '../": {"weight_map": {"a": "../elsewhere.safetensors"}},
    "names '/": {"weight_map": {"a": "/etc/passwd.safetensors"}},
    "names 'peer_model.py'": {"weight_map": {"a": "peer_model.py"}},
    "names 'None'": {"weight_map": {"a": None}},
    "gone.safetensors: there is no such file": {"weight_map": {"a": "gone.safetensors"}},
    "has no weight_map": {"weight_map": []},
    "must hold a JSON object": [],
}
CONFIGS = {
    "has no 'hidden_size'": lambda config: config.pop("hidden_size"),
    "which this file does not know": lambda config: config.update(mlp=["unknown"] * 3),
    "hidden_size must be a whole number": lambda config: config.update(hidden_size="32"),
    "num_attention_heads must be a whole number": lambda config: config.update(num_attention_heads=0),
    "num_hidden_layers must be 5": lambda config: config.update(mlp=[*config["mlp"], "dense"]),
    "asks for": lambda config: config.update(mlp=[*config["mlp"], "dense"], num_hidden_layers=5),
    "but by config.json": lambda config: config.update(vocab_size=999),
}
FILES = {
    "cannot be read as safetensors": [b"", b"x" * 100, b"\xff" * 8 + b"{}", (2**63).to_bytes(8, "little") + b"{}"],
    "is not valid JSON": [b"{", b"[" * 100_000, b"\xff\xfe"],
}


def test_a_folder_of_a_stranger_is_read_or_refused(folder, tmp_path):
    """By its own code alone, in one sentence, and without a file of another folder."""
    weights = min(folder.glob("*.safetensors")).name
    (tmp_path / "elsewhere.safetensors").write_bytes((folder / weights).read_bytes())
    here = tmp_path / "model"

    def refused_with(words, name, change):
        shutil.rmtree(here, ignore_errors=True)
        shutil.copytree(folder, here)
        change(here / name)
        with pytest.raises(ValueError, match=re.escape(words)) as refusal:
            load_exported(here)
        assert "\n" not in str(refusal.value)
        assert str(here) in str(refusal.value) or "config.json" in str(refusal.value)

    def writing(content):
        return lambda file: file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())

    def replacing_by(make):
        return lambda file: (file.unlink(), make(file))

    for words, index in INDEXES.items():
        refused_with(words, "model.safetensors.index.json", writing(index))
    for words, change in CONFIGS.items():
        config = json.loads((folder / "config.json").read_text())
        change(config)
        refused_with(words, "config.json", writing(config))
    for words, contents in FILES.items():
        for content in contents:
            refused_with(words, "config.json" if "JSON" in words else weights, writing(content))
    for make in (Path.mkdir, os.mkfifo, lambda file: file.symlink_to(file)):
        for name in ("config.json", weights):
            refused_with("there is no such file", name, replacing_by(make))
