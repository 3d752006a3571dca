"""The results table, with one row for each run that has ended."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from peer_dist.config import Config, ConfigError
from peer_dist.measures.held_out import perplexity_of
from peer_dist.mistake import in_words
from peer_dist.reading import check_regular, reading
from peer_dist.sweep.spec import Run
from peer_dist.writing import whole

RESULTS = "results.csv"
Size = Annotated[int, Field(gt=0, lt=10**18)]
Flops = Annotated[FiniteFloat, Field(gt=0)]


class Row(BaseModel):
    """The numbers of one run; None for a number that the run does not have.

    Attributes:
        budget: training FLOPs; None if tokens are fixed.
        trial: number of the learning rates that the run tries; None for a run of the grid.
        parameters, active_parameters: number of all parameters, and of those that a token meets.
        num_experts, heads, active_experts: of one expert layer: N (or values), h, and h*k (or experts per token).
        train_loss: loss of the last step, in nats per token.
        val_loss: loss over the whole validation split after the last step, in nats per token.
        usage_percent, unevenness: means over the expert layers in the last window of steps.
        train_seconds: duration of the steps alone, without start, validations and checkpoints.
    """

    model_config = ConfigDict(frozen=True)

    run: str
    status: Literal["done", "diverged"]
    model: str
    variant: str
    size: str
    budget: Flops | None
    seed: int
    trial: int | None
    lr: float
    table_lr: float
    parameters: Size
    active_parameters: Size
    train_flops_per_token: Flops
    num_experts: int | None
    heads: int | None
    active_experts: int | None
    tokens: int
    steps: int
    train_loss: float | None
    val_loss: FiniteFloat | None
    val_perplexity: float | None
    usage_percent: float | None
    unevenness: float | None
    train_seconds: float
    tokens_per_second: float

    @property
    def label(self) -> str:
        """Model and variant, which are what is compared."""
        return f"{self.model} {self.variant}".strip()


def row_of(run: Run, metrics: Sequence[dict[str, float]], diverged: bool) -> Row:
    """The row of a run that has ended.

    Args:
        run: the run.
        metrics: the lines of its metrics.jsonl.
        diverged: whether it ended because it diverged; a run without a validation loss counts as diverged too.
    """
    last = metrics[-1] if metrics else {}
    steps = [line for line in metrics if line.get("time/step") is not None]
    seconds = sum(line["time/step"] for line in steps)
    tokens = len(steps) * run.config.train.global_batch_size * run.config.model.seq_length
    val_loss = last.get("val/loss")
    diverged = diverged or val_loss is None
    experts, heads, top_k = _experts(run.config)
    return Row(
        run=run.name,
        status="diverged" if diverged else "done",
        model=run.model,
        variant=run.variant,
        size=run.size,
        budget=run.budget,
        seed=run.seed,
        trial=run.trial,
        lr=run.config.optimizer.lr,
        table_lr=run.config.table_optimizer.lr,
        parameters=run.cost.total.parameters,
        active_parameters=run.cost.total.active,
        train_flops_per_token=run.cost.train_flops_per_token,
        num_experts=experts,
        heads=heads,
        active_experts=heads and top_k and heads * top_k,
        tokens=tokens,
        steps=len(steps),
        train_loss=last.get("train/loss"),
        val_loss=None if diverged else val_loss,
        val_perplexity=None if diverged or val_loss is None else perplexity_of(val_loss),
        usage_percent=_layers_mean(last, "usage_percent"),
        unevenness=_layers_mean(last, "unevenness"),
        train_seconds=seconds,
        tokens_per_second=tokens / seconds if seconds else 0.0,
    )


def _layers_mean(line: dict[str, float], name: str) -> float | None:
    """The mean over the expert layers of a number in a line of metrics.jsonl; None if it is missing or null."""
    values = [value for key, value in line.items() if re.fullmatch(rf"experts/layer\d+_{name}", key)]
    return fmean(values) if values and None not in values else None


def _experts(config: Config) -> tuple[int, int, int] | tuple[None, None, None]:
    """Number of experts (or values) of a layer, heads and top_k, for the first kind in the model that has experts."""
    for kind in config.kinds:
        if tables := kind.tables(config):
            return tables.rows, tables.heads, tables.top_k
        if experts := kind.experts(config):
            return experts.number, 1, experts.top_k
    return None, None, None


def write_results(path: Path, rows: Iterable[Row]) -> None:
    """Replace the table by one of ``rows``, completely or not at all.

    Raises:
        ConfigError: it cannot be written.
    """
    with whole(path, ConfigError, str(path)) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, Row.model_fields)
        writer.writeheader()
        writer.writerows(row.model_dump() for row in rows)


def read_results(path: Path, advice: str = "name a results.csv of peer-dist sweep") -> list[Row]:
    """Read the rows of a results table.

    Args:
        path: of the table.
        advice: what to do about a table that cannot be read, as the end of the sentence.

    Raises:
        ConfigError: the file cannot be read, or is no results table; the sentence names the line.
    """
    rows = []
    with reading(path, ConfigError, "a table of peer-dist sweep", advice):
        check_regular(path)
        with path.open(encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file, strict=True)
            missing = Row.model_fields.keys() - set(table.fieldnames or ())
            if missing:
                raise ConfigError(f"{path}: is no table of peer-dist sweep (it has no column {min(missing)}); {advice}")
            for line in table:
                try:
                    rows.append(_row_of_line(line))
                except ValueError as error:
                    problem = problem_of(error) if isinstance(error, ValidationError) else str(error)
                    raise ConfigError(f"{path}: line {table.line_num}: {problem}; {advice}") from None
    return rows


def _row_of_line(line: dict[str, str | None]) -> Row:
    """The row that a line of the table holds, by its columns' names.

    Raises:
        ValueError: it is none.
    """
    if None in line or None in line.values():  # so says DictReader
        raise ValueError("has not as many values as the table has columns")
    return Row.model_validate({k: v if v or k in ("size", "variant") else None for k, v in line.items()})


def problem_of(error: ValidationError) -> str:
    """Which value makes a row impossible, and why, as a part of a sentence."""
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"]))
    message = in_words(f"{first['msg'][:1].lower()}{first['msg'][1:]}")
    return f"{where}: {message}, not {first['input']!r:.40}" if where else message
