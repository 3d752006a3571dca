"""Sharded checkpoints that any layout can read: Megatron's dist_checkpointing in its ``torch_dist`` format.

A state is a (nested) dictionary. Tensors wrapped by the functions here are written by the ranks that own
them. Everything else (numbers, strings, lists, plain tensors) is small, the same on every rank, and goes to
one ``common.pt``.

Tensors pass through in blocks of rows: saving and loading hold :data:`BUFFER_BYTES` beside what they are given, however
large that is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import warnings
import zlib
from collections.abc import Generator, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any, TypeAlias, TypeVar, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystem, _StorageInfo
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from peer_dist.kernels.eight_bit import is_eight_bit
from peer_dist.mistake import Mistake
from peer_dist.ranks.rank_zero import from_every_rank, on_rank_zero
from peer_dist.sharding.held import read_values, values_dtype
from peer_dist.shortage import shortage

from .model import chunks_of, shards_of
from .reader import LoadPlainValues, LoadTensors, MetadataReader, UntrustedError, read_plain_values

BUFFER_BYTES = 1 << 26
"""Bytes of two blocks, the one that is written or read and the next; a single row may be larger."""

_FAR = "1.distcp"  # the end of the name of a rank's file of what is far

Key = TypeVar("Key")
State = dict[str, Any]
_Place = tuple[str, tuple[int, ...]]  # a key, and where in its tensor a block begins
Sharded: TypeAlias = ShardedTensor | ShardedTensorFactory
Wanted: TypeAlias = dict[str, tuple[tuple[int, ...], bool]]  # shapes by key, and whether another shape will do


class CheckpointError(Mistake, RuntimeError):
    """A checkpoint cannot be written or read; the message says why in one sentence."""


def dense_sharded_state(model: nn.ModuleList) -> dict[str, Sharded]:
    """Every parameter and buffer except the shards, by its name in ``model.named_parameters()``.

    The keys in the checkpoint number the layers of the whole model, whatever the pipeline.
    """
    metadata = {
        "non_homogeneous_layers": True,  # a key per layer: feed-forward kinds may differ
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    owned = {id(shard.parameter) for shard in shards_of(model).values()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    state: dict[str, Sharded] = {}
    for chunk, part in enumerate(chunks_of(model)):
        for name, value in part.sharded_state_dict(metadata=metadata).items():
            name = f"{chunk}.{name}"
            if not isinstance(value, Sharded) or id(parameters.get(name)) in owned:  # or empty extra state
                continue
            if name.startswith(f"{chunk}.router_core.") and getattr(parameters[name], "shared", False):
                value = dataclasses.replace(value, replica_id=(1, *value.replica_id[1:]))  # another chunk writes it
            state[name] = value
    return state


def dense_blocks(model: nn.ModuleList) -> Iterator[tuple[str, tuple[slice, ...], torch.Tensor]]:
    """What this rank has of :func:`dense_sharded_state`: keys, where in the whole tensor a block lies, and its memory.

    The two matrices of SwiGLU are one tensor, the gate's first; a rank has a block of each.
    """
    for shard in _sharded(dense_sharded_state(model)):
        yield shard.key, shard.global_slice(), shard.data


@dataclasses.dataclass
class TableShard(ShardedTensor):
    """A block of a table.

    Attributes:
        codes: the table, where it has eight bits an element; ``data`` then has no memory, and the dtype of what is
            stored.
        far: whether it lies where there may be no room for a copy.
    """

    codes: torch.Tensor | None = None
    far: bool = False


def table_shard(
    key: str,
    tensor: torch.Tensor,
    offset: tuple[int, ...],
    shape: tuple[int, ...],
    replica_id: int,
    far: bool = False,
) -> TableShard:
    """This rank's block of the table ``key``.

    Args:
        key: the table's (or its optimizer moment's) name in the checkpoint.
        tensor: blocks may differ in size and must cover the table without overlap. Of eight bits, its values are stored
            in bfloat16.
        offset: where in the table the block begins.
        shape: of the whole table.
        replica_id: 0 on the rank that writes this shard, another number on its copies (the expert data rank).
        far: a copy of it may find no room, so that it is written at once even if :func:`save` is to leave tensors in
            memory.
    """
    codes = tensor if is_eight_bit(tensor) else None
    data = tensor.detach()
    if codes is not None:
        data = torch.empty(codes.shape, dtype=values_dtype(codes), device="meta")
    return TableShard(
        key,
        data,
        data.dtype,
        local_shape=tuple(tensor.shape),
        global_shape=shape,
        global_offset=offset,
        axis_fragmentations=None,  # no regular grid: rows and columns need not divide evenly
        replica_id=replica_id,
        codes=codes,
        far=far,
    )


def like(param: Sharded, tensor: torch.Tensor, key: str) -> Sharded:
    """``tensor``, of the parameter's local shape and any dtype, sharded like the parameter, under ``key``."""
    if isinstance(param, ShardedTensorFactory):
        return dataclasses.replace(param, key=key, data=tensor)
    return dataclasses.replace(param, key=key, data=tensor, dtype=tensor.dtype)


def unfilled(param: Sharded, key: str, dtype: torch.dtype) -> Sharded:
    """Like :func:`like`, with a tensor that has no memory."""
    return like(param, torch.empty_like(param.data, dtype=dtype, device="meta"), key)


def held_once(param: Sharded, tensor: torch.Tensor, key: str) -> Sharded:
    """Like :func:`like`, for a tensor that one data parallel rank alone has in its state, and writes."""
    return dataclasses.replace(like(param, tensor, key), replica_id=(*_copies(param), 0))


def is_copy(param: Sharded) -> bool:
    """Whether a rank of another tensor or pipeline shard writes this parameter, whatever the data parallel rank."""
    return any(_copies(param))


def _copies(param: Sharded) -> tuple[int, ...]:
    """Megatron's replica number without its last part, the data parallel rank."""
    assert isinstance(param.replica_id, tuple)
    return param.replica_id[:-1]


def blocks_of(shard: ShardedTensor) -> Iterator[tuple[slice, ShardedTensor]]:
    """The shard cut into blocks of rows, of half a buffer each, and which of its rows are in each."""
    data, (first, *columns) = shard.data, (shard.global_offset or (0,))
    if data.nbytes <= BUFFER_BYTES // 2 or shard.prepend_axis_num:
        yield slice(None), shard
        return
    rows = max(1, BUFFER_BYTES // 2 * len(data) // data.nbytes)
    for number, block in enumerate(data.split(rows)):
        begin = number * rows
        yield (
            slice(begin, begin + len(block)),
            dataclasses.replace(
                shard,
                data=block,
                local_shape=tuple(block.shape),
                global_offset=(first + begin, *columns),
                axis_fragmentations=None,  # no regular grid
            ),
        )


class _Kept(io.BytesIO):
    """The writer closes its file, which would free it."""

    def close(self) -> None:
        pass


class _Summed(io.BufferedWriter):
    """A file that is written once, from its beginning, and knows its CRC-32."""

    checksum = 0

    problem: OSError | None = None  # torch tells of positions instead

    def write(self, data: Any) -> int:
        self.checksum = zlib.crc32(data, self.checksum)
        try:
            return super().write(data)
        except OSError as error:
            self.problem = error
            raise


@dataclasses.dataclass
class Written:
    """What a rank's :func:`save` made of its tensors.

    Attributes:
        checksums: of the files on the disk: size in bytes and CRC-32, by name.
        pending: contents of files that are still to be written, by name.
    """

    checksums: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    pending: dict[str, memoryview] = dataclasses.field(default_factory=dict)


class _Files(FileSystem):
    """Puts files of tensors on the disk or keeps them in memory; the small ones that describe them go to the disk, and
    those of what is far.
    """

    def __init__(self, in_memory: bool) -> None:
        self.in_memory, self.written = in_memory, Written()

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        name, file = Path(path).name, None
        try:
            if Path(path).suffix != ".distcp":
                with super().create_stream(path, mode) as stream:
                    yield stream
            elif self.in_memory and not name.endswith(_FAR):
                buffer = _Kept()
                yield buffer
                self.written.pending[name] = buffer.getbuffer()
            else:
                with _Summed(io.FileIO(path, mode)) as file:
                    yield file
                    self.written.checksums[name] = [file.tell(), file.checksum]
        except Exception as error:
            problem = error if file is None or file.problem is None else file.problem
            if not isinstance(problem, OSError):
                raise
            where = OSError(problem.errno, problem.strerror, os.fspath(path))
            raise CheckpointError(_first_sentence(where)) from error  # here, where the limits are this rank's


class _Writer(dcp.FileSystemWriter):
    """torch's writer, one tensor after the other. Its own keeps, of each key, the last until all are written.

    Args:
        blocks: what is written, by key and offset, and its rows in the shard that it is a block of.
    """

    def __init__(self, path: str | Path, files: _Files, blocks: dict[_Place, tuple[slice, ShardedTensor]]) -> None:
        super().__init__(path)
        self.fs, self._blocks = files, blocks

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        far = [item for item in plan.items if getattr(self._block(item), "far", False)]
        near = [item for item in plan.items if not any(item is other for other in far)]
        results = self._write(f"{plan.storage_data.prefix}0.distcp", near, planner)
        if far:
            results += self._write(f"{plan.storage_data.prefix}{_FAR}", far, planner)
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def _block(self, item: WriteItem) -> ShardedTensor | None:
        _, block = self._blocks.get((item.index.fqn, tuple(item.index.offset or ())), (None, None))
        return block

    def _write(self, name: str, items: list[WriteItem], planner: SavePlanner) -> list[WriteResult]:
        results = []
        with self.fs.create_stream(self.fs.concat_path(self.path, name), "wb") as stream, _no_inner_checksums():
            for item in items:
                tensor = self._data(item, planner)
                if tensor.untyped_storage().nbytes() != tensor.nbytes:  # all of which would be written
                    tensor = tensor.clone()
                begin = stream.tell()
                torch.save(tensor, cast(IO[bytes], stream))
                length = stream.tell() - begin
                results.append(WriteResult(item.index, length, _StorageInfo(name, begin, length)))
            if not isinstance(stream, _Kept):
                stream.flush()
                os.fsync(stream.fileno())
        return results

    def _data(self, item: WriteItem, planner: SavePlanner) -> torch.Tensor:
        block = self._block(item)
        codes = getattr(block, "codes", None)
        if codes is not None:
            rows, _ = self._blocks[item.index.fqn, tuple(item.index.offset or ())]
            return read_values(codes, rows).cpu()
        return planner.resolve_data(item).detach().cpu()  # type: ignore[union-attr]


@contextlib.contextmanager
def _no_inner_checksums() -> Iterator[None]:
    """torch.save computes one of each tensor, which torch.load does not read; the whole file's is in the manifest."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


class _SaveHere(TorchDistSaveShardedStrategy):
    """Megatron's plan and format, in blocks, written by this process.

    Megatron writes from forked processes, whose results pass through a spawned one that imports the
    entry script again: seconds at the first save, and forks beside live threads.
    """

    def __init__(self, files: _Files) -> None:
        super().__init__("torch_dist", 1)
        self.files = files

    def save(self, sharded_state_dict: State, checkpoint_dir: str | Path) -> None:
        shards, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        cut = {key: [block for shard in parts for block in blocks_of(shard)] for key, parts in shards.items()}
        placed = {(key, tuple(b.global_offset)): (rows, b) for key, parts in cut.items() for rows, b in parts}
        state = {key: [block for _, block in parts] for key, parts in cut.items()}
        dcp.save(
            mcore_to_pyt_state_dict(state),
            storage_writer=_Writer(checkpoint_dir, self.files, placed),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


def _copy(state: Any) -> Any:
    """The state with its own dictionaries and lists: Megatron replaces their values."""
    if isinstance(state, dict):
        return {key: _copy(value) for key, value in state.items()}
    return [_copy(value) for value in state] if isinstance(state, list) else state


def _sharded(state: Any) -> Iterator[ShardedTensor]:
    """Every ShardedTensor of a state, factories built."""
    if isinstance(state, ShardedTensorFactory):
        yield from _sharded(state.build())
    elif isinstance(state, ShardedTensor):
        yield state
    elif isinstance(state, dict | list):
        for value in state.values() if isinstance(state, dict) else state:
            yield from _sharded(value)


@contextlib.contextmanager
def _readable_errors(what: str, kinds: tuple[type[Exception], ...] = (Exception,)) -> Iterator[None]:
    """Megatron's and torch's many exceptions as one, and none of their deprecation warnings.

    Args:
        kinds: of exceptions beside that by which torch tells every rank of what failed on one; others stay as they are.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except CheckpointError:
        raise
    except dcp.CheckpointException as error:  # holds every rank's, with tracebacks
        rank, (cause, _) = min(error.failures.items())
        raise CheckpointError(f"{what} (rank {rank}): {_first_sentence(cause)}") from error
    except kinds as error:
        raise CheckpointError(f"{what}: {_first_sentence(error)}") from error


def _first_sentence(error: BaseException) -> str:
    if isinstance(error, CheckpointError):
        return str(error)
    if sentence := shortage(error):
        return sentence
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0].split('. ')[0]}"


def save(state: State, folder: str | Path, in_memory: bool = False) -> Written:
    """Write ``state`` into ``folder``; all ranks call it, and it returns when all have written.

    Plain values may hold what ``torch.load(weights_only=True)`` reads; rank 0's are stored. Not in place:
    write into a new folder, then rename it.

    Args:
        in_memory: leave the tensors' files to the caller: a copy of this rank's tensors, in :attr:`Written.pending`.

    Raises:
        CheckpointError: on every rank, if shards do not cover a tensor exactly or a rank cannot write its files. An
            error of any other kind is of the rank alone.
    """
    folder, files = Path(folder), _Files(in_memory)
    # Megatron's check raises on rank 0 only, and the others wait for it; torch's raises everywhere.
    sharded, plain = save_preprocess(_copy(state), False, None)

    def write_plain() -> None:
        """As Megatron's own saving does, but that all ranks hear of an error."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            content = io.BytesIO()
            torch.save(plain, content)
            (folder / "common.pt").write_bytes(content.getbuffer())
            save_config(CheckpointingConfig("torch_dist", 1), str(folder))
        except OSError as error:
            raise CheckpointError(f"cannot save the checkpoint {folder}: {_first_sentence(error)}") from error

    on_rank_zero(write_plain, raises=CheckpointError)
    with _readable_errors(f"cannot save the checkpoint {folder}", ()):
        _SaveHere(files).save(sharded, str(folder))
        _verify(state, folder, partial=False, written=not in_memory)  # finds a tensor that no rank was told to write
    return files.written


class Reading:
    """A checkpoint that fits a template, to be read in parts; all ranks make it and call it together.

    Args:
        template: a state as given to :func:`save`, of this run's layout; its tensors need no memory (device meta).
            Its plain values are ignored.
        folder: written by :func:`save` at any number of ranks and shards.
        partial: the checkpoint may hold tensors that the template does not ask for.

    Raises:
        CheckpointError: on every rank, if a key or shape of template and checkpoint differ or a file is missing or too
            short.
    """

    def __init__(self, template: State, folder: str | Path, partial: bool = False) -> None:
        self._folder, self._tensors = Path(folder), LoadTensors()
        with self._readable():
            _verify(template, self._folder, partial)

    def read(self, part: State) -> State:
        """Read what ``part`` of the template asks for, into its tensors.

        Returns:
            Its structure with tensors for shards, and the plain values that were saved.

        Raises:
            CheckpointError: on every rank, if a file is corrupt.
        """
        with self._readable():
            loaded: State = dist_checkpointing.load(  # its own strategies unpickle what the checkpoint asks them to
                _copy(part),
                str(self._folder),
                sharded_strategy=self._tensors,
                common_strategy=LoadPlainValues(),
                validate_access_integrity=False,
            )
        # Megatron leaves out what is empty: a stage without a PEER layer has no tables
        return {**{key: value for key, value in part.items() if value == {}}, **loaded}

    def stream(self, part: Mapping[Key, Sharded], device: torch.device) -> Iterator[tuple[Key, torch.Tensor]]:
        """Read the tensors of a part, whose own need no memory, a buffer's worth (or a larger one alone) at a time.

        All ranks take every item, also those that want less than others.

        Raises:
            CheckpointError: as :meth:`read` does.
        """
        groups, room = [dict[Key, Sharded]()], BUFFER_BYTES
        for key, shard in part.items():
            if shard.data.nbytes > room and groups[-1]:
                groups.append({})
                room = BUFFER_BYTES
            groups[-1][key] = shard
            room -= shard.data.nbytes
        for number in range(max(from_every_rank(len(groups)))):
            yield from self._group(groups[number] if number < len(groups) else {}, device)

    def _group(self, group: Mapping[Key, Sharded], device: torch.device) -> Iterator[tuple[Key, torch.Tensor]]:
        keys = list(group)
        wanted = {
            str(number): like(group[key], torch.empty_like(group[key].data, device=device), group[key].key)
            for number, key in enumerate(keys)
        }
        loaded = self.read({"group": wanted})["group"]
        for number, key in enumerate(keys):
            yield key, loaded[str(number)]

    def _readable(self) -> AbstractContextManager[None]:
        return _readable_errors(f"cannot load the checkpoint {self._folder}")


def load(template: State, folder: str | Path, partial: bool = False) -> State:
    """Read all that a template asks for, if it fits: :class:`Reading`."""
    return Reading(template, folder, partial).read(template)


def check_tensors(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Refuse a checkpoint that does not hold the whole of each of these tensors, in one process.

    Raises:
        CheckpointError: naming what is missing or of another shape.
    """
    problem = _problem({key: (shape, False) for key, shape in shapes.items()}, folder, partial=True, written=True)
    if problem is not None:
        raise CheckpointError(problem)


def _verify(template: State, folder: Path, partial: bool, written: bool = True) -> None:
    """Compare template and checkpoint on rank 0, so that all ranks raise the same error or none does."""
    shapes: list[Any] = [None] * dist.get_world_size()
    wanted = {shard.key: (shard.global_shape, shard.allow_shape_mismatch) for shard in _sharded(template)}
    dist.gather_object(wanted, shapes if dist.get_rank() == 0 else None)

    def check() -> None:
        problem = _problem({key: value for rank in shapes for key, value in rank.items()}, folder, partial, written)
        if problem is not None:
            raise CheckpointError(problem)

    on_rank_zero(check, raises=CheckpointError)


def _problem(wanted: Wanted, folder: Path, partial: bool, written: bool) -> str | None:
    """What is wrong with the checkpoint, in a sentence. Reads no tensor that a rank wrote."""
    try:
        return _difference(wanted, folder, partial, written)
    except Exception as error:  # .metadata can hold values of any kind
        return f"{folder / '.metadata'} does not describe a checkpoint: {_first_sentence(error)}"


def _difference(wanted: Wanted, folder: Path, partial: bool, written: bool) -> str | None:
    for name in ("metadata.json", "common.pt", ".metadata"):
        if not (folder / name).is_file():
            return f"{folder} is not a complete checkpoint: {name} is missing"
    name = "common.pt"
    try:
        read_plain_values(folder)
        name = ".metadata"
        metadata = MetadataReader(folder).read_metadata()
    except UntrustedError as error:
        return f"{folder / name} is not loaded: {error}"
    except Exception as error:  # unpickling damaged bytes raises nearly anything
        return f"{folder / name} is corrupt: {_first_sentence(error)}"
    stored = {
        key: value
        for key, value in metadata.state_dict_metadata.items()
        if isinstance(value, dcp.TensorStorageMetadata)
    }
    for key in sorted(wanted.keys() - stored.keys()):
        return f"{key} is missing from the checkpoint {folder}"
    for key in [] if partial else sorted(stored.keys() - wanted.keys()):
        return f"{key} is in the checkpoint {folder} but not in the model"
    for key, (shape, may_differ) in wanted.items():
        there = stored[key].size
        if not may_differ and tuple(there) != tuple(shape):
            return f"{key} has shape {tuple(there)} in the checkpoint {folder} and {tuple(shape)} in the model"
        if sum(chunk.sizes.numel() for chunk in stored[key].chunks) != there.numel():
            return f"{key} is incomplete in the checkpoint {folder}"
    if not written:
        return None
    sizes: dict[str, int] = {}
    for info in (metadata.storage_data or {}).values():
        sizes[info.relative_path] = max(sizes.get(info.relative_path, 0), info.offset + info.length)
    for name, size in sorted(sizes.items()):
        file = folder / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size < size:
            return f"{file} is cut off: {file.stat().st_size} bytes of at least {size}"
    return None
