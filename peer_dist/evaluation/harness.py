"""A checkpoint as a model of EleutherAI's lm-evaluation-harness (the package lm_eval, of the extra [eval]).

import lm_eval
from peer_dist.evaluation.harness import HarnessModel
from peer_dist.evaluation.loading import load_model
from peer_dist.ranks.world import World

world = World.from_environment()
with world.joined():
    model = HarnessModel(load_model("runs/mine/checkpoints", world.world_size))
    results = lm_eval.simple_evaluate(model, tasks=["lambada_openai", "wikitext"])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from peer_dist.evaluation.generate import generate
from peer_dist.evaluation.loading import LoadedModel
from peer_dist.evaluation.scoring import Request, Scores, score

_MAX_GENERATED = 256  # the harness's own default


class HarnessModel(TemplateLM):
    """What the harness asks of a model, on any number of ranks.

    Every rank makes the same calls with all requests and gets all answers: the work is shared inside, so to the
    harness this is one process. Texts longer than the model's ``seq_length`` are scored as the harness defines it:
    continuations with the nearest context, rolling ones in windows that do not overlap but for the last.
    """

    def __init__(self, loaded: LoadedModel, batch_size: int = 8) -> None:
        """``batch_size``: sequences per rank and forward pass."""
        super().__init__()
        self._loaded, self._batch_size = loaded, batch_size

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document."""
        return self._loaded.tokenizer.eod

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's digest, by which the harness tells caches apart."""
        return self._loaded.tokenizer.digest

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of ``string``; there are no special tokens to add."""
        return self._loaded.tokenizer.encode(string)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        to_score = []
        for _, context, continuation in requests:
            # an empty context comes as the token with which every document of ours begins
            before = [] if context == [self.eot_token_id] else context
            to_score.append(Request(np.array([*before, *continuation]), len(before)))
        answers = [(-_total(scores), bool(scores.greedy.all())) for scores in self._score(to_score)]
        for (texts, _, _), answer in zip(requests, answers):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, in nats."""
        to_score = [Request(np.array(self.tok_encode(request.args[0]))) for request in requests]
        answers = [-_total(scores) for scores in self._score(to_score)]
        for request, answer in zip(requests, answers):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations, greedy unless ``do_sample``, each up to the first of its ``until`` strings."""
        answers = []
        for request in requests:
            context, options = request.args
            until = options.get("until") or []
            stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
            temperature = float(options.get("temperature", 1.0)) if options.get("do_sample") else 0.0
            text = ""
            for (piece,) in generate(
                self._loaded, [context], int(options.get("max_gen_toks", _MAX_GENERATED)), temperature=temperature
            ):
                text += piece or ""
                if any(stop in text for stop in stops):
                    break
            for stop in stops:
                text = text.split(stop)[0]
            answers.append(text)
            self.cache_hook.add_partial("generate_until", request.args, text)
        return answers

    def _score(self, requests: Sequence[Request]) -> list[Scores]:
        return score(self._loaded, requests, self._loaded.config.model.seq_length, self._batch_size)


def _total(scores: Scores) -> float:
    return float(scores.nats.sum(dtype="float64"))
