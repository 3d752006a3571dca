"""Checkpoints are read without running what they hold.

Two of their files are pickles, and unpickling calls whatever a pickle names. Checksums are no defence: who can
rewrite a file can rewrite the manifest. So nothing here unpickles freely:

- tensors (``*.distcp``) and plain values (``common.pt``) go through torch's ``weights_only`` loader, said explicitly:
  the default can be turned off by an environment variable;
- ``.metadata``, which torch reads with plain pickle, goes through :class:`_MetadataUnpickler`, which knows the few
  classes that such a file is made of, and lets the pickle change no class;
- entries that would make torch unpickle more (``BytesStorageMetadata``) or read elsewhere than in the checkpoint's
  folder are refused.
"""

from __future__ import annotations

import enum
import math
import pickle
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, ClassVar

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    TorchDistLoadShardedStrategy,
    _replace_sharded_keys_with_state_dict_keys,
    _replace_state_dict_keys_with_sharded_keys,
    _restore_dict_types,
    _unwrap_pyt_sharded_tensor,
    mcore_to_pyt_state_dict,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint import metadata as forms
from torch.distributed.checkpoint.filesystem import _StorageInfo, _StoragePrefix

from peer_dist.mistake import in_words


class UntrustedError(pickle.UnpicklingError):
    """A checkpoint's file asks for more than data."""


def _member(kind: Any, name: str) -> Any:
    """Stands for the ``getattr`` by which Python before 3.11.4 pickles a member of an enumeration."""
    if kind is not forms._MEM_FORMAT_ENCODING:
        raise UntrustedError(f"it asks for {name} of {kind!r}, which is no part of a checkpoint")
    return kind[name]


_CLASSES: dict[tuple[str, str], Any] = {
    (kind.__module__, kind.__qualname__): kind
    for kind in (
        forms.Metadata,
        forms.MetadataIndex,
        forms.TensorStorageMetadata,
        forms.BytesStorageMetadata,
        forms.ChunkStorageMetadata,
        forms.TensorProperties,
        forms.StorageMeta,
        forms._MEM_FORMAT_ENCODING,
        _StorageInfo,
        _StoragePrefix,
        set,
        frozenset,
    )
}
_CLASSES |= {("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_CLASSES |= {
    ("builtins", "getattr"): _member,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("pathlib", "PosixPath"): PurePosixPath,  # where it was written
    ("pathlib._local", "PosixPath"): PurePosixPath,  # the same, by Python 3.13
}
_DATA_FILE = re.compile(r"__\d+_\d+\.distcp")


class _Ignored:
    """Stands for whatever else Megatron keeps in ``.metadata`` (its plans of the save): takes all, and does nothing."""

    def __init__(self, *args: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, value: Any) -> None:
        """Ignore the value."""


class _MetadataUnpickler(pickle._Unpickler):
    """Builds a ``.metadata`` file's objects from an allow-list of classes.

    Args:
        others: what is of no other class is :class:`_Ignored` instead of refused.

    Python's own unpickler and not the one in C, whose BUILD would let a pickle set attributes of the classes.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]

    def __init__(self, stream: BinaryIO, others: bool) -> None:
        super().__init__(stream)
        self._others = others

    def find_class(self, module: str, name: str) -> Any:
        """The class of that name in the allow-list; for any other, with ``others``, :class:`_Ignored`.

        Raises:
            UntrustedError: it is not in the list, and ``others`` is False.
        """
        try:
            return _CLASSES[module, name]
        except KeyError:
            if self._others:
                return _Ignored
            raise UntrustedError(
                f"it asks for {in_words(f'{module}.{name}')}, which is no part of a checkpoint"
            ) from None

    def load_build(self) -> None:
        """Set the state of an object that this pickle has made; refuse to change anything else."""
        owner = self.stack[-2]
        if type(owner) not in {*_CLASSES.values(), _Ignored} or isinstance(owner, enum.Enum):
            raise UntrustedError(f"it changes {owner!r}, which is not an object of its own")
        pickle._Unpickler.load_build(self)  # type: ignore[attr-defined]

    dispatch[pickle.BUILD[0]] = load_build


def read_metadata(stream: BinaryIO, others: bool = False) -> forms.Metadata:
    """What ``.metadata`` says of a checkpoint's tensors, and nothing run.

    Args:
        others: entries that are no tensors may be there, for a reader who leaves them alone, and objects that are no
            part of our checkpoints, of which nothing is built.

    Raises:
        UntrustedError: it holds something else.
    """
    metadata = _MetadataUnpickler(stream, others).load()
    if not isinstance(metadata, forms.Metadata) or not isinstance(metadata.state_dict_metadata, dict):
        raise UntrustedError("it does not describe a checkpoint")
    for key, value in metadata.state_dict_metadata.items():
        if (
            not isinstance(value, forms.TensorStorageMetadata) and not others
        ):  # BytesStorageMetadata: torch would unpickle its bytes
            raise UntrustedError(f"its {key} is no tensor")
    for info in (metadata.storage_data or {}).values():
        if not isinstance(info, _StorageInfo) or not _DATA_FILE.fullmatch(str(info.relative_path)):
            raise UntrustedError("it names a file that is no part of a checkpoint")
        if getattr(info, "transform_descriptors", None):
            raise UntrustedError("its tensors are packed, which this package never does")
    return metadata


class MetadataReader(dcp.FileSystemReader):
    """torch's reader of tensors, whose ``.metadata`` goes through :func:`read_metadata`; it is read once."""

    _metadata: forms.Metadata | None = None

    def __init__(self, folder: str | Path, others: bool = False) -> None:
        super().__init__(folder)
        self._others = others

    def read_metadata(self, *args: Any, **kwargs: Any) -> forms.Metadata:
        """The checkpoint's metadata, read once and of plain values only."""
        if self._metadata is None:
            with (Path(self.path) / ".metadata").open("rb") as stream:
                self._metadata = read_metadata(stream, self._others)
            if self._metadata.storage_meta is None:
                self._metadata.storage_meta = forms.StorageMeta()
            self._metadata.storage_meta.load_id = self.load_id
        return self._metadata


@dataclass(frozen=True)
class _Block:
    """Part of a tensor, in row-major order from byte ``start`` of a file on."""

    file: Path
    start: int
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype

    def rows(self, begin: int, end: int) -> torch.Tensor:
        """Its own rows from ``begin`` to before ``end``."""
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        content = bytearray((end - begin) * row)
        with self.file.open("rb") as file:
            file.seek(self.start + begin * row)
            if file.readinto(content) != len(content):
                raise UntrustedError(f"{self.file} is cut off")
        return torch.frombuffer(content, dtype=self.dtype).view(end - begin, *self.shape[1:])


class StoredTensors:
    """The tensors of a checkpoint, read in parts, in one process, with no process group.

    Args:
        others: see :func:`read_metadata`.

    Attributes:
        shapes: of every tensor, by key.
    """

    def __init__(self, folder: str | Path, others: bool = False) -> None:
        self._reader = MetadataReader(folder, others)
        metadata = self._reader.read_metadata()
        self.shapes = {
            key: tuple(value.size)
            for key, value in metadata.state_dict_metadata.items()
            if isinstance(value, forms.TensorStorageMetadata)
        }
        self._stored: dict[str, list[tuple[tuple[int, ...], _StorageInfo]]] = {}
        for index, info in metadata.storage_data.items():
            if index.fqn in self.shapes:
                self._stored.setdefault(index.fqn, []).append((tuple(index.offset), info))

    def rows(self, key: str, elements: int) -> Iterator[torch.Tensor]:
        """The tensor ``key`` from its first row to its last, as many rows at a time as ``elements`` numbers hold.

        Raises:
            UntrustedError: what is stored is not what the checkpoint says of it.
        """
        shape, parts = self.shapes[key], self._blocks(key)
        step = max(1, elements // math.prod(shape[1:]))
        for begin in range(0, shape[0], step):
            end = min(begin + step, shape[0])
            yield _gathered(parts, (slice(begin, end), *(slice(0, size) for size in shape[1:])))

    def part(self, key: str, where: Sequence[slice]) -> torch.Tensor:
        """A block of the tensor ``key``.

        Raises:
            UntrustedError: as :meth:`rows`.
        """
        return _gathered(self._blocks(key), where)

    def _blocks(self, key: str) -> list[_Block]:
        return [self._block(offset, info) for offset, info in self._stored[key]]

    def _block(self, offset: tuple[int, ...], info: _StorageInfo) -> _Block:
        path = Path(self._reader.path) / info.relative_path
        with path.open("rb") as file, FakeTensorMode():  # its form alone, and where its bytes begin
            form = torch.load(self._reader._slice_file(file, info), map_location="cpu", weights_only=True)
        storage = form.untyped_storage()
        if not form.is_contiguous() or storage.nbytes() != form.numel() * form.itemsize:
            raise UntrustedError(f"{path}: a tensor does not lie there in row-major order, as this package writes them")
        return _Block(path, info.offset + storage._checkpoint_offset, offset, tuple(form.shape), form.dtype)


def _gathered(blocks: Sequence[_Block], where: Sequence[slice]) -> torch.Tensor:
    """What the blocks of a tensor have of a part of it, which they cover; only rows that are needed are read."""
    part, filled = torch.empty([want.stop - want.start for want in where], dtype=blocks[0].dtype, device="cpu"), 0
    for block in blocks:
        common = [
            slice(max(wanted.start, begin), min(wanted.stop, begin + size))
            for wanted, begin, size in zip(where, block.offset, block.shape)
        ]
        if all(c.start < c.stop for c in common):
            rows, *others = (slice(c.start - begin, c.stop - begin) for c, begin in zip(common, block.offset))
            place = tuple(slice(c.start - wanted.start, c.stop - wanted.start) for c, wanted in zip(common, where))
            whole = (slice(None), *others)
            part[place] = block.rows(rows.start, rows.stop)[whole]
            filled += part[place].numel()
    if filled != part.numel():
        raise UntrustedError("the blocks of a tensor do not cover it")
    return part


class LoadTensors(TorchDistLoadShardedStrategy):
    """Megatron's loading of sharded tensors with :class:`MetadataReader` instead of a reader that unpickles freely.

    One serves one checkpoint, whose ``.metadata`` it reads once.
    """

    _reader: MetadataReader | None = None

    def load(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> dict[str, Any]:
        """Load the tensors of ``sharded_state_dict`` from a checkpoint; return the dict with them in their places."""
        shards = [value for value in _values(sharded_state_dict) if isinstance(value, ShardedTensor)]
        by_key, flat_mapping, rename_mapping = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict)
        state = mcore_to_pyt_state_dict(by_key, True)
        self._reader = self._reader or MetadataReader(checkpoint_dir)
        dcp.state_dict_loader.load_state_dict(
            state,
            self._reader,
            planner=MCoreLoadPlanner(
                shapes_validation_sharded_tensors=[s for s in shards if not s.allow_shape_mismatch],
                allow_shape_mismatch_sharded_tensors={s.key: s for s in shards if s.allow_shape_mismatch},
            ),
        )
        loaded = _replace_sharded_keys_with_state_dict_keys(
            {key: _unwrap_pyt_sharded_tensor(value) for key, value in state.items()}, flat_mapping, rename_mapping
        )
        _restore_dict_types(loaded, sharded_state_dict)
        return loaded


def _values(state: Any) -> list[Any]:
    if isinstance(state, dict | list):
        return [leaf for value in (state.values() if isinstance(state, dict) else state) for leaf in _values(value)]
    return [state]


class LoadPlainValues(TorchCommonLoadStrategy):
    """Megatron's reading of ``common.pt``, of plain values only."""

    def load_common(self, checkpoint_dir: str | Path) -> dict[str, Any]:
        """The values of ``common.pt`` (:func:`read_plain_values`)."""
        return read_plain_values(Path(checkpoint_dir))


def read_plain_values(folder: Path) -> dict[str, Any]:
    """``common.pt`` of a checkpoint.

    Raises:
        pickle.UnpicklingError: it holds more than values.
    """
    return torch.load(folder / "common.pt", map_location="cpu", weights_only=True)
