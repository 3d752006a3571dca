"""Safetensors files written as a stream: a header that says where everything will lie, then the tensors by blocks."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from peer_dist.data.documents import DataError
from peer_dist.export.peer_model import INDEX

DTYPES = {"float32": "F32", "bfloat16": "BF16"}  # of this package's options, and the format's names for them
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class Entry:
    """A tensor to write.

    Attributes:
        dtype: a key of :data:`DTYPES`.
        blocks: gives the tensor's consecutive rows, of any dtype, some at a time.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    blocks: Callable[[], Iterator[Tensor]]

    @property
    def bytes(self) -> int:
        """Bytes of the tensor in a file."""
        return math.prod(self.shape) * getattr(torch, self.dtype).itemsize


def parse_size(text: str) -> int:
    """Bytes of a size such as ``5GB``.

    Raises:
        DataError: it is none.
    """
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?([KMG]B)", text)
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if not size:
        raise DataError(f"--shard-size {text}: must be a number of KB, MB or GB, such as 5GB")
    return size


def write_shards(folder: Path, entries: list[Entry], limit: int) -> int:
    """Write files of at most ``limit`` bytes (or one tensor) and their index; the tensors' bytes."""
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(placed.bytes for placed in shards[-1]) + entry.bytes > limit:
            shards.append([])
        shards[-1].append(entry)
    homes: dict[str, str] = {}
    total = sum(entry.bytes for entry in entries)
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write(folder / name, shard)
        homes |= {entry.name: name for entry in shard}
    index = {"metadata": {"total_size": total}, "weight_map": homes}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return total


def _write(path: Path, entries: list[Entry]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        begin, end = end, end + entry.bytes
        header[entry.name] = {"dtype": DTYPES[entry.dtype], "shape": entry.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            for block in entry.blocks():
                rows = block.to(getattr(torch, entry.dtype)).contiguous()
                file.write(rows.flatten().view(torch.uint8).numpy().data)
        if file.tell() != 8 + len(text) + end:
            raise DataError(f"{path}: has {file.tell()} bytes, not the {8 + len(text) + end} of its header")
