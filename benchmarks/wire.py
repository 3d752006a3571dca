"""What rows that travel rounded do to the loss: the shipped text, with `parallel.wire` off, bfloat16 and float8.

    python benchmarks/wire.py [--steps N] [--seeds 1 2 3] [--json FILE]

A small model in float32, the tables' rows over two CPU ranks; all four feed-forward layers are PEER, so that what comes
out of one exchange goes into the next. Every setting trains from every seed (of weights and of the order of the text).
The table has the held-out loss, its difference from the same seed with the wire off, and the bytes that the exchange
sent per token, counted; below it, how far apart the seeds themselves are.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from measure import device_name, show, write_json

from peer_dist.config import parse_config
from peer_dist.data.prepare import prepare

RANKS = 2
BASE: dict[str, Any] = {
    "model": {
        "num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "ffn_hidden_size": 192, "seq_length": 64,
        "mlp": "peer",
    },
    "peer": {"num_experts": 4096, "heads": 4, "top_k": 8, "key_dim": 32},
    "optimizer": {"lr": 4e-3, "decay_steps": 600},
    "table_optimizer": {"lr": 8e-3},
    "train": {"micro_batch_size": 4, "global_batch_size": 8, "precision": "fp32"},
}  # fmt: skip
WIRES = (None, "bfloat16", "float8")


def run(rank: int, folder: str, wire: str | None, seed: int, steps: int) -> None:
    """A rank: train, measure the held-out loss; rank 0 writes it."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store-{wire}-{seed}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    from peer_dist.training import Trainer

    tree = {section: dict(keys) for section, keys in BASE.items()}
    tree["parallel"] = {"expert": RANKS, "wire": wire}
    tree["train"] |= {"seed": seed, "steps": steps}
    tree["data"] = {"prefix": f"{folder}/text"}
    tree["checkpoint"] = {"dir": f"{folder}/checkpoints"}
    tree["logging"] = {"dir": f"{folder}/logs"}
    trainer = Trainer(parse_config(tree, str(wire)))
    losses = [trainer.step() for _ in range(steps)]
    row = {
        "wire": wire or "off",
        "seed": seed,
        "held_out_loss": trainer.validate()["val/loss"],
        "train_loss_last_50": statistics.mean(values["train/loss"] for values in losses[-50:]),
        "bytes_per_token": statistics.mean(values["exchange/bytes_per_token"] for values in losses),
    }
    if rank == 0:
        Path(folder, "row.json").write_text(json.dumps(row))
    dist.barrier()
    os._exit(0)  # gloo's teardown is not what is measured


def main() -> None:
    """Train what the command line asks for, and show it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        prepare(None, Path(folder, "text"))
        for seed in options.seeds:
            for wire in WIRES:
                multiprocessing.spawn(run, (folder, wire, seed, options.steps), RANKS)
                row = json.loads(Path(folder, "row.json").read_text())
                off = row if wire is None else next(one for one in rows if one["seed"] == seed)  # which came first
                rows.append(row | {"from_off": row["held_out_loss"] - off["held_out_loss"]})
                print(rows[-1], flush=True)
    title = f"{options.steps} steps on the shipped text, {RANKS} ranks, on {device_name(torch.device('cpu'))}"
    show(title, rows)
    off = [row["held_out_loss"] for row in rows if row["wire"] == "off"]
    spread = max(off) - min(off)
    print(f"held-out losses of {len(off)} seeds with the wire off: {min(off):.4f} to {max(off):.4f}")
    results = {"title": title, "torch": torch.__version__, "seeds_apart": spread, "base": BASE, "rows": rows}
    write_json(options.json, results)


if __name__ == "__main__":
    main()
