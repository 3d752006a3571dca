"""The sizes of a run's layout, and which of its ranks share a node."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from peer_dist.config import Config, ConfigError


@dataclass(frozen=True)
class Place:
    """What the memory of a rank depends on."""

    stage: int = 0
    row: int = 0
    """Its row shard of the tables."""
    column: int = 0
    """Its column shard."""


@dataclass(frozen=True)
class Group:
    """Ranks that talk to each other: ``size`` of them, ``together`` of which share a node."""

    size: int
    together: int

    @property
    def nodes(self) -> float:
        """The number of nodes that the group is spread over, on average."""
        return self.size / self.together

    @property
    def near(self) -> float:
        """The share of a rank's peers that are on its node."""
        return (self.together - 1) / (self.size - 1) if self.size > 1 else 1.0


@dataclass(frozen=True)
class Layout:
    """A config in a world that :func:`peer_dist.config.check_world` accepts.

    Ranks are numbered tensor first, then data, then stages, and within a stage columns first, then rows, then copies
    (Megatron's order). A node has ``gpus_per_node`` consecutive ones; groups are taken to begin with a node's first.
    """

    config: Config
    world_size: int
    gpus_per_node: int

    @property
    def tensor(self) -> int:
        """Tensor-parallel ranks."""
        return self.config.parallel.tensor

    @property
    def pipeline(self) -> int:
        """Pipeline stages."""
        return self.config.parallel.pipeline

    @property
    def virtual(self) -> int:
        """Model chunks of a stage."""
        return self.config.parallel.virtual_pipeline

    @property
    def columns(self) -> int:
        """Column shards of each table."""
        return self.config.parallel.expert_tensor

    @cached_property
    def rows(self) -> int:
        """Row shards of each table."""
        return self.config.parallel.expert_rows(self.world_size)

    @property
    def stage_ranks(self) -> int:
        """Ranks of a pipeline stage."""
        return self.world_size // self.pipeline

    @property
    def data(self) -> int:
        """Data-parallel ranks of a stage."""
        return self.stage_ranks // self.tensor

    @property
    def copies(self) -> int:
        """Expert domains of a stage."""
        return self.stage_ranks // (self.rows * self.columns)

    @property
    def passes(self) -> int:
        """Forward passes of a rank in a step."""
        return self.config.train.global_batch_size // (self.config.train.micro_batch_size * self.data)

    @property
    def tokens(self) -> int:
        """Tokens of one pass, which the tensor ranks share."""
        return self.config.train.micro_batch_size * self.config.model.seq_length

    @property
    def own_tokens(self) -> int:
        """Tokens of one pass that this rank takes to the experts."""
        return self.tokens // self.tensor

    @property
    def split_tokens(self) -> int:
        """Tokens of one pass whose activations, between the tensor-parallel blocks, are on one rank."""
        return self.own_tokens if self.config.parallel.sequence else self.tokens

    def place(self, rank: int) -> Place:
        """Where a rank is: its stage, and its shards of the tables."""
        stage, inside = divmod(rank, self.stage_ranks)
        row, column = divmod(inside % (self.rows * self.columns), self.columns)
        return Place(stage, row, column)

    def layers(self, stage: int) -> list[list[int]]:
        """The layers, from 0, of each of a stage's chunks."""
        size = self.config.model.num_layers // (self.pipeline * self.virtual)
        firsts = [(chunk * self.pipeline + stage) * size for chunk in range(self.virtual)]
        return [list(range(first, first + size)) for first in firsts]

    def kinds(self, stage: int) -> Counter[tuple[str, int]]:
        """How many layers a stage has of each kind, and with so many forward passes: 2 where they are recomputed."""
        kinds, recomputed = self.config.model.mlp_kinds, self.config.train.recompute_layers
        layers = (numbered for chunk in self.layers(stage) for numbered in enumerate(chunk))
        return Counter((kinds[layer], 2 if number < recomputed else 1) for number, layer in layers)

    def in_flight(self, stage: int) -> int:
        """Passes of a chunk whose activations a stage holds at most, all chunks together (1F1B, interleaved)."""
        passes = self.passes * self.virtual
        if self.virtual > 1:
            return min(passes, 2 * (self.pipeline - stage - 1) + (self.virtual - 1) * self.pipeline + 1)
        return min(passes, self.pipeline - stage)

    def group(self, size: int, stride: int) -> Group:
        """A group of ``size`` ranks whose numbers are ``stride`` apart."""
        return Group(size, min(size, max(1, self.gpus_per_node // stride)))

    @property
    def tensor_group(self) -> Group:
        """The ranks that share each layer's matrices."""
        return self.group(self.tensor, 1)

    @property
    def data_group(self) -> Group:
        """The ranks that read different sequences for the same part of the dense model."""
        return self.group(self.data, self.tensor)

    @property
    def column_group(self) -> Group:
        """The ranks that have the columns of one row shard."""
        return self.group(self.columns, 1)

    @property
    def row_group(self) -> Group:
        """The ranks that have the row shards of one column shard."""
        return self.group(self.rows, self.columns)

    @property
    def domain_group(self) -> Group:
        """The ranks that hold one copy of the tables together."""
        return self.group(self.rows * self.columns, 1)

    @property
    def copy_group(self) -> Group:
        """The ranks that hold copies of one shard."""
        return self.group(self.copies, self.rows * self.columns)

    @property
    def next_stage(self) -> Group:
        """A rank and its partner of the next stage."""
        return self.group(2, self.stage_ranks)


def check_vocabulary(config: Config, vocab_size: int) -> None:
    """Refuse rows of the embedding that tensor ranks cannot share.

    Raises:
        ConfigError: they do not divide.
    """
    if vocab_size % config.parallel.tensor:
        raise ConfigError(
            f"--vocab-size {vocab_size}: parallel.tensor = {config.parallel.tensor} does not divide it; give the rows "
            "of the embedding, padding included (a multiple of 128, as a run has them)"
        )
