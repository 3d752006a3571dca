"""The expert products on CPU in C (native.c): float32 or bfloat16 tables, each picked row read once.

The C compiler of the machine builds it in about a second at first use; the library is cached per user. Without
a compiler the other CPU backends serve.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from peer_dist.kernels.picks import Picks

_FLAGS = ("-O3", "-march=native", "-fopenmp-simd", "-fno-math-errno", "-shared", "-fPIC")
_KINDS = {"gelu": 0, "relu": 1, "silu": 2}
_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}


def available(x: Tensor, *tables: Tensor) -> bool:
    """Whether this backend can serve these tensors."""
    return (
        all(tensor.device.type == "cpu" and tensor.dtype in _SUFFIX for tensor in (x, *tables))
        and all(table.is_contiguous() and table.dtype == tables[0].dtype for table in tables)
        and _library() is not None
    )


def dots(x: Tensor, table: Tensor, picks: Picks) -> Tensor:
    """See :func:`peer_dist.kernels.reference.dots`."""
    x = x.float().contiguous()
    out = torch.empty(picks.expert.numel())
    _over_tokens("dots", picks, table, x, picks.offsets, picks.expert, table, out)
    return out


def mix(weight: Tensor, table: Tensor, picks: Picks) -> Tensor:
    """See :func:`peer_dist.kernels.reference.mix`."""
    weight = weight.float().contiguous()
    out = torch.empty(picks.tokens, table.shape[1])
    _over_tokens("mix", picks, table, weight, picks.offsets, picks.expert, table, out)
    return out


def forward(x: Tensor, picks: Picks, gate: Tensor, down: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """See :func:`peer_dist.kernels.reference.Composed.forward`."""
    x, gate = x.float().contiguous(), gate.float().contiguous()
    pre, y = torch.empty(picks.expert.numel()), torch.empty(x.shape)
    kind = _KINDS[activation]
    _over_tokens("forward", picks, down, x, picks.offsets, picks.expert, gate, down, up, kind, pre, y)
    return y, pre


def backward(
    dy: Tensor, x: Tensor, picks: Picks, pre: Tensor, gate: Tensor, down: Tensor, up: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`peer_dist.kernels.reference.Composed.backward`."""
    dy, gate = dy.float().contiguous(), gate.float().contiguous()
    dx = torch.empty(dy.shape)
    dgate, dpre, hidden = torch.empty_like(pre), torch.empty_like(pre), torch.empty_like(pre)
    made = (dx, dgate, dpre, hidden)
    kind = _KINDS[activation]
    _over_tokens("backward", picks, down, dy, picks.offsets, picks.expert, pre, gate, down, up, kind, *made)
    return made


def table_grads(
    dpre: Tensor, hidden: Tensor, x: Tensor, dy: Tensor, picks: Picks, rows: int, *, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See :func:`peer_dist.kernels.reference.Composed.table_grads`."""
    touched, starts = picks.segments
    shape = (rows, x.shape[1])
    ddown, dup = huge_pages(torch.empty(shape)).zero_(), huge_pages(torch.empty(shape)).zero_()
    _over_segments(dpre, hidden, x, dy, picks, starts, touched, ddown, dup)
    return ddown.to(dtype), dup.to(dtype)


def sparse_table_grads(
    dpre: Tensor, hidden: Tensor, x: Tensor, dy: Tensor, picks: Picks, rows: int, *, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`peer_dist.kernels.reference.Composed.sparse_table_grads`."""
    touched, starts = picks.segments
    shape = (touched.numel(), x.shape[1])
    ddown, dup = huge_pages(torch.empty(shape)), huge_pages(torch.empty(shape))
    _over_segments(dpre, hidden, x, dy, picks, starts, torch.arange(touched.numel()), ddown, dup)
    return touched, ddown.to(dtype), dup.to(dtype)


def huge_pages(tensor: Tensor) -> Tensor:
    """Ask for huge pages under a large CPU tensor that nothing was written to yet: rows at random in gigabytes
    otherwise cost an address translation each. Without effect where the system has none.
    """
    if tensor.device.type == "cpu" and tensor.nbytes >= 1 << 24 and sys.platform == "linux":
        page = 1 << 21
        begin = -(-tensor.data_ptr() // page) * page
        length = (tensor.data_ptr() + tensor.nbytes - begin) // page * page
        libc = ctypes.CDLL(None)
        libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), ctypes.c_int(14))  # MADV_HUGEPAGE
    return tensor


def _over_segments(
    dpre: Tensor,
    hidden: Tensor,
    x: Tensor,
    dy: Tensor,
    picks: Picks,
    starts: Tensor,
    rows: Tensor,
    ddown: Tensor,
    dup: Tensor,
) -> None:
    x, dy = x.float().contiguous(), dy.float().contiguous()
    arguments = (x.shape[1], dpre, hidden, x, dy, picks.token, picks.by_expert, starts, rows, ddown, dup)
    _split(_function("table_grads"), starts, arguments)


def _over_tokens(name: str, picks: Picks, table: Tensor, *arguments: Tensor | int) -> None:
    if picks.expert.numel():
        low, high = (int(end) for end in torch.aminmax(picks.expert))
        if low < 0 or high >= table.shape[0]:
            raise IndexError(f"picks of rows {low} to {high} from a table of {table.shape[0]} rows")
    function = _function(f"{name}_{_SUFFIX[table.dtype]}")
    _split(function, picks.offsets, (table.shape[1], *arguments))


def _split(function: Callable[..., None], offsets: Tensor, arguments: tuple[Tensor | int, ...]) -> None:
    """Call ``function(begin, end, *arguments)`` on ranges of equal work, one per thread.

    Every token (or expert) is one thread's, so the result does not depend on how many there are.
    """
    work, count = int(offsets[-1]), offsets.numel() - 1
    threads = min(torch.get_num_threads(), max(1, work // 4096))
    raw = [
        ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else ctypes.c_int64(a) for a in arguments
    ]  # `arguments` keeps the tensors alive
    goals = torch.tensor([work * part // threads for part in range(1, threads)], dtype=offsets.dtype)
    bounds = [0, *torch.searchsorted(offsets, goals).tolist(), count]

    def part(index: int) -> None:
        function(ctypes.c_int64(bounds[index]), ctypes.c_int64(bounds[index + 1]), *raw)

    if threads == 1:
        part(0)
    else:
        list(_pool(os.getpid(), threads).map(part, range(threads)))


@lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Of this process: a forked child cannot use its parent's. ctypes lets go of Python's lock."""
    return ThreadPoolExecutor(threads, thread_name_prefix="expert_mix")


def _function(name: str) -> Callable[..., None]:
    library = _library()
    assert library is not None
    function = getattr(library, name)
    function.restype = None
    return function


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    """The compiled library; None where there is no compiler that builds it."""
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    source = resources.files("peer_dist.kernels").joinpath("native.c").read_bytes()
    key = hashlib.sha256(b"\0".join([source, " ".join((compiler, *_FLAGS)).encode(), _machine()]))
    name = f"expert_mix-{key.hexdigest()[:16]}.so"
    try:
        cached = _cache_folder() / name
        if not cached.exists():
            _compile(compiler, source, cached)
        return ctypes.CDLL(str(cached))
    except (OSError, subprocess.CalledProcessError):
        return None


def _compile(compiler: str, source: bytes, target: Path) -> None:
    """Build into a file of our own and rename it, so that ranks that start together do not meet a half."""
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        code, built = Path(folder, "native.c"), Path(folder, "native.so")
        code.write_bytes(source)
        subprocess.run([compiler, *_FLAGS, str(code), "-o", str(built), "-lm"], check=True, capture_output=True)
        os.replace(built, target)


def _cache_folder() -> Path:
    """Only this user can write to it."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "peer_dist"


def _machine() -> bytes:
    """Names the processor's features: a home folder may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return os.uname().machine.encode()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})).encode()
