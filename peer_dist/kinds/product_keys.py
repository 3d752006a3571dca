"""What layers have in common that pick rows of tables by product keys (Lample 2019; He 2024, section 2.1)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Protocol, TypeVar

from pydantic import Field

from peer_dist.kinds.cost import FLOAT, Cost, Shape, matrix, vectors
from peer_dist.kinds.kind import Kind, Mode, Tables
from peer_dist.kinds.section import MOST_PICKS, FolderOrNone

if TYPE_CHECKING:
    from peer_dist.config import Config

_LARGEST_ROOT = 1 << 14  # where the search for the root of a number of rows ends
_NORM_VECTORS = {"none": 0, "rms": 1, "layer": 2, "batch": 2}  # a weight and, but for RMS, a bias
_INDEX = 8  # bytes of a row's number

TableDtype = Literal["float32", "bfloat16", "float8_e4m3", "int8"]
Gigabytes = Annotated[float, Field(ge=0, le=1e6)]
TableMemory = Annotated[
    Literal["device", "host", "disk"],
    Field(
        description="where the tables' rows and the states of their optimizer lie; host: in host memory, disk: in "
        "scratch files, a cache of hot rows near the kernels either way; may change on resume"
    ),
]
TableCache = Annotated[
    Gigabytes,
    Field(
        description="GB on each rank near the kernels for rows that are picked often, over all its tables of this "
        "kind; for host and disk; may change on resume"
    ),
]
TableFolder = Annotated[
    FolderOrNone,
    Field(
        description="folder of the scratch files of disk, on a disk of each machine's own; empty: the system's "
        "temporary folder; may change on resume"
    ),
]
TableResident = Annotated[
    Gigabytes,
    Field(
        description="GB of the scratch files that a rank keeps in memory at most, beside the cache; for disk; may "
        "change on resume"
    ),
]
TableFetch = Annotated[
    Literal["direct", "copied"],
    Field(
        description="how rows in host memory come to a GPU; direct: read over the bus by a kernel, copied: put "
        "together by the CPU and sent in one piece; may change on resume"
    ),
]
PLACEMENT = frozenset({"table_memory", "table_cache_gb", "table_folder", "table_resident_gb", "table_fetch"})
"""The keys that say where tables lie, which changes nothing of what is computed."""


class ProductKeySection(Protocol):
    """The keys that sections of such layers share."""

    @property
    def heads(self) -> int:
        """Number of retrieval heads."""
        ...

    @property
    def top_k(self) -> int:
        """Rows that a head picks."""
        ...

    @property
    def key_dim(self) -> int:
        """Width of a query and of a whole key."""
        ...

    @property
    def query_norm(self) -> str:
        """Norm of the queries: batch, layer, rms or none."""
        ...

    @property
    def shared_keys(self) -> bool:
        """Whether all heads have the same sub-keys."""
        ...

    @property
    def table_dtype(self) -> TableDtype:
        """Dtype of the tables' weights."""
        ...

    @property
    def table_memory(self) -> Literal["device", "host", "disk"]:
        """Where the tables' rows lie."""
        ...

    @property
    def table_cache_gb(self) -> float:
        """GB near the kernels for rows that lie elsewhere, of each rank."""
        ...

    @property
    def table_folder(self) -> str:
        """Of scratch files; empty for the system's."""
        ...

    @property
    def table_resident_gb(self) -> float:
        """GB of scratch files that each rank keeps in memory at most."""
        ...

    @property
    def table_fetch(self) -> Literal["direct", "copied"]:
        """How rows in host memory come to a GPU."""
        ...


S = TypeVar("S", bound=ProductKeySection)


class ProductKeyKind(Kind[S]):
    """A kind of layer that picks rows of tables by product keys.

    Attributes:
        rows_key: the key that says how many rows the tables have, a square.
    """

    rows_key: ClassVar[str]
    sparse = True
    resumable = PLACEMENT
    tokens_travel: ClassVar[bool]

    def rows(self, config: Config) -> int:
        """Rows of the layer's tables."""
        return getattr(self.keys(config), self.rows_key)

    def projected(self, config: Config) -> bool:
        """Whether queries are a map of the input; else they are the input itself."""
        return True

    def query_width(self, config: Config) -> int:
        """Width of one head's query."""
        return self.keys(config).key_dim if self.projected(config) else config.model.hidden_size

    def tables(self, config: Config) -> Tables:
        """One row of each table for every pick of every head."""
        section = self.keys(config)
        return Tables(
            self.table_names,
            self.rows(config),
            section.heads,
            section.top_k,
            section.table_dtype,
            self.tokens_travel,
            memory=section.table_memory,
            cache_bytes=round(section.table_cache_gb * 1e9),
            resident_bytes=round(section.table_resident_gb * 1e9),
            folder=section.table_folder,
            fetch=section.table_fetch,
        )

    def batch_statistics(self, config: Config) -> int:
        """The queries' features, with BatchNorm; without it none."""
        section = self.keys(config)
        return section.heads * section.key_dim if section.query_norm == "batch" else 0

    def retrieval_cost(self, config: Config) -> dict[str, Cost]:
        """Queries, their norm, and the scores of both sets of sub-keys."""
        section, width = self.keys(config), self.query_width(config)
        root, queries = math.isqrt(self.rows(config)), section.heads * width
        sub_keys = self.sets(config) * root * width
        return {
            "query": matrix(config.model.hidden_size, queries) if self.projected(config) else Cost(),
            "query_norm": vector_norm(section.query_norm, queries),
            "keys": Cost(sub_keys, sub_keys, 2 * section.heads * root * width),
        }

    def sets(self, config: Config) -> int:
        """Pairs of sets of sub-keys: one for all heads, or one for each."""
        section = self.keys(config)
        return 1 if section.shared_keys else section.heads

    def retrieval_shapes(self, config: Config) -> Iterator[Shape]:
        """Shapes of the parameters that choose rows."""
        section, width = self.keys(config), self.query_width(config)
        if self.projected(config):
            yield section.heads * width, config.model.hidden_size
        yield from norm_shapes(section.query_norm, section.heads * width)
        yield self.sets(config), 2, math.isqrt(self.rows(config)), width // 2

    def kept(self, config: Config, itemsize: int) -> tuple[float, float]:
        """Numbers and gates of the picks, and the queries."""
        section = self.keys(config)
        picks, query = section.heads * section.top_k, section.heads * self.query_width(config)
        kept = picks * (_INDEX + FLOAT) + (query * itemsize if self.projected(config) else 0)
        if section.query_norm == "batch":
            kept += 3 * query * FLOAT  # centred twice, and scaled
        return kept, query * (itemsize + FLOAT) + 2 * picks * (_INDEX + FLOAT)

    def free_sizes(self, config: Config, mode: Mode) -> list[tuple[str, Sequence[int]]]:
        """``top_k`` for equal FLOPs, the tables' rows for equal parameters."""
        if mode == "params":
            smallest = self.keys(config).top_k
            return [(self.key(self.rows_key), [root**2 for root in range(smallest, _LARGEST_ROOT)])]
        return [(self.key("top_k"), range(1, min(math.isqrt(self.rows(config)), MOST_PICKS) + 1))]

    def taken_over(self, config: Config, reference: Kind) -> Mapping[str, int]:
        """Heads, key width and rows of the other, so that retrieval costs the same."""
        if not isinstance(reference, ProductKeyKind):
            return {}
        other, rows = reference.keys(config), reference.rows(config)
        return {
            self.key("heads"): other.heads,
            self.key("key_dim"): other.key_dim,
            self.key("top_k"): min(self.keys(config).top_k, math.isqrt(rows)),
            self.key(self.rows_key): rows,
        }


def vector_norm(kind: str, width: int) -> Cost:
    """The cost of a norm of vectors that are ``width`` wide together."""
    return vectors(_NORM_VECTORS[kind] * width)


def norm_shapes(kind: str, width: int) -> Iterator[Shape]:
    """Shapes of such a norm's parameters."""
    yield from [(width,)] * _NORM_VECTORS[kind]


def square(value: int) -> int:
    """The value, if it is a square.

    Raises:
        ValueError: it is none; the nearest are named.
    """
    root = math.isqrt(value)
    if root * root != value:
        raise ValueError(
            f"must be the square of a whole number; {value} is not, {root**2} and {(root + 1) ** 2} are the nearest"
        )
    return value


def even(value: int) -> int:
    """The value, if it is even.

    Raises:
        ValueError: it is odd.
    """
    if value % 2:
        raise ValueError(f"must be even (two sub-keys of half the width); {value} is odd")
    return value


def check_picks(top_k: int, rows: int, rows_key: str) -> None:
    """Refuse more picks of a head than each of its two sets of sub-keys has: the square root of the rows.

    Raises:
        ValueError: naming both keys.
    """
    root = math.isqrt(rows)
    if top_k > root:
        raise ValueError(f"top_k ({top_k}) must be at most sqrt({rows_key}) ({root})")
