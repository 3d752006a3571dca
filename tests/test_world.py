"""Which rank a process is: what launchers say in the environment, and what is made of it."""

import os
import re
import socket
import sys
import tempfile
import time
import types

import pytest
import torch
import torch.distributed as dist
import typer
import yaml

from peer_dist.cli import _error, runs
from peer_dist.config import ConfigError
from peer_dist.ranks import launchers
from peer_dist.ranks.launchers import (
    Launch,
    WorldError,
    discover,
    expand_hosts,
    rank_said,
    ranks_started,
    tasks_per_node,
)
from peer_dist.ranks.world import World
from tests.ranks import run_each, run_ranks

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "run",
}
BATCH_SCRIPT = {  # what sbatch -N 2 -n 3 gives its script
    "SLURM_JOB_ID": "77",
    "SLURM_NTASKS": "3",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_JOB_NODELIST": "localhost,node2",
    "SLURM_TASKS_PER_NODE": "2,1",
}
SRUN = {
    **BATCH_SCRIPT,
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_NODELIST": "localhost,node2",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
}
ALONE = Launch(0, 1, 0, 1, "single process")


def test_torchrun():
    world = discover(TORCHRUN)
    assert world == Launch(3, 4, 1, 2, "torchrun", "127.0.0.1", 29500)
    assert discover({**SRUN, **TORCHRUN}) == world, "the ranks are those of torchrun, not of the srun around it"
    assert discover({"OMPI_COMM_WORLD_SIZE": "2", **TORCHRUN}) == world


def test_srun():
    world = discover(SRUN)
    assert (world.rank, world.world_size, world.local_rank, world.local_world_size) == (1, 3, 1, 2)
    assert (world.launcher, world.master_address) == ("Slurm (srun)", "localhost")
    assert 1024 < world.master_port < 32768
    other = discover({**SRUN, "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_NODEID": "1"})
    assert (other.rank, other.local_rank, other.local_world_size) == (2, 0, 1)
    assert other.master_port == world.master_port
    assert discover({**SRUN, "SLURM_STEP_ID": "3"}).master_port != world.master_port, "steps run side by side"
    again = discover({**SRUN, "SLURM_RESTART_COUNT": "1"})
    assert again.master_port != world.master_port, "what has the port may have it still"
    assert world.hosts == (), "tasks may be anywhere"
    assert discover({**SRUN, "SLURM_DISTRIBUTION": "block"}).hosts == ("localhost", "localhost", "node2")
    assert discover({**SRUN, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "4321"}).master_port == 4321


@pytest.mark.parametrize(
    "environ",
    [
        {},
        BATCH_SCRIPT,
        {**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"},  # srun --pty
        {"OMPI_COMM_WORLD_SIZE": "1", "PMIX_RANK": "0"},
        {"PMI_SIZE": "1", "MPI_LOCALNRANKS": "1"},
    ],
)
def test_one_process(environ):
    assert discover(environ) == ALONE


@pytest.mark.parametrize(
    ("environ", "launcher"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "Open MPI"),
        ({"OMPI_COMM_WORLD_SIZE": "4", **SRUN}, "Open MPI"),  # mpirun has its daemons started by srun
        ({"PMI_SIZE": "4"}, "MPICH/PMI"),
        ({"PMI_SIZE": "4", "MPI_LOCALNRANKS": "2", **SRUN}, "MPICH/PMI"),
        ({"PMIX_RANK": "1"}, "PMIx"),
        ({"PMI_SIZE": "3", **SRUN}, "Slurm (srun)"),  # srun --mpi=pmi2: Slurm says it all
        ({"PMIX_RANK": "1", **SRUN}, "Slurm (srun)"),
    ],
)
def test_mpi_or_srun(environ, launcher, monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", types.SimpleNamespace(MPI=StandIn(size=4)))
    assert discover(environ).launcher == launcher


class StandIn:
    """As much of mpi4py.MPI as is asked; two processes on each node."""

    COMM_TYPE_SHARED = 1

    def __init__(self, size, rank=0):
        self.size, self.rank = size, rank
        self.COMM_WORLD = types.SimpleNamespace(
            Get_rank=lambda: rank, Get_size=lambda: size, Split_type=lambda kind: self.node(), bcast=self.bcast
        )
        self.finalized = False

    def node(self):
        return types.SimpleNamespace(Get_rank=lambda: self.rank % 2, Get_size=lambda: 2, Free=lambda: None)

    def bcast(self, value):
        assert (value is not None) == (self.rank == 0)
        return value or ("10.0.0.1", 4321)

    def Get_library_version(self):
        return "MPICH Version:      5.0.2\nmore"

    def Finalize(self):
        self.finalized = True


def test_mpi(monkeypatch):
    mpi = StandIn(size=4, rank=3)
    monkeypatch.setitem(sys.modules, "mpi4py", types.SimpleNamespace(MPI=mpi))
    assert discover({"PMI_SIZE": "4"}) == Launch(3, 4, 1, 2, "MPICH/PMI", "10.0.0.1", 4321)
    assert mpi.finalized
    with pytest.raises(WorldError, match=r"Open MPI started 2 processes, but mpi4py loads MPICH Version: .* sees 4"):
        discover({"OMPI_COMM_WORLD_SIZE": "2"})


def test_an_mpi_that_cannot_be_loaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(WorldError, match=r"mpi4py finds no library of it \(.*\); install one"):
        discover({"OMPI_COMM_WORLD_SIZE": "2"})
    with pytest.raises(WorldError, match=r"mpi4py cannot load MPI4PY_LIBMPI=/lib/x.so \(.*\); set it to the libmpi"):
        discover({"OMPI_COMM_WORLD_SIZE": "2", "MPI4PY_LIBMPI": "/lib/x.so"})


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "", "WORLD_SIZE": "2"}, "WORLD_SIZE is '2' but RANK is not set; start the ranks with torchrun"),
        ({"RANK": "0"}, "RANK is set but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT; start the ranks with torchrun"),
        ({**TORCHRUN, "WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', not a number from 1 to 1000000; start ranks with"),
        (
            {name: value for name, value in SRUN.items() if name != "SLURM_STEP_NODELIST"},
            "SLURM_STEP_NUM_TASKS tells of 3 tasks, but SLURM_STEP_NODELIST is not set",
        ),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "2x"}, "SLURM_STEP_TASKS_PER_NODE is '2x', not numbers such as"),
        ({**SRUN, "SLURM_STEP_NODELIST": "[x"}, "SLURM_STEP_NODELIST is '[x', not names such as gpu[07-08,12]"),
        ({**SRUN, "SLURM_STEP_NODELIST": "a.invalid,b"}, "the node of rank 0, a.invalid, has no address on"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is '2' but RANK is not set; start the ranks with torchrun, or unset WORLD"),
        (
            {**TORCHRUN, "RANK": "5", "WORLD_SIZE": "2"},
            "RANK is 5, but must be below 2 (WORLD_SIZE); give each process",
        ),
        ({**TORCHRUN, "LOCAL_RANK": "2"}, "LOCAL_RANK is 2, but must be below 2 (LOCAL_WORLD_SIZE)"),
        (
            {**TORCHRUN, "LOCAL_WORLD_SIZE": "5"},
            "LOCAL_WORLD_SIZE is 5, more ranks on this node than the 4 of WORLD_SIZE",
        ),
        ({**TORCHRUN, "MASTER_PORT": "99999"}, "MASTER_PORT is '99999', not a number from 1 to 65535"),
        ({**TORCHRUN, "MASTER_ADDR": " "}, "RANK is set but not MASTER_ADDR"),
        ({**TORCHRUN, "MASTER_ADDR": "a\nb"}, "the node of rank 0, 'a\\nb', has no address on"),
        ({**SRUN, "SLURM_PROCID": "3"}, "SLURM_PROCID is 3, but must be below 3 (SLURM_STEP_NUM_TASKS)"),
        (
            {**SRUN, "SLURM_LOCALID": "2"},
            "SLURM_LOCALID is 2, but must be below 2 (SLURM_STEP_TASKS_PER_NODE for node 0)",
        ),
        ({**SRUN, "SLURM_NODEID": "2"}, "SLURM_NODEID is 2, but must be below 2 (SLURM_STEP_NODELIST)"),
        (
            {**SRUN, "SLURM_STEP_NODELIST": "localhost"},
            "tells of 3 tasks on 2 node(s), but SLURM_STEP_NODELIST of 1 node(s) and SLURM_STEP_NUM_TASKS of 3 tasks",
        ),
    ],
)
def test_incomplete_worlds(environ, message):
    with pytest.raises(WorldError) as error:
        discover(environ)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


ODD = ("", " ", "-1", "x", "1.0", "1e3", "0x1", "+1", "\u0663", "1_0", "9" * 5000, "nan", "1\n2", "$(id)", "[red]1")
NAMES = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR"),
    "srun": (
        *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST"),
        *("SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_ID", "SLURM_RESTART_COUNT", "SLURM_JOB_ID", "MASTER_PORT"),
    ),
    "Open MPI": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MASTER_PORT"),
    "MPICH": ("PMI_SIZE", "PMI_RANK", "MASTER_PORT"),
    "PMIx": ("PMIX_RANK", "MASTER_PORT"),
}


@pytest.mark.parametrize("launcher", NAMES)
def test_odd_values_of_launchers_are_one_sentence(launcher, monkeypatch):
    """Each variable with each odd value, and without: a sentence at once, or a launch whose numbers fit each other."""
    monkeypatch.setitem(sys.modules, "mpi4py", types.SimpleNamespace(MPI=StandIn(size=4, rank=3)))
    monkeypatch.setattr(socket, "getaddrinfo", _only_localhost)
    mpi = {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}
    whole = {
        "torchrun": TORCHRUN,
        "srun": SRUN,
        "Open MPI": mpi,
        "MPICH": {"PMI_SIZE": "4", "PMI_RANK": "3"},
        "PMIx": {"PMIX_RANK": "3"},
    }[launcher]
    told = []
    for name in NAMES[launcher]:
        for value in (*ODD, None, "0", "1", "99999", "4294967295"):
            environ = {**whole, name: value}
            if value is None:
                del environ[name]
            try:
                launch = discover(environ)
            except WorldError as error:
                told.append(str(error))
            else:
                assert 0 <= launch.rank < launch.world_size, (name, value)
                assert 0 <= launch.local_rank < launch.local_world_size <= launch.world_size, (name, value)
                assert 0 <= launch.master_port < 65536, (name, value)
                assert launch.world_size == 1 or launch.master_port, (name, value)
    assert len(told) > 10 * len(NAMES[launcher])
    for sentence in told:
        assert "\n" not in sentence, sentence
        assert len(sentence) < 450, sentence
        assert ";" in sentence, "what to do"


def _only_localhost(host, port, *_):
    if host not in ("localhost", "127.0.0.1", "10.0.0.1"):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]


@pytest.mark.parametrize(
    "nodes",
    [
        *("", " ", ",", "a,", "a,,b", "a b", "[x", "x]", "a[]", "a[1", "a[1-]", "a[-1]", "a[5-3]", "a[1,]", "a[b-c]"),
        *("gpu[1-9999999999]", "a[0-999]b[0-999]c[0-999]", "a[1-99999999999999999999]", "a[1-2]\nb"),
    ],
)
def test_node_lists_that_are_none_are_one_sentence(nodes):
    begin = time.monotonic()
    with pytest.raises(
        WorldError, match=r"^SLURM_STEP_NODELIST is .*, not names such as gpu\[07-08,12\]; pass all SLURM"
    ):
        expand_hosts(nodes)
    assert time.monotonic() - begin < 1


@pytest.mark.parametrize("tasks", ["", "x", "2(x3", "2(x99999999999)", "2(x999999999)", "1," * 5, "\u0662", "-1"])
def test_task_counts_that_are_none_are_one_sentence(tasks):
    with pytest.raises(
        WorldError, match=r"^SLURM_STEP_TASKS_PER_NODE is '.*', not numbers such as 2\(x3\),1; pass all"
    ):
        tasks_per_node(tasks)


@pytest.mark.parametrize("size", [{}, {"WORLD_SIZE": ""}, {"WORLD_SIZE": "1"}])
def test_a_world_of_one_needs_no_launcher(size):
    assert discover(size) == ALONE


def test_how_many_were_started_is_known_before_mpi_is_asked():
    assert ranks_started({}) == 1
    assert ranks_started(TORCHRUN) == 4
    assert ranks_started(SRUN) == 3
    assert ranks_started({"OMPI_COMM_WORLD_SIZE": "4"}) == 4
    assert ranks_started({"PMIX_RANK": "0"}) is None


def test_the_rank_in_messages_is_the_innermost_launchers():
    assert rank_said({}) == rank_said({"RANK": "", "SLURM_PROCID": "0"}) == "0"
    assert rank_said({**SRUN, **TORCHRUN}) == "3"
    assert rank_said({"SLURM_PROCID": "2", "PMI_RANK": "1"}) == "1"


def test_what_is_no_rank_makes_no_line_of_its_own():
    assert _error("3") == "error (rank 3)"
    assert _error("a\nb" + "x" * 100) == f"error (rank a b{'x' * 14}...)"


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_rank_0_must_be_where_the_others_look_for_it(monkeypatch):
    """An address of another machine is refused at once; one that is translated to this machine is not."""
    first = {**TORCHRUN, "RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": _free_port()}
    assert discover(first).rank == 0
    monkeypatch.setattr(launchers, "_REACHING", 0.3)
    there = {**first, "MASTER_ADDR": "192.0.2.1"}
    with pytest.raises(
        WorldError, match=r"meet rank 0 at 192.0.2.1 \(MASTER_ADDR\), but rank 0 runs on .*; set MASTER"
    ):
        discover(there)
    assert discover({**there, "RANK": "1"}).rank == 1, "the others wait for it there"
    assert discover({**there, "TORCHELASTIC_USE_AGENT_STORE": "True"}).rank == 0, "torchrun serves"
    monkeypatch.setattr(launchers, "_is_own", lambda family, where: False)
    assert discover(first).rank == 0, "reached by itself, as through a service's address"


def test_a_name_service_that_does_not_answer_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(launchers, "_RESOLVING", 0.1)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: time.sleep(1) or [])
    with pytest.raises(
        WorldError, match=r"the node of rank 0, 127.0.0.1, has no address on .* \(no answer within 0 s\)"
    ):
        discover(TORCHRUN)


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"RANK": "5", "WORLD_SIZE": "2"}, "RANK is 5, but must be below 2"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT is '99999', not a number from 1 to 65535"),
        ({"MASTER_ADDR": "a.invalid"}, "the node of rank 0, a.invalid, has no address on"),
        ({"WORLD_SIZE": "3", "RANK": "1"}, "train.global_batch_size: 8 is not a multiple of"),
    ],
)
def test_train_tells_it_before_anything_of_training_is_imported(variables, sentence, small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peer_dist.training", None)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(small))
    for name, value in {**TORCHRUN, **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises((WorldError, ConfigError), match=re.escape(sentence)):
        runs.train(tmp_path / "run.yaml")


def test_a_node_without_an_address(monkeypatch):
    def unknown(*_):
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(WorldError, match=rf"rank 0, localhost, has no address on {re.escape(socket.gethostname())}"):
        discover(SRUN)


@pytest.mark.parametrize(
    ("nodes", "hosts"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1 node2"),
        ("node[1-3]", "node1 node2 node3"),
        ("gpu[07-08,12],login1", "gpu07 gpu08 gpu12 login1"),
        ("gpu[3,5]-ib.cluster,other[9-10]", "gpu3-ib.cluster gpu5-ib.cluster other9 other10"),
        ("rack[2-3]n[01-02]", "rack2n01 rack2n02 rack3n01 rack3n02"),
    ],
)
def test_expand_hosts(nodes, hosts):
    assert expand_hosts(nodes) == hosts.split()


def test_tasks_per_node():
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    assert tasks_per_node("4") == [4]


def test_the_environment_gets_what_libraries_read(monkeypatch):
    for name in TORCHRUN:  # so that what is set here is undone
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    world = World.from_environment()

    assert {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")} == {
        "RANK": "1",
        "WORLD_SIZE": "3",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
    }
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("localhost", str(world.master_port))


def _join(rank, world_size, port, seconds, launcher, gpus=None):
    """What becomes of the joining of this rank of a world, on hosts named a, b, ..., and what it wrote on stderr.

    The GPUs that it sees are given by their names, if any; then the answer has its device and LOCAL_RANK too.
    """
    if gpus is not None:
        os.environ["LOCAL_RANK"] = str(rank)
        chosen = _see(gpus[rank])
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(rank)  # torchrun's agents count restarts each by itself
    with tempfile.TemporaryFile() as errors:
        os.dup2(errors.fileno(), 2)
        outcome = "joined"
        try:
            local_rank = 0 if gpus is None else rank
            World(rank, world_size, local_rank, 2, launcher, "127.0.0.1", port, tuple("abcde")).join(seconds)
            if gpus is not None:
                outcome = f"joined with {chosen} as {os.environ['LOCAL_RANK']}"
        except RuntimeError as error:
            outcome = f"{type(error).__name__} {error}"
        errors.seek(0)
        return outcome, errors.read().decode()


def _see(gpus):
    """Let this process see those GPUs; the list will have the numbers of the chosen ones."""
    chosen, kept = [], []
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: len(gpus)
    torch.cuda.set_device = lambda device: chosen.append(device.index)
    torch.cuda.get_device_properties = lambda device: types.SimpleNamespace(uuid=gpus[device])
    dist.init_process_group = lambda backend, store, **_: kept.append(store) if backend == "nccl" else 1 / 0
    return chosen


def _joins(world_size, ranks, seconds, port=0, launcher="torchrun", gpus=None):
    """What those ranks say, which come at once; at a free port if at none."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = port or probe.getsockname()[1]
    return dict(zip(ranks, run_each(_join, [(rank, world_size, port, seconds, launcher, gpus) for rank in ranks])))


def test_ranks_that_do_not_come_are_named():
    for said, _ in _joins(5, [0, 2, 4], 3).values():
        assert said.startswith("JoinError ranks 1 (b), 3 (d) of 5 did not come within 3 s: see in their logs")


def test_without_rank_0_the_others_say_where_it_should_be():
    for rank, (said, _) in _joins(3, [1, 2], 3).items():
        assert said.startswith(f"JoinError rank {rank} ({socket.gethostname()}) did not reach rank 0 at 127.0.0.1:")


def test_a_port_in_use_is_told_in_one_sentence():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        (said,) = _joins(2, [0], 10, port, "Slurm (srun)").values()
    sentence = f"port {port} is in use on {socket.gethostname()}; set MASTER_PORT to a free one"
    assert said == (f"JoinError {sentence}", ""), "and torch's own words of it are not shown"


def _precision():
    """Of float32 products where the environment would have TF32's, once a rank has joined."""
    torch.set_float32_matmul_precision("high")
    World(0, 1, 0, 1, "single process").join()
    return torch.get_float32_matmul_precision()


def test_float32_products_are_exact_whatever_the_image_says():
    assert run_each(_precision, [()]) == ["highest"]


def test_a_rank_has_the_gpu_of_its_place(monkeypatch):
    """Whatever thread asks; where Slurm shows it one GPU alone, DeepSpeed is told so in all places."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert World(3, 4, 1, 2, "torchrun").device == torch.device("cuda", 1)
    with pytest.raises(WorldError, match="4 ranks were started on a machine with 2 GPU"):
        _ = World(3, 4, 3, 4, "torchrun").device
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    assert World(3, 4, 1, 2, "Open MPI").device == torch.device("cuda", 0)
    assert os.environ["LOCAL_RANK"] == "0"
    assert "OMPI_COMM_WORLD_LOCAL_RANK" not in os.environ


@pytest.mark.parametrize(("tensor", "queues"), [(1, None), (2, "1")])
def test_only_tensor_ranks_give_up_their_gpus_queues(tensor, queues, small, tmp_path, monkeypatch):
    """Before anything of training is imported, which may start CUDA."""

    class Training(types.ModuleType):
        @property
        def train(self):
            seen.append(os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS"))
            return lambda config, steps: 0

    seen = []
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "")
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS")
    monkeypatch.setitem(sys.modules, "peer_dist.training", Training("peer_dist.training"))
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(small))
    with pytest.raises(typer.Exit):
        runs.train(tmp_path / "run.yaml", [f"parallel.tensor={tensor}"])
    assert set(seen) == {queues}


def test_all_come():
    assert {said for said, _ in _joins(3, [2, 0, 1], 60).values()} == {"joined"}


def test_each_rank_has_a_gpu():
    """Of all that it sees by its number on the machine, or the only one: launchers may show each rank its own."""
    assert [said for said, _ in _joins(2, [0, 1], 60, gpus=["xy", "xy"]).values()] == [
        "joined with [0] as 0",
        "joined with [1] as 1",
    ]
    assert {said for said, _ in _joins(2, [0, 1], 60, gpus=["x", "y"]).values()} == {"joined with [0] as 0"}


def test_ranks_that_share_a_gpu_are_told():
    told = "2 ranks were started on a machine with 1 GPU(s); start one rank per GPU, or hide the GPUs with CUDA"
    for said, _ in _joins(3, [0, 1, 2], 60, gpus=["x", "y", "x"]).values():
        assert said.startswith(f"WorldError ranks 0 (a), 2 (c): {told}")
    with pytest.raises(WorldError, match=r"rank 5: 4 ranks were started on a machine with 2 GPU\(s\)"):
        World(5, 8, 2, 4, "torchrun", "127.0.0.1", 1)._gpu(2)


def _nccl(chosen):
    os.environ.update(chosen)
    _see("x")
    World(0, 1, 0, 1, "single process").join()
    return {name: value for name, value in os.environ.items() if name.startswith("NCCL_")}


def test_nccl_adds_up_in_one_order_unless_the_user_chose():
    choices = [{}, {"NCCL_ALGO": "Ring"}, {"NCCL_NVLS_ENABLE": "1"}]
    assert run_each(_nccl, [(chosen,) for chosen in choices]) == [{"NCCL_NVLS_ENABLE": "0"}, *choices[1:]]


def join_by(rank, world_size, interface):
    os.environ["GLOO_SOCKET_IFNAME"] = interface
    dist.destroy_process_group()
    try:
        World(0, 1, 0, 1).join()
    except WorldError as error:
        return str(error)
    return "joined"


def test_an_interface_that_is_not_there_is_named():
    (said,) = run_ranks(join_by, 1, "nosuch0")
    assert said.startswith("GLOO_SOCKET_IFNAME is 'nosuch0', but no network interface of "), said
    assert run_ranks(join_by, 1, "lo") == ["joined"]


@pytest.mark.parametrize("backend", ["nccl", "gloo"])
def test_an_error_does_not_wait_for_other_ranks(monkeypatch, backend):
    """With nccl the end of torch.distributed would, for what they never began."""
    ended = []
    monkeypatch.setattr(World, "join", lambda self: None)
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: ended.append(backend))
    world = World(0, 1, 0, 1, "single process")
    with pytest.raises(MemoryError), world.joined():
        raise MemoryError
    assert ended == ([] if backend == "nccl" else ["gloo"])
    with world.joined():
        pass
    assert ended[-1:] == [backend]
