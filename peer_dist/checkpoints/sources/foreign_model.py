"""What a model of another format must answer, so that a run can start from its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Protocol

from torch import Tensor

from peer_dist.config.schema import ModelConfig
from peer_dist.data.tokenizer import TextTokenizer


class ForeignModel(Protocol):
    """A model on the disk, of a dense decoder like ours, whose tensors are read by the keys of our checkpoints.

    Attributes:
        names: the keys of ``model`` that the format calls otherwise, and what it calls them, for messages.
        model: the model section of a config of the same architecture.
    """

    names: ClassVar[Mapping[str, str]]
    model: ModelConfig

    @staticmethod
    def recognizes(path: Path) -> bool:
        """Whether the folder looks like one of this format; only then is it opened."""

    def check_vocabulary(self, tokenizer: TextTokenizer) -> None:
        """Refuse the tokenizer of a run's data if it does not fit the model's embedding.

        Raises:
            ConfigError: it does not.
        """

    def block(self, key: str, where: tuple[slice, ...]) -> Tensor:
        """Read a block of a tensor, without the rows that lie beyond the model's vocabulary.

        Args:
            key: of a dense tensor in our checkpoints.
            where: the block's place in the whole tensor, a slice with start and stop for each dimension. A block of
                ``mlp.linear_fc1`` lies within one of the two matrices of SwiGLU.

        Raises:
            CheckpointError: a file is damaged.
        """
