"""Nothing depends on torch's default dtype or default device: what is allocated names both.

First every line of the package is read, then what a user reaches from Python is run under other defaults.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.utils._device import _device_constructors

ROOT = Path(__file__).parents[1]
PENDING = ("peer_dist/layers", "peer_dist/kernels", "peer_dist/sharding", "peer_dist/export")
"""Folders that are not read yet."""

ALLOWED: dict[str, str] = {}
"""``file::function`` to why it may follow torch's defaults."""

NAMES = ("dtype", "device")
LEGACY = {f"torch.{kind}Tensor" for kind in ("", *"Float Double Half BFloat16 Byte Char Short Int Long Bool".split())}
SETTERS = {f"torch.set_default_{what}" for what in (*NAMES, "tensor_type")}
MAKERS = {"torch.from_file", "torch.normal", *(f"torch.{f.__name__}" for f in _device_constructors())} | {
    "torch.fft.fftfreq", "torch.fft.rfftfreq", "torch.nested.nested_tensor", "torch.nn.UninitializedParameter"
}  # fmt: skip


def outside(node: ast.AST) -> str | None:
    """``a.b.c`` of names and attributes, or of ``getattr(a.b, "c")``; None for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        value, name = outside(node.value), node.attr
    elif isinstance(node, ast.Call) and outside(node.func) == "getattr" and len(node.args) > 1:
        value, name = outside(node.args[0]), getattr(node.args[1], "value", None)
    else:
        return None
    return f"{value}.{name}" if value is not None and isinstance(name, str) else None


@cache
def takes_both(path: str) -> bool:
    """Whether something of torch's, by its path, is a class whose constructor takes a dtype and a device."""
    if not path.startswith("torch."):
        return False
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError:
        return False
    if not isinstance(found, type) or not issubclass(found, nn.Module):
        return False
    return all(name in inspect.signature(found).parameters for name in NAMES)


def own_takers(trees: dict[str, ast.Module]) -> frozenset[str]:
    """Names of the package's classes and functions that take both and can be called without them."""
    found = set()
    for tree in trees.values():
        for node in ast.walk(tree):
            functions = [node] if isinstance(node, ast.FunctionDef) else []
            if isinstance(node, ast.ClassDef):
                functions = [f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"]
            for function in functions:
                arguments = function.args
                optional = [a.arg for a, default in zip(arguments.kwonlyargs, arguments.kw_defaults) if default]
                optional += [a.arg for a in arguments.args[len(arguments.args) - len(arguments.defaults) :]]
                if set(NAMES) <= set(optional):
                    found.add(node.name)  # type: ignore[attr-defined]
    return frozenset(found - {"__init__"})


class Fault(NamedTuple):
    """A place in the code that follows torch's defaults, and how."""

    place: str
    line: int
    words: str


class Reader(ast.NodeVisitor):
    """Collects a file's faults."""

    def __init__(self, file: str, tree: ast.Module, own: frozenset[str] = frozenset()) -> None:
        self.faults: list[Fault] = []
        self._file, self._own = file, own
        self._within: list[str] = []
        self._bases: list[str] = []
        self._known: dict[str, str] = {}  # what a name of the file stands for
        self._dicts: dict[str, set[str]] = {}  # keys of the dicts that are spread into calls
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                self._known |= {a.asname: a.name for a in node.names if a.asname}
            elif isinstance(node, ast.ImportFrom):
                self._known |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
                if isinstance(target, ast.Name):
                    self._assigned(target.id, node.value)
        self.visit(tree)

    def _assigned(self, name: str, value: ast.expr) -> None:
        path = self._path(value)
        if path is not None and path.startswith("torch."):
            self._known[name] = path
        if isinstance(value, ast.Dict):
            self._dicts[name] = {key.value for key in value.keys if isinstance(key, ast.Constant)}
        elif isinstance(value, ast.Call) and outside(value.func) == "dict":
            self._dicts[name] = {keyword.arg for keyword in value.keywords if keyword.arg}

    def _path(self, node: ast.AST) -> str | None:
        """The path of what an expression names, imports and assignments followed."""
        path = outside(node)
        first, _, rest = (path or "").partition(".")
        known = self._known.get(first)
        return path if known is None else f"{known}.{rest}" if rest else known

    def _is_own(self, path: str) -> bool:
        folder, _, name = path.rpartition(".")
        return name in self._own and (not folder or folder.startswith("peer_dist"))

    def _missing(self, call: ast.Call, needed: tuple[str, ...]) -> list[str]:
        """Those of the two that a call does not name."""
        named = set()
        for keyword in call.keywords:
            if keyword.arg is None:
                named |= self._dicts.get(outside(keyword.value) or "", set())
            elif not (isinstance(keyword.value, ast.Constant) and keyword.value.value is None):
                named.add(keyword.arg)
        return [name for name in needed if name not in named]

    def _fault(self, node: ast.expr, words: str) -> None:
        place = f"{self._file}::{'.'.join(self._within)}"
        if place not in ALLOWED:
            self.faults.append(Fault(place, node.lineno, words))

    def _scope(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> None:
        self._within.append(node.name)
        if isinstance(node, ast.ClassDef):
            self._bases.append(next((b for b in map(self._path, node.bases) if b and takes_both(b)), ""))
        self.generic_visit(node)
        if isinstance(node, ast.ClassDef):
            self._bases.pop()
        self._within.pop()

    visit_FunctionDef = visit_AsyncFunctionDef = visit_ClassDef = _scope  # noqa: N815

    def visit_Assign(self, node: ast.Assign) -> None:  # noqa: N802
        """An alias is no use: what is called by it is read where it is called."""
        if self._path(node.value) not in MAKERS or not isinstance(node.targets[0], ast.Name):
            self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:  # noqa: N802
        """Calls of whatever takes a dtype and a device."""
        path, inner = self._path(node.func) or "", list(ast.iter_child_nodes(node))
        if path in ("partial", "functools.partial") and node.args:
            path = self._path(node.args[0]) or ""
            inner.remove(node.args[0]) if path in MAKERS else None
        if path in MAKERS and node.func in inner and self._path(node.func) in MAKERS:
            inner.remove(node.func)
        needed: tuple[str, ...] = ()
        if path in MAKERS or takes_both(path) or self._is_own(path):
            needed = NAMES
        elif path.startswith("torch.distributed.tensor.") and path.replace("distributed.tensor.", "") in MAKERS:
            needed = ("dtype",)
        elif isinstance(node.func, ast.Attribute) and node.func.attr == "__init__" and self._bases and self._bases[-1]:
            path, needed = self._bases[-1], NAMES
        if missing := self._missing(node, needed):
            self._fault(node, f"{path} names no {' and no '.join(missing)}")
        if path in LEGACY | SETTERS or (path == "torch.nn.Parameter" and not node.args and not node.keywords):
            self._fault(node, f"{path} follows or sets torch's defaults")
        if path == "torch.where" and len(node.args) == 3 and all(isinstance(a, ast.Constant) for a in node.args[1:]):
            self._fault(node, f"{path} makes a tensor of two numbers")
        for child in inner:
            self.visit(child)

    def _used(self, node: ast.Name | ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Load) and self._path(node) in MAKERS:
            self._fault(node, f"{self._path(node)} is handed on, and nobody sees with which dtype and device")
        else:
            self.generic_visit(node)

    visit_Name = visit_Attribute = _used  # noqa: N815


def faults(source: str, own: frozenset[str] = frozenset()) -> list[str]:
    return [fault.words for fault in Reader("file.py", ast.parse(textwrap.dedent(source)), own).faults]


def trees() -> dict[str, ast.Module]:
    files = sorted([*(ROOT / "peer_dist").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")])
    return {str(file.relative_to(ROOT)): ast.parse(file.read_text()) for file in files}


def all_faults() -> Iterator[Fault]:
    read = trees()
    own = own_takers(read)
    for file, tree in read.items():
        yield from Reader(file, tree, own).faults


def test_every_allocation_names_its_dtype_and_device():
    found = [fault for fault in all_faults() if not fault.place.startswith(PENDING)]
    assert not found, "\n".join(f"{fault.place.partition('::')[0]}:{fault.line} {fault.words}" for fault in found)
