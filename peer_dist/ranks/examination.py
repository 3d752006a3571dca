"""The examination of ranks: each check measures on every rank, and rank 0 judges what they measured.

Answers travel through torch.distributed's store, not by collectives, so that one rank that hangs is named by the
others instead of hanging them; and every measurement runs in a thread with a time limit.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from peer_dist.config.schema import Config
from peer_dist.ranks.world import World, named

Verdict = Literal["ok", "warn", "fail"]

_GRACE = 5.0  # seconds that an answer may take beyond the limit of its check
_visits = itertools.count()  # keeps apart the store's keys of several examinations by the same processes


@dataclass(frozen=True)
class Finding:
    """A result of one check.

    Attributes:
        check: its name.
        verdict: a run may start with a ``warn``, but not with a ``fail``.
        told: what was found, a sentence.
        advice: what to do about it; empty if the verdict is ``ok``.
        figures: what was measured, by name, in bytes and seconds: plain values that JSON can hold.
    """

    check: str
    verdict: Verdict
    told: str
    advice: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Examination:
    """All findings of one examination, the same on every rank.

    Attributes:
        ranks: number of ranks that were examined.
        findings: in the order of the checks.
    """

    ranks: int
    findings: list[Finding]

    @property
    def ok(self) -> bool:
        """Whether a run may start: nothing failed; there may be warnings."""
        return all(finding.verdict != "fail" for finding in self.findings)

    def json(self) -> str:
        """One JSON object: ``ok``, ``ranks`` and ``findings``."""
        return json.dumps({"ok": self.ok, **asdict(self)})

    @classmethod
    def parse(cls, text: str) -> Examination:
        """The examination that :meth:`json` wrote."""
        plain = json.loads(text)
        return cls(plain["ranks"], [Finding(**finding) for finding in plain["findings"]])


@dataclass
class Here:
    """What a measurement may ask: this rank and the folders that the run will use.

    Attributes:
        rank, world_size, local_rank, local_world_size, launcher: see :class:`~peer_dist.ranks.launchers.Launch`.
        device: this rank's.
        config: of the run that is examined for, if there is one.
        visit: a part of names of files: the same on all ranks, another one at each examination.
        seconds: what a measurement may take.
        left_behind: files that are removed once every rank has answered.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    launcher: str
    device: torch.device
    config: Config | None
    visit: str
    seconds: float
    left_behind: list[Path] = field(default_factory=list)

    @property
    def folders(self) -> dict[str, Path]:
        """The folders that the run writes to, by their keys in the config; without a config the working folder."""
        if self.config is None:
            return {"working folder": Path.cwd()}
        return {"checkpoint.dir": Path(self.config.checkpoint.dir), "logging.dir": Path(self.config.logging.dir)}

    def finish(self) -> None:
        """Wait until this rank's device has finished its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def together(self) -> None:
        """A barrier of all ranks."""
        dist.all_reduce(torch.zeros(1, dtype=torch.float32, device=self.device))
        self.finish()


@dataclass(frozen=True)
class Ranks:
    """What a judge needs to know of the ranks.

    Attributes:
        world_size: number of ranks.
        hosts: of those ranks that have told it.
        backend: of torch.distributed.
        config: of the run that is examined for, if there is one.
    """

    world_size: int
    hosts: Mapping[int, str]
    backend: str
    config: Config | None

    def named(self, ranks: Iterable[int]) -> str:
        """The names of ranks for a sentence: ``rank 3 (node2)``, or ``ranks 0 (a), 1 (a) and 14 more``."""
        return named(ranks, self.hosts)


@dataclass(frozen=True)
class Check:
    """One thing to examine.

    Attributes:
        name: in the findings.
        measure: runs on every rank; its result must be plain values that JSON can hold.
        judge: runs on rank 0, with the results of the ranks that could measure.
        advice: what to do if a rank cannot measure at all.
        collective: whether every rank must take part; such a check is not tried once a rank is lost.
    """

    name: str
    measure: Callable[[Here], Any]
    judge: Callable[[dict[int, Any], Ranks], list[Finding]]
    advice: str
    collective: bool = False


def examine(world: World, checks: Sequence[Check], config: Config | None = None, seconds: float = 30.0) -> Examination:
    """Run all checks on all ranks, and return the same examination on every rank. A collective call.

    Args:
        world: of this process; torch.distributed must be up.
        config: of the run that the checks are for, if there is one.
        seconds: what a check may take; a rank that takes longer is reported, not waited for.
    """
    store = dist.PrefixStore(f"doctor/{next(_visits)}", dist.distributed_c10d._get_default_store())
    if world.rank == 0:
        store.set("visit", secrets.token_hex(4))
    visit = _wait(store, "visit", seconds + _GRACE)
    if visit is None:
        return _without_rank_0(world.world_size, "at the start")
    here = Here(
        rank=world.rank,
        world_size=world.world_size,
        local_rank=world.local_rank,
        local_world_size=world.local_world_size,
        launcher=world.launcher,
        device=world.device,  # not the current one, which belongs to the thread in which the ranks have joined
        config=config,
        visit=visit,
        seconds=seconds,
    )
    try:
        return (_lead if world.rank == 0 else _follow)(store, here, checks)
    finally:
        for path in here.left_behind:
            with contextlib.suppress(OSError):  # not there, or nowhere that it could be
                path.unlink()


def _lead(store: dist.Store, here: Here, checks: Sequence[Check]) -> Examination:
    """Examine on rank 0: measure like the others, collect their results, judge them."""
    hosts: dict[int, str] = {}
    lost: set[int] = set()  # ranks that stopped answering
    stuck = False  # whether a measurement still runs on some rank
    findings = []
    for number, check in enumerate([_HOSTS, *checks]):
        if check.collective and (lost or stuck):
            store.set(f"{number}/go", "skip")
            findings.append(Finding(check.name, "warn", "not tried: it needs every rank", "mend the above first"))
            continue
        store.set(f"{number}/go", "run")
        deadline = time.monotonic() + here.seconds + _GRACE
        answers = {0: _limited(check.measure, here)}
        waiting = {rank: f"{number}/{rank}" for rank in range(1, here.world_size) if rank not in lost}
        while waiting and time.monotonic() < deadline:
            answered = [rank for rank, key in waiting.items() if store.check([key])]
            answers |= {rank: json.loads(store.get(waiting.pop(rank))) for rank in answered}
            if waiting and not answered:
                time.sleep(0.02)
        values = {rank: answer["value"] for rank, answer in answers.items() if "value" in answer}
        if check is _HOSTS:
            hosts |= values
        ranks = Ranks(here.world_size, dict(hosts), dist.get_backend(), here.config)
        if waiting:
            lost |= set(waiting)
            problem = f"{ranks.named(waiting)}: no answer within {here.seconds + _GRACE:.0f} s"
            findings.append(Finding(check.name, "fail", problem, "see what the process does there, if it still lives"))
        late = [rank for rank, answer in answers.items() if "late" in answer]
        if late:
            stuck = True
            problem = f"{ranks.named(late)}: not done within {here.seconds:.0f} s"
            findings.append(Finding(check.name, "fail", problem, check.advice))
        errors: dict[str, list[int]] = {}
        for rank, answer in answers.items():
            if "error" in answer:
                errors.setdefault(answer["error"], []).append(rank)
        findings += [
            Finding(check.name, "fail", f"{ranks.named(failed)}: {error}", check.advice)
            for error, failed in errors.items()
        ]
        if values and not (check.collective and (late or errors or waiting)):
            findings += check.judge(values, ranks)
    report = Examination(here.world_size, findings)
    store.set("report", report.json())
    # rank 0's process holds the store: stay until the others have read it
    present = [f"read/{rank}" for rank in range(1, here.world_size) if rank not in lost]
    deadline = time.monotonic() + _GRACE
    while present and not store.check(present) and time.monotonic() < deadline:
        time.sleep(0.02)
    return report


def _follow(store: dist.Store, here: Here, checks: Sequence[Check]) -> Examination:
    """Examine on every other rank: measure when rank 0 says so, and return its examination."""
    patience = 2 * (here.seconds + _GRACE)
    for number, check in enumerate([_HOSTS, *checks]):
        go = _wait(store, f"{number}/go", patience)
        if go is None:
            return _without_rank_0(here.world_size, f"before the check of {check.name}")
        if go == "run":
            store.set(f"{number}/{here.rank}", json.dumps(_limited(check.measure, here)))
    text = _wait(store, "report", patience)
    if text is None:
        return _without_rank_0(here.world_size, "at the end")
    store.set(f"read/{here.rank}", "1")
    return Examination.parse(text)


def _without_rank_0(ranks: int, when: str) -> Examination:
    """What another rank finds if rank 0 does not answer."""
    return Examination(
        ranks, [Finding("ranks", "fail", f"rank 0 stopped answering {when}", "see what its process does")]
    )


def _wait(store: dist.Store, key: str, seconds: float) -> str | None:
    """A key's value; None if nobody sets it within ``seconds``.

    It polls, because a call that waits would keep other threads from the store.
    """
    deadline = time.monotonic() + seconds
    while not store.check([key]):
        if time.monotonic() > deadline:
            return None
        time.sleep(0.02)
    return str(store.get(key).decode())


def _limited(measure: Callable[[Here], Any], here: Here) -> dict[str, Any]:
    """Measure in a thread, with a time limit.

    Returns:
        One entry: the ``value`` measured, the ``error`` raised, or ``late``; a late thread is left running.
    """
    answer: dict[str, Any] = {}

    def run() -> None:
        try:
            if here.device.type == "cuda":
                torch.cuda.set_device(here.device)  # every thread has its own current device
            answer["value"] = measure(here)
        except Exception as error:
            answer["error"] = f"{type(error).__name__}: {error}".splitlines()[0]

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(here.seconds)
    return dict(answer) if answer and not thread.is_alive() else {"late": True}


def _judge_hosts(values: dict[int, Any], ranks: Ranks) -> list[Finding]:
    """One finding that is ok: the number of ranks on each host."""
    counts = Counter(values.values())
    places = ", ".join(f"{host} x {count}" for host, count in list(counts.items())[:8])
    more = f" and {len(counts) - 8} more" if len(counts) > 8 else ""
    noun = "rank" if len(values) == 1 else "ranks"
    return [Finding("ranks", "ok", f"{len(values)} {noun} over {ranks.backend}: {places}{more}")]


# the first check of all: after it, ranks can be named with their hosts
_HOSTS = Check("ranks", lambda here: socket.gethostname(), _judge_hosts, "see what the process does there")
