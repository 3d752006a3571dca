"""Submits a sweep as Slurm's job arrays, of which task i is run i."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from peer_dist.slurm.script import SubmitError, directive, log_pattern, one_line, passed_on, quoted
from peer_dist.slurm.submit import find_sbatch, sbatch
from peer_dist.sweep.spec import Sweep

_SCRIPT = """#!/bin/bash
# A task of a sweep. Stopped by its time limit or a preemption (exit code 75) it is requeued, and goes on.
{directives}
set -u
{command} --task "$SLURM_ARRAY_TASK_ID" &
run=$!
interrupted=yes code=0
trap 'interrupted=yes; kill -TERM "$run"' USR1 TERM
while [ "$interrupted" = yes ]; do  # a signal ends the waiting, not the run
    interrupted=no
    wait "$run"
    code=$?
done
[ "$code" != 75 ] || scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID" || exit "$code"
exit "$code"
"""


def submit_array(sweep: Sweep, ranks: int, jobs: int, options: Sequence[str], dry_run: bool) -> str:
    """Submit the sweep's runs: the trials first, and the others to start after them.

    Args:
        sweep: the sweep.
        ranks: number of processes of a run, all on one node.
        jobs: number of tasks that run at a time.
        options: any other options of sbatch's.
        dry_run: whether to submit nothing.

    Returns:
        A text for the user: the arrays' numbers and the folder of their logs, or with ``dry_run`` the script.

    Raises:
        SubmitError: an option is none of sbatch's, the script cannot be written, or Slurm refuses the job.
    """
    folder = (sweep.folder / "slurm").absolute()
    directives = {
        "job-name": sweep.path.stem,
        "ntasks": 1,
        "cpus-per-task": ranks,
        "chdir": one_line("the working folder", Path.cwd()),
        "output": log_pattern("--output", folder, "%A_%a.log"),
        "open-mode": "append",
        "signal": "B:USR1@120",
        "requeue": None,
    }
    lines = [directive(key, value) for key, value in directives.items()]
    lines += passed_on(options, own_layout=False)  # of two alike the later one counts
    command = [sys.executable, "-m", "peer_dist", "sweep", str(sweep.path), "--output", str(sweep.folder)]
    command += ["--ranks", str(ranks)]
    words = " ".join(quoted("command line", word) for word in command)
    script = _SCRIPT.format(directives="\n".join(lines), command=words)
    trials = sum(run.trial is not None for run in sweep.runs)
    ranges = [(0, trials), (trials, len(sweep.runs))] if trials else [(0, len(sweep.runs))]
    arrays = [f"--array={first}-{end - 1}%{jobs}" for first, end in ranges]
    if dry_run:
        return f"{script}\n# submitted with {', then '.join(arrays)}"
    find_sbatch()
    path = folder / "sweep.sbatch"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(script, encoding="utf-8")
    except OSError as error:
        raise SubmitError(f"--output: nothing can be written to {folder} ({error.strerror}); choose another") from None
    numbers: list[str] = []
    for array in arrays:
        after = [f"--dependency=afterany:{numbers[-1]}"] if numbers else []
        numbers.append(sbatch(path, array, *after))
    return f"submitted {len(sweep.runs)} runs as job array {', then '.join(numbers)}\nlogs: {folder}"
