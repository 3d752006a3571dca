"""A run's exit codes: what its launcher should do next."""

from __future__ import annotations

import os

DONE = 0  # train.steps is reached: start nothing more
MISTAKE = 2  # told in one sentence, for a person to mend: do not start it again
DIVERGED = 70  # steps were left out without an end, a report is written: do not start it again
PEER_LOST = 71  # another rank died or hangs: start it again
STOPPED = 75  # a signal ended it before train.steps, with a checkpoint saved: start it again (EX_TEMPFAIL)
# Any other code is a crash: start it again, a limited number of times.


def stopped_code() -> int:
    """:data:`STOPPED`, except under torchrun: that would start ranks which left with it again at once."""
    return DONE if "TORCHELASTIC_RUN_ID" in os.environ else STOPPED
