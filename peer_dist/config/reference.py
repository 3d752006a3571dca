"""The keys of a config as tables, for ``--help``."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from rich.table import Table

from peer_dist.config.schema import Config, Section


def key_tables() -> Iterator[Table]:
    """One table per section: key, type, default, meaning."""
    for name, field in Config.model_fields.items():
        section = field.annotation
        assert isinstance(section, type)
        assert issubclass(section, Section)
        table = Table(
            title=f"{name}: {(section.__doc__ or '').strip().splitlines()[0]}",
            title_justify="left",
            title_style="bold",
            box=None,
            padding=(0, 2, 0, 1),
        )
        for column in ("key", "type", "default", "meaning"):
            table.add_column(column, overflow="fold", no_wrap=column == "key")
        for key, info in section.model_fields.items():
            table.add_row(key, _type(info.annotation), _default(info), info.description or "")
        yield table


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0])
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " | ".join("null" if a is type(None) else _type(a) for a in arguments)
    if origin is not None:
        return f"{origin.__name__} of {', '.join(dict.fromkeys(_type(a) for a in arguments))}"
    return str(annotation.__name__)


def _default(info: FieldInfo) -> str:
    if info.default is PydanticUndefined:
        return "(required)"
    if isinstance(info.default, bool):
        return str(info.default).lower()
    return "null" if info.default is None else str(info.default)
