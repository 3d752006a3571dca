"""The whole PEER layer, retrieval included, against PEER-pytorch on the same weights, as ratios in one run.

    pip install -e .[bench]
    python benchmarks/layer.py [--dim 256 --tokens 2048 --experts 1048576] [--json FILE]

PEER-pytorch is made to activate k = 16 experts per head (non_competing_scores=False; its default is one). It has
per-head keys and no query norm, and so has ours here. Both layers' table gradients: dense in PEER-pytorch, which
has no other; sparse (of the picked rows) and dense in ours.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from measure import device_name, peak_bytes, seconds, show, write_json
from torch import Tensor, nn

from peer_dist import PEER
from peer_dist.layers.product_keys import retrieve


def twins(dim: int, experts: int, heads: int, top_k: int, device: torch.device) -> tuple[PEER, nn.Module]:
    """Our layer and PEER-pytorch's with equal weights."""
    from PEER_pytorch import PEER as Theirs

    half = dim // 2
    ours = PEER(
        dim, experts, heads=heads, top_k=top_k, key_dim=2 * half, query_norm="none", shared_keys=False,
        sparse_grad=True, device=device,
    )  # fmt: skip
    theirs = Theirs(
        dim, heads=heads, num_experts=experts, num_experts_per_head=top_k, dim_key=half, non_competing_scores=False
    ).to(device)
    with torch.no_grad():
        weight = ours.query.weight.view(heads, 2, half, dim).transpose(0, 1).reshape(heads * 2 * half, dim)
        theirs.to_queries[0].weight.copy_(weight)
        theirs.keys.copy_(ours.keys.permute(0, 2, 1, 3))
    theirs.weight_down_embed.weight = nn.Parameter(ours.down.detach())  # the very same memory
    theirs.weight_up_embed.weight = nn.Parameter(ours.up.detach())
    return ours, theirs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--experts", type=int, default=1024**2)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    assert math.isqrt(options.experts) ** 2 == options.experts
    torch.manual_seed(0)
    ours, theirs = twins(options.dim, options.experts, options.heads, options.top_k, device)
    x = torch.randn(1, options.tokens, options.dim, device=device, requires_grad=True)
    dy = torch.randn_like(x)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-3, atol=1e-4)

    def both(layer: nn.Module) -> tuple[Tensor, ...]:
        return torch.autograd.grad(layer(x), [x, *layer.parameters()], dy)

    @torch.no_grad()
    def retrieval() -> tuple[Tensor, Tensor]:
        query = ours.query(x[0]).unflatten(-1, (ours.heads, ours.key_dim))
        return retrieve(query, ours.keys, ours.top_k)

    def forward(layer: nn.Module) -> Tensor:
        with torch.no_grad():
            return layer(x)

    rows: list[dict[str, Any]] = []
    for name, layer, sparse in (
        ("PEER-pytorch", theirs, False), ("peer_dist", ours, True), ("peer_dist, dense gradients", ours, False)
    ):  # fmt: skip
        if layer is ours:
            ours.sparse_grad = sparse
        touched = sum(
            p._values().nbytes + p._indices().nbytes if p.is_sparse else p.nbytes for p in both(layer)
        )  # what the call returns is no extra memory
        rows.append(
            {
                "layer": name,
                "forward_ms": 1e3 * seconds(lambda layer=layer: forward(layer), device, options.repeats),
                "both_ms": 1e3 * seconds(lambda layer=layer: both(layer), device, options.repeats),
                "extra_MB": (peak_bytes(lambda layer=layer: both(layer), device) - touched) / 1e6,
            }
        )
    for row in rows:
        row["forward_ratio"] = rows[0]["forward_ms"] / row["forward_ms"]
        row["both_ratio"] = rows[0]["both_ms"] / row["both_ms"]
        row["extra_share"] = row["extra_MB"] / rows[0]["extra_MB"]
    title = (
        f"PEER on {device_name(device)}: N={options.experts}, d={options.dim}, {options.heads} x {options.top_k} "
        f"picks, {options.tokens} tokens; retrieval alone {1e3 * seconds(retrieval, device):.1f} ms"
    )
    show(title, rows)
    write_json(options.json, {"title": title, "torch": torch.__version__, "rows": rows})


if __name__ == "__main__":
    main()
