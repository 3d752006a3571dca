"""Weights of other models that runs start from: Llama folders, Megatron's checkpoints, our own with dense layers."""

import json
import multiprocessing
import os
import pickle

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from peer_dist.config import ConfigError, parse_config
from tests.ranks import run_ranks
from tests.runs import losses_of, make_trainer, metrics_of, run_to_the_end, with_keys

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
MODEL = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 48,
    "rope_base": 500000.0,
    "norm_eps": 1e-6,
    "tied_embeddings": False,
    "mlp": "dense",
}
PEER_THIRD = {**MODEL, "mlp": ["dense", "dense", "peer", "dense"]}


def write_llama(folder, changes=None, files=2):
    """A random model of :data:`LLAMA` in the tensors and names of Hugging Face's; its tensors."""
    tree = {**LLAMA, **(changes or {})}
    d, hidden, heads = tree["hidden_size"], tree["intermediate_size"], tree["num_attention_heads"]
    keys = d // heads * tree["num_key_value_heads"]
    shapes = {"model.embed_tokens": (tree["vocab_size"], d), "model.norm": (d,)}
    if not tree["tie_word_embeddings"]:
        shapes["lm_head"] = (tree["vocab_size"], d)
    for n in range(tree["num_hidden_layers"]):
        layer = {"input_layernorm": (d,), "post_attention_layernorm": (d,)}
        layer |= {"self_attn.q_proj": (d, d), "self_attn.k_proj": (keys, d), "self_attn.v_proj": (keys, d)}
        layer |= {"self_attn.o_proj": (d, d), "mlp.gate_proj": (hidden, d), "mlp.up_proj": (hidden, d)}
        shapes |= {f"model.layers.{n}.{name}": shape for name, shape in {**layer, "mlp.down_proj": (d, hidden)}.items()}
    draws = torch.Generator().manual_seed(7)
    tensors = {}
    for name, shape in shapes.items():
        drawn = torch.randn(shape, generator=draws)
        tensors[f"{name}.weight"] = 1 + drawn / 5 if len(shape) == 1 else drawn / 4
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tree))
    if files == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return tensors
    names = sorted(tensors)
    parts = {f"model-{part + 1:05d}-of-{files:05d}.safetensors": names[part::files] for part in range(files)}
    for file, some in parts.items():
        save_file({name: tensors[name] for name in some}, folder / file, {"format": "pt"})
    weight_map = {name: file for file, some in parts.items() for name in some}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tensors


def llama_logits(tensors, tokens, tree=LLAMA, without=()):
    """Llama in float64 from its formulas; the feed-forwards of layers ``without`` left out."""
    weights = {name: tensor.double() for name, tensor in tensors.items()}
    heads, groups = tree["num_attention_heads"], tree["num_key_value_heads"]
    batch, length = tokens.shape
    width = tree["hidden_size"] // heads
    angles = torch.outer(torch.arange(length), tree["rope_theta"] ** (-torch.arange(0, width, 2) / width)).double()
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)

    def norm(x, name):
        return x * (x.square().mean(-1, keepdim=True) + tree["rms_norm_eps"]).rsqrt() * weights[f"{name}.weight"]

    def split(x, name, count):
        return (x @ weights[f"{name}.weight"].T).view(batch, length, count, width).transpose(1, 2)

    def rotate(x):
        half = torch.cat([-x[..., width // 2 :], x[..., : width // 2]], -1)
        return x * cos + half * sin

    x = weights["model.embed_tokens.weight"][tokens]
    for n in range(tree["num_hidden_layers"]):
        layer = f"model.layers.{n}"
        y, attention = norm(x, f"{layer}.input_layernorm"), f"{layer}.self_attn"
        q, k = rotate(split(y, f"{attention}.q_proj", heads)), rotate(split(y, f"{attention}.k_proj", groups))
        k, v = (z.repeat_interleave(heads // groups, 1) for z in (k, split(y, f"{attention}.v_proj", groups)))
        scores = (q @ k.transpose(2, 3) / width**0.5).masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + mixed @ weights[f"{attention}.o_proj.weight"].T
        if n + 1 not in without:
            y, mlp = norm(x, f"{layer}.post_attention_layernorm"), f"{layer}.mlp"
            gate, up = (y @ weights[f"{mlp}.{name}_proj.weight"].T for name in ("gate", "up"))
            x = x + (F.silu(gate) * up) @ weights[f"{mlp}.down_proj.weight"].T
    head = "model.embed_tokens" if tree["tie_word_embeddings"] else "lm_head"
    return norm(x, "model.norm") @ weights[f"{head}.weight"].T


@pytest.fixture
def tree(small, tmp_path):
    """A run that starts from the Llama folder, which is written too."""
    return with_keys(
        {
            **small,
            "model": {**MODEL, "seq_length": 32},
            "peer": {**small["peer"], "output_gate": True, "dense_hidden": 8},
        },
        checkpoint={"init_from": str(tmp_path / "llama")},
        table_optimizer={"lr": 1e-2},
    )


TOKENS = torch.arange(48).view(2, 24) * 5 % 257


def logits_of(rank, world_size, tree):
    """Of a run's first step; None where there are none."""
    from peer_dist.megatron import Decoder

    trainer = make_trainer(tree)
    trainer.model.eval()
    decoder = Decoder(trainer.model, 2, 24)
    made = [decoder(TOKENS[:, [position]]) for position in range(24)]
    return torch.stack(made, 1).numpy() if trainer.parallel.is_last_stage else None


def assert_close(got, want):
    found = [torch.from_numpy(each).double() for each in got if each is not None]
    assert found
    for each in found:
        assert (each - want).abs().max() / want.abs().max() < 1e-5


LAYOUTS = [
    (1, {}),
    (2, {"tensor": 2}),
    (2, {"pipeline": 2}),
    pytest.param(4, {"tensor": 2, "pipeline": 2, "expert": 2}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("ranks", "layout"), LAYOUTS)
def test_a_llama_is_itself_in_any_layout(tree, tmp_path, ranks, layout):
    """Grouped queries, another theta and epsilon, untied embeddings, two files: all logits."""
    tensors = write_llama(tmp_path / "llama")
    assert_close(run_ranks(logits_of, ranks, with_keys(tree, parallel=layout)), llama_logits(tensors, TOKENS))


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, {"tensor": 2, "expert": 2}),
        pytest.param(2, {"pipeline": 2}, marks=pytest.mark.slow),
        pytest.param(2, {"expert_tensor": 2}, marks=pytest.mark.slow),
    ],
)
def test_a_new_peer_layer_begins_at_zero(tree, tmp_path, ranks, layout):
    """The dense model's logits without one feed-forward; with tied embeddings, in one file."""
    llama = {**LLAMA, "tie_word_embeddings": True}
    tensors = write_llama(tmp_path / "llama", llama, files=1)
    tree = with_keys(tree, model={**PEER_THIRD, "tied_embeddings": True}, parallel=layout)
    assert_close(run_ranks(logits_of, ranks, tree), llama_logits(tensors, TOKENS, llama, without=[3]))


def silenced(rank, world_size, tree):
    """Save the dense model with a third feed-forward of 0; its held-out loss."""
    trainer = make_trainer(tree)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "layers.2.mlp.linear_fc2" in name:
                parameter.zero_()
    trainer.save()
    return trainer.validate()["val/loss"]


def test_training_goes_on_from_a_dense_model(tree, tmp_path):
    """From a Llama folder and from a dense checkpoint of ours: the dense model's loss without one feed-forward at
    step 0, and five steps that lower it; on two ranks, each with half of the experts.
    """
    write_llama(tmp_path / "llama")
    (want,) = run_ranks(silenced, 1, tree)
    ours = tree["checkpoint"]["dir"]
    for number, source in enumerate((tree["checkpoint"]["init_from"], ours)):
        run = with_keys(
            tree,
            model=PEER_THIRD,
            parallel={"expert": 2},
            train={"steps": 5},
            optimizer={"warmup_steps": 0},
            checkpoint={"dir": str(tmp_path / f"run{number}"), "init_from": source},
            logging={"dir": str(tmp_path / f"logs{number}")},
        )
        run_ranks(run_to_the_end, 2, run)
        first, *_, last = metrics_of(run)
        assert first["val/loss"] == pytest.approx(want, rel=1e-6)
        assert last["val/loss"] < want - 0.1
        assert len(losses_of(run)) == 5


def refusals(rank, world_size, trees):
    from peer_dist.checkpoints.sources import open_source
    from peer_dist.data.stream import open_tokenizer
    from peer_dist.megatron import CheckpointError

    said = []
    for tree in trees:
        config = parse_config(tree, "test")
        with pytest.raises((ConfigError, CheckpointError)) as error:
            open_source(config, open_tokenizer(config.data))
        said.append(str(error.value))
    return said


def test_other_architectures_are_refused(tree, tmp_path):
    """In one sentence with both values; and what is missing or damaged, by its name."""
    cases = {
        "has rope_theta = 10000.0, but the config says model.rope_base = 500000.0": {"rope_theta": 10000.0},
        "has rms_norm_eps = 1e-05, but the config says model.norm_eps = 1e-06": {"rms_norm_eps": 1e-5},
        "has num_key_value_heads = 4, but the config says model.num_query_groups = 2": {"num_key_value_heads": 4},
        "has intermediate_size = 64, but the config says model.ffn_hidden_size = 48": {"intermediate_size": 64},
        "has tie_word_embeddings = True, but the config says model.tied_embeddings = False": {
            "tie_word_embeddings": True
        },
        "tokenizer.json has 257 tokens (padded to 384)": {"vocab_size": 385},
        "has vocab_size = 256, but the data's tokenizer": {"vocab_size": 256},
        "has hidden_act = gelu, but models of this package have silu": {"hidden_act": "gelu"},
        "has attention_bias = True, but": {"attention_bias": True},
        "has rope_type = llama3, but models of this package have default": {"rope_scaling": {"rope_type": "llama3"}},
        "has head_dim = 16, but models of this package have 8": {"head_dim": 16},
        "has model_type = gpt2, but": {"model_type": "gpt2"},
    }
    trees, wanted = [], list(cases)
    for number, changes in enumerate(cases.values()):
        write_llama(tmp_path / f"{number}", changes, files=1)
        trees.append(with_keys(tree, checkpoint={"init_from": str(tmp_path / f"{number}")}))

    def damaged(name, said, damage):
        write_llama(tmp_path / name, files=1)
        damage(tmp_path / name)
        trees.append(with_keys(tree, checkpoint={"init_from": str(tmp_path / name)}))
        wanted.append(said)

    def rewrite(folder, **changes):
        (folder / "config.json").write_text(json.dumps({**LLAMA, **changes}))

    def other_tokens(folder):
        from peer_dist.data.tokenizer import load_tokenizer

        load_tokenizer("byte").save(folder / "tokenizer.json")
        tokens = json.loads((folder / "tokenizer.json").read_text())
        vocabulary = tokens["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
        (folder / "tokenizer.json").write_text(json.dumps(tokens))

    weights = "model.safetensors"
    damaged("deeper", "model.layers.4.input_layernorm.weight is missing", lambda f: rewrite(f, num_hidden_layers=5))
    damaged("wider", "(48, 32), but by config.json (64, 32)", lambda f: rewrite(f, intermediate_size=64))
    damaged("cut", f"{weights}: cannot be read as safetensors", lambda f: (f / weights).write_bytes(b"0" * 9))
    damaged("gone", f"{weights}: cannot be read as safetensors", lambda f: (f / weights).unlink())
    damaged("broken", "config.json: is not valid JSON", lambda f: (f / "config.json").write_text("{"))
    damaged("short", "config.json: has no vocab_size", lambda f: rewrite(f, vocab_size=None))
    damaged("tokens", "the token 97 is 'b', but 'a' in the data's tokenizer", other_tokens)
    write_llama(tmp_path / "llama")
    layers = ["dense", "dense", "pkm", "dense"]
    trees.append(with_keys(tree, model={**MODEL, "mlp": layers}))
    wanted.append("has a dense feed-forward in layer 3, but model.mlp says pkm")
    trees.append(with_keys(tree, checkpoint={"init_from": str(tmp_path / "nowhere")}))
    wanted.append("nowhere: holds no complete checkpoint")
    (said,) = run_ranks(refusals, 1, trees)
    for sentence, part in zip(said, wanted, strict=True):
        assert part in sentence
        assert "\n" not in sentence


def test_llama_is_that_of_transformers(tree, tmp_path):
    """A folder that transformers writes, and its logits."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(3)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, initializer_range=0.2)).eval()
    model.save_pretrained(tmp_path / "llama")
    with torch.no_grad():
        want = model(TOKENS).logits.double()
    assert_close(run_ranks(logits_of, 1, tree), want)


FUSED = {  # as TransformerEngine's layers call them
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


def write_megatron(rank, world_size, folder, changes, names=()):
    """A random model of Megatron-core's own specification, saved by it; its logits."""
    import torch.distributed as dist
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    from peer_dist.megatron import Parallel

    Parallel.initialize(tensor=world_size, seed=1)
    sizes = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2}
    options = {"normalization": "RMSNorm", "layernorm_epsilon": 1e-6, "gated_linear_unit": True, "init_method_std": 0.2}
    options |= {"add_bias_linear": False, "tensor_model_parallel_size": world_size, "params_dtype": torch.float32}
    options |= {"attention_dropout": 0.0, "hidden_dropout": 0.0, "activation_func": F.silu, **(changes or {})}
    config = TransformerConfig(**sizes, ffn_hidden_size=48, use_cpu_initialization=True, **options)
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    torch.manual_seed(5)
    rotary = {"position_embedding_type": "rope", "rotary_base": 500000}
    model = GPTModel(config, spec, 384, 64, share_embeddings_and_output_weights=False, **rotary).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # alike on all ranks
            parameter.data += torch.linspace(-0.2, 0.2, len(parameter))
    newest = folder / "iter_0000007"
    if rank == 0:
        newest.mkdir(parents=True)
        (folder / "latest_checkpointed_iteration.txt").write_text("7")
    dist.barrier()
    multiprocessing.current_process()._config["daemon"] = False  # its writer has a process
    state = model.sharded_state_dict()
    for tensor in nested_values(state):
        for name in names:
            tensor.key = tensor.key.replace(name, FUSED[name])
    dist_checkpointing.save({"model": state, "iteration": 7}, str(newest))
    for child in multiprocessing.active_children():  # this rank leaves in a way that would leave it behind
        child.kill()
    mask = torch.ones(24, 24, dtype=torch.bool).triu(1)[None, None]
    with torch.no_grad():
        logits = model(TOKENS, torch.arange(24).expand(2, -1), mask, runtime_gather_output=True)
    return logits.double().numpy()


def test_a_checkpoint_of_megatron_is_itself(tree, tmp_path):
    """All logits, of what two tensor-parallel ranks saved; shapes that differ from the config's are told."""
    want = torch.from_numpy(run_ranks(write_megatron, 2, tmp_path / "llama", None)[0])
    assert_close(run_ranks(logits_of, 1, tree), want)
    run_ranks(write_megatron, 2, tmp_path / "fused", None, list(FUSED))
    fused = with_keys(tree, checkpoint={"init_from": str(tmp_path / "fused")}, parallel={"pipeline": 2})
    assert_close(run_ranks(logits_of, 2, fused), want)
    direct = with_keys(tree, checkpoint={"init_from": str(tmp_path / "llama" / "iter_0000007")})
    changed = [{"num_layers": 3}, {"num_attention_heads": 8}, {"ffn_hidden_size": 40}, {"tied_embeddings": True}]
    told = ("num_layers = 4", "num_query_groups = 4", "ffn_hidden_size = 48", "tied_embeddings = False")
    trees = [with_keys(direct, model={**MODEL, **changes}) for changes in changed]
    for sentence, part in zip(run_ranks(refusals, 1, trees)[0], told, strict=True):
        assert f"iter_0000007 has model.{part}, but the config says" in sentence


class Touch:
    """Unpickled freely, makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_other_models_of_megatron_are_refused(tree, tmp_path):
    run_ranks(write_megatron, 1, tmp_path / "llama", {"add_bias_linear": True})
    (said,) = run_ranks(refusals, 1, [tree])[0]
    assert "bias, which models of this package have not" in said
    for content in (b"cut", pickle.dumps(Touch(str(tmp_path / "touched")))):
        (tmp_path / "llama" / "iter_0000007" / ".metadata").write_bytes(content)
        (said,) = run_ranks(refusals, 1, [tree])[0]
        assert "iter_0000007: is not a checkpoint of a GPT model of Megatron-core" in said
    assert not (tmp_path / "touched").exists()


def header_of(shapes):
    """A safetensors file's beginning."""
    text = json.dumps(shapes).encode()
    return len(text).to_bytes(8, "little") + text


DAMAGED = {
    "config.json": [
        *(b"null", b"[]", b"5", b"", b"{", b"[" * 100_000, b"\xff\xfe"),
        *({"vocab_size": value} for value in (True, -1, 0, "384", 384.0, None, 10**30)),
        *({"num_hidden_layers": value} for value in (0, -4, 10**9, "4")),
        *({"rope_parameters": value} for value in (5, [1], "x")),
        *({"rope_scaling": value} for value in (5, [1], "x")),
        *({"num_attention_heads": value} for value in (0, 3, 10**9)),
        *({"num_key_value_heads": value} for value in (0, -1, 3, "x", [])),
        *({"rms_norm_eps": value} for value in ("x", [], {})),
    ],
    "model.safetensors.index.json": [
        *(b"null", b"[]", b"{}", b"", b"[" * 100_000),
        *({"weight_map": value} for value in (None, [], {}, "x", 5)),
        *(
            {"weight_map": {"a": value}}
            for value in ("../x", "/etc/passwd", "", ".", "..", None, 5, ["a"], "gone", "n" * 300)
        ),
    ],
    "model-00001-of-00002.safetensors": [
        *(b"", b"x" * 7, b"x" * 100, (2**63).to_bytes(8, "little") + b"{}", b"\xff" * 8 + b"{}", b"\0" * 100),
        header_of([]),
        header_of({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}),
        header_of({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 2**62]}}),
        header_of({"a": {"dtype": "X", "shape": [2**40, 2**40], "data_offsets": [8, 0]}}),
    ],
    "tokenizer.json": [b"null", b"{}", b"", b"[" * 100_000, b"\xff"],
}


def test_a_damaged_llama_is_refused_before_ranks_meet(tree, tmp_path):
    """In one sentence that names the file or what is wrong with it, and without reading one elsewhere."""
    from peer_dist.mistake import Mistake
    from peer_dist.training.readiness import check_ready

    folder = tmp_path / "llama"
    write_llama(folder)
    config = parse_config(with_keys(tree, checkpoint={"init_from": str(folder)}), "test")
    check_ready(config, 1)
    for name, contents in DAMAGED.items():
        sound = (folder / name).read_bytes() if (folder / name).exists() else None
        for content in contents:
            if isinstance(content, dict):
                content = json.dumps({**json.loads(sound), **content}).encode()
            (folder / name).write_bytes(content)
            with pytest.raises(Mistake) as refusal:
                check_ready(config, 1)
            assert str(folder) in str(refusal.value), content[:200]
            assert "\n" not in str(refusal.value), content[:200]
        (folder / name).unlink()
        for make in (lambda file: file.mkdir(), os.mkfifo, lambda file: file.symlink_to(file)):
            make(folder / name)
            if name != "tokenizer.json":  # which need not be there
                with pytest.raises(Mistake):
                    check_ready(config, 1)
            (folder / name).rmdir() if (folder / name).is_dir() else (folder / name).unlink()
        if sound is not None:
            (folder / name).write_bytes(sound)
    check_ready(config, 1)
