"""Tables that are more than tensors of numbers on a device, because their rows lie elsewhere or have eight bits: made,
read and written a block of rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from peer_dist.kernels.eight_bit import dequantised, is_eight_bit, quantised, scales_of
from peer_dist.kernels.far import Place, far_rows_of

MEMORIES = ("device", "host", "disk")
"""Where tables can lie."""
FETCHES = ("direct", "copied")
"""How rows in host memory can come to a GPU."""
_BLOCK_BYTES = 1 << 24  # of float32 values that are made at once


def place_of(
    memory: str, device: torch.device, cache_gb: float, folder: str, resident_gb: float, fetch: str
) -> Place | None:
    """Where a layer's tables lie, by its options; None for tables on the device.

    Raises:
        ValueError: a size is negative.
    """
    if cache_gb < 0 or resident_gb < 0:
        raise ValueError(f"table_cache_gb and table_resident_gb must be at least 0, not {cache_gb} and {resident_gb}")
    if memory == "device":
        return None
    return Place(memory, device, int(cache_gb * 1e9), Path(folder) if folder else None, int(resident_gb * 1e9), fetch)


def code_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a table is kept that has elements of ``dtype``.

    Raises:
        ValueError: tables cannot have such elements.
    """
    if dtype == torch.float8_e4m3fn:
        return torch.uint8
    if dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8):
        return dtype
    raise ValueError(
        f"table_dtype must be float32, float64, bfloat16, float16, float8_e4m3fn or int8 of torch's, not {dtype}"
    )


def flush(table: Tensor) -> None:
    """Let a table's memory be what its rows are, where some of them are kept elsewhere too."""
    rows = far_rows_of(table)
    if rows is not None:
        rows.flush()


def values_dtype(table: Tensor) -> torch.dtype:
    """The dtype that a table's values are exact in: its own, or bfloat16 where it has eight bits."""
    return torch.bfloat16 if is_eight_bit(table) else table.dtype


def blocks(table: Tensor) -> Iterator[slice]:
    """The rows of a table in parts whose values take little memory."""
    rows = max(1, _BLOCK_BYTES // max(1, 4 * table.shape[1]))
    for begin in range(0, len(table), rows):
        yield slice(begin, min(begin + rows, len(table)))


def read_values(table: Tensor, rows: slice) -> Tensor:
    """The values of some rows, in :func:`values_dtype`: a view, or of eight bits new ones. :func:`flush` goes first."""
    codes, scales = table.detach()[rows], scales_of(table)
    return codes if scales is None else dequantised(codes, scales.detach()[rows]).to(torch.bfloat16)


@torch.no_grad()
def write_values(table: Tensor, rows: slice, values: Tensor) -> None:
    """Write some rows' values, of any floating-point dtype and on any device; eight bits are rounded to the nearest."""
    scales = scales_of(table)
    if scales is None:
        table[rows] = values.to(table.device)
        return
    for part in blocks(values):
        place = slice(rows.start + part.start, rows.start + part.stop)
        codes, of_rows = quantised(values[part].float(), table.dtype)
        table[place] = codes.to(table.device)
        scales[place] = of_rows.to(scales.device)
