"""Shows the progress of a run on rank 0: a bar on a terminal, a line every ten seconds in a log file."""

from __future__ import annotations

import time
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

_LOG_SECONDS = 10.0


class Progress:
    """A context that shows loss, tokens per second and the time left.

    Args:
        console: where to show them; it is quiet on every rank but 0.
        start: number of steps done before.
        total: number of steps of the whole run.
    """

    def __init__(self, console: Console, start: int, total: int) -> None:
        self._console, self._start, self._total = console, start, total
        self._bar = RichProgress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[status]}", markup=False),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            disable=console.quiet or not console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=total, completed=start, status="")
        self._begin = time.monotonic()
        self._last_line = -_LOG_SECONDS
        self._validation = ""

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, step: int, values: dict[str, float]) -> None:
        """Show the numbers of step ``step``, by their names in metrics.jsonl."""
        if "val/perplexity" in values:
            self._validation = f"  val ppl {values['val/perplexity']:.2f}"
        status = f"loss {values['train/loss']:.3f}{self._validation}  {values['speed/tokens_per_second']:,.0f} tokens/s"
        self._bar.update(self._task, completed=step, status=status)
        now = time.monotonic()
        if self._bar.disable and (now - self._last_line >= _LOG_SECONDS or step == self._total):
            self._last_line = now
            remaining = timedelta(seconds=round((now - self._begin) / (step - self._start) * (self._total - step)))
            self._console.print(f"step {step}/{self._total}  {status}  ETA {remaining}")

    def say(self, status: str) -> None:
        """Show ``status`` in the bar until the next update; log files have no such line."""
        self._bar.update(self._task, status=status)
