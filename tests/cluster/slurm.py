"""A real Slurm cluster whose nodes all live on this machine.

Each node is a slurmd in namespaces of its own (mounts, hostname, processes), with an address of its own on the loopback
network: names resolve inside as on a cluster, and killing a node takes everything that ran on it along, as a power
cut does. Folders, addresses and ports are this lab's alone, so several can be up at once; all of it ends with the
process that started it.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "unshare", "setpriv")
PACKAGES = ("slurm-wlm", "munge")


def missing() -> str | None:
    """Why no cluster can be brought up here; None if one can. Installs what the system's packages have."""
    if os.geteuid() != 0:
        return "a Slurm cluster on one machine needs root (for namespaces)"
    if all(map(shutil.which, PROGRAMS)):
        return None
    if shutil.which("apt-get") is None:
        return f"{', '.join(PROGRAMS)} are needed, and there is no apt-get to install them"
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(["apt-get", *command], env=environment, capture_output=True, text=True)
        if done.returncode:
            return f"apt-get {command[0]} failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}"
    return None


def wait_until(condition: Callable[[], object], seconds: float, what: str) -> object:
    """Ask twice a second until the answer is true.

    Raises:
        AssertionError: it was not in time.
    """
    end = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < end, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.5)
    return answer


class Lab:
    """A cluster of ``nodes`` nodes: partition ``debug``, and ``high``, whose jobs preempt those of the first."""

    def __init__(self, nodes: int = 3, cpus: int = 2) -> None:
        self.nodes = [f"node{number}" for number in range(1, nodes + 1)]
        self.folder = Path(tempfile.mkdtemp(prefix="peer-dist-lab-"))
        self.folder.chmod(0o755)
        self._cpus = cpus
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        network = f"127.{64 + secrets.randbelow(128)}.{secrets.randbelow(256)}"
        self._addresses = {name: f"{network}.{number}" for number, name in enumerate(["ctl", *self.nodes], 1)}
        self._ports = dict(zip(["ctl", *self.nodes], _free_ports(nodes + 1)))
        self.environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def __enter__(self) -> Lab:
        try:
            self._configure()
            munge = [f"--{part}={self.folder}/{part}" for part in ("key-file", "socket", "pid-file", "log-file")]
            munge.append(f"--seed-file={self.folder}/seed")
            self._start("munged", ["munged", "--foreground", *munge])
            wait_until((self.folder / "socket").exists, 20, "munged")
            self._start("slurmctld", ["unshare", "--uts", "sh", "-c", "hostname ctl; exec slurmctld -D"])
            for node in self.nodes:
                self.power_on(node)
            wait_until(lambda: self.run("sinfo", "-h", "-p", "debug", "-t", "idle", "-o", "%D") == str(len(self.nodes)),
                       60, "all nodes idle")  # fmt: skip
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in [*self.nodes, "slurmctld", "munged"]:
            self._kill(name)
        shutil.rmtree(self.folder, ignore_errors=True)

    def power_on(self, node: str) -> None:
        """Boot a node."""
        for part in ("spool", "tmp"):
            (self.folder / f"{part}-{node}").mkdir(exist_ok=True)
        boot = (
            f"hostname {node} && mount --bind {self.folder}/hosts /etc/hosts && "
            f"mount --bind {self.folder}/nsswitch /etc/nsswitch.conf && "
            f"{{ slurmd -N {node} -D & wait; }}"  # the shell, as the first process there, takes orphans in
        )
        namespaces = ["--mount", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child"]
        self._start(node, ["unshare", *namespaces, "sh", "-c", boot])

    def power_cut(self, node: str) -> None:
        """Everything on the node is gone at once, and Slurm is not told."""
        self._kill(node)

    def run(self, *command: str) -> str:
        """A client's output.

        Raises:
            AssertionError: it failed.
        """
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job: JobState, Restarts, ExitCode, NodeList, ..."""
        fields = self.run("scontrol", "show", "job", "-o", number).split()
        return dict(pair.split("=", 1) for pair in fields if "=" in pair)

    def wait_for(self, number: str, state: str, seconds: float = 240) -> dict[str, str]:
        """Until the job is in a state.

        Raises:
            AssertionError: it was not in time, or ended otherwise.
        """

        def there() -> bool:
            now = self.job(number)["JobState"]
            ended = now in ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")
            assert now == state or not ended, f"job {number}: {self.job(number)}"
            return now == state

        wait_until(there, seconds, f"job {number} {state}")
        return self.job(number)

    def _configure(self) -> None:
        (self.folder / "state").mkdir()
        key = self.folder / "key-file"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        names = "".join(f"{address} {name}\n" for name, address in self._addresses.items())
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        (self.folder / "nsswitch").write_text("passwd: files\ngroup: files\nhosts: files\n")
        settings = {
            "ClusterName": "lab",
            "SlurmctldHost": f"ctl({self._addresses['ctl']})",
            "SlurmctldPort": self._ports["ctl"],
            "SlurmUser": "root",
            "AuthType": "auth/munge",
            # a requeued job waits until its old credential is out of date: two minutes, if not told otherwise
            "AuthInfo": f"socket={self.folder}/socket,cred_expire=5",
            "CredType": "cred/munge",
            "StateSaveLocation": self.folder / "state",
            "SlurmdSpoolDir": f"{self.folder}/spool-%n",
            "TmpFS": f"{self.folder}/tmp-%n",
            "SlurmctldPidFile": self.folder / "slurmctld.pid",
            "SlurmdPidFile": f"{self.folder}/slurmd-%n.pid",
            "SlurmctldLogFile": self.folder / "slurmctld.log",
            "SlurmdLogFile": f"{self.folder}/slurmd-%n.log",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "JobAcctGatherType": "jobacct_gather/none",
            "MpiDefault": "none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core",
            "PreemptType": "preempt/partition_prio",
            "PreemptMode": "REQUEUE",
            "SlurmdParameters": "config_overrides",
            "SchedulerParameters": "sched_interval=2,bf_interval=2",
            "ReturnToService": 2,
            "SlurmdTimeout": 10,
            "KillWait": 30,
        }
        lines = [f"{name}={value}" for name, value in settings.items()]
        for node in self.nodes:
            lines.append(
                f"NodeName={node} NodeHostname={node} NodeAddr={self._addresses[node]} Port={self._ports[node]} "
                f"CPUs={self._cpus} RealMemory=4000 State=UNKNOWN"
            )
        lines.append("PartitionName=debug Nodes=ALL Default=YES PriorityTier=1 GraceTime=60")
        lines.append("PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF")
        (self.folder / "slurm.conf").write_text("\n".join(lines) + "\n")

    def _start(self, name: str, command: list[str]) -> None:
        with (self.folder / f"{name}.out").open("ab") as out:
            self._processes[name] = subprocess.Popen(
                # ended with this process, however it ends
                ["setpriv", "--pdeathsig", "KILL", *command],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def _kill(self, name: str) -> None:
        process = self._processes.pop(name, None)
        if process is not None:
            process.kill()
            process.wait()


def _free_ports(count: int) -> list[int]:
    """Below those that the system gives to clients, which would come to lie on them later."""
    found: list[int] = []
    while len(found) < count:
        port = 10_000 + secrets.randbelow(2_000)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found
