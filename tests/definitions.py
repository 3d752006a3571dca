"""What the layers' definitions have in common, written out."""

import torch
import torch.nn.functional as F

ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}
GATES = {"softmax": lambda s: s.softmax(-1), "sigmoid": torch.sigmoid, "relu": F.relu}


def all_scores(query, keys):
    """Scores of every one of the N product keys, ``[tokens, heads, N]``, by writing all of them out."""
    per_head = keys.expand(query.shape[1], *keys.shape) if keys.dim() == 3 else keys
    n = keys.shape[-2]
    full = torch.stack(
        [torch.cat([k[0].repeat_interleave(n, 0), k[1].repeat(n, 1)], dim=-1) for k in per_head]
    )  # [heads, N, key_dim]
    return torch.einsum("thc,hec->the", query, full)


def top_pairs(first, second, top_k):
    """What :func:`peer_dist.kernels.reference.top_pairs` asks of backends that sort, from whole sorted rows."""
    (first, a), (second, b) = (half.sort(dim=-1, descending=True, stable=True) for half in (first, second))
    i, j = torch.tensor([(i, j) for i in range(top_k) for j in range(top_k) if (i + 1) * (j + 1) <= top_k]).T
    sums, pair = (first[:, i] + second[:, j]).sort(dim=-1, descending=True, stable=True)
    i, j = i[pair[:, :top_k]], j[pair[:, :top_k]]
    return a.gather(1, i) * a.shape[1] + b.gather(1, j), sums[:, :top_k]
