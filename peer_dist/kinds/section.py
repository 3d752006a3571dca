"""What every section of a file that users write is: frozen, without unknown keys, of exactly the types that it says,
and within bounds. The types of numbers and paths that several sections have are here.

The bounds refuse what no machine could hold, and what would overflow an int64 or a float32 before that was found out.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidatorFunctionWrapHandler, field_validator

from peer_dist.mistake import printable, shown

LARGEST = 1 << 24  # of a width, a length or a batch
MOST_EXPERTS = 1 << 20  # coarse ones
MOST_LAYERS = 4096
MOST_RANKS = 1 << 17
MOST_ROWS = 1 << 40  # of a table
MOST_PICKS = 1 << 14  # of one head, and heads of a layer
MOST_STEPS = 10**12
_MOST_WHOLE = 2**63 - 1
_MOST_FLOAT = 1e37  # a float32 ends a little above 3e38
LONGEST_NAME = 255  # bytes of a file's name, on every usual file system

Size = Annotated[int, Field(ge=1, le=LARGEST)]
Heads = Annotated[int, Field(ge=1, le=MOST_PICKS)]
Rows = Annotated[int, Field(ge=1, le=MOST_ROWS)]
Ranks = Annotated[int, Field(ge=1, le=MOST_RANKS)]
Steps = Annotated[int, Field(ge=1, le=MOST_STEPS)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Rate = Annotated[float, Field(gt=0, le=1e6)]
"""A learning rate, or another factor by which parameters change."""
Coefficient = Annotated[float, Field(ge=0, le=1e6)]
Epsilon = Annotated[float, Field(ge=1e-37, le=1e6)]
"""What is added to a number that is divided by: more than 0 as a float32 too."""


class Section(BaseModel):
    """A section of a configuration, of a hardware file or of a sweep.

    Nothing is converted but whole numbers that are written as floats (``1e3``), and lists that stand for tuples.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="wrap")
    @classmethod
    def _as_it_is_written(cls, value: Any, read: ValidatorFunctionWrapHandler) -> Any:
        taken = read(value)
        _check_kept(value, taken)
        return taken


def _check_kept(given: Any, taken: Any) -> None:
    """Refuse what was taken for something else than is written: ``true`` for 1, ``"3"`` for 3, ``"yes"`` for true.

    Raises:
        ValueError: saying what is wanted.
    """
    if isinstance(taken, bool):
        if not isinstance(given, bool):
            raise ValueError(f"input should be true or false; got {shown(given)}")
    elif isinstance(taken, (int, float)):
        wanted = "a whole number" if isinstance(taken, int) else "a valid number"
        if isinstance(given, bool) or not isinstance(given, (int, float)):
            raise ValueError(f"input should be {wanted}; got {shown(given)}")
        if abs(taken) > (_MOST_WHOLE if isinstance(taken, int) else _MOST_FLOAT):
            raise ValueError(f"input should be a number that a computer can calculate with; got {shown(given)}")
    elif isinstance(taken, Mapping) and isinstance(given, Mapping):
        for key, value in taken.items():
            _check_kept(given.get(key), value)
    elif isinstance(taken, (list, tuple)) and isinstance(given, Sequence):
        for one, value in zip(given, taken):
            _check_kept(one, value)


def _check_path(path: str) -> str:
    if not path.strip():
        raise ValueError(f"input should be a path; got {shown(path)}")
    if "\n" in path or "\t" in path or printable(path) != path:
        raise ValueError(f"{shown(path)} holds control characters, or bytes that are no UTF-8; choose another name")
    longest = max((len(os.fsencode(name)) for name in PurePath(path).parts), default=0)  # of "." there are none
    if longest > LONGEST_NAME:
        raise ValueError(
            f"{shown(path)} holds a name of {longest} bytes, and file systems take {LONGEST_NAME}; shorten it"
        )
    return path


FilePath = Annotated[str, AfterValidator(_check_path)]
"""A path, or the prefix of several, that can be printed, opened and put into a script."""
FolderOrNone = Annotated[str, AfterValidator(lambda path: path and _check_path(path))]
"""The path of a folder, or nothing."""
