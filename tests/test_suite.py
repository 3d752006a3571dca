"""Evaluation on published test sets: every number against NumPy on the logits of whole windows."""

import csv
import gzip
import json
import math
import re

import numpy as np
import pytest
import torch
import zstandard

from tests.ranks import Command, run_ranks
from tests.runs import run_to_the_end, small_config, with_keys

LENGTH = 32  # of the model's sequences, in bytes


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    """A checkpoint of a model that has learnt a little spelling."""
    tree = small_config(text, tmp_path_factory.mktemp("run"))
    tree = with_keys(
        tree,
        train={"steps": 80, "micro_batch_size": 16, "global_batch_size": 16},
        optimizer={"lr": 1e-2, "decay_steps": 80},
        table_optimizer={"lr": 1e-2},
        evaluation={"interval": 80},
        checkpoint={"interval": 80},
    )
    run_ranks(run_to_the_end, 1, tree)
    return tree["checkpoint"]["dir"]


# ---------------------------------------------------------------- the files, and what is in them

ARTICLES = [
    'He said "no", twice;\nthen, "yes".\n\nThe end.',
    "Überraschung, naïve 日本 and more: " + "so it goes, " * 9,
    "x",
]
LIKELY = [(context, f" {end}") for context in ("and", "it is", "thou wilt") for end in ("the", "t", "a", "s", "w", "h")]
ENDS = [("go on and on to", " the"), ("“Well,” she said to", " José"), ("", "Alone"), *LIKELY]
PASSAGES = [context + end for context, end in ENDS]
PILE = ["def f(x):\n\treturn x\n", "a € b " * 20, "one more"]
C4 = ["Beginners BBQ Class Taking Place!\nDo you?", "é"]
WIKI = (
    " \n = Robert <unk> = \n \n Robert <unk> is a film @-@ maker ; he was 1 @,@ 234 years old ( in 2 @.@ 5 ) . \n"
    ' He was called " old " by some , " very old " by others ; that \'s it . \n \n = = Career = = \n \n The end . \n'
    " a = b \n \n = Café au lait = \n \n It is coffee . \n"
)
WIKI_PLAIN = [
    "\n= Robert <unk> =\n\nRobert <unk> is a film-maker; he was 1,234 years old (in 2.5).\n"
    'He was called "old" by some, "very old" by others; that\'s it.\n\n= = Career = =\n\nThe end.\na = b\n\n',
    "= Café au lait =\n\nIt is coffee.\n",
]
ENWIK = ("<mediawiki>" + "ab " * 61 + "日本語" * 4 + " 日本語日本 [[end]]").encode()  # 90% and 95% are in characters


def sets_in(folder):
    """Published formats, small: the options that name the files, and by set its documents and words."""
    with open(folder / "curation.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["title", "summary", "url", "date", "article_content"])
        for text in [*ARTICLES[:1], "", "Exception", *ARTICLES[1:]]:
            rows.writerow(['A "title"', "Two\nlines, of summary", "http://a.b/c,d", "2020-01-01", text])
    (folder / "lambada_test.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in PASSAGES))
    lines = [json.dumps({"text": text, "meta": {"pile_set_name": "Github"}}, ensure_ascii=False) for text in PILE]
    (folder / "pile.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with gzip.open(folder / "c4-validation.00000-of-00008.json.gz", "wt", encoding="utf-8") as file:
        for text in C4:
            file.write(json.dumps({"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "https://a.b"}) + "\n")
    (folder / "wiki.test.tokens").write_text(WIKI, encoding="utf-8")
    (folder / "enwik8").write_bytes(ENWIK)
    (folder / "notes[b].txt").write_text("Ein Übel, \r\n\r\n and more", encoding="utf-8", newline="")
    names = {
        "curation_corpus": "curation.csv",
        "lambada": "lambada_test.jsonl",
        "pile": "pile.jsonl",
        "wikitext103": "wiki.test.tokens",
        "c4": "c4-validation.00000-of-00008.json.gz",
        "enwik8:validation": "enwik8",
        "enwik8": "enwik8",
        "text": "notes[b].txt",
    }
    second = WIKI.index(" = Café")

    def whole(texts):
        return texts, sum(len(text.split()) for text in texts)

    wiki_words = len(re.findall(r"\S+", WIKI)) + WIKI.count("\n")
    expected = {
        "curation_corpus": whole(ARTICLES),
        "lambada": whole(PASSAGES),
        "pile": whole(PILE),
        "wikitext103": ([WIKI[:second], WIKI[second:]], wiki_words),
        "wikitext103_detokenized": (WIKI_PLAIN, wiki_words),
        "c4": whole(C4),
        "enwik8:validation": whole([ENWIK[230:243].decode()]),
        "enwik8": whole([ENWIK[243:].decode()]),
        "notes[b].txt": whole(["Ein Übel, \r\n\r\n and more"]),
    }
    return [f"--dataset={name}={folder / file}" for name, file in names.items()], expected


# ---------------------------------------------------------------- by hand


def by_hand(rank, world_size, checkpoint, documents, stride):
    """Of each document, nats and greedy hits of every byte: log-softmax of whole windows, in NumPy."""
    from peer_dist.evaluation.loading import load_model
    from peer_dist.megatron import forward_logits

    loaded = load_model(checkpoint, world_size)
    found = []
    for document in documents:
        x = np.array([loaded.tokenizer.eod, *document.encode()])
        nats, hits = np.full(len(x) - 1, np.nan), np.zeros(len(x) - 1, bool)
        last = max(0, len(nats) - LENGTH)
        for begin in [*range(0, last, stride), last]:
            with torch.no_grad():
                logits = forward_logits(loaded.model, torch.tensor(x[None, begin:-1][:, :LENGTH]))[0].double().numpy()
            labels = x[begin + 1 :][:LENGTH]
            chosen = logits[np.arange(len(labels)), labels]
            top = logits.max(1)
            here = np.log(np.exp(logits - top[:, None]).sum(1)) + top - chosen
            new = np.isnan(nats[begin : begin + LENGTH])
            nats[begin : begin + LENGTH][new] = here[new]
            hits[begin : begin + LENGTH][new] = (chosen == top)[new]
        found.append((nats, hits))
    return found


def numbers(texts, words, found, characters=None):
    """All metrics of a set from its documents and what is known of their bytes."""
    tokens = sum(len(nats) for nats, _ in found)
    nats = sum(nats.sum() for nats, _ in found)
    size = sum(len(text.encode()) for text in texts)
    return {
        "token_perplexity": math.exp(nats / tokens),
        "word_perplexity": math.exp(nats / words),
        "bits_per_byte": nats / size / math.log(2),
        "bits_per_character": nats / (characters or sum(map(len, texts))) / math.log(2),
    }


def evaluated(world_size, arguments, folder):
    """What rank 0 printed, in words."""
    with Command(world_size, ["evaluate", *arguments], folder / f"ranks-{world_size}") as command:
        assert command.codes(120) == [0] * world_size, command.words(0)
        return command.words(0)


@pytest.mark.parametrize(("world_size", "stride"), [(1, 16), (2, 16), (2, 5), (3, 32)])
def test_every_number_of_every_set(run, tmp_path, world_size, stride):
    """Tables sharded over ranks with unequal shares of the windows; documents longer and shorter than a window."""
    options, sets = sets_in(tmp_path)
    if stride != 16:  # the default
        options.append(f"--stride={stride}")
    arguments = ["--checkpoint", run, *options, "--batch-size=3"]
    printed = evaluated(world_size, [*arguments, "--json"], tmp_path)
    result, _ = json.JSONDecoder().raw_decode(printed[printed.index("{") :])
    assert [each["name"] for each in result["results"]] == list(sets)
    assert (result["step"], result["seq_length"], result["stride"]) == (80, LENGTH, stride)
    documents = [text for texts, _ in sets.values() for text in texts]
    (found,) = run_ranks(by_hand, 1, run, documents, stride)
    assert max(map(len, documents)) > 2 * LENGTH
    for each in result["results"]:
        texts, words = sets[each["name"]]
        mine, found = found[: len(texts)], found[len(texts) :]
        size = sum(len(text.encode()) for text in texts)
        assert (each["documents"], each["tokens"], each["bytes"], each["words"]) == (len(texts), size, size, words)
        want = numbers(texts, words, mine, characters=size if "enwik8" in each["name"] else None)
        if each["name"] == "lambada":
            sizes = [len(end.encode()) for _, end in ENDS]
            ends = [(nats[-size:], hits[-size:]) for (nats, hits), size in zip(mine, sizes)]
            want["last_word_perplexity"] = math.exp(sum(nats.sum() for nats, _ in ends) / len(texts))
            want["last_word_accuracy"] = sum(hits.all() for _, hits in ends) / len(texts)
            assert 0 < want["last_word_accuracy"] < 1, "or accuracy is not tested"
        assert each["metrics"] == pytest.approx(want, rel=1e-5), each["name"]
    shown = evaluated(world_size, arguments, tmp_path)
    assert "enwik8 is smaller than 100,000,000 bytes" in shown
    assert "perplexity per word" in shown
    assert "notes[b].txt" in shown
    assert "accuracy of the last word" in shown


# ---------------------------------------------------------------- readers


def documents_of(spec):
    from peer_dist.evaluation.evaluation_sets import parse_sets

    (found,) = parse_sets([spec])
    return list(found.documents())


def test_enwik8_of_full_size_is_split_at_its_customary_bytes(tmp_path):
    from peer_dist.evaluation.evaluation_sets import parse_sets

    path = tmp_path / "enwik8"
    with open(path, "wb") as file:  # zeros, with a mark where each part begins
        for at, mark in ((90_000_000, b"v"), (95_000_000, b"t"), (100_000_010, b"x")):
            file.seek(at)
            file.write(mark)
    for name, mark in (("enwik8:validation", "v"), ("enwik8:test", "t"), ("enwik8", "t")):
        (document,) = documents_of(f"{name}={path}")
        assert (len(document.text), document.characters, document.text.strip("\0")) == (5_000_000, 5_000_000, mark)
        assert document.text.startswith(mark)
    assert parse_sets([f"enwik8={path}"])[0].note == ""


def test_pile_is_read_from_zstd_frames(tmp_path):
    """Frames as parallel compressors write them, cut within a line and a character; damage is told."""
    from peer_dist.data.documents import DataError

    text = "".join(json.dumps({"text": each, "meta": {}}, ensure_ascii=False) + "\n" for each in PILE).encode()
    cut = text.index("€".encode()) + 1
    frames = [zstandard.ZstdCompressor().compress(part) for part in (text[:cut], b"", text[cut:])]
    path = tmp_path / "val.jsonl.zst"
    path.write_bytes(b"".join(frames))
    assert [document.text for document in documents_of(f"pile={path}")] == PILE
    for damaged, said in (
        (b"".join(frames)[:-3], "the zstd file ends too early"),
        (frames[0] + b"no frame", "is not a sound zstd"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=said):
            documents_of(f"pile={path}")


def test_the_last_word_in_tokens_of_several_bytes(tmp_path):
    """With BPE its space is part of its first token, and all of its tokens are scored."""
    from types import SimpleNamespace

    from peer_dist.data.tokenizer import train_bpe
    from peer_dist.evaluation.suite import _last_word, _requests

    tokenizer = train_bpe(None, 600, tmp_path / "bpe.json")
    path = tmp_path / "lambada.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in (*PASSAGES, "it is the  king’s \n")))
    documents = documents_of(f"lambada={path}")
    loaded = SimpleNamespace(tokenizer=tokenizer)
    for document, request in zip(documents, _requests(loaded, documents)):
        last = _last_word(loaded, document, request)
        assert tokenizer.decode(request.ids[:last]).rstrip() == document.context
        assert tokenizer.decode(request.ids[last:]).strip() == document.text.split()[-1]
    assert last < len(request.ids) - 1, "of several tokens"


MISTAKES = [
    ("pile", "must be NAME=FILE, with NAME one of curation_corpus, lambada"),
    ("piles=notes.txt", "piles is not known; known are curation_corpus"),
    ("pile=nowhere.jsonl", "there is no file nowhere.jsonl"),
    ("c4=notes.txt", "notes.txt: line 1: is not valid JSON"),
    ("text=empty.txt", "empty.txt holds no text"),
    ("curation_corpus=base.csv", "base.csv: has no column article_content, only title, summary; the corpus's"),
    ("curation_corpus=short.csv", "short.csv: line 2: has fewer columns than the first line"),
    ("curation_corpus=open.csv", "open.csv: line 3: is not CSV (unexpected end of data)"),
    ("enwik8=latin", "latin: is not UTF-8 at byte 97; it is not enwik8"),
    ("enwik8=hf:a/b", "enwik8 is split by bytes and needs the file"),
    ("c4=hf:c4", "must be hf:OWNER/NAME[/CONFIG][:SPLIT]"),
]


def test_mistakes_in_one_sentence(tmp_path, monkeypatch):
    from peer_dist.data.documents import DataError
    from peer_dist.evaluation.evaluation_sets import parse_sets

    monkeypatch.chdir(tmp_path)
    for name, content in {
        "notes.txt": b"one\n",
        "empty.txt": b"",
        "base.csv": b"title,summary\na,b\n",
        "short.csv": b"title,article_content\na\n",
        "open.csv": b'title,article_content\na,"b\n',
        "latin": b"a" * 97 + b"\xe9aa",
    }.items():
        (tmp_path / name).write_bytes(content)
    for spec, said in MISTAKES:
        with pytest.raises(DataError) as error:
            parse_sets([spec])
        assert said in str(error.value)


def test_wrong_options_are_told_before_anything_starts(run, tmp_path):
    (tmp_path / "notes.txt").write_text("one two")
    one = f"--dataset=text={tmp_path / 'notes.txt'}"
    for arguments, said in (
        (["--help"], "--dataset"),
        ([one, "--stride=33"], "--stride 33: must be 1 to the model's seq_length, 32"),
        ([one, "--split=test"], "--dataset: goes without --data and --split"),
        (["--stride=3"], "--stride: is for --dataset"),
        ([one, "--json", "out.json"], "unexpected extra argument"),
    ):
        command = Command(1, ["evaluate", "--checkpoint", run, *arguments], tmp_path / "ranks")
        with command:
            assert command.codes(60) == [0 if arguments == ["--help"] else 2], arguments
            assert said in command.words(0)


# ---------------------------------------------------------------- the hub, and lm-evaluation-harness


def test_hub_rows_become_documents(tmp_path, monkeypatch):
    """A folder of the shape of a hub data set: nothing here reaches the hub itself."""
    pytest.importorskip("datasets", reason="HF datasets is not installed: pip install 'peer_dist[eval]'")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner/wiki").mkdir(parents=True)
    rows = [line + "\n" if line.strip() else "" for line in WIKI.split("\n")[:-1]]  # as the hub has them
    (tmp_path / "owner/wiki/test.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    from peer_dist.data.documents import DataError
    from peer_dist.evaluation.evaluation_sets import parse_sets

    plain, detokenized = parse_sets(["wikitext103=hf:owner/wiki:test"])
    assert "".join(document.text for document in plain.documents()) == WIKI
    assert [document.text for document in detokenized.documents()] == WIKI_PLAIN
    with pytest.raises(DataError, match="cannot read column text of split validation"):
        parse_sets(["c4=hf:owner/wiki"])


QUESTIONS = [("it is", [" the", " a", " zebra"], 0), ("", ["q", "I"], 1), ("a long way " * 5 + "to", [" go", " x"], 0)]


def harness(rank, world_size, checkpoint, folder):
    import os

    os.environ.update(HF_HOME=f"{folder}/home-{rank}", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    import lm_eval

    from peer_dist.evaluation.harness import HarnessModel
    from peer_dist.evaluation.loading import load_model

    model = HarnessModel(load_model(checkpoint, world_size), batch_size=2)
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{folder}/task.jsonl"}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
    }
    tasks = [
        common
        | {
            "task": "choose",
            "output_type": "multiple_choice",
            "doc_to_choice": "{{choices}}",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}],
        },
        common
        | {
            "task": "roll",
            "output_type": "loglikelihood_rolling",
            "doc_to_target": "{{question}} and so on",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
        common
        | {
            "task": "write",
            "output_type": "generate_until",
            "generation_kwargs": {"until": [" "], "max_gen_toks": 7},
            "metric_list": [{"metric": "exact_match"}],
        },
    ]
    found = lm_eval.simple_evaluate(model, tasks=tasks, bootstrap_iters=0)
    answers = {task: [sample["resps"] for sample in samples] for task, samples in found["samples"].items()}
    return answers, found["results"]["choose"]["acc,none"], found["results"]["roll"]["bits_per_byte,none"]


def test_lm_evaluation_harness(run, tmp_path):
    """Its evaluator over three local tasks, on two ranks: what the model answers is what NumPy says."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'peer_dist[eval]'")
    with open(tmp_path / "task.jsonl", "w") as file:
        for question, choices, answer in QUESTIONS:
            file.write(json.dumps({"question": question, "choices": choices, "answer": answer}) + "\n")
    one, other = run_ranks(harness, 2, run, str(tmp_path))
    assert one == other, "on every rank"
    answers, accuracy, bits_per_byte = one

    def numpy_says(texts, ends, stride):
        (found,) = run_ranks(by_hand, 1, run, texts, stride)
        return [(-nats[-size:].sum(), bool(hits[-size:].all())) for (nats, hits), size in zip(found, map(len, ends))]

    pairs = [question + choice for question, choices, _ in QUESTIONS for choice in choices]
    want = numpy_says(pairs, [choice for _, choices, _ in QUESTIONS for choice in choices], 10**6)  # the last window
    got = [answer for question in answers["choose"] for (answer,) in question]
    assert got == [(pytest.approx(nats, rel=1e-5), greedy) for nats, greedy in want]
    assert accuracy == np.mean(
        [want[0][0] > max(want[1][0], want[2][0]), want[3][0] < want[4][0], want[5][0] > want[6][0]]
    )

    rolled = [question + " and so on" for question, _, _ in QUESTIONS]
    want = [nats for nats, _ in numpy_says(rolled, rolled, LENGTH)]
    assert [answer for ((answer,),) in answers["roll"]] == pytest.approx(want, rel=1e-5)
    assert bits_per_byte == pytest.approx(-sum(want) / sum(map(len, rolled)) / math.log(2), rel=1e-5)

    written = [answer for ((answer,),) in answers["write"]]
    assert min(map(len, written)) < max(map(len, written)) <= 7, "one of them came to a space"
    assert not any(" " in answer for answer in written)
    texts = [question + answer for (question, _, _), answer in zip(QUESTIONS, written)]
    greedy = [hit for _, hit in numpy_says(texts, [answer or "-" for answer in written], 1)]
    assert all(hit or not answer for hit, answer in zip(greedy, written))
