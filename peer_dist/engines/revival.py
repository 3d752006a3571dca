"""Sub-keys that hardly any query picks, and with them the experts that only they lead to, are put to use again.

An expert is picked where both sub-keys of its key are, so that a dead one cannot be woken by itself: its sub-keys
serve others. What can be moved is a sub-key. One that took part in fewer picks of a window than 1 / :data:`STARVED`
of an even share becomes a near copy of one that took part in many, with moments of zero: its experts are picked where
those of the other are, and training parts the two. The experts' rows stay. Copies of the other's rows are no better:
a token's picks would be the same experts twice.

Decisions follow from counts over all ranks, and noise from (seed, step, layer): the same in every layout.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from peer_dist.engines import Engine
from peer_dist.megatron import Parallel, peer_layers
from peer_dist.optim.rounding import stream_key

STARVED = 16
_NOISE = 0.1  # of a moved sub-key, relative to its components


def subkey_sources(use: Tensor) -> Tensor:
    """Which sub-key each is to be a copy of: itself, but for the starved ones, the most used ones in turn.

    Args:
        use: picks that each took part in, int64 ``[sets, 2, n]``.

    Returns:
        int64 ``[sets, 2, n]``.
    """
    n = use.shape[-1]
    source = torch.arange(n, device=use.device).repeat(*use.shape[:2], 1)
    for count, row in zip(use.flatten(0, 1), source.view(-1, n)):
        starved = (count * n * STARVED < count.sum()).nonzero()[:, 0]
        best = count.argsort(descending=True, stable=True)[: n - len(starved)]
        row[starved] = best[torch.arange(len(starved), device=use.device) % len(best)]
    return source


class Revival:
    """Counts the picks of the PEER layers, and moves starved sub-keys when told to.

    Args:
        model: before an engine takes its parameters apart.
        seed: of the noise.
    """

    def __init__(self, model: nn.ModuleList, parallel: Parallel, seed: int) -> None:
        self._parallel, self._seed = parallel, seed
        layers = peer_layers(model)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._keys = {number: names[id(layer.keys)] for number, layer in layers.items()}
        self._use, self._mine = (  # over all ranks; on this one since then
            {
                number: torch.zeros(layer.keys.shape[:-1].numel(), dtype=torch.int64, device=parallel.device).view(
                    -1, 2, layer.keys.shape[-2]
                )
                for number, layer in layers.items()
            }
            for _ in range(2)
        )

    def observe(self, number: int, indices: Tensor, gates: Tensor) -> None:
        """Count picks ``[tokens, heads, top_k]`` of layer ``number``; one with a gate of 0 is none."""
        if number in self._mine:
            mine, counted = self._mine[number], (gates != 0).long()
            sets, _, n = mine.shape
            first = torch.arange(sets, device=indices.device)[:, None] * 2 * n
            for half in (indices // n, indices % n + n):
                mine.view(-1).index_add_(0, (half + first).flatten(), counted.flatten())

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """``(layer, picks per sub-key [sets, 2, n])`` of all ranks since the last revival, for checkpoints.

        A collective call. Writing into the tensors loads them.
        """
        for number, mine in self._mine.items():
            dist.all_reduce(mine, group=self._parallel.token_group)
            self._use[number] += mine
            mine.zero_()
            yield f"layer{number}", self._use[number]

    @torch.no_grad()
    def revive(self, engine: Engine, step: int) -> int:
        """Move what was starved since the last call; the number of sub-keys. A collective call, between two steps."""
        for _ in self.state():
            pass
        sources = {number: subkey_sources(use) for number, use in self._use.items()}
        moved = {n: source != torch.arange(source.shape[-1], device=source.device) for n, source in sources.items()}
        self._move_keys(engine, step, sources, moved)
        for use in self._use.values():
            use.zero_()
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
