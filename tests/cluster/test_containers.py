"""The images, built by buildah and run by podman, without a registry.

The CPU image's base is made here of Debian's packages; the GPU image's, in place of NVIDIA's, is that with a torch and
a Triton in the system. Builds and layers stay, so that a second run takes less: remove them with
``podman image rm peer_dist_test:{cpu,gpu,nvidia,base}``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
import uuid
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent
TOOLS = ("buildah", "podman", "mmdebstrap", "runc")
BASE, IMAGE = "localhost/peer_dist_test:base", "localhost/peer_dist_test:cpu"
NVIDIA, GPU_IMAGE = "localhost/peer_dist_test:nvidia", "localhost/peer_dist_test:gpu"

# What NVIDIA's image has and this package meets: a pre-release torch, a numpy and a pydantic older than the versions
# that were tried, constraints that pip reads by itself, a compiler, and the script that everything starts through.
STAND_IN = """
ARG BASE
FROM ${BASE}
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ARG PIP_CERT
ARG PIP_DEFAULT_TIMEOUT
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev python3-pip
RUN python3 -m pip install --no-cache-dir --break-system-packages \\
    torch==2.13.0 triton numpy==1.26.4 packaging pydantic==2.11.9
RUN cd /usr/local/lib/python3*/dist-packages && version=2.13.0a0+145a3a7bda.nv25.10 \\
    && mv torch-*.dist-info torch-$version.dist-info \\
    && sed -i "s/^Version: .*/Version: $version/" torch-$version.dist-info/METADATA \\
    && sed -i "s/^__version__ = .*/__version__ = '$version'/" torch/version.py \\
    && mkdir /etc/pip && echo protobuf==4.25.8 > /etc/pip/constraint.txt
COPY --chmod=755 nvidia_entrypoint.sh /opt/nvidia/
ENV PIP_CONSTRAINT=/etc/pip/constraint.txt
ENTRYPOINT ["/opt/nvidia/nvidia_entrypoint.sh"]
"""
BANNER = "== PyTorch =="

NOT_PINNED = {"peer-dist", "pip", "setuptools", "wheel"}  # a virtual environment comes with tools of its own

# What works without systemd, in a machine that limits its own processes.
PODMAN = ("podman", "--cgroup-manager", "cgroupfs", "--events-backend", "file", "--runtime", "runc")
RUN = (*PODMAN, "run", "--rm", "--no-healthcheck", "--ulimit", "nofile=1024:1024", "--ulimit", "nproc=4096:4096")

SMALL = (
    "peer.query_norm=rms", "peer.num_experts=4096",
    "model.seq_length=64", "model.hidden_size=64", "model.ffn_hidden_size=128",
    "train.steps=6", "train.micro_batch_size=4", "train.global_batch_size=16", "evaluation.interval=3",
    "evaluation.batches=2", "checkpoint.interval=6", "optimizer.warmup_steps=2", "train.precision=fp32",
)  # fmt: skip

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]


def _call(*command: object, **kwargs: object) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **kwargs)  # type: ignore
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def tools() -> None:
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("containers are built here by root on Linux only")
    if any(shutil.which(name) is None for name in TOOLS):
        if shutil.which("apt-get") is None:
            pytest.skip(f"{', '.join(TOOLS)} are not installed, and there is no apt-get to install them")
        try:
            _call("apt-get", "update")
            env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
            _call("apt-get", "install", "--yes", "--no-install-recommends", *TOOLS, env=env)
        except AssertionError as error:
            pytest.skip(f"{', '.join(TOOLS)} cannot be installed: {error}")


@pytest.fixture(scope="module")
def base(tools: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Debian with Python, in place of the image that the Dockerfile starts from."""
    if subprocess.run(["buildah", "images", BASE], capture_output=True).returncode:
        archive = tmp_path_factory.mktemp("base") / "base.tar.gz"
        packages = "ca-certificates,python3,python3-venv"
        _call("mmdebstrap", "--variant=minbase", f"--include={packages}", "bookworm", archive)
        container = _call("buildah", "from", "scratch").strip()
        _call("buildah", "add", container, archive, "/")
        _call("buildah", "commit", "--rm", container, BASE)
    return BASE


@pytest.fixture(scope="module")
def image(base: str) -> str:
    _build("docker/Dockerfile.cpu", base, IMAGE)
    return IMAGE


@pytest.fixture(scope="module")
def nvidia(base: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The image that docker/Dockerfile starts from here."""
    context = tmp_path_factory.mktemp("nvidia")
    (context / "Dockerfile").write_text(STAND_IN)
    (context / "nvidia_entrypoint.sh").write_text(f'#!/bin/bash\necho "{BANNER}"\nexec "$@"\n')
    _build("Dockerfile", base, NVIDIA, context)
    return NVIDIA


@pytest.fixture(scope="module")
def gpu_image(nvidia: str) -> str:
    _build("docker/Dockerfile", nvidia, GPU_IMAGE)
    return GPU_IMAGE


def _build(dockerfile: str, base: str, tag: str, context: Path = ROOT, *, layers: bool = True) -> None:
    """``layers``: those of its steps stay, for the next build."""
    command = ["buildah", "build", "--format", "docker", "--isolation", "chroot", f"--layers={layers}", "--pull-never"]
    mounted: set[str] = set()
    for name, value in _pips_settings().items():
        command += ["--build-arg", f"{name}={value}"]
        for place in value.split():
            # an index on this machine lists files that lie beside it
            folder = str(Path(place.removeprefix("file://")).parent) if place.startswith("file://") else place
            if folder.startswith("/") and folder not in mounted:
                mounted.add(folder)
                command += ["--volume", f"{folder}:{folder}:ro"]
    command += ["--build-arg", f"BASE={base}", "--file", dockerfile, "--tag", tag, "."]
    _call(*command, cwd=context)


def _pips_settings() -> dict[str, str]:
    """Where pip finds packages on this machine, as the Dockerfile's arguments."""
    listed = _call(sys.executable, "-m", "pip", "config", "list").splitlines()
    settings = {
        name.rpartition(".")[2]: value.strip("'") for name, _, value in (line.partition("=") for line in listed)
    }
    names = ("index-url", "extra-index-url", "find-links", "cert", "default-timeout")
    return {f"PIP_{name.upper().replace('-', '_')}": settings[name] for name in names if name in settings}


@pytest.fixture
def volumes(image: str):
    """Options that mount a new data and a new runs volume, and the latter's folder on this machine."""
    names = [f"peer-test-{uuid.uuid4().hex[:8]}-{kind}" for kind in ("data", "runs")]
    for name in names:
        _call("podman", "volume", "create", name)
    options = [
        word for name, kind in zip(names, ("data", "runs")) for word in ("--volume", f"{name}:/workspace/{kind}")
    ]
    yield options, Path(_call("podman", "volume", "inspect", "--format", "{{.Mountpoint}}", names[1]).strip())
    for name in names:
        subprocess.run(["podman", "volume", "rm", "--force", name], capture_output=True)


@pytest.fixture
def network(tools: None):
    name, subnet = f"peer-test-{uuid.uuid4().hex[:8]}", "10.89.91"
    try:
        _call("podman", "network", "create", "--subnet", f"{subnet}.0/24", name)
    except AssertionError as error:
        pytest.skip(f"no network for containers here: {error}")
    yield name, subnet
    subprocess.run(["podman", "network", "rm", "--force", name], capture_output=True)


def test_commands_run_as_a_plain_user(image: str) -> None:
    assert _call(*RUN, image, "--version").startswith("peer_dist ")
    assert _call(*RUN, image, "id", "--user").strip() == "10001"
    assert "versions" in _call(*RUN, "--shm-size", "1g", image, "doctor", "--seconds", "60")
    assert _call(*RUN, "--entrypoint", "peer-dist-health", image).startswith("peer_dist ")
    # the versions that were tried, and torch's build without CUDA's libraries
    installed = _installed(image)
    tried = _tried()
    assert installed.keys() - NOT_PINNED <= tried.keys()
    for name, version in tried.items():
        assert installed.get(name, version).split("+")[0] == version


def test_kernels_need_no_compiler(image: str) -> None:
    program = "import shutil; from peer_dist.kernels import native; print(shutil.which('cc'), native.load_library())"
    compiler, _, library = _call(*RUN, image, "python3", "-c", program).strip().partition(" ")
    assert compiler == "None"
    assert "kernels/built/expert_mix-" in library


def _versions(text: str) -> dict[str, str]:
    return dict(line.lower().replace("_", "-").split("==") for line in text.splitlines() if "==" in line)


def _tried() -> dict[str, str]:
    return _versions((ROOT / "docker/constraints.txt").read_text())


def _installed(image: str, *options: str) -> dict[str, str]:
    command = ["python3", "-m", "pip", "list", "--format=freeze", "--disable-pip-version-check", *options]
    return _versions(_call(*RUN, "--entrypoint=", image, *command))


def test_the_gpu_image_starts_programs(gpu_image: str) -> None:
    """Through NVIDIA's script, whose words are not among theirs."""

    def output(*words: str) -> str:
        done = subprocess.run([*RUN, "--shm-size", "1g", gpu_image, *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert BANNER in done.stderr
        assert BANNER not in done.stdout
        return done.stdout

    assert output("--version").startswith("peer_dist ")
    assert output("id", "--user") == "10001\n"
    assert "versions" in output("doctor", "--seconds", "60")
    train = " ".join(_train("x", "parallel.expert=1"))
    both = f"peer-dist prepare --output data/tinyshakespeare && peer-dist {train}"
    assert "metrics.jsonl" in output("bash", "-c", f"{both} && ls runs/x/logs").split()
    # a user without a home has the kernels that were built ahead
    program = "from peer_dist.kernels import native; print(native.load_library())"
    assert "kernels/built/expert_mix-" in _call(*RUN, "--user", "10002", gpu_image, "python3", "-c", program)


def test_the_gpu_image_keeps_what_its_base_has(nvidia: str, gpu_image: str) -> None:
    """And the rest has the versions that were tried."""
    before, after = _installed(nvidia), _installed(gpu_image)
    assert before["torch"] == "2.13.0a0+145a3a7bda.nv25.10"
    tried = _tried()
    assert before["numpy"] != tried["numpy"]
    added = _installed(gpu_image, "--local")
    assert added.keys() & before.keys() <= NOT_PINNED
    for name in after.keys() - NOT_PINNED:
        assert after[name] == (before.get(name) or tried.get(name)), name
    assert {"megatron-core", "deepspeed", "mpi4py"} <= added.keys()
    program = "import numpy, pydantic, torch, triton; print(*(m.__file__ for m in (numpy, pydantic, torch, triton)))"
    for file in _call(*RUN, gpu_image, "python3", "-c", program).split():
        assert file.startswith("/usr/local/lib/python3")


def test_a_base_that_does_not_fit_fails_the_build(nvidia: str, tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text(
        "ARG BASE\nFROM ${BASE}\nARG PIP_CERT\n"
        "RUN python3 -m pip install --break-system-packages --no-deps pydantic==1.10.26\n"
    )
    old = f"{NVIDIA}-old"
    _build("Dockerfile", nvidia, old, tmp_path, layers=False)
    try:
        with pytest.raises(AssertionError) as failed:
            _build("docker/Dockerfile", old, f"{GPU_IMAGE}-old", layers=False)
    finally:
        subprocess.run(["podman", "image", "rm", "--force", old], capture_output=True)
    # at the beginning of a line: buildah repeats the command too
    told = [line.strip() for line in str(failed.value).splitlines()]
    assert "The user requested (constraint) pydantic==1.10.26" in told
    assert any(line.startswith("pip could not install peer_dist beside what the image has") for line in told)


def _losses(runs: Path, run: str) -> list[float]:
    lines = [json.loads(line) for line in (runs / run / "logs/metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


def _train(run: str, *more: str) -> list[str]:
    folders = [f"checkpoint.dir=runs/{run}/checkpoints", f"logging.dir=runs/{run}/logs"]
    return ["train", "--config", "configs/quickstart.yaml", *SMALL, *folders, *more]


def _services() -> dict[str, dict]:
    return yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]


def _on_two_nodes(image: str, options: list[str], network: tuple[str, str], *command: str) -> list[tuple[int, str]]:
    """Exit code and output of a command in two containers, with the names and variables of compose.yaml."""
    bridge, subnet = network
    nodes = []
    for number in (0, 1):
        variables = [f"--env={name}={value}" for name, value in _services()[f"node{number}"]["environment"].items()]
        place = ["--network", bridge, "--ip", f"{subnet}.{10 + number}", "--hostname", f"node{number}"]
        place += ["--add-host", f"node{1 - number}:{subnet}.{11 - number}"]
        words = [*RUN, *place, *options, *variables, image, *command]
        nodes.append(subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    told = [node.communicate(timeout=600)[0] for node in nodes]
    return [(node.returncode, text) for node, text in zip(nodes, told)]


def test_the_doctor_sees_two_nodes(image: str, volumes, network) -> None:
    """Names that cross hosts, a volume that is shared, and Docker's small shared memory."""
    config = ("--config", "configs/quickstart.yaml", "parallel.expert=1", "parallel.expert_tensor=2")
    (code, told), (other, _) = _on_two_nodes(image, volumes[0], network, "doctor", *config, "--json")
    report = json.loads(next(line for line in told.splitlines() if line.startswith("{")))
    # where this machine is busy a rank may be slow
    found = {finding["check"]: finding for finding in report["findings"] if finding["check"] != "speed of ranks"}
    assert "fail" not in {finding["verdict"] for finding in found.values()}, told
    assert (code == 0, other == 0) == (report["ok"], report["ok"])
    assert {"node0 x 1", "node1 x 1"} <= set(found["ranks"]["told"].rpartition(": ")[2].split(", "))
    assert "1 of 1 groups cross hosts, such as ranks" in found["layout"]["told"]
    assert "of shared memory" in found["memory and disk"]["told"]
    assert found["shared folders"]["verdict"] == "ok"
    # without a volume the folders have the same name and are not the same
    (code, told), (other, _) = _on_two_nodes(image, [], network, "doctor", *config, "--json")
    report = json.loads(next(line for line in told.splitlines() if line.startswith("{")))
    assert 0 not in (code, other)
    failed = [
        finding["told"]
        for finding in report["findings"]
        if finding["verdict"] == "fail" and finding["check"] != "speed of ranks"
    ]
    assert len(failed) == 2  # checkpoint.dir and logging.dir
    assert all("does not see what rank" in told for told in failed)


def test_two_containers_train_as_one_process_does(image: str, volumes, network) -> None:
    """With the variables of compose.yaml; and TensorBoard, as its third service, shows the run."""
    options, runs = volumes
    _call(*RUN, *options, image, "prepare", "--output", "data/tinyshakespeare", "--force")
    _call(*RUN, *options, image, *_train("one", "parallel.expert=1"))

    told = _on_two_nodes(image, options, network, *_train("two"))
    assert [code for code, _ in told] == [0, 0], "\n".join(text for _, text in told)
    one, two = _losses(runs, "one"), _losses(runs, "two")
    assert len(one) == 6
    assert two == pytest.approx(one, rel=1e-5)

    bridge, subnet = network
    served = f"peer-test-{uuid.uuid4().hex[:8]}"
    place = ["--detach", "--name", served, "--network", bridge, "--ip", f"{subnet}.20"]
    _call(*RUN, *place, *options, image, *_services()["tensorboard"]["command"])
    try:
        assert _answer(f"http://{subnet}.20:6006/data/runs", 120) == ["one/logs", "two/logs"]
    finally:
        subprocess.run(["podman", "rm", "--force", served], capture_output=True)


def _answer(address: str, seconds: float) -> object:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + seconds
    while True:
        try:
            answer = json.loads(opener.open(address, timeout=10).read())
            if answer or time.monotonic() > deadline:
                return answer
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(1)
