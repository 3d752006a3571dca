"""What `peer-dist plan` predicts against what CPU ranks of this machine do, layout by layout.

    python benchmarks/plan.py [--hardware FILE] [--ranks N] [--only TEXT] [--steps N] [--rounds N] [--json FILE]

Weights, gradients and optimizer states must be equal, byte for byte (of lazy tables the gradients: near). Bytes of the
exchange are planned from the measured mean of row shards that a token hits. The peak of the passes is what was there
and the most that torch's allocator handed out beside it, by its profiler. Time is the median of some steps, in the
round of all layouts where it is the least: a machine's speed drifts. The hardware file is one of `peer-dist doctor
--calibrate FILE`, by default the package's placeholder `cpu`, whose times are worth nothing. Ranks have one thread
each: take no more of them than there are cores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from measure import device_name, show, write_json

from peer_dist.config import Config, parse_config
from peer_dist.data.prepare import prepare
from peer_dist.kernels import native
from peer_dist.planning.hardware import Hardware, load_hardware
from peer_dist.planning.layout import Layout
from peer_dist.planning.plan import plan
from peer_dist.planning.state import state

BASE: dict[str, Any] = {
    "model": {
        "num_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "ffn_hidden_size": 1024, "seq_length": 256,
        "mlp": ["dense", "peer", "dense", "peer"],
    },
    "peer": {"num_experts": 65536, "heads": 4, "top_k": 16, "key_dim": 128, "query_norm": "rms"},
    "train": {"micro_batch_size": 4, "global_batch_size": 16, "precision": "fp32"},
    "logging": {"interval": 1},
}  # fmt: skip
STATES = ("weights", "gradients", "optimizer")
ROWS, COLUMNS = {"expert": 2}, {"expert_tensor": 2}
SEQUENCE = {"tensor": 2, "sequence": True}
LAYOUTS: dict[str, dict[str, dict[str, Any]]] = {
    "replicated, ZeRO 0": {"zero": {"stage": 0}},
    "replicated, ZeRO 1": {},
    "rows, ZeRO 0": {"parallel": ROWS, "zero": {"stage": 0}},
    "rows, ZeRO 1": {"parallel": ROWS},
    "rows, ZeRO 3": {"parallel": ROWS, "zero": {"stage": 3}},
    "rows, micro-batch 1": {"parallel": ROWS, "train": {"micro_batch_size": 1}},
    "rows, recomputed": {"parallel": ROWS, "train": {"recompute_layers": 4}},
    "rows, 2 parts": {"parallel": ROWS, "peer": {"dispatch_chunks": 2}},
    "rows, lazy": {"parallel": ROWS, "table_optimizer": {"name": "rowwise_adagrad", "lazy": True}},
    "columns": {"parallel": COLUMNS},
    "tensor, rows": {"parallel": {**SEQUENCE, **ROWS}},
    "pipeline": {"parallel": {"pipeline": 2}},
}


def config_of(name: str, folder: str) -> Config:
    """The config of a layout of :data:`LAYOUTS`, with its folders in ``folder``."""
    tree = {section: dict(keys) for section, keys in BASE.items()}
    for section, keys in LAYOUTS[name].items():
        tree[section] = {**tree.get(section, {}), **keys}
    tree["data"] = {"prefix": f"{folder}/text"}
    tree["checkpoint"] = {"dir": f"{folder}/{name}/checkpoints"}
    tree["logging"] |= {"dir": f"{folder}/{name}/logs"}
    return parse_config(tree, name)


def run(rank: int, ranks: int, folder: str, name: str, steps: int) -> None:
    """A rank: train ``steps`` steps of a layout, and measure; rank 0 writes what all ranks measured into ``folder``."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{name}", rank=rank, world_size=ranks)
    from peer_dist.training import Trainer

    trainer = Trainer(config_of(name, folder))
    layout = Layout(trainer.config, ranks, ranks)
    vocab_size, itemsize = trainer.data.tokenizer.padded_vocab_size, trainer.dtype.itemsize
    trainer.step()
    seconds = [trainer.step()["time/step"] for _ in range(steps)]

    before, handed_out = trainer.engine.memory().values(), Passes(trainer.engine)
    values = trainer.step()
    wanted = state(layout, layout.place(rank), vocab_size, itemsize)
    mine = {
        "held": {part: round(values[f"memory/{part}_gb"] * 1e9) for part in STATES},
        "planned": {part: round(getattr(wanted, part)) for part in STATES},
        "peak": sum(part.weights + part.gradients + part.optimizer for part in before) + handed_out.most,
        "sent": values.get("exchange/bytes_per_token", 0.0) * trainer.config.train.global_batch_size
        * trainer.config.model.seq_length / ranks,
        "hits": values.get("exchange/row_shards_hit"),
        "seconds": statistics.median(seconds),
        "vocab_size": vocab_size,
    }  # fmt: skip
    everyone: list[Any] = [None] * ranks
    dist.all_gather_object(everyone, mine)
    if rank == 0:
        Path(folder, f"{name}.json").write_text(json.dumps(everyone))
    dist.barrier()
    os._exit(0)  # gloo's teardown is not what is measured


class Passes:
    """The most that torch's allocator hands out from the beginning of a step's passes to their end, ``most`` bytes.

    Stands between a trainer and its engine for one step: :meth:`Engine.accumulate` begins the passes, and what is asked
    when they have ended is :meth:`Engine.memory`.
    """

    def __init__(self, engine: Any) -> None:
        """Stand in for the engine's ``accumulate`` and ``memory``."""
        self.most = 0
        # gradients of large tables have memory of their own, which the profiler would not see
        native.gradient_memory = lambda rows, dim, dtype: torch.empty(rows, dim, dtype=dtype, device="cpu")
        self._begin, self._end = engine.accumulate, engine.memory
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        engine.accumulate, engine.memory = self._start, self._stop

    def _start(self) -> Any:
        self._profile.start()
        return self._begin()

    def _stop(self) -> Any:
        self._profile.stop()
        events = self._profile.profiler.kineto_results.events()  # type: ignore[union-attr]
        moves = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
        self.most = max(itertools.accumulate((size for _, size in moves), initial=0))
        return self._end()


def compare(name: str, folder: str, ranks: int, hardware: Hardware, seconds: float) -> dict[str, Any]:
    """One layout, predicted and measured; memory is that of the rank with the highest peak."""
    measured = json.loads(Path(folder, f"{name}.json").read_text())
    one = measured[0]
    predicted = plan(config_of(name, folder), ranks, ranks, hardware, one["vocab_size"], one["hits"])
    worst = max(measured, key=lambda rank: rank["peak"])
    forwards = predicted.wires["exchange"].total
    return {
        "layout": name,
        **{f"{part}_equal": all(rank["held"][part] == rank["planned"][part] for rank in measured) for part in STATES},
        **{f"{part}_MB": worst["held"][part] / 1e6 for part in STATES},
        "row_shards_hit": one["hits"],
        "sent_MB": one["sent"] / 1e6,
        "sent_MB_planned": forwards / 1e6,
        "peak_MB": worst["peak"] / 1e6,
        "peak_MB_planned": predicted.memory.passes_peak / 1e6,
        "peak_ratio": predicted.memory.passes_peak / worst["peak"],
        "step_ms": 1e3 * seconds,
        "step_ms_planned": 1e3 * predicted.times.total,
        "step_ratio": predicted.times.total / seconds,
        "planned_ms": {part: 1e3 * value for part, value in asdict(predicted.times).items()},
    }


def rank_correlation(first: list[float], second: list[float]) -> float:
    """Spearman's."""
    places = [torch.tensor(values, dtype=torch.float32, device="cpu").argsort().argsort() for values in (first, second)]
    return float(torch.corrcoef(torch.stack(places).double())[0, 1])


def main() -> None:
    """Measure what the command line asks for, and show it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", default="cpu")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--only", default="", help="layouts whose names have this in them")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    hardware = load_hardware(arguments.hardware)
    names = [name for name in LAYOUTS if arguments.only in name]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        prepare(None, Path(folder, "text"))
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(arguments.rounds):
            for name in names:
                multiprocessing.spawn(run, (arguments.ranks, folder, name, arguments.steps), arguments.ranks)
                seconds[name].append(json.loads(Path(folder, f"{name}.json").read_text())[0]["seconds"])
                Path(folder, f"store-{name}").unlink(missing_ok=True)
        for name in names:
            rows.append(compare(name, folder, arguments.ranks, hardware, min(seconds[name])))
            show(name, [{key: value for key, value in rows[-1].items() if key != "planned_ms"}])
    summary: dict[str, Any] = {
        "states_equal": all(row[f"{part}_equal"] for row in rows for part in STATES if "lazy" not in row["layout"]),
        "peak_ratio_least": min(row["peak_ratio"] for row in rows),
        "peak_ratio_most": max(row["peak_ratio"] for row in rows),
        "step_ratio_least": min(row["step_ratio"] for row in rows),
        "step_ratio_most": max(row["step_ratio"] for row in rows),
    }
    if len(rows) > 2:
        summary["step_rank_correlation"] = rank_correlation(
            [row["step_ms"] for row in rows], [row["step_ms_planned"] for row in rows]
        )
    show("all", [summary])
    machine = {"device": device_name(torch.device("cpu")), "ranks": arguments.ranks, "torch": torch.__version__}
    results = {"machine": machine, "hardware": hardware.model_dump(mode="json"), "summary": summary, "layouts": rows}
    write_json(arguments.json, results)


if __name__ == "__main__":
    main()
