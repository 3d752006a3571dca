"""A larger real text from what is installed here: the sources and documentation of Python and its packages.

    python benchmarks/corpus.py --output data/corpus.jsonl --megabytes 40
    peer-dist prepare data/corpus.jsonl --output data/corpus --train-bpe 1024

One document per file. Equal files are taken once. Held-out files (1 in 20, by a hash of their name) come last; those
whose longer lines are known from training files for more than a fifth are left out. What is installed differs between
machines, so files are left off until the shares are those of SPLIT: data.split of any config that uses the corpus.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sysconfig
from pathlib import Path

SUFFIXES = {".py", ".pyi", ".rst", ".md", ".txt"}
LONG = 24  # characters; shorter lines are alike in all programs
KNOWN = 0.2  # share of a held-out file's long lines
SPLIT = (96, 1, 3)  # training, validation, test: few for validation, which a sweep does after every short run


def number(text: str) -> int:
    """The same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def long_lines(text: str) -> set[int]:
    """The numbers of a text's longer lines."""
    return {number(line) for line in map(str.strip, text.splitlines()) if len(line) >= LONG}


def read(path: Path) -> str | None:
    """A file that a person wrote, as far as one can tell."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    lines = text.splitlines()
    fine = 500 <= len(text) <= 200_000 and max(map(len, lines), default=0) <= 400
    return text if fine else None


def gather(megabytes: float, seed: int) -> tuple[list[str], list[str], list[str]]:
    """Texts for training, validation and test."""
    roots = sorted({Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")})
    paths = {str(path.relative_to(root)): path for root in roots for path in root.rglob("*") if path.suffix in SUFFIXES}
    names = sorted(paths)
    random.Random(seed).shuffle(names)
    training: list[str] = []
    held_out: list[str] = []
    seen: set[int] = set()
    size = 0
    for name in names:
        text = read(paths[name])
        if text is None or (content := number(text)) in seen:
            continue
        seen.add(content)
        if number(name) % 20 == 0:
            held_out.append(text)
        elif size < megabytes * 1e6:
            training.append(text)
            size += len(text.encode())
        else:
            break
    known = set().union(*map(long_lines, training))
    kept = []
    for text in held_out:
        lines = long_lines(text)
        if lines and len(lines & known) <= KNOWN * len(lines):
            kept.append(text)
    parts = min(len(training) // SPLIT[0], len(kept) // sum(SPLIT[1:]))
    train, validation, test = (share * parts for share in SPLIT)
    return training[:train], kept[:validation], kept[validation : validation + test]


def main() -> None:
    """Write the corpus that the command line asks for, and say what is in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the .jsonl to write")
    parser.add_argument("--megabytes", type=float, default=40.0, help="of training text")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of files")
    arguments = parser.parse_args()
    splits = gather(arguments.megabytes, arguments.seed)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with arguments.output.open("w") as file:
        for text in (text for split in splits for text in split):
            file.write(json.dumps({"text": text}) + "\n")
    for name, split in zip(("training", "validation", "test"), splits, strict=True):
        print(f"{name}: {len(split)} files, {sum(len(text.encode()) for text in split) / 1e6:.1f} MB")
    print(f"data.split: {','.join(map(str, SPLIT))}")


if __name__ == "__main__":
    main()
