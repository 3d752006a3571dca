"""Where the documents of packed sequences lie: what attention needs to know so that they do not see each other."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_documents(tokens: Tensor, eod: int, device: torch.device | None = None) -> Tensor | None:
    """Where each document begins, if a sequence holds several.

    An ``eod`` token begins the document after it, and so does a sequence; a token sees the earlier tokens of its own
    document. Meant for tokens on the CPU, where finding documents makes no device wait.

    Args:
        tokens: int [b, s].
        eod: the id of the end-of-document token.
        device: where the result goes; by default where the tokens are.

    Returns:
        int32 [documents + 1, longest]: all columns are the same and one in memory, the numbers of tokens before each
        document (counted through the sequences one after the other) and in all. So the shape, which the host knows,
        says how long the longest document is, and it is a tensor, as recomputation and Megatron's layers want. None
        where plain causal attention does (no ``eod`` after the first position).
    """
    begins = tokens == eod
    begins[:, 0] = True
    firsts = begins.flatten().nonzero()[:, 0].int()
    if len(firsts) == len(tokens):
        return None
    offsets = torch.cat([firsts, firsts.new_tensor([tokens.numel()])])
    longest = int(offsets.diff().max())
    if device is not None:
        offsets = (offsets.pin_memory() if device.type == "cuda" else offsets).to(device, non_blocking=True)
    return offsets[:, None].expand(-1, longest)


def visible(documents: Tensor, batch_size: int, length: int) -> Tensor:
    """Which keys each query sees.

    Args:
        documents: from :func:`pack_documents`.
        batch_size, length: ``b`` and ``s`` of the tokens.

    Returns:
        bool [b, 1, s, s], queries before keys.
    """
    places = torch.arange(batch_size * length, dtype=torch.int32, device=documents.device)
    number = torch.searchsorted(documents[:, 0], places, right=True).view(batch_size, 1, length)
    return (number[..., None] == number[:, :, None]).tril_()
