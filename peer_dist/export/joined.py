"""The code of an exported model as one file: ``peer_model.py``, and the layers of the model's kinds."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator, Mapping
from importlib.util import resolve_name
from types import ModuleType

from peer_dist.export import peer_model
from peer_dist.export.peer_model import ExportedLayer
from peer_dist.kinds import KindError


def joined_source(layers: Mapping[str, type[ExportedLayer]]) -> str:
    """Python code that needs torch and safetensors alone: the model with layers of these kinds.

    The files in which the layers are defined, and those of ours that they import, follow ``peer_model.py``, each once
    and without their imports of each other.

    Args:
        layers: by the name that ``model.mlp`` has for the kind.

    Raises:
        KindError: a file imports what is not there for those who have torch alone, or two files define the same name.
    """
    modules: dict[str, ModuleType] = {peer_model.__name__: peer_model}
    for layer in layers.values():
        _collect(importlib.import_module(layer.__module__), layer.__module__.partition(".")[0], modules)
    imports: dict[str, set[str]] = {}
    defined: dict[str, str] = {}
    bodies = []
    for name, module in modules.items():
        source = inspect.getsource(module)
        tree = ast.parse(source)
        last = max(node.end_lineno or 0 for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom)))
        bodies.append("\n".join(source.splitlines()[last:]).strip())
        for node in tree.body:
            for new in _names(node):
                if new in defined:
                    raise KindError(f"{name} defines {new}, as {defined[new]} does; rename one: they become one file")
                defined[new] = name
            if isinstance(node, ast.Import):
                imports.setdefault("", set()).update(ast.unparse(ast.Import([alias])) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and _home(node, module) not in modules:
                imports.setdefault(_home(node, module), set()).update(map(ast.unparse, node.names))
    future = imports.pop("__future__", {"annotations"})
    lines = [
        f"from __future__ import {', '.join(sorted(future))}",
        *sorted(imports.pop("", set())),
        *(f"from {home} import {', '.join(sorted(names))}" for home, names in sorted(imports.items())),
    ]
    kinds = ", ".join(f"{kind!r}: {layer.__name__}" for kind, layer in layers.items())
    about = f'"""{inspect.cleandoc(peer_model.__doc__ or "")}\n"""'
    return "\n\n\n".join([about, "\n".join(lines), *bodies, f"LAYERS.update({{{kinds}}})"]) + "\n"


def _collect(module: ModuleType, package: str, modules: dict[str, ModuleType]) -> None:
    """Put what ``module`` imports of ours, and then itself, into ``modules``.

    Args:
        package: that a layer is defined in: what it has beside the layer is taken too.
    """
    if module.__name__ in modules:
        return
    for node in ast.parse(inspect.getsource(module)).body:
        if not isinstance(node, ast.ImportFrom):
            continue
        home = _home(node, module)
        if home.startswith(f"{__package__}.") or (package != "peer_dist" and home.partition(".")[0] == package):
            if any(alias.asname for alias in node.names):
                raise KindError(f"{module.__name__} renames what it imports from {home}; they become one file")
            _collect(importlib.import_module(home), package, modules)
        elif home.partition(".")[0] == "peer_dist":
            raise KindError(
                f"{module.__name__} imports {home}, which an exported model does not have; it may import "
                f"{__package__}, torch and the standard library"
            )
    modules[module.__name__] = module


def _home(node: ast.ImportFrom, module: ModuleType) -> str:
    """The full name of the module that ``node`` imports from."""
    return resolve_name("." * node.level + (node.module or ""), module.__package__)


def _names(node: ast.stmt) -> Iterator[str]:
    """What a line of a module defines."""
    if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
        yield node.name
    elif isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        yield from (target.id for target in targets if isinstance(target, ast.Name))
