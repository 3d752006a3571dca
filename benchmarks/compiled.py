"""A block with a PEER layer, compiled by torch.compile against eager, as ratios in one run.

    python benchmarks/compiled.py [--dim 256 --experts 65536] [--json FILE]

The block is ``x + PEER(LayerNorm(x))``, compiled in one graph (``fullgraph=True``). What the compiler can gain is what
lies between the kernels (norms, gates, sums); what it can lose is time per call. Hence two numbers of tokens.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from measure import device_name, seconds, show, write_json
from torch import Tensor, nn

from peer_dist import PEER


class Block(nn.Module):
    """``x + PEER(LayerNorm(x))``."""

    def __init__(self, dim: int, experts: int, query_norm: str, device: torch.device) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, device=device, dtype=torch.float32)
        self.ffw = PEER(
            dim, experts, heads=8, top_k=16, key_dim=128, query_norm=query_norm, output_gate=True, sparse_grad=False,
            seed=0, device=device, dtype=torch.float32,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffw(self.norm(x))


def main() -> None:
    """Measure what the command line asks for, and show it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--experts", type=int, default=256**2)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 2048])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device, rows = torch.device(options.device), []
    for query_norm in ("rms", "batch"):
        block = Block(options.dim, options.experts, query_norm, device)
        for tokens in options.tokens:
            torch._dynamo.reset()
            compiled = torch.compile(block, fullgraph=True)
            x = torch.randn(tokens, options.dim, dtype=torch.float32, device=device, requires_grad=True)
            dy = torch.randn_like(x)

            def both(call: Any, x: Tensor = x, dy: Tensor = dy, block: Block = block) -> Any:
                return torch.autograd.grad(call(x), [x, *block.parameters()], dy)

            def forward(call: Any, x: Tensor = x) -> Tensor:
                with torch.no_grad():
                    return call(x)

            agree = torch.isclose(forward(compiled), forward(block), rtol=1e-3, atol=1e-4).all(-1)
            assert agree.float().mean() > 0.99, "outputs differ by more than near-ties between experts"
            rounds = options.rounds * max(1, min(16, 2048 // tokens))  # short calls vary most
            runs = {
                "forward_ms": lambda forward=forward, block=block: forward(block),
                "compiled_forward_ms": lambda forward=forward, compiled=compiled: forward(compiled),
                "both_ms": lambda both=both, block=block: both(block),
                "compiled_both_ms": lambda both=both, compiled=compiled: both(compiled),
            }
            taken = {name: 1e3 * time for name, time in seconds(runs, device, rounds).items()}
            rows.append(
                {
                    "block": f"{query_norm} norm, {tokens} tokens",
                    "forward, eager / compiled": taken["forward_ms"] / taken["compiled_forward_ms"],
                    "both, eager / compiled": taken["both_ms"] / taken["compiled_both_ms"],
                    **taken,
                }
            )
    title = f"x + PEER(LayerNorm(x)) on {device_name(device)}: N={options.experts}, d={options.dim}, 8 x 16 picks"
    show(title, rows)
    write_json(options.json, {"title": title, "torch": torch.__version__, "rows": rows})


if __name__ == "__main__":
    main()
