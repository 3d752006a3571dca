"""Saving and loading hold a rank's shards and a buffer, not a second copy; measured as resident memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks
from tests.runs import small_config

MB = 1 << 20
BUFFER = 2 * MB
ROWS, COLUMNS = 40_000, 600  # of a float32 table of 96 MB
SLACK = 12 * MB  # what the process needs for other things


@contextmanager
def resident(grown: list[int]) -> Iterator[None]:
    """Appends by how many bytes this process's resident memory grew at most inside."""

    def status(key: str) -> int:
        return int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10  # type: ignore[index]

    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = status("VmRSS")
    yield
    grown.append(status("VmHWM") - before)


def block(rank: int, world_size: int, columns: bool) -> tuple[slice, slice]:
    """This rank's part of the table: of the rows or of the columns."""
    size = COLUMNS if columns else ROWS
    part = slice(size * rank // world_size, size * (rank + 1) // world_size)
    return (slice(0, ROWS), part) if columns else (part, slice(0, COLUMNS))


def state_of(rank: int, world_size: int, columns: bool, fill: float | None = None) -> tuple[dict[str, Any], Any]:
    from peer_dist.megatron.dist_checkpoint import table_shard

    rows, part = block(rank, world_size, columns)
    table = torch.empty(rows.stop - rows.start, part.stop - part.start)
    for first in range(0, len(table), 1000):  # large temporaries would hide what is measured
        own = table[first : first + 1000]
        number = torch.arange(rows.start + first, rows.start + first + len(own), dtype=torch.float32)[:, None]
        own.copy_(number + torch.arange(part.start, part.stop) / 1024 if fill is None else torch.tensor(fill))
    sizes = torch.full((len(table),), 7.0) if fill is None else torch.zeros(len(table))
    return {
        "table": table_shard("table", table, (rows.start, part.start), (ROWS, COLUMNS), 0),
        "row": table_shard("row", sizes, (rows.start,), (ROWS,), rank if columns else 0),
    }, table


def saved(rank: int, world_size: int, folder: str, buffer: int) -> int:
    from peer_dist.megatron import dist_checkpoint

    dist_checkpoint.BUFFER_BYTES = buffer
    state, _ = state_of(rank, world_size, columns=False)
    grown: list[int] = []
    with resident(grown):
        written = dist_checkpoint.save(state, folder)
    from peer_dist.checkpoints.files import checksum

    assert written.checksums == {f"__{rank}_0.distcp": checksum(Path(folder) / f"__{rank}_0.distcp")}
    return grown[0]


def loaded(rank: int, world_size: int, folder: str, columns: bool) -> int:
    from peer_dist.megatron import dist_checkpoint

    state, table = state_of(rank, world_size, columns, fill=-1.0)
    grown: list[int] = []
    with resident(grown):
        got = dist_checkpoint.load(state, folder)
    assert got["table"].data_ptr() == table.data_ptr()
    wanted, _ = state_of(rank, world_size, columns)
    assert torch.equal(table, wanted["table"].data)
    assert torch.equal(got["row"], wanted["row"].data)
    return grown[0]


def test_a_table_passes_through_a_buffer(tmp_path: Path) -> None:
    """48 MB a rank through 2 MB, into the same layout and another; and without blocks, as older versions wrote it."""
    folder = str(tmp_path / "blocks")
    for grown in run_ranks(saved, 2, folder, BUFFER):
        assert grown < BUFFER + SLACK
    for columns in (False, True):
        for grown in run_ranks(loaded, 2, folder, columns):
            assert grown < BUFFER + SLACK
    whole = str(tmp_path / "whole")
    run_ranks(saved, 2, whole, 1 << 40)
    for grown in run_ranks(loaded, 2, whole, True):
        assert grown > 40 * MB, "a whole shard at a time: the measurement must show it"


def in_shares(rank: int, world_size: int, tree: dict[str, Any], resume: bool) -> tuple[int, int, int, float]:
    """Bytes of the dense optimizer's state and of what this rank has to write of it; by how much a save, or going on
    from it, grew this rank; the next step's loss.
    """
    import peer_dist.training.trainer as module
    from peer_dist.checkpoints.state import run_state
    from peer_dist.config import parse_config
    from peer_dist.megatron import dist_checkpoint

    dist_checkpoint.BUFFER_BYTES = BUFFER
    restore, grown = module.restore_run, []

    def measured(*args: Any) -> None:
        with resident(grown):
            restore(*args)

    module.restore_run = measured
    trainer = module.Trainer(parse_config(tree, "test"))
    if not resume:
        trainer.step()
        with resident(grown):
            trainer.save()
    state = run_state(trainer.model, trainer.engine, trainer.parallel)
    own = {shard.data.data_ptr(): shard.data.nbytes for shard in state["optimizer"].values()}
    whole = sum(value.nbytes for *_, value in trainer.engine.dense_state())
    return whole, sum(own.values()), grown[0], trainer.step()["train/loss"]


@pytest.mark.parametrize("stage", [1, 3])
def test_the_dense_optimizer_is_never_whole_on_a_rank(stage: int, text: Path, tmp_path: Path) -> None:
    """Each of two ranks keeps what it writes, half; loading takes a few tensors at a time."""
    tree = small_config(text, tmp_path)
    tree["model"] |= {"num_layers": 8, "hidden_size": 256, "ffn_hidden_size": 1024, "mlp": ["peer"] + ["dense"] * 7}
    tree["train"]["global_batch_size"] = 4
    tree |= {"zero": {"stage": stage}, "parallel": {"expert": 2}}
    saving, loading = (run_ranks(in_shares, 2, tree, resume) for resume in (False, True))
    for whole, mine, grown, _ in saving:
        assert whole > 70 * MB
        assert mine < 0.55 * whole
        assert grown < mine + BUFFER + SLACK
    for *_, grown, loss in loading:
        assert grown < BUFFER + SLACK
        assert loss == saving[0][-1]
