"""Logits of texts that grow token by token, whose keys and values are kept: Megatron's static inference context."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from megatron.core.inference.contexts.static_context import StaticInferenceContext
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn


class Decoder:
    """The model as a function of the tokens that are new. Every rank makes the same calls, in evaluation mode.

    Args:
        model: from :func:`build_model`, in any layout without virtual stages and sequence parallelism.
        batch_size: texts.
        length: tokens of each that are kept, at most.
    """

    def __init__(self, model: nn.ModuleList, batch_size: int, length: int) -> None:
        self._model, self._context = model, StaticInferenceContext(batch_size, length)

    @property
    def seen(self) -> int:
        """Tokens of each text that are kept."""
        return int(self._context.sequence_len_offset)

    def forget(self) -> None:
        """Begin anew, at position 0."""
        self._context.reset()

    @torch.no_grad()
    def __call__(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits ``[b, vocab]`` (padding rows included) of what follows; on all but the last stage ``[0]``.

        Args:
            tokens: int64 ``[b, s]``, at the positions after those that were given before.
            attention_mask: bool ``[b, 1, s, seen + s]``, True = masked out. None: causal; then either nothing was
                given before, or ``s`` is 1.
        """

        def step(batches: Iterator[Tensor], model: GPTModel) -> tuple[Tensor, object]:
            logits = model(
                next(batches), None, attention_mask, inference_context=self._context, runtime_gather_output=True
            )
            return logits, lambda logits, non_loss_data: logits[:, -1]

        logits = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[iter([tokens])],
            model=list(self._model),
            num_microbatches=1,
            seq_length=tokens.shape[1],
            micro_batch_size=tokens.shape[0],
            forward_only=True,
            collect_non_loss_data=True,
        )
        self._context.sequence_len_offset += tokens.shape[1]
        return logits[0] if logits else tokens.new_empty(0, dtype=torch.float32)
