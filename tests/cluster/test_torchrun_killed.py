"""A torchrun that is killed leaves no ranks behind: they save and leave, and the same command goes on from there."""

import os
import signal
import sys

import psutil
import pytest

from peer_dist.checkpoints.store import CheckpointStore
from tests.cluster.test_launch import Launched, config_in, losses_of

pytestmark = [pytest.mark.cluster, pytest.mark.cluster_quick, pytest.mark.timeout(300)]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.mark.parametrize(
    "between", [["-m", "peer_dist"], ["--no-python", "sh", "-c", '"$PYTHON" -m peer_dist "$@"; true', "sh"]]
)
def test_ranks_save_and_leave(text, tmp_path, between):
    tree = config_in(text, tmp_path, steps=100_000)
    launched = Launched([*TORCHRUN, *between, "train"], tmp_path, "killed")
    metrics = tmp_path / "logs" / "metrics.jsonl"
    launched.until(lambda: metrics.exists() and metrics.read_text().count("\n") > 5)
    ranks = psutil.Process(launched.process.pid).children(recursive=True)
    os.kill(launched.process.pid, signal.SIGKILL)
    launched.process.wait()
    _, alive = psutil.wait_procs(ranks, timeout=30)
    for process in alive:
        process.kill()
    assert not alive, launched.text()
    assert CheckpointStore(tree["checkpoint"]["dir"]).steps()[-1] == len(losses_of(tmp_path))
