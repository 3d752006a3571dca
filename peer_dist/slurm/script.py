"""How what people name gets into a batch script: every value arrives as it is, and none adds a line or a command.

What can be quoted is quoted: for the shell, or for `sbatch`, which reads quotes in its lines as a shell does but a
backslash as an escape even between single ones. Line breaks and control characters are refused.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable

from peer_dist.mistake import Mistake, printable

# options of sbatch's that would make another job of it than its script is written for, and what to use instead
_OTHERS = {
    "array": "the script is written for the job that peer-dist makes; start several runs with peer-dist sweep",
    "signal": "the script asks for the signal that it waits for; give --signal-lead where a command has it",
    "wrap": "the job has its own script; a file for --setup is read before a run",
    "chdir": "paths are meant from the folder in which the job is submitted; change to another before that",
}
_LAYOUT = {  # options that have one of peer-dist submit's, whose number of ranks is checked
    "nodes": "--nodes",
    "ntasks": "--nodes and --ranks-per-node",
    "ntasks-per-node": "--ranks-per-node",
    "requeue": "--requeue",
    "no-requeue": "--no-requeue",
}
_SHORT = {"a": "array", "D": "chdir", "N": "nodes", "n": "ntasks"}


class SubmitError(Mistake, RuntimeError):
    """The job cannot be submitted as asked; the message says what to change."""


def one_line(what: str, value: str | os.PathLike[str]) -> str:
    """A value as the text that a script can hold.

    Args:
        what: its name, as the beginning of the sentence.
        value: the text or path.

    Raises:
        SubmitError: it has a line break or another control character, or is no text at all.
    """
    text = os.fspath(value)
    if (
        printable(text) != text
        or len(text.splitlines()) > 1
        or text.endswith(("\n", "\u2028", "\u2029"))
        or "\t" in text
    ):
        raise SubmitError(
            f"{what}: {text!r:.200} holds a line break or another control character, which no batch script can; "
            "leave it out, or rename what it names"
        )
    return text


def quoted(what: str, value: str | os.PathLike[str]) -> str:
    """A value as one word of the shell's; see :func:`one_line`."""
    return shlex.quote(one_line(what, value))


def in_double_quotes(what: str, value: str | os.PathLike[str]) -> str:
    """A value as a part of a word of the shell's that is in double quotes; see :func:`one_line`."""
    return re.sub(r'([\\"$`])', r"\\\1", one_line(what, value))


def mounted(folder: str | os.PathLike[str]) -> str:
    """A folder that a container is to see.

    Raises:
        SubmitError: its name has a comma or a colon, which containers' lists of folders cannot hold, or see
            :func:`one_line`.
    """
    text = one_line("--container", folder)
    if "," in text or ":" in text:
        raise SubmitError(
            f"--container: {text} cannot be shown to a container, because its name has a comma or a colon; rename it, "
            "or name it by a link"
        )
    return text


def log_pattern(what: str, folder: str | os.PathLike[str], name: str) -> str:
    """The path of a log in ``folder`` for ``--output``, where Slurm replaces ``%j`` and the like in ``name`` alone.

    Raises:
        SubmitError: the folder has a backslash, which would have Slurm replace nothing, or see :func:`one_line`.
    """
    text = one_line(what, folder)
    if "\\" in text:
        raise SubmitError(
            f"{what}: {text} has a backslash, which Slurm takes out of names of logs; choose another folder"
        )
    return f"{text.replace('%', '%%')}/{name}"


def directive(name: str, value: object = None) -> str:
    """An option as a line that `sbatch` reads; without a value, as a switch."""
    return f"#SBATCH --{name}" + ("" if value is None else f"={_for_sbatch(one_line(f'--{name}', str(value)))}")


def passed_on(options: Iterable[str], own_layout: bool) -> list[str]:
    """The options of ``--sbatch`` as lines that `sbatch` reads, each with its value as it is.

    Args:
        options: such as ``--comment=two words``, ``-p gpu`` or ``--exclusive``.
        own_layout: whether nodes and ranks have options of their own.

    Raises:
        SubmitError: one is no option, has a control character, or would make another job of it.
    """
    lines = []
    for option in options:
        text = one_line("--sbatch", option)
        match = re.fullmatch(r"(-[A-Za-z]|--[A-Za-z][A-Za-z0-9-]*)(=|\s+|)(.*)", text)
        if match is None or (match[1].startswith("--") and not match[2] and match[3]):
            raise SubmitError(f"--sbatch: {text!r} is no option of sbatch; write for example --constraint=h100")
        flag, between, value = match.groups()
        name = flag[2:] if flag.startswith("--") else _SHORT.get(flag[1:], "")
        if name in _OTHERS:
            raise SubmitError(f"--sbatch: {flag} cannot be passed on: {_OTHERS[name]}")
        if own_layout and name in _LAYOUT:
            raise SubmitError(
                f"--sbatch: {flag} cannot be passed on, because the run is checked for it; give {_LAYOUT[name]}"
            )
        if flag.startswith("--"):
            lines.append(f"#SBATCH {flag}{'=' if between else ''}{_for_sbatch(value) if between else ''}")
        else:  # what follows a short option's letter is its value, an = included
            lines.append(f"#SBATCH {flag}{_for_sbatch(between.strip() + value) if between.strip() + value else ''}")
    return lines


def _for_sbatch(text: str) -> str:
    """A word that `sbatch` reads in a script's line as ``text``."""
    if not re.search(r"[\s'\"\\#]", text):
        return text
    return shlex.quote(text) if "\\" not in text else '"' + re.sub(r'([\\"])', r"\\\1", text) + '"'
