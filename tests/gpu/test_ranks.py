"""Several GPUs over NCCL, or as many CPU ranks over gloo, against one process."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.device import DEVICE, run_on_devices
from tests.ranks import run_ranks
from tests.runs import (
    assert_close,
    copy_checkpoint,
    in_folder,
    metrics_of,
    run_to_the_end,
    small_config,
    trained,
    with_keys,
)
from tests.shards import assert_as_whole, tokens_of
from tests.test_sharding import LAYERS, build, run, sharded_case

# on the CPU the default run has these cases, and more, in test_sharding.py and test_layouts.py
pytestmark = [pytest.mark.gpu, pytest.mark.slow]
GPUS = torch.cuda.device_count() if DEVICE.type == "cuda" else 2
COUNTS = [[11, 12], [0, 23], [3, 0, 20, 1], [4, 0, 12, 7, 3, 5, 1, 9]]  # tokens of each rank
needs_two = pytest.mark.skipif(GPUS < 2, reason="one GPU")


def whole_case(rank, world_size, cases, counts):
    return [run(build(options, None), *tokens_of(counts)) for options in cases]


@needs_two
@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("counts", [counts for counts in COUNTS if len(counts) <= max(2, GPUS)], ids=str)
def test_sharded_equals_whole(counts, columns):
    """Outputs and every gradient in float64; ranks without tokens; parts; uneven slices."""
    cases = [{"layer": options | {"dispatch_chunks": chunks}} for options in LAYERS.values() for chunks in (1, 3)]
    (wanted,) = run_ranks(whole_case, 1, cases, counts)
    ranks = run_on_devices(sharded_case, len(counts), cases, counts, columns)
    for number, want in enumerate(wanted):
        assert_as_whole([results[number] for results in ranks], want, columns, 1e-10)


LAYOUTS = {
    "rows": {"parallel": {"expert": 2}},
    "columns": {"parallel": {"expert_tensor": 2}},
    "rows, ZeRO 3": {"parallel": {"expert": 2}, "zero": {"stage": 3}},
    "rows, ZeRO 0": {"parallel": {"expert": 2}, "zero": {"stage": 0}},
    "rows, offload": {"parallel": {"expert": 2}, "zero": {"stage": 2, "offload": True}},
    "copies of the tables": {"zero": {"stage": 2}},
    "tensor and sequence": {"parallel": {"tensor": 2, "sequence": True, "expert": 2}},
    "pipeline": {"parallel": {"pipeline": 2}, "model": {"num_layers": 4, "mlp": ["peer", "dense", "peer", "dense"]}},
}


@pytest.fixture(scope="module")
def one_process(text, tmp_path_factory):
    """A run on one CPU rank with a checkpoint of its second step, by its number of layers."""
    trees = {}
    for layers in (3, 4):
        folder = tmp_path_factory.mktemp(f"layers-{layers}")
        mlp = ["peer", "dense"] * 2
        tree = with_keys(small_config(text, folder), model={"num_layers": layers, "mlp": mlp[:layers]})
        tree = with_keys(tree, checkpoint={"interval": 2, "keep": 9}, logging={"interval": 1})
        run_ranks(run_to_the_end, 1, tree)
        trees[layers] = tree
    return trees


@needs_two
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_train_as_one_process(layout, one_process, tmp_path):
    keys = LAYOUTS[layout]
    reference = one_process[keys.get("model", {}).get("num_layers", 3)]
    copies = 2 // keys.get("parallel", {}).get("tensor", 1) // keys.get("parallel", {}).get("pipeline", 1)
    keys = {**keys, "train": {"micro_batch_size": 2 // copies}}  # batch norm sees as many sequences a pass
    tree = with_keys(in_folder(reference, tmp_path), **keys)
    copy_checkpoint(reference, tree, 2)
    lines = {line["step"]: line for line in metrics_of(reference) if "train/loss" in line}
    for losses, norms in run_on_devices(trained, 2, tree, 8):
        assert_close(losses, [lines[step]["train/loss"] for step in range(3, 11)], 1e-4)
        assert_close(norms, [lines[step]["optimizer/grad_norm"] for step in range(3, 11)], 1e-4)
