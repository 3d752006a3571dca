"""Retrieval against plain PyTorch: a product per head, two torch.topk and one of pairs, and sums over picks backward.

    python benchmarks/retrieval.py                      sizes for this machine's device
    python benchmarks/retrieval.py --top-k 8 16 32 64   one row each (also: --key-dim)
    python benchmarks/retrieval.py --json FILE

All calls take turns in one run, and results are compared first. On a GPU the plain way is how retrieval was computed
before it had kernels. On a CPU only top-k differs, which is a search in C; the sums over picks are the same.

On a GPU there is a floor: the FLOPs of the products at the speed of a large matrix product in the same rounds, plus the
bytes of queries, sub-keys and results at the copy bandwidth. The backward pass counts both gradients as products.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import device_name, extra_bytes, large_copy, seconds, show, write_json
from torch import Tensor

from peer_dist.kernels import Picks, backend
from peer_dist.kernels.reference import top_pairs
from peer_dist.layers.product_keys import CHUNK_TOKENS, retrieve


def plain(query: Tensor, keys: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Numbers and scores as :func:`retrieve` returns them, by scores that pass through memory."""
    halves = query.float().unflatten(-1, (2, -1)).permute(1, 2, 0, 3)  # [heads, 2, tokens, key_dim / 2]
    numbers, best = [], []
    for head in halves:
        chunks = head.split(CHUNK_TOKENS[query.device.type], 1)
        found = [top_pairs(*torch.bmm(chunk, keys.float().transpose(-1, -2)), top_k) for chunk in chunks]
        numbers.append(torch.cat([number for number, _ in found]))
        best.append(torch.cat([score for _, score in found]))
    return torch.stack(numbers, 1), torch.stack(best, 1)


def plain_backward(dscores: Tensor, numbers: Tensor, query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of queries and keys by sums over the picks of a chunk, which are sorted on a GPU."""
    n, half = keys.shape[-2:]
    dquery, dkeys = torch.empty_like(query), torch.zeros_like(keys, dtype=torch.float32)
    for part in torch.arange(len(query), dtype=torch.int64, device="cpu").split(CHUNK_TOKENS[query.device.type]):
        chunk = slice(int(part[0]), int(part[-1]) + 1)
        rows = torch.stack([numbers[chunk] // n, numbers[chunk] % n + n], 2).flatten(0, 2)
        picks, dpicked = Picks.even(rows), dscores[chunk, :, None].expand(-1, -1, 2, -1).flatten()
        ops = backend(query, keys)
        ops.table_grad(dpicked, query[chunk].reshape(-1, half), picks, dkeys.view(-1, half))
        dquery[chunk] = ops.mix(dpicked, keys.view(-1, half), picks).view(query[chunk].shape)
    return dquery, dkeys.to(keys.dtype)


def measure(options: argparse.Namespace, top_k: int, key_dim: int) -> dict[str, Any]:
    """One size: milliseconds, ratios, memory and the share of the floor."""
    torch.manual_seed(0)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    query = torch.randn(options.tokens, options.heads, key_dim, dtype=torch.float32, device=device).to(dtype)
    keys = torch.randn(2, options.sub_keys, key_dim // 2, dtype=torch.float32, device=device)
    keys = (keys / key_dim**0.5).to(dtype)
    leaves = [query.requires_grad_(), keys.requires_grad_()]
    numbers, scores = retrieve(query, keys, top_k)
    dscores = torch.randn_like(scores)
    values = query.detach(), keys.detach()
    torch.testing.assert_close(plain(*values, top_k)[1], scores.detach(), rtol=1e-4, atol=1e-4)

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(scores, leaves, dscores, retain_graph=True)

    for mine, other in zip(backward(), plain_backward(dscores, numbers, *values)):
        torch.testing.assert_close(mine, other, rtol=2e-2, atol=2e-2 * float(other.abs().max()))
    runs: dict[str, Callable[[], Any]] = {
        "forward_ms": lambda: retrieve(*values, top_k),
        "plain_forward_ms": lambda: plain(*values, top_k),
        "backward_ms": backward,
        "plain_backward_ms": lambda: plain_backward(dscores, numbers, *values),
    }
    copied, copy = large_copy(device)
    square = torch.randn(4096 if device.type == "cuda" else 1024, 4096, dtype=torch.float32, device=device).to(dtype)
    runs |= {"copy_ms": copy, "product_ms": lambda: square @ square.T}
    row: dict[str, Any] = {"top_k": top_k, "key_dim": key_dim}
    row |= {name: 1e3 * time for name, time in seconds(runs, device, options.rounds).items()}
    bandwidth = copied / row.pop("copy_ms")
    speed = 2 * len(square) ** 2 * square.shape[1] / row.pop("product_ms")
    row["copy_GB_per_s"], row["product_TFLOP_per_s"] = bandwidth / 1e6, speed / 1e9
    for way in ("forward", "backward"):
        row[f"{way}_ratio"] = row[f"plain_{way}_ms"] / row[f"{way}_ms"]
    if device.type == "cuda":
        flops = 2 * query.numel() * options.sub_keys
        results = numbers.nbytes + scores.nbytes
        row["forward_floor_ms"] = flops / speed + (query.nbytes + keys.nbytes + results) / bandwidth
        row["backward_floor_ms"] = 2 * flops / speed + (2 * query.nbytes + 2 * keys.nbytes + results) / bandwidth
        for way in ("forward", "backward"):
            row[f"{way}_share_of_floor"] = row[f"{way}_floor_ms"] / row[f"{way}_ms"]
    row["forward_extra_MB"] = extra_bytes(lambda: retrieve(*values, top_k), device) / 1e6
    row["plain_forward_extra_MB"] = extra_bytes(lambda: plain(*values, top_k), device) / 1e6
    return row


def main() -> None:
    """Measure what the command line asks for, and show it."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16" if cuda else "float32")
    parser.add_argument("--tokens", type=int, default=8192 if cuda else 1024)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--sub-keys", type=int, default=1024, help="of each half")
    parser.add_argument("--top-k", type=int, nargs="+", default=[16])
    parser.add_argument("--key-dim", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = [measure(options, *sizes) for sizes in itertools.product(options.top_k, options.key_dim)]
    name = device_name(torch.device(options.device))
    title = f"retrieval, {options.tokens} tokens, {options.heads} heads, {options.sub_keys} sub-keys, {options.dtype}"
    show(f"{title}, {name}", rows)
    sizes = {key: getattr(options, key) for key in ("tokens", "heads", "sub_keys", "dtype")}
    write_json(options.json, {"device": name, "torch": torch.__version__, **sizes, "rows": rows})


if __name__ == "__main__":
    main()
