"""What each function of the C library takes, and the check of all of it before a call: C believes what it is told."""

from __future__ import annotations

import ctypes
from typing import Any, NoReturn

import torch
from torch import Tensor

from peer_dist.kernels.allocation import address

F32, BF16, I32, I64, U8 = torch.float32, torch.bfloat16, torch.int32, torch.int64, torch.uint8
I8, E4M3 = torch.int8, torch.uint8  # codes


class Signature:
    """One function of the C library: its integers, then its tensors, each under the name that C has for it.

    Args:
        integers: their names, in C's order.
        limits: what must hold between the sizes.
        optional: the names of tensors that may be None.
        returns: whether the function returns an integer.
        tensors: in C's order, dtype and shape of each. A size that has no value when its bare name is met is what the
            tensor says; all others must be as they are here.
    """

    def __init__(
        self, integers: str, *limits: str, optional: str = "", returns: bool = False, **tensors: tuple[Any, ...]
    ) -> None:
        self.integers, self.optional, self.returns = integers.split(), optional.split(), returns
        self.limits = [compile(limit, limit, "eval") for limit in limits]
        self.tensors = {
            name: (dtype, [(size, None if size.isidentifier() else compile(size, size, "eval")) for size in shape])
            for name, (dtype, *shape) in tensors.items()
        }


def _signatures(row: torch.dtype) -> dict[str, Signature]:
    """Those of the functions that native.c has once per dtype of a table's row."""
    vectors, per_pick = (F32, "tokens", "dim"), (F32, "picks")

    def rows_of(*names: str, scales: str = "{}_scales") -> dict[str, Any]:
        """Tables, each with the scales of its rows, if it has codes."""
        each: dict[str, Any] = {}
        for name in names:
            each[name] = row, "rows", "dim"
            if row in (I8, E4M3):
                each[scales.format(name)] = F32, "rows"
        return each

    table, both = rows_of("table", scales="scales"), rows_of("down", "up")
    products = {
        "dots": Signature("tokens dim", x=vectors, **_PICKS, **table, out=per_pick),
        "mix": Signature("tokens dim", weight=per_pick, **_PICKS, **table, out=vectors),
        "forward": Signature(
            "tokens dim kind", "kind <= 2", x=vectors, **_PICKS, gate=per_pick, **both, pre=per_pick, y=vectors
        ),
        "backward": Signature(
            "tokens dim kind", "kind <= 2", dy=vectors, **_PICKS, pre=per_pick, gate=per_pick, **both, dx=vectors,
            dgate=per_pick, dpre=per_pick, hidden=per_pick,
        ),
    }  # fmt: skip
    if row in (I8, E4M3):  # gradients are in floating-point numbers
        return products
    grad = Signature(
        "segments dim stream add", "segments <= written", "stream <= 1", "add <= 1", optional="rows",
        weight=per_pick, x=vectors, token=(I32, "picks"), order=(I32, "picks"), starts=(I64, "segments + 1"),
        rows=(I64, "segments"), out=(row, "written", "dim"),
    )  # fmt: skip
    return products | {"table_grad": grad}


def _updates() -> dict[str, Signature]:
    """Those of updates.c, whose tensors depend on what there is beside the gradient."""
    given = {"row": (I64, "touched"), "squares": (F32, "touched")}
    moments = {"exp_avg": (F32, "rows", "dim"), "exp_avg_sq": (F32, "rows", "dim"), "row_sq": (F32, "rows")}
    numbers, optional = (F32, "10"), " ".join(("called", *given, *moments))

    def of(grad: torch.dtype, *, place: tuple[Any, ...] | None = None, **weights: tuple[Any, ...]) -> Signature:
        places = {} if place is None else {"place": place, "called": (I64, "touched")}
        return Signature(
            "touched rows dim", "touched <= rows", optional=optional, returns=True, numbers=numbers, **places,
            grad=(grad, "touched", "dim"), **given, **weights, **moments,
        )  # fmt: skip

    return {
        "update_in_place": of(F32, weight=(F32, "rows", "dim")),
        "update_master": of(BF16, weight=(F32, "rows", "dim"), table=(BF16, "rows", "dim")),
        "update_stochastic": of(BF16, place=(I64, "3"), table=(BF16, "rows", "dim")),
        "update_i8": of(BF16, place=(I64, "3"), table=(I8, "rows", "dim"), scales=(F32, "rows")),
        "update_e4m3": of(BF16, place=(I64, "3"), table=(E4M3, "rows", "dim"), scales=(F32, "rows")),
    }


_PICKS: dict[str, Any] = {"offsets": (I64, "tokens + 1"), "expert": (I64, "picks")}
# What table_grad takes of `group` is right in itself; how long x and out must be for it, the caller says by "tokens"
# and "written".
SIGNATURES = {
    **_updates(),
    "squares_f32": Signature("rows dim", grad=(F32, "rows", "dim"), out=(F32, "rows")),
    "squares_bf16": Signature("rows dim", grad=(BF16, "rows", "dim"), out=(F32, "rows")),
    "top_pairs": Signature(
        "queries n k", "1 <= k <= min(n, 64)", "n < 2**31",
        first=(F32, "queries", "n"), second=(F32, "queries", "n"), number=(I64, "queries", "k"),
        score=(F32, "queries", "k"),
    ),
    "group": Signature(
        "tokens rows", "max(tokens, picks) < 2**31", "rows <= 2**32", "min(picks, rows) <= most", returns=True,
        **_PICKS, pairs=(I64, "2 * picks"), order=(I32, "picks"), token=(I32, "picks"), touched=(I64, "most"),
        starts=(I64, "most + 1"),
    ),
    "add_rows": Signature(
        "rows tokens dim", weight=(F32, "picks"), x=(F32, "tokens", "dim"), **_PICKS, out=(F32, "rows", "dim")
    ),
    "scratch_rows": Signature(
        "touched dim blocks", returns=True,
        file=(I64, "5"), row=(I64, "touched"), values=(U8, "touched", "dim"), written=(U8, "blocks"), moved=(I64, "2"),
    ),
    "wrong_picks": Signature("tokens picks rows", returns=True, **_PICKS),
    **{
        f"{name}_{kind}": signature
        for kind, row in {"f32": F32, "bf16": BF16, "i8": I8, "e4m3": E4M3}.items()
        for name, signature in _signatures(row).items()
    },
}  # fmt: skip
_FUNCTIONS = {"min": min, "max": max}  # that sizes and limits are written with


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Tell ctypes what the functions take.

    Raises:
        AttributeError: the library lacks one.
    """
    for name, signature in SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes = [ctypes.c_int64] * len(signature.integers) + [ctypes.c_void_p] * len(signature.tensors)
        function.restype = ctypes.c_int64 if signature.returns else None
    return library


def call(library: ctypes.CDLL, name: str, **given: Any) -> int:
    """Call a function of the C library with what it takes by name; Python's lock is let go of meanwhile.

    Integers that are sizes of tensors need not be given.

    Raises:
        TypeError: an argument of another kind or dtype.
        ValueError: a tensor of another shape, on another device, not contiguous or without memory of its own (meta,
            fake, functional or distributed tensors), sizes that the function does not serve, or offsets that do not
            ascend from 0 to the number of picks.
        IndexError: picks of rows that the table does not have.
    """
    signature = SIGNATURES[name]
    sizes: dict[str, int] = {}
    for key, value in given.items():
        if key not in signature.tensors:
            if type(value) is not int or not 0 <= value < 1 << 63:
                raise TypeError(f"{name}: {key} must be an int from 0, not {_said(value)}")
            sizes[key] = value
    addresses = {key: _checked(name, key, given.get(key), sizes) for key in signature.tensors}
    for limit in signature.limits:
        if not eval(limit, _FUNCTIONS, sizes):
            has = ", ".join(f"{size} = {sizes[size]}" for size in limit.co_names if size in sizes)
            raise ValueError(f"{name}: {limit.co_filename} does not hold for {has}")
    if "expert" in addresses:
        picked = addresses["offsets"], addresses["expert"]
        if library.wrong_picks(sizes["tokens"], sizes["picks"], sizes["rows"], *picked):
            _refuse_picks(name, sizes, given["offsets"], given["expert"])
    return getattr(library, name)(*(sizes[key] for key in signature.integers), *addresses.values()) or 0


def _checked(name: str, key: str, value: Any, sizes: dict[str, int]) -> int | None:
    """The address of a tensor that is what the function takes; sizes that it is the first to tell are noted."""
    signature = SIGNATURES[name]
    if value is None and key in signature.optional:
        return None
    dtype, shape = signature.tensors[key]
    if not isinstance(value, Tensor) or value.dtype is not dtype:
        raise TypeError(f"{name}: {key} must be a tensor of {dtype}, not {_said(value)}")
    place = address(value)
    if place is None:
        raise ValueError(
            f"{name}: {key} must be contiguous and in memory that this process can read, which {_said(value)} is not"
        )
    own = value.shape
    fits = len(own) == len(shape)
    for size, (text, code) in zip(own, shape):
        if type(size) is not int:  # torch.jit hands out tensors
            raise TypeError(f"{name}: {key} has sizes that are no ints, as while it is traced, which C cannot take")
        fits = fits and size == (sizes.setdefault(text, size) if code is None else eval(code, _FUNCTIONS, sizes))
    if not fits:
        wanted = ", ".join(text for text, _ in shape)
        raise ValueError(f"{name}: {key} must be [{wanted}] where {sizes}, not {_said(value)}")
    return place


def _refuse_picks(name: str, sizes: dict[str, int], offsets: Tensor, expert: Tensor) -> NoReturn:
    if offsets[0] != 0 or offsets[-1] != sizes["picks"] or (offsets[1:] < offsets[:-1]).any():
        raise ValueError(f"{name}: the picks' offsets do not ascend from 0 to {sizes['picks']}, the number of picks")
    low, high = (int(end) for end in torch.aminmax(expert))
    raise IndexError(f"{name}: picks of rows {low} to {high} from a table of {sizes['rows']} rows")


def _said(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    return f"a {type(value).__name__} of {value.dtype} on {value.device}, {list(value.shape)}"
