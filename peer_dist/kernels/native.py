"""The expert products on CPU in C (native.c): float32 or bfloat16 tables, each picked row read once.

The C compiler of the machine builds it in about a second at first use; the library is cached per user. Without
a compiler a library that was built ahead serves (:func:`build_ahead`: container images have one), else the other
CPU backends.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from peer_dist.kernels.allocation import gradient_memory
from peer_dist.kernels.picks import Picks
from peer_dist.machine import cpu_features

FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
# What libraries are built for ahead, best first, and the processor's features that each needs: an image meets other
# processors than the one that it was built on.
_LEVELS = {
    "x86-64-v4": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
    "x86-64-v3": {"avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"},
}
BUILT = Path(__file__).parent / "built"
_KINDS = {"gelu": 0, "relu": 1, "silu": 2}
_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
_MOST_TOP_K = 64  # as in native.c
STREAM_BYTES = 1 << 24  # of gradients written past the caches: more than would stay there


def available(x: Tensor, *tables: Tensor) -> bool:
    """Whether this backend can serve ``x`` and these tables: float32 or bfloat16 on a CPU, contiguous, of one dtype."""
    return (
        all(tensor.device.type == "cpu" and tensor.dtype in _SUFFIX for tensor in (x, *tables))
        and all(table.is_contiguous() and table.dtype == tables[0].dtype for table in tables)
        and load_library() is not None
    )


def searches(scores: Tensor, top_k: int) -> bool:
    """Whether :func:`top_pairs` can serve these scores ``[queries, n]``: float32 on a CPU, ``top_k`` at most 64."""
    fine = scores.device.type == "cpu" and scores.dtype == torch.float32 and top_k <= _MOST_TOP_K
    return fine and load_library() is not None


def top_pairs(first: Tensor, second: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """See :func:`peer_dist.kernels.reference.top_pairs`."""
    queries, n = first.shape
    first, second = first.contiguous(), second.contiguous()
    number, score = torch.empty(queries, top_k, dtype=torch.int64), torch.empty(queries, top_k)
    _call("top_pairs", queries, n, top_k, first, second, number, score)
    return number, score


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
    gradients = (dx, dgate, dpre, hidden)
    kind = _KINDS[activation]
    _over_tokens("backward", picks, down, dy, picks.offsets, picks.expert, pre, gate, down, up, kind, *gradients)
    return gradients


def table_grad(weight: Tensor, x: Tensor, picks: Picks, out: Tensor) -> None:
    """See :func:`peer_dist.kernels.reference.table_grad`."""
    x, weight = x.float().contiguous(), weight.float().contiguous()
    _check(picks, out)
    _call("add_rows", out.shape[0], picks.tokens, x.shape[1], weight, x, picks.offsets, picks.expert, out)


def table_grads(sums: Sequence[tuple[Tensor, Tensor]], picks: Picks, rows: int, *, dtype: torch.dtype) -> list[Tensor]:
    """See :func:`peer_dist.kernels.reference.Composed.table_grads`."""
    touched, order, token, starts = _group(picks, rows)
    grads = [gradient_memory(rows, x.shape[1], dtype).zero_() for _, x in sums]
    _sum_segments(sums, order, token, starts, touched, grads)
    return grads


def sparse_table_grads(
    sums: Sequence[tuple[Tensor, Tensor]], picks: Picks, rows: int, *, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    """See :func:`peer_dist.kernels.reference.Composed.sparse_table_grads`."""
    touched, order, token, starts = _group(picks, rows)
    grads = [gradient_memory(touched.numel(), x.shape[1], dtype) for _, x in sums]
    _sum_segments(sums, order, token, starts, None, grads)
    return touched, grads


def _group(picks: Picks, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The rows picked at all ``[touched]``, and in the order by row each pick's number and its token, ``[picks]``
    int32, and where those of each row begin, ``[touched + 1]``.
    """
    count = picks.expert.numel()
    if count >= 1 << 31:
        raise ValueError(f"{count} picks in one call are more than 2**31 - 1; take the tokens in parts")
    most = min(count, rows)
    order, token = torch.empty(2, count, dtype=torch.int32)
    touched, starts = torch.empty(most, dtype=torch.int64), torch.empty(most + 1, dtype=torch.int64)
    pairs = torch.empty(2 * count, dtype=torch.int64)
    count_touched = _call(
        "group", picks.tokens, rows, picks.offsets, picks.expert, pairs, order, token, touched, starts
    )
    return touched[:count_touched].clone(), order, token, starts[: count_touched + 1]


def _sum_segments(
    sums: Sequence[tuple[Tensor, Tensor]],
    order: Tensor,
    token: Tensor,
    starts: Tensor,
    rows: Tensor | None,
    grads: list[Tensor],
) -> None:
    """Write each picked row's gradients, to ``rows`` or one after the other."""
    for (weight, x), out in zip(sums, grads):
        weight, x = weight.float().contiguous(), x.float().contiguous()
        arguments = (weight, x, token, order, starts, rows, int(out.nbytes > STREAM_BYTES), out)
        _call(f"table_grad_{_SUFFIX[out.dtype]}", starts.numel() - 1, x.shape[1], *arguments)


def _over_tokens(name: str, picks: Picks, table: Tensor, *arguments: Tensor | int) -> None:
    _check(picks, table)
    _call(f"{name}_{_SUFFIX[table.dtype]}", picks.tokens, table.shape[1], *arguments)


def _check(picks: Picks, table: Tensor) -> None:
    if picks.expert.numel():
        low, high = (int(end) for end in torch.aminmax(picks.expert))
        if low < 0 or high >= table.shape[0]:
            raise IndexError(f"picks of rows {low} to {high} from a table of {table.shape[0]} rows")


def _call(name: str, *arguments: Tensor | int | None) -> int:
    """Call a function of native.c; Python's lock is let go of meanwhile."""
    library = load_library()
    assert library is not None
    function = getattr(library, name)
    function.restype = ctypes.c_int64  # of those that return something
    result: int = function(
        *(
            ctypes.c_int64(a) if isinstance(a, int) else ctypes.c_void_p(None if a is None else a.data_ptr())
            for a in arguments
        )
    )
    return result


@lru_cache(maxsize=1)
def load_library() -> ctypes.CDLL | None:
    """The compiled library; None where there is no compiler that builds it, and none was built ahead."""
    compiler = _compiler()
    if compiler is None:
        return _built_ahead()
    # a home folder may be shared by machines of several kinds
    key = hashlib.sha256(b"\0".join([_source(), " ".join((compiler, *FLAGS)).encode(), cpu_features().encode()]))
    name = f"expert_mix-{key.hexdigest()[:16]}.so"
    try:
        cached = _cache_folder() / name
        if not cached.exists():
            _compile(compiler, FLAGS, _source(), cached)
        return ctypes.CDLL(str(cached))
    except (OSError, subprocess.CalledProcessError):
        return _built_ahead()


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")


@lru_cache(maxsize=1)
def _source() -> bytes:
    return resources.files("peer_dist.kernels").joinpath("native.c").read_bytes()


def build_ahead() -> list[Path]:
    """Compile libraries into a folder beside this file, for machines of this kind that have no compiler.

    Returns:
        The libraries' paths, best first: one for each level of the processor's features.

    Raises:
        RuntimeError: there is no compiler here, or it cannot build them.
    """
    compiler = _compiler()
    if compiler is None:
        raise RuntimeError("no C compiler: set CC, or install gcc")
    portable = tuple(flag for flag in FLAGS if not flag.startswith("-march"))
    for target, level in _ahead().items():
        target.parent.mkdir(exist_ok=True)
        try:
            _compile(compiler, (*portable, f"-march={level}") if level else portable, _source(), target)
        except subprocess.CalledProcessError as error:
            raise RuntimeError(f"{compiler} failed: {error.stderr.decode(errors='replace')}") from error
    return list(_ahead())


def _built_ahead() -> ctypes.CDLL | None:
    """The best library built ahead that this processor can run."""
    features = set(cpu_features().split())
    for target, level in _ahead().items():
        if target.exists() and _LEVELS.get(level, set()) <= features:
            with contextlib.suppress(OSError):
                return ctypes.CDLL(str(target))
    return None


def _ahead() -> dict[Path, str]:
    """Where libraries built ahead from this source lie, best first, and the level that each is for ("": any)."""
    version, machine = hashlib.sha256(_source()).hexdigest()[:16], os.uname().machine
    levels = _LEVELS if machine == "x86_64" else [""]
    return {BUILT / f"expert_mix-{level or machine}-{version}.so": level for level in levels}


def _compile(compiler: str, flags: tuple[str, ...], source: bytes, target: Path) -> None:
    """Build into a file of our own and rename it, so that ranks that start together do not meet a half."""
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        code, built = Path(folder, "native.c"), Path(folder, "native.so")
        code.write_bytes(source)
        command = [compiler, *flags, str(code), "-o", str(built), "-lm"]
        if subprocess.run([*command, "-fopenmp"], capture_output=True).returncode:
            subprocess.run(command, check=True, capture_output=True)  # on one thread, say by Apple's compiler
        os.replace(built, target)


def _cache_folder() -> Path:
    """The folder of compiled libraries, which only this user can write to."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "peer_dist"
