"""Data: text files into prepared sets, and prepared sets into streams of sequences. Real files throughout."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from peer_dist.config.schema import DataConfig
from peer_dist.data.documents import DataError, cut, read_documents
from peer_dist.data.prepare import PreparedSet, prepare, read_prepared
from peer_dist.data.stream import HeldOutStream, TokenStream, open_data
from peer_dist.data.tokenizer import load_tokenizer, train_bpe
from peer_dist.megatron.indexed_data import SplitDataset
from tests.ranks import run_ranks

ODD = "naïve 日本語 🙂‍🙂 \0 \u2028 \r\n\t <|endoftext|> \ufeff end"


def quiet() -> Console:
    return Console(file=io.StringIO())


def prose(number: int, paragraphs: int) -> str:
    """Paragraphs that are all different, with blank lines between them."""
    return "".join(f"Paragraph {number}.{i} says {i * 7919 % 1000}.\n\n" for i in range(paragraphs))


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def documents_of(prefix: Path) -> list[list[int]]:
    """All documents of a prepared set, token by token, read as the format says."""
    summary = read_prepared(prefix)
    tokens = np.fromfile(f"{prefix}.bin", dtype=np.uint16).tolist()
    documents: list[list[int]] = [[]]
    for token in tokens:
        documents[-1].append(token)
        if token == summary.eod:
            documents.append([])
    assert documents.pop() == []
    assert (len(documents), len(tokens)) == (summary.documents, summary.tokens)
    return documents


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared set of 40 documents, to be read only."""
    folder = tmp_path_factory.mktemp("shared")
    source = write_lines(folder / "in.jsonl", [prose(n, 8 + n % 5) for n in range(40)])
    prepare([source], folder / "set", console=quiet())
    return folder / "set"


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("bpe") / "bpe.json"
    train_bpe(None, 512, output)
    return output


# --- tokenizers


BYTES = load_tokenizer("byte")


@given(st.text())
def test_bytes_round_trip(text: str) -> None:
    ids = BYTES.encode(text)
    assert ids == list(text.encode())
    assert BYTES.decode(ids) == text


def test_byte_tokenizer_sizes() -> None:
    assert (BYTES.vocab_size, BYTES.eod, BYTES.padded_vocab_size) == (257, 256, 384)
    assert BYTES.decode([72, 105, 256, 300]) == "Hi<|endoftext|>"
    assert BYTES.encode_batch([ODD, "", "a"]) == [BYTES.encode(ODD), [], [97]]


def test_bpe_round_trip_and_files(bpe: Path, tmp_path: Path) -> None:
    learned = load_tokenizer(str(bpe))
    assert learned.vocab_size == 512
    assert learned.padded_vocab_size == 512

    @given(st.text())
    def round_trip(text: str) -> None:
        ids = learned.encode(text)
        assert learned.eod not in ids
        assert learned.decode(ids) == text

    round_trip()
    assert learned.decode(learned.encode(ODD)) == ODD
    assert len(learned.encode("the king and the queen")) < len("the king and the queen")
    learned.save(tmp_path / "copy.json")
    copy = load_tokenizer(str(tmp_path / "copy.json"))
    assert copy.digest == learned.digest != BYTES.digest
    assert copy.encode(ODD) == learned.encode(ODD)


def test_bpe_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least 257 tokens; 256"):
        train_bpe(None, 256, tmp_path / "x.json")
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"fine \xff")
    with pytest.raises(DataError, match=r"bad\.txt: is not UTF-8 at byte 5"):  # through the Rust trainer
        train_bpe([bad], 300, tmp_path / "x.json")
    with pytest.raises(DataError, match=r"nowhere.x\.json: cannot be written"):
        train_bpe(None, 257, tmp_path / "nowhere" / "x.json")
    assert sorted(os.listdir(tmp_path)) == ["bad.txt"]


def test_tokenizer_file_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no\.json: there is no such tokenizer file"):
        load_tokenizer(str(tmp_path / "no.json"))
    (tmp_path / "junk.json").write_text("{}")
    with pytest.raises(DataError, match=r"junk\.json: is not a tokenizer\.json"):
        load_tokenizer(str(tmp_path / "junk.json"))
    BYTES.save(tmp_path / "tokenizer.json")
    text = (tmp_path / "tokenizer.json").read_text().replace("<|endoftext|>", "<end>")
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(DataError, match=r"tokenizer\.json: has no <\|endoftext\|> token"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))


# --- reading documents


@given(st.text(alphabet="ab é🙂\n\r", max_size=60), st.integers(1, 20), st.integers(1, 9), st.integers(1, 9))
def test_cutting_loses_nothing(text: str, size: int, one: int, other: int) -> None:
    def blocks(length: int) -> list[str]:
        return [text[i : i + length] for i in range(0, len(text), length)]

    pieces = list(cut(iter(blocks(one)), size))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= size for piece in pieces)
    assert pieces == list(cut(iter(blocks(other)), size))
    for piece in pieces[:-1]:
        assert piece.endswith("\n") or "\n" not in piece


def test_cuts_at_blank_lines_then_lines() -> None:
    assert list(cut(iter(["ab\n\ncd\nef\n\ngh"]), 10)) == ["ab\n\n", "cd\nef\n\ngh"]
    assert list(cut(iter(["ab\r\n\r\ncd"]), 7)) == ["ab\r\n\r\n", "cd"]
    assert list(cut(iter(["ab\ncd\nefghijklm"]), 7)) == ["ab\ncd\n", "efghijk", "lm"]


@pytest.mark.parametrize("block", [1, 2, 3, 1 << 20])
def test_blocks_do_not_matter(tmp_path: Path, block: int) -> None:
    text = tmp_path / "a.txt"
    text.write_bytes(b"\xef\xbb\xbf" + ODD.encode())  # the byte order mark is not text
    assert list(read_documents(text, block=block)) == [ODD]
    lines = tmp_path / "a.JSONL"
    lines.write_bytes(b'{"text": "one", "id": 1}\r\n\n{"text": ""}\n' + json.dumps({"text": ODD}).encode())
    assert list(read_documents(lines, block=block)) == ["one", ODD]
    bad = tmp_path / "bad.txt"
    bad.write_bytes("é".encode() * 3 + b"\xe6\x97" + b"abc")
    with pytest.raises(DataError, match="is not UTF-8 at byte 6 "):
        list(read_documents(bad, block=block))
    bad.write_bytes("é".encode() * 3 + b"\xe6\x97")  # ends inside a character
    with pytest.raises(DataError, match="is not UTF-8 at byte 6 "):
        list(read_documents(bad, block=block))


def test_bad_byte_far_into_a_file(tmp_path: Path) -> None:
    for name, opener in (("a.txt", open), ("a.txt.gz", gzip.open)):
        with opener(tmp_path / name, "wb") as file:  # type: ignore[operator]
            file.write(b"x" * (3 << 20) + b"\xfe" + b"y" * 10)
        with pytest.raises(DataError, match=f"{name}: is not UTF-8 at byte {3 << 20}"):
            prepare([tmp_path / name], tmp_path / "out", console=quiet())


# --- preparing


def test_every_kind_of_input(tmp_path: Path) -> None:
    texts = [prose(n, 2) + ODD for n in range(4)]
    (tmp_path / "a.txt").write_bytes(texts[0].encode())
    with gzip.open(tmp_path / "b.txt.gz", "wb") as file:
        file.write(texts[1].encode())
    lines = write_lines(tmp_path / "c.jsonl", texts[2:])
    with gzip.open(tmp_path / "d.jsonl.gz", "wb") as file:
        file.write(lines.read_bytes())
    inputs = [tmp_path / name for name in ("a.txt", "b.txt.gz", "c.jsonl", "d.jsonl.gz")]
    summary = prepare(inputs, tmp_path / "deep" / "er" / "set", console=quiet())
    expected = [*texts, *texts[2:]]
    documents = documents_of(tmp_path / "deep" / "er" / "set")
    assert [BYTES.decode(ids[:-1]) for ids in documents] == expected
    assert summary == read_prepared(tmp_path / "deep" / "er" / "set")
    assert (summary.vocab_size, summary.tokenizer) == (257, "byte")
    assert [entry["bytes"] for entry in summary.inputs] == [path.stat().st_size for path in inputs]
    assert sorted(os.listdir(tmp_path / "deep" / "er")) == [
        "set.bin",
        "set.idx",
        "set.json",
        "set.tokenizer.json",
    ]
    assert load_tokenizer(str(tmp_path / "deep" / "er" / "set.tokenizer.json")).digest == BYTES.digest


def test_long_documents(tmp_path: Path) -> None:
    """A long text becomes several documents, a long JSON line stays one; neither loses anything."""
    text = prose(0, 20_000)
    (tmp_path / "long.txt").write_text(text)
    prepare([tmp_path / "long.txt"], tmp_path / "cut", console=quiet())
    documents = [BYTES.decode(ids[:-1]) for ids in documents_of(tmp_path / "cut")]
    assert "".join(documents) == text
    assert all(document.endswith("\n\n") for document in documents)
    assert all(16_000 < len(document) <= 16384 for document in documents[:-1])
    prepare([write_lines(tmp_path / "long.jsonl", [text, "next"])], tmp_path / "whole", console=quiet())
    assert [BYTES.decode(ids[:-1]) for ids in documents_of(tmp_path / "whole")] == [text, "next"]


def test_the_text_in_the_package(tmp_path: Path) -> None:
    console = quiet()
    summary = prepare(None, tmp_path / "s", console=console)
    assert 60 < summary.documents < 80
    assert summary.tokens == summary.documents + 1_115_394
    assert "tokens/s" in console.file.getvalue()  # type: ignore[attr-defined]


def test_training_a_vocabulary(tmp_path: Path, bpe: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_text(prose(1, 100))
    console = quiet()
    summary = prepare([source], tmp_path / "own", train_bpe=5000, console=console)
    assert summary.tokenizer == "bpe"
    assert 257 < summary.vocab_size < 5000
    assert f"the text gives {summary.vocab_size} of the 5000" in console.file.getvalue()  # type: ignore[attr-defined]
    own = load_tokenizer(f"{tmp_path / 'own'}.tokenizer.json")
    assert [own.decode(ids[:-1]) for ids in documents_of(tmp_path / "own")] == [prose(1, 100)]
    summary = prepare([source], tmp_path / "given", tokenizer=str(bpe), console=quiet())
    assert (summary.vocab_size, summary.tokenizer) == (512, str(bpe))
    assert [load_tokenizer(str(bpe)).decode(ids[:-1]) for ids in documents_of(tmp_path / "given")] == [prose(1, 100)]
    with pytest.raises(DataError, match="not both"):
        prepare([source], tmp_path / "x", tokenizer=str(bpe), train_bpe=300)


def test_empty_files(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "blank.jsonl").write_text('\n{"text": ""}\n\n')
    (tmp_path / "full.txt").write_text("text")
    with gzip.open(tmp_path / "none.txt.gz", "wb"):
        pass
    empty = [tmp_path / name for name in ("empty.txt", "blank.jsonl", "none.txt.gz")]
    with pytest.raises(DataError, match=r"no text in .*empty\.txt, .*blank\.jsonl"):
        prepare(empty, tmp_path / "out" / "x", console=quiet())
    assert os.listdir(tmp_path / "out") == []
    console = quiet()
    prepare([*empty, tmp_path / "full.txt"], tmp_path / "out" / "x", console=console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line for line in lines if line.startswith("warning: ")] == [
        f"warning: {path}: holds no text and is skipped" for path in empty
    ]
    assert documents_of(tmp_path / "out" / "x") == [BYTES.encode("text") + [256]]


def gzipped(text: bytes) -> bytes:
    return gzip.compress(text, mtime=0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"ab\xff\xfe", r"a\.txt: is not UTF-8 at byte 2 \(invalid start byte\); convert"),
        ("a.txt.gz", gzipped(b"ab\xff"), r"is not UTF-8 at byte 2 of the uncompressed text"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": \n',
            r"a\.jsonl: line 2: is not valid JSON \(Expecting value at column 10\)",
        ),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl: line 1: is not valid JSON"),
        ("a.jsonl", b"9" * 5000, r"a\.jsonl: line 1: (is not valid JSON|must be an object)"),
        ("a.jsonl", b'\n\n{"body": "a"}', r'a\.jsonl: line 3: must be an object with a string under "text"'),
        ("a.jsonl", b'{"text": 3}', r'line 1: must be an object with a string under "text"'),
        ("a.jsonl", b'["text"]', r'line 1: must be an object with a string under "text"'),
        ("a.jsonl", b'{"text": "ab\\ud800"}', r"line 1: .* half a surrogate pair at character 2"),
        ("a.jsonl.gz", gzipped(b'{"text": "a"}\n' * 99)[:-12], r"a\.jsonl\.gz: the gzip file ends too early"),
        ("a.txt.gz", b"plain text", r"a\.txt\.gz: is not a sound gzip file"),
        ("a.txt.gz", gzipped(b"abcdef" * 99)[:20] + b"\xff" * 30, r"a\.txt\.gz: is not a sound gzip file"),
        ("a.csv", b"text", r"a\.csv: its kind is not known by its name; known are \.txt, \.jsonl"),
    ],
)
def test_odd_inputs(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    (tmp_path / "good.txt").write_text("good")
    with pytest.raises(DataError, match=message) as error:
        prepare([tmp_path / "good.txt", tmp_path / name], tmp_path / "out", console=quiet())
    assert "\n" not in str(error.value)
    assert sorted(os.listdir(tmp_path)) == sorted([name, "good.txt"])


def test_impossible_calls(tmp_path: Path) -> None:
    good = tmp_path / "good.txt"
    good.write_text("good")
    with pytest.raises(DataError, match="no input: name at least one"):
        prepare([], tmp_path / "x")
    with pytest.raises(DataError, match=r"no\.txt: there is no such file"):
        prepare([tmp_path / "no.txt"], tmp_path / "x")
    with pytest.raises(DataError, match="is a folder; name the files in it"):
        prepare([tmp_path], tmp_path / "x")
    with pytest.raises(DataError, match="is a folder; give a prefix"):
        prepare([good], tmp_path)
    with pytest.raises(DataError, match="max_document is 0"):
        prepare([good], tmp_path / "x", max_document=0)
    with pytest.raises(DataError, match=r"good\.txt.x: cannot be written \((Not a directory|File exists)\)"):
        prepare([good], good / "x")
    with pytest.raises(DataError, match="no such tokenizer file"):
        prepare([good], tmp_path / "new" / "x", tokenizer="no.json")
    assert os.listdir(tmp_path) == ["good.txt"]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder in which root cannot write")
def test_unwritable_output(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match=r"/proc/self/x: cannot be written"):
        prepare([tmp_path / "a.txt"], Path("/proc/self/x"), console=quiet())


def test_existing_output(tmp_path: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_text("first")
    first = prepare([source], tmp_path / "set", console=quiet())
    source.write_text("second")
    with pytest.raises(DataError, match=r"set\.bin: is there already; .*--force"):
        prepare([source], tmp_path / "set", console=quiet())
    source.write_bytes(b"\xff")
    with pytest.raises(DataError, match="not UTF-8"):
        prepare([source], tmp_path / "set", force=True, console=quiet())
    assert read_prepared(tmp_path / "set") == first
    source.write_text("second")
    prepare([source], tmp_path / "set", force=True, console=quiet())
    assert BYTES.decode(documents_of(tmp_path / "set")[0][:-1]) == "second"


# --- splits and streams


def stream_of(prefix: Path, seq_length: int = 16, seed: int = 5, **config: object) -> TokenStream:
    return open_data(DataConfig(prefix=str(prefix), **config), seq_length, seed).train  # type: ignore[arg-type]


def split_of(stream: TokenStream | HeldOutStream | None, number: int = 0) -> SplitDataset:
    assert stream is not None
    dataset = stream.datasets[number]
    assert isinstance(dataset, SplitDataset)
    return dataset


def test_splits_are_disjoint_and_cover(shared: Path) -> None:
    streams = open_data(DataConfig(prefix=str(shared), split="80,15,5"), 16, 5)
    parts = [split_of(part).documents.tolist() for part in (streams.train, streams.validation, streams.test)]
    assert [len(part) for part in parts] == [32, 6, 2]
    assert parts[0] + parts[1] + parts[2] == list(range(40))
    texts = [BYTES.decode(ids[:-1]) for ids in documents_of(shared)]
    assert streams.validation is not None
    assert streams.test is not None
    for stream, part in ((streams.train, parts[0]), (streams.validation, parts[1]), (streams.test, parts[2])):
        length = len(split_of(stream))
        assert length == (sum(len(texts[n]) + 1 for n in part) - 1) // 16
        allowed = "<|endoftext|>".join(texts[n] for n in part)
        for row in stream.batch(range(length)):
            assert all(piece in allowed for piece in BYTES.decode(row.tolist()).split("<|endoftext|>"))


def test_sequences_hold_every_token_once(shared: Path) -> None:
    """One epoch is the split's documents end to end, less what does not fill the last sequence."""
    dataset = split_of(stream_of(shared, split="1,0,0"))
    rows = torch.stack([dataset[i] for i in range(len(dataset))])
    assert rows.shape == (len(dataset), 17)
    assert rows.dtype == torch.int64
    counts = torch.bincount(rows[:, :-1].flatten(), minlength=257)
    tokens = [token for document in documents_of(shared) for token in document]
    whole = torch.bincount(torch.tensor(tokens), minlength=257)
    assert (whole - counts >= 0).all()
    assert int((whole - counts).sum()) == dataset.tokens - 16 * len(dataset) <= 16


def test_epochs_are_permutations(shared: Path) -> None:
    stream = stream_of(shared)
    length = len(stream.datasets[0])
    epochs = [[stream.locate(length * epoch + i)[1] for i in range(length)] for epoch in range(4)]
    assert epochs[0] == list(range(length))
    assert all(sorted(epoch) == epochs[0] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    rows = stream.batch(range(length))
    again = stream.batch(range(length, 2 * length))
    assert torch.equal(again, rows[epochs[1]])


def test_order_depends_on_data_and_seed_only(shared: Path) -> None:
    stream = stream_of(shared)
    length = len(stream.datasets[0])
    positions = [3, 5 * length + 1, length, 0, 2 * length + 7, length - 1]
    rows = stream.batch(positions)
    resumed = stream_of(shared)  # a fresh process, reading in another order
    for position, row in sorted(zip(positions, rows), key=lambda pair: -pair[0]):
        assert torch.equal(resumed.sample(position), row)
    other = stream_of(shared, seed=6)
    assert not torch.equal(other.batch(range(20)), stream.batch(range(20)))
    assert stream_of(shared, seed=2**40 + 5).locate(length + 3) != stream.locate(length + 3)


def test_blend_keeps_its_weights_and_is_prefix_stable(tmp_path: Path, shared: Path) -> None:
    prefixes = [shared]
    for number, paragraphs in ((1, 12), (2, 20)):
        source = write_lines(tmp_path / f"{number}.jsonl", [prose(100 * number + n, paragraphs) for n in range(9)])
        prepare([source], tmp_path / str(number), console=quiet())
        prefixes.append(tmp_path / str(number))
    weights = [5.0, 3.0, 2.0]
    config = DataConfig(blend={str(prefix): weight for prefix, weight in zip(prefixes, weights)})
    streams = open_data(config, 16, 5)
    lengths = [len(dataset) for dataset in streams.train.datasets]
    seen: list[list[int]] = [[], [], []]
    for position in range(3000):
        dataset, index = streams.train.locate(position)
        seen[dataset].append(index)
        for number, weight in enumerate(weights):
            assert abs(len(seen[number]) - weight / 10 * (position + 1)) < 2
    for indices, length in zip(seen, lengths):
        assert len(indices) > length  # data sets are gone through in whole epochs, whatever the others do
        for start in range(0, len(indices) - length, length):
            assert sorted(indices[start : start + length]) == list(range(length))
    early = [streams.train.locate(position) for position in (*range(500), 16383)]
    streams.train.locate(100_000)  # grows the table of draws
    assert early == [streams.train.locate(position) for position in (*range(500), 16383)]
    resumed = open_data(config, 16, 5).train
    assert resumed.locate(70_000) == streams.train.locate(70_000)  # grown to another size
    for number, dataset in enumerate(streams.train.datasets):  # a lone data set is read as in any blend
        assert torch.equal(dataset[7], stream_of(prefixes[number]).datasets[0][7])
    held_out = streams.validation
    assert held_out is not None
    assert len(held_out) == sum(len(dataset) for dataset in held_out.datasets)
    places = [held_out.locate(position) for position in range(2 * len(held_out))]
    assert len(set(places[: len(held_out)])) == len(held_out)
    assert places[: len(held_out)] == places[len(held_out) :]
    assert len({dataset for dataset, _ in places[:8]}) > 1


def test_equal_data_sets_are_shuffled_apart() -> None:
    """Two data sets of one size meet their sequences in different orders from the second epoch on."""
    stream = TokenStream([torch.arange(60).view(30, 2)] * 2, [1.0, 1.0], 5)
    places = [stream.locate(position) for position in range(60, 180)]
    for epoch in (places[:60], places[60:]):
        first, second = ([index for dataset, index in epoch if dataset == number] for number in (0, 1))
        assert sorted(first) == sorted(second) == list(range(30))
        assert first != second


def test_weights_must_match() -> None:
    data = [torch.arange(6).view(2, 3)]
    with pytest.raises(DataError, match="as many weights above 0"):
        TokenStream(data, [1.0, 2.0], 0)
    with pytest.raises(DataError, match="at least one sequence"):
        TokenStream([torch.empty(0, 3)], [1.0], 0)
    assert TokenStream(data, [2.0], 0).batch([0, 1]).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_missing_and_damaged_sets(tmp_path: Path, shared: Path) -> None:
    with pytest.raises(DataError, match=r"none\.bin: .* make one with `peer-dist prepare FILE\.{3} --output .*none`"):
        stream_of(tmp_path / "none")
    for ending in (".bin", ".idx", ".json", ".tokenizer.json"):
        shutil.copy(f"{shared}{ending}", f"{tmp_path / 'set'}{ending}")
    os.truncate(tmp_path / "set.bin", 100)
    with pytest.raises(DataError, match=r"set\.bin: has 100 bytes where \d+ were written"):
        stream_of(tmp_path / "set")
    (tmp_path / "set.json").write_text('{"documents": 1}')
    with pytest.raises(DataError, match=r"set\.json: is not what"):
        stream_of(tmp_path / "set")
    (tmp_path / "set.idx").unlink()
    with pytest.raises(DataError, match=r"set\.idx: there is no such file"):
        stream_of(tmp_path / "set")


def test_another_tokenizer(shared: Path, bpe: Path) -> None:
    message = r"tokenizer byte \(257 tokens\), which is not data\.tokenizer .*bpe\.json \(512 tokens\)"
    with pytest.raises(DataError, match=message):
        stream_of(shared, tokenizer=str(bpe))
    stream_of(shared, tokenizer=f"{shared}.tokenizer.json")  # the same vocabulary by another name


def test_short_splits(tmp_path: Path) -> None:
    prepare([write_lines(tmp_path / "a.jsonl", ["abc", "defg", "hi"])], tmp_path / "set", console=quiet())
    config = DataConfig(prefix=str(tmp_path / "set"), split="100,0,0")
    assert len(open_data(config, 11, 1).train.datasets[0]) == 1  # 12 tokens: 9 characters and 3 ends
    with pytest.raises(DataError, match=r"has 12 tokens, too few for one sequence \(13\)"):
        open_data(config, 12, 1)
    streams = open_data(DataConfig(prefix=str(tmp_path / "set"), split="90,5,5"), 8, 1)  # rounds to 3, 0, 0
    assert streams.validation is None
    assert streams.test is None
    streams = open_data(DataConfig(prefix=str(tmp_path / "set"), split="2,1,0"), 4, 1)  # 3 tokens held out
    assert streams.validation is None
    with pytest.raises(DataError, match="has 0 tokens"):
        open_data(DataConfig(prefix=str(tmp_path / "set"), split="1,99,0"), 4, 1)


def test_replaced_data_meets_no_old_index(tmp_path: Path) -> None:
    for number, texts in enumerate((["abcdefghij"] * 30, ["klmnopqrstuvw"] * 20)):
        source = write_lines(tmp_path / "a.jsonl", texts)
        prepare([source], tmp_path / "set", force=bool(number), console=quiet())
        stream = stream_of(tmp_path / "set", seq_length=4)
        rows = stream.batch(range(len(stream.datasets[0])))
        assert set(rows.flatten().tolist()) == set(texts[0].encode()) | {256}


def test_index_is_built_once_and_complete(tmp_path: Path, shared: Path) -> None:
    config = DataConfig(prefix=str(shared))
    cache = tmp_path / "cache"
    first = open_data(config, 16, 5, cache).train.batch(range(9))
    (folder,) = cache.iterdir()  # and no partial one
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert torch.equal(open_data(config, 16, 5, cache).train.batch(range(9)), first)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == times
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file.*: Megatron's index cannot be written there"):
        open_data(config, 16, 5, tmp_path / "file")


def rank_reads(rank: int, world_size: int, prefix: str, caches: list[str]) -> tuple[list[list[int]], str]:
    config = DataConfig(prefix=prefix)
    streams = [open_data(config, 16, 5, cache) for cache in (caches[0], caches[rank])]
    rows = [stream.train.batch(range(rank, 40, world_size)) for stream in streams]
    assert torch.equal(rows[0], rows[1])
    try:
        open_data(config, 16, 5, Path(prefix + ".bin"))  # a file, where rank 0 cannot make a folder
    except DataError as error:
        return rows[0].tolist(), str(error)
    return rows[0].tolist(), ""


def test_process_group(shared: Path, tmp_path: Path) -> None:
    """Ranks share one index, or have their own where rank 0's is out of sight; both fail when rank 0 does."""
    caches = [str(tmp_path / "shared"), str(tmp_path / "other")]
    results: list[tuple[list[list[int]], str]] = run_ranks(rank_reads, 2, str(shared), caches)
    alone = stream_of(shared).batch(range(40)).tolist()
    for rank, (rows, message) in enumerate(results):
        assert rows == alone[rank::2]
        assert "Megatron's index cannot be written there" in message
    assert all(len(os.listdir(cache)) == 1 for cache in caches)


def test_summary_is_plain_json(shared: Path) -> None:
    summary = read_prepared(shared)
    tree = json.loads(Path(f"{shared}.json").read_text())
    assert PreparedSet(**tree) == summary
    assert tree["sizes"][".bin"] == 2 * summary.tokens
