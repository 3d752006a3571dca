"""A language model of bytes whose tables of experts lie in host memory, in eight bits, trained by their own optimizer.

python examples/larger_tables.py
torchrun --standalone --nproc-per-node 2 examples/larger_tables.py
"""

import argparse
import os
from importlib.resources import files

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import peer_dist
from peer_dist.optim import TableOptimizer, TableRule

DIM, CONTEXT, BATCH, MAX_NORM = 64, 64, 12, 1.0


class Block(nn.Module):
    """Attention, and a PEER layer whose tables are far: of one byte an element, in the host's memory."""

    def __init__(self, memory: str) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(DIM), nn.LayerNorm(DIM)])
        self.attention = nn.MultiheadAttention(DIM, 4, batch_first=True)
        self.ffw = peer_dist.PEER(
            DIM,
            64**2,
            heads=4,
            top_k=8,
            key_dim=32,
            query_norm="rms",
            group=dist.group.WORLD,
            seed=1,
            table_memory=memory,
            table_dtype=torch.int8,
            table_cache_gb=1e-4,  # of some 3 MB with the optimizer's states; give it what the device can spare
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[batch, context, DIM]`` to the same."""
        y = self.norms[0](x)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        x = x + self.attention(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.ffw(self.norms[1](x))


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=61)
    parser.add_argument("--memory", default="host", choices=("device", "host", "disk"))
    arguments = parser.parse_args()

    if "RANK" in os.environ:  # started by torchrun
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    text = torch.tensor(list((files("peer_dist") / "data" / "tinyshakespeare.txt").read_bytes()))

    torch.manual_seed(0)  # the same dense weights on every rank
    model = nn.Sequential(nn.Embedding(256, DIM), Block(arguments.memory), nn.LayerNorm(DIM), nn.Linear(DIM, 256))
    ffw = model[1].ffw
    rule = TableRule("rowwise_adam", 4e-3, (0.9, 0.999), 1e-8, 0.0, lazy=True, rounding_seed=0)
    offsets = dict.fromkeys(ffw.tables(), ffw.layout.offset)  # the same rounding on any number of ranks
    tables = TableOptimizer(ffw.tables(), rule, DIM, data_parallel_size=ranks, offsets=offsets)
    taken = {id(table) for table in ffw.tables().values()}
    dense = torch.optim.AdamW([p for p in model.parameters() if id(p) not in taken], lr=4e-3)
    peer_dist.exempt_tables(model)  # on several ranks DDP leaves them alone: each rank has other rows
    wrapped = DistributedDataParallel(model)

    for step in range(arguments.steps):
        starts = torch.randint(len(text) - CONTEXT, (BATCH,), generator=torch.Generator().manual_seed(step))
        batch = torch.stack([text[start : start + CONTEXT + 1] for start in starts])[rank::ranks]
        loss = F.cross_entropy(wrapped(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        dense.zero_grad()
        loss.backward()
        # one norm of all gradients; those of the tables are nowhere in .grad
        rest = nn.utils.get_total_norm([p.grad for p in dense.param_groups[0]["params"]])
        norm = torch.hypot(rest, tables.grad_norm(rest.device))
        clip = float((MAX_NORM / (norm + 1e-6)).clamp(max=1.0))
        for parameter in dense.param_groups[0]["params"]:
            parameter.grad *= clip
        dense.step()
        tables.step(clip)
        mean = loss.detach() / ranks
        dist.all_reduce(mean)
        if rank == 0 and step % 20 == 0:
            print(f"step {step}  loss {mean:.4f}  gradient {norm:.3f}", flush=True)

    if rank == 0:
        held, values = ffw.down, ffw.state_dict()["down"]  # exact in bfloat16: any layer loads them
        print(f"{len(held):,} rows here, {held.dtype} {arguments.memory}; in the state dict {values.dtype}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
