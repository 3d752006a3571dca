"""FSDP2 around a PEER layer, initialised from the meta device: whole tables, and tables spread over ranks.

torchrun --standalone --nproc-per-node 2 examples/fsdp2.py
"""

from importlib.resources import files

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard

import peer_dist

DIM, BATCH = 64, 256


def build(spread: bool) -> nn.Module:
    """A model that predicts a byte from the one before it, of which no rank ever holds the whole."""
    with torch.device("meta"):  # sizes alone: nothing is allocated
        ffw = peer_dist.PEER(
            DIM,
            num_experts=64**2,
            heads=4,
            top_k=8,
            key_dim=32,
            query_norm="rms",
            seed=0,
            group=dist.group.WORLD if spread else None,
        )
        model = nn.Sequential(nn.Embedding(256, DIM), ffw, nn.LayerNorm(DIM), nn.Linear(DIM, 256))
    tables = set(peer_dist.exempt_tables(model))  # none, if they are not spread
    fully_shard(model[1], ignored_params=tables)
    fully_shard(model, ignored_params=tables)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


def train(spread: bool, text: torch.Tensor, steps: int = 40) -> None:
    """Print what a rank holds of the layer, and the first and the last loss."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = build(spread)
    tables = peer_dist.exempt_tables(model)  # those that have memory now
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    losses = []
    for step in range(steps):
        starts = torch.randint(len(text) - 1, (BATCH,), generator=torch.Generator().manual_seed(step))[rank::ranks]
        loss = F.cross_entropy(model(text[starts]), text[starts + 1])
        optimizer.zero_grad()
        loss.backward()
        for table in tables:  # FSDP averages all else
            table.grad /= ranks
        peer_dist.clip_grad_norm_(model, 1.0)
        optimizer.step()
        mean = loss.detach() / ranks
        dist.all_reduce(mean)
        losses.append(float(mean))
    if rank == 0:
        kind = "spread by tokens " if spread else "gathered by FSDP2"
        here = model[1].down
        rows = len(here) if spread else len(here.to_local())
        print(f"tables {kind}  rows here {rows:,}  loss {losses[0]:.4f} -> {losses[-1]:.4f}", flush=True)


def main() -> None:
    """Both ways, of which the losses are equal."""
    dist.init_process_group("gloo")
    text = torch.tensor(list((files("peer_dist") / "data" / "tinyshakespeare.txt").read_bytes()))
    train(False, text)
    train(True, text)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
