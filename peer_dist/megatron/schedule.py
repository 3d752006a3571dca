"""Forward and backward over micro-batches, by Megatron's schedules."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import nn

from .model import routers

# tokens, labels: int64 [b, s]; loss_mask: float [b, s]; documents (optional): from pack_documents, or None
MicroBatch = Mapping[str, torch.Tensor | None]


class MicroBatches(Protocol):
    """A number of micro-batches: a list of them, or what makes each when its turn comes."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[MicroBatch]: ...


def run_forward_backward(
    model: nn.ModuleList,
    micro_batches: MicroBatches,
    scale: float | torch.Tensor = 1.0,
    forward_only: bool = False,
) -> torch.Tensor:
    """Run the micro-batches and, unless ``forward_only``, accumulate gradients.

    What is differentiated is ``scale * sum(token loss * loss_mask)``, summed over the micro-batches: nothing
    else divides it, so ``scale`` holds the division by the step's number of tokens. The routers' own losses, as means
    over the micro-batches, are added once gradients are averaged over data-parallel ranks.

    Args:
        model: from :func:`build_model`.
        micro_batches: at least one, on the model's device; all of one shape, the same on all tensor and pipeline
            ranks; under the interleaved schedule a multiple of the number of stages. Each is taken when its first pass
            begins, and not held longer than its passes need it.
        scale: float, or a 0-dim tensor on the model's device.
        forward_only: no gradients. Dropout and BatchNorm follow ``model.training``.

    Unless ``forward_only``, gradients of replicated parameters are summed at the end
    (:func:`peer_dist.megatron.gradients.finalize_gradients`).

    Returns:
        The micro-batches' summed token losses before scaling, float32 [len(micro_batches)], on the last
        stage; an empty tensor on the others. Nothing here waits for the GPU.
    """

    def forward_step(batches: Iterator[MicroBatch], model: GPTModel) -> tuple[torch.Tensor, Callable[..., Any]]:
        batch = next(batches)
        losses = model(batch["tokens"], None, batch.get("documents"), labels=batch["labels"])

        def weigh(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            mask = batch["loss_mask"]
            assert mask is not None
            total = (losses.float() * mask).sum()
            # With calculate_per_token_loss (set by build_model) the schedule leaves the loss as it is.
            return total * scale, mask.sum().to(torch.int), total.detach()

        return losses, weigh

    shape, micro_batches_of = _hand_out(iter(micro_batches), len(model))
    for router in routers(model).values():
        # a part per rank, which add up, and gradients are averaged over data-parallel ranks
        router.loss_scale = parallel_state.get_data_parallel_world_size() / len(micro_batches)
    with torch.set_grad_enabled(not forward_only):
        sums = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=micro_batches_of,
            model=list(model),
            num_microbatches=len(micro_batches),
            seq_length=shape[1],
            micro_batch_size=shape[0],
            forward_only=forward_only,
        )
    device = next(model.parameters()).device
    return torch.stack(sums) if sums else torch.empty(0, dtype=torch.float32, device=device)


def _hand_out(micro_batches: Iterator[MicroBatch], chunks: int) -> tuple[torch.Size, list[Iterator[MicroBatch]]]:
    """The shape ``[b, s]`` of the micro-batches, and all of them for each chunk of the model.

    Each is made once, when the first chunk asks for it, and dropped when the last one has it.
    """
    queues: list[deque[MicroBatch]] = [deque() for _ in range(chunks)]

    def make() -> bool:
        micro_batch = next(micro_batches, None)
        if micro_batch is not None:
            for queue in queues:
                queue.append(micro_batch)
        return micro_batch is not None

    def hand_out(queue: deque[MicroBatch]) -> Iterator[MicroBatch]:
        while queue or make():
            yield queue.popleft()

    make()
    tokens = queues[0][0]["tokens"]
    assert tokens is not None
    return tokens.shape, [hand_out(queue) for queue in queues]
