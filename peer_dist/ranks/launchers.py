"""What launchers tell a process about itself and the others: torchrun, srun, Open MPI, MPICH and other PMIs."""

from __future__ import annotations

import contextlib
import itertools
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from peer_dist.mistake import Mistake


class WorldError(Mistake, RuntimeError):
    """The ranks that were started do not fit the machine or each other; the message says what to change."""


@dataclass(frozen=True)
class Launch:
    """This process among those that were started together, and where they meet.

    Attributes:
        rank, world_size: the process's number and how many processes there are.
        local_rank, local_world_size: the same within its node.
        launcher: its name, for messages.
        master_address: address of rank 0's node; empty if the process is alone.
        master_port: port on that node where the ranks meet; 0 if the process is alone.
        hosts: host of each rank; empty if the launcher does not say.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    launcher: str = "single process"
    master_address: str = ""
    master_port: int = 0
    hosts: tuple[str, ...] = ()


def discover(environ: Mapping[str, str]) -> Launch:
    """Read from a process's environment how it was launched; with MPI a collective call of all processes.

    The innermost launcher is looked for first, because what it starts inherits the variables of those around it:
    torchrun runs under srun and mpirun, and mpirun starts its daemons by srun.

    Raises:
        WorldError: what the launcher says is incomplete, or its processes cannot find each other.
    """
    if "RANK" in environ:
        return _torchrun(environ)
    if _number(environ, "OMPI_COMM_WORLD_SIZE", 1) > 1:
        return _mpi(environ, "Open MPI", _number(environ, "OMPI_COMM_WORLD_SIZE"))
    if "MPI_LOCALNRANKS" in environ and _number(environ, "PMI_SIZE", 1) > 1:  # Hydra's, MPICH's mpiexec
        return _mpi(environ, "MPICH/PMI", _number(environ, "PMI_SIZE"))
    # This variable belongs to a step, which srun starts: a batch script has the others too, and is one process.
    if _number(environ, "SLURM_STEP_NUM_TASKS", 1) > 1:
        return _slurm(environ)
    if _number(environ, "PMI_SIZE", 1) > 1:
        return _mpi(environ, "MPICH/PMI", _number(environ, "PMI_SIZE"))
    if "PMIX_RANK" in environ and "OMPI_COMM_WORLD_SIZE" not in environ and "SLURM_STEP_NUM_TASKS" not in environ:
        return _mpi(environ, "PMIx", None)
    return Launch(0, 1, 0, 1)


def _torchrun(environ: Mapping[str, str]) -> Launch:
    """The launch that torchrun's variables describe, whoever set them."""
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in environ]
    if missing:
        raise WorldError(f"RANK is set but not {', '.join(missing)}; start the ranks with torchrun, or unset RANK")
    return Launch(
        _number(environ, "RANK"),
        _number(environ, "WORLD_SIZE"),
        _number(environ, "LOCAL_RANK", 0),
        _number(environ, "LOCAL_WORLD_SIZE", 1),
        "torchrun" if "TORCHELASTIC_RUN_ID" in environ else "RANK and WORLD_SIZE",
        environ["MASTER_ADDR"],
        _number(environ, "MASTER_PORT"),
    )


def _slurm(environ: Mapping[str, str]) -> Launch:
    """The launch of a task that srun started."""
    needed = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE")
    missing = [name for name in needed if name not in environ]
    if missing:
        raise WorldError(
            f"SLURM_STEP_NUM_TASKS tells of {environ['SLURM_STEP_NUM_TASKS']} tasks, but {', '.join(missing)} is not "
            "set; pass all SLURM variables on (into a container, for one), or unset it to run alone"
        )
    nodes = expand_hosts(environ["SLURM_STEP_NODELIST"])
    address = environ.get("MASTER_ADDR") or nodes[0]
    try:
        socket.getaddrinfo(address, None)
    except OSError:
        raise WorldError(
            f"the node of rank 0, {address}, has no address on {socket.gethostname()}; make its name known there "
            "(DNS or /etc/hosts), or set MASTER_ADDR to an address"
        ) from None
    node, counts = _number(environ, "SLURM_NODEID"), tasks_per_node(environ["SLURM_STEP_TASKS_PER_NODE"])
    in_order = environ.get("SLURM_DISTRIBUTION", "").startswith("block") and len(nodes) == len(counts)
    return Launch(
        _number(environ, "SLURM_PROCID"),
        _number(environ, "SLURM_STEP_NUM_TASKS"),
        _number(environ, "SLURM_LOCALID"),
        counts[min(node, len(counts) - 1)],
        "Slurm (srun)",
        address,
        _number(environ, "MASTER_PORT", 0) or _slurm_port(environ),
        tuple(host for host, tasks in zip(nodes, counts) for _ in range(tasks)) if in_order else (),
    )


def _slurm_port(environ: Mapping[str, str]) -> int:
    """A port computed from the numbers of job, step and restart.

    Steps on one node get different ones, and a requeued job does not find its own still in use. All lie below those
    that systems give to clients.
    """
    job, step, restart = (_number(environ, f"SLURM_{name}", 0) for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))
    return 12_000 + (job * 31 + step + restart * 7919) % 20_000


def expand_hosts(nodes: str) -> list[str]:
    """The hosts in Slurm's list of nodes: for ``gpu[07-08,12],login1`` gpu07, gpu08, gpu12 and login1."""
    hosts: list[str] = []
    for name in re.findall(r"(?:\[[^\]]*\]|[^,\[\]])+", nodes):
        parts = re.split(r"\[([^\]]*)\]", name.strip())  # text and ranges in turn
        choices = [_numbers(part) if place % 2 else [part] for place, part in enumerate(parts)]
        hosts += ["".join(choice) for choice in itertools.product(*choices)]
    return hosts or [nodes]


def _numbers(ranges: str) -> list[str]:
    """The numbers in ranges, with their leading zeros: for ``07-08,12`` 07, 08 and 12."""
    numbers: list[str] = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        numbers += [f"{number:0{len(first)}}" for number in range(int(first), int(last or first) + 1)]
    return numbers


def tasks_per_node(tasks: str) -> list[int]:
    """The number of tasks on each node: for Slurm's ``2(x3),1`` 2, 2, 2 and 1.

    Raises:
        WorldError: the text is of another form.
    """
    counts: list[int] = []
    for part in tasks.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise WorldError(f"SLURM_STEP_TASKS_PER_NODE is {tasks!r}, not numbers such as 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _mpi(environ: Mapping[str, str], launcher: str, started: int | None) -> Launch:
    """Ask MPI for the ranks and agree on where to meet, then leave MPI, which nothing else uses. A collective call.

    Args:
        started: number of processes, if the launcher says it.

    Raises:
        WorldError: MPI cannot be loaded, or is another one than the launcher's.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        reason = ": ".join(str(error).splitlines()[:2])  # after the first, a line per library tried
        chosen = environ.get("MPI4PY_LIBMPI")
        if chosen:
            problem = f"cannot load MPI4PY_LIBMPI={chosen}"
            advice = "set it to the libmpi of the launcher's, or unset it"
        else:
            problem = "finds no library of it"
            advice = "install one (pip install 'peer_dist[mpi]' brings mpi4py and Open MPI) or set MPI4PY_LIBMPI"
        raise WorldError(
            f"{started or 'several'} processes were started through MPI ({launcher}), but mpi4py {problem} ({reason}); "
            f"{advice}"
        ) from None
    everyone = MPI.COMM_WORLD
    rank, size = everyone.Get_rank(), everyone.Get_size()
    if started is not None and size != started:
        library = MPI.Get_library_version().split(",")[0].splitlines()[0].strip("\0 ")
        raise WorldError(
            f"{launcher} started {started} processes, but mpi4py loads {library}, which sees {size}; use the mpirun "
            "of that MPI, or set MPI4PY_LIBMPI to the libmpi of the launcher's"
        )
    node = everyone.Split_type(MPI.COMM_TYPE_SHARED)
    local_rank, local_size = node.Get_rank(), node.Get_size()
    node.Free()
    meeting = None
    if rank == 0:
        address = "127.0.0.1" if local_size == size else _own_address()
        meeting = (environ.get("MASTER_ADDR") or address, _number(environ, "MASTER_PORT", 0) or free_port())
    address, port = everyone.bcast(meeting)
    MPI.Finalize()  # now, so that a rank that fails later ends at once instead of waiting for the others there
    if size == 1:
        return Launch(0, 1, 0, 1)
    return Launch(rank, size, local_rank, local_size, launcher, address, port)


def _own_address() -> str:
    """An address of this node that others can reach, or its name, if none is found.

    The name alone may resolve to the loopback here, and to nothing on other nodes.
    """
    with contextlib.suppress(OSError):
        address = socket.gethostbyname(socket.gethostname())
        if not address.startswith("127."):
            return address
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outward:
        outward.connect(("192.0.2.1", 9))  # nothing is sent; the system picks the interface
        return str(outward.getsockname()[0])
    return socket.gethostname()


def free_port() -> int:
    """A port of this node that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    """A variable's value as a number; ``default`` if it is empty or not set.

    Raises:
        WorldError: it is no number.
    """
    text = environ.get(name, "")
    if not text and default is not None:
        return default
    try:
        return int(text)
    except ValueError:
        raise WorldError(f"{name} is {text!r}, not a number; it comes from the launcher") from None
