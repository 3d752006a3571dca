"""Every parallel layout trains as one process does, and goes on from every other's checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.layouts import BATCH, BIAS, MEMORY, RECURRENT, TABLE, Layout, base_config, compare, trained
from tests.ranks import run_ranks


@pytest.mark.parametrize(
    "layout", [pytest.param(each, marks=() if each.quick else pytest.mark.slow, id=str(each)) for each in TABLE]
)
def test_trains_as_one_process(layout: Layout, text: Path, tmp_path: Path) -> None:
    differences = compare(layout, base_config(text, tmp_path.parent / "unused"))
    assert differences.fine, differences


GATED = {"peer": {**BATCH["peer"], "output_gate": True}}
SAVED = [
    Layout(1, {}, 0, settings=GATED),
    Layout(2, {"expert": 2}, 3, settings=GATED),
    Layout(2, {"tensor": 2, "sequence": True, "expert_tensor": 2}, 0, settings=GATED),
    Layout(2, {"pipeline": 2, "virtual_pipeline": 2}, 1, settings=GATED, quick=True),
    Layout(4, {"tensor": 2, "pipeline": 2, "expert": 2}, 2, settings=GATED, quick=True),
    Layout(4, {"tensor": 4, "expert": 2, "expert_tensor": 2}, 3, settings=GATED, quick=True),
    Layout(4, {"pipeline": 4}, 0, settings=GATED),
    Layout(8, {"pipeline": 2, "expert": 2, "expert_tensor": 2}, 1, settings=GATED),
]


def saved_on_the_way(rank: int, world_size: int, tree: dict[str, Any]) -> list[float]:
    """A checkpoint after three steps, and the losses of the next three."""
    from peer_dist.config import parse_config
    from peer_dist.training import Trainer

    trainer = Trainer(parse_config(tree, "test"))
    for _ in range(3):
        trainer.step()
    trainer.save()
    return [trainer.step()["train/loss"] for _ in range(3)]


QUICK = [layout for layout in SAVED if layout.quick]
SAVED_MEMORY = [
    Layout(2, {"pipeline": 2}, 0, settings=MEMORY),
    Layout(4, {"tensor": 2, "expert": 2, "expert_tensor": 2}, 3, settings=MEMORY),
]
COARSE_KINDS = {**BIAS, **RECURRENT}
COARSE = [
    Layout(2, {"expert": 2}, 3, settings=COARSE_KINDS),
    Layout(2, {"tensor": 2, "sequence": True}, 0, settings=COARSE_KINDS),
    Layout(4, {"pipeline": 2, "expert": 2}, 1, settings=COARSE_KINDS),
    Layout(1, {}, 2, settings=COARSE_KINDS),
]


@pytest.mark.parametrize(
    ("saver", "loaders"),
    [
        *(pytest.param(saver, QUICK, id=f"{saver} into some") for saver in QUICK),
        *(pytest.param(saver, SAVED, marks=pytest.mark.slow, id=f"{saver} into all") for saver in SAVED),
        pytest.param(SAVED_MEMORY[0], SAVED_MEMORY[1:], id=f"{SAVED_MEMORY[0]} into {SAVED_MEMORY[1]}"),
        pytest.param(COARSE[0], COARSE[1:3], id=f"{COARSE[0]} into some"),
        *(pytest.param(saver, COARSE, marks=pytest.mark.slow, id=f"{saver} into all") for saver in COARSE),
    ],
)
def test_a_checkpoint_of_any_layout_loads_into_any_other(
    saver: Layout, loaders: list[Layout], text: Path, tmp_path: Path
) -> None:
    """The next three losses are the undisturbed run's."""
    base = base_config(text, tmp_path)
    wanted = run_ranks(saved_on_the_way, saver.ranks, saver.config(base))[0]
    for loader in loaders:
        for losses, *_ in run_ranks(trained, loader.ranks, loader.config(base), 3):
            assert losses == pytest.approx(wanted, rel=1e-5), f"loaded into {loader}"


def picks_of_a_step(rank: int, world_size: int, tree: dict[str, Any]) -> int:
    """(token, expert) pairs that this rank's shards computed."""
    from peer_dist.config import parse_config
    from peer_dist.sharding import Traffic
    from peer_dist.training import Trainer

    counted = []
    trainer = Trainer(parse_config(tree, "test"))
    reset = Traffic.reset
    Traffic.reset = lambda self: (counted.append(self.picks_received), reset(self))[1]  # type: ignore[assignment, func-returns-value]
    trainer.step()
    return sum(counted)


def test_no_expert_is_computed_twice(text: Path, tmp_path: Path) -> None:
    """Tensor ranks share the tokens, with sequence parallelism and without; grids of other shapes compute as many."""
    base = base_config(text, tmp_path)
    rows, sequence, split, stages = (
        sum(run_ranks(picks_of_a_step, layout.ranks, layout.config(base)))
        for layout in (
            Layout(2, {"expert": 2}),
            Layout(2, {"tensor": 2, "sequence": True, "expert": 2}),
            Layout(2, {"tensor": 2, "expert": 2}),
            Layout(4, {"pipeline": 2, "tensor": 2, "expert": 2}),
        )
    )
    assert rows == sequence == split == stages > 0
