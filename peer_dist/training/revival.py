"""Sub-keys that hardly any query picks, and with them the experts that only they lead to, are put to use again.

An expert is picked where both sub-keys of its key are, so that a dead one cannot be woken by itself: its sub-keys
serve others. What can be moved is a sub-key. One that took part in fewer picks of a window than 1 / :data:`STARVED`
of an even share becomes a near copy of one that took part in many, and each of its experts a copy of the expert that
has the other sub-key in its place. Where the old pair was picked the new one is too, with about the same output: the
model goes on as it was, and training parts the two. Optimizer moments of what was moved start at zero.

Decisions follow from counts over all ranks, and noise from (seed, step, layer): the same in every layout.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from peer_dist.megatron import Parallel, peer_layers
from peer_dist.optim import Engine, TableOptimizer
from peer_dist.optim.rounding import stream_key
from peer_dist.sharding import GridLayout

STARVED = 16
_NOISE = 0.1  # of a moved sub-key, relative to its components
_BLOCK = 8192  # rows that travel at a time


def subkey_sources(picks: Tensor) -> Tensor:
    """Which sub-key each is to be a copy of: itself, but for the starved ones, the most used ones in turn.

    Args:
        picks: per expert, in each of some sets of product keys, int64 ``[sets, n * n]``.

    Returns:
        int64 ``[sets, 2, n]``.
    """
    n = round(picks.shape[1] ** 0.5)
    table = picks.view(-1, n, n)
    use = torch.stack([table.sum(2), table.sum(1)], 1)
    source = torch.arange(n, device=picks.device).repeat(*use.shape[:2], 1)
    for count, row in zip(use.flatten(0, 1), source.view(-1, n)):
        starved = (count * n * STARVED < count.sum()).nonzero()[:, 0]
        best = count.argsort(descending=True, stable=True)[: n - len(starved)]
        row[starved] = best[torch.arange(len(starved), device=picks.device) % len(best)]
    return source


def row_sources(picks: list[Tensor], sources: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The experts that become copies and what of, both int64 ``[copies]``.

    An expert that another key leads to, which stays where it is and was picked, is left as it is.

    Args:
        picks: of each layer that reads the tables, int64 ``[sets, n * n]``.
        sources: of each, from :func:`subkey_sources`.
    """
    itself = torch.arange(picks[0].shape[1], device=picks[0].device)
    source, stays = itself.clone(), torch.zeros_like(itself, dtype=torch.bool)
    for layer_picks, layer_sources in zip(picks, sources):
        n = layer_sources.shape[-1]
        for count, (first, second) in zip(layer_picks, layer_sources):
            own = (first[:, None] * n + second).flatten()
            source = torch.where(source == itself, own, source)
            stays |= (own == itself) & (count > 0)
    targets = ((source != itself) & ~stays).nonzero()[:, 0]
    return targets, source[targets]


class Revival:
    """Counts the picks of the PEER layers, and moves starved sub-keys when told to.

    Holds 16 bytes per expert and set of product keys.

    Args:
        model: before an engine takes its parameters apart.
        seed: of the noise.
    """

    def __init__(self, model: nn.ModuleList, parallel: Parallel, seed: int) -> None:
        self._parallel, self._seed = parallel, seed
        self._layers = peer_layers(model)
        self._owners = {number: layer for number, layer in self._layers.items() if layer.owns_tables}
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._keys = {number: names[id(layer.keys)] for number, layer in self._layers.items()}
        shapes = {n: (layer.keys.shape[:-3].numel(), layer.num_experts) for n, layer in self._layers.items()}
        self._picks, self._mine = (
            {number: torch.zeros(shape, dtype=torch.int64, device=parallel.device) for number, shape in shapes.items()}
            for _ in range(2)
        )

    def observe(self, number: int, indices: Tensor, gates: Tensor) -> None:
        """Count picks ``[tokens, heads, top_k]`` of layer ``number``; one with a gate of 0 is none."""
        if number in self._mine:
            mine = self._mine[number]
            sets = torch.arange(len(mine), device=indices.device)[:, None] * mine.shape[1]
            mine.view(-1).index_add_(0, (indices + sets).flatten(), (gates != 0).flatten().long())

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """``(layer, picks)`` of all ranks since the last revival: what a checkpoint needs. A collective call.

        Writing into the tensors loads them.
        """
        for number, mine in self._mine.items():
            dist.all_reduce(mine, group=self._parallel.token_group)
            self._picks[number] += mine
            mine.zero_()
            yield f"layer{number}", self._picks[number]

    @torch.no_grad()
    def revive(self, engine: Engine, step: int) -> int:
        """Move what was starved since the last call; the number of sub-keys. A collective call, between two steps."""
        for _ in self.state():
            pass
        sources = {number: subkey_sources(picks) for number, picks in self._picks.items()}
        moved = {n: source != torch.arange(source.shape[-1], device=source.device) for n, source in sources.items()}
        self._move_keys(engine, step, sources, moved)
        for number, owner in self._owners.items():
            pool = [n for n, layer in self._layers.items() if layer.down is owner.down]
            rows = row_sources([self._picks[n] for n in pool], [sources[n] for n in pool])
            for part in ("down", "up"):
                _copy_rows(engine.tables, f"layer{number}.{part}", owner.layout, *rows)
        for picks in self._picks.values():
            picks.zero_()
        total = torch.tensor(sum(int(each.sum()) for each in moved.values()), device=self._parallel.device)
        dist.all_reduce(total, group=self._parallel.pipeline_group)
        return int(total)

    def _move_keys(self, engine: Engine, step: int, sources: dict[int, Tensor], moved: dict[int, Tensor]) -> None:
        numbers = {self._keys[number]: number for number in self._keys if moved[number].any()}
        for name, part, value in engine.dense_state(numbers):
            number = numbers[name]
            keys = value.reshape(*moved[number].shape, -1)  # [sets, 2, n, key_dim / 2]
            new = torch.zeros_like(keys)
            if part == "master":
                near = keys.gather(2, sources[number][..., None].expand_as(keys))
                generator = torch.Generator().manual_seed(stream_key(self._seed, f"revival.layer{number}", step))
                noise = torch.randn(keys.shape, generator=generator).to(keys)
                new = near + _NOISE * near.square().mean(-1, keepdim=True).sqrt() * noise
            engine.load_dense_state(name, part, torch.where(moved[number][..., None], new, keys).view_as(value))


def _copy_rows(tables: TableOptimizer, name: str, layout: GridLayout, targets: Tensor, sources: Tensor) -> None:
    """Between row shards, a block after the other. Collective."""
    first, last = layout.rows.start, layout.rows.stop
    for target, source in zip(targets.split(_BLOCK), sources.split(_BLOCK)):
        weight = torch.zeros(len(source), len(layout.columns), device=source.device)
        here, mine = ((first <= rows) & (rows < last) for rows in (source, target))
        weight[here] = tables.rows(name, source[here] - first)
        if layout.groups is not None:
            dist.all_reduce(weight, group=layout.groups.rows)  # others have zeros
        tables.replace_rows(name, target[mine] - first, weight[mine])
