"""What the site needs beyond Markdown that GitHub shows too."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

SITE = Path(__file__).parent
ROOT = SITE.parents[1]
LINK = re.compile(r"(\]\()(?![a-z]+:|#)([^)#\s]+)")


def on_config(config: MkDocsConfig) -> None:
    """Leave pages out of the navigation that are still being written."""
    missing = {name for name in config.extra["awaited"] if not (ROOT / "docs" / name).exists()}
    config.nav = _without(config.nav, missing)


def _without(nav: list[Any], missing: set[str]) -> list[Any]:
    kept = []
    for (title, target), *_ in (entry.items() for entry in nav):
        if isinstance(target, list):
            kept.append({title: _without(target, missing)})
        elif target not in missing:
            kept.append({title: target})
    return kept


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Files of the repository that pages link to, or the navigation names, become pages of the site."""
    waiting = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
    waiting += [path for page in files.documentation_pages() for path in _linked(ROOT / "docs" / page.src_uri)]
    while waiting:
        path = waiting.pop()
        if (uri := _uri(path)) in files.src_uris:
            continue
        if path.is_dir():
            names = sorted(each.name + "/" * each.is_dir() for each in path.iterdir())
            content = f"# {path.relative_to(ROOT)}\n\n" + "".join(f"- `{name}`\n" for name in names)
        elif path.suffix == ".md":
            content = path.read_text(encoding="utf-8")
            waiting += _linked(path)
        else:
            code = path.read_text(encoding="utf-8")
            content = f"# {path.name}\n\n`{path.relative_to(ROOT)}`\n\n````{path.suffix[1:]}\n{code}\n````\n"
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Links to other parts of the repository lead to their pages; `<!-- api: NAME -->` is the docstring of NAME."""
    source, here = _source(page.file.src_uri), PurePosixPath(page.file.src_uri).parent

    def link(match: re.Match[str]) -> str:
        target = (source.parent / match[2]).resolve()
        return match[1] + (relpath(_uri(target), here) if target.exists() else match[2])

    return re.sub(r"<!-- api: (\S+) -->", r"::: \1", LINK.sub(link, markdown))


def on_page_content(html: str, **_: Any) -> str:
    """Roles in docstrings: their names alone."""
    return re.sub(r":(?:attr|class|data|func|meth|mod):(<code>)~?", r"\1", html)


def _linked(page: Path) -> list[Path]:
    """Files and folders beyond the site's own that a page links to."""
    targets = (page.parent / normpath(match[2]) for match in LINK.finditer(page.read_text(encoding="utf-8")))
    return [target.resolve() for target in targets if target.exists() and not _is_own(target.resolve())]


def _is_own(path: Path) -> bool:
    """Whether it is a page, picture or file of docs/, which MkDocs takes by itself."""
    return path.is_file() and ROOT / "docs" in path.parents and SITE not in path.parents


def _uri(path: Path) -> str:
    """Where in the site a file or folder of the repository is."""
    if _is_own(path):
        return path.relative_to(ROOT / "docs").as_posix()
    return f"files/{path.relative_to(ROOT).as_posix()}" + ("" if path.suffix == ".md" else ".md")


def _source(uri: str) -> Path:
    """The file that a page is made of."""
    if not uri.startswith("files/"):
        return ROOT / "docs" / uri
    path = ROOT / uri.removeprefix("files/")
    return path if path.exists() else path.with_suffix("")
