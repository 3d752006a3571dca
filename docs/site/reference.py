"""Writes what is generated in docs/: the keys of the configuration, the command line, and the law of imports.

python docs/site/reference.py
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import typer

from peer_dist.cli import app
from peer_dist.config.reference import key_tables

DOCS = Path(__file__).parents[1]
KEYS_MARK = "\n<!-- keys -->\n"
LAW_MARKS = "\n<!-- law -->\n", "\n<!-- /law -->\n"
VALUES = {int: "N", float: "X", str: "TEXT", Path: "PATH"}


def generated() -> dict[Path, str]:
    """The generated pages with their text as it should be."""
    configuration, architecture = DOCS / "configuration.md", DOCS / "architecture.md"
    begin, end = LAW_MARKS
    before, _, rest = architecture.read_text(encoding="utf-8").partition(begin)
    return {
        architecture: before + begin + _law() + end + rest.partition(end)[2],
        configuration: configuration.read_text(encoding="utf-8").split(KEYS_MARK)[0] + KEYS_MARK + "".join(_keys()),
        DOCS / "commands.md": "".join(_commands()),
    }


def _law() -> str:
    """The layers of the import-linter contract in pyproject.toml, the highest first."""
    settings = (DOCS.parent / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(r"^layers = \[\n(.*?)^\]", settings, re.DOTALL | re.MULTILINE)
    assert listed is not None, "pyproject.toml: has no contract with layers"
    return "\n```text\n" + "\n".join(re.findall(r'"(.+?)"', listed[1])) + "\n```\n"


def _keys() -> Iterator[str]:
    for table in key_tables():
        name, _, meaning = str(table.title).partition(": ")
        yield f"\n### {name}\n\n{meaning}\n\n| key | type | default | meaning |\n|---|---|---|---|\n"
        for row in zip(*(column.cells for column in table.columns)):
            key, kind, default, about = (_cell(str(cell)) for cell in row)
            yield f"| `{key}` | {kind} | `{default}` | {about} |\n"


def _commands() -> Iterator[str]:
    yield f"# Command line\n\n<!-- made by docs/site/reference.py -->\n\n{app.info.help}\n"
    yield "`peer-dist COMMAND --help` says the same; `python -m peer_dist` is the same program.\n"
    for name, command in typer.main.get_command(app).commands.items():
        yield f"\n## {name}\n\n{inspect.cleandoc(command.help)}\n\n| option | default | meaning |\n|---|---|---|\n"
        hints = get_type_hints(command.callback)
        yield from (_option(option, hints[option.name]) for option in command.params)


def _option(option: Any, hint: Any) -> str:
    names = ", ".join(option.opts + option.secondary_opts)
    if option.param_type_name == "argument":
        names = option.metavar or option.name.upper()
    elif not option.is_flag:
        names += f" {option.metavar or next(VALUES[kind] for kind in VALUES if kind.__name__ in str(hint))}"
    default = "" if option.default in (None, "") or option.is_flag else f"`{option.default}`"
    default = "(required)" if option.required else default
    return f"| `{names}` | {default} | {_cell(option.help or '')} |\n"


def _cell(words: Any) -> str:
    return str(words).replace("|", "\\|")


if __name__ == "__main__":
    for page, text in generated().items():
        page.write_text(text, encoding="utf-8")
