"""This process as one of those that a launcher started: its rank, its device, and how it joins the others."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta

import torch
import torch.distributed as dist

from peer_dist.machine import usable_cores
from peer_dist.mistake import in_words
from peer_dist.output import messages
from peer_dist.ranks.exit_codes import PEER_LOST
from peer_dist.ranks.launchers import Launch, WorldError, discover
from peer_dist.shortage import check_room


class JoinError(WorldError):
    """Not all of the ranks came together in time; the message names those that are missing."""

    exit_code = PEER_LOST


def named(ranks: Iterable[int], hosts: Mapping[int, str], most: int = 8) -> str:
    """The names of ranks for a sentence: ``rank 3 (node2)``, or ``ranks 0 (a), 1 (a) and 14 more``.

    Args:
        hosts: of those ranks whose host is known.
        most: number of ranks that are named one by one.
    """
    listed = sorted(ranks)
    words = [f"{rank} ({hosts[rank]})" if rank in hosts else str(rank) for rank in listed[:most]]
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ("rank " if len(listed) == 1 else "ranks ") + ", ".join(words) + more


def _too_few_gpus(who: str, ranks: int, gpus: int) -> str:
    return (
        f"{who}: {ranks} ranks were started on a machine with {gpus} GPU(s); start one rank per GPU, or hide the GPUs "
        "with CUDA_VISIBLE_DEVICES="
    )


class World(Launch):
    """This process among those that were started together, and where they meet."""

    @classmethod
    def from_environment(cls) -> World:
        """The world that the launcher describes, with MPI a collective call of all processes.

        It is also written to the environment variables from which torch.distributed, DeepSpeed and Megatron read it.

        Raises:
            WorldError: what the launcher says is incomplete, or its processes cannot find each other.
        """
        world = cls(**vars(discover(os.environ)))
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
            seconds: how long to wait for ranks that are missing; rank 0 names them meanwhile on stderr.

        Raises:
            WorldError: fewer GPUs than ranks on this machine; on every rank, if some see one GPU, and the same.
            JoinError: on every rank that is there, when the time is up.
            ShortageError: there are too few threads, files or addresses for any run.
        """
        check_room()
        only_gpu = ""
        # NVIDIA's images set a variable that turns float32 products into TF32's; one config computes alike everywhere
        torch.set_float32_matmul_precision("highest")
        if torch.cuda.is_available():
            torch.cuda.set_device(self.device)
            if torch.cuda.device_count() == 1:
                only_gpu = f"{socket.gethostname()} {torch.cuda.get_device_properties(0).uuid}"
            backend = "nccl"
            # NVSwitches add up in whatever order messages come: gradients would differ from run to run
            if not os.environ.keys() & {"NCCL_ALGO", "NCCL_NVLS_ENABLE"}:
                os.environ["NCCL_NVLS_ENABLE"] = "0"
        else:
            backend = "gloo"
            self._share_cores()
        store = self._roll_call(seconds, only_gpu) if self.master_port else dist.HashStore()
        patience = timedelta(minutes=30)  # for rank 0 to index a large data set while the others wait
        try:
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world_size, timeout=patience)
        except RuntimeError as error:
            name = f"{backend.upper()}_SOCKET_IFNAME"
            if name not in os.environ or os.environ[name] not in str(error):
                raise
            raise WorldError(
                f"{name} is {in_words(os.environ[name], 40)!r}, but no network interface of {socket.gethostname()} "
                "with an address has that name; name one, or unset it"
            ) from None

    def _roll_call(self, seconds: float, only_gpu: str) -> dist.Store:
        """Wait for all ranks, and return the store in which they met.

        Args:
            only_gpu: name of the GPU of a rank that sees no other; which can be one that another rank sees too.

        Raises:
            WorldError: some ranks have the same ``only_gpu``.
            JoinError: not all came within ``seconds``, or rank 0's store cannot be reached.
        """
        end = time.monotonic() + seconds
        # torchrun's agent may have started a store already, for all its attempts
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
        # nodes differ in how often they restarted, so attempts have names only where they would share a store
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if agent else 0
        store = dist.PrefixStore(f"peer_dist/{attempt}", server)
        store.set(f"here/{self.rank}", only_gpu)
        if self.rank == 0:
            missing = self._missing(store, end)
            shared = "" if missing else self._shared(store)
            store.set("shared", shared)
            store.set("missing", missing)
            time.sleep(1 if missing or shared else 0)  # the store ends with this process: let the others read it
        else:
            try:
                store.wait(["missing"], timedelta(seconds=seconds + 60))  # until rank 0 has given up
                missing, shared = store.get("missing").decode(), store.get("shared").decode()
            except RuntimeError:
                raise JoinError(f"rank {self.rank}: rank 0 left before all were there; its log says why") from None
        if missing:
            raise JoinError(
                f"{missing} of {self.world_size} did not come within {seconds:.0f} s: see in their logs, or those of "
                "the launcher on their nodes, why they did not start"
            )
        if shared:
            raise WorldError(shared)
        store.set_timeout(timedelta(minutes=30))
        return store

    def _check_port(self) -> None:
        """Refuse a port that is in use in one sentence, before torch fails on it with many.

        Raises:
            JoinError: rank 0 cannot listen on it.
        """
        try:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's
                probe.bind(("", self.master_port))
        except OSError as error:
            problem = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be listened on ({error.strerror})"
            advice = "start again" if self.launcher == "torchrun" else "set MASTER_PORT to a free one"
            raise JoinError(f"port {self.master_port} {problem} on {socket.gethostname()}; {advice}") from None

    def _missing(self, store: dist.Store, end: float) -> str:
        """Wait for all ranks, and return the names of those that have not come at the time ``end``; '' if all have."""
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
                messages().print(f"waiting for {text} of {self.world_size}, {wait}")

    @property
    def device(self) -> torch.device:
        """This rank's device, which :meth:`join` makes the current one of its own thread.

        Raises:
            WorldError: fewer GPUs than ranks on this machine.
        """
        if torch.cuda.is_available():
            return torch.device("cuda", self._gpu(torch.cuda.device_count()))
        return torch.device("cpu")

    def _shared(self, store: dist.Store) -> str:
        """What is wrong where several ranks see one GPU only, and the same; '' if none do."""
        ranks_of: dict[bytes, list[int]] = {}
        for rank, gpu in enumerate(store.multi_get([f"here/{rank}" for rank in range(self.world_size)])):
            ranks_of.setdefault(gpu, []).append(rank)
        ranks_of.pop(b"", None)
        ranks = next((ranks for ranks in ranks_of.values() if len(ranks) > 1), [])
        return _too_few_gpus(named(ranks, dict(enumerate(self.hosts))), len(ranks), 1) if ranks else ""

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        """A context that joins the others on entering (:meth:`join`) and stops torch.distributed on leaving."""
        self.join()
        try:
            yield
        except BaseException:
            # nccl would wait here for collectives in which the others never take part, and the error would not be
            # told; it is aborted when the process ends
            if dist.get_backend() != "nccl":
                dist.destroy_process_group()
            raise
        dist.destroy_process_group()

    def _gpu(self, gpus: int) -> int:
        """The number of this rank's device, of the ``gpus`` that it sees.

        Raises:
            WorldError: there are fewer than ranks.
        """
        if gpus == 1:
            # its own, if the launcher shows each rank no other; ranks that see the same one learn it when they meet
            os.environ["LOCAL_RANK"] = "0"  # which DeepSpeed reads
            os.environ.pop("OMPI_COMM_WORLD_LOCAL_RANK", None)  # and refuses another number there
            return 0
        if self.local_rank >= gpus:
            raise WorldError(_too_few_gpus(f"rank {self.rank}", self.local_world_size, gpus))
        return self.local_rank

    def _share_cores(self) -> None:
        """Divide the cores among this node's ranks, unless OMP_NUM_THREADS or the launcher's binding has done so."""
        if self.local_world_size == 1 or os.environ.get("OMP_NUM_THREADS", "1") != "1":
            return  # torchrun sets 1, whatever the machine has
        cores = usable_cores()
        if self.launcher == "torchrun" or cores == os.cpu_count():
            torch.set_num_threads(max(1, cores // self.local_world_size))
