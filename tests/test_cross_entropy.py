"""Cross-entropy over split vocabularies, against torch's in float64."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from peer_dist.kernels import dense
from peer_dist.megatron import Parallel
from peer_dist.megatron.cross_entropy import cross_entropy
from tests.ranks import run_ranks

WORDS = 24


def case(scale: float, shift: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(1)
    logits = (scale * torch.randn(7, 5, WORDS, generator=draws) + shift).to(dtype)
    return logits, torch.randint(WORDS, (7, 5), generator=draws), torch.randn(7, 5, generator=draws)


def split(rank: int, world_size: int, cases: list[tuple]) -> list[tuple[torch.Tensor, torch.Tensor, bool]]:
    """Losses and gradients of this rank's words, and whether the gradient lies where the logits were."""
    found = []
    for rows, *arguments in cases:
        dense.BLOCK = rows * WORDS // world_size
        logits, labels, weights = case(*arguments)
        own = logits.chunk(world_size, -1)[rank].clone().requires_grad_()
        product = own * 1
        losses = cross_entropy(product, labels, dist.group.WORLD)
        (gradient,) = torch.autograd.grad((losses * weights).sum(), product)
        found.append((losses.detach(), gradient, gradient.data_ptr() == product.data_ptr()))
    return found


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_losses_and_gradients_are_the_formula(ranks: int) -> None:
    """Whatever the blocks and the ranks; also of large logits, and where one rank's words are all but impossible."""
    kinds = [
        (1.0, 0.0, torch.float64),
        (1.0, 0.0, torch.float32),
        (30.0, 1e4, torch.float32),
        (300.0, 0.0, torch.float32),
        (3.0, 0.0, torch.bfloat16),
    ]
    cases = [(rows, *kind) for rows in (1, 4, 100) for kind in kinds]
    found = run_ranks(split, ranks, cases)
    for number, (_, *kind) in enumerate(cases):
        logits, labels, weights = case(*kind)
        wide = logits.double().requires_grad_()
        wanted = F.cross_entropy(wide.flatten(0, 1), labels.flatten(), reduction="none").view(7, 5)
        (gradient,) = torch.autograd.grad((wanted * weights).sum(), wide)
        exact = 1e-12 if logits.dtype == torch.float64 else 2e-6
        tolerance = exact * max(1.0, float(logits.abs().max()))
        for losses, _, _ in (rank[number] for rank in found):
            torch.testing.assert_close(losses.double(), wanted.detach(), rtol=0, atol=tolerance)
        got = torch.cat([rank[number][1] for rank in found], -1)
        assert got.dtype == logits.dtype
        rounding = 2**-8 if logits.dtype == torch.bfloat16 else 0
        torch.testing.assert_close(got.double(), gradient, rtol=rounding, atol=tolerance)
        assert all(rank[number][2] for rank in found), "a second tensor of all logits"


def excluded(rank: int, world_size: int, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Losses and gradients of this rank's words; also those of no tokens."""
    own = logits.chunk(world_size, -1)[rank].clone().requires_grad_()
    losses = cross_entropy(own * 1, labels, dist.group.WORLD)
    losses.sum().backward()
    cross_entropy(own[:0] * 1, labels[:0], dist.group.WORLD).sum().backward()
    return losses.detach(), own.grad


@pytest.mark.parametrize("ranks", [1, 2])
def test_words_may_be_excluded(ranks: int) -> None:
    """By logits of minus infinity, the first word of a rank's among them; a label that is has an infinite loss."""
    logits, labels = torch.randn(6, WORDS, dtype=torch.float64), torch.tensor([1, 5, 11, 13, 20, 23])
    logits[:, 0] = logits[:4, WORDS // 2] = logits[5, 23] = -torch.inf
    wanted = logits.clone().requires_grad_()
    losses = F.cross_entropy(wanted, labels, reduction="none")
    losses.sum().backward()
    assert losses.isinf().tolist() == [False] * 5 + [True]
    found = run_ranks(excluded, ranks, logits, labels)
    for got, _ in found:
        torch.testing.assert_close(got, losses.detach())
    torch.testing.assert_close(torch.cat([gradient for _, gradient in found], -1), wanted.grad)


def test_a_second_backward_pass_is_refused(parallel: Parallel) -> None:
    """The logits are no more."""
    logits = torch.randn(3, WORDS, requires_grad=True) * 1
    losses = cross_entropy(logits, torch.tensor([0, 5, 23]), parallel.tensor_group).sum()
    losses.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.backward()
