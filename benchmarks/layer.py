"""The whole PEER layer, retrieval included, against PEER-pytorch on the same weights, as ratios in one run.

    pip install -e .[bench]
    python benchmarks/layer.py [--dim 256 --tokens 2048 --experts 1048576] [--json FILE]

PEER-pytorch is made to activate k = 16 experts per head (non_competing_scores=False; its default is one). It has
per-head keys and no query norm, and so has ours here. Table gradients are dense in PEER-pytorch, which has no other;
in ours sparse (of the picked rows) and dense. Extra memory: beyond results and gradients, forward + backward.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from measure import device_name, extra_bytes, seconds, show, write_json
from torch import Tensor, nn

from peer_dist import PEER
from peer_dist.layers.product_keys import retrieve


def twins(dim: int, experts: int, heads: int, top_k: int, device: torch.device) -> tuple[PEER, nn.Module]:
    """Our layer and PEER-pytorch's with equal weights."""
    from PEER_pytorch import PEER as Theirs

    half = dim // 2
    ours = PEER(
        dim, experts, heads=heads, top_k=top_k, key_dim=2 * half, query_norm="none", shared_keys=False,
        sparse_grad=True, dtype=torch.float32, device=device,
    )  # fmt: skip
    theirs = Theirs(
        dim, heads=heads, num_experts=experts, num_experts_per_head=top_k, dim_key=half, non_competing_scores=False
    ).to(device, torch.float32)
    with torch.no_grad():
        weight = ours.query.weight.view(heads, 2, half, dim).transpose(0, 1).reshape(heads * 2 * half, dim)
        theirs.to_queries[0].weight.copy_(weight)
        theirs.keys.copy_(ours.keys.permute(0, 2, 1, 3))
    theirs.weight_down_embed.weight = nn.Parameter(ours.down.detach())  # the very same memory
    theirs.weight_up_embed.weight = nn.Parameter(ours.up.detach())
    return ours, theirs


@torch.no_grad()
def check(ours: PEER, theirs: nn.Module, x: Tensor) -> None:
    """Outputs agree, but for tokens whose last pick and best omission have equal scores up to rounding."""
    apart = ~torch.isclose(ours(x), theirs(x), rtol=1e-3, atol=1e-4).all(-1)[0]
    scores = retrieve(ours.query(x[0]).unflatten(-1, (ours.heads, -1)), ours.keys, ours.top_k + 1)[1]
    margin = (scores[..., -2] - scores[..., -1]).amin(-1)
    assert (margin[apart] < 1e-5).all(), f"outputs differ where picks do not: margins {margin[apart]}"
    print(f"outputs agree; {int(apart.sum())} of {apart.numel()} tokens have a near-tie (margin < 1e-5)")


def main() -> None:
    """Measure what the command line asks for, and show it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--experts", type=int, default=1024**2)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    assert math.isqrt(options.experts) ** 2 == options.experts
    torch.manual_seed(0)
    ours, theirs = twins(options.dim, options.experts, options.heads, options.top_k, device)
    x = torch.randn(1, options.tokens, options.dim, dtype=torch.float32, device=device, requires_grad=True)
    dy = torch.randn_like(x)
    check(ours, theirs, x)

    def both(layer: nn.Module) -> tuple[Tensor, ...]:
        y = layer(x)
        return y, *torch.autograd.grad(y, [x, *layer.parameters()], dy)

    def forward(layer: nn.Module) -> Tensor:
        with torch.no_grad():
            return layer(x)

    @torch.no_grad()
    def retrieval() -> tuple[Tensor, Tensor]:
        return ours._retrieve(x[0])

    rows: list[dict[str, Any]] = [
        {"layer": "PEER-pytorch", "extra_MB": extra_bytes(lambda: both(theirs), device) / 1e6}
    ]
    for sparse in (True, False):
        ours.sparse_grad = sparse
        runs = {
            "forward_ms": lambda: forward(ours),
            "their_forward_ms": lambda: forward(theirs),
            "both_ms": lambda: both(ours),
            "their_both_ms": lambda: both(theirs),
        }
        if sparse:
            runs["retrieval_ms"] = retrieval
        taken = {name: 1e3 * time for name, time in seconds(runs, device, options.rounds).items()}
        row = {"layer": f"peer_dist, {'sparse' if sparse else 'dense'} gradients"}
        row |= {"forward_ratio": taken["their_forward_ms"] / taken["forward_ms"]}
        row |= {"both_ratio": taken["their_both_ms"] / taken["both_ms"]}
        for name in ("forward_ms", "both_ms"):
            rows[0].setdefault(name, taken.pop(f"their_{name}"))
        row |= {name: time for name, time in taken.items() if not name.startswith("their")}
        row["extra_MB"] = extra_bytes(lambda: both(ours), device) / 1e6
        row["extra_share"] = row["extra_MB"] / rows[0]["extra_MB"]
        rows.append(row)
    title = (
        f"PEER on {device_name(device)}: N={options.experts}, d={options.dim}, {options.heads} x {options.top_k} "
        f"picks, {options.tokens} tokens"
    )
    show(title, rows)
    write_json(options.json, {"title": title, "torch": torch.__version__, "rows": rows})


if __name__ == "__main__":
    main()
