"""`peer-dist submit`: checks a run's config, writes its batch script, and submits it as one job or a chain of them."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

from peer_dist.config import Config, ConfigError, check_world, find_config, load_config, make_folders
from peer_dist.mistake import in_words
from peer_dist.slurm.script import (
    SubmitError,
    directive,
    in_double_quotes,
    log_pattern,
    mounted,
    one_line,
    passed_on,
    quoted,
)

Runtime = Literal["pyxis", "apptainer"]


@dataclass(frozen=True)
class Job:
    """What to ask Slurm for."""

    nodes: int = 1
    gpus_per_node: int = 0
    ranks_per_node: int | None = None  # None: one per GPU, or one
    time_limit: str | None = None
    signal_lead: int = 120
    container: str | None = None
    runtime: Runtime = "pyxis"
    doctor: bool = False
    setup: Path | None = None
    stage: Path | None = None
    local_disk: Path = Path("/tmp")
    chain: int = 0
    requeue: bool | None = None  # None: unless there is a chain, whose next job goes on instead
    max_restarts: int = 10
    python: str = sys.executable
    options: Sequence[str] = ()  # any other of sbatch's, which win over those above

    @property
    def ranks(self) -> int:
        """Ranks on each node."""
        return self.ranks_per_node or self.gpus_per_node or 1

    def check(self) -> None:
        """Refuse options that contradict each other, or name what is not there.

        Raises:
            SubmitError: naming the option.
        """
        for option, count in (("--nodes", self.nodes), ("--ranks-per-node", self.ranks_per_node)):
            if count is not None and count < 1:
                raise SubmitError(f"{option}: {count} is too few to train on; give 1 or more")
        if self.gpus_per_node and self.ranks != self.gpus_per_node:
            raise SubmitError(
                f"--ranks-per-node: {self.ranks} ranks for {self.gpus_per_node} GPU(s) of a node; start one per GPU"
            )
        if self.stage is not None and not os.path.exists(self.stage):
            raise SubmitError(f"--stage: {self.stage} is not there; name an environment's folder, or a tar file of one")
        if self.stage is not None and os.path.isdir(self.stage) and not os.access(self.stage / "bin/python", os.X_OK):
            raise SubmitError(f"--stage: {self.stage} has no bin/python; name the folder of a Python environment")
        if self.setup is not None and not os.path.isfile(self.setup):
            raise SubmitError(f"--setup: {self.setup} is not there; name a file of shell commands")
        if self.container is not None and not self.container.strip():
            raise SubmitError("--container: is empty; name an image, or leave it out")
        if not self.local_disk.is_absolute():  # the job's steps run in other folders
            raise SubmitError(f"--local-disk: {self.local_disk} is no absolute path; name a folder of the nodes' disks")
        if self.container is not None and _is_file(self.container) and not os.path.exists(self.container):
            raise SubmitError(f"--container: {self.container} is not there; name an image's file, or one of a registry")
        if self.stage is not None and self.container is not None:
            raise SubmitError("--stage: a container brings its own environment; leave out --stage or --container")
        seconds = _seconds(self.time_limit)
        if seconds is not None and seconds <= self.signal_lead + 60:
            raise SubmitError(
                f"--signal-lead: {self.signal_lead} s before a limit of {self.time_limit} leaves no time to train; "
                "lower it or raise --time"
            )
        passed_on(self.options, own_layout=True)


def submit(config: Path, overrides: Sequence[str], job: Job, dry_run: bool = False) -> str:
    """Check the run, and submit it.

    Returns:
        What to tell the user: the jobs' numbers and log, or with ``dry_run`` the script.

    Raises:
        ConfigError: the run's config or its layout is impossible.
        SubmitError: the job is, or Slurm refuses it.
    """
    settings = load_config(config, overrides)
    job.check()
    check_world(settings, job.nodes * job.ranks)
    for prefix in settings.data.weights:
        if not os.path.isfile(f"{prefix}.json"):
            raise ConfigError(f"data: {prefix} is no prepared data set (no {prefix}.json); peer-dist prepare makes one")
    logs = (Path(settings.logging.dir) / "slurm").absolute()
    # The job starts later: what was checked is kept, so that editing the file meanwhile changes nothing.
    kept = _free_name(logs, config.name)
    checkpoints = Path(settings.checkpoint.dir).absolute()
    chain = kept.with_name(f"{kept.stem}.ended") if job.chain else None
    read = find_config(config).absolute() if dry_run else kept
    script = render(job, ["--config", str(read), *overrides], logs, checkpoints, _folders(settings, job), chain)
    if dry_run:
        folder = quoted("logging.dir", logs)
        return (
            f"{script}\n# A dry run wrote nothing. Before sbatch takes this script: mkdir -p {folder}\n"
            "# The job would read the config as that is then; peer-dist submit keeps a copy for it.\n"
        )
    find_sbatch()
    make_folders(settings)  # a container cannot be given what is not there
    try:
        logs.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(find_config(config), kept)
        path = kept.with_name(f"{kept.stem}.sbatch")
        path.write_text(script, encoding="utf-8")
    except OSError as error:
        raise SubmitError(
            f"logging.dir: nothing can be written to {logs} ({error.strerror}); choose another folder"
        ) from None
    jobs: list[str] = []
    for _ in range(1 + job.chain):
        after = [f"--dependency=afterany:{jobs[-1]}"] if jobs else []
        try:
            jobs.append(sbatch(path, *after))
        except SubmitError as error:
            before = f"; submitted before it: {' '.join(jobs)}" if jobs else ""
            raise SubmitError(f"{error}{before}") from None
    follow = f", then {' '.join(jobs[1:])}" if jobs[1:] else ""
    where = f"{job.nodes} node(s) x {job.ranks} rank(s)"
    return f"submitted job {jobs[0]}{follow}: {where}\nlog: {logs / jobs[0]}.log"


def _free_name(logs: Path, name: str) -> Path:
    """A path in ``logs`` for the copy of a config, which says when it was made and which no other submission has."""
    start = logs / f"{time.strftime('%Y%m%d-%H%M%S')}-{name[-48:]}"  # names are at most 255 bytes long
    again = (start.with_name(f"{start.stem}-{number}{start.suffix}") for number in itertools.count(2))
    return next(path for path in itertools.chain([start], again) if not os.path.lexists(path))


def find_sbatch() -> str:
    """The path of the command ``sbatch``.

    Raises:
        SubmitError: it is not on the PATH.
    """
    command = shutil.which("sbatch")
    if command is None:
        raise SubmitError("sbatch: is not there; submit on a Slurm cluster, or look at the script with --dry-run")
    return command


def sbatch(script: Path, *options: str) -> str:
    """Submit a batch script, and return the job's number.

    Raises:
        SubmitError: Slurm refuses it.
    """
    command = find_sbatch()
    try:
        answer = subprocess.run([command, "--parsable", *options, str(script)], capture_output=True, errors="replace")
    except OSError as error:
        raise SubmitError(
            f"sbatch: {command} cannot be started ({error.strerror}); see whether it is Slurm's"
        ) from None
    if answer.returncode:
        none = f"failed with exit code {answer.returncode} and gave no reason; ask who keeps this Slurm"
        reason = (answer.stderr.strip().splitlines() or [none])[-1].removeprefix("sbatch: error: ")
        raise SubmitError(f"sbatch: {in_words(reason)}")
    number = answer.stdout.strip().partition(";")[0]
    if not re.fullmatch("[0-9]+", number):
        raise SubmitError(f"sbatch: said {in_words(number)!r} where a job's number should be; ask squeue for the job")
    return number


def render(
    job: Job,
    train: Sequence[str],
    logs: Path,
    checkpoints: Path,
    folders: Sequence[str] = (),
    chain: Path | None = None,
) -> str:
    """The batch script's text.

    Args:
        train: arguments of ``peer-dist train``.
        logs: folder of the job's log and the ranks'.
        checkpoints: the run's checkpoint folder, in which the script looks whether an attempt wrote one.
        folders: more folders that a container must see.
        chain: the file that ends a chain: a job writes it when those after it must not run.

    Raises:
        SubmitError: a value cannot stand in a script, or an option cannot be passed on.
    """
    place = one_line("the working folder", Path.cwd())
    directives = {
        "job-name": "peer_dist",
        "nodes": job.nodes,
        "ntasks": job.nodes * job.ranks,
        "ntasks-per-node": job.ranks,
        "gpus-per-node": job.gpus_per_node or None,
        "time": job.time_limit,
        "chdir": place,
        "output": log_pattern("logging.dir", logs, "%j.log"),
        "open-mode": "append",
        "signal": f"B:USR1@{job.signal_lead}",
    }
    requeue = job.requeue if job.requeue is not None else job.chain == 0
    image = job.container or ""
    lines = [directive(key, value) for key, value in directives.items() if value is not None]
    lines += [directive("requeue" if requeue else "no-requeue"), *passed_on(job.options, own_layout=True)]
    mounts: list[str] = []
    if job.container is not None:
        mounts = [mounted(folder) for folder in folders if not Path(folder).is_relative_to(place)]
        for folder in (place, logs, job.local_disk):
            mounted(folder)
    escaped = [in_double_quotes("--container", folder) for folder in mounts]
    values = {
        "DIRECTIVES": "\n".join(lines),
        "REQUEUE": "yes" if requeue else "no",
        "MAX_RESTARTS": str(job.max_restarts),
        "RUNTIME": job.runtime if job.container else "none",
        "IMAGE": quoted("--container", os.path.abspath(image) if _is_file(image) else image),
        "SETUP": quoted("--setup", job.setup.absolute()) if job.setup else "",
        "STAGE": quoted("--stage", job.stage.absolute() if job.stage else ""),
        "LOCAL_DISK": quoted("--local-disk", job.local_disk),
        "LOGS": quoted("logging.dir", logs),
        "CHECKPOINTS": quoted("checkpoint.dir", checkpoints),
        "CHAIN": quoted("logging.dir", chain) if chain else "",
        "PYTHON": "python" if job.container else quoted("the path of Python", job.python),
        "DOCTOR": "yes" if job.doctor else "no",
        "TRAIN": " ".join(quoted("command line", argument) for argument in train),
        "MOUNTS": "".join(f",{folder}:{folder}" for folder in escaped),
        "BINDS": "".join(f",{folder}" for folder in escaped),
        "NV": "--nv " if job.gpus_per_node else "",
    }
    template = resources.files("peer_dist.slurm").joinpath("train.sbatch").read_text(encoding="utf-8")
    head, names, body = template.partition("@DIRECTIVES@")  # the comment above speaks of @NAMES@
    return head + re.sub(r"@([A-Z_]+)@", lambda match: values[match[1]], names + body)


def _is_file(image: str) -> bool:
    """Whether a container's image is a file rather than the name of one in a registry."""
    return image.endswith((".sif", ".sqsh"))


def _folders(settings: Config, job: Job) -> list[str]:
    """The folders that the run reads and writes, both as they are named and with links resolved."""
    folders = [settings.checkpoint.dir, settings.logging.dir]
    endings = (".bin", ".idx", ".json", ".tokenizer.json")
    files = [f"{prefix}{ending}" for prefix in settings.data.weights for ending in endings]
    if settings.data.tokenizer not in (None, "byte"):
        files.append(str(settings.data.tokenizer))
    if settings.checkpoint.init_from is not None and os.path.isdir(settings.checkpoint.init_from):
        folders.append(settings.checkpoint.init_from)  # once there is a checkpoint it may be gone
    if job.setup is not None:
        files.append(str(job.setup))
    ways = (os.path.abspath, os.path.realpath)
    seen = {way(folder) for way in ways for folder in folders}
    return sorted(seen | {os.path.dirname(way(file)) for way in ways for file in files})


def _seconds(limit: str | None) -> int | None:
    """Seconds of a time limit in any of Slurm's formats; None if there is no limit.

    Raises:
        SubmitError: it is no time.
    """
    if limit is None or limit.upper() in ("UNLIMITED", "INFINITE"):
        return None
    number = "([0-9]{1,9})"
    match = re.fullmatch(rf"(?:{number}-)?{number}(?::{number})?(?::{number})?", limit)
    if match is None:
        raise SubmitError(f"--time: {limit!r:.40} is no time limit of Slurm; write minutes, HH:MM:SS or D-HH:MM:SS")
    days, *rest = match.groups()
    parts = [int(part) for part in rest if part is not None]
    if days is not None:  # D-H, D-H:M, D-H:M:S
        hours, minutes, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:  # M, M:S
        hours, (minutes, seconds) = 0, [*parts, 0][:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
