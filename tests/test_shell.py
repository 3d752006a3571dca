"""Scripts and Dockerfiles pass their linters, and the small rules in them hold."""

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted([*ROOT.glob("launch/**/*.sh"), *ROOT.glob("docker/*.sh"), ROOT / ".ci/run"])
DOCKERFILES = sorted(ROOT.glob("docker/Dockerfile*"))


def _tool(name: str) -> str:
    """From the environment that runs the tests, or the PATH."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"{name} is not installed: pip install 'peer_dist[dev]'")
    return found


def test_shellcheck() -> None:
    assert len(SCRIPTS) > 5
    done = subprocess.run(
        [_tool("shellcheck"), "--external-sources", *map(str, SCRIPTS)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout


def test_hadolint() -> None:
    assert len(DOCKERFILES) == 2
    done = subprocess.run([_tool("hadolint"), *map(str, DOCKERFILES)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


def test_constraints_keep_what_is_installed(tmp_path: Path) -> None:
    """An image's own torch and numpy win over the versions that were tried; the rest is pinned."""
    python = tmp_path / "python"
    installed = ["torch==2.9.0a0+145a3a7bda.nv25.10", "NumPy==1.26.4", "Typing.Extensions==4.1"]
    python.write_text(f"#!/bin/sh\nprintf '%s\\n' pip==25.0 {' '.join(installed)}\n")
    python.chmod(0o755)
    done = subprocess.run([ROOT / "docker/constraints.sh", python], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    tried = dict(
        line.split("==") for line in (ROOT / "docker/constraints.txt").read_text().splitlines() if "==" in line
    )
    assert lines[:3] == ["torch==2.9.0a0+145a3a7bda.nv25.10", "NumPy==1.26.4", "Typing.Extensions==4.1"]
    assert f"deepspeed=={tried['deepspeed']}" in lines
    names = [line.split("==")[0].lower().replace("_", "-").replace(".", "-") for line in lines]
    assert len(names) == len(set(names))
    assert "pip" not in names


def test_conflicts_are_told_where_ours_have_a_part(tmp_path: Path) -> None:
    """Between what pip installed into an environment and the system's; not those that the system has with itself."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    ours = next(tmp_path.glob("venv/lib/python3*/site-packages"))
    system = tmp_path / "system"
    (ours / "system.pth").write_text(f"{system}\n")

    def install(folder: Path, name: str, version: str, *needs: str) -> None:
        lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {need}" for need in needs)]
        metadata = folder / f"{name}-{version}.dist-info/METADATA"
        metadata.parent.mkdir(parents=True)
        metadata.write_text("Metadata-Version: 2.1\n" + "\n".join(lines) + "\n")

    def check() -> "subprocess.CompletedProcess[str]":
        command = [ROOT / "docker/conflicts.sh", tmp_path / "venv/bin/python"]
        return subprocess.run(command, capture_output=True, text=True)

    install(system, "numpy", "1.26.4")
    install(system, "dali", "1.0", "numpy>=2", "absent")
    install(ours, "Our_tool", "3.0", "numpy")
    fits = check()
    assert (fits.returncode, fits.stdout, fits.stderr) == (0, "", "")
    install(ours, "deepspeed", "0.19.8", "numpy>=2.1")
    install(system, "engine", "2.0", "our.tool<3")
    told = check()
    assert (told.returncode, told.stdout) == (1, "")
    first, *conflicts, last = told.stderr.splitlines()
    assert "does not fit what the image has" in first
    assert sorted(line.split()[0] for line in conflicts) == ["deepspeed", "engine"]
    assert "docker/constraints.txt" in last


@pytest.fixture
def entrypoint(tmp_path: Path):
    """Runs docker/entrypoint.sh; the programs that it would start say their names and arguments."""
    (tmp_path / "peer-dist-torchrun").symlink_to(ROOT / "launch/torchrun.sh")
    for name in ("peer-dist", "python3", "tensorboard"):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\necho {name} "$@"\n')
        program.chmod(0o755)

    def run(*arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        env = {"PATH": f"{tmp_path}:/usr/bin:/bin", **variables}
        return subprocess.run([ROOT / "docker/entrypoint.sh", *arguments], capture_output=True, text=True, env=env)

    return run


def test_entrypoint(entrypoint) -> None:
    assert entrypoint().stdout == "peer-dist --help\n"
    assert entrypoint("prepare", "--output", "a b", RANKS_PER_NODE="2").stdout == "peer-dist prepare --output a b\n"
    assert entrypoint("train", "--config", "c").stdout == "peer-dist train --config c\n"
    assert entrypoint("tensorboard", "--logdir", "runs").stdout == "tensorboard --logdir runs\n"
    alone = entrypoint("train", "--config", "c", RANKS_PER_NODE="2").stdout
    assert alone.startswith("python3 -m torch.distributed.run --nnodes 1 --nproc-per-node 2 ")
    assert alone.endswith(
        "--rdzv-endpoint localhost:0 --rdzv-id peer_dist --max-restarts 0 -m peer_dist train --config c\n"
    )
    two = entrypoint("doctor", RANKS_PER_NODE="gpu", NNODES="2", RDZV_ENDPOINT="a:1", RDZV_ID="x")
    assert "--nnodes 2 --nproc-per-node gpu --rdzv-backend c10d --rdzv-endpoint a:1 --rdzv-id x" in two.stdout
    assert two.stderr == "waiting for 2 nodes at a:1\n"
    lost = entrypoint("train", RANKS_PER_NODE="1", NNODES="2")
    assert lost.returncode == 2
    assert "RDZV_ENDPOINT" in lost.stderr


def test_entrypoint_in_nvidias_image(tmp_path: Path) -> None:
    """Through its own script, whose words are not among the program's."""
    nvidia = tmp_path / "nvidia.sh"
    nvidia.write_text('#!/bin/bash\necho "== PyTorch =="\nexport COMPAT=yes\nexec "$@"\n')
    program = tmp_path / "peer-dist"
    program.write_text('#!/bin/sh\necho "$COMPAT" "$#" "$@"\necho warning >&2\nexit 3\n')
    script = tmp_path / "entrypoint.sh"
    script.write_text(
        (ROOT / "docker/entrypoint.sh").read_text().replace("/opt/nvidia/nvidia_entrypoint.sh", str(nvidia))
    )
    for file in (nvidia, program, script):
        file.chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run([script, "prepare", "a b"], capture_output=True, text=True, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (3, "yes 2 prepare a b\n", "== PyTorch ==\nwarning\n")


@pytest.mark.parametrize("mpi", ["Open MPI 5", "HYDRA"])
def test_mpirun_hands_settings_on(tmp_path: Path, mpi: str) -> None:
    """Open MPI's daemons on other nodes pass on what is named; MPICH's pass on everything."""
    program = tmp_path / "mpirun"
    program.write_text(f'#!/bin/bash\n[ "$1" = --version ] && echo "{mpi}" && exit\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    settings = {
        "NCCL_IB_HCA": "mlx5",
        "GLOO_SOCKET_IFNAME": "eth0",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "CUDA_VISIBLE_DEVICES": "",  # hides them all
        "TRITON_CACHE_DIR": "/tmp/a b",
        "OMP_NUM_THREADS": "2",
        "LD_LIBRARY_PATH": "/lib/x",
        "CC": "gcc",
    }
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "TORCHELASTIC_RUN_ID": "x", "NCCL": "x", "HOME": "/root", **settings}
    done = subprocess.run([ROOT / "launch/mpirun.sh", "train"], capture_output=True, text=True, env=env, check=True)
    arguments = done.stdout.splitlines()
    handed = {after for word, after in itertools.pairwise(arguments) if word == "-x"}
    assert handed == (settings.keys() if "Open" in mpi else set())
    assert arguments[-4:] == ["python", "-m", "peer_dist", "train"]


def test_healthcheck(tmp_path: Path) -> None:
    program = tmp_path / "peer-dist"
    program.write_text("#!/bin/sh\necho peer_dist 0\n")
    program.chmod(0o755)
    metrics = tmp_path / "metrics.jsonl"

    def check(**variables: str) -> "subprocess.CompletedProcess[str]":
        env = {"PATH": f"{tmp_path}:/usr/bin:/bin", **variables}
        return subprocess.run([ROOT / "docker/healthcheck.sh"], capture_output=True, text=True, env=env)

    assert check().stdout == check(METRICS=str(metrics)).stdout == "peer_dist 0\n"
    metrics.touch()
    assert check(METRICS=str(metrics)).returncode == 0
    os.utime(metrics, (0, 0))
    stale = check(METRICS=str(metrics))
    assert stale.returncode == 1
    assert "was last written" in stale.stdout
    program.write_text("#!/bin/sh\nexit 1\n")
    assert check().returncode == 1


def test_compose() -> None:
    """The two nodes meet at one of them, and differ in nothing but their names."""
    services = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]
    nodes = [services[name] for name in ("node0", "node1")]
    assert [node.pop("hostname") for node in nodes] == ["node0", "node1"]
    assert nodes[0] == nodes[1]
    assert nodes[0]["environment"]["RDZV_ENDPOINT"].startswith("node0:")
    assert nodes[0]["shm_size"]
    assert services["tensorboard"]["volumes"] == nodes[0]["volumes"]
