"""Which rank is gone or hangs, decided from what the ranks report: without a clock or a connection.

:mod:`peer_dist.ranks.watchdog` gathers the reports, asks :func:`judge`, and acts on the verdict.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from peer_dist.ranks.world import named

_LONG_PHASES = ("start", "first step", "validation", "save")
_LONG_FACTOR = 10  # by which the limit is longer in these


@dataclass(frozen=True)
class Beat:
    """A rank's report on itself, made many times within the watchdog's limit.

    Attributes:
        number: of the report; while it stays the same the rank has reported nothing new.
        step, phase, span: where its process is (:class:`peer_dist.tracing.Position`).
        collectives: number of collectives that it has begun.
        idle: seconds for which none of these has changed.
        where: the line at which its main thread is, as the end of a sentence.
        waits: whether it waits there for other ranks.
        lost: whether its connection to another rank broke.
        failed: the error that ends it; empty if there is none.
    """

    number: int
    step: int
    phase: str
    span: str
    collectives: int
    idle: float
    where: str
    waits: bool
    lost: bool = False
    failed: str = ""

    def json(self) -> str:
        """One line, for :meth:`parse`."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str | bytes) -> Beat:
        """The beat that :meth:`json` wrote."""
        return cls(**json.loads(text))


@dataclass(frozen=True)
class Verdict:
    """Why the run cannot go on.

    Attributes:
        text: a sentence without its full stop.
        gone: ranks that can no longer receive the verdict.
    """

    text: str
    gone: tuple[int, ...] = ()


def judge(
    beats: Mapping[int, Beat], silence: Mapping[int, float], since_loss: float, seconds: float, interval: float
) -> Verdict | None:
    """The verdict on the ranks that are gone or hang; None while the run may go on.

    Args:
        beats: the last report of each rank.
        silence: seconds since that report was new, by rank.
        since_loss: seconds since a rank first reported that it lost a connection; 0 while none has.
        seconds: the watchdog's limit.
        interval: seconds between two reports of a rank.
    """
    lost = [rank for rank, beat in beats.items() if beat.lost]
    soon = min(max(1.0, 4 * interval), seconds)
    gone = [rank for rank, beat in beats.items() if silence[rank] > (soon if lost else limit(seconds, [beat]))]
    if gone:
        failed = [rank for rank in gone if beats[rank].failed]
        if failed:
            return Verdict(gone_sentence(failed, f"it failed with {beats[failed[0]].failed}", beats), tuple(gone))
        longest = max(silence[rank] for rank in gone)
        return Verdict(gone_sentence(gone, f"no sign of life for {longest:.1f} s", beats), tuple(gone))
    if since_loss > max(10.0, 10 * interval):
        return Verdict(f"{named(lost, {})} lost a connection, but every rank is alive: look at the network")
    return _hanging(beats, seconds)


def limit(seconds: float, beats: Iterable[Beat]) -> float:
    """The seconds for which ranks with these last reports may be silent: more in long phases without spans.

    Args:
        seconds: the watchdog's limit.
    """
    return seconds * (_LONG_FACTOR if any(beat.phase in _LONG_PHASES for beat in beats) else 1)


def gone_sentence(ranks: Sequence[int], why: str, beats: Mapping[int, Beat]) -> str:
    """The sentence that says that ranks are gone, and where the first of them last was, if that is known."""
    return f"{_subject(ranks)} gone: {why}{_last_place(beats.get(ranks[0]))}"


def _hanging(beats: Mapping[int, Beat], seconds: float) -> Verdict | None:
    """The verdict that ranks hang; None if one of them has moved within the limit."""
    idle = min(beat.idle for beat in beats.values())
    if idle <= limit(seconds, beats.values()):
        return None
    culprits = [rank for rank, beat in beats.items() if not beat.waits]
    if not culprits or len(culprits) == len(beats):
        # they wait for each other, with NCCL unseen: its calls return at once, and ranks stand where they read a result
        behind = min((beat.step, beat.collectives) for beat in beats.values())
        culprits = [rank for rank, beat in beats.items() if (beat.step, beat.collectives) == behind]
    if len(culprits) == len(beats):
        return Verdict(f"all {len(beats)} ranks hang: nothing for {idle:.1f} s{_last_place(beats[0])}")
    waiting = min(beats.keys() - culprits)
    return Verdict(
        f"{_subject(culprits, 'hangs', 'hang')}: nothing for {idle:.1f} s{_last_place(beats[culprits[0]])}; "
        f"the others wait{_last_place(beats[waiting])} (rank {waiting})"
    )


def _last_place(beat: Beat | None) -> str:
    """Where a rank last was, as the end of a sentence; empty if it never reported."""
    if beat is None:
        return ""
    phase = beat.phase + (f" {beat.step}" if beat.phase == "step" else "")
    return f", last in {phase}" + "".join(f", {word}" for word in (beat.span, beat.where) if word)


def _subject(ranks: Sequence[int], one: str = "is", many: str = "are") -> str:
    """The beginning of a sentence about ranks: their names, and the verb for one or for many."""
    return f"{named(ranks, {})} {one if len(ranks) == 1 else many}"
