"""What one step asks of a GPU, counted by part without one: launches, bytes through memory, FLOPs and host waits.

    python benchmarks/counts.py [--tokens 8192 --experts 1048576] [--model configs/one-gpu.yaml] [--json FILE]

A layer's forward and backward pass, the gradient norm and the update of its tables, with dense and with sparse table
gradients, and as one rank of several with all ranks' tokens; the update alone in all its kinds; the sums over picks of
tables of eight bits; with --model also a
pass and a step of a whole model on one GPU, without what the trainer itself asks for. Nothing is measured:
benchmarks/counting.py says how it is counted, and milliseconds are the bytes at an H100's 3.35 TB/s. The floor is each
part's arguments read once and its results written once, of a table the rows that are picked at all; picks are uniform.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # makes collectives take tensors on meta
from counting import META, OTHER, Count, Counter, total
from floors import Sizes, floors, products_floor, update_floor
from measure import write_json
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from peer_dist import PEER
from peer_dist.kernels import Picks, expert_mix_backward, expert_mix_forward
from peer_dist.kernels.eight_bit import let_scales, scales_of
from peer_dist.kernels.rounding import Rounding
from peer_dist.kernels.updates import Step, update_rows
from peer_dist.layers import product_keys
from peer_dist.optim import TableOptimizer, TableRule
from peer_dist.optim.tables import KINDS
from peer_dist.sharding import ExpertGroups, exchange
from peer_dist.tracing import span

BYTES_PER_SECOND = 3.35e12
"""An H100's memory."""

PARTS = (
    "documents", "embedding", "norms", "projections of attention", "rotation", "attention", "dense feed-forward",
    "queries", "retrieval", "dispatch", "experts", "combine", "sort", "table gradients", "output layer",
    "cross-entropy", OTHER, "gradient norm", "update of tables", "update of the dense part",
)  # fmt: skip
"""In the order of the table."""


@contextmanager
def group_of(ranks: int) -> Iterator[None]:
    """This process as one of so many, of which the others need not be there."""
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def sizes_on_host(sizes: Sizes, counter: Counter) -> Callable[[Tensor], np.ndarray]:
    """What the exchange asks the device for: tokens and picks between each two ranks, all alike."""

    def counts(value: Tensor) -> np.ndarray:
        counter.here().add(waits=1)
        parts = value.shape[-2]
        cut = [sizes.sent // sizes.ranks * part // parts for part in range(parts + 1)]
        tokens = np.diff(cut)
        each = np.stack([tokens, tokens * sizes.picks // sizes.sent], -1)
        return np.broadcast_to(each, value.shape).copy()

    return counts


def layer_step(sizes: Sizes, kind: str, lazy: bool, one_pass: bool = False) -> Counter:
    """One step of a layer's tables: forward, backward, gradient norm, update; with one pass in a step, or several."""
    counter = Counter(lambda picks: sizes.hit(picks, sizes.rows))
    with (
        group_of(sizes.ranks),
        patch.dict(product_keys.CHUNK_TOKENS, meta=8192),
        patch.object(exchange, "on_host", sizes_on_host(sizes, counter)),
    ):
        group = ExpertGroups.over(dist.group.WORLD) if sizes.ranks > 1 else None
        layer = PEER(
            sizes.dim, sizes.experts, heads=sizes.heads, top_k=sizes.top_k, key_dim=sizes.key_dim, sparse_grad=lazy,
            group=group, device=META, dtype=torch.bfloat16,
        )  # fmt: skip
        rule = TableRule(kind, 1e-3, (0.9, 0.99), 1e-8, 0.1, lazy=lazy)
        tables = {"down": layer.down, "up": layer.up}
        x = torch.empty(sizes.tokens, sizes.dim, device=META, dtype=torch.bfloat16, requires_grad=True)
        with counter:
            optimizer = TableOptimizer(tables, rule, sizes.dim, data_parallel_size=sizes.ranks, one_pass=one_pass)
            for _ in range(2):  # the first step makes what is made once
                counter.parts.clear()
                layer.zero_grad()
                y = layer(x)
                y.backward(torch.empty_like(y))
                optimizer.grad_norm(META)
                optimizer.step(0.5)
    return counter


def table_update(sizes: Sizes, kind: str, lazy: bool, stochastic: bool) -> Count:
    """The update of both tables alone; with stochastic rounding there are no masters."""
    rule = TableRule(kind, 1e-3, (0.9, 0.99), 1e-8, 0.1, lazy=lazy, rounding_seed=1 if stochastic else None)
    table = torch.empty(sizes.rows, sizes.dim, device=META, dtype=torch.bfloat16)
    tables = {name: table.clone().requires_grad_() for name in ("down", "up")}
    hit = sizes.hit(sizes.picks, sizes.rows)
    with group_of(1), Counter() as counter:
        optimizer = TableOptimizer(tables, rule, sizes.dim)
        for each in tables.values():
            if lazy:
                rows = torch.empty(1, hit, dtype=torch.int64, device=META)
                options: Any = {"is_coalesced": True, "check_invariants": False}
                grad = torch.sparse_coo_tensor(
                    rows, table[:hit], table.shape, device=META, dtype=table.dtype, **options
                )
            else:
                grad = torch.empty_like(table)
            each.backward(grad)
        counter.parts.clear()
        optimizer.step(0.5)
    return total(counter.parts.values())


def eight_bit_tables(sizes: Sizes) -> list[Tensor]:
    """Codes with scales; the two formats ask for the same."""
    tables = [torch.empty(sizes.rows, sizes.dim, device=META, dtype=torch.int8) for _ in range(2)]
    for table in tables:
        let_scales(table, torch.empty(sizes.rows, device=META, dtype=torch.float32))
    return tables


def eight_bit_update(sizes: Sizes, kind: str) -> Count:
    """The lazy update of both tables, by the gradients of their picked rows in bfloat16."""
    tables = eight_bit_tables(sizes)
    hit = sizes.hit(sizes.picks, sizes.rows)
    rows = torch.empty(hit, dtype=torch.int64, device=META)
    grad = torch.empty(hit, sizes.dim, dtype=torch.bfloat16, device=META)
    step = Step.of(kind, 1e-3, (0.9, 0.99), 1e-8, 0.1, count=1, scale=1.0, dim=sizes.dim, lazy=True)
    matrix, vector = (
        torch.empty(*shape, device=META, dtype=torch.float32) for shape in (tables[0].shape, [sizes.rows])
    )
    moments = {} if kind == "rowwise_adagrad" else {"exp_avg": matrix}
    moments |= {"exp_avg_sq": matrix} if kind == "adam" else {"row_sq": vector}
    with Counter() as counter:
        for table in tables:
            update_rows(
                step, grad, table, moments, rows=rows, rounding=Rounding(1, 0, 0), scales=scales_of(table)
            )  # fmt: skip
    return total(counter.parts.values())


def products(sizes: Sizes, eight_bit: bool) -> tuple[Count, Count]:
    """The sums over picks of one layer, forward and backward, without the tables' gradients."""
    x = torch.empty(sizes.tokens, sizes.dim, device=META, dtype=torch.bfloat16)
    gate = torch.empty(sizes.picks, device=META, dtype=torch.float32)
    down, up = eight_bit_tables(sizes)
    if not eight_bit:
        down, up = (torch.empty(table.shape, device=META, dtype=torch.bfloat16) for table in (down, up))
    with Counter(lambda picks: sizes.hit(picks, sizes.rows)) as counter, torch.no_grad():
        picks = Picks.even(torch.empty(sizes.tokens, sizes.heads * sizes.top_k, device=META, dtype=torch.int64))
        counter.parts.clear()
        _, pre = expert_mix_forward(x, picks, gate, down, up, "gelu")
        forward = total(counter.parts.values())
        counter.parts.clear()
        expert_mix_backward(x, x, picks, pre, gate, down, up, "gelu")
    return forward, total(counter.parts.values())


class _OnMeta(TorchFunctionMode):
    """What is made on a device is made on meta: Megatron names the device that it wants."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **{**(kwargs or {}), **({"device": META} if (kwargs or {}).get("device") else {})})


def _alone(everyone: list[Any], mine: Any, group: Any = None) -> None:
    everyone[:] = [mine]


def model_step(config_file: Path, vocabulary: int, micro_batch_size: int | None) -> tuple[Counter, int]:
    """One pass and a step of a model on one GPU, with documents; and the pass's tokens."""
    from peer_dist.config import load_config
    from peer_dist.engines.building import join_groups, make_engine
    from peer_dist.measures.held_out import make_micro_batch
    from peer_dist.megatron import attention, build_model, run_forward_backward, sparse_layers

    overrides = ["zero.stage=0", "parallel.expert=1", "data.prefix=unused"]
    config = load_config(config_file, overrides)
    batch = micro_batch_size or config.train.micro_batch_size
    tokens = batch * config.model.seq_length
    rows = [shape.rows for shape in (kind.tables(config) for kind in config.kinds) if shape]
    # two documents of half a sequence each, in which a query sees half of the keys
    seen = config.model.seq_length / 4
    counter = Counter(lambda picks: Sizes().hit(picks, rows[0]) if rows else picks, seen)
    with (
        group_of(1),
        patch.dict(product_keys.CHUNK_TOKENS, meta=8192),
        patch.object(attention, "_flash_takes", lambda *_: True),  # which asks for CUDA's own choice
    ):
        parallel = join_groups(config, META)
        model = build_model(config, parallel, vocabulary, torch.bfloat16)
        for layer in sparse_layers(model).values():
            layer.release_shards()
        for module in model.modules():  # what Megatron moves to the device when it first meets it
            for name, value in list(vars(module).items()):
                if isinstance(value, Tensor) and value.device != META:
                    setattr(module, name, value.to(META))
        sequences = torch.full((batch, config.model.seq_length + 1), 1, dtype=torch.int64, device="cpu")
        sequences[:, config.model.seq_length // 2] = 0  # ends a document
        with META, _OnMeta(), patch.object(dist, "all_gather_object", _alone):
            engine = make_engine(config, model, parallel, torch.bfloat16)
        with counter:
            for _ in range(2):
                counter.parts.clear()
                with engine.accumulate():
                    losses = run_forward_backward(model, [make_micro_batch(sequences, 0, META)], 1 / tokens)
                with span("optimizer"):
                    loss = losses.sum().double().view(1)  # is read before the update
                    engine.read(loss)
                    engine.step(1e-3, 1e-3)
        parallel.destroy()
    return counter, tokens


def rows_of(parts: dict[tuple[str, str], Count], least: dict[tuple[str, str], int]) -> list[dict[str, Any]]:
    """The lines of a table, the sum last."""
    order = {part: place for place, part in enumerate(PARTS)}
    if parts["sort", "forward"].bytes > parts["sort", "backward"].bytes:  # one that was made there serves both passes
        least = {("sort", "forward") if key == ("sort", "backward") else key: floor for key, floor in least.items()}
    keys = sorted(parts, key=lambda key: (key[1] == "backward", order.get(key[0], len(order))))
    ends = [key for key in keys if key[0] in PARTS[-3:]]  # norm and updates come last
    lines = [(*key, parts[key], least.get(key, 0)) for key in [key for key in keys if key not in ends] + ends]
    lines.append(("in all", "", total(parts.values()), sum(least[key] for key in parts if key in least)))
    return [row_of(part, phase, count, floor) for part, phase, count, floor in lines if count != Count()]


def row_of(part: str, phase: str, count: Count, floor: int) -> dict[str, Any]:
    """A line of a table, and of the JSON."""
    return {
        "part": part,
        "pass": "" if part in PARTS[-3:] else phase,
        "launches": count.launches,
        "bytes": count.bytes,
        "flops": count.flops,
        "waits": count.waits,
        "floor_bytes": floor,
        "ms": 1e3 * count.bytes / BYTES_PER_SECOND,
        "floor_ms": 1e3 * floor / BYTES_PER_SECOND,
        "share_of_floor": floor / count.bytes if count.bytes else 0.0,
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table as Markdown; without floors where no part has one."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "part": lambda row: row["part"] + (f", {row['pass']}" if row["pass"] else ""),
        "launches": lambda row: str(row["launches"]),
        "GB": lambda row: f"{row['bytes'] / 1e9:.3f}",
        "GFLOP": lambda row: f"{row['flops'] / 1e9:.1f}",
        "waits": lambda row: str(row["waits"]),
        "ms at 3.35 TB/s": lambda row: f"{row['ms']:.3f}",
    }
    if any(row["floor_bytes"] for row in rows):
        columns |= {
            "floor, GB": lambda row: f"{row['floor_bytes'] / 1e9:.3f}" if row["floor_bytes"] else "",
            "floor, ms": lambda row: f"{row['floor_ms']:.3f}" if row["floor_bytes"] else "",
            "floor / bytes": lambda row: f"{row['share_of_floor']:.2f}" if row["floor_bytes"] else "",
        }
    lines = [list(columns), ["---"] * len(columns), *([cell(row) for cell in columns.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def show_counts(title: str, rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    head, _, *lines = markdown(rows).splitlines()
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(head.strip("| ").split(" | ")):
        table.add_column(name, justify="right" if number else "left")
    for line in lines:
        table.add_row(*(cell.strip() for cell in line[1:-1].split("|")))
    Console(width=150).print(table)


def main() -> None:
    """Count what the command line asks for, and show it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=1024**2)
    parser.add_argument("--optimizer", choices=KINDS, default="rowwise_adam")
    parser.add_argument("--ranks", type=int, default=8, help="of the layer that is spread over ranks")
    parser.add_argument("--model", type=Path, metavar="CONFIG", help="a run's config, whose model is counted too")
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--micro-batch-size", type=int, help="by default the config's")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    cases: dict[str, list[dict[str, Any]]] = {}
    for ranks, lazy, one_pass in ((1, False, True), (1, True, False), (1, True, True), (options.ranks, False, True)):
        sizes = Sizes(options.tokens, options.dim, options.experts, ranks=ranks)
        counter = layer_step(sizes, options.optimizer, lazy, one_pass)
        spread = f", one of {ranks} ranks" if ranks > 1 else ""
        title = f"PEER, {sizes.tokens} tokens, d={sizes.dim}, N={sizes.experts}, bfloat16, {options.optimizer}"
        gradients = ("sums for" if one_pass else "sparse") if lazy else "dense"
        title += f" with float32 masters, {gradients} gradients{spread}"
        cases[title] = rows_of(counter.parts, floors(sizes, options.optimizer, lazy, one_pass))
    sizes, rows = Sizes(options.tokens, options.dim, options.experts), []
    for kind, lazy, stochastic in itertools.product(KINDS, (False, True), (False, True)):
        name = f"{kind}, {'lazy' if lazy else 'dense'}, {'stochastic rounding' if stochastic else 'float32 masters'}"
        count = table_update(sizes, kind, lazy, stochastic)
        rows.append(row_of(name, "", count, update_floor(sizes, kind, lazy, stochastic)))
    for kind in KINDS:
        floor = update_floor(sizes, kind, True, True, eight_bit=True)
        rows.append(row_of(f"{kind}, lazy, eight bits", "", eight_bit_update(sizes, kind), floor))
    cases[f"The update of two tables, {sizes.experts} x {sizes.dim}, bfloat16, uniform picks"] = rows
    rows = []
    for eight_bit in (False, True):
        forward, backward = products(sizes, eight_bit)
        floor = products_floor(sizes, *((1, 4) if eight_bit else (sizes.item, 0)))
        name = "eight bits" if eight_bit else "bfloat16"
        rows += [row_of(f"tables of {name}", "forward", forward, floor)]
        rows += [row_of(f"tables of {name}", "backward", backward, floor + 4 * sizes.picks)]
    cases[f"The sums over picks, {sizes.tokens} tokens, d={sizes.dim}, N={sizes.experts}, uniform picks"] = rows
    if options.model:
        counter, tokens = model_step(options.model, options.vocabulary, options.micro_batch_size)
        cases[f"`{options.model}`, a pass of {tokens} tokens and the step"] = rows_of(counter.parts, {})
    for title, rows in cases.items():
        show_counts(title, rows)
    write_json(options.json, {"counted": True, "torch": torch.__version__, "cases": cases})


if __name__ == "__main__":
    main()
