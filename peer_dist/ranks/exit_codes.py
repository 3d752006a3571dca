"""A run's exit codes: what its launcher should do next."""

from __future__ import annotations

import os

from peer_dist.mistake import Mistake

DONE = 0  # train.steps is reached: start nothing more
MISTAKE = Mistake.exit_code  # 2: reported in one sentence, for a person to correct: do not start it again
DIVERGED = 70  # too many steps in a row were left out, a report is written: do not start it again
PEER_LOST = 71  # another rank died or hangs: start it again
STOPPED = 75  # a signal ended it before train.steps, with a checkpoint saved: start it again (EX_TEMPFAIL)
# Any other code is a crash: start it again, a limited number of times.


def stopped_code() -> int:
    """The exit code of a run that a signal ended: :data:`STOPPED`, but :data:`DONE` under torchrun.

    torchrun would start ranks that left with another code again at once.
    """
    return DONE if "TORCHELASTIC_RUN_ID" in os.environ else STOPPED
