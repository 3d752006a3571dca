"""The expert products and the tables' updates on CPU in C (native.c, updates.c): tables of float32,
bfloat16 or eight bits, each row read once.

The C compiler of the machine builds it in some seconds at first use; the library is cached per user. Without a
compiler a library that was built ahead serves (:func:`build_ahead`: container images have one), or one that another
compiler put into the cache, else the other CPU backends.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from importlib import resources
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from peer_dist.kernels import reference
from peer_dist.kernels.allocation import gradient_memory
from peer_dist.kernels.eight_bit import EightBit
from peer_dist.kernels.picks import Picks
from peer_dist.kernels.rounding import Rounding
from peer_dist.kernels.signatures import call, declare
from peer_dist.machine import cpu_features, private_folder

FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
# What libraries are built for ahead, best first, and the processor's features that each needs: an image meets other
# processors than the one that it was built on.
_LEVELS = {
    "x86-64-v4": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
    "x86-64-v3": {"avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"},
}
BUILT = Path(__file__).parent / "built"
COMPILER_SECONDS = 120  # after which a compiler hangs
_KINDS = {"gelu": 0, "relu": 1, "silu": 2}  # as in native.c
_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
_CODES = {torch.int8: "i8", torch.uint8: "e4m3"}
_MOST_TOP_K = 64  # as in native.c
STREAM_BYTES = 1 << 24  # of gradients written past the caches: more than would stay there
# What launchers call a process's number on its machine, the innermost first.
_LOCAL_RANKS = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")


def available(x: Tensor, *tables: Tensor | EightBit) -> bool:
    """Whether this backend can serve ``x`` and these tables: float32 or bfloat16, or tables of eight bits, on a CPU,
    contiguous, of one dtype.
    """
    plain = [x, *(table for table in tables if isinstance(table, Tensor))]
    coded = [table for table in tables if isinstance(table, EightBit)]
    read = [part for table in tables for part in (table if isinstance(table, EightBit) else (table,))]
    return (
        all(tensor.device.type == "cpu" for tensor in (x, *read))
        and all(tensor.dtype in _SUFFIX for tensor in plain)
        and all(table.codes.dtype in _CODES and table.scales.dtype == torch.float32 for table in coded)
        and all(tensor.is_contiguous() for tensor in read)
        and len({_rows(table).dtype for table in tables}) <= 1
        and load_library() is not None
    )


def top_pairs(first: Tensor, second: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """See :func:`peer_dist.kernels.reference.top_pairs`; float32, and ``top_k`` at most 64."""
    first, second = first.contiguous(), second.contiguous()
    queries = len(first)
    number = torch.empty(queries, top_k, dtype=torch.int64, device="cpu")
    score = _floats(queries, top_k)
    _call("top_pairs", k=top_k, first=first, second=second, number=number, score=score)
    return number, score


def search(queries: Iterable[Tensor], keys: Tensor, numbers: Tensor, scores: Tensor) -> None:
    """See :func:`peer_dist.kernels.search`."""
    best = top_pairs if scores.shape[-1] <= _MOST_TOP_K else reference.top_pairs
    reference.search(queries, keys, numbers, scores, best)


def search_backward(
    dscores: Tensor, numbers: Tensor, query: Tensor, keys: Tensor, dkeys: Tensor, dtype: torch.dtype
) -> Tensor:
    """See :func:`peer_dist.kernels.search_backward`."""
    return reference.search_backward(mix, table_grad, dscores, numbers, query, keys, dkeys, dtype)


def dots(x: Tensor, table: Tensor | EightBit, picks: Picks) -> Tensor:
    """See :func:`peer_dist.kernels.reference.dots`."""
    out = _floats(picks.expert.numel())
    _over_picks(_of("dots", table), picks, x=_wide(x), **_read("table", table, "scales"), out=out)
    return out


def mix(weight: Tensor, table: Tensor | EightBit, picks: Picks, *, dtype: torch.dtype | None = None) -> Tensor:
    """See :func:`peer_dist.kernels.reference.mix`."""
    out = _floats(picks.tokens, _rows(table).shape[-1])
    _over_picks(_of("mix", table), picks, weight=_wide(weight), **_read("table", table, "scales"), out=out)
    return out.to(dtype or out.dtype)


def forward(
    x: Tensor, picks: Picks, gate: Tensor, down: Tensor | EightBit, up: Tensor | EightBit, activation: str
) -> tuple[Tensor, Tensor]:
    """See :func:`peer_dist.kernels.reference.Composed.forward`."""
    pre, y = _floats(picks.expert.numel()), _floats(*x.shape)
    name, kind = _of("forward", down), _KINDS[activation]
    tables = _read("down", down) | _read("up", up)
    _over_picks(name, picks, kind=kind, x=_wide(x), gate=_wide(gate), **tables, pre=pre, y=y)
    return y, pre


def backward(
    dy: Tensor,
    x: Tensor,
    picks: Picks,
    pre: Tensor,
    gate: Tensor,
    down: Tensor | EightBit,
    up: Tensor | EightBit,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`peer_dist.kernels.reference.Composed.backward`."""
    dx, (dgate, dpre, hidden) = _floats(*dy.shape), (_floats(picks.expert.numel()) for _ in range(3))
    name, kind = _of("backward", down), _KINDS[activation]
    tables = _read("down", down) | _read("up", up)
    gradients = {"dx": dx, "dgate": dgate, "dpre": dpre, "hidden": hidden}
    _over_picks(name, picks, kind=kind, dy=_wide(dy), pre=pre, gate=_wide(gate), **tables, **gradients)
    return dx, dgate, dpre, hidden


def table_grad(weight: Tensor, x: Tensor, picks: Picks, out: Tensor) -> None:
    """See :func:`peer_dist.kernels.reference.table_grad`; ``out`` in float32."""
    _over_picks("add_rows", picks, weight=_wide(weight), x=_wide(x), out=out)


def table_grads(
    sums: Sequence[tuple[Tensor, Tensor]],
    picks: Picks,
    rows: int,
    *,
    dtype: torch.dtype,
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """See :func:`peer_dist.kernels.reference.Composed.table_grads`."""
    touched, order, token, starts = _group(picks, rows)
    grads = [gradient_memory(rows, x.shape[1], dtype).zero_() for _, x in sums] if out is None else list(out)
    _sum_segments(sums, picks, order, token, starts, touched, rows, grads, add=out is not None)
    return grads


def sparse_table_grads(
    sums: Sequence[tuple[Tensor, Tensor]], picks: Picks, rows: int, *, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    """See :func:`peer_dist.kernels.reference.Composed.sparse_table_grads`."""
    touched, order, token, starts = _group(picks, rows)
    grads = [gradient_memory(touched.numel(), x.shape[1], dtype) for _, x in sums]
    _sum_segments(sums, picks, order, token, starts, None, touched.numel(), grads)
    return touched, grads


def row_squares(grad: Tensor) -> Tensor:
    """See :func:`peer_dist.kernels.updates.row_squares`."""
    out = _floats(len(grad))
    _call(_of("squares", grad), grad=grad, out=out)
    return out


def update_rows(
    step: Sequence[float],
    grad: Tensor,
    table: Tensor,
    moments: Mapping[str, Tensor],
    master: Tensor | None,
    rows: Tensor | None,
    squares: Tensor | None,
    rounding: Rounding | None,
    scales: Tensor | None = None,
    numbers: Tensor | None = None,
) -> None:
    """See :func:`peer_dist.kernels.updates.update_rows`; the table and its gradient in one dtype, or codes of
    eight bits and a gradient in bfloat16.
    """
    given = {
        "numbers": torch.tensor(step, dtype=torch.float32, device="cpu"),
        "grad": grad,
        "row": rows,
        "squares": squares,
        **{part: moments.get(part) for part in ("exp_avg", "exp_avg_sq", "row_sq")},
    }
    if rounding is not None:
        place = torch.tensor(rounding, dtype=torch.int64, device="cpu")
        given |= {"place": place, "called": numbers, "table": table}
        if table.dtype in _CODES:
            wrong = _call(f"update_{_CODES[table.dtype]}", rows=len(table), scales=scales, **given)
        else:
            wrong = _call("update_stochastic", rows=len(table), **given)
    elif master is not None:
        wrong = _call("update_master", rows=len(table), weight=master, table=table, **given)
    else:
        wrong = _call("update_in_place", rows=len(table), weight=table, **given)
    if wrong == 2:
        raise MemoryError(f"there is no memory for a row of {table.shape[1]} float32 numbers for each thread")
    if wrong:
        raise IndexError(f"rows of a sparse gradient must ascend, each once, within the table's {len(table)}")


def _group(picks: Picks, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The rows picked at all ``[touched]``, and in the order by row each pick's number and its token, ``[picks]``
    int32, and where those of each row begin, ``[touched + 1]``.
    """
    count = picks.count()
    most = min(count, rows)
    order, token = torch.empty(2, count, dtype=torch.int32, device="cpu")
    touched, starts, pairs = (
        torch.empty(size, dtype=torch.int64, device="cpu") for size in (most, most + 1, 2 * count)
    )
    room = {"pairs": pairs, "order": order, "token": token, "touched": touched, "starts": starts}
    count_touched = _over_picks("group", picks, rows=rows, **room)
    return touched[:count_touched].clone(), order, token, starts[: count_touched + 1]


def _sum_segments(
    sums: Sequence[tuple[Tensor, Tensor]],
    picks: Picks,
    order: Tensor,
    token: Tensor,
    starts: Tensor,
    rows: Tensor | None,
    written: int,
    grads: list[Tensor],
    add: bool = False,
) -> None:
    """Write or ``add`` each picked row's gradients, to ``rows`` of the ``written`` ones or one after the other."""
    for (weight, x), out in zip(sums, grads):
        _call(
            _of("table_grad", out),
            tokens=picks.tokens,
            segments=starts.numel() - 1,
            written=written,
            stream=int(out.nbytes > STREAM_BYTES and not add),
            add=int(add),
            weight=_wide(weight),
            x=_wide(x),
            token=token,
            order=order,
            starts=starts,
            rows=rows,
            out=out,
        )


def _floats(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float().contiguous()


def _rows(table: Tensor | EightBit) -> Tensor:
    return table.codes if isinstance(table, EightBit) else table


def _of(name: str, table: Tensor | EightBit) -> str:
    """The function for such tables."""
    dtype, known = _rows(table).dtype, _CODES if isinstance(table, EightBit) else _SUFFIX
    if dtype not in known:
        raise TypeError(f"tables of {dtype} are not served in C, those of float32, bfloat16 and with scales codes are")
    return f"{name}_{known[dtype]}"


def _read(name: str, table: Tensor | EightBit, scales: str = "") -> dict[str, Tensor]:
    """A table, and the scales of its rows, by C's names."""
    if isinstance(table, EightBit):
        return {name: table.codes, scales or f"{name}_scales": table.scales}
    return {name: table}


def _over_picks(name: str, picks: Picks, **given: Tensor | int) -> int:
    return _call(name, tokens=picks.tokens, offsets=picks.offsets, expert=picks.expert, **given)


def _call(name: str, **given: Tensor | int | None) -> int:
    library = load_library()
    if library is None:
        raise RuntimeError("there is no C library here; native.available tells")
    return call(library, name, **given)


@lru_cache(maxsize=1)
def load_library() -> ctypes.CDLL | None:
    """The compiled library. None, which is said once, where none can be had: the other backends serve then."""
    compiler, library = _compiler(), None
    trouble: OSError | str = "there is no C compiler"
    if compiler is not None:
        try:
            folder, name = _cache_folder(), _cached_name(compiler)
            return _load(folder, name) or _build(compiler, FLAGS, folder, name)
        except OSError as error:
            trouble = error
    with contextlib.suppress(OSError):
        library = _built_ahead() or _load(_cache_folder(), _cached_name(None))
    if library is None and compiler is not None and not isinstance(trouble, TimeoutError):
        try:  # for this process alone
            with tempfile.TemporaryDirectory(prefix="peer_dist-", ignore_cleanup_errors=True) as place:
                return _build(compiler, FLAGS, Path(place), "expert_mix")
        except OSError as error:
            trouble = error
    if library is None:
        _say(trouble)
    return library


def _say(trouble: OSError | str) -> None:
    """Warn, on one rank of each machine."""
    rank = next((os.environ[name] for name in _LOCAL_RANKS if name in os.environ), None)
    if rank is None and dist.is_available() and dist.is_initialized():
        rank = str(dist.get_rank())
    if rank in (None, "0"):
        warnings.warn(
            f"PEER layers take about twice as long on this CPU, and 3 to 6 times as long with bfloat16 tables, because "
            f"their C library could not be built ({trouble}): install gcc, or name a compiler in CC",
            stacklevel=2,
        )


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
    BUILT.mkdir(exist_ok=True)
    for level, name in _ahead_names().items():
        try:
            _build(compiler, (*portable, f"-march={level}") if level else portable, BUILT, name)
        except OSError as error:
            raise RuntimeError(str(error)) from error
    return list(_ahead())


def _built_ahead() -> ctypes.CDLL | None:
    """The best library built ahead that this processor can run."""
    features = set(cpu_features().split())
    usable = (path for path, level in _ahead().items() if _LEVELS.get(level, set()) <= features)
    return next(filter(None, map(_open, usable)), None)


def _ahead() -> dict[Path, str]:
    """The libraries that were built ahead from this source, best first, and the level that each is for ("": any)."""
    return {path: level for level, name in _ahead_names().items() for path in sorted(BUILT.glob(f"{name}-*.so"))}


def _ahead_names() -> dict[str, str]:
    version, machine = _digest(b"\0".join(_sources().values())), platform.machine()
    levels = _LEVELS if machine == "x86_64" else [""]
    return {level: f"expert_mix-{level or machine}-{version}" for level in levels}


def _cache_folder() -> Path:
    """The user's folder of compiled libraries, made if need be.

    Raises:
        OSError: there is none, it cannot be made, or others can write to it: what they put there must not run.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # as the standard asks
        base = os.path.join(os.path.expanduser("~"), ".cache")
    if not os.path.isabs(base):
        raise OSError("there is no home folder")
    return private_folder(Path(base, "peer_dist"))


def _is_ours(path: Path) -> bool:
    """Whether only this user, and root, can change a file."""
    try:
        status = path.stat()
    except OSError:
        return False
    return sys.platform == "win32" or (status.st_uid == os.geteuid() and not status.st_mode & 0o022)


def _cached_name(compiler: tuple[str, ...] | None) -> str:
    """How the names of cached libraries begin: those that this compiler built, or any.

    Machines of several kinds may share a home folder. Only Linux says what a processor has; elsewhere each machine has
    its own.
    """
    kind = cpu_features(), "" if sys.platform == "linux" else platform.node()
    key = _digest(b"\0".join([*_sources().values(), *(part.encode() for part in (*FLAGS, *kind))]))
    return f"expert_mix-{key}-" + ("*" if compiler is None else _digest(" ".join(compiler).encode())[:8])


def _load(folder: Path, name: str) -> ctypes.CDLL | None:
    """A library of the user's folder that is whole, and the user's own."""
    paths = (path for path in sorted(folder.glob(f"{name}-*.so")) if _is_ours(path))
    return next(filter(None, map(_open, paths)), None)


def _open(path: Path) -> ctypes.CDLL | None:
    """The library at a path; None if it is not one of ours, or not whole: loading half of one can end the process."""
    try:
        whole = path.stem.endswith("-" + _digest(path.read_bytes()))
        return declare(ctypes.CDLL(str(path))) if whole else None
    except (OSError, AttributeError):
        return None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


@lru_cache(maxsize=1)
def _sources() -> dict[str, bytes]:
    """The files of the library by name: those that are compiled end in ``.c``."""
    folder = resources.files("peer_dist.kernels")
    return {name: folder.joinpath(name).read_bytes() for name in ("native.c", "updates.c", "files.c", "rows.h")}


def _compiler() -> tuple[str, ...] | None:
    """The command that compiles C: CC, which may have arguments, if there is such a program."""
    chosen = os.environ.get("CC", "")
    commands = [[chosen]]
    with contextlib.suppress(ValueError):  # a quote that does not end
        commands.append(shlex.split(chosen))
    for command in (*commands, ["cc"], ["gcc"], ["clang"]):
        if command and (program := shutil.which(command[0])):
            return program, *command[1:]
    return None


def _build(compiler: tuple[str, ...], flags: tuple[str, ...], folder: Path, name: str) -> ctypes.CDLL:
    """Build a library as ``name-<digest of the file>.so``.

    It is built in a folder of its own and renamed, so that ranks that start together do not meet a half.

    Raises:
        OSError: it cannot be built, written or loaded; a ``TimeoutError`` if the compiler hangs.
    """
    for left in folder.glob("building-*"):  # by a process that was killed
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > 3600:
                shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix="building-", dir=folder, ignore_cleanup_errors=True) as place:
        built = Path(place, "native.so")
        for file, code in _sources().items():
            Path(place, file).write_bytes(code)
        _compile(compiler, flags, built)
        built.chmod(0o755)
        path = folder / f"{name}-{_digest(built.read_bytes())}.so"
        os.replace(built, path)
    library = _open(path)
    if library is None:
        path.unlink()
        raise OSError(f"what {shlex.join(compiler)} makes cannot be loaded from {folder}")
    return library


def _compile(compiler: tuple[str, ...], flags: tuple[str, ...], built: Path) -> None:
    """Of the sources beside ``built``. Without OpenMP on one thread, say by Apple's compiler, and without the flag for
    this processor if need be.
    """
    codes = [str(built.with_name(name)) for name in _sources() if name.endswith(".c")]
    portable = tuple(flag for flag in flags if flag != "-march=native")
    for attempt in ((*flags, "-fopenmp"), flags, (*portable, "-fopenmp"), portable):
        failure = _run([*compiler, *attempt, *codes, "-o", str(built), "-lm"], built.parent)
        if failure is None:
            return
    raise OSError(f"{shlex.join(compiler)} failed: {failure}")


def _run(command: list[str], folder: Path) -> str | None:
    """Run a compiler, whose files are kept to a folder; None, or what it says of its failure."""
    output = folder / "output"
    environ = os.environ | {"TMPDIR": str(folder)}
    with output.open("wb") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environ, start_new_session=True
        )
    try:
        code = process.wait(COMPILER_SECONDS)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"{command[0]} did not end within {COMPILER_SECONDS} s") from None
    finally:
        if process.poll() is None:  # it hangs, or somebody interrupts us: with all that it has started
            os.killpg(process.pid, signal.SIGKILL) if sys.platform != "win32" else process.kill()
            process.wait()
    lines = [f"exit status {code}", *output.read_text(errors="replace").splitlines()]
    return None if code == 0 else next((line for line in lines if "error" in line), lines[-1])
