"""A model with a PEER layer compiled in one graph, against the same model as it is.

python examples/compiled.py
"""

import copy
import statistics
import time

import torch
from torch import nn

from peer_dist import PEER

DIM, TOKENS = 128, 512


def seconds(model: nn.Module, x: torch.Tensor) -> float:
    """Time of one forward and backward pass."""
    began = time.perf_counter()
    model(x).square().mean().backward()
    return time.perf_counter() - began


def main() -> None:
    """Compare gradients and times."""
    torch.manual_seed(0)
    ffw = PEER(DIM, num_experts=128**2, heads=4, top_k=8, key_dim=64, query_norm="rms")
    eager = nn.Sequential(nn.RMSNorm(DIM), ffw, nn.RMSNorm(DIM), nn.Linear(DIM, DIM))
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, fullgraph=True)  # an error, were there a part that cannot be in the graph

    x = torch.randn(TOKENS, DIM)
    for each in (eager, compiled):
        each(x).square().mean().backward()
    pairs = list(zip(eager.parameters(), model.parameters()))
    off = max(float((a.grad - b.grad).norm() / a.grad.norm()) for a, b in pairs)
    print(f"gradients agree to {off:.0e}")

    times = [(seconds(eager, x), seconds(compiled, x)) for _ in range(30)]  # by turns: both see the same machine
    ratio = statistics.median(a / b for a, b in times)
    print(f"eager / compiled, time of forward and backward: {ratio:.2f}")


if __name__ == "__main__":
    main()
