"""Writes large numbers in few characters, for people."""

from __future__ import annotations


def sized(count: float) -> str:
    """A number of bytes in three digits and a unit of a power of 1024, such as ``1.5 GB``."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TB"


def short(number: float) -> str:
    """A count in four digits and a unit of a power of 1000, such as ``4.194M``."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.4g}{unit}"
    return f"{number:.4g}"
