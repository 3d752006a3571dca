"""What tests share: prepared real text and a small config that trains in a blink."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from peer_dist.megatron import Parallel

# Files that take longest, longest first: a worker that meets one of them last would finish long after the others.
LONGEST = ("training", "layouts", "watchdog", "sharding", "doctor", "kernels", "guard", "triton", "sweep", "kinds")

HIDDEN = os.environ.get("CUDA_VISIBLE_DEVICES")  # which Slurm sets, too
os.environ["TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"] = "0"  # NVIDIA's images set 1: float32 products would be TF32's
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors are small: threads of several workers only wait for cores


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Where pytest-xdist or pytest-timeout are not installed, nobody else knows their options in pyproject.toml."""
    if not pluginmanager.hasplugin("xdist"):
        for option in ("--numprocesses", "--dist"):
            parser.addoption(option, help="ignored without pytest-xdist")
        parser.addoption("--no-loadscope-reorder", action="store_true", help="ignored without pytest-xdist")
    if not pluginmanager.hasplugin("timeout"):
        parser.addini("timeout", help="ignored without pytest-timeout")


def pytest_configure(config: pytest.Config) -> None:
    """The marker of pytest-timeout, where it is not installed."""
    if not config.pluginmanager.hasplugin("timeout"):
        config.addinivalue_line("markers", "timeout(seconds): ignored without pytest-timeout")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With ``-m gpu`` files without such tests are not imported: they may need what a GPU machine does not have."""
    gpu = config.option.markexpr.startswith("gpu") and collection_path.suffix == ".py"
    return True if gpu and "mark.gpu" not in collection_path.read_text() else None


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Tests of a cluster, and of a GPU, have the machine to themselves, one after the other. All others see no GPU."""
    if config.option.markexpr.startswith(("cluster", "gpu")):
        config.option.numprocesses, config.option.dist = None, "no"
    if not config.option.markexpr.startswith("gpu"):  # before torch is imported; workers inherit it
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Nobody shall take a run without GPUs for one with them."""
    if HIDDEN and not config.option.markexpr.startswith("gpu"):
        terminalreporter.write_line(
            f"CUDA_VISIBLE_DEVICES={HIDDEN} was hidden from these tests: -m gpu shows them GPUs"
        )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(autouse=True)
def own_random_numbers() -> None:
    """A test's numbers are those of its own, not of whatever ran before it in the process; ranks are seeded too."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """Prefix of the shipped text, prepared with the byte tokenizer."""
    from peer_dist.data.prepare import prepare

    prefix = tmp_path_factory.mktemp("data") / "shakespeare"
    prepare(None, prefix)
    return prefix


@pytest.fixture(scope="module")
def parallel() -> Iterator[Parallel]:
    """Megatron's groups of one rank, in this process, which has a GPU only where tests of one run."""
    import torch
    import torch.distributed as dist

    from peer_dist.megatron import Parallel

    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        groups = Parallel.initialize()
        yield groups
        groups.destroy()
        dist.destroy_process_group()


@pytest.fixture
def small(text, tmp_path) -> dict:
    """See :func:`tests.runs.small_config`; checkpoints and logs in the test's own folder."""
    from tests.runs import small_config

    return small_config(text, tmp_path)
