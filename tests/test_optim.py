"""The tables' optimizers against a few plain lines, whole and on column shards."""

import pytest
import torch
import torch.distributed as dist

from peer_dist.optim import TableOptimizer
from peer_dist.optim.tables import KINDS
from tests.ranks import run_ranks

LR, BETAS, EPS, DECAY, STEPS = 0.02, (0.8, 0.9), 1e-4, 0.1, 6


def problem():
    """A table ``[7, 10]`` and its gradients, one row of which is always zero."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(7, 10, generator=generator)
    grads = [torch.randn(7, 10, generator=generator) for _ in range(STEPS)]
    for grad in grads:
        grad[3] = 0
    return table, grads


def plain(kind, dtype=torch.float64):
    table, grads = problem()
    table = table.to(dtype)
    first, second = torch.zeros_like(table), torch.zeros_like(table) if kind == "adam" else table.new_zeros(7, 1)
    for step, grad in enumerate((grad.to(dtype) for grad in grads), 1):
        square = grad**2 if kind == "adam" else (grad**2).mean(1, keepdim=True)
        table = table * (1 - LR * DECAY)
        if kind == "rowwise_adagrad":
            second = second + square
            table = table - LR * grad / (second.sqrt() + EPS)
            continue
        first = BETAS[0] * first + (1 - BETAS[0]) * grad
        second = BETAS[1] * second + (1 - BETAS[1]) * square
        moment, root = first / (1 - BETAS[0] ** step), (second / (1 - BETAS[1] ** step)).sqrt()
        table = table - LR * moment / (root + EPS)
    return table


def train(kind, columns=slice(None), group=None, scale=1.0, dtype=torch.float32):
    table, grads = problem()
    table = table[:, columns].contiguous().to(dtype).requires_grad_()
    optimizer = TableOptimizer({"t": table}, kind, 1.0, BETAS, EPS, DECAY, 10, group)
    optimizer.set_lr(LR)
    for grad in grads:
        table.grad = grad[:, columns].to(dtype) / scale
        optimizer.step(scale)
    assert optimizer.steps == STEPS
    assert table.grad is None
    return table.detach(), {part: value.clone() for _, part, value in optimizer.state()}


@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_plain_lines(kind):
    for scale in (1.0, 0.25):
        table, state = train(kind, scale=scale)
        torch.testing.assert_close(table.double(), plain(kind), rtol=1e-5, atol=1e-6)
    assert set(state) == {
        "adam": {"exp_avg", "exp_avg_sq"}, "rowwise_adam": {"exp_avg", "row_sq"}, "rowwise_adagrad": {"row_sq"}
    }[kind]  # fmt: skip
    assert kind == "adam" or state["row_sq"].shape == (7,)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bfloat16_table_is_the_rounding_of_its_master(kind):
    table, state = train(kind, dtype=torch.bfloat16)
    assert table.dtype == torch.bfloat16
    assert table.equal(state["master"].bfloat16())
    assert (state["master"] - plain(kind).float()).abs().max() < 0.02


def on_columns(rank, world_size, kind):
    columns = slice(10 * rank // world_size, 10 * (rank + 1) // world_size)
    return train(kind, columns, dist.group.WORLD)


@pytest.mark.parametrize("kind", KINDS)
def test_column_shards_step_like_the_whole(kind):
    """Three of uneven width; a row's number is that of the whole row, the same on all of them."""
    want, whole = train(kind)
    parts = run_ranks(on_columns, 3, kind)
    torch.testing.assert_close(torch.cat([table for table, _ in parts], 1), want, rtol=1e-6, atol=1e-6)
    for _, state in parts:
        if kind != "adam":
            torch.testing.assert_close(state["row_sq"], whole["row_sq"], rtol=1e-6, atol=1e-7)
            assert state["row_sq"].equal(parts[0][1]["row_sq"])
