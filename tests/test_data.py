"""Data: text files into prepared sets, and prepared sets into streams of sequences. Real files throughout."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import resource
import shutil
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from peer_dist.checkpoints.resuming import check_resumable, data_identity
from peer_dist.config import parse_config
from peer_dist.config.schema import DataConfig
from peer_dist.data import files as data_files
from peer_dist.data import stream as data_stream
from peer_dist.data import tokenizer as tokenizer_module
from peer_dist.data.documents import DataError, cut, read_documents
from peer_dist.data.prepare import PreparedSet, prepare, read_prepared
from peer_dist.data.stream import HeldOutStream, TokenStream, check_data, open_data
from peer_dist.data.tokenizer import file_digest, load_tokenizer, train_bpe
from peer_dist.machine import private_folder
from peer_dist.megatron import CheckpointError
from peer_dist.megatron.indexed_data import SplitDataset, TokenError
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
    assert not (tmp_path / "out").exists()
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


# --- damage


ENDINGS = (".bin", ".idx", ".tokenizer.json", ".json")


def copied(shared: Path, folder: Path, older: bool = False) -> Path:
    """A copy of a set; or as earlier versions wrote it, without digests."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for ending in ENDINGS:
        shutil.copyfile(f"{shared}{ending}", f"{folder / 'set'}{ending}")
    if older:
        change_json(folder / "set.json", digests=None)
    return folder / "set"


def change_json(path: Path, **keys: Any) -> None:
    tree = json.loads(path.read_text())
    tree.update(keys)
    path.write_text(json.dumps({key: value for key, value in tree.items() if value is not None}))


def refusal(prefix: Path, seq_length: int = 16) -> str:
    """The sentence by which both refuse the data; empty if both take them."""
    messages = []
    for read in (check_data, open_data):
        try:
            read(DataConfig(prefix=str(prefix)), seq_length, 5)
            messages.append("")
        except DataError as error:
            messages.append(str(error))
    assert messages[0] == messages[1]
    assert "\n" not in messages[0]
    return messages[0]


def damages(content: bytes, other: bytes, flips: int = 40) -> Iterator[bytes]:
    """Flipped, cut, grown, emptied, zeroed, and what another file holds."""
    step = max(1, len(content) // flips)
    for at in range(0, len(content), step):
        yield content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :]
    for size in (0, 1, 33, 34, len(content) // 2, len(content) - 1):
        yield content[:size]
    yield content + b"\0"
    yield bytes(len(content))
    yield other


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("ending", ENDINGS)
def test_no_damage_is_taken_for_data(tmp_path: Path, bpe: Path, shared: Path, ending: str, older: bool) -> None:
    """Whatever is done to a file is refused in a sentence that names it, or changes nothing that is read."""
    prepare([f"{shared.parent / 'in.jsonl'}"], tmp_path / "other", tokenizer=str(bpe), console=quiet())
    prefix = copied(shared, tmp_path / "copy", older)
    assert refusal(prefix) == ""
    rows = stream_of(prefix).batch(range(20))
    path = Path(f"{prefix}{ending}")
    content = path.read_bytes()
    for damaged in damages(content, Path(f"{tmp_path / 'other'}{ending}").read_bytes()):
        path.write_bytes(damaged)
        message = refusal(prefix)
        if message:
            assert message.startswith(str(prefix)), message
        else:
            assert ending == ".json" or (older and ending == ".tokenizer.json"), damaged[:60]
            assert torch.equal(stream_of(prefix).batch(range(20)), rows)
    path.write_bytes(content)
    assert refusal(prefix) == ""


def header(**changes: int | bytes) -> bytes:
    fields = {"magic": b"MMIDIDX\0\0", "version": 1, "code": 8, "documents": 40, "ends": 41} | changes
    return struct.pack("<9sQBQQ", *fields.values())


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (header(magic=b"MMIDIDX\0\1"), "its header is not that of an index"),
        (header(version=2), "its header is not that of an index"),
        (header(code=7), "its header is not that of an index"),
        (header(code=200), "its header is not that of an index"),
        (header(documents=2**63), f"tells of {2**63} sequences and 40 documents where 40"),
        (header(ends=2**64 - 1), "tells of 40 sequences and 18446744073709551614 documents where 40"),
        (header(code=4), r"document 1 does not begin where the one before it ends"),
    ],
)
def test_index_headers(tmp_path: Path, shared: Path, head: bytes, message: str) -> None:
    prefix = copied(shared, tmp_path / "copy")
    content = (tmp_path / "copy" / "set.idx").read_bytes()
    (tmp_path / "copy" / "set.idx").write_bytes(head + content[len(head) :])
    begin = time.perf_counter()
    assert message in refusal(prefix)
    assert time.perf_counter() - begin < 1


def test_lengths_that_lie(tmp_path: Path, shared: Path) -> None:
    """Negative, swapped, or with pointers that agree and lead beyond the file."""
    path = tmp_path / "copy" / "set.idx"
    for older in (False, True):
        prefix = copied(shared, tmp_path / "copy", older)
        content = bytearray(path.read_bytes())
        lengths = np.frombuffer(content, "<i4", 40, 34)
        pointers = np.frombuffer(content, "<i8", 40, 34 + 160)
        kept = lengths.copy(), pointers.copy()
        lengths[3] = -lengths[3]
        path.write_bytes(content)
        assert f"set.idx: is damaged: document 3 has a length of {lengths[3]} tokens" in refusal(prefix)
        lengths[3], lengths[4] = kept[0][4], kept[0][3]
        path.write_bytes(content)
        assert "set.idx: is damaged: document 4 does not begin" in refusal(prefix)
        pointers[4] = pointers[3] + 2 * lengths[3]
        path.write_bytes(content)  # sound in itself
        assert bool(refusal(prefix)) is not older
        lengths[:], pointers[:] = kept
        lengths[39] += 1
        path.write_bytes(content)
        assert "set.idx: is damaged: its documents have" in refusal(prefix)


def test_large_files_are_sampled(tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the blocks that are read a change is not noticed, but what is no token never reaches the model."""
    monkeypatch.setattr(data_files, "_BLOCK", 64)
    monkeypatch.setattr(data_files, "_BLOCKS", 4)
    prefix = copied(shared, tmp_path / "copy", older=True)
    content = bytearray(Path(f"{prefix}.bin").read_bytes())
    begins = data_files._blocks(len(content), 2)
    assert (len(begins), begins[0], begins[-1]) == (4, 0, len(content) - 64)
    for begin in begins:
        bad = content.copy()
        bad[begin + 2 : begin + 4] = struct.pack("<H", 257)
        Path(f"{prefix}.bin").write_bytes(bad)
        assert f"set.bin: is damaged: token {begin // 2 + 1} is 257, and the vocabulary has 257 ids" in refusal(prefix)
    content[100:102] = struct.pack("<H", 9999)
    Path(f"{prefix}.bin").write_bytes(content)
    assert refusal(prefix) == ""
    stream = open_data(DataConfig(prefix=str(prefix), split="1,0,0"), 16, 5).train
    with pytest.raises(TokenError, match=r"set\.bin: is damaged: a sequence holds the token 9999, and the vocabulary"):
        stream.batch(range(len(stream.datasets[0])))


@pytest.mark.parametrize("value", [None, [], "text", 5, True])
def test_descriptions_of_another_kind(tmp_path: Path, shared: Path, value: object) -> None:
    prefix = copied(shared, tmp_path / "copy")
    path = Path(f"{prefix}.json")
    good = json.loads(path.read_text())
    path.write_text(json.dumps(value))
    assert "set.json: must hold a JSON object" in refusal(prefix)
    path.write_text("[" * 5000)
    assert "set.json: is nested too deeply" in refusal(prefix)
    for key in good:
        if type(value) is not type(good[key]) and (key, value) != ("digests", None):
            path.write_text(json.dumps(good | {key: value}))
            assert f"set.json: is not what `peer-dist prepare` writes ({key}" in refusal(prefix)
        path.write_text(json.dumps({name: part for name, part in good.items() if name != key}))
        assert key == "digests" or "set.json: is not what `peer-dist prepare` writes" in refusal(prefix)
    for changes in ({"documents": -1}, {"tokens": 2**70}, {"sizes": {".bin": 1}}, {"more": 1}, {"vocab_size": 10**9}):
        path.write_text(json.dumps(good | changes))
        assert "set.json: is not what `peer-dist prepare` writes" in refusal(prefix)


class Evil:
    """What runs when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_nothing_in_the_index_runs(tmp_path: Path, shared: Path) -> None:
    """Damage of any kind, and pickles, in each file of Megatron's index: a sentence that names the folder."""
    prefix = copied(shared, tmp_path / "copy")
    rows = stream_of(prefix).batch(range(20))
    (folder,) = Path(f"{prefix}.cache").iterdir()
    ran = tmp_path / "ran"
    array = io.BytesIO()
    np.save(array, np.array([Evil(ran)], dtype=object), allow_pickle=True)
    paths = sorted(folder.glob("*.npy"))
    assert len(paths) == 9
    for path in paths:
        content = path.read_bytes()
        other = paths[paths.index(path) - 3].read_bytes()
        for damaged in (pickle.dumps(Evil(ran)), array.getvalue(), *damages(content, other, 3)):
            path.write_bytes(damaged)
            message = refusal(prefix)
            assert message.startswith(f"{folder}: is not Megatron's index") or damaged == content, message
            assert message.endswith("; delete this folder") or damaged == content
        path.unlink()
        assert "delete this folder" in refusal(prefix)  # and it is not built anew in place
        os.mkfifo(path)
        assert "delete this folder" in refusal(prefix)
        path.unlink()
        path.write_bytes(content)
    assert not ran.exists()
    assert torch.equal(stream_of(prefix).batch(range(20)), rows)


def test_private_folders(tmp_path: Path) -> None:
    assert private_folder(tmp_path / "new" / "one").stat().st_mode & 0o777 == 0o700
    folder = tmp_path / "new" / "one"
    folder.chmod(0o755)  # as earlier versions made it
    assert private_folder(folder).stat().st_mode & 0o777 == 0o700
    for mode in (0o770, 0o707, 0o1777, 0o720):
        folder.chmod(mode)
        with pytest.raises(OSError, match="others can write to"):
            private_folder(folder)
    folder.chmod(0o700)
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(OSError, match="is a link"):
        private_folder(tmp_path / "link")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="is no folder"):
        private_folder(tmp_path / "file")
    if os.geteuid() == 0:
        os.chown(folder, 12345, 12345)
        with pytest.raises(OSError, match="belongs to another user"):
            private_folder(folder)


def test_index_of_data_that_lie_where_one_cannot_write(
    tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = copied(shared, tmp_path / "copy")
    monkeypatch.setattr(data_stream.os, "access", lambda path, mode: False)  # root may write anywhere
    monkeypatch.setattr(data_stream.tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / f"peer_dist-{os.getuid()}"
    check_data(DataConfig(prefix=str(prefix)), 16, 5)
    assert not folder.exists()
    rows = stream_of(prefix).batch(range(20))
    assert folder.stat().st_mode & 0o777 == 0o700
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", folder.name]
    folder.rename(tmp_path / "theirs")
    folder.symlink_to(tmp_path / "theirs")
    assert "is a link); remove it, or set TMPDIR to a folder of your own" in refusal(prefix)
    folder.unlink()
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    assert "others can write to" in refusal(prefix)
    assert list(folder.iterdir()) == []
    folder.rmdir()
    assert torch.equal(stream_of(prefix).batch(range(20)), rows)


def test_data_identity(tmp_path: Path, shared: Path, bpe: Path) -> None:
    """A run goes on with the same data only: the files, not what is said of them. Older manifests say less."""
    prefix = copied(shared, tmp_path / "copy", older=True)
    config = parse_config({"data": {"prefix": str(prefix)}}, "test")
    identity = data_identity(config)
    assert data_identity(parse_config({"data": {"prefix": str(shared)}}, "test")) == identity

    def resume(saved: object, now: list[list[Any]]) -> None:
        check_resumable(tmp_path, config, now, {"config": config.model_dump(mode="json"), "data": saved})

    resume(json.loads(json.dumps(identity)), identity)
    resume([entry[:2] for entry in identity], identity)
    path = Path(f"{prefix}.tokenizer.json")
    tree = json.loads(path.read_text())
    path.write_text(json.dumps(tree | {"truncation": None, "version": "9"}))
    assert data_identity(config) == identity
    path.write_text(json.dumps(tree | {"normalizer": {"type": "Lowercase"}}))
    changed = data_identity(config)
    bad: list[object] = [changed, [["0" * 64, *identity[0][1:]]], [[identity[0][0], 2.0]], [], None, [None], [[]]]
    for saved in bad:
        with pytest.raises(CheckpointError, match=r"was made from other data than .* or another tokenizer"):
            resume(saved, identity)


def test_a_tokenizer_is_parsed_once(tmp_path: Path, bpe: Path) -> None:
    """A large one takes seconds, and a start asks for it again and again: beside each data set, and to compare."""
    source = tmp_path / "a.txt"
    source.write_text(prose(1, 100))
    for name in ("one", "two"):
        prepare([source], tmp_path / name, tokenizer=str(bpe), console=quiet())
    tokenizer_module._loaded.cache_clear()
    config = DataConfig(blend={str(tmp_path / "one"): 1.0, str(tmp_path / "two"): 2.0}, split="1,0,0")
    checked, opened = check_data(config, 16, 5).tokenizer, open_data(config, 16, 5).tokenizer
    assert tokenizer_module._loaded.cache_info().misses == 1
    assert checked.name == opened.name == str(tmp_path / "one.tokenizer.json")
    assert load_tokenizer(str(tmp_path / "two.tokenizer.json")).name == str(tmp_path / "two.tokenizer.json")
    assert checked.works_as(opened)
    assert not checked.works_as(load_tokenizer("byte"))


def test_tokenizers_by_their_content(tmp_path: Path, bpe: Path) -> None:
    """The same vocabulary with other merges is another tokenizer; another layout of the file is not."""
    source = tmp_path / "a.txt"
    source.write_text(prose(1, 100))
    prepare([source], tmp_path / "set", tokenizer=str(bpe), console=quiet())
    tree = json.loads(bpe.read_text())
    merges = tree["model"]["merges"]
    other = tmp_path / "other.json"
    other.write_text(json.dumps(tree | {"model": tree["model"] | {"merges": [" ".join(pair) for pair in merges]}}))
    assert file_digest(other) == file_digest(bpe)
    open_data(DataConfig(prefix=str(tmp_path / "set"), tokenizer=str(other), split="1,0,0"), 16, 5)
    merges[0], merges[1] = merges[1], merges[0]
    other.write_text(json.dumps(tree))
    assert load_tokenizer(str(other)).digest == load_tokenizer(str(bpe)).digest
    assert file_digest(other) != file_digest(bpe)
    with pytest.raises(DataError, match="the same tokens, but another way of dividing texts"):
        check_data(DataConfig(prefix=str(tmp_path / "set"), tokenizer=str(other), split="1,0,0"), 16, 5)
    shutil.copyfile(other, tmp_path / "set.tokenizer.json")
    with pytest.raises(DataError, match=r"set\.tokenizer\.json: does not hold what was written"):
        read_prepared(tmp_path / "set")


def tokenizer_file(path: Path, model: dict[str, Any], **parts: Any) -> str:
    end = {"id": 0, "content": "<|endoftext|>", "special": True}
    end |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    path.write_text(json.dumps({"added_tokens": [end], "model": model} | parts))
    return str(path)


END = {"<|endoftext|>": 0}
BPE = {"type": "BPE", "vocab": END, "merges": []}
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        ({"type": "BPE", "vocab": END | {"a": 10**9}, "merges": []}, {}),
        ({"type": "BPE", "vocab": END | {"a": -1}, "merges": []}, {}),
        ({"type": "BPE", "vocab": END | {"a": 1}, "merges": [["a", "z"]]}, {}),
        ({"type": "BPE", "vocab": END | {"a": 1}, "merges": 5}, {}),
        (  # ends the process, with a text that is no UTF-8
            {"type": "BPE", "vocab": END | {"a": 1, "\u65e5": 2}, "merges": [["a", "\u65e5"]]}
            | {"continuing_subword_prefix": "##"},
            {},
        ),
        ({"type": "Unigram", "vocab": [], "unk_id": 0}, {}),
        ({"type": "Unknown", "vocab": END}, {}),
        ({"vocab": 5}, {}),
        (BPE, {"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}}),
        (BPE, {"pre_tokenizer": {"type": "FixedLength", "length": 0}}),
        (BPE, {"pre_tokenizer": SPLIT | {"pattern": {"Regex": "(("}}}),
    ],
)
def test_broken_tokenizers(
    tmp_path: Path, model: dict[str, Any], parts: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    name = tokenizer_file(tmp_path / "t.json", model, **parts)
    with pytest.raises(DataError, match=r"t\.json: ") as error:
        load_tokenizer(name)
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""  # where the library says that it panicked


def test_padding_and_truncation_are_left_out(tmp_path: Path) -> None:
    """However many tokens a file asks for."""
    padding = {"strategy": {"Fixed": 2**40}, "direction": "Right", "pad_to_multiple_of": 2**32, "pad_token": "x"}
    truncation = {"max_length": 1, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    parts = {"padding": padding | {"pad_id": 0, "pad_type_id": 0}, "truncation": truncation}
    model = {"type": "BPE", "vocab": END | {"a": 1, "b": 2}, "merges": []}
    assert load_tokenizer(tokenizer_file(tmp_path / "t.json", model, **parts)).encode("aba") == [1, 2, 1]


def test_tokenizers_without_a_token_for_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text")
    unknown = {"type": "WordLevel", "vocab": END | {"some": 1}, "unk_token": "[UNK]"}
    for model, message in ((unknown, r"Missing \[UNK\] token"), (BPE, "has no token for any of the text")):
        name = tokenizer_file(tmp_path / "t.json", model, pre_tokenizer={"type": "Whitespace"})
        with pytest.raises(DataError, match=message):
            prepare([tmp_path / "a.txt"], tmp_path / "x", tokenizer=name, console=quiet())
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "t.json"]


def test_odd_files_to_prepare(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    (tmp_path / "null.txt").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "lines.txt").write_text("\n\n \n")
    (tmp_path / "folder.bin").mkdir()
    before = sorted(os.listdir(tmp_path))
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("loop.txt", {}, r"loop\.txt: (cannot be read|there is no such file)"),
        ("null.txt", {}, r"null\.txt: is a pipe or a device"),
        ("pipe.txt", {}, r"pipe\.txt: is a pipe or a device"),
        ("n" * 300 + ".txt", {}, r"n\.txt: cannot be read \(File name too long\)"),
        ("a\0.txt", {}, r"\.txt: .*null"),
        ("good.txt/a.txt", {}, r"a\.txt: there is no such file"),
        ("lines.txt", {}, r"no text in .*lines\.txt; there is nothing to prepare"),
        ("lines.txt", {"train_bpe": 300}, r"no text in .*lines\.txt; there is nothing to prepare"),
        ("good.txt", {"train_bpe": 10**18}, "at most 4,194,304 tokens"),
        ("good.txt", {"tokenizer": "t" * 300}, "there is no such tokenizer file"),
        ("good.txt", {"output": tmp_path / ("n" * 250)}, r"n: cannot be written \(File name too long\)"),
        ("good.txt", {"output": tmp_path / "a\0"}, "cannot be written .*null"),
        ("good.txt", {"output": tmp_path / "folder", "force": True}, r"folder\.bin: is a folder"),
    ]
    for name, options, message in cases:
        with pytest.raises(DataError, match=message) as error:
            prepare([tmp_path / name], **{"output": tmp_path / "out", "console": quiet()} | options)
        assert "\n" not in str(error.value)
        assert sorted(os.listdir(tmp_path)) == before


def test_a_full_disk(tmp_path: Path) -> None:
    """At any size at which the disk may end, a sentence, and nothing is left."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    (tmp_path / "a.txt").write_text(prose(1, 200))
    try:
        for size in (0, 100, 1000, 2000, 10_000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
            with pytest.raises(DataError, match=r"out: cannot be written \(File too large\)"):
                prepare([tmp_path / "a.txt"], tmp_path / "out", console=quiet())
            assert os.listdir(tmp_path) == ["a.txt"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# --- what is known before a run joins


def test_check_data_makes_nothing(tmp_path: Path, shared: Path) -> None:
    prefix = copied(shared, tmp_path / "copy")
    before = sorted(os.listdir(tmp_path / "copy"))
    checked = check_data(DataConfig(prefix=str(prefix), split="90,5,5"), 16, 5)
    assert (checked.tokenizer.eod, checked.remarks) == (256, [])
    tokens = read_prepared(prefix).tokens
    with pytest.raises(DataError, match=rf"has {tokens} tokens, too few for one sequence \({tokens + 1}\)"):
        check_data(DataConfig(prefix=str(prefix), split="1,0,0"), tokens, 5)
    check_data(DataConfig(prefix=str(prefix), split="1,0,0"), tokens - 1, 5)
    (remark,) = check_data(DataConfig(prefix=str(prefix), split="99.9,0.1,0"), 16, 5).remarks
    assert "the validation split has 0 documents and 0 tokens, too few for one sequence (17)" in remark
    assert check_data(DataConfig(prefix=str(prefix), split="1,0,0"), 16, 5).remarks == []
    with pytest.raises(DataError, match=r"set\.bin: Megatron's index cannot be written there \(it is no folder\)"):
        check_data(DataConfig(prefix=str(prefix)), 16, 5, f"{prefix}.bin")
    assert sorted(os.listdir(tmp_path / "copy")) == before


@pytest.mark.parametrize("split", ["90,5,5", "1,1e-3,0", "70,20,10", "0.5,0.25,0.25", "1,0,2"])
@pytest.mark.parametrize("seq_length", [7, 64, 500])
def test_check_data_counts_as_megatron_does(shared: Path, tmp_path: Path, split: str, seq_length: int) -> None:
    """Both refuse the same, and tell the same of the validation split."""
    config = DataConfig(prefix=str(shared), split=split)
    checked = check_data(config, seq_length, 5, tmp_path)
    streams = open_data(config, seq_length, 5, tmp_path)
    assert (streams.validation is None) == bool(checked.remarks or float(split.split(",")[1]) == 0)
    check_data(config, seq_length, 5, tmp_path)
