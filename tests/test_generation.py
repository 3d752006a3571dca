"""Text drawn with a cache of keys and values, against the whole model at every token."""

import io
from pathlib import Path

import pytest
import torch

from tests.ranks import run_ranks
from tests.runs import make_trainer, small_config, with_keys

LENGTH = 48
LONG = "What, wilt thou leave me so unsatisfied, and go? O speak again, bright angel!"
PROMPTS = ["ROMEO:", "", LONG, "To be, or not to be", LONG[:46]]
TOKENS = 60  # more than a window
LAYERS = {"num_layers": 4, "num_attention_heads": 4, "seq_length": LENGTH, "mlp": ["peer", "dense", "dense", "peer"]}


def saved(rank, world_size, tree):
    """A model at step 0, with weights that make it sensitive to every token."""
    trainer = make_trainer(tree)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if parameter.dim() > 1 and "embedding" not in name:
                parameter.normal_(0, 0.5)
    trainer.save()


@pytest.fixture(scope="module")
def folder(text, tmp_path_factory):
    """A checkpoint of two ranks."""
    tree = with_keys(small_config(text, tmp_path_factory.mktemp("saved")), model=LAYERS, parallel={"expert": 2})
    run_ranks(saved, 2, tree)
    return tree["checkpoint"]["dir"]


def texts_of(rank, world_size, folder, layout, batches):
    """Continuations by `generate`, greedy and drawn, of every batch of prompts."""
    from peer_dist.evaluation.generate import generate
    from peer_dist.evaluation.loading import load_model

    loaded = load_model(folder, world_size, **layout)
    found = []
    for prompts in batches:
        for options in ({"temperature": 0}, {"temperature": 1.0, "top_p": 0.9, "seed": 3}):
            texts = [""] * len(prompts)
            for pieces in generate(loaded, prompts, TOKENS, **options):
                texts = [text + (piece or "") for text, piece in zip(texts, pieces)]
            found.append(texts)
    return found


def by_hand(rank, world_size, folder, prompts):
    """Greedy continuations, every token from all that the model sees; and the cache's logits less those, at most."""
    from peer_dist.evaluation.loading import load_model
    from peer_dist.megatron import Decoder, forward_logits

    loaded = load_model(folder, world_size)
    tokenizer = loaded.tokenizer
    texts = []
    for prompt in prompts:
        window, made = [tokenizer.eod, *tokenizer.encode(prompt)][-LENGTH:], []
        while len(made) < TOKENS and tokenizer.eod not in made:
            window = window[-LENGTH // 2 :] if len(window) > LENGTH else window
            with torch.no_grad():
                logits = forward_logits(loaded.model, torch.tensor([window]))[0, -1, : tokenizer.vocab_size]
            made.append(int(logits.argmax()))
            window.append(made[-1])
        texts.append(tokenizer.decode([token for token in made if token != tokenizer.eod]))

    tokens = torch.tensor([tokenizer.encode(LONG)[:LENGTH], tokenizer.encode(LONG)[-LENGTH:]])
    with torch.no_grad():
        whole = forward_logits(loaded.model, tokens)
    decoder = Decoder(loaded.model, 2, LENGTH)
    parts = [decoder(tokens[:, :11])] + [decoder(tokens[:, [position]]) for position in range(11, LENGTH)]
    return texts, float((torch.stack(parts, 1) - whole[:, 10:]).abs().max() / whole.abs().max())


@pytest.fixture(scope="module")
def alone(folder):
    """Greedy and drawn texts of one rank, all prompts in one batch."""
    return run_ranks(texts_of, 1, folder, {}, [PROMPTS])[0]


def test_cached_text_is_the_models(folder, alone):
    """Greedy text of uneven prompts, longer than the window too, and logits, against whole forward passes."""
    ((want, error),) = run_ranks(by_hand, 1, folder, PROMPTS)
    assert error < 1e-5
    assert alone[0] == want
    assert len(set(want)) == len(PROMPTS)
    assert max(map(len, want)) >= 50


def test_a_text_is_its_own(folder, alone):
    """A prompt alone, or beside others."""
    found = run_ranks(texts_of, 1, folder, {}, [[prompt] for prompt in PROMPTS[:3]])[0]
    assert found == [[texts[number]] for number in range(3) for texts in alone]


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, {}),
        (2, {"tensor": 2}),
        (2, {"pipeline": 2}),
        pytest.param(3, {}, marks=pytest.mark.slow),
        pytest.param(4, {"tensor": 2, "pipeline": 2}, marks=pytest.mark.slow),
        pytest.param(4, {"pipeline": 2}, marks=pytest.mark.slow),
    ],
)
def test_any_layout_draws_the_same(folder, alone, ranks, layout):
    for got in run_ranks(texts_of, ranks, folder, layout, [PROMPTS]):
        assert got == alone


@pytest.mark.parametrize("layout", [{"pipeline": 2}, pytest.param({}, marks=pytest.mark.slow)])
def test_every_kind_of_layer_draws_the_same(text, tmp_path, layout):
    """Their routers' state goes from stage to stage."""
    tree = with_keys(
        small_config(text, tmp_path),
        model={**LAYERS, "mlp": ["peer", "moe", "pkm", "sigma_moe"]},
        pkm={"num_values": 225, "heads": 2, "top_k": 4, "key_dim": 8},
        moe={"num_experts": 4},
        sigma_moe={"num_experts": 4, "top_k": 2},
        router={"kind": "recurrent", "state_size": 8},
    )
    run_ranks(saved, 1, tree)
    folder = tree["checkpoint"]["dir"]
    ((want, _),) = run_ranks(by_hand, 1, folder, PROMPTS[:3])
    for got, _ in run_ranks(texts_of, 2, folder, layout, [PROMPTS[:3]]):
        assert got == want


def test_draws():
    """Shares of 8, 4, 2, 1 and 1 sixteenths: who can be drawn, and how often."""
    from peer_dist.evaluation.generate import _draw

    logits = torch.tensor([1.0, 8.0, 2.0, 1.0, 4.0]).log()

    def drawn(**options):
        draws = torch.Generator().manual_seed(1)
        options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **options}
        found = [_draw(logits.clone(), **options, draws=draws) for _ in range(1600)]
        return {token: found.count(token) for token in set(found)}

    assert set(drawn()) == {0, 1, 2, 3, 4}
    for cold in (1e-30, 1e-31, 1e-300, 5e-324):
        assert drawn(temperature=cold) == {1: 1600}
    assert set(drawn(temperature=1e6)) == {0, 1, 2, 3, 4}
    assert drawn(temperature=0) == drawn(top_k=1, temperature=9.0) == drawn(top_p=0.5) == drawn(top_p=0.0) == {1: 1600}
    assert set(drawn(top_p=0.51)) == set(drawn(top_k=2)) == {1, 4}
    assert set(drawn(top_p=0.8)) == {1, 4, 2}
    assert set(drawn(top_k=3, top_p=0.85)) == {1, 4}, "of the three's 8, 4 and 2 fourteenths, two reach it"
    assert drawn(top_k=2)[1] / 1600 == pytest.approx(2 / 3, abs=0.05)
    assert drawn(top_k=2, temperature=0.5)[1] / 1600 == pytest.approx(4 / 5, abs=0.05)


def test_prompts_and_what_is_written(tmp_path):
    from peer_dist.data.documents import DataError
    from peer_dist.evaluation.generate import read_prompts, write_texts

    file = tmp_path / "prompts.txt"
    file.write_text("one\n\n two\n")
    assert read_prompts([], None) == [""]
    with pytest.raises(DataError, match=r"--prompt 'a.udcff': is no text in UTF-8"):
        read_prompts(["a\udcff"], None)
    assert read_prompts(["zero"], file) == ["zero", "one", " two"]
    file.write_text("\n")
    with pytest.raises(DataError, match=r"prompts.txt: holds no prompt"):
        read_prompts(["zero"], file)
    with pytest.raises(DataError, match=r"--prompt-file /dev/zero: is larger than"):  # and not all of it is read
        read_prompts([], Path("/dev/zero"))

    def draw(prompts):
        yield [prompt.upper() for prompt in prompts]
        yield ["!", *[None] * (len(prompts) - 1)]

    out = io.StringIO()
    assert write_texts(draw, ["a", "b", "c"], 2, out).startswith("5 tokens in ")
    assert out.getvalue() == "=== 1 of 3\naA!\n=== 2 of 3\nbB\n=== 3 of 3\ncC!\n"
    out = io.StringIO()
    write_texts(draw, ["a"], 2, out)
    assert out.getvalue() == "aA!\n"


def wrong_layout(rank, world_size, folder, layout):
    from peer_dist.config import ConfigError
    from peer_dist.evaluation.loading import load_model

    with pytest.raises(ConfigError) as error:
        load_model(folder, world_size, **layout)
    return str(error.value)


def test_layouts_that_cannot_be_are_refused(folder):
    (said,) = run_ranks(wrong_layout, 1, folder, {"tensor": 2})
    assert said.startswith("--tensor 2 x --pipeline 1 does not divide the 1 rank(s)")
