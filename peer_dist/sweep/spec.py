"""Reads a sweep's file, models x sizes x variants x budgets x seeds, and makes the checked config of each run."""

from __future__ import annotations

import copy
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator, Field, StringConstraints, ValidationError, model_validator

from peer_dist.config import Config, ConfigError, parse_config
from peer_dist.config.load import Tree, find_config, read_tree, sentence, set_key
from peer_dist.kinds.section import LONGEST_NAME, MOST_STEPS, FilePath, Rate, Section, Seed, Steps
from peer_dist.mistake import shown
from peer_dist.planning.counts import Counts, count

Name = Annotated[str, StringConstraints(pattern=r"^\w[\w.+]*$")]
Overrides = Annotated[dict[str, Any], BeforeValidator(lambda value: {} if value is None else value)]
Positive = Annotated[float, Field(gt=0)]
Rates = tuple[float, float | None]
"""Learning rates of the dense part and of the tables; None stands for the config's."""

_DERIVED = {
    "train.steps",
    "train.seed",
    "optimizer.warmup_steps",
    "optimizer.decay_steps",
    "evaluation.interval",
    "evaluation.batches",
    "checkpoint.dir",
    "logging.dir",
}
_TUNED = {"optimizer.lr", "table_optimizer.lr"}
_MOST_RUNS = 10_000
_WHOLE_SPLIT = 10**9  # batches of a validation, which never takes more than the whole split


class TuneSection(Section):
    """How learning rates are tuned: by the same number of trials for each model, at the smallest budget."""

    size: str = Field("", description="the size at which it is done")
    variant: str = Field("", description="the variant; by default the first")
    seeds: list[Seed] = Field(default_factory=list, description="seeds of the trials; by default the first one")
    learning_rates: dict[str, list[Rate | tuple[Rate, Rate]]] = Field(
        description="model to its trials: a rate for the dense part, or a pair of it and the tables' rate"
    )

    def trials(self, model: str) -> list[Rates]:
        """The learning rates to try for ``model``, in the file's order."""
        return [rate if isinstance(rate, tuple) else (rate, None) for rate in self.learning_rates[model]]


class SweepFile(Section):
    """The content of a sweep's file."""

    base: FilePath | Tree = Field(description="the runs' config: a YAML file relative to this one, or its sections")
    budgets: list[Positive] = Field(default_factory=list, description="training FLOPs of a run")
    tokens: Positive | None = Field(None, description="instead of budgets: training tokens of every run")
    models: dict[Name, Overrides] = Field(min_length=1, description="name to overrides (section.key: value)")
    sizes: dict[Name, Overrides] = Field({"": {}}, min_length=1, description="name to overrides")
    variants: dict[Name, Overrides] = Field({"": {}}, min_length=1, description="name to overrides")
    seeds: list[Seed] = Field([1], min_length=1, description="values of train.seed")
    warmup_share: float = Field(0.05, ge=0, lt=1, description="share of the steps that warms the learning rate up")
    validations: Steps = Field(1, description="over the whole validation split in each run, the last at its end")
    tune: TuneSection | None = Field(None, description="how learning rates are chosen; null: they are the config's")
    keep_checkpoints: bool = Field(False, description="keep those of finished runs")

    @model_validator(mode="after")
    def _check(self) -> SweepFile:
        """Refuse a file that contradicts itself."""
        if bool(self.budgets) == (self.tokens is not None):
            raise ValueError("give exactly one of budgets and tokens")
        sizes = (len(self.models), len(self.sizes), len(self.variants), len(self.seeds), len(self.budgets) or 1)
        runs = math.prod(sizes)
        if self.tune:
            runs += (len(self.tune.seeds) or 1) * sum(map(len, self.tune.learning_rates.values()))
        if runs > _MOST_RUNS:
            raise ValueError(f"the grid has {runs:,} runs, and {_MOST_RUNS:,} are the most; make several sweeps of it")
        for name, values in (
            ("budgets", self.budgets),
            ("seeds", self.seeds),
            ("tune.seeds", self.tune.seeds if self.tune else []),
        ):
            if len(set(values)) < len(values):
                raise ValueError(f"{name} lists a value twice: {shown(values)}")
        derived = _DERIVED | (_TUNED if self.tune else set())
        for part, entries in (("models", self.models), ("sizes", self.sizes), ("variants", self.variants)):
            for name, overrides in entries.items():
                for key in sorted(derived & overrides.keys()):
                    raise ValueError(f"{part}.{name}: {key} is set by the sweep itself; take it out")
        if self.tune:
            self._check_tune(self.tune)
        return self

    def _check_tune(self, tune: TuneSection) -> None:
        """Refuse a section that does not fit the models, sizes and variants."""
        if tune.learning_rates.keys() != self.models.keys():
            raise ValueError(
                f"tune.learning_rates: is for {', '.join(tune.learning_rates)}, and the models are "
                f"{', '.join(self.models)}; give each its trials"
            )
        counts = {name: len(rates) for name, rates in tune.learning_rates.items()}
        if len(set(counts.values())) > 1 or not all(counts.values()):
            listed = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise ValueError(
                f"tune.learning_rates: every model needs the same number of trials, at least 1; got {listed}"
            )
        if tune.size not in self.sizes:
            raise ValueError(f"tune.size: {tune.size!r} is none of the sizes ({', '.join(self.sizes)})")
        if tune.variant and tune.variant not in self.variants:
            raise ValueError(f"tune.variant: {tune.variant!r} is none of the variants ({', '.join(self.variants)})")


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        name: the name of the run and of its folder.
        model, size, variant, seed: the run's place in the grid.
        budget: training FLOPs; None if tokens are fixed.
        trial: number, from 0, of the learning rates that the run tries; None for a run of the grid.
        config: the run's config; if learning rates are tuned, :meth:`at` sets them.
        cost: parameters and FLOPs of the model.
    """

    name: str
    model: str
    size: str
    variant: str
    budget: float | None
    seed: int
    trial: int | None
    config: Config
    cost: Counts

    @property
    def tokens(self) -> int:
        """The number of tokens that the run trains on."""
        return self.config.train.steps * self.config.train.global_batch_size * self.config.model.seq_length

    def at(self, rates: Rates) -> Run:
        """The same run with these learning rates."""
        lr, table_lr = rates
        dense = self.config.optimizer.model_copy(update={"lr": lr})
        tables = self.config.table_optimizer.model_copy(update={} if table_lr is None else {"lr": table_lr})
        return replace(self, config=self.config.model_copy(update={"optimizer": dense, "table_optimizer": tables}))


@dataclass(frozen=True)
class Sweep:
    """A checked sweep.

    Attributes:
        path: path of the sweep's file.
        file: the file's content.
        folder: holds a folder for each run, named after it.
        runs: all runs, of which the trials come first.
    """

    path: Path
    file: SweepFile
    folder: Path
    runs: list[Run]

    def trials(self, model: str) -> list[Run]:
        """The runs that try learning rates for ``model``."""
        return [run for run in self.runs if run.model == model and run.trial is not None]


def load_sweep(path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> Sweep:
    """Read a sweep's file and check every run of it.

    Args:
        path: the sweep's file, as :func:`peer_dist.config.find_config` finds it.
        folder: the folder for the runs' folders; nothing is written.

    Raises:
        ConfigError: the file or the config of one of its runs is invalid.
        DataError: the data are not prepared.
    """
    path, folder = find_config(path), Path(folder)
    tree = read_tree(path)
    try:
        file = SweepFile.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(sentence(error, str(path), {}, SweepFile)) from None
    base = read_tree(path.parent / file.base) if isinstance(file.base, str) else file.base
    for section in ("train", "optimizer", "evaluation", "checkpoint", "logging"):
        if not isinstance(base.get(section, {}), dict):
            where = f"base: {section}" if base is file.base else f"{path.parent / str(file.base)}: {section}"
            raise ConfigError(f"{path}: {where}: input should be a section of keys and values")
    runs = list(_runs(path, file, base, folder))
    return Sweep(path, file, folder, runs)


class _Cell(NamedTuple):
    """A place in the grid; see :class:`Run`."""

    model: str
    size: str
    variant: str
    budget: float | None
    seed: int
    trial: int | None = None

    @property
    def name(self) -> str:
        """The name of the run and of its folder."""
        budget = "" if self.budget is None else f"{self.budget:g}".replace("e+", "e")  # six digits
        parts = [self.model, self.variant, self.size, budget, f"s{self.seed}"]
        return "-".join([part for part in parts if part] + ([] if self.trial is None else [f"trial{self.trial}"]))


def _runs(path: Path, file: SweepFile, base: Tree, folder: Path) -> Iterator[Run]:
    """Yield the trials of every model, if learning rates are tuned, and then the runs of the grid.

    Raises:
        ConfigError: two runs would have one folder, or one of them cannot be.
    """
    cells = list(_cells(file))
    _check_names(path, [cell for cell, _ in cells])
    for cell, rates in cells:
        run = _run(path, file, base, folder, cell)
        yield run if rates is None else run.at(rates)


def _cells(file: SweepFile) -> Iterator[tuple[_Cell, Rates | None]]:
    """Yield the places of :func:`_runs`, those of trials with the learning rates that they try."""
    budgets: list[float] | list[None] = file.budgets or [None]
    if file.tune is not None:
        least = min(file.budgets) if file.budgets else None
        variant = file.tune.variant or next(iter(file.variants))
        for model, seed in itertools.product(file.models, file.tune.seeds or file.seeds[:1]):
            for trial, rates in enumerate(file.tune.trials(model)):
                yield _Cell(model, file.tune.size, variant, least, seed, trial), rates
    for budget, model, variant, size, seed in itertools.product(
        budgets, file.models, file.variants, file.sizes, file.seeds
    ):
        yield _Cell(model, size, variant, budget, seed), None


def _check_names(path: Path, cells: Sequence[_Cell]) -> None:
    """Refuse runs that would have one folder, or a name that no folder can have.

    Raises:
        ConfigError: naming both, or the name.
    """
    of_name: dict[str, _Cell] = {}
    for cell in cells:
        name, bytes_of = cell.name, len(os.fsencode(cell.name))
        if bytes_of > LONGEST_NAME:
            raise ConfigError(
                f"{path}: the run {name:.60}... would have a folder whose name has {bytes_of} bytes, and at most "
                f"{LONGEST_NAME} can be; shorten the names of its model, variant or size"
            )
        other = of_name.setdefault(name, cell)
        if other is not cell:
            differ = [field for field in cell._fields if getattr(other, field) != getattr(cell, field)]
            what = " and ".join(f"{field} {getattr(other, field)!r} and {getattr(cell, field)!r}" for field in differ)
            raise ConfigError(
                f"{path}: the runs of {what} would have one folder, {name}; change one of them, or take it out"
            )


def _run(path: Path, file: SweepFile, base: Tree, folder: Path, cell: _Cell) -> Run:
    """The run of a place in the grid, with a checked config.

    Args:
        path: path of the sweep's file, for error messages.
        file: the sweep's file.
        base: the tree of the config that all runs have in common.
        folder: holds the runs' folders.
        cell: the run's place.

    Raises:
        ConfigError: the config is invalid, or the run has fewer than two steps.
    """
    model, size, variant, budget, seed, _ = cell
    name = cell.name
    source = f"{path}: {name}"
    tree = copy.deepcopy(base)
    for overrides in (file.models[model], file.sizes[size], file.variants[variant]):
        for key, value in overrides.items():
            set_key(tree, key, value, f"{path}: {shown(key)}")
    set_key(tree, "train.seed", seed, source)
    for section in ("checkpoint", "logging"):
        inside = folder / name / ("checkpoints" if section == "checkpoint" else "")
        set_key(tree, f"{section}.dir", str(inside), source)
    # the base's number of steps is another; both are set again below
    set_key(tree, "optimizer.warmup_steps", 0, source)
    tree["optimizer"].pop("decay_steps", None)
    config = parse_config(tree, source)
    cost = count(config, _vocab_size(config))
    tokens = file.tokens if budget is None else budget / cost.train_flops_per_token
    assert tokens is not None
    batch = config.train.global_batch_size * config.model.seq_length
    steps = round(tokens / batch)
    key = "tokens" if budget is None else "budgets"
    if steps < 2:
        raise ConfigError(f"{source}: {key}: {tokens:,.0f} tokens are {tokens / batch:.2f} steps of {batch}; raise it")
    if steps > MOST_STEPS:
        raise ConfigError(f"{source}: {key}: {tokens:.1e} tokens are {steps:.1e} steps of {batch}; lower it")
    set_key(tree, "train.steps", steps, source)
    set_key(tree, "optimizer.warmup_steps", min(round(file.warmup_share * steps), steps - 1), source)
    set_key(tree, "optimizer.decay_steps", steps, source)
    set_key(tree, "evaluation.interval", -(-steps // file.validations), source)
    set_key(tree, "evaluation.batches", _WHOLE_SPLIT, source)
    return Run(name, *cell, parse_config(tree, source), cost)


def _vocab_size(config: Config) -> int:
    """The number of the embedding's rows, padding included."""
    from peer_dist.data.stream import open_tokenizer

    return open_tokenizer(config.data).padded_vocab_size
