"""The kinds of feed-forward layers: one module each, and one protocol, :class:`Kind`, that all else asks.

A package of yours adds a kind by an entry point of the group ``peer_dist.kinds`` that names its :class:`Kind` class.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import Any

from peer_dist.kinds.dense import DenseKind
from peer_dist.kinds.kind import Experts, Kind, KindError, Mode, NotCausal, Tables
from peer_dist.kinds.moe import MoEKind
from peer_dist.kinds.peer import PEERKind
from peer_dist.kinds.product_key_memory import PKMKind
from peer_dist.kinds.sigma_moe import SigmaMoEKind

DENSE, PEER, MOE, PKM, SIGMA_MOE = DenseKind(), PEERKind(), MoEKind(), PKMKind(), SigmaMoEKind()
GROUP = "peer_dist.kinds"  # of the entry points


def _all_kinds() -> dict[str, Kind[Any]]:
    """Our own kinds, and those of installed packages after them.

    Raises:
        KindError: an entry point cannot be imported, is no kind, or has the name of another one.
    """
    kinds: dict[str, Kind[Any]] = {kind.name: kind for kind in (DENSE, PEER, MOE, PKM, SIGMA_MOE)}
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        where = f"the kind of layer {entry.name!r} ({entry.value}, of an installed package's {GROUP})"
        try:
            kind = entry.load()()
        except Exception as error:
            raise KindError(
                f"{where} cannot be imported ({type(error).__name__}: {error}); mend or uninstall it"
            ) from error
        if not isinstance(kind, Kind):
            raise KindError(f"{where} is no peer_dist.kinds.Kind; name a class derived from it")
        if kind.name in kinds:
            raise KindError(f"{where} has the name {kind.name!r}, which another kind has; give it a name of its own")
        kinds[kind.name] = kind
    return kinds


KINDS: Mapping[str, Kind[Any]] = MappingProxyType(_all_kinds())
"""Every kind, by the name that ``model.mlp`` has for it."""

__all__ = [
    "DENSE",
    "KINDS",
    "MOE",
    "PEER",
    "PKM",
    "SIGMA_MOE",
    "Experts",
    "Kind",
    "KindError",
    "Mode",
    "NotCausal",
    "Tables",
]
