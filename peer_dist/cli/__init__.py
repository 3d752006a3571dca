"""The command line: the list of commands, whose code is in this folder's modules, and how mistakes are reported."""

from __future__ import annotations

import os
import sys
import time
from typing import Annotated, Any, NoReturn

import typer
from rich.text import Text
from typer.core import TyperCommand

from peer_dist import output
from peer_dist.cli import checkpoints, data, planning, results, runs
from peer_dist.cli.options import OptionError
from peer_dist.mistake import Mistake, in_words, unimportable
from peer_dist.ranks.launchers import WorldError, rank_said
from peer_dist.ranks.signals import end_with_torchrun
from peer_dist.shortage import leave, shortage

_UsageError: Any = typer.BadParameter.__base__  # typer names it in a private module alone

app = typer.Typer(
    name="peer-dist",
    help="Train, evaluate and run PEER language models: a Mixture of a Million Experts over many ranks.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class _WithKeys(TyperCommand):
    """A command whose help lists every key of the config."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        from peer_dist.config.reference import key_tables

        console = output.results()
        console.print("The config file's sections and keys:\n")
        for table in key_tables():
            console.print(table)


def _version(wanted: bool) -> None:
    if wanted:
        from peer_dist import __version__

        output.show(f"peer_dist {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    try:
        os.getcwd()
    except FileNotFoundError:  # libraries end the process by words of their own
        raise Mistake("the working folder is not there any more; go to one that is (cd), and start again") from None


app.command(cls=_WithKeys)(runs.train)
app.command()(runs.submit)
app.command()(planning.match)
app.command()(planning.plan)
app.command()(data.prepare)
app.command()(checkpoints.evaluate)
app.command()(checkpoints.usage)
app.command()(checkpoints.generate)
app.command()(checkpoints.export)
app.command()(results.sweep)
app.command()(results.plot)
app.command()(results.report)
app.command()(runs.doctor)


def main() -> None:
    """Run a command; a mistake of the user is reported in one sentence, with exit code 2."""
    output.outlast_readers()
    end_with_torchrun()
    try:
        _run_command()
    except Mistake as error:
        rank = rank_said(os.environ)
        if rank != "0" and type(error) is not WorldError:
            # Rank 0 finds most mistakes too, says so and leaves, and the launcher ends the others meanwhile.
            time.sleep(15)
        # some have a text of the user's inside, which may have lines and any length
        output.messages().print(Text.assemble((f"{_error(rank)}:", "red"), f" {in_words(error, 4000)}"))
        raise SystemExit(error.exit_code) from None
    except Exception as error:
        if sentence := shortage(error):  # of this rank, perhaps alone
            leave(f"{_error(rank_said(os.environ))}: {sentence}")
        raise


def _run_command() -> NoReturn:
    """Run the command that the command line names.

    Raises:
        Mistake: a person can mend it, typer's errors and those of other packages' imports among them.
        SystemExit: the command has ended, with this code.
    """
    try:
        # typer's own report is a box of several lines, from each rank
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except _UsageError as error:
        wrong = in_words(error.format_message()).rstrip(".")
        asks = not error.ctx or wrong.endswith("?")  # ... Did you mean 'train'?
        raise OptionError(wrong if asks else f"{wrong}; see `{error.ctx.command_path} --help`") from None
    except typer.Abort:
        raise SystemExit(130) from None
    except (Mistake, ModuleNotFoundError):
        raise
    except Exception as error:
        sentence = None if shortage(error) else unimportable(error)
        if sentence is None:
            raise
        raise Mistake(sentence) from None
    if not code:
        output.check_results()
    raise SystemExit(code or 0)


def _error(rank: str) -> str:
    """How a sentence about an error of this rank begins."""
    return f"error (rank {in_words(rank, 20)})" if rank != "0" else "error"
