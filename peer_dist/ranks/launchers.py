"""What launchers tell a process about itself and the others: torchrun, srun, Open MPI, MPICH and other PMIs."""

from __future__ import annotations

import contextlib
import itertools
import math
import re
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peer_dist.mistake import Mistake, shown

_MOST_RANKS = 1_000_000
_MOST = 10**15  # of any other number of a launcher's
_RESOLVING, _REACHING = 20.0, 10.0  # seconds for a name to be resolved, and for rank 0 to be reached at its own address
_RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID")  # innermost launcher first


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
        WorldError: what the launcher says is incomplete or contradicts itself, or its processes cannot find each other.
    """
    launcher, started = _launcher(environ)
    describe = _WITHOUT_MPI.get(launcher)
    launch = describe(environ) if describe else _mpi(environ, launcher, started)
    if launch.master_port:
        # torchrun's agent serves where the ranks meet, perhaps on another machine
        _check_meeting(launch, serves=launch.rank == 0 and environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True")
    return launch


def ranks_started(environ: Mapping[str, str]) -> int | None:
    """How many processes were started together, as far as it is known without a call of MPI; None if only that tells.

    Raises:
        WorldError: as :func:`discover` does.
    """
    launcher, started = _launcher(environ)
    return discover(environ).world_size if launcher in _WITHOUT_MPI else started


def rank_said(environ: Mapping[str, str]) -> str:
    """This process's rank as its launcher wrote it, for messages about what may be wrong with it; ``0`` if none did."""
    return next((environ[name].strip() for name in _RANKS if environ.get(name, "").strip()), "0")


def _launcher(environ: Mapping[str, str]) -> tuple[str, int | None]:
    """The innermost launcher's name, and how many processes it started if it says so by itself."""
    if environ.get("RANK", "").strip():
        return "torchrun", None
    processes = _number(environ, "OMPI_COMM_WORLD_SIZE", 1, least=1, most=_MOST_RANKS)
    if processes > 1:
        return "Open MPI", processes
    in_pmi = _number(environ, "PMI_SIZE", 1, least=1, most=_MOST_RANKS)
    if "MPI_LOCALNRANKS" in environ and in_pmi > 1:  # Hydra's, MPICH's mpiexec
        return "MPICH/PMI", in_pmi
    # This variable belongs to a step, which srun starts: a batch script has the others too, and is one process.
    if _number(environ, "SLURM_STEP_NUM_TASKS", 1, least=1, most=_MOST_RANKS) > 1:
        return "Slurm", None
    if in_pmi > 1:
        return "MPICH/PMI", in_pmi
    if "PMIX_RANK" in environ and "OMPI_COMM_WORLD_SIZE" not in environ and "SLURM_STEP_NUM_TASKS" not in environ:
        return "PMIx", None
    return "none", None


def _alone(environ: Mapping[str, str]) -> Launch:
    """The launch of a process that no launcher started."""
    if environ.get("WORLD_SIZE", "").strip() not in ("", "1"):
        raise WorldError(
            f"WORLD_SIZE is {shown(environ['WORLD_SIZE'])} but RANK is not set; start the ranks with torchrun, or "
            "unset WORLD_SIZE to run alone"
        )
    return Launch(0, 1, 0, 1)


def _torchrun(environ: Mapping[str, str]) -> Launch:
    """The launch that torchrun's variables describe, whoever set them."""
    _number(environ, "RANK")
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not environ.get(name, "").strip()]
    if missing:
        raise WorldError(f"RANK is set but not {', '.join(missing)}; start the ranks with torchrun, or unset RANK")
    world_size = _number(environ, "WORLD_SIZE", least=1, most=_MOST_RANKS)
    rank = _below(environ, "RANK", "WORLD_SIZE", world_size)
    local_rank = _number(environ, "LOCAL_RANK", 0, most=_MOST_RANKS)
    local_size = _number(environ, "LOCAL_WORLD_SIZE", local_rank + 1, least=1, most=_MOST_RANKS)
    if local_size > world_size:
        raise WorldError(
            f"LOCAL_WORLD_SIZE is {local_size}, more ranks on this node than the {world_size} of WORLD_SIZE in all; "
            "start the ranks with torchrun"
        )
    return Launch(
        rank,
        world_size,
        _below(environ, "LOCAL_RANK", "LOCAL_WORLD_SIZE", local_size, 0),
        local_size,
        "torchrun" if "TORCHELASTIC_RUN_ID" in environ else "RANK and WORLD_SIZE",
        environ["MASTER_ADDR"].strip(),
        _number(environ, "MASTER_PORT", least=1, most=65_535),
    )


_PASS_ON = (
    "pass all SLURM variables on as they are (into a container, for one), or unset SLURM_STEP_NUM_TASKS to run alone"
)


def _slurm(environ: Mapping[str, str]) -> Launch:
    """The launch of a task that srun started."""
    needed = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE")
    tasks = _number(environ, "SLURM_STEP_NUM_TASKS", least=1, most=_MOST_RANKS)
    missing = [name for name in needed if not environ.get(name, "").strip()]
    if missing:
        raise WorldError(
            f"SLURM_STEP_NUM_TASKS tells of {tasks} tasks, but {', '.join(missing)} is not set; {_PASS_ON}"
        )
    rank = _below(environ, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", tasks)
    nodes = expand_hosts(environ["SLURM_STEP_NODELIST"])
    counts = tasks_per_node(environ["SLURM_STEP_TASKS_PER_NODE"])
    if (len(counts), sum(counts)) != (len(nodes), tasks):
        raise WorldError(
            f"SLURM_STEP_TASKS_PER_NODE tells of {sum(counts)} tasks on {len(counts)} node(s), but SLURM_STEP_NODELIST "
            f"of {len(nodes)} node(s) and SLURM_STEP_NUM_TASKS of {tasks} tasks; {_PASS_ON}"
        )
    node = _below(environ, "SLURM_NODEID", "SLURM_STEP_NODELIST", len(nodes))
    in_order = environ.get("SLURM_DISTRIBUTION", "").startswith("block")
    return Launch(
        rank,
        tasks,
        _below(environ, "SLURM_LOCALID", f"SLURM_STEP_TASKS_PER_NODE for node {node}", counts[node]),
        counts[node],
        "Slurm (srun)",
        environ.get("MASTER_ADDR", "").strip() or nodes[0],
        _chosen_port(environ) or _slurm_port(environ),
        tuple(host for host, tasks in zip(nodes, counts) for _ in range(tasks)) if in_order else (),
    )


_WITHOUT_MPI = {"torchrun": _torchrun, "Slurm": _slurm, "none": _alone}


def _slurm_port(environ: Mapping[str, str]) -> int:
    """A port computed from the numbers of job, step and restart.

    Steps on one node get different ones, and a requeued job does not find its own still in use. All lie below those
    that systems give to clients.
    """
    job, step, restart = (_number(environ, f"SLURM_{name}", 0) for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))
    return 12_000 + (job * 31 + step + restart * 7919) % 20_000


def expand_hosts(nodes: str) -> list[str]:
    """The hosts in Slurm's list of nodes: for ``gpu[07-08,12],login1`` gpu07, gpu08, gpu12 and login1.

    Raises:
        WorldError: the text is of another form, or names more hosts than there can be.
    """
    problem = WorldError(f"SLURM_STEP_NODELIST is {shown(nodes)}, not names such as gpu[07-08,12]; {_PASS_ON}")
    if not re.fullmatch(r"(?:[^\s,\[\]]|\[[0-9,-]+\])+(?:,(?:[^\s,\[\]]|\[[0-9,-]+\])+)*", nodes.strip()):
        raise problem
    hosts: list[str] = []
    for name in re.findall(r"(?:\[[^\]]*\]|[^,\[\]])+", nodes.strip()):
        parts = re.split(r"\[([^\]]*)\]", name)  # text and ranges in turn
        choices = [_numbers(part) if place % 2 else [part] for place, part in enumerate(parts)]
        if not all(choices) or len(hosts) + math.prod(map(len, choices)) > _MOST_RANKS:
            raise problem
        hosts += ["".join(choice) for choice in itertools.product(*choices)]
    return hosts


def _numbers(ranges: str) -> list[str]:
    """The numbers in ranges, with their leading zeros: for ``07-08,12`` 07, 08 and 12; none if they are not such."""
    numbers: list[str] = []
    for part in ranges.split(","):
        match = re.fullmatch(r"([0-9]{1,15})(?:-([0-9]{1,15}))?", part)
        if match is None:
            return []
        first, last = int(match[1]), int(match[2] or match[1])
        if not 0 <= last - first < _MOST_RANKS - len(numbers):
            return []
        numbers += [f"{number:0{len(match[1])}}" for number in range(first, last + 1)]
    return numbers


def tasks_per_node(tasks: str) -> list[int]:
    """The number of tasks on each node: for Slurm's ``2(x3),1`` 2, 2, 2 and 1.

    Raises:
        WorldError: the text is of another form, or tells of more nodes than there can be.
    """
    counts: list[int] = []
    for part in tasks.split(","):
        match = re.fullmatch(r"([0-9]{1,9})(?:\(x([0-9]{1,9})\))?", part.strip())
        if match is None or len(counts) + int(match[2] or 1) > _MOST_RANKS:
            raise WorldError(f"SLURM_STEP_TASKS_PER_NODE is {shown(tasks)}, not numbers such as 2(x3),1; {_PASS_ON}")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _mpi(environ: Mapping[str, str], launcher: str, started: int | None) -> Launch:
    """Ask MPI for the ranks and agree on where to meet, then leave MPI, which nothing else uses. A collective call.

    Args:
        started: number of processes, if the launcher says it.

    Raises:
        WorldError: MPI cannot be loaded, or is another one than the launcher's.
    """
    # before MPI starts, in which the others would wait for a process that ends here
    chosen_address, chosen_port = environ.get("MASTER_ADDR", "").strip(), _chosen_port(environ)
    for rank_name, size_name in (
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
        ("PMI_RANK", "PMI_SIZE"),
        ("MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ):
        if environ.get(rank_name, "").strip() and environ.get(size_name, "").strip():
            _below(environ, rank_name, size_name, _number(environ, size_name, least=1, most=_MOST_RANKS))
    _number(environ, "PMIX_RANK", 0)
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
        meeting = (chosen_address or address, chosen_port or free_port())
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


def _check_meeting(launch: Launch, serves: bool) -> None:
    """Refuse an address that is none, or not rank 0's own, before anyone waits there.

    Args:
        serves: whether this process is the one that the others will find there.

    Raises:
        WorldError: the address cannot be resolved here, or rank 0 cannot be reached at it.
    """
    address, here = launch.master_address, socket.gethostname()
    found: list[Any] = []
    problem: list[str] = []

    def resolve() -> None:
        try:
            found.extend(socket.getaddrinfo(address, launch.master_port, 0, socket.SOCK_STREAM))
        except OSError as error:
            problem.append(error.strerror or "unknown")
        except ValueError:  # of the encoding of names
            problem.append("it is no name of a machine")

    # the system's own time limit can be minutes, and cannot be set
    thread = threading.Thread(target=resolve, daemon=True)
    thread.start()
    thread.join(_RESOLVING)
    if not found:
        why = problem[0] if problem else f"no answer within {_RESOLVING:.0f} s"
        raise WorldError(
            f"the node of rank 0, {_plain(address)}, has no address on {here} ({why}); make its name known there "
            "(DNS or /etc/hosts), or set MASTER_ADDR to an address, without a port"
        )
    if serves and not any(_is_own(family, where) for family, _, _, _, where in found):
        why = _unreachable(launch.master_port, [(family, where) for family, _, _, _, where in found])
        if why:
            raise WorldError(
                f"the ranks are to meet rank 0 at {_plain(address)} (MASTER_ADDR), but rank 0 runs on {here}, which is "
                f"not there ({why}); set MASTER_ADDR to {here}, or to an address of it"
            )


def _is_own(family: int, where: Any) -> bool:
    """Whether an address belongs to this machine: such a one can be bound and, unlike a broadcast's, be reached."""
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((where[0], 0, *where[2:]))
        probe.listen()
        with socket.socket(family, socket.SOCK_STREAM) as client:
            client.settimeout(1)
            client.connect(probe.getsockname())
        return True
    return False


def _unreachable(port: int, places: list[tuple[int, Any]]) -> str:
    """Why a process that listens on ``port`` of this machine is not found at any of the places; '' if it is.

    An address may be translated on the way (of a service of a cluster's, for one), and so not be this machine's own.
    """
    end, why = time.monotonic() + _REACHING, ""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("", port))
            server.listen()
        except OSError:
            return ""  # a port in use has a sentence of its own, when the ranks meet
        for family, where in places:
            try:
                with socket.socket(family, socket.SOCK_STREAM) as client:
                    client.settimeout(max(0.1, end - time.monotonic()))
                    client.connect(where)
                    server.settimeout(max(0.1, end - time.monotonic()))
                    server.accept()[0].close()
                    return ""
            except OSError as error:
                why = error.strerror or "no answer"
    return why or "no answer"


def _chosen_port(environ: Mapping[str, str]) -> int:
    """The port that someone chose by MASTER_PORT; 0 if nobody did."""
    return _number(environ, "MASTER_PORT", least=1, most=65_535) if environ.get("MASTER_PORT", "").strip() else 0


def _below(environ: Mapping[str, str], name: str, of: str, size: int, default: int | None = None) -> int:
    """A variable's value as a number below ``size``, which is that of another variable.

    Raises:
        WorldError: it is none.
    """
    number = _number(environ, name, default)
    if number >= size:
        raise WorldError(
            f"{name} is {number}, but must be below {size} ({of}); give each process the number of its place, from 0 "
            "on, as torchrun, srun and mpirun do"
        )
    return number


def _number(
    environ: Mapping[str, str], name: str, default: int | None = None, least: int = 0, most: int = _MOST
) -> int:
    """A variable's value as a number; ``default`` if it is empty or not set.

    Raises:
        WorldError: it is no whole number from ``least`` to ``most``.
    """
    text = environ.get(name, "").strip()
    if not text and default is not None:
        return default
    if not re.fullmatch(r"[0-9]{1,20}", text) or not least <= int(text) <= most:
        limits = f"from {least} on" if most == _MOST else f"from {least} to {most}"
        raise WorldError(
            f"{name} is {shown(text)}, not a number {limits}; start ranks with torchrun, srun or mpirun, or unset it"
        )
    return int(text)


def _plain(address: str) -> str:
    """An address for a sentence: as it is, or in quotes if it is no usual one."""
    return address if re.fullmatch(r"[A-Za-z0-9._:%-]{1,80}", address) else shown(address)
