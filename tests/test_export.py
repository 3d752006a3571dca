"""A trained model in a folder of its own: read by torch alone, by transformers, and what is refused."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.layouts import COSINE, IMPROVED, MEMORY, MOE, PER_HEAD, PERCEPTRON, RECURRENT, SHARED, SIGMA, SWITCH, Layout
from tests.layouts import base_config as layouts_base
from tests.ranks import Command, run_ranks
from tests.test_training import with_keys

# every kind of layer but pkm, on a grid of all kinds of ranks
ROUTED = Layout(
    4,
    {"tensor": 2, "pipeline": 2, "sequence": True, "expert": 2},
    settings={
        "model": {"mlp": ["peer", "moe", "sigma_moe", "peer"]},
        "peer": {"query_norm": "batch", "output_gate": True, "dense_hidden": 24, "key_norm": "layer"},
        "moe": {"num_experts": 4, "score": "sigmoid", "expert_bias": True, "expert_bias_rate": 0.2},
        "sigma_moe": {"num_experts": 6, "expert_hidden_size": 16, "top_k": 2},
        "router": {"kind": "recurrent", "state_size": 12},
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
    from tests.test_training import make_trainer

    trainer = make_trainer(tree)
    for _ in range(3):
        trainer.step()
    trainer.save()


def written(rank, world_size, checkpoint, folder, options):
    """Export, and beside the folder what the trained model itself gives."""
    from peer_dist.evaluation.loading import load_model
    from peer_dist.export.folder import export
    from peer_dist.megatron import forward_logits, segment_mask

    export(checkpoint, folder, **options)
    loaded = load_model(checkpoint, world_size)
    tokenizer, length = loaded.tokenizer, loaded.config.model.seq_length
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(tokenizer.vocab_size - 1, (3, length), generator=generator)
    tokens[:, 0] = tokenizer.eod
    documents = tokens.clone()
    documents[:, [5, 9]] = tokenizer.eod
    mask = segment_mask(documents, tokenizer.eod)
    with torch.no_grad():
        wanted = {
            "tokens": tokens,
            "logits": forward_logits(loaded.model, tokens),
            "documents": documents,
            "mask": mask,
            "document_logits": forward_logits(loaded.model, documents, mask),
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


@pytest.fixture(scope="module")
def folders(text, tmp_path_factory):
    return exported([ROUTED, TABLES], text, tmp_path_factory.mktemp("export"), shard_size="50KB")


def test_torch_alone_reads_it(folders, tmp_path):
    """Logits of one document and of several, in one pass and by parts through the cache, and text beyond the window."""
    for folder, apart in alone(READ, folders, tmp_path).items():
        assert max(apart) < 1e-5, (folder, apart)
    files = sorted(path.name for path in folders[0].glob("*.safetensors"))
    assert len(files) > 2
    assert all((folders[0] / name).stat().st_size < 60_000 for name in files)


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


def test_transformers_reads_it(folders, tmp_path):
    """Logits, loss, greedy text with its cache, without and behind padding; written again by it, and read again."""
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed: pip install 'peer_dist[dev]'")
    for folder, apart in alone(TRANSFORMERS, folders, tmp_path).items():
        assert max(apart) < 1e-5, (folder, apart)


@pytest.mark.slow
def test_every_kind_of_layer(text, tmp_path):
    folders = exported(OTHERS, text, tmp_path / "runs", shard_size="1MB")
    got = alone(READ, folders, tmp_path)
    assert {folder: max(apart) for folder, apart in got.items() if max(apart) >= 1e-5} == {}
