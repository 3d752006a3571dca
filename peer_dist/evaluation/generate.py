"""Text from a trained model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from peer_dist.config import ConfigError
from peer_dist.data.documents import DataError
from peer_dist.data.tokenizer import TextTokenizer
from peer_dist.evaluation.loading import LoadedModel
from peer_dist.megatron import Decoder
from peer_dist.mistake import printable, shown
from peer_dist.reading import read_text


def generate(
    loaded: LoadedModel,
    prompts: Sequence[str],
    tokens: int,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[list[str | None]]:
    """Yield, token by token, a piece of text for each prompt, or None where its text has ended; joined, the pieces are
    the continuation.

    The model sees a prompt's last ``seq_length`` tokens and what follows; a text that outgrows ``seq_length`` goes on
    from the newest half of it. Keys and values of what it sees are computed once. A text does not depend on the
    prompts beside it, nor on the number of ranks. Every rank must call it and take every piece.

    Args:
        tokens: how many to draw for each; an end-of-document token ends a text earlier.
        temperature: divides the logits; 0, or what a float32 cannot divide them by, takes the most likely token.
        top_k: draw among this many most likely tokens only; 0: among all.
        top_p: and of those among the most likely that together have this probability; 1: among all.
        seed: of the draws of each prompt.

    Raises:
        ConfigError: the model is not causal.
    """
    config = loaded.config
    if reason := config.not_causal:
        raise ConfigError(
            f"{loaded.path}: {reason}, so that no text can be drawn from left to right; train one with "
            f"{reason.instead} for that"
        )
    length, parallel = config.model.seq_length, loaded.parallel
    texts = [_Text(loaded.tokenizer, prompt, length, seed) for prompt in prompts]
    decoder = Decoder(loaded.model, len(texts), min(length, max(len(text.window) for text in texts) + tokens))
    for left in reversed(range(tokens)):
        outgrown = [text.shorten() for text in texts]
        if any(outgrown):
            decoder.forget()
        width = max(len(text.window) for text in texts)  # that of the shorter ones begins with padding
        first = _tokens([width - len(text.window) for text in texts])
        padded = _tokens([[loaded.tokenizer.eod] * (width - len(text.window)) + text.window for text in texts])
        mask = _mask(first, decoder.seen, width)
        logits = decoder(
            padded[:, decoder.seen :].to(parallel.device), None if mask is None else mask.to(parallel.device)
        )
        drawn = _tokens([0] * len(texts))
        if parallel.is_last_stage:
            rows = logits[:, : loaded.tokenizer.vocab_size].float().cpu()
            drawn = _tokens([_draw(row, temperature, top_k, top_p, text.draws) for row, text in zip(rows, texts)])
        # ranks may differ in the last bit, and must not in a token
        drawn = parallel.from_last_rank(drawn.to(parallel.device))
        yield [text.add(token, last=not left) for text, token in zip(texts, drawn.tolist())]
        if all(text.ended for text in texts):
            return


_COLDEST = 1e-30  # a logit over less may be more than a float32 holds


class _Text:
    """A prompt and what was drawn after it.

    Attributes:
        window: the tokens that the model sees.
    """

    def __init__(self, tokenizer: TextTokenizer, prompt: str, length: int, seed: int) -> None:
        self._tokenizer, self._length = tokenizer, length
        self.window = [tokenizer.eod, *tokenizer.encode(prompt)][-length:]  # documents begin after such a token
        self.draws = torch.Generator().manual_seed(seed)
        self.ended = False
        self._made: list[int] = []
        self._shown = ""

    def shorten(self) -> bool:
        """Keep the newest half of a window that is too long; return whether it was."""
        outgrown = len(self.window) > self._length
        if outgrown:
            self.window = self.window[-(self._length // 2) :]
        return outgrown

    def add(self, token: int, last: bool) -> str | None:
        """Take the next token, and return the text that it adds; None if the text has ended before."""
        self.window.append(token)
        if self.ended:
            return None
        self.ended = token == self._tokenizer.eod or last
        if token != self._tokenizer.eod:
            self._made.append(token)
        text, shown = self._tokenizer.decode(self._made), self._shown
        if text.endswith("\N{REPLACEMENT CHARACTER}") and not self.ended:  # half a character: wait for its other bytes
            return ""
        self._shown = text
        return text[len(shown) :]


def read_prompts(prompts: Sequence[str], file: Path | None) -> list[str]:
    """``prompts`` and the lines of ``file`` that are not blank; one empty prompt if neither is given.

    Raises:
        DataError: the file cannot be read or holds none.
    """
    for prompt in prompts:  # bytes of a command line that are no UTF-8 come as halves of surrogate pairs
        if any("\ud800" <= char <= "\udfff" for char in prompt):
            raise DataError(f"--prompt {shown(prompt)}: is no text in UTF-8")
    if file is None:
        return list(prompts) or [""]
    try:
        text = read_text(file, DataError)
    except DataError as error:
        raise DataError(f"--prompt-file {error}") from None
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise DataError(f"--prompt-file {file}: holds no prompt; write one per line")
    return [*prompts, *lines]


def write_texts(
    draw: Callable[[Sequence[str]], Iterator[list[str | None]]],
    prompts: Sequence[str],
    batch_size: int,
    out: TextIO | None,
) -> str:
    """Write every prompt with its continuation: one as it grows, several when done, each under a numbered line.

    Args:
        draw: :func:`generate` for some prompts.
        out: None on ranks that write nothing.

    Returns:
        How many tokens were drawn, and how fast, in a sentence.
    """

    def write(text: str) -> None:
        if out is not None:
            out.write(printable(text) if out.isatty() else text)
            out.flush()

    alone, tokens, begin = len(prompts) == 1, 0, time.perf_counter()
    for number in range(0, len(prompts), batch_size):
        texts = list(prompts[number : number + batch_size])
        write(texts[0] if alone else "")
        for pieces in draw(texts.copy()):
            tokens += sum(piece is not None for piece in pieces)
            texts = [text + (piece or "") for text, piece in zip(texts, pieces)]
            write((pieces[0] or "") if alone else "")
        for place, text in enumerate(texts, number + 1):
            write("\n" if alone else f"=== {place} of {len(prompts)}\n{text}\n")
    seconds = time.perf_counter() - begin
    return f"{tokens:,} tokens in {seconds:.1f} s: {tokens / seconds:,.0f} tokens/s"


def _tokens(numbers: Sequence[Any]) -> Tensor:
    """int64, of whole numbers or lists of them, on the CPU."""
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


def _mask(first: Tensor, seen: int, width: int) -> Tensor | None:
    """bool ``[b, 1, width - seen, width]``, True where a position (from ``seen`` on) must not see another.

    Args:
        first: ``[b]``, where each text begins; what is before it sees itself alone, for want of anything else.
    """
    if not first.any():
        return None
    key = torch.arange(width, dtype=torch.int64, device=first.device)
    query = key[seen:, None]
    return ((key > query) | ((key < first[:, None, None]) & (key != query))).unsqueeze(1)


def _draw(logits: Tensor, temperature: float, top_k: int, top_p: float, draws: torch.Generator) -> int:
    """A token by its ``logits [vocab]``; see :func:`generate`."""
    if temperature < _COLDEST:
        return int(logits.argmax())
    logits = logits / temperature
    if 0 < top_k < len(logits):
        logits[logits < logits.topk(top_k).values[-1]] = -torch.inf
    shares = logits.softmax(-1)
    if top_p < 1:
        ordered, tokens = shares.sort(descending=True)
        shares[tokens[1:][ordered.cumsum(-1)[:-1] >= top_p]] = 0
    return int(torch.multinomial(shares, 1, generator=draws))
