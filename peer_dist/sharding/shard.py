"""What a rank owns of a layer: matrices that are never gathered, nor averaged as data parallelism does."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from peer_dist.sharding.grid import GridLayout


@dataclass(frozen=True)
class Shard:
    """This rank's block of a matrix; the ranks of its expert data group have copies of it.

    Attributes:
        parameter: ``[rows, columns]``, the block.
        shape: of the whole matrix.
        offset: where in the whole the block begins.
        column_shard: number of the block among those of the same rows.
        table: whether it is a table, stepped by the tables' optimizer, or an expert's weight, by the dense one's rule.
    """

    parameter: nn.Parameter
    shape: tuple[int, int]
    offset: tuple[int, int] = (0, 0)
    column_shard: int = 0
    table: bool = True

    @classmethod
    def of_table(cls, parameter: nn.Parameter, layout: GridLayout) -> Shard:
        """The shard ``parameter [rows, columns]`` of a table that is spread over ``layout``."""
        return cls(parameter, layout.shape, layout.offset, layout.column_shard)


def release(module: nn.Module, names: tuple[str, ...]) -> None:
    """Take parameters out of the module's list; they stay attributes of the same names.

    For engines that shard, average or broadcast all parameters of a module (ZeRO, DDP): shards have an optimizer of
    their own. Move the module to its device first.

    Args:
        module: has these parameters itself, not in a sub-module.
        names: the parameters' names; those that left the list already stay where they are.

    Raises:
        KeyError: the module has no parameter of such a name.
    """
    for name in names:
        if not isinstance(module.__dict__.get(name), nn.Parameter):
            object.__setattr__(module, name, module._parameters.pop(name))
