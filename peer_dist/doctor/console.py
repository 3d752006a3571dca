"""The command: it joins the other ranks within a time limit, runs the checks, prints on rank 0, and exits."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from rich.table import Table
from rich.text import Text

from peer_dist.config.schema import Config
from peer_dist.doctor.checks import CHECKS
from peer_dist.mistake import printable
from peer_dist.output import OutputError, check_results, messages, results, show
from peer_dist.planning.calibration import calibrate, check_writable
from peer_dist.ranks.examination import Examination, Finding, examine
from peer_dist.ranks.launchers import free_port
from peer_dist.ranks.world import JoinError, World, WorldError

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


def run(config: Config | None, seconds: float, *, as_json: bool, hardware: Path | None = None) -> None:
    """Run the checks and end the process, with 0, or with 1 if a check failed. It never returns: threads may hang.

    Alone on a machine with several GPUs, and asked about no run in particular, it examines them all: it starts itself
    once for each.

    Args:
        config: the config of the run that the checks are for, if there is one.
        seconds: the time limit of each check.
        as_json: whether to print one JSON object instead of a table.
        hardware: the file to write measured rates to, instead of running the checks.
    """
    start = time.monotonic()
    world = World.from_environment()
    if config is None and hardware is None and world.launcher == World.launcher and torch.cuda.device_count() > 1:
        options = ["--seconds", str(seconds), *(["--json"] if as_json else [])]
        os._exit(on_ranks(torch.cuda.device_count(), [sys.executable, "-m", "peer_dist", "doctor", *options]))
    if hardware is not None and world.rank == 0:
        check_writable(hardware)
    report = _joined(world, seconds)
    if report is None and hardware is not None:
        report = calibrate(world, hardware, seconds)
    report = report or examine(world, CHECKS, config, seconds)
    if world.rank == 0 or report.ranks == 0:
        if as_json:
            show(report.json())
        else:
            _print(report, time.monotonic() - start)
    code = 0 if report.ok else 1
    try:
        check_results()
    except OutputError as error:
        messages().print(Text.assemble(("error:", "red"), f" {error}"))
        code = error.exit_code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def on_ranks(count: int, command: list[str]) -> int:
    """Start a command as ``count`` ranks of this machine, wait for them, and return the largest of their exit codes."""
    launch = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    launch |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(command, env=os.environ | launch | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(count)
    ]
    return max(abs(process.wait()) for process in ranks)  # of one that a signal killed, the signal's number


def _joined(world: World, seconds: float) -> Examination | None:
    """Join the other ranks; return None, or a report of the failure if that does not succeed in time."""
    problem: list[BaseException] = []
    limit = 2 * seconds  # processes of one job do not start at once

    def join() -> None:
        try:
            world.join(limit)
        except BaseException as error:
            problem.append(error)

    thread = threading.Thread(target=join, daemon=True)
    thread.start()
    thread.join(limit + 10)
    if problem and isinstance(problem[0], WorldError) and not isinstance(problem[0], JoinError):
        raise problem[0]
    if not problem and not thread.is_alive():
        return None
    address = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
    reason = str(problem[0]).splitlines()[0] if problem else f"not all of them came within {limit:.0f} s"
    rank = f"rank {world.rank} ({socket.gethostname()})"
    text = f"{rank} did not join the {world.world_size} ranks at {address}: {reason}"
    advice = "see that those ranks were started, and that MASTER_ADDR can be reached from each node"
    return Examination(0, [Finding("joining", "fail", text, advice)])  # ranks = 0: every rank prints its own report


def _print(report: Examination, seconds: float) -> None:
    """Print a report as a table, and a last line with its verdict."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for finding in report.findings:
        advice = (f"\n-> {printable(finding.advice)}", "dim") if finding.advice else ""
        verdict = Text(finding.verdict, _COLOURS[finding.verdict])
        table.add_row(finding.check, verdict, Text.assemble(printable(finding.told), advice))
    console = results()
    console.print(table)
    counts = [f"{sum(f.verdict == verdict for f in report.findings)} {verdict}" for verdict in _COLOURS]
    word = ("ready", "green") if report.ok else ("not ready", "red")
    console.print(Text.assemble(word, f": {', '.join(counts)}; {seconds:.1f} s"))
