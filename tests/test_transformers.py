"""An exported model in the hands of transformers: what its users do with every causal language model."""

from __future__ import annotations

import importlib.util
import inspect
import json
import math
import warnings

import pytest
import torch
import torch.nn.functional as F

from tests.exported import build, exported, logits_of, package_of

if importlib.util.find_spec("transformers") is None:
    pytest.skip("transformers is not installed: pip install 'peer_dist[dev]'", allow_module_level=True)

import transformers
from transformers import AutoTokenizer, DynamicCache, StaticCache
from transformers.modeling_outputs import CausalLMOutputWithPast

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
END = 383  # no token ends a text: this one is never drawn
MODELS = {
    "peer": {
        "model.mlp": ["peer", "dense", "peer"],
        "model.num_query_groups": 1,
        "model.rope_base": 500.0,
        "peer.layers_per_pool": 2,
        "peer.output_gate": True,
        "peer.dense_hidden": 12,
    },
    "others": {
        "model.mlp": ["pkm", "moe", "sigma_moe"],
        "model.tied_embeddings": False,
        "moe.score": "sigmoid",
        "moe.expert_bias": True,
        "router.kind": "recurrent",
    },
}


@pytest.fixture(scope="module", params=MODELS)
def made(request, parallel, tmp_path_factory):
    """The folder of a model, its modules, and its logits of some tokens."""
    config, model = build(MODELS[request.param], parallel, seed=13)
    tokens = torch.randint(255, (2, 12), generator=torch.Generator().manual_seed(7))
    tokens[:, 0] = 256  # <|endoftext|>
    folder = exported(config, model, parallel, tmp_path_factory.mktemp("export"))
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield folder, package_of(folder, patch), tokens, logits_of(model, tokens)


@pytest.fixture
def model(made):
    folder, package, _, _ = made
    return package.modeling_peer.PeerForCausalLM.from_pretrained(folder)


@pytest.fixture
def tokens(made):
    return made[2]


@pytest.fixture
def wanted(made):
    return made[3]


def close(a, b):
    return a.shape == b.shape and float((a - b).abs().max()) < 1e-5


def greedy(model, tokens, count):
    """The most likely continuation, by one whole pass a token."""
    with torch.no_grad():
        for _ in range(count):
            logits = model(input_ids=tokens, use_cache=False).logits[:, -1, :257]  # the rest pads the vocabulary
            tokens = torch.cat([tokens, logits.argmax(-1)[:, None]], 1)
    return tokens


GENERATE = {
    "the cache": {},
    "no cache": {"use_cache": False},
    "a static cache": {"cache_implementation": "static"},
    "guesses from the prompt": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("options", GENERATE.values(), ids=GENERATE)
def test_greedy_text(model, tokens, options):
    """Of one text, beyond the training length of 16, and of two of unequal length, padded on the left."""
    for row in range(2):
        prompt = tokens[row : row + 1, : 12 - 5 * row]
        text = greedy(model, prompt, 9)
        assert len(text[0, prompt.shape[1] :].unique()) > 2
        settings = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": END, **options}
        # without a mask transformers would take the first token, which pads too, for padding
        made = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
        assert made.equal(text)
    if "prompt_lookup_num_tokens" in options:
        return  # for one text only
    padded, mask = pad(tokens)
    made = model.generate(padded, attention_mask=mask, **settings)
    assert made[:1].equal(greedy(model, tokens[:1], 9))
    assert made[1:, 5:].equal(greedy(model, tokens[1:, :7], 9))


def pad(tokens):
    """The first text, and the first 7 tokens of the second behind padding; and the mask of both."""
    padded = torch.stack([tokens[0], F.pad(tokens[1, :7], (5, 0), value=256)])
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, :5] = 0
    return padded, mask


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
def test_beam_search(model, tokens, options):
    padded, mask = pad(tokens)
    settings = {"attention_mask": mask, "max_new_tokens": 6, "num_beams": 3, "do_sample": False, "eos_token_id": END}
    plain = model.generate(padded, use_cache=False, **settings)
    assert model.generate(padded, **settings, **options).equal(plain)
    alone = model.generate(tokens[1:, :7], **{**settings, "attention_mask": mask[1:, 5:]})
    assert plain[1:, 5:].equal(alone)


@torch.no_grad()
def test_masks_and_positions(model, tokens, wanted):
    """Padding, whole masks of both sorts, positions, and texts in one row that do not see each other."""
    assert close(model(tokens).logits, wanted)
    padded, mask = pad(tokens)
    for dtype in (torch.int64, torch.float32, torch.bool):
        logits = model(padded, attention_mask=mask.to(dtype)).logits
        assert close(logits[0], wanted[0])
        assert close(logits[1, 5:], wanted[1, :7])
    visible = (torch.ones(12, 12).tril()[None] * mask[:, None]).bool()[:, None] | torch.eye(12, dtype=torch.bool)
    added = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    for whole in (visible, added):
        assert close(model(padded, attention_mask=whole).logits[1, 5:], wanted[1, :7])
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        assert close(model(padded, attention_mask=mask).logits[1, 5:], wanted[1, :7])
    shifted = model(tokens, position_ids=torch.arange(100, 112)[None]).logits
    assert float((shifted - wanted).abs().max()) < 1e-3  # only distances count
    packed = torch.cat([tokens[:1], tokens[1:, :7]], 1)
    positions = torch.cat([torch.arange(12), torch.arange(7)])[None]
    logits = model(packed, position_ids=positions).logits
    assert close(logits[:, :12], wanted[:1])
    assert close(logits[:, 12:], wanted[1:, :7])
    stretched = model(tokens, position_ids=2 * torch.arange(12)[None], attention_mask=torch.ones(2, 12)).logits
    assert not close(stretched, wanted)


@torch.no_grad()
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.parametrize("static", [False, True])
def test_a_cache_by_either_name(model, tokens, wanted, name, static):
    """Filled part by part, with padding and without; both names are one thing."""
    for mask in (None, torch.ones(2, 12, dtype=torch.int64)):
        cache = StaticCache(config=model.config, max_cache_len=20) if static else DynamicCache(config=model.config)
        parts = []
        for begin, end in ((0, 5), (5, 6), (6, 12)):
            seen = None if mask is None else mask[:, :end]
            output = model(tokens[:, begin:end], attention_mask=seen, **{name: cache})
            assert getattr(output, CACHE) is cache
            parts.append(output.logits)
        assert int(cache.get_seq_length()) == 12
        assert close(torch.cat(parts, 1), wanted)
    first = model(tokens[:, :5])
    assert isinstance(getattr(first, CACHE), DynamicCache)
    assert close(model(tokens[:, 5:], **{name: getattr(first, CACHE)}).logits, wanted[:, 5:])
    assert getattr(model(tokens, use_cache=False), CACHE) is None


@torch.no_grad()
def test_what_else_goes_in_and_comes_out(model, tokens, wanted):
    embedded = model.get_input_embeddings()(tokens)
    assert close(model(inputs_embeds=embedded).logits, wanted)
    made = model.generate(inputs_embeds=embedded[:1], max_new_tokens=5, do_sample=False, eos_token_id=END)
    assert made.equal(greedy(model, tokens[:1], 5)[:, 12:])
    assert close(model(tokens, logits_to_keep=3).logits, wanted[:, -3:])
    assert close(model(tokens, logits_to_keep=torch.tensor([2, 7])).logits, wanted[:, [2, 7]])
    states = model(tokens, output_hidden_states=True).hidden_states
    assert len(states) == 4
    assert states[0].equal(embedded)
    assert close(model.get_output_embeddings()(states[-1]), wanted)
    assert isinstance(model(tokens, return_dict=False), tuple)
    labels = tokens.masked_fill(torch.arange(12) < 4, -100)
    loss = F.cross_entropy(wanted[:, 3:-1].flatten(0, 1), tokens[:, 4:].flatten(), reduction="sum")
    output = model(tokens, labels=labels)
    assert math.isclose(output.loss, loss / 16, rel_tol=1e-5)
    assert close(output.logits, wanted)
    assert math.isclose(model(tokens, labels=labels, num_items_in_batch=40).loss, loss / 40, rel_tol=1e-5)
    assert math.isclose(model(inputs_embeds=embedded, labels=labels).loss, loss / 16, rel_tol=1e-5)


REFUSED = {
    "output_attentions": ({"output_attentions": True}, "output_attentions: this model does not take it"),
    "an unknown argument": ({"token_type_ids": torch.zeros(2, 12)}, "token_type_ids: this model does not take it"),
    "nothing": ({"input_ids": None}, "give exactly one of input_ids and inputs_embeds"),
    "both": ({"inputs_embeds": torch.zeros(2, 12, 32)}, "give exactly one of input_ids and inputs_embeds"),
    "a short mask": ({"attention_mask": torch.ones(2, 11)}, "it must be [batch, 12] or [batch, 1, 12, 12]"),
    "a mask of 3 dimensions": ({"attention_mask": torch.ones(2, 12, 12)}, "it must be [batch, 12]"),
    "a tuple": ({"past_key_values": ((1, 2),)}, "takes a Cache of transformers, not tuple"),
    "two caches": ({"past_key_values": DynamicCache(), "cache": DynamicCache()}, "two names of one thing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_does_not_have_is_said(model, tokens, case):
    options, words = REFUSED[case]
    with pytest.raises(ValueError) as said:
        model(**{"input_ids": tokens, **options})
    assert words in str(said.value)


def test_what_its_config_does_not_have_is_said(made, tmp_path):
    folder, package, _, _ = made
    settings = json.loads((folder / "config.json").read_text())
    longer = {"rope_type": "linear", "factor": 2.0}
    for change in ({"rope_scaling": longer}, {"rope_parameters": {"rope_theta": 10.0, **longer}}):
        (tmp_path / "config.json").write_text(json.dumps({**settings, **change}))
        config = package.modeling_peer.PeerConfig.from_pretrained(tmp_path)
        with pytest.raises(ValueError, match="config: this model has no rope_"):
            package.modeling_peer.PeerForCausalLM.from_pretrained(folder, config=config)
    with pytest.raises(ValueError, match=r"[Ff]lash"):
        package.modeling_peer.PeerForCausalLM.from_pretrained(folder, attn_implementation="flash_attention_2")


def gradients(model, **inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_that_are_computed_again(model, tokens, reentrant):
    """The same loss and gradients, bit for bit, and less kept; a cache would be filled twice."""
    model.train()
    padded, mask = pad(tokens)
    inputs = {"input_ids": padded, "attention_mask": mask, "labels": padded.masked_fill(mask == 0, -100)}
    loss, wanted = gradients(model, **inputs)
    assert len(wanted) > 10
    calls = []
    hook = model.model.layers[1].register_forward_pre_hook(lambda *_: calls.append(1))
    gradients(model, **inputs)
    assert len(calls) == 1
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    again, found = gradients(model, **inputs)
    assert len(calls) == 3
    assert again.equal(loss)
    assert found.keys() == wanted.keys()
    assert all(found[name].equal(wanted[name]) for name in wanted)
    assert getattr(model(**inputs), CACHE) is None
    with pytest.raises(ValueError, match="would fill it twice"):
        model(tokens, past_key_values=DynamicCache())
    with torch.no_grad():
        made = model.generate(tokens[:1], max_new_tokens=5, do_sample=False)
    model.gradient_checkpointing_disable()
    hook.remove()
    assert made.equal(greedy(model.eval(), tokens[:1], 5))


@torch.no_grad()
@pytest.mark.parametrize("size", [400, 300])
def test_another_vocabulary(made, model, tokens, wanted, size, tmp_path):
    tied = model.config.tie_word_embeddings
    model.resize_token_embeddings(size, mean_resizing=False)
    assert model.get_input_embeddings().weight.shape == (size, 32)
    assert model.get_output_embeddings().weight.shape == (size, 32)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    kept = min(size, 384)
    logits = model(tokens, labels=tokens).logits
    assert logits.shape[-1] == size
    assert close(logits[..., :kept], wanted[..., :kept])
    model.generation_config.suppress_tokens = None
    model.save_pretrained(tmp_path / "again")
    again = type(model).from_pretrained(tmp_path / "again")
    assert close(again(tokens).logits, logits)


@torch.no_grad()
def test_written_and_read_again(made, model, tokens, wanted, tmp_path):
    """In one file and in several; by its own class, and by ``peer_model.py``."""
    for size in ("1GB", "50KB"):
        folder = tmp_path / size
        model.save_pretrained(folder, max_shard_size=size)
        assert close(type(model).from_pretrained(folder)(tokens).logits, wanted)
        assert close(made[1].peer_model.LanguageModel.load(folder)(tokens), wanted)


@torch.no_grad()
def test_other_dtypes(made, tokens, wanted):
    folder, package, _, _ = made
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        model = package.modeling_peer.PeerForCausalLM.from_pretrained(folder, dtype=dtype)
        assert {value.dtype for value in model.parameters()} == {dtype}
        assert {value.dtype for value in model.buffers()} <= {torch.float32, dtype}
        logits = model(tokens).logits
        assert logits.dtype == dtype
        assert (logits - wanted).abs().mean() < (1e-5 if dtype == torch.float64 else 0.2 * wanted.std())
        made = model.generate(*pad(tokens)[:1], attention_mask=pad(tokens)[1], max_new_tokens=3, eos_token_id=END)
        assert made.shape == (2, 15)


@torch.no_grad()
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("device", [None, "meta"])
def test_defaults_change_nothing(made, tokens, default, device):
    """Another default dtype, and a device context around whatever is called."""
    folder, package, _, _ = made
    with torch.no_grad():
        plain = package.peer_model.LanguageModel.load(folder)(tokens)
        plain_theirs = package.modeling_peer.PeerForCausalLM.from_pretrained(folder)(tokens).logits
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        padded, mask = pad(tokens)
        alone = package.peer_model.LanguageModel.load(folder)
        model = package.modeling_peer.PeerForCausalLM.from_pretrained(folder)
        if device is not None:
            torch.set_default_device(device)
        loaded = package.peer_model.LanguageModel.load(folder)
        for one in (alone, loaded):
            assert one(tokens).equal(plain)
            assert one.generate(tokens[:1], 9, temperature=0).shape[1] > 12
        assert model(tokens).logits.equal(plain_theirs)
        assert close(model(padded, attention_mask=mask).logits[1, 5:], plain[1, :7])
        cache = DynamicCache(config=model.config)
        parts = [model(part, past_key_values=cache).logits for part in tokens.split([5, 1, 6], 1)]
        assert close(torch.cat(parts, 1), plain)
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(made, model, tokens, wanted, dtype):
    """Matrix products are rounded; scores, gates and sums are not. Forward, backward and generation."""
    layers = made[1].peer_model.ExportedLayer
    found = []
    for layer in model.modules():
        if isinstance(layer, layers) and hasattr(layer, "retrieve"):
            mixed = layer.mixed

            def watched(x, rows, gates, mixed=mixed):
                y = mixed(x, rows, gates)
                found.append((gates.dtype, y.dtype))
                return y

            layer.mixed = watched
        elif isinstance(layer, layers) and hasattr(layer, "router"):
            layer.router.register_forward_hook(lambda _, __, chosen: found.append((chosen[1].dtype, torch.float32)))
    with torch.autocast("cpu", dtype):
        output = model(tokens, labels=tokens)
        cache = StaticCache(config=model.config, max_cache_len=20)
        parts = [model(part, past_key_values=cache).logits for part in tokens.split([5, 1, 6], 1)]
    assert set(found) == {(torch.float32, torch.float32)}
    assert output.logits.dtype == dtype
    assert (output.logits - wanted).abs().mean() < 0.2 * wanted.std()
    assert (torch.cat(parts, 1) - wanted).abs().mean() < 0.2 * wanted.std()
    output.loss.backward()
    assert all(value.grad is None or value.grad.isfinite().all() for value in model.parameters())
    with torch.autocast("cpu", dtype):
        assert model.generate(tokens, max_new_tokens=3, eos_token_id=END).shape == (2, 15)


def test_new_weights(made, tokens):
    """A model of the config alone is drawn as transformers' are, whatever lay in the memory."""
    folder, package, _, _ = made
    config = package.modeling_peer.PeerConfig.from_pretrained(folder)
    with torch.random.fork_rng():
        model = package.modeling_peer.PeerForCausalLM(config)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.ndim > 1:
            assert 0.01 < value.std() < 0.03, name
        else:
            assert (value == float(name.endswith(("norm.weight", "running_var")))).all(), name
    assert model(tokens, labels=tokens).loss.isfinite()


def test_its_padded_example(made, model):
    """The tokenizer pads on the left, as docs/export.md shows."""
    folder, _, _, _ = made
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = tokenizer(["ROMEO:", "To be, or not"], return_tensors="pt", padding=True)
    made_text = model.generate(**prompts, max_new_tokens=6, do_sample=False, eos_token_id=END)
    for row, text in enumerate(("ROMEO:", "To be, or not")):
        alone = tokenizer(text, return_tensors="pt")["input_ids"]
        assert made_text[row, -6 - alone.shape[1] :].equal(greedy(model, alone, 6)[0])
    assert len(tokenizer.batch_decode(made_text, skip_special_tokens=True)) == 2


needs_accelerate = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed"
)


@needs_accelerate
@torch.no_grad()
def test_weights_on_the_disk(model, tokens, wanted, tmp_path):
    """Every weight is used by its own module, when that is called."""
    from accelerate import disk_offload

    disk_offload(model, offload_dir=str(tmp_path), execution_device=torch.device("cpu"))
    assert {value.device.type for value in model.parameters()} == {"meta"}
    assert close(model(tokens).logits, wanted)


@needs_accelerate
@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"gradient_checkpointing": True}], ids=str)
def test_trainer(model, tokens, tmp_path, options):
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, learning_rate=1e-3, **options,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in tokens.repeat(4, 1)]
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    assert math.isfinite(trainer.train().training_loss)
    moved = {name for name, value in model.named_parameters() if not value.equal(before[name])}
    assert len(moved) > 0.75 * len(before), sorted(before.keys() - moved)


def test_its_arguments_are_those_that_transformers_gives(model):
    """By the names that this version has; ``cache_position`` would be made for it alone, with a warning."""
    names = set(inspect.signature(model.forward).parameters)
    assert {CACHE, "attention_mask", "position_ids", "inputs_embeds", "labels", "logits_to_keep"} <= names
    assert "cache_position" not in names
