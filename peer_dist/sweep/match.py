"""Finds partners of a model: the same transformer with another kind of feed-forward, at equal cost.

The three meanings of equal are those of the papers. ``budget`` (PEER): both runs take the same training FLOPs, so the
cheaper model sees more tokens. ``flops``: a token costs the same in the feed-forward layers, routers and retrieval
included. ``params`` (sigma-MoE): the feed-forward layers have the same number of parameters, routers included.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.table import Table

from peer_dist.config import Config, ConfigError, parse_config, write_config
from peer_dist.kinds import DENSE, KINDS, Mode
from peer_dist.kinds.cost import Parts, merged, total
from peer_dist.planning.counts import Counts, count
from peer_dist.units import short

MODES = ("budget", "flops", "params")

_T = TypeVar("_T")


@dataclass(frozen=True)
class Partner:
    """A run and its cost."""

    kind: str
    """The kind of the layers compared."""
    layers: tuple[int, ...]
    """The layers compared, from 0."""
    config: Config
    """The run's config."""
    counts: Counts
    """Parameters and FLOPs of the run's model."""
    deviation: float
    """The relative difference of what was made equal: 0.01 is 1% more than the reference. For ``budget`` that is the
    run's training FLOPs; for ``flops`` and ``params`` the difference of all feed-forward layers, divided by those
    layers of the reference that are compared.
    """

    @property
    def tokens(self) -> int:
        """The number of tokens that the run trains on."""
        train = self.config.train
        return train.steps * train.global_batch_size * self.config.model.seq_length

    @property
    def parts(self) -> Parts:
        """The costs of the compared layers' feed-forwards, added up."""
        return merged(self.counts.layers[number].feed_forward for number in self.layers)

    @property
    def sizes(self) -> dict[str, int]:
        """The kind's sizes, by their keys in its section of the config."""
        return KINDS[self.kind].size(self.config)


def match(
    config: Config,
    vocab_size: int,
    kinds: Sequence[str] = (),
    mode: str = "budget",
    reference_kind: str | None = None,
    tolerance: float = 0.02,
) -> list[Partner]:
    """Find the partners of a run.

    ``budget`` keeps all sizes, and sets ``train.steps`` and with them the schedules. ``flops`` and ``params`` keep the
    steps and change sizes: the first of the kind's free sizes to the nearest one possible, and the next one only if the
    deviation still exceeds the tolerance. The free sizes are, in this order (``flops``; ``params``):

    - dense: ``model.ffn_hidden_size``, of all the model's dense layers; the same
    - moe: ``expert_hidden_size``; ``num_experts``, ``expert_hidden_size``
    - sigma_moe: ``top_k``, ``expert_hidden_size``; ``num_experts``, ``expert_hidden_size``
    - peer: ``top_k``; ``num_experts``, a square
    - pkm: ``top_k``; ``num_values``, a square

    There, PEER and product-key memory also take over each other's heads, key width and number of entries, so that
    retrieval costs the same. PKM's ``top_k`` is then twice PEER's for equal FLOPs, as in the PEER paper.

    A partner writes to folders named after its kind within those of the reference, and starts from new weights.

    Args:
        config: the reference run.
        vocab_size: number of the embedding's rows, padding included.
        kinds: the partners' kinds; by default all but the reference's.
        mode: ``budget``, ``flops`` or ``params``.
        reference_kind: the kind of the layers to replace; by default the only kind that is not dense, or dense if all
            layers are.
        tolerance: the deviation up to which no further size is changed.

    Returns:
        The run itself, and then its partner of each kind.

    Raises:
        ConfigError: a kind or the mode is unknown, there are no layers of the reference kind, or a partner is
            impossible.
    """
    names = tuple(KINDS)
    _known("--mode", mode, MODES)
    reference = _only_kind(config) if reference_kind is None else _known("--reference-kind", reference_kind, names)
    layers = tuple(number for number, kind in enumerate(config.model.mlp_kinds) if kind == reference)
    if not layers:
        raise ConfigError(f"--reference-kind: model.mlp has no {reference} layer; name a kind that it has")
    partner_kinds = [_known("--kind", kind, names) for kind in kinds] or [kind for kind in names if kind != reference]
    if reference in partner_kinds:
        raise ConfigError(f"--kind: {reference} is the kind of the layers to replace; name another")
    own = Partner(reference, layers, config, count(config, vocab_size), 0.0)
    partners = []
    for kind in partner_kinds:
        start = _replaced(own, kind)
        if mode == "budget":
            partners.append(_equal_budget(own, start, kind, vocab_size))
        else:
            equal: Mode = "flops" if mode == "flops" else "params"
            partners.append(_equal_layers(own, start, kind, equal, tolerance, vocab_size))
    return [own, *partners]


def misses(partners: Sequence[Partner], tolerance: float) -> list[str]:
    """A sentence for each partner whose deviation from the reference exceeds the tolerance."""
    return [
        f"{partner.kind}: the nearest sizes found ({', '.join(f'{k} {v:,}' for k, v in partner.sizes.items())}) differ "
        f"by {partner.deviation:+.1%}, more than {tolerance:.1%}; change one that was not free "
        "(section.key=value), or raise --tolerance"
        for partner in partners
        if abs(partner.deviation) > tolerance
    ]


def overruled(partners: Sequence[Partner], overrides: Sequence[str]) -> list[str]:
    """A sentence for each override (``section.key=value``) that a partner lacks because it was made equal."""
    sentences = []
    for override in overrides:
        key = override.partition("=")[0]
        section, _, name = key.partition(".")
        reference, *values = [getattr(getattr(partner.config, section, None), name, None) for partner in partners]
        sentences += [
            f"{key}: was given as {reference}, and is {value} in the {partner.kind} partner, to be equal"
            for partner, value in zip(partners[1:], values)
            if value != reference and name in (*partner.sizes, "steps", "warmup_steps", "decay_steps")
        ]
    return sentences


def comparison(partners: Sequence[Partner]) -> Table:
    """A table with a column for each partner; parameters and FLOPs of layers are sums over the compared ones."""
    own = partners[0]
    numbers = ", ".join(str(number + 1) for number in own.layers)
    table = Table(title=f"layer(s) {numbers}; FLOPs per token", title_justify="left", box=None)
    table.add_column("", no_wrap=True)
    for partner in partners:
        table.add_column(partner.kind, justify="right")
    parts = [name for name, cost in merged(partner.parts for partner in partners).items() if cost.flops]
    rows: list[tuple[str, list[str]]] = [
        *((name, [_size(p, name) for p in partners]) for name in dict.fromkeys(n for p in partners for n in p.sizes)),
        ("parameters, model", [short(p.counts.total.parameters) for p in partners]),
        ("  active", [short(p.counts.total.active) for p in partners]),
        ("parameters, layers", [short(total(p.parts).parameters) for p in partners]),
        ("  active", [short(total(p.parts).active) for p in partners]),
        ("forward FLOPs, layers", [short(total(p.parts).flops) for p in partners]),
        *((f"  {name}", [short(p.parts[name].flops) if name in p.parts else "" for p in partners]) for name in parts),
        ("forward FLOPs, model", [short(p.counts.total.flops) for p in partners]),
        ("training FLOPs, model", [short(p.counts.train_flops_per_token) for p in partners]),
        ("steps", [f"{p.config.train.steps:,}" for p in partners]),
        ("tokens", [short(p.tokens) for p in partners]),
        ("deviation", ["", *(f"{p.deviation:+.2%}" for p in partners[1:])]),
    ]
    for name, cells in rows:
        table.add_row(name, *cells)
    return table


def write(partners: Sequence[Partner], folder: Path, name: str, mode: str) -> list[Path]:
    """Write each partner's config to ``folder/name-kind.yaml``, replacing what is there; defaults are left out.

    Args:
        partners: from :func:`match`.
        folder: where the files go.
        name: the name of the reference's config file.
        mode: the mode that the partners were found by, for a comment in the files.

    Returns:
        The paths of the files.

    Raises:
        ConfigError: the folder cannot be written.
    """
    paths = [folder / f"{name}-{partner.kind}.yaml" for partner in partners]
    for path, partner in zip(paths, partners):
        about = f"The {partner.kind} partner of {name}.yaml, by peer-dist match --mode {mode}."
        write_config(partner.config, path, about)
    return paths


def _known(option: str, value: str, choices: Sequence[_T]) -> _T:
    """The choice that equals ``value``; refuse a value that is none of them."""
    for choice in choices:
        if choice == value:
            return choice
    raise ConfigError(f"{option}: {value!r} is not known; {', '.join(map(str, choices))}")


def _only_kind(config: Config) -> str:
    """The only kind of layers that is not dense, or dense if all are; refuse a model with several."""
    kinds = list(dict.fromkeys(kind for kind in config.model.mlp_kinds if kind != DENSE.name))
    if len(kinds) > 1:
        raise ConfigError(f"model.mlp: has {' and '.join(kinds)} layers; say with --reference-kind which to replace")
    return kinds[0] if kinds else DENSE.name


def _changed(config: Config, changes: Mapping[str, Any], kind: str) -> Config:
    """The checked config with other values for some keys; ``kind`` is for error messages."""
    tree = config.model_dump(mode="json")
    for key, value in changes.items():
        section, name = key.split(".")
        tree[section][name] = value
    return parse_config(tree, f"the {kind} partner")


def _replaced(own: Partner, kind: str) -> Config:
    """The config with layers of another kind, with all sizes as configured, and with folders of its own."""
    config = own.config
    mlp = [kind if number in own.layers else other for number, other in enumerate(config.model.mlp_kinds)]
    checkpoints, logs = (
        str(Path(folder).parent / kind / Path(folder).name) for folder in (config.checkpoint.dir, config.logging.dir)
    )
    changes: dict[str, Any] = {"checkpoint.dir": checkpoints, "checkpoint.init_from": None, "logging.dir": logs}
    if not any(KINDS[name].sparse for name in mlp):  # there are no tables to shard: the ranks are replicas
        changes |= {"parallel.expert": 1, "parallel.expert_tensor": 1}
    return _changed(config, {"model.mlp": mlp, **changes}, kind)


def _equal_budget(own: Partner, config: Config, kind: str, vocab_size: int) -> Partner:
    """The partner of equal training FLOPs: steps, warm-up and decay are stretched alike."""
    counts = count(config, vocab_size)
    factor = own.counts.train_flops_per_token / counts.train_flops_per_token
    changes: dict[str, int] = {"train.steps": max(1, round(config.train.steps * factor))}
    for section in ("optimizer", "table_optimizer"):
        for key, rounded in (("warmup_steps", math.floor), ("decay_steps", math.ceil)):  # warm-up stays below decay
            steps = getattr(getattr(config, section), key)
            if steps is not None:
                changes[f"{section}.{key}"] = rounded(steps * factor)
    config = _changed(config, changes, kind)
    deviation = config.train.steps / (own.config.train.steps * factor) - 1
    return Partner(kind, own.layers, config, counts, deviation)


def _equal_layers(own: Partner, config: Config, kind: str, mode: Mode, tolerance: float, vocab_size: int) -> Partner:
    """The partner whose feed-forward layers have equal FLOPs or parameters, which ``mode`` says."""

    def amount(parts: Parts) -> int:
        return total(parts).flops if mode == "flops" else total(parts).parameters

    def of_all_layers(counts: Counts) -> int:
        return amount(merged(layer.feed_forward for layer in counts.layers))

    config = _changed(config, KINDS[kind].taken_over(config, KINDS[own.kind]), kind)
    target, scale = of_all_layers(own.counts), amount(own.parts)
    deviation = math.inf
    for key, sizes in KINDS[kind].free_sizes(config, mode):
        if abs(deviation) <= tolerance:
            break

        def excess(size: int, key: str = key, config: Config = config) -> int:
            return of_all_layers(count(_changed(config, {key: size}, kind), vocab_size)) - target

        above = bisect_left(sizes, 0, key=excess)  # bisection works because costs grow with every size
        size = min(sizes[max(0, above - 1) : above + 1], key=lambda size: abs(excess(size)))
        config, deviation = _changed(config, {key: size}, kind), excess(size) / scale
    return Partner(kind, own.layers, config, count(config, vocab_size), deviation)


def _size(partner: Partner, name: str) -> str:
    """A cell of the table: a size, and whether it is also that of layers that are not compared."""
    if name not in partner.sizes:
        return ""
    others = partner.config.model.mlp_kinds.count(partner.kind) > len(partner.layers)
    return f"{partner.sizes[name]:,}" + (" (all)" if others else "")
