"""The output layer with our cross-entropy and with Megatron-core's, forward + backward, as ratios in one run.

    python benchmarks/loss.py [--tokens 2048 --dim 256 --vocab 1024 8192 32768] [--dtype bfloat16] [--json FILE]

Both start from the same hidden states and weights, and their losses and gradients are compared first. Extra memory is
what torch's allocator handed out at most beyond the two gradients.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measure import device_name, extra_bytes, seconds, show, write_json
from torch import Tensor

from peer_dist.megatron import Parallel
from peer_dist.megatron.cross_entropy import cross_entropy


def main() -> None:
    """Measure what the command line asks for, and show it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--vocab", type=int, nargs="+", default=[1024, 8192, 32768])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        group = Parallel.initialize().tensor_group
        from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

        losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "megatron": vocab_parallel_cross_entropy,
            "ours": lambda logits, labels: cross_entropy(logits, labels, group),
        }
        for words in options.vocab:
            x = torch.randn(options.tokens, 1, options.dim, dtype=dtype, device=device, requires_grad=True)
            weight = (
                (torch.randn(words, options.dim, dtype=torch.float32, device=device) * 0.1).to(dtype).requires_grad_()
            )
            labels = torch.randint(words, (options.tokens, 1), dtype=torch.int64, device=device)

            def run(name: str, x: Tensor = x, weight: Tensor = weight, labels: Tensor = labels) -> tuple[Tensor, ...]:
                loss = losses[name](x @ weight.t(), labels).sum()
                return loss.detach(), *torch.autograd.grad(loss, (x, weight))

            for ours, theirs in zip(run("ours"), run("megatron"), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=3e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-2)
            runs = {name: lambda name=name, run=run: run(name) for name in losses}
            taken = seconds(runs, device, options.rounds)
            extra = {name: extra_bytes(runs[name], device) for name in losses}
            rows.append(
                {
                    "words": words,
                    "time, megatron / ours": taken["megatron"] / taken["ours"],
                    "extra memory, megatron / ours": extra["megatron"] / extra["ours"],
                    **{f"{name} ms": 1e3 * time for name, time in taken.items()},
                    **{f"{name} extra MB": size / 1e6 for name, size in extra.items()},
                }
            )
        dist.destroy_process_group()
    title = f"output layer and loss on {device_name(device)}: {options.tokens} tokens, d={options.dim}, {options.dtype}"
    show(title, rows)
    write_json(options.json, {"title": title, "torch": torch.__version__, "rows": rows})


if __name__ == "__main__":
    main()
