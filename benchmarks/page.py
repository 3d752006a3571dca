"""Puts counts and figures of a GPU into the pages of docs/, between the markers that each table has there.

    python benchmarks/page.py            after counts.py or gpu.py wrote a file of docs/measurements/

``counts-before.json`` and, once it is there, ``counts-after.json`` become the tables of counts; ``gpu.json`` the table
of times. Without it the page says that nothing has been measured.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
FILES = DOCS / "measurements"


def load(name: str) -> dict[str, Any] | None:
    """A file of docs/measurements, if it is there."""
    path = FILES / name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def table(head: list[str], lines: Iterable[list[str]]) -> str:
    """Markdown."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines))


def counted(title: str, before: list[dict[str, Any]], after: list[dict[str, Any]] | None) -> str:
    """A case's table: before, and after where that was counted, a part on a line."""

    def keyed(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        return {row["part"] + (f", {row['pass']}" if row["pass"] else ""): row for row in rows}

    sides = [keyed(before)] if after is None else [keyed(before), keyed(after)]
    newest, floors = sides[-1], any(row["floor_bytes"] for row in before)
    names = [name for name in dict.fromkeys(name for side in sides for name in side) if name != "in all"]

    def cells(name: str) -> list[str]:
        rows = [side.get(name) for side in sides]
        shown = [name]
        for key, unit, form in (("launches", 1, "d"), ("bytes", 1e9, ".2f"), ("waits", 1, "d")):
            values = ("-" if row is None else format(row[key] / unit if unit != 1 else row[key], form) for row in rows)
            shown.append(" → ".join(values))
        last = newest.get(name) or rows[0]
        assert last is not None
        if floors:
            shown.append(f"{last['floor_bytes'] / 1e9:.2f}" if last["floor_bytes"] else "")
        shown.append(" → ".join("-" if row is None else f"{row['ms']:.2f}" for row in rows))
        if floors:
            shown.append(f"{last['floor_ms']:.2f}" if last["floor_bytes"] else "")
        return shown

    head = ["part", "launches", "GB", "waits", *(["floor, GB"] if floors else []), "ms"]
    head += ["floor, ms"] if floors else []
    names += ["in all"] if "in all" in sides[0] else []
    return f"{title}:\n\n{table(head, map(cells, names))}"


def counts(which: str) -> str:
    """The tables of the cases whose title has ``which`` in it."""
    before, after = load("counts-before.json"), load("counts-after.json")
    assert before is not None
    tables = []
    for title, rows in before["cases"].items():
        if which in title:
            tables.append(counted(title, rows, after["cases"].get(title) if after else None))
    for title, rows in (after["cases"] if after else {}).items():
        if which in title and title not in before["cases"]:  # of what there was nothing before
            tables.append(counted(title, rows, None))
    return "\n\n".join(tables)


def times() -> str:
    """The figures of a GPU, or that there are none."""
    found = load("gpu.json")
    if found is None:
        return "**Nothing has been timed on a GPU yet: there is no figure to show here.**"
    what = [f"{name} {found[name]}" for name in ("driver", "torch", "cuda", "triton") if found[name]]
    speeds = found["speeds"]
    parts = [
        [
            row["part"],
            f"{row['ms']:.3f}",
            f"{row['floor_ms']:.3f}" if row["floor_ms"] else "",
            f"{row['share']:.2f}" if row["floor_ms"] else "",
        ]
        for row in found["rows"]
    ]
    goals = [
        [
            each["goal"],
            f"{each['value']:.3g}",
            f"{each['sign']} {each['wanted']:g}",
            "met" if each["met"] else "not met",
        ]
        for each in found["goals"]
    ]
    missing = "".join(f"\n\nNot measured: {name}: {reason}." for name, reason in found["not_measured"].items())
    return (
        f"{found['title']}; {', '.join(what)}; `{found['command']}`, {found['seconds']:.0f} s. A copy moves "
        f"{speeds['copy_GB_per_s']:.0f} GB/s, a product does {speeds['product_TFLOP_per_s']:.0f} TFLOP/s: of these are "
        f"the floors.\n\n{table(['part', 'ms', 'floor, ms', 'share of floor'], parts)}\n\n"
        f"{table(['what is to be reached', 'measured', 'goal', ''], goals)}{missing}"
    )


def blocks() -> dict[tuple[Path, str], str]:
    """What belongs between the markers ``<!-- name -->`` and ``<!-- /name -->`` of a page."""
    performance, paths = DOCS / "performance.md", DOCS / "gpu_paths.md"
    return {
        (performance, "gpu"): times(),
        (performance, "counts-layer"): counts("PEER,"),
        (performance, "counts-updates"): counts("The update of"),
        (performance, "counts-eight-bits"): counts("The sums over picks"),
        (paths, "counts-model"): counts("the step"),
    }


def generated() -> dict[Path, str]:
    """The pages as they are to be."""
    pages: dict[Path, str] = {}
    for (page, name), text in blocks().items():
        old = pages.get(page) or page.read_text(encoding="utf-8")
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if old.count(begin) != 1 or old.count(end) != 1:
            raise SystemExit(f"{page.name} must have {begin.strip()} and {end} once")
        before, after = old.split(begin)[0], old.split(end)[1]
        pages[page] = f"{before}{begin}\n{text}\n\n{end}{after}"
    return pages


def main() -> None:
    """Write the pages."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for page, text in generated().items():
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
