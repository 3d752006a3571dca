"""Starved sub-keys and the experts behind them: what becomes of them, in any layout and over a restart."""

import pytest
import torch

from peer_dist.engines.revival import STARVED, subkey_sources
from tests.ranks import run_ranks
from tests.runs import (
    assert_close,
    copy_checkpoint,
    in_folder,
    losses_of,
    make_trainer,
    metrics_of,
    run_to_the_end,
    with_keys,
)


def test_sources_by_hand():
    """Two sets: the most used stands in for those without picks; with more starved than others, these in turn."""
    use = torch.tensor([[[0, 45, 32], [35, 42, 0]], [[1, 0, 50], [7, 7, 7]]])
    assert subkey_sources(use).tolist() == [[[1, 1, 2], [0, 1, 1]], [[2, 2, 2], [0, 1, 2]]]
    crowd = torch.tensor([[[1000 * STARVED, 0, 0, 900 * STARVED, 0, 2, 0, 0]] * 2])
    assert subkey_sources(crowd)[0, 1].tolist() == [0, 0, 3, 3, 0, 3, 0, 3]
    assert subkey_sources(torch.zeros(1, 2, 4, dtype=torch.int64)).tolist() == [[[0, 1, 2, 3]] * 2], "before any pick"


@pytest.fixture
def starved(small):
    """More experts than the picks of a few tokens reach."""
    return with_keys(
        small,
        peer={"num_experts": 4096, "heads": 2, "top_k": 2, "revive_interval": 4},
        train={"micro_batch_size": 8, "global_batch_size": 16},
    )


def revived(rank, world_size, tree, steps):
    trainer = make_trainer(tree)
    values = [trainer.step() for _ in range(steps)]
    return [v["train/loss"] for v in values], [v.get("experts/revived_subkeys") for v in values]


@pytest.mark.parametrize(
    ("settings", "layouts"),
    [
        ({}, [(2, {"expert": 2}, 3), (2, {"expert_tensor": 2}, 0), (4, {"tensor": 2, "expert": 2}, 1)]),
        (
            {
                "peer": {"shared_keys": False, "layers_per_pool": 2, "query_norm": "rms", "key_norm": "layer"},
                "table_optimizer": {"name": "rowwise_adam"},
            },
            [(2, {"expert": 2}, 1), (4, {"expert": 2, "expert_tensor": 2}, 2)],
        ),
        (
            {"model": {"num_layers": 4, "mlp": ["peer", "dense", "peer", "peer"]}},
            [(2, {"pipeline": 2}, 1), (2, {"pipeline": 2, "virtual_pipeline": 2}, 0)],
        ),
    ],
)
def test_revival_in_any_layout(starved, settings, layouts):
    """Row shards, column shards, copies and every engine move what one rank moves, and go on as it does."""
    starved = with_keys(starved, **settings)
    want, moved = run_ranks(revived, 1, starved, 10)[0]
    assert all((count or 0) > 0 if step in (4, 8) else count is None for step, count in enumerate(moved, 1))
    for ranks, parallel, stage in layouts:
        micro = 8 * parallel.get("tensor", 1) * parallel.get("pipeline", 1) // ranks
        tree = with_keys(starved, parallel=parallel, zero={"stage": stage}, train={"micro_batch_size": micro})
        for losses, counts in run_ranks(revived, ranks, tree, 10):
            assert counts == moved, (ranks, parallel)
            assert_close(losses, want, 1e-5)


def come_back(rank, world_size, tree):
    """Experts of the first layer that got no gate in four steps; how many did in the next four; sub-keys without a
    first moment between the two.
    """
    trainer = make_trainer(tree)
    for _ in range(4):
        trainer.step()
    dead = trainer.usage[1]._mass == 0
    trainer.usage[1].reset()
    name = next(name for name, _ in trainer.model.named_parameters() if name.endswith("keys"))
    (moment,) = (value.clone() for _, part, value in trainer.engine.dense_state({name}) if part == "exp_avg")
    for _ in range(4):
        trainer.step()
    return int(dead.sum()), int((trainer.usage[1]._mass != 0)[dead].sum()), int((moment == 0).all(-1).sum())


def test_dead_experts_come_back(starved):
    dead, back, fresh = run_ranks(come_back, 1, starved)[0]
    dead_alone, back_alone, fresh_alone = run_ranks(come_back, 1, with_keys(starved, peer={"revive_interval": 0}))[0]
    assert dead == dead_alone > 2048
    assert back > 2 * back_alone
    assert fresh > fresh_alone, "and those that were picked a few times start anew"


def test_revival_resumes_bit_for_bit(starved, tmp_path):
    """Saved in the middle of a window, by two ranks: what was counted before decides with what is counted after."""
    starved = with_keys(starved, parallel={"expert": 2}, train={"micro_batch_size": 4})
    quiet = with_keys(in_folder(starved, tmp_path / "quiet"), checkpoint={"interval": 6})
    run_ranks(run_to_the_end, 2, quiet)
    copy_checkpoint(quiet, starved, 6)
    run_ranks(run_to_the_end, 2, starved)
    assert losses_of(starved) == {step: loss for step, loss in losses_of(quiet).items() if step > 6}
    moved = [{line["step"]: line.get("experts/revived_subkeys") for line in metrics_of(t)} for t in (starved, quiet)]
    assert moved[0][8] == moved[1][8] > 0
    alone = with_keys(quiet, train={"steps": 12, "micro_batch_size": 8})
    elsewhere = run_ranks(revived, 1, with_keys(alone, parallel={"expert": 1}), 2)[0]
    assert_close(elsewhere[0], run_ranks(revived, 2, with_keys(quiet, train={"steps": 12}), 2)[0][0], 1e-5)
