"""What the layer alone costs whoever installs it: time to import, and bytes on the disk.

    python benchmarks/install.py [--runs 21] [--json FILE]

In an environment that has the package. Processes that import torch alone and processes that import the layer after it
take turns, with byte code cached. Two ratios say what the layer adds: that of the two kinds' medians, and the median of
what it adds to the torch of its own process, which a machine whose speed drifts leaves as it is.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import statistics
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import peer_dist

TORCH, LAYER = "import torch", "from peer_dist import PEER"


def seconds(*statements: str) -> list[float]:
    """Of each statement, in turn, in a process of their own: Python's own start is not counted."""
    program = "import time; marks = [time.perf_counter()]"
    for statement in statements:
        program += f"; {statement}; marks.append(time.perf_counter())"
    program += "; print(*(after - before for before, after in zip(marks, marks[1:])))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return [float(word) for word in done.stdout.split()]


def brought(statements: str) -> tuple[set[str], int]:
    """The modules that statements import, and how many bytes of memory the process has at most."""
    program = (
        f"{statements}; import resource, sys; "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, *sys.modules)"
    )
    peak, *modules = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()
    return set(modules), int(peak)


def size(folder: Path) -> int:
    """Bytes of the files in a folder, without compiled byte code."""
    return sum(
        file.stat().st_size
        for file in folder.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts and "built" not in file.parts
    )


def needed(*names: str) -> dict[str, int]:
    """Bytes of each of these packages and of what they ask for, by name, as far as they are installed."""
    found: dict[str, int] = {}
    waiting = list(names)
    while waiting:
        try:
            package = metadata.distribution(waiting.pop())
        except metadata.PackageNotFoundError:
            continue
        if package.name not in found:
            files = [Path(str(file.locate())) for file in package.files or [] if file.suffix != ".pyc"]
            found[package.name] = sum(file.stat().st_size for file in files if file.is_file())
            lines = [line for line in package.requires or [] if "extra ==" not in line]
            waiting += [name[0] for line in lines if (name := re.match(r"[\w.-]+", line))]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=21, help="of each kind")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()

    seconds(TORCH, LAYER)  # byte code, and the disk's cache
    alone, together, part, ratios = [], [], [], []
    for _ in range(arguments.runs):
        alone += seconds(TORCH)
        torch_first, then_layer = seconds(TORCH, LAYER)
        together.append(torch_first + then_layer)
        part.append(then_layer)
        ratios.append(1 + then_layer / torch_first)
    torch, both, layer = map(statistics.median, (alone, together, part))
    with_torch, torch_peak = brought(TORCH)
    with_layer, layer_peak = brought(f"{TORCH}; {LAYER}")
    new = with_layer - with_torch
    own = {name for name in new if name.partition(".")[0] == "peer_dist"}
    files = {Path(spec.origin) for name in own if (spec := importlib.util.find_spec(name)) and spec.origin}

    package = Path(peer_dist.__file__).parent
    torchs, base = needed("torch"), needed("torch", "numpy")
    trains = needed(
        *(
            name[0]
            for line in metadata.requires("peer_dist") or []
            if re.search(r"""extra == ["']train["']""", line) and (name := re.match(r"[\w.-]+", line))
        )
    )
    figures = {
        "import_seconds": {"torch": round(torch, 3), "torch_and_layer": round(both, 3), "layer": round(layer, 3)},
        "import_ratio": {"of_medians": round(both / torch, 3), "within_runs": round(statistics.median(ratios), 3)},
        "quartiles": {
            name: [round(quartile, 3) for quartile in statistics.quantiles(taken)]
            for name, taken in (("torch", alone), ("torch_and_layer", together), ("layer", part))
        },
        "modules": {"torch": len(with_torch), "added": len(new), "of_them_ours": len(own)},
        "peak_mib": {"torch": torch_peak >> 20, "torch_and_layer": layer_peak >> 20},
        "bytes": {
            "package": size(package),
            "of_it_what_the_layer_imports": sum(file.stat().st_size for file in files),
            "base_beside_torch_and_what_it_asks_for": {name: base[name] for name in base.keys() - torchs.keys()},
            "torch_and_what_it_asks_for": sum(torchs.values()),
            "train_beside_them": sum(trains[name] for name in trains.keys() - base.keys()),
        },
    }
    text = json.dumps(figures, indent=1)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
