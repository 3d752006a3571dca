"""Reads what people give: text, YAML and JSON. Every fault is one sentence with file, line and what to do.

Readers of other formats, which raise whatever they raise, are called inside :func:`reading`.
"""

from __future__ import annotations

import errno
import json
import os
import re
import select
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import yaml

from peer_dist.mistake import Mistake, in_words

MOST_BYTES = 64 << 20  # of a text that is read at once: far more than any config, index or manifest has
MOST_DIGITS = 40  # of a whole number
_PATIENCE = 10.0  # seconds for which a pipe is waited for
_MOST_DEPTH, _MOST_VALUES = 64, 100_000  # of a YAML file, aliases written out
_MOST_YAML = 4 << 20  # bytes, which PyYAML takes seconds for


@contextmanager
def reading(source: object, raises: type[Mistake], what: str = "what is expected", advice: str = "") -> Iterator[None]:
    """A context in which any error of a reader becomes ``raises``, with one sentence.

    Args:
        source: what is read, as the beginning of the sentence: a file, or a part of one.
        raises: the error to raise.
        what: what the source should be, such as ``a tokenizer.json of Hugging Face tokenizers``.
        advice: what to do, as the end of the sentence.
    """
    end = f"; {advice}" if advice else ""
    try:
        yield
    except Mistake:
        raise
    except OSError as error:
        raise raises(f"{source}: cannot be read ({error.strerror or in_words(error)}){end}") from None
    except UnicodeDecodeError:
        raise raises(f"{source}: is not a text file in UTF-8{end}") from None
    except RecursionError:
        raise raises(f"{source}: is nested too deeply to be {what}{end}") from None
    except MemoryError:
        raise raises(f"{source}: takes more memory than this process can have; raise its limit{end}") from None
    except Exception as error:
        raise raises(f"{source}: is not {what} ({in_words(error)}){end}") from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of a library in Rust
            raise
        raise raises(f"{source}: is not {what} ({in_words(error)}){end}") from None


def opened(path: str | os.PathLike[str]) -> BinaryIO:
    """The file, opened to be read as bytes. A pipe's first byte is waited for, but not for ever.

    Raises:
        OSError: it cannot be opened, is a folder, or is a pipe into which nobody writes.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would be waited for in open itself
    try:
        if stat.S_ISFIFO(os.fstat(handle).st_mode):
            poll = select.poll()
            poll.register(handle, select.POLLIN)
            if not poll.poll(1000 * _PATIENCE):
                raise OSError(errno.ETIMEDOUT, "it is a pipe into which nobody writes", os.fspath(path))
        os.set_blocking(handle, True)
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def check_regular(path: str | os.PathLike[str]) -> None:
    """Make sure that ``path`` is a plain file, before a reader opens it that would wait for a pipe or a device.

    Raises:
        OSError: it is none, or is not there.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", os.fspath(path))


def read_text(path: str | os.PathLike[str], raises: type[Mistake], advice: str = "", most: int = MOST_BYTES) -> str:
    """The text of a file in UTF-8, without a byte order mark.

    Args:
        path: of the file.
        raises: the error to raise.
        advice: what to do, as the end of its sentence.
        most: bytes of a file that is not too large to be one.

    Raises:
        Mistake: ``raises``; it cannot be read, is no text in UTF-8, or is too large.
    """
    with reading(path, raises, "a text file in UTF-8", advice), opened(path) as file:
        data = file.read(min(most, os.fstat(file.fileno()).st_size or most) + 1)  # the size of a pipe is 0
        if len(data) > most:
            end = f"; {advice}" if advice else ""
            raise raises(f"{path}: is larger than {most >> 20} MiB, which no such file is{end}")
        return data.decode("utf-8").removeprefix("\ufeff")


def read_yaml(path: str | os.PathLike[str], raises: type[Mistake], advice: str = "") -> Any:
    """The value that a YAML file holds; see :func:`parse_yaml`."""
    return parse_yaml(read_text(path, raises, advice, _MOST_YAML), str(path), raises, advice)


def parse_yaml(text: str, source: str, raises: type[Mistake], advice: str = "") -> Any:
    """The value of a YAML text: mappings, lists, strings, booleans, null, whole and finite numbers.

    Scalars are those of YAML 1.2's core schema, with ``_`` between digits: ``1e-3`` is a number, ``1:30``, ``010``,
    ``yes`` and ``2020-01-01`` are strings. Keys are strings, and none is given twice.

    Raises:
        Mistake: ``raises``; the text is anything else. The sentence names the line.
    """
    end = f"; {advice}" if advice else ""
    with reading(source, raises, "YAML", advice):
        try:
            return _yaml_value(text)
        except _Fault as fault:
            raise raises(f"{source}: line {fault.line}: {fault.problem}{end}") from None
        except yaml.reader.ReaderError as error:
            line = text[: error.position].count("\n") + 1
            raise raises(
                f"{source}: is not valid YAML at line {line}: the character U+{ord(text[error.position]):04X} is not "
                f"allowed{end}"
            ) from None
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
            problem = in_words(error.problem or "is malformed")
            raise raises(f"{source}: is not valid YAML{where}: {problem}{end}") from None


def as_yaml(value: Any) -> str:
    """A YAML text that :func:`parse_yaml`, and readers of YAML 1.1 too, read as ``value``."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=None, allow_unicode=True)


def _yaml_value(text: str) -> Any:
    _check_events(text)
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_size(node, {}, [])
        return loader.construct_document(node)
    finally:
        loader.dispose()


def read_json(path: str | os.PathLike[str], raises: type[Mistake], advice: str = "") -> Any:
    """The value that a JSON file holds; see :func:`parse_json`."""
    return parse_json(read_text(path, raises, advice), path, raises, advice)


def parse_json(text: str, source: object, raises: type[Mistake], advice: str = "") -> Any:
    """The value of a JSON text. As Python writes it, ``NaN`` and ``Infinity`` are numbers.

    Args:
        source: what the text is, as the beginning of the sentence.

    Raises:
        Mistake: ``raises``; it is no JSON, is nested too deeply, or has a key twice.
    """
    with reading(source, raises, "JSON", advice):
        try:
            value = json.loads(text, object_pairs_hook=_without_doubles, parse_int=_whole)
            if "\\u" in text:  # JSON can escape half of a surrogate pair, which is no character and cannot be written
                json.dumps(value, ensure_ascii=False).encode()
            return value
        except json.JSONDecodeError as error:
            end = f"; {advice}" if advice else ""
            where = f"line {error.lineno}, column {error.colno}"
            raise raises(f"{source}: is not valid JSON at {where} ({error.msg}){end}") from None


def read_object(path: str | os.PathLike[str], raises: type[Mistake], advice: str = "") -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        Mistake: ``raises``; see :func:`parse_json`, or it holds something else.
    """
    value = read_json(path, raises, advice)
    if not isinstance(value, dict):
        end = f"; {advice}" if advice else ""
        raise raises(f"{path}: must hold a JSON object, not {_kind_of(value)}{end}")
    return value


def json_lines(path: str | os.PathLike[str], raises: type[Mistake]) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """The lines of a file of JSON lines, one at a time, without their line feeds.

    Yields:
        A line, and the object in it; None for one that holds none, which is told apart, not refused.

    Raises:
        Mistake: ``raises``; the file cannot be read.
    """
    with reading(path, raises), opened(path) as file:
        for line in file:
            try:
                value = json.loads(line.decode("utf-8").removeprefix("\ufeff"), parse_int=_whole)
            except (ValueError, RecursionError):
                value = None
            yield line.removesuffix(b"\n"), value if isinstance(value, dict) else None


def _kind_of(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return tree


def _whole(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"the number {digits[:8]}... has {len(digits)} digits")
    return int(digits)


class _Fault(Exception):
    """What is wrong with a YAML text that is well-formed, and in which line."""

    def __init__(self, where: yaml.Node | yaml.Event, problem: str) -> None:
        super().__init__(problem)
        mark = where.start_mark
        self.line, self.problem = mark.line + 1 if mark else 1, in_words(problem)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2, and without what is ambiguous, endless or no plain value."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML declares it as an instance's

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """The value of a node; faults of its constructor name its line."""
        try:
            value = super().construct_object(node, deep=True)
        except (_Fault, yaml.YAMLError, RecursionError, MemoryError):
            raise
        except Exception:
            raise _Fault(node, f"{_shown(node)} cannot be read as {node.tag.rpartition(':')[2]}") from None
        if isinstance(value, str):
            _check_string(node, value)
        elif isinstance(value, bool | int | float | list | dict) or value is None:
            pass
        else:
            raise _Fault(node, f"{_shown(node)} is of the type {type(value).__name__}; write a number or a string")
        return value

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys are strings as they are written, each once."""
        if not isinstance(node, yaml.MappingNode):
            raise _Fault(node, "is no mapping (key: value)")
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _Fault(key, "a key must be a name, not a list or a mapping")
            if key.value in lines:
                raise _Fault(key, f"the key {key.value!r:.60} is there twice (see line {lines[key.value]}); keep one")
            lines[key.value] = key.start_mark.line + 1
            _check_string(key, key.value)
        self.flatten_mapping(node)  # what << merges comes first, so that a mapping's own keys win
        return {key.value: self.construct_object(value) for key, value in node.value}


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, which quotes strings that it or :class:`_Loader` would read as something else."""


def _shown(node: yaml.Node) -> str:
    """A node as it is written, for a sentence."""
    return f"{node.value:.40}" if isinstance(node, yaml.ScalarNode) else "what is there"


def _int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node)).replace("_", "")
    if len(text) > MOST_DIGITS:
        raise _Fault(node, f"the number {text[:8]}... has {len(text)} digits; no key takes one that large")
    return int(text, {"0x": 16, "0o": 8}.get(text.lstrip("+-")[:2].lower(), 10))


def _float(loader: _Loader, node: yaml.ScalarNode) -> float:
    text = str(loader.construct_scalar(node)).replace("_", "").lower()
    value = float(text.replace(".inf", "inf").replace(".nan", "nan"))
    if value in (float("inf"), float("-inf")) and "inf" not in text:
        raise _Fault(node, f"the number {text:.20} is too large")
    return value


_PLAIN = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?(?:0|[1-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+)", list("-+0123456789")),
    "float": (
        r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9_]*)(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": (r"<<", ["<"]),
}
for _name, (_pattern, _first) in _PLAIN.items():
    for _user in (_Loader, _Dumper):
        _user.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _int)
_Loader.add_constructor("tag:yaml.org,2002:float", _float)


def _check_events(text: str) -> None:
    """Refuse a text that is nested deeper, or holds more, than any file does, before it is built."""
    depth = 0
    for number, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        if number > 2 * _MOST_VALUES:  # a collection has two events
            raise _Fault(event, f"holds more than {_MOST_VALUES:,} values")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > _MOST_DEPTH:
                raise _Fault(event, f"is nested more than {_MOST_DEPTH} deep")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _check_size(node: yaml.Node, sizes: dict[int, int], above: list[int]) -> int:
    """The number of values under a node, aliases written out; refuse one that holds itself or far too many."""
    if id(node) in above:
        raise _Fault(node, "an alias (*name) stands for what it is part of; write the value out")
    if id(node) in sizes:
        return sizes[id(node)]
    size = 1
    if isinstance(node, yaml.CollectionNode):
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        for part in parts:
            size += _check_size(part, sizes, [*above, id(node)])
            if size > _MOST_VALUES:
                raise _Fault(node, f"holds more than {_MOST_VALUES:,} values, aliases (*name) written out")
    sizes[id(node)] = size
    return size


def _check_string(node: yaml.Node, text: str) -> None:
    """Refuse characters that no name, path or text of a config has: they cut off paths and forge lines."""
    for char in text:
        code = ord(char)
        if (code < 32 and char not in "\n\t") or code == 127 or 0xD800 <= code < 0xE000:
            raise _Fault(node, f"{text!r:.40} holds the control character {char!r}; leave it out")
