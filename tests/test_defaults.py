"""Nothing depends on torch's default dtype or default device: what is allocated names both.

First every line of the package is read, then what a user reaches from Python is run under other defaults.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import fnmatch
import functools
import importlib
import inspect
import itertools
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._device import _device_constructors

from peer_dist.config import parse_config
from peer_dist.config.schema import DataConfig
from peer_dist.data.stream import open_data
from peer_dist.engines.revival import subkey_sources
from peer_dist.evaluation.generate import generate
from peer_dist.evaluation.loading import load_model, open_text
from peer_dist.evaluation.scoring import Request, score
from peer_dist.evaluation.usage_report import HeadUsage
from peer_dist.kernels import row_gradient
from peer_dist.measures.held_out import held_out_loss, make_micro_batch, unigram_loss
from peer_dist.measures.usage import ExpertUsage, share_histogram
from peer_dist.measures.usage_map import usage_map
from peer_dist.megatron import sparse_layers
from peer_dist.optim import TableOptimizer, TableRule
from peer_dist.optim.tables import KINDS
from peer_dist.planning.construct import RankModel, build_rank
from tests.ranks import run_ranks
from tests.runs import copy_checkpoint, in_folder, make_trainer, metrics_of, run_to_the_end, with_keys

ROOT = Path(__file__).parents[1]
ALLOWED = {
    f"peer_dist/export/*::{where}": "built as transformers builds any model, with what the files hold put in its place"
    for where in ("*.__init__", "*._build", "linear")
}
"""``file::function`` to why it may follow torch's defaults."""

NAMES = ("dtype", "device")
KINDS_OF_TENSOR = ("", "Float", "Double", "Half", "BFloat16", "Byte", "Char", "Short", "Int", "Long", "Bool")
LEGACY = {f"torch.{kind}Tensor" for kind in KINDS_OF_TENSOR}
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
def torch_takes(path: str) -> list[str]:
    """Parameters of a module of torch's, by its path, if its constructor takes a dtype and a device; else none."""
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name, None) if path.startswith("torch.") else None
    except ImportError:
        return []
    if not isinstance(found, type) or not issubclass(found, nn.Module):
        return []
    names = list(inspect.signature(found).parameters)
    return names if {*NAMES} <= {*names} else []


def module_of(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def own_takers(trees: dict[str, ast.Module]) -> dict[str, list[str]]:
    """By path, parameters of the package's classes and functions that take both and can be called without them."""
    found = {}
    for file, tree in trees.items():
        for node in ast.walk(tree):
            function = node
            if isinstance(node, ast.ClassDef):
                function = next((f for f in node.body if getattr(f, "name", "") == "__init__"), node)
            if isinstance(function, ast.FunctionDef) and getattr(node, "name", "") != "__init__":
                each = function.args
                optional = {a.arg for a, default in zip(each.kwonlyargs, each.kw_defaults) if default}
                optional |= {a.arg for a in each.args[len(each.args) - len(each.defaults) :]}
                if optional >= {*NAMES}:
                    found[f"{module_of(file)}.{node.name}"] = [a.arg for a in each.args if a.arg != "self"]
    return found


class Reader(ast.NodeVisitor):
    """Collects the places of a file that follow torch's defaults.

    Args:
        own: from :func:`own_takers`.

    Attributes:
        faults: file, line and what is wrong.
        spared: the keys of :data:`ALLOWED` that were of use.
    """

    def __init__(self, file: str, tree: ast.Module, own: dict[str, list[str]]) -> None:
        self.faults: list[tuple[str, int, str]] = []
        self.spared: set[str] = set()
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

    def _takes(self, path: str) -> list[str]:
        """Parameters of a class or a function, torch's or the package's, that takes both; else none."""
        folder, _, name = path.rpartition(".")
        folder = folder or module_of(self._file)
        if folder.partition(".")[0] != "peer_dist":
            return torch_takes(path)
        within = [f"{folder}.{name}"]
        if (ROOT / folder.replace(".", "/")).is_dir():  # a package, which hands on what is in its modules
            within += [own for own in self._own if own.startswith(f"{folder}.") and own.endswith(f".{name}")]
        return next((self._own[own] for own in within if own in self._own), [])

    def _missing(self, call: ast.Call, needed: tuple[str, ...], parameters: list[str]) -> list[str]:
        """Those of the two that a call does not name."""
        given = list(zip(parameters, call.args)) + [(keyword.arg, keyword.value) for keyword in call.keywords]
        named = set()
        for name, value in given:
            if name is None:
                named |= self._dicts.get(outside(value) or "", set())
            elif not (isinstance(value, ast.Constant) and value.value is None):
                named.add(name)
        return [name for name in needed if name not in named]

    def _fault(self, node: ast.expr, words: str) -> None:
        place = f"{self._file}::{'.'.join(self._within)}"
        spared = {allowed for allowed in ALLOWED if fnmatch.fnmatchcase(place, allowed)}
        self.spared |= spared
        if not spared:
            self.faults.append((self._file, node.lineno, words))

    def _scope(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> None:
        self._within.append(node.name)
        if isinstance(node, ast.ClassDef):
            self._bases.append(next((b for b in map(self._path, node.bases) if b and torch_takes(b)), ""))
        self.generic_visit(node)
        if isinstance(node, ast.ClassDef):
            self._bases.pop()
        self._within.pop()

    visit_FunctionDef = visit_AsyncFunctionDef = visit_ClassDef = _scope

    def visit_Assign(self, node: ast.Assign) -> None:
        """An alias is no use: what is called by it is read where it is called."""
        if self._path(node.value) not in MAKERS or not isinstance(node.targets[0], ast.Name):
            self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        """Calls of whatever takes a dtype and a device."""
        path, inner = self._path(node.func) or "", list(ast.iter_child_nodes(node))
        if path in ("partial", "functools.partial") and node.args:
            path = self._path(node.args[0]) or ""
            inner.remove(node.args[0]) if path in MAKERS else None
        if path in MAKERS and node.func in inner and self._path(node.func) in MAKERS:
            inner.remove(node.func)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "__init__" and self._bases and self._bases[-1]:
            path = self._bases[-1]
        parameters = self._takes(path)
        needed = NAMES if parameters or path in MAKERS else ()
        if path.startswith("torch.distributed.tensor.") and path.replace("distributed.tensor.", "") in MAKERS:
            needed = ("dtype",)
        if missing := self._missing(node, needed, parameters):
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

    visit_Name = visit_Attribute = _used


def trees() -> dict[str, ast.Module]:
    files = sorted([*(ROOT / "peer_dist").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")])
    texts = {str(file.relative_to(ROOT)): file.read_text() for file in files}
    return {file: ast.parse(text) for file, text in texts.items() if "torch" in text}


def test_every_allocation_names_its_dtype_and_device() -> None:
    files = trees()
    assert {"peer_dist/optim/tables.py", "benchmarks/layer.py"} <= files.keys()
    own = own_takers(files)
    assert own.keys() >= {"peer_dist.layers.peer.PEER", "peer_dist.layers.product_key_memory.ProductKeyMemory"}
    readers = [Reader(file, tree, own) for file, tree in files.items()]
    found = [fault for reader in readers for fault in reader.faults]
    assert not found, "\n".join(f"{file}:{line} {words}" for file, line, words in found)
    assert ALLOWED.keys() == set().union(*(reader.spared for reader in readers)), "what none needs any more"


@pytest.mark.parametrize(
    ("source", "faults"),
    [
        ("import torch\ntorch.zeros(3)", 1),
        ("import torch\ntorch.zeros(3, dtype=torch.float32)", 1),
        ("import torch\ntorch.zeros(3, dtype=None, device='cpu')", 1),
        ("import torch\ntorch.zeros(3, dtype=torch.float32, device='cpu')", 0),
        ("import torch\ntorch.zeros_like(x), x.new_zeros(3), torch.stack([x])", 0),
        ("import torch as t\nt.arange(3)", 1),
        ("from torch import zeros as z\nz(3)", 1),
        ("import torch\nz = torch.zeros\nz(3)", 1),
        ("import torch\nz = torch.zeros\nz(3, dtype=d, device=c)", 0),
        ("import torch\ngetattr(torch, 'zeros')(3)", 1),
        ("import torch\nmap(torch.tensor, numbers)", 1),
        ("import torch\n{'draw': torch.rand}", 1),
        ("import torch\ndef f(make=torch.empty): ...", 1),
        ("import torch, functools\nz = functools.partial(torch.zeros, dtype=d)", 1),
        ("import torch, functools\nz = functools.partial(torch.zeros, dtype=d, device=c)", 0),
        ("import torch\nboth = {'dtype': d, 'device': c}\ntorch.zeros(3, **both)", 0),
        ("import torch\nboth: dict = dict(dtype=d, device=c)\ntorch.zeros(3, **both)", 0),
        ("import torch\none = {'dtype': d}\ntorch.zeros(3, **one)", 1),
        ("import torch\ntorch.zeros(3, **options)", 1),
        ("import torch\ntorch.as_tensor(x), torch.from_numpy(x), torch.Generator(d)", 1),
        ("import torch\ntorch.sparse_coo_tensor(rows, values, dtype=d)", 1),
        ("import torch\ntorch.FloatTensor(3), torch.Tensor([1.0])", 2),
        ("import torch\ndef f(x: torch.Tensor) -> torch.Tensor: return isinstance(x, torch.Tensor)", 0),
        ("import torch\ntorch.where(mask, 1.0, 0.0), torch.where(mask, x, 0.0)", 1),
        ("import torch\ntorch.set_default_dtype(d)", 1),
        ("from torch import nn\nnn.Linear(3, 4)", 1),
        ("from torch import nn\nnn.Linear(3, 4, device=c)", 1),
        ("from torch import nn\nnn.Linear(3, 4, False, c, d), nn.GELU(), nn.ModuleList(x)", 0),
        ("import torch\ntorch.nn.GRUCell(3, 4), torch.nn.MultiheadAttention(3, 4)", 2),
        ("from torch import nn\nisinstance(x, nn.Linear)", 0),
        ("from torch.nn import Parameter\nParameter(), Parameter(x)", 1),
        ("from torch import nn\nclass A(nn.Linear):\n def __init__(self): super().__init__(3, 4)", 1),
        ("from torch import nn\nclass A(nn.Linear):\n def __init__(s): super().__init__(3, 4, device=c, dtype=d)", 0),
        ("from torch import nn\nclass A(nn.Module):\n def __init__(self): super().__init__()", 0),
        ("from peer_dist import PEER\nPEER(3, 4, device=c)", 1),
        ("from peer_dist.layers.peer import PEER as P\nP(3, 4), P(3, 4, c, d), P(3, 4, None, d)", 2),
        ("from peer_dist.export.layers.peer import PEER\nPEER(3, 4)", 0),
        ("from elsewhere import PEER\nPEER(3, 4)", 0),
        ("from torch.distributed.tensor import zeros\nzeros(3, device_mesh=m)", 1),
        ("from torch.distributed.tensor import zeros\nzeros(3, device_mesh=m, dtype=d)", 0),
    ],
)
def test_what_is_read_as_an_allocation(source: str, faults: int) -> None:
    own = {"peer_dist.layers.peer.PEER": ["dim", "num_experts", "device", "dtype"]}
    assert len(Reader("file.py", ast.parse(source), own).faults) == faults


# What a user reaches from Python, with everything as it is and under other defaults.

DTYPES = (torch.float64, torch.bfloat16, torch.float16)
DEFAULTS = (*((dtype, None) for dtype in DTYPES), (torch.float32, "context"), (torch.bfloat16, "default"))
"""Dtype, and how meta became the device."""


@contextlib.contextmanager
def under(dtype: torch.dtype, device: str | None) -> Iterator[None]:
    with contextlib.ExitStack() as undo:
        undo.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(dtype)
        if device == "context":
            undo.enter_context(torch.device("meta"))
        elif device == "default":
            undo.callback(torch.set_default_device, None)
            torch.set_default_device("meta")
        yield


def bits(value: Any) -> Any:
    """Something to compare, of tensors in whatever they are in."""
    if isinstance(value, torch.Tensor):
        value = value.detach().to_dense() if value.is_sparse else value.detach()
        assert value.device.type == "cpu"
        return str(value.dtype), tuple(value.shape), value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return bits(vars(value))
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, dict):
        return {key: bits(each) for key, each in value.items()}
    return [bits(each) for each in value] if isinstance(value, list | tuple) else value


def differing(make: Callable[[], dict[str, Any]]) -> dict[str, list[str]]:
    """For each of :data:`DEFAULTS` the names of what ``make`` gives otherwise than without any."""
    want = bits(make())
    found = {}
    for default in DEFAULTS:
        with under(*default):
            got = make()
        assert got.keys() == want.keys()
        found[str(default)] = [name for name, value in bits(got).items() if value != want[name]]
    return found


NONE: dict[str, list[str]] = {str(default): [] for default in DEFAULTS}


def stepped(
    table: torch.Tensor, grads: list[torch.Tensor], rule: TableRule, **groups: dist.ProcessGroup
) -> dict[str, Any]:
    """Table, state and norms after a step over each gradient; lazily, of the rows that are not 0 there."""
    table = table.clone().requires_grad_()
    optimizer = TableOptimizer({"t": table}, rule, 10, data_parallel_size=2, **groups)
    norms = []
    for grad in grads:
        rows = grad.abs().sum(1).nonzero()[:, 0]
        table.grad = row_gradient(rows, grad[rows], len(grad)) if rule.lazy else grad.clone()
        norms.append(optimizer.grad_norm(table.device))
        optimizer.step(0.5)
    norms.append(optimizer.grad_norm(table.device))  # of no gradient
    return {"table": table, "norms": norms, "state": [value for _, _, value in optimizer.state()]}


TABLES = ((torch.float32, None), *((dtype, None) for dtype in DTYPES), (torch.bfloat16, 3))
"""Their dtypes, and seeds of their rounding."""


def optimized(rank: int, world_size: int) -> dict[str, dict[str, list[str]]]:
    """Tables of every dtype on one rank; on more, with groups, of those that they might change something for."""
    generator = torch.Generator().manual_seed(rank)
    tables, groups = (TABLES, ("",)) if world_size == 1 else (TABLES[::4], ("copies", "columns"))
    found = {}
    for kind, lazy, (dtype, seed), group in itertools.product(KINDS, (False, True), tables, groups):
        table = torch.randn(7, 5, generator=generator).to(dtype)
        grads = [torch.randn(7, 5, generator=generator).to(dtype) for _ in range(2)]
        grads[1][(torch.arange(7) + (rank if group == "copies" else 0)) % 3 > 0] = 0
        rule = TableRule(kind, 0.02, (0.8, 0.9), 1e-4, 0.1, lazy, seed)
        make = functools.partial(stepped, table, grads, rule, **({group: dist.group.WORLD} if group else {}))
        found[f"{kind}, lazy {lazy}, {dtype}, {seed}, {group}"] = differing(make)
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_tables_step_the_same(ranks: int) -> None:
    """Every optimizer, with dense and sparse gradients, on copies and on columns."""
    for found in run_ranks(optimized, ranks):
        assert found == dict.fromkeys(found, NONE)


def test_measures_are_the_same() -> None:
    generator = torch.Generator().manual_seed(3)
    indices = torch.rand(40, 3, 64, generator=generator).argsort(-1)[..., :5]
    gates = torch.rand(40, 3, 5, generator=generator)
    tokens = torch.randint(0, 9, (4, 17), generator=generator)

    def measured() -> dict[str, Any]:
        usage, heads = ExpertUsage(64, torch.device("cpu")), HeadUsage(64, torch.device("cpu"))
        for part in (slice(25), slice(25, 40)):
            usage(indices[part], gates[part])
            heads(indices[part], gates[part])
        return {
            "shares": usage.shares(),
            "summary": usage.summary(3),
            "spread": usage.head_spread(),
            "histogram": share_histogram(usage.shares()),
            "map": usage_map(usage.shares()),
            "heads": dataclasses.asdict(heads.layer_usage(8)),
            "arrays": dict(heads.arrays(1, 8)),
            "unigram": unigram_loss(tokens[:2], tokens[2:], 9),
            "micro-batch": make_micro_batch(tokens, 0, torch.device("cpu")),
            "moved": subkey_sources(heads.counts.view(1, 2, -1)),
        }

    assert differing(measured) == NONE


def test_texts_are_read_the_same(text: Path) -> None:
    def read() -> dict[str, Any]:
        streams = open_data(DataConfig(prefix=str(text)), 16, 5)
        return {"train": streams.train.batch(range(5)), "held out": streams.validation.batch(range(3))}

    assert differing(read) == NONE


HARSH = ((torch.float64, "context"), (torch.bfloat16, "default"))
"""Two of :data:`DEFAULTS`' kinds at a time, for what takes longer."""

RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "PEER": (2, {"parallel": {"expert": 2}, "peer": {"revive_interval": 3}}),
    "ZeRO 0, lazy": (
        2,
        {
            "model": {"mlp": ["moe", "dense", "pkm"]},
            "pkm": {"num_values": 225, "heads": 2, "top_k": 4, "key_dim": 8},
            "moe": {"num_experts": 4, "score": "sigmoid", "expert_bias": True, "z_loss": 1e-3},
            "router": {"kind": "cosine", "state_size": 12},
            "parallel": {"tensor": 2, "sequence": True},
            "table_optimizer": {"name": "rowwise_adagrad", "lazy": True},
            "zero": {"stage": 0},
        },
    ),
    "ZeRO 3, bf16": (
        1,
        {
            "model": {"mlp": ["peer", "sigma_moe", "peer"]},
            "sigma_moe": {"num_experts": 4, "expert_hidden_size": 16, "top_k": 2, "expert_dropout": 0.2},
            "router": {"kind": "recurrent", "state_size": 12},
            "peer": {"query_norm": "rms", "table_dtype": "bfloat16"},
            "zero": {"stage": 3},
            "train": {"precision": "bf16"},
        },
    ),
}


def worked(rank: int, world_size: int, tree: dict[str, Any], dtype: torch.dtype, device: str | None) -> Any:
    """All that a run writes down, but times and memory, by step."""
    with under(dtype, device):
        run_to_the_end(rank, world_size, tree)
    apart = ("time/", "speed/", "memory/", "startup/", "checkpoint/")
    return {
        line["step"]: {name: value for name, value in line.items() if not name.startswith(apart)}
        for line in metrics_of(tree)
    }


@pytest.mark.parametrize("name", RUNS)
def test_runs_are_the_same(name: str, small: dict[str, Any], tmp_path: Path) -> None:
    """From the start, and going on from a checkpoint of one without other defaults."""
    ranks, settings = RUNS[name]
    small = with_keys(small, **{"checkpoint": {"keep": 3}, **settings})
    plain, fresh, resumed = (in_folder(small, tmp_path / name) for name in ("plain", "fresh", "resumed"))
    want = run_ranks(worked, ranks, plain, torch.float32, None)[0]
    assert len(want) == 11
    assert want[10]["train/loss"] < want[1]["train/loss"]
    assert run_ranks(worked, ranks, fresh, *HARSH[1])[0] == want
    copy_checkpoint(plain, resumed, 4)
    got = run_ranks(worked, ranks, resumed, *HARSH[0])[0]
    got.pop(5)  # its measures are of the steps since the last line, of which this run has made one
    assert got == {step: want[step] for step in range(6, 11)}


def saved(rank: int, world_size: int, tree: dict[str, Any]) -> None:
    make_trainer(tree).save()


def answered(rank: int, world_size: int, folder: str, text: str, dtype: torch.dtype, device: str | None) -> Any:
    """What is measured, scored and generated with a checkpoint."""
    with under(dtype, device):
        loaded = load_model(folder, world_size)
        stream = open_text(loaded, text, "validation").stream
        layers = sparse_layers(loaded.model)
        usage = {number: HeadUsage(layer.num_experts, loaded.parallel.device) for number, layer in layers.items()}
        loss = held_out_loss(loaded.model, stream, loaded.parallel, loaded.tokenizer, 3, 8, usage)
        requests = [Request(loaded.tokenizer.encode(words), 2) for words in ("To be, or not to be.", "ROMEO:" * 9)]
        options = ({"temperature": 0}, {"temperature": 1.0, "top_k": 50, "top_p": 0.9, "seed": 3})
        return bits(
            {
                "loss": loss,
                "usage": {number: each.counts for number, each in usage.items()},
                "scores": score(loaded, requests, 5, 2),
                "texts": [list(generate(loaded, ["ROMEO:", "To be, or"], 9, **each)) for each in options],
            }
        )


def test_models_answer_the_same(text: Path, small: dict[str, Any]) -> None:
    run_ranks(saved, 1, small)
    folder = small["checkpoint"]["dir"]
    want, *others = (run_ranks(answered, 2, folder, str(text), *each) for each in ((torch.float32, None), *HARSH))
    assert others == [want] * len(HARSH)


def built(rank: int, world_size: int, tree: dict[str, Any], dtype: torch.dtype, device: str | None) -> RankModel:
    dist.destroy_process_group()
    with under(dtype, device):
        return build_rank(parse_config(tree, "test"), 4, 1, 2, 384)


def test_ranks_are_built_the_same(small: dict[str, Any]) -> None:
    tree = with_keys(small, train={"global_batch_size": 16}, parallel={"tensor": 2})
    want, *others = (run_ranks(built, 1, tree, *each)[0] for each in ((torch.float32, None), *HARSH))
    assert want.parameters["dense"] > 0
    assert others == [want] * len(HARSH)
