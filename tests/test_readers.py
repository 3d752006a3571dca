"""Every reader of what people give, with damaged files: a sentence or a value, never a traceback and never a hang.

``python -m tests.test_readers --seconds 3600`` tries for an hour, and shows how many inputs it tried.
"""

import argparse
import importlib
import json
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from tests.checkpoints import seal
from tests.damage import Reader, table, watch
from tests.ranks import run_ranks
from tests.runs import small_config, with_keys

MODELS = {}  # by their checkpoint
SECONDS = 24  # of all readers together, in the default tests


def read_config(folder):
    from peer_dist.config import load_config

    return load_config(folder / "run.yaml")


def read_override(folder):
    """Each line as an argument of the command line, as the operating system hands it over."""
    import os

    from peer_dist.config import load_config

    data = (folder / "overrides.txt").read_bytes().replace(b"\0", b"")
    return load_config(folder / "run.yaml", [os.fsdecode(line) for line in data.splitlines()])


def read_sweep(folder):
    from peer_dist.sweep.spec import load_sweep

    return load_sweep(folder / "sweep.yaml", folder / "out")


def read_hardware(folder):
    from peer_dist.planning.hardware import load_hardware

    return load_hardware(str(folder / "device.yaml"))


def read_data(folder):
    """As a run opens its data, and some of what it reads."""
    from peer_dist.config.schema import DataConfig
    from peer_dist.data.stream import check_data, open_data

    config = DataConfig(prefix=str(folder / "text"))
    check_data(config, 32, 5)
    streams = open_data(config, 32, 5)
    streams.train.batch(range(4))
    streams.validation.batch(range(2))


def read_tokenizer(folder):
    from peer_dist.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(folder / "bpe.json"))
    tokenizer.decode(tokenizer.encode("To be, or not to be: that is the question"))


def read_documents_of(folder):
    from peer_dist.data.documents import read_documents

    for path in sorted(folder.iterdir()):
        for _ in read_documents(path):
            pass


def read_checkpoint(folder):
    """Its manifest, its files, its tensors, into a model that was made of it when it was sound."""
    from peer_dist.checkpoints.manifest import read_manifest
    from peer_dist.checkpoints.state import restore_weights
    from peer_dist.checkpoints.store import find_checkpoint, verify_checkpoint
    from peer_dist.data.tokenizer import load_tokenizer
    from peer_dist.evaluation.loading import load_model

    checkpoint = str(folder / "checkpoints")
    if checkpoint not in MODELS:
        MODELS[checkpoint] = load_model(checkpoint, 1)
    path = find_checkpoint(checkpoint)
    verify_checkpoint(path)
    read_manifest(path)
    load_tokenizer(str(path / "tokenizer.json"))
    restore_weights(path, MODELS[checkpoint].model, MODELS[checkpoint].parallel)


def read_manifest_of(folder):
    from peer_dist.checkpoints.manifest import read_manifest
    from peer_dist.checkpoints.store import find_checkpoint
    from peer_dist.config import parse_config

    path = find_checkpoint(folder / "checkpoints")
    manifest = read_manifest(path)
    parse_config(manifest["config"], str(path))


def resume_logs(folder):
    """As a resumed run opens its logs, and as what shows them reads them."""
    from peer_dist.measures.metrics import Metrics
    from peer_dist.measures.record import read_run

    metrics = Metrics(folder / "logs", 4)
    metrics.write(5, {"train/loss": 1.0})
    metrics.event("checkpoint", 4, seconds=0.1)
    metrics.close()
    read_run(folder)


def show_run(folder):
    from peer_dist.plots.command import plot
    from peer_dist.report.page import write_report

    write_report([folder], folder / "report.html")
    plot([folder], folder / "plots", ["loss"], "parameters")


def plot_usage(folder):
    from peer_dist.plots.command import plot

    plot([folder / "usage.npz"], folder / "plots", ["usage"], "parameters")


def read_table(folder):
    from peer_dist.sweep.results import read_results

    read_results(folder / "results.csv")


def read_lock(folder):
    from peer_dist.ranks.lock import RunLock

    with RunLock(folder / "checkpoints"):
        pass


def read_llama(folder):
    from peer_dist.checkpoints.sources.llama import LlamaFolder

    model = LlamaFolder(folder / "llama")
    model.block("embedding.word_embeddings.weight", (slice(0, 4), slice(None)))


def read_export(folder):
    """By its own code, which has no other of this package."""
    if "an_export" not in sys.modules:
        package = sys.modules["an_export"] = ModuleType("an_export")
        package.__path__ = [str(folder / "model")]
    importlib.import_module("an_export.peer_model").LanguageModel.load(folder / "model")


def read_evaluation_sets(folder):
    from peer_dist.evaluation.evaluation_sets import parse_sets

    for spec in ("pile=pile.jsonl.zst", "curation_corpus=articles.csv", "lambada=lambada.jsonl", "text=some.txt"):
        name, _, file = spec.partition("=")
        for evaluation_set in parse_sets([f"{name}={folder / file}"]):
            for _ in evaluation_set.documents():
                pass


def seal_checkpoint(folder):
    for path in (folder / "checkpoints").glob("step-*"):
        seal(path)


def seal_manifest(folder):
    """The checksum of whatever the manifest now holds."""
    import zlib

    for path in (folder / "checkpoints").glob("step-*/manifest.json"):
        try:
            tree = json.loads(path.read_text())
            tree.pop("checksum", None)
            checksum = zlib.crc32(json.dumps(tree, sort_keys=True).encode())
            path.write_text(json.dumps({**tree, "checksum": checksum}))
        except (ValueError, AttributeError, RecursionError, TypeError):
            pass


TENSORS = tuple(f"checkpoints/step-*/{name}" for name in ("*.distcp", ".metadata", "*.pt", "*a.json", "tokenizer.json"))
READERS = [
    Reader("config", ("run.yaml",), read_config, text=True),
    Reader("overrides", ("overrides.txt",), read_override, text=True),
    Reader("sweep", ("sweep.yaml",), read_sweep, text=True),
    Reader("device", ("device.yaml",), read_hardware, text=True),
    Reader("data", ("text.bin", "text.idx"), read_data, guarded=True),
    Reader("data description", ("text.json",), read_data, text=True),
    Reader("data tokenizer", ("text.tokenizer.json",), read_data, text=True),
    Reader("data index", ("text.cache/*/*",), read_data),
    Reader("tokenizer", ("bpe.json",), read_tokenizer, text=True),
    Reader("texts", ("*",), read_documents_of, text=True),
    Reader("evaluation sets", ("*",), read_evaluation_sets, text=True),
    Reader("checkpoint", TENSORS, read_checkpoint, seal_checkpoint, guarded=True),
    Reader("manifest", ("checkpoints/step-*/manifest.json",), read_manifest_of, seal_manifest, text=True),
    Reader("metrics and events", ("logs/*.jsonl",), resume_logs, text=True),
    Reader("run", ("plan.json", "logs/*.jsonl", "logs/images/*", "checkpoints/*/manifest.json"), show_run, text=True),
    Reader("usage", ("usage.npz",), plot_usage),
    Reader("results", ("results.csv",), read_table, text=True),
    Reader("lock", ("checkpoints/run.lock",), read_lock, text=True),
    Reader("Llama", ("llama/*",), read_llama, text=True),
    Reader("export", ("model/*.json", "model/*.safetensors"), read_export, text=True, refusals=(ValueError,)),
]


def make_samples(rank, world_size, root):
    """Sound files for every reader; each has a folder of its own, or one like another's."""
    import gzip

    import numpy as np
    import zstandard

    from peer_dist.config import parse_config
    from peer_dist.data.prepare import prepare
    from peer_dist.data.tokenizer import train_bpe
    from peer_dist.export.folder import export
    from peer_dist.planning.hardware import load_hardware
    from peer_dist.ranks.lock import Holder
    from peer_dist.ranks.signals import StopRequest
    from peer_dist.sweep.results import write_results
    from peer_dist.training import Trainer
    from tests.results import result_rows
    from tests.test_sources import write_llama

    samples = {reader.name: root / reader.name.replace(" ", "-") for reader in READERS}
    for folder in samples.values():
        folder.mkdir()
    words = "\n\n".join(f"In the year {n}, {n * n} sheep crossed the river and {n % 7} came back." for n in range(400))
    (root / "words.txt").write_text(words)

    run = samples["run"]
    prepare([root / "words.txt"], root / "text", max_document=300)
    tree = with_keys(
        small_config(root / "text", run),
        train={"steps": 4, "global_batch_size": 2},
        evaluation={"interval": 2},
        checkpoint={"interval": 4, "keep": 1},
        logging={"interval": 2},
    )
    with StopRequest() as stop:
        trainer = Trainer(parse_config(tree, "test"))
        trainer.run(stop)
    trainer.parallel.destroy()
    (run / "plan.json").write_text(json.dumps({"tokens_per_second": 1e4, "fits": True}))
    for name in ("checkpoint", "manifest", "metrics and events"):
        shutil.copytree(run, samples[name], dirs_exist_ok=True)
    export(str(run / "checkpoints"), samples["export"] / "model")

    for name in ("config", "overrides"):
        (samples[name] / "run.yaml").write_text(yaml.safe_dump(tree))
    (samples["overrides"] / "overrides.txt").write_text(
        "model.num_layers=3\noptimizer.betas=[0.9, 0.95]\ndata.split=8,1,1\n"
    )
    base = with_keys({key: tree[key] for key in ("model", "peer", "data", "train")}, train={"global_batch_size": 2})
    sweep = {"base": base, "budgets": [1e9, 2e9], "models": {"a": {}, "b": {"model.mlp": "dense"}}, "seeds": [1, 2]}
    (samples["sweep"] / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    load_hardware("h100").dump(samples["device"] / "device.yaml")

    for name in ("data", "data description", "data tokenizer", "data index"):
        prepare([root / "words.txt"], samples[name] / "text", max_document=300)
        read_data(samples[name])
    train_bpe([root / "words.txt"], 300, samples["tokenizer"] / "bpe.json")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in words.split("\n\n")[:20])
    (samples["texts"] / "some.txt").write_text(words[:2000])
    (samples["texts"] / "lines.jsonl").write_text(lines)
    (samples["texts"] / "lines.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    sets = samples["evaluation sets"]
    (sets / "some.txt").write_text(words[:2000])
    (sets / "lambada.jsonl").write_text(lines)
    (sets / "pile.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    rows = [
        "title,article_content,summary",
        *(f'a{n},"Some text, {n}\n\nmore of it","A summary {n}"' for n in range(5)),
    ]
    (sets / "articles.csv").write_text("\n".join(["title,article_content,summary", *rows]) + "\n")

    mass = np.random.default_rng(0).random(225)
    np.savez(samples["usage"] / "usage.npz", mass_layer1=mass, mass_layer3=mass)
    write_results(samples["results"] / "results.csv", result_rows())
    (samples["lock"] / "checkpoints").mkdir()
    gone = replace(Holder.current(), pid=2**22 + 1)  # beyond any that Linux gives
    (samples["lock"] / "checkpoints/run.lock").write_text(json.dumps(asdict(gone)))
    write_llama(samples["Llama"] / "llama")
    return samples


def try_all(rank, world_size, root, seconds, seed, keep, only):
    samples = make_samples(rank, world_size, root)
    readers = [reader for reader in READERS if reader.name in only]
    return watch(readers, samples, seconds, seed, keep)


@pytest.mark.parametrize("part", range(3))
def test_no_input_makes_a_traceback(tmp_path, part):
    names = [reader.name for reader in READERS][part::3]
    (tallies,) = run_ranks(try_all, 1, tmp_path, SECONDS / 3, int(time.time()), None, names, timeout=200)
    print(table(tallies))
    faults = [f"{name}: {fault}" for name, tally in tallies.items() for fault in tally.faults.values()]
    assert not faults, "\n\n".join(faults)
    told = {name for name, tally in tallies.items() if tally.refused}
    assert told >= set(names) - {"metrics and events", "run"}, table(tallies)  # what these cannot read they leave out


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seconds", type=float, default=60, help="of all readers together")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--keep", type=Path, help="folder for the inputs that brought faults to light")
    options.add_argument("--only", action="append", help="a reader's name; repeatable")
    chosen = options.parse_args()
    names = chosen.only or [reader.name for reader in READERS]
    with tempfile.TemporaryDirectory() as folder:
        arguments = (Path(folder), chosen.seconds, chosen.seed, chosen.keep, names)
        (tallies,) = run_ranks(try_all, 1, *arguments, timeout=chosen.seconds + 600)
    print(table(tallies))
    for name, tally in tallies.items():
        for fault in tally.faults.values():
            print(f"\n== {name}: {fault}")
    return bool(any(tally.faults for tally in tallies.values()))


if __name__ == "__main__":
    sys.exit(main())
