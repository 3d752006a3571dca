"""What the layers of a model chunk are built from."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from peer_dist.config import Config
from peer_dist.layers.peer import PEER
from peer_dist.layers.recurrence import RouterCore

from .parallel import Parallel


@dataclass
class BuildContext:
    """What the layers of one model chunk are built from, and share.

    Attributes:
        core: of the layers' routers, where ``router.kind`` has one.
        pools: first layer of a pool, from 0, to the layer that owns its tables, of all of this rank's chunks.
    """

    config: Config
    parallel: Parallel
    dtype: torch.dtype
    core: RouterCore | None
    pools: dict[int, PEER] = field(default_factory=dict)

    def seed(self, number: int) -> int:
        """The seed of layer ``number``, from 1 (:func:`layer_seed`)."""
        return layer_seed(self.config, number)


def layer_seed(config: Config, number: int) -> int:
    """Each layer's own, so that no other layer moves its weights."""
    return config.train.seed + 1_000_003 * number
