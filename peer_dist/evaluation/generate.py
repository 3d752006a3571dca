"""Text from a trained model."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from peer_dist.config import ConfigError
from peer_dist.evaluation.loading import LoadedModel
from peer_dist.megatron import forward_logits, segment_mask


@torch.no_grad()
def generate(
    loaded: LoadedModel, prompt: str, tokens: int, temperature: float = 0.8, top_k: int = 0, seed: int = 0
) -> Iterator[str]:
    """Yield pieces of text that follow ``prompt``; joined, they are the continuation.

    The model sees at most its training length; the whole window is computed again for every token. Every rank
    must call it and take every piece.

    Args:
        tokens: how many to draw; an end-of-document token ends the text earlier.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: draw among this many most likely tokens only; 0: among all.
        seed: of the draws.

    Raises:
        ConfigError: the model is not causal.
    """
    config = loaded.config
    if "moe" in config.model.mlp_kinds and config.moe.routing == "expert_choice":
        raise ConfigError(
            f"{loaded.path}: its experts choose tokens (moe.routing expert_choice), later ones included, so that no "
            "text can be drawn from left to right; train one with token_choice for that"
        )
    tokenizer, device = loaded.tokenizer, loaded.parallel.device
    generator = torch.Generator().manual_seed(seed)
    ids = [tokenizer.eod, *tokenizer.encode(prompt)]  # a document begins after an end-of-document token
    made: list[int] = []
    shown = ""
    for _ in range(tokens):
        window = torch.tensor([ids[-config.model.seq_length :]])
        mask = segment_mask(window, tokenizer.eod)
        logits = forward_logits(loaded.model, window.to(device), None if mask is None else mask.to(device))
        last = logits[0, -1, : tokenizer.vocab_size].float().cpu()
        if temperature == 0:
            token = int(last.argmax())
        else:
            last = last / temperature
            if 0 < top_k < last.numel():
                last[last < last.topk(top_k).values[-1]] = -torch.inf
            token = int(torch.multinomial(last.softmax(-1), 1, generator=generator))
        if token == tokenizer.eod:
            break
        ids.append(token)
        made.append(token)
        text = tokenizer.decode(made)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half a character: wait for its other bytes
            yield text[len(shown) :]
            shown = text
    rest = tokenizer.decode(made)[len(shown) :]
    if rest:
        yield rest
