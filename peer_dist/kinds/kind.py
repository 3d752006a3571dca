"""What a kind of feed-forward layer says of itself.

Planning, matching, export, checkpoints and training ask a :class:`Kind`, and know no kind by name. All of it is
arithmetic on a config's numbers, but for two methods, which import what they return when they are called: the module
that trains (:meth:`Kind.build`), and the one that an exported model has in its place (:meth:`Kind.exported`).
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Generic, Literal, NamedTuple, TypeVar

from peer_dist.kinds.cost import FLOAT, Parts, Shape
from peer_dist.kinds.section import LARGEST as LARGEST  # for kinds of other packages
from peer_dist.kinds.section import Section
from peer_dist.mistake import Mistake

if TYPE_CHECKING:
    from megatron.core.transformer import ModuleSpec

    from peer_dist.config import Config
    from peer_dist.export.peer_model import ExportedLayer
    from peer_dist.megatron.build_context import BuildContext

S = TypeVar("S")

Mode = Literal["flops", "params"]
"""What two models may have in common: FLOPs of a token, or parameters."""


class KindError(Mistake, ImportError):
    """A kind of layer of another package that cannot be used; the message says which, and what to do."""


@dataclass(frozen=True)
class Tables:
    """A layer's tables, of which each token picks rows. They are sharded by rows and by columns over expert ranks.

    Attributes:
        names: of the layer's parameters; a token's pick is one row of each.
        rows: of a table; it is as wide as the model.
        heads, top_k: a token picks ``top_k`` different rows with each head.
        dtype: of the tables.
        tokens_travel: whether a token goes to the owners of the rows it picks (experts), or only its picks do, and
            weighted sums of rows come home (values).
        chunks: parts in which tokens travel, so that exchange and work overlap.
        memory: in which their rows and the states of their optimizer lie.
        cache_bytes: of a rank's memory near the kernels for rows that lie elsewhere, over all its tables.
        resident_bytes: that a rank keeps in memory of rows on disk, beside the cache.
        folder: of scratch files with rows on disk; empty for the system's.
        fetch: how rows in host memory come to a GPU.
    """

    names: tuple[str, ...]
    rows: int
    heads: int
    top_k: int
    dtype: Literal["float32", "bfloat16", "float8_e4m3", "int8"]
    tokens_travel: bool
    chunks: int = 1
    memory: Literal["device", "host", "disk"] = "device"
    cache_bytes: int = 0
    resident_bytes: int = 0
    folder: str = ""
    fetch: Literal["direct", "copied"] = "direct"

    @property
    def picks(self) -> int:
        """Rows that a token picks, of each table."""
        return self.heads * self.top_k

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return {"float32": FLOAT, "bfloat16": 2, "float8_e4m3": 1, "int8": 1}[self.dtype]

    @property
    def eight_bit(self) -> bool:
        """Whether an element has eight bits, and a row a scale."""
        return self.itemsize == 1

    @property
    def far(self) -> bool:
        """Whether rows lie in other memory than the kernels'."""
        return self.memory != "device"

    @property
    def held(self) -> bool:
        """Whether they are more than tensors of numbers on the device: far, or with scales."""
        return self.eight_bit or self.far

    @property
    def scale_size(self) -> int:
        """Bytes of a row's scale; 0 where rows have none."""
        return FLOAT if self.eight_bit else 0

    @property
    def gradient_itemsize(self) -> int:
        """Bytes of an element of their gradients, which are bfloat16 where the tables have eight bits."""
        return max(2, self.itemsize)


@dataclass(frozen=True)
class Experts:
    """A layer's coarse experts, each of two matrices and whole on the ranks of one row shard.

    Attributes:
        number: of experts.
        top_k: experts of a token, to each of which a copy of it goes.
        outputs: of an expert's first matrix.
        hidden: inputs of its second one.
    """

    number: int
    top_k: int
    outputs: int
    hidden: int


class NotCausal(NamedTuple):
    """Why later tokens change what a model says of earlier ones.

    Attributes:
        cause: a clause, such as "its experts choose tokens".
        setting: the key and the value that make it so.
        instead: the setting of a causal model.
    """

    cause: str
    setting: str
    instead: str

    def __str__(self) -> str:
        return f"{self.cause} ({self.setting}), later ones included"


class Kind(ABC, Generic[S]):
    """A kind of feed-forward layer; see the module.

    Attributes:
        name: in ``model.mlp``, and of its section in the config.
        section: its keys; None where it is described by those of ``model``.
        sizes: the keys that make it large or small, which comparisons show.
        sparse: whether a token meets a part of the layer only. The tensor ranks of a sparse layer share out tokens;
            those of another one share out its matrices.
        routed: whether the section ``router`` applies to it.
        begins_at_zero: whether it, a sparse layer with a ``zero_output()``, may stand where a run's
            ``checkpoint.init_from`` has a dense one.
        resumable: those of its keys that may change when a run is resumed, because they do not change what is computed.
        module: name of the layer within the module that is built, which is part of checkpoints' keys.
        table_names: names of its tables among its parameters.
    """

    name: ClassVar[str]
    section: ClassVar[type[Section] | None] = None
    sizes: ClassVar[tuple[str, ...]] = ()
    sparse: ClassVar[bool] = False
    routed: ClassVar[bool] = False
    begins_at_zero: ClassVar[bool] = False
    resumable: ClassVar[frozenset[str]] = frozenset()
    module: ClassVar[str] = ""
    table_names: ClassVar[tuple[str, ...]] = ()

    def keys(self, config: Config) -> S:
        """The section of the config that describes the layer."""
        return getattr(config, self.section_name)

    @property
    def section_name(self) -> str:
        """The name of that section."""
        return "model" if self.section is None else self.name

    def key(self, name: str) -> str:
        """A key of that section as it is written on a command line."""
        return f"{self.section_name}.{name}"

    # What it has and does

    @abstractmethod
    def cost(self, config: Config) -> Parts:
        """Parameters and forward FLOPs of one layer, by part.

        Parts have the names that other kinds give them, where they have the same: ``feed_forward`` (dense matrices),
        ``query``, ``query_norm``, ``keys`` (sub-keys and their scores), ``output_gate``, ``projector``, ``state`` (what
        routers share), ``router``. What is sharded over expert ranks is ``experts`` or ``values``.
        """

    @abstractmethod
    def shapes(self, config: Config, tensor: int) -> Iterable[Shape]:
        """Shapes of a layer's parameters on one of ``tensor`` ranks, without tables and experts."""

    @abstractmethod
    def kept(self, config: Config, itemsize: int) -> tuple[float, float]:
        """Bytes that a token costs: kept from the forward to the backward pass, and worked in beside them there.

        What picking rows of tables and sending tokens to their owners keeps is counted for all kinds alike
        (:mod:`peer_dist.planning.peak_memory`), and left out here.

        Args:
            itemsize: bytes of an activation.
        """

    def tables(self, config: Config) -> Tables | None:
        """The layer's tables, if it has some."""
        return None

    def experts(self, config: Config) -> Experts | None:
        """The layer's coarse experts, if it has some."""
        return None

    def layers_per_pool(self, config: Config) -> int:
        """Layers of the kind that share one set of tables."""
        return 1

    def batch_statistics(self, config: Config) -> int:
        """Features whose means and variances are taken over the tokens of all ranks of a stage, in every pass."""
        return 0

    # What it asks for

    def check(self, config: Config) -> None:
        """Refuse what this kind of layer cannot do, beside the checks of its section.

        Raises:
            ValueError: naming the key, and what to set.
        """

    def not_causal(self, config: Config) -> NotCausal | None:
        """Why the layer is not causal; None if it is."""
        return None

    # How it is compared

    def size(self, config: Config) -> dict[str, int]:
        """The values of :attr:`sizes`."""
        section = self.keys(config)
        return {name: getattr(section, name) for name in self.sizes}

    @abstractmethod
    def free_sizes(self, config: Config, mode: Mode) -> list[tuple[str, Sequence[int]]]:
        """Keys (``section.name``) to change in turn so that costs are equal, and the values each can have, ascending.

        The cost of a model must grow with each of them.
        """

    def taken_over(self, config: Config, reference: Kind) -> Mapping[str, int]:
        """Keys that a partner of a model with layers of the kind ``reference`` has from that one, and their values."""
        return {}

    # How it is built

    @abstractmethod
    def build(self, context: BuildContext, number: int) -> ModuleSpec:
        """Megatron's spec of the feed-forward part of layer ``number``, from 1."""

    @abstractmethod
    def exported(self) -> type[ExportedLayer]:
        """The layer in an exported model, in plain PyTorch.

        The file that it is defined in becomes part of the exported model's code, which needs torch alone.
        """

    def stored_key(self, name: str, number: int) -> str:
        """The key in checkpoints of a parameter ``name`` of the exported layer ``number``, from 1."""
        if name in self.table_names:
            return f"tables.layer{number}.{name}"
        if expert := re.fullmatch(r"experts\.(\d+)\.(fc\d)\.weight", name):
            return f"tables.layer{number}.expert{expert[1]}.{expert[2]}"
        return f"decoder.layers.{number - 1}.mlp.{self.module}.{name}"
