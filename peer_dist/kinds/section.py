"""What every section of a file that users write is: frozen, and without unknown keys."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A section of a configuration, or of a hardware file."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
