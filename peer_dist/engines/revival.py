"""Puts sub-keys that hardly any query picks to use again, and with them the experts that only they lead to.

An expert is picked if both sub-keys of its key are, and its sub-keys serve other experts too. So a dead expert cannot
be revived by itself, but a sub-key can be moved. One that took part in fewer picks of a window than 1 / :data:`STARVED`
of an even share is starved. It becomes a near copy of a sub-key that took part in many, with moments of zero: its
experts are picked where those of the other are, and training drives the two apart. The experts' rows are not changed:
if they were copied too, a token would pick the same expert twice.

Decisions follow from counts over all ranks, and noise from (seed, step, layer), so both are the same in every layout.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from peer_dist.engines import Engine
from peer_dist.kernels.rounding import stream_key
from peer_dist.megatron import Parallel, peer_layers

STARVED = 16
"""A sub-key with fewer picks than an even share divided by this is starved."""
_NOISE = 0.1  # standard deviation of a moved sub-key's noise, relative to the root mean square of its components


def subkey_sources(use: Tensor) -> Tensor:
    """Choose for each sub-key which one it becomes a copy of.

    Args:
        use: number of picks that each sub-key took part in, int64 ``[sets, 2, n]``.

    Returns:
        The source of each sub-key, int64 ``[sets, 2, n]``: itself or, for starved ones, the most used ones of its half
        in turn.
    """
    n = use.shape[-1]
    source = torch.arange(n, dtype=torch.int64, device=use.device).repeat(*use.shape[:2], 1)
    for count, row in zip(use.flatten(0, 1), source.view(-1, n)):
        starved = (count * n * STARVED < count.sum()).nonzero()[:, 0]
        best = count.argsort(descending=True, stable=True)[: n - len(starved)]
        row[starved] = best[torch.arange(len(starved), dtype=torch.int64, device=use.device) % len(best)]
    return source


class Revival:
    """Counts the picks of the PEER layers, and moves starved sub-keys in :meth:`revive`.

    Args:
        model: this rank's part of the model, before an engine partitions its parameters.
        parallel: this rank's groups.
        seed: seed of the noise.
    """

    def __init__(self, model: nn.ModuleList, parallel: Parallel, seed: int) -> None:
        self._parallel, self._seed = parallel, seed
        layers = peer_layers(model)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._keys = {number: names[id(layer.keys)] for number, layer in layers.items()}
        self._use, self._mine = (  # picks over all ranks; picks on this rank that are not among them yet
            {
                number: torch.zeros(layer.keys.shape[:-1].numel(), dtype=torch.int64, device=parallel.device).view(
                    -1, 2, layer.keys.shape[-2]
                )
                for number, layer in layers.items()
            }
            for _ in range(2)
        )

    def observe(self, number: int, indices: Tensor, gates: Tensor) -> None:
        """Count picks of layer ``number`` whose gates are not 0; both are ``[tokens, heads, top_k]``."""
        if number in self._mine:
            mine, counted = self._mine[number], (gates != 0).long()
            sets, _, n = mine.shape
            first = torch.arange(sets, dtype=torch.int64, device=indices.device)[:, None] * 2 * n
            for half in (indices // n, indices % n + n):
                mine.view(-1).index_add_(0, (half + first).flatten(), counted.flatten())

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield ``(layer's name, picks per sub-key [sets, 2, n])`` over all ranks since the last revival.

        A collective call. Checkpoints save these tensors, and restore them by writing into them.
        """
        for number, mine in self._mine.items():
            dist.all_reduce(mine, group=self._parallel.token_group)
            self._use[number] += mine
            mine.zero_()
            yield f"layer{number}", self._use[number]

    @torch.no_grad()
    def revive(self, engine: Engine, step: int) -> int:
        """Move the sub-keys that were starved since the last call. A collective call, between two steps.

        Args:
            engine: has the sub-keys' masters and moments.
            step: number of the step that has ended, from which the noise follows.

        Returns:
            The number of sub-keys moved in the whole model.
        """
        for _ in self.state():
            pass
        sources = {number: subkey_sources(use) for number, use in self._use.items()}
        moved = {
            n: source != torch.arange(source.shape[-1], dtype=torch.int64, device=source.device)
            for n, source in sources.items()
        }
        self._move_keys(engine, step, sources, moved)
        for use in self._use.values():
            use.zero_()
        count = sum(int(changed.sum()) for changed in moved.values())
        total = torch.tensor(count, dtype=torch.int64, device=self._parallel.device)
        dist.all_reduce(total, group=self._parallel.pipeline_group)
        return int(total)

    def _move_keys(self, engine: Engine, step: int, sources: dict[int, Tensor], moved: dict[int, Tensor]) -> None:
        """Write the moved sub-keys' masters and moments, for the layers that have any."""
        numbers = {self._keys[number]: number for number in self._keys if moved[number].any()}
        for name, part, value in engine.dense_state(numbers):
            number = numbers[name]
            keys = value.reshape(*moved[number].shape, -1)  # [sets, 2, n, key_dim / 2]
            new = torch.zeros_like(keys)
            if part == "master":
                copies = keys.gather(2, sources[number][..., None].expand_as(keys))
                generator = torch.Generator().manual_seed(stream_key(self._seed, f"revival.layer{number}", step))
                noise = torch.randn(keys.shape, generator=generator, dtype=torch.float32, device="cpu").to(keys)
                new = copies + _NOISE * copies.square().mean(-1, keepdim=True).sqrt() * noise
            engine.load_dense_state(name, part, torch.where(moved[number][..., None], new, keys).view_as(value))
