"""What documentation can be wrong about without anyone noticing: links, anchors, the navigation, generated tables."""

from __future__ import annotations

import importlib.util
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[1]
SITE = ROOT / "docs" / "site"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def tokens(page: Path) -> Iterator[Token]:
    for token in MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8")):
        yield token
        yield from token.children or ()


def anchors(page: Path) -> set[str]:
    """Of a page's headings, by GitHub's rule, which the site is told to follow."""
    found: list[str] = []
    heading = False
    for token in tokens(page):
        if heading and token.type == "inline":
            words = "".join(part.content for part in token.children or () if part.type in ("text", "code_inline"))
            found.append(re.sub(r"[^\w\- ]", "", words.strip().lower()).replace(" ", "-"))
        heading = token.type == "heading_open"
    assert len(found) == len(set(found)), f"{page}: two headings of one name have one anchor on GitHub, another here"
    return set(found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page: Path) -> None:
    """Every file and every anchor that a page links to is there."""
    for token in tokens(page):
        target = str(token.attrs.get("href") or token.attrs.get("src") or "")
        parts = urlsplit(target)
        if not target or parts.scheme:
            continue
        linked = (page.parent / parts.path).resolve() if parts.path else page
        assert linked.exists(), f"{target}: is not there"
        assert ROOT in linked.parents, f"{target}: lies outside of the repository"
        assert not parts.fragment or parts.fragment in anchors(linked), f"{target}: has no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_both_dialects(page: Path) -> None:
    """GitHub's Markdown and the site's read these alike; the second one wants blank lines, and four spaces in lists."""
    fenced, before = False, ""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        where = f"line {number}: {line!r}"
        if line.lstrip().startswith("```"):
            assert (len(line) - len(line.lstrip())) % 4 == 0, f"{where}: fences in lists are indented by four spaces"
            fenced = not fenced
        if not fenced and re.match(r"([-*]|\d+\.) |\|", line) and before.strip():
            assert re.match(r"([-*]|\d+\.) |\||  ", before), f"{where}: lists and tables follow a blank line"
        before = line


class SiteConfig(yaml.SafeLoader):
    """MkDocs's file, whose tags name Python objects."""


SiteConfig.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)


def test_navigation() -> None:
    """Every page is in the site's navigation, and what is there exists or is awaited."""

    def named(entries: list[dict[str, Any]]) -> Iterator[str]:
        for entry in entries:
            for target in entry.values():
                yield from named(target) if isinstance(target, list) else [target]

    config = yaml.load((SITE / "mkdocs.yml").read_text(encoding="utf-8"), SiteConfig)
    names = set(named(config["nav"]))
    names -= {name for name in names if name.startswith("files/") and (ROOT / name.removeprefix("files/")).exists()}
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}
    assert not pages - names, "pages without a line of nav in docs/site/mkdocs.yml"
    assert not names - pages - set(config["extra"]["awaited"]), "names in nav without a page"


def test_generated() -> None:
    """The reference is that of the code; if not:  python docs/site/reference.py"""
    for page, text in runpy.run_path(str(SITE / "reference.py"))["generated"]().items():
        assert page.read_text(encoding="utf-8") == text, f"{page}: run python docs/site/reference.py"


@pytest.mark.slow
def test_site(tmp_path: Path) -> None:
    """The site builds without a warning, and no page takes anything from another host."""
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("MkDocs is not installed: pip install -e '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(SITE / "mkdocs.yml"), "-d", str(tmp_path)]
    made = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > len(PAGES)
    for page in pages:
        fetched = re.findall(
            r'(?:src=|<link rel="(?:stylesheet|preload|icon)"[^>]* href=)"(https?:[^"]*)', page.read_text()
        )
        assert not fetched, f"{page}: {fetched}"
