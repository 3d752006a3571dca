"""Tables to be stepped, what they become, and the steps of the fast backends compared with those of plain PyTorch."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from peer_dist.kernels.eight_bit import CODES, gradient_dtype, quantised
from peer_dist.kernels.rounding import Rounding
from peer_dist.kernels.updates import Plain, Step

KINDS = ("adam", "rowwise_adam", "rowwise_adagrad")
WAYS = ("float32", "master", "rounded")
"""A float32 table; one of bfloat16 with a float32 master; one of bfloat16 that is rounded at random."""
CASES = list(itertools.product(KINDS, WAYS, [False, True]))
"""With whether only some rows are touched."""
EIGHT_CASES = list(itertools.product(KINDS, CODES, [False, True]))
"""The same of tables of eight bits."""
SUM_ULPS = 8
"""How far a row's mean may lie from plain PyTorch's, which adds in another order: in ulps, for up to 5000 columns."""


class Table:
    """A table's weights and moments, and a gradient; ``arguments`` are those of a backend's ``update_rows``.

    Args:
        odd: numbers that stand in the gradient's first row.
        named: rows are called by other numbers where they are rounded.
    """

    def __init__(
        self, kind: str, way: str, lazy: bool, rows: int, columns: int, seed: int = 0, *,
        odd: tuple[float, ...] = (), named: bool = False,
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(seed)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        weight = drawn(rows, columns)
        self.table, self.scales = weight if way == "float32" else weight.bfloat16(), None
        if way in CODES:  # of magnitudes of all kinds
            weight *= torch.exp2(torch.randint(-155, 100, (rows, 1), generator=generator).float())
            self.table, self.scales = quantised(weight, CODES[way])
        self.master = weight.clone() if way == "master" else None
        self.moments = {} if kind == "rowwise_adagrad" else {"exp_avg": drawn(rows, columns)}
        self.moments |= {"exp_avg_sq": drawn(rows, columns) ** 2} if kind == "adam" else {"row_sq": drawn(rows) ** 2}
        self.rows = torch.rand(rows, generator=generator).argsort()[: rows // 3].sort().values if lazy else None
        self.grad = drawn(rows if self.rows is None else len(self.rows), columns).to(gradient_dtype(self.table))
        for column, value in enumerate(odd[:columns] if len(self.grad) else ()):
            self.grad[0, column] = value
        self.rounding = Rounding(-0x123456789ABCDEF, 5, 6 * (seed % 3)) if way == "rounded" or way in CODES else None
        self.numbers = torch.randint(2**31 - 5, (len(self.grad),), generator=generator) if named else None
        self.step = Step.of(kind, 0.02, (0.8, 0.9), 1e-4, 0.1, count=3, scale=0.3, dim=max(1, columns), lazy=lazy)

    def stepped(self, backend: Any, device: str = "cpu", squares: Tensor | None = None) -> dict[str, Tensor]:
        """What a backend makes of a copy."""

        def there(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.to(device, copy=True)

        table, master = there(self.table), there(self.master)
        moments = {name: there(value) for name, value in self.moments.items()}
        scales, numbers = there(self.scales), there(self.numbers)
        more = () if scales is None and numbers is None else (scales, numbers)
        backend.update_rows(
            self.step, there(self.grad), table, moments, master, there(self.rows), there(squares), self.rounding, *more
        )
        parts = {"table": table, "scales": scales, "master": master, **moments}
        return {name: value.cpu() for name, value in parts.items() if value is not None}

    def check(self, backend: Any, device: str = "cpu") -> None:
        """The same bits as of plain PyTorch where the rows' sums are given, and nearly the same sums where not."""
        squares = backend.row_squares(self.grad.to(device)).cpu()
        wanted = Plain.row_squares(self.grad)
        torch.testing.assert_close(squares, wanted, rtol=SUM_ULPS * 2**-24, atol=0, equal_nan=True)
        same_bits(self.stepped(backend, device, squares), self.stepped(Plain, squares=squares))
        same_bits(self.stepped(backend, device), self.stepped(Plain, squares=squares))


def same_bits(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """All NaN being one."""
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=0, equal_nan=True, msg=f"of {name}")
