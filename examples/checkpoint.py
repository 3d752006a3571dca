"""A language model of bytes in plain PyTorch, with tables spread over ranks, that stops and goes on on other ranks.

torchrun --standalone --nproc-per-node 2 examples/checkpoint.py --steps 40 --save checkpoint
torchrun --standalone --nproc-per-node 3 examples/checkpoint.py --steps 60 --load checkpoint
"""

import argparse
from importlib.resources import files

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

import peer_dist

DIM, CONTEXT, BATCH = 64, 64, 12


class Block(nn.Module):
    """A transformer's block, its feed-forward part a PEER layer."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(DIM), nn.LayerNorm(DIM)])
        self.attention = nn.MultiheadAttention(DIM, 4, batch_first=True)
        self.ffw = peer_dist.PEER(
            DIM, 64**2, heads=4, top_k=8, key_dim=32, query_norm="rms", group=dist.group.WORLD, seed=seed
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[batch, context, DIM]`` to the same."""
        y = self.norms[0](x)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        x = x + self.attention(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.ffw(self.norms[1](x))


def share(text: torch.Tensor, step: int, rank: int, ranks: int) -> torch.Tensor:
    """This rank's share of a step's batch: its sequences, which depend on the step alone."""
    starts = torch.randint(len(text) - CONTEXT, (BATCH,), generator=torch.Generator().manual_seed(step))
    return torch.stack([text[start : start + CONTEXT + 1] for start in starts])[rank::ranks]


def main() -> None:
    """Train, from a checkpoint if one is given, to the step that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="in all, those before the checkpoint included")
    parser.add_argument("--load", help="folder of a checkpoint to go on from")
    parser.add_argument("--save", help="folder of the checkpoint of the last step")
    arguments = parser.parse_args()

    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    text = torch.tensor(list((files("peer_dist") / "data" / "tinyshakespeare.txt").read_bytes()))

    torch.manual_seed(0)  # the same dense weights on every rank
    model = nn.Sequential(nn.Embedding(256, DIM), Block(seed=1), Block(seed=2), nn.LayerNorm(DIM), nn.Linear(DIM, 256))
    rows = len(model[1].ffw.down)
    tables = peer_dist.exempt_tables(model)  # DDP leaves them alone: each rank has other rows
    model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)

    first = 0
    if arguments.load:
        weights, states = get_state_dict(model, optimizer)
        saved = {"model": weights, "optimizer": states, "step": torch.zeros((), dtype=torch.int64)}
        dcp.load(saved, checkpoint_id=arguments.load)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=states)
        first = int(saved["step"])

    for step in range(first, arguments.steps):
        batch = share(text, step, rank, ranks)
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        for table in tables:  # came as the gradient of the SUM of the ranks' losses
            table.grad /= ranks
        norm = peer_dist.clip_grad_norm_(model, 1.0)
        optimizer.step()
        mean = loss.detach() / ranks
        dist.all_reduce(mean)
        if rank == 0 and step % 10 == 0:
            print(f"step {step}  loss {mean:.4f}  gradient {norm:.3f}  rows here {rows:,}", flush=True)

    if arguments.save:
        weights, states = get_state_dict(model, optimizer)
        step = torch.tensor(arguments.steps)
        dcp.save({"model": weights, "optimizer": states, "step": step}, checkpoint_id=arguments.save)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
