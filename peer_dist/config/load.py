"""YAML plus ``a.b=value`` overrides into a :class:`Config`; every mistake is one sentence with file and key."""

from __future__ import annotations

import contextlib
import difflib
import errno
import math
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from peer_dist.config.schema import Config
from peer_dist.kinds.section import LONGEST_NAME
from peer_dist.mistake import Mistake, in_words, shown
from peer_dist.reading import as_yaml, parse_yaml, read_yaml
from peer_dist.writing import whole

Tree = dict[str, Any]

SHIPPED = Path(__file__).parents[1] / "configs"  # in a clone a link to the folder that lies beside the package


class ConfigError(Mistake, ValueError):
    """A configuration that cannot be run. Its message says what is wrong, where, and what to do."""


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply ``section.key=value`` overrides (values are YAML too) and check it all.

    Raises:
        ConfigError: the file cannot be read, a key is unknown, or a value is impossible.
    """
    path = find_config(path)
    tree = read_tree(path)
    origin = {key: str(path) for key in _leaves(tree)}
    for override in overrides:
        key = _apply(tree, override)
        origin[key] = f"command line ({in_words(override, 80)})"
    return parse_config(tree, str(path), origin)


def find_config(path: str | os.PathLike[str]) -> Path:
    """The file that ``path`` names: one that is there, else one that ships with the package, such as
    ``configs/quickstart.yaml``.

    Raises:
        ConfigError: there is neither.
    """
    path = Path(path)
    try:
        os.stat(path)
        return path
    except FileNotFoundError as error:
        shipped = {"configs" / file.relative_to(SHIPPED): file for file in SHIPPED.rglob("*.yaml")}
        if path in shipped:
            return shipped[path]
        folder = path.parent if any(name.parent == path.parent for name in shipped) else Path("configs")
        places = (name.relative_to(folder).parts for name in shipped if folder in name.parents)
        names = sorted({part + "/" if more else part for part, *more in places})
        own = f"; with peer_dist come, in {folder}/: {', '.join(names)}" if names else ""
        raise ConfigError(f"{path}: cannot be read ({error.strerror}){own}") from None
    except OSError:
        return path  # which read_tree finds out too, and tells
    except ValueError:
        raise ConfigError(f"{shown(str(path))}: is no path of a file; name one") from None


def read_tree(path: str | os.PathLike[str]) -> Tree:
    """The sections of a YAML file as plain values.

    Raises:
        ConfigError: it cannot be read, or holds no sections.
    """
    tree = read_yaml(path, ConfigError)
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must hold sections such as 'model:', not a {type(tree).__name__}")
    return tree


def parse_config(tree: Tree, source: str, origin: dict[str, str] | None = None) -> Config:
    """Validate a tree of plain values; ``source`` names it in errors, ``origin`` names single keys' sources."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(sentence(error, source, origin or {})) from None


def write_config(config: Config, path: Path, about: str) -> None:
    """Write all that is not the default under a comment, over what is there; missing folders are made.

    Raises:
        ConfigError: the file cannot be written.
    """
    tree = config.model_dump(mode="json", exclude_defaults=True)
    with whole(path, ConfigError, str(path)) as partial:
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(f"# {about}\n{as_yaml(tree)}", encoding="utf-8")


def check_world(config: Config, world_size: int) -> None:
    """Refuse a world that the layout does not divide.

    Raises:
        ConfigError: ranks, batch or experts do not fit ``world_size``.
    """
    parallel = config.parallel
    rows, columns = parallel.expert_rows(world_size), parallel.expert_tensor
    for parts in _layout_parts(config):
        sizes = {key: size for key, size in parts.items() if size > 1}
        product = math.prod(sizes.values())
        if world_size % product:
            raise ConfigError(
                f"parallel.{' x '.join(sizes)}: {' x '.join(map(str, sizes.values()))} does not divide the "
                f"{world_size} rank(s) that were started; start a multiple of {product} ranks or lower it"
            )
    if parallel.transport == "symmetric_memory" and rows & (rows - 1):
        raise ConfigError(
            f"parallel.expert: {rows} row shards are no power of two, which parallel.transport symmetric_memory needs; "
            "or set the transport to all_to_all"
        )
    for kind in config.kinds:
        tables, experts = kind.tables(config), kind.experts(config)
        if tables and rows > tables.rows:
            what = "experts" if tables.tokens_travel else "values"
            raise ConfigError(f"parallel.expert: {rows} shards for {tables.rows} {what}")
        if experts and experts.number % rows:
            raise ConfigError(
                f"parallel.expert: {rows} shards do not divide the {experts.number} experts of "
                f"{kind.key('num_experts')}; set it to a divisor of both the experts and the ranks of a pipeline stage"
            )
    if columns > config.model.hidden_size:
        raise ConfigError(f"parallel.expert_tensor: {columns} shards for {config.model.hidden_size} columns")
    per_pass = config.train.micro_batch_size * config.data_parallel_size(world_size)
    if config.train.global_batch_size % per_pass:
        raise ConfigError(
            f"train.global_batch_size: {config.train.global_batch_size} is not a multiple of "
            f"micro_batch_size * data-parallel ranks ({config.train.micro_batch_size} * "
            f"{config.data_parallel_size(world_size)} = {per_pass}); {_worlds_that_fit(config, world_size)}"
        )
    passes = config.train.global_batch_size // per_pass
    if parallel.virtual_pipeline > 1 and passes % parallel.pipeline:
        raise ConfigError(
            f"parallel.virtual_pipeline: the interleaved schedule needs a multiple of {parallel.pipeline} (pipeline) "
            f"forward passes a step, and global_batch_size / (micro_batch_size * data-parallel ranks) is {passes}; "
            f"{_worlds_that_fit(config, world_size)}"
        )


def check_folders(config: Config) -> None:
    """Make sure that the folders that the run writes to can be written, or made; nothing is made yet.

    Raises:
        ConfigError: one cannot be.
    """
    for key, name in (("checkpoint.dir", config.checkpoint.dir), ("logging.dir", config.logging.dir)):
        if problem := unwritable(Path(name)):
            raise ConfigError(f"{key}: nothing can be written to {name}; choose another folder ({problem})")


def make_folders(config: Config) -> None:
    """Make the folders that the run writes to, where they are missing: for who needs them before the run does.

    Raises:
        ConfigError: one cannot be made or written.
    """
    check_folders(config)
    for key, name in (("checkpoint.dir", config.checkpoint.dir), ("logging.dir", config.logging.dir)):
        try:
            Path(name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{key}: {name} cannot be made ({error.strerror}); choose another folder") from None


def unwritable(folder: Path) -> str:
    """Why nothing can be written into a folder, which need not exist; empty if it can."""
    try:
        place = folder.absolute()
        while not os.path.lexists(place):
            if len(os.fsencode(place.name)) > LONGEST_NAME:
                raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
            place = place.parent
        if os.path.islink(place) and not os.path.lexists(os.path.realpath(place)):
            return f"{place} is a link to what is not there"
        if not stat.S_ISDIR(os.stat(place).st_mode):
            return f"{place} is no folder"
        if not os.access(place, os.W_OK | os.X_OK):
            return f"{place} is not this user's to write to"
        with contextlib.suppress(FileNotFoundError):
            os.stat(folder)  # a path can be too long as a whole
    except (OSError, ValueError) as error:
        return in_words(getattr(error, "strerror", None) or str(error))
    return ""


def _layout_parts(config: Config) -> list[dict[str, int]]:
    """Sizes whose products must each divide the world."""
    parallel = config.parallel
    experts = {"expert_tensor": parallel.expert_tensor, "pipeline": parallel.pipeline}
    if parallel.expert != "auto":
        experts = {"expert": parallel.expert, **experts}
    return [{"tensor": parallel.tensor, "pipeline": parallel.pipeline}, experts]


def _worlds_that_fit(config: Config, world_size: int) -> str:
    """The worlds nearest to this one that divide layout and batch alike: what to start instead."""
    parallel, train = config.parallel, config.train
    passes, rest = divmod(train.global_batch_size, train.micro_batch_size)
    if rest:
        return "no number of ranks fits, because it is not a multiple of micro_batch_size"
    unit = math.lcm(*(math.prod(parts.values()) for parts in _layout_parts(config)))
    interleaved = parallel.pipeline if parallel.virtual_pipeline > 1 else 1
    worlds = []
    for ranks in divisors(passes):  # data-parallel
        world = ranks * parallel.tensor * parallel.pipeline
        if passes % (ranks * interleaved) == 0 and world % unit == 0:
            worlds.append(world)
    if not worlds:
        return "no number of ranks fits; raise train.global_batch_size"
    nearest = sorted(sorted(worlds, key=lambda world: abs(world - world_size))[:6])
    return f"worlds that fit: {', '.join(map(str, nearest))} rank(s)"


def divisors(number: int) -> list[int]:
    """All divisors of a number, ascending."""
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)})


def _apply(tree: Tree, override: str) -> str:
    key, equals, text = override.partition("=")
    source = f"command line: {shown(override, 80)}"
    if not equals:
        raise ConfigError(f"{source} is not of the form section.key=value")
    set_key(tree, key, parse_yaml(text, source, ConfigError), source)
    return key.strip()


def set_key(tree: Tree, key: str, value: Any, source: str) -> None:
    """Put ``value`` at ``key`` (``section.key``); ``source`` names it in errors. Values that sections share by aliases
    stay as they are in the other ones.

    Raises:
        ConfigError: it is not of that form, or one of the parts before the last is no section.
    """
    *sections, last = key.strip().split(".")
    if not all((*sections, last)):
        raise ConfigError(f"{source} is not of the form section.key=value")
    node = tree
    for part in sections:
        child = node.get(part, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{source}: {part!r} is a value, not a section")
        node[part] = node = dict(child)
    node[last] = value


def _leaves(tree: Tree, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        keys += _leaves(value, f"{name}.") if isinstance(value, dict) else [name]
    return keys


def sentence(error: ValidationError, source: str, origin: dict[str, str], root: type[BaseModel] = Config) -> str:
    """What is wrong with a file of the shape ``root``: where, which key, and what to do."""
    errors = error.errors(include_url=False)
    # a misspelt key first: it may be why another one is missing
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    key, section = _place(first, root)
    message = _message(first, [e for e in errors if _place(e, root)[0] == key] if key else [first], section, key)
    # a rule over a whole section, or over several, may be broken by one of its keys on the command line
    inside = [
        place
        for leaf, place in origin.items()
        if place.startswith("command") and (leaf.startswith(f"{key}.") if key else leaf in message)
    ]
    where, key = origin.get(key) or next(iter(inside), source), in_words(key, 200) if key else ""
    return in_words(f"{where}: {key}: {message}" if key else f"{where}: {message}", most=2000)


def _place(error: ErrorDetails, root: type[BaseModel]) -> tuple[str, type[BaseModel]]:
    """The key that an error is about, as the user wrote it, and the section that has it or should have it.

    Pydantic adds places in lists, keys of mappings and branches of unions to the location; those are left out.
    """
    parts: list[str] = []
    section, inside = root, root
    for part in map(str, error["loc"]):
        if part in inside.model_fields:
            section, nested = inside, _section_of(inside.model_fields[part].annotation)
            parts.append(part)
            if nested is None:
                break
            inside = nested
        elif error["type"] == "extra_forbidden":
            section = inside
            parts.append(part)
            break
    return ".".join(parts), section


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, if it holds one."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


_WANTED = {
    "whole": "a whole number",
    "float": "a valid number",
    "bool": "true or false",
    "string": "a string",
    "list": "a list",
    "tuple": "a list",
    "dict": "a mapping (name: value)",
    "model": "a section of keys and values",
}


def _message(first: ErrorDetails, alike: list[ErrorDetails], section: type[BaseModel], key: str) -> str:
    """What is wrong with a key, and what it should be.

    Args:
        first: the error.
        alike: all errors of the key: one for each branch of a union.
        section: which has the key, or should.
    """
    kind, name = first["type"], key.rpartition(".")[2]
    if kind == "extra_forbidden":
        known = list(section.model_fields)
        near = difflib.get_close_matches(name, known, n=1)
        return "unknown key; " + (f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}")
    if kind == "missing" and len(first["loc"]) == len(key.split(".")):
        return "is missing; it has no default"
    field = section.model_fields.get(name)
    lengths = {len(get_args(t)) for t in _branches(field.annotation) if get_origin(t) is tuple} if field else set()
    if lengths and (kind == "missing" or (kind == "too_long" and len(alike) == 1)):
        return f"input should be a list of {max(lengths)} numbers; got {shown(first['input'])}"
    if kind == "value_error":
        message = first["msg"].removeprefix("Value error, ")
        return message[:1].lower() + message[1:]
    wanted = [_wanted(e) for e in alike] if _wanted(first) else []
    if wanted and all(wanted):
        message = f"input should be {' or '.join(dict.fromkeys(map(str, wanted)))}"
    else:
        message = first["msg"][:1].lower() + first["msg"][1:]
    given = first["input"]
    if isinstance(given, dict):
        return message if kind == "too_long" else f"{message}; got a mapping"
    return f"{message}; got {shown(given)}" + (" (no value)" if given is None else "")


def _wanted(error: ErrorDetails) -> str | None:
    """The type that an error says is wanted; None where it says something else."""
    kind = error["type"]
    if kind == "literal_error":
        return error["msg"].removeprefix("Input should be ")
    name, _, fault = kind.partition("_")
    if fault in ("type", "parsing", "from_float", "parsing_size"):
        return _WANTED.get("whole" if name == "int" else name)
    return None


def _branches(annotation: Any) -> tuple[Any, ...]:
    """The types that a value may have: an annotation's own, or those of a union."""
    return (annotation, *(part for part in get_args(annotation)))
