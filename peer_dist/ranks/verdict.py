"""Who is gone or hangs, by what the ranks have told of themselves: no clock, no connection, nothing but the question.

:mod:`peer_dist.ranks.watchdog` gathers what is known, asks :func:`judge`, and does what follows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from peer_dist.ranks.world import named

_LONG_PHASES, _LONGER = ("start", "first step", "validation", "save"), 10


@dataclass(frozen=True)
class Beat:
    """What a rank tells of itself, many times within the watchdog's limit.

    Attributes:
        number: of this word; while it stays the same the rank has told nothing new.
        step, phase, span: where its process is (:class:`peer_dist.tracing.Position`).
        collectives: how many collectives it has begun.
        idle: seconds for which nothing of this has changed.
        where: the line of its main thread, as the end of a sentence.
        waits: whether it waits there for other ranks.
        lost: whether its connection to another rank broke.
        failed: the error that ends it; empty without.
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
        gone: the ranks that hear no verdict any more.
    """

    text: str
    gone: tuple[int, ...] = ()


def judge(
    beats: Mapping[int, Beat], silent: Mapping[int, float], torn: float, seconds: float, interval: float
) -> Verdict | None:
    """Find who is gone or hangs; None while the run may go on.

    Args:
        beats: each rank's last word.
        silent: seconds since that word was new, by rank.
        torn: seconds since a rank first said that it lost a connection; 0 while none has.
        seconds: the watchdog's limit.
        interval: seconds between two words of a rank.
    """
    lost = [rank for rank, beat in beats.items() if beat.lost]
    soon = min(max(1.0, 4 * interval), seconds)
    gone = [rank for rank, beat in beats.items() if silent[rank] > (soon if lost else limit(seconds, [beat]))]
    if gone:
        failed = [rank for rank in gone if beats[rank].failed]
        if failed:
            return Verdict(is_gone(failed, f"it failed with {beats[failed[0]].failed}", beats), tuple(gone))
        longest = max(silent[rank] for rank in gone)
        return Verdict(is_gone(gone, f"no sign of life for {longest:.1f} s", beats), tuple(gone))
    if torn > max(10.0, 10 * interval):
        return Verdict(f"{named(lost, {})} lost a connection, but every rank is alive: look at the network")
    return _hanging(beats, seconds)


def limit(seconds: float, beats: Iterable[Beat]) -> float:
    """For how long ranks with these last words may be silent: longer in phases that are long and have no spans."""
    return seconds * (_LONGER if any(beat.phase in _LONG_PHASES for beat in beats) else 1)


def is_gone(ranks: Sequence[int], why: str, beats: Mapping[int, Beat]) -> str:
    """The sentence on ranks that are gone, with where the first of them last was, as far as is known."""
    return f"{_names(ranks)} gone: {why}{_last_of(beats.get(ranks[0]))}"


def _hanging(beats: Mapping[int, Beat], seconds: float) -> Verdict | None:
    idle = min(beat.idle for beat in beats.values())
    if idle <= limit(seconds, beats.values()):
        return None
    culprits = [rank for rank, beat in beats.items() if not beat.waits]
    if not culprits:
        behind = min((beat.step, beat.collectives) for beat in beats.values())
        culprits = [rank for rank, beat in beats.items() if (beat.step, beat.collectives) == behind]
    if len(culprits) == len(beats):
        return Verdict(f"all {len(beats)} ranks hang: nothing for {idle:.1f} s{_last_of(beats[0])}")
    waiting = min(beats.keys() - culprits)
    return Verdict(
        f"{_names(culprits, 'hangs', 'hang')}: nothing for {idle:.1f} s{_last_of(beats[culprits[0]])}; "
        f"the others wait{_last_of(beats[waiting])} (rank {waiting})"
    )


def _last_of(beat: Beat | None) -> str:
    """Where a rank last was, as the end of a sentence."""
    if beat is None:
        return ""
    phase = beat.phase + (f" {beat.step}" if beat.phase == "step" else "")
    return f", last in {phase}" + "".join(f", {word}" for word in (beat.span, beat.where) if word)


def _names(ranks: Sequence[int], one: str = "is", many: str = "are") -> str:
    return f"{named(ranks, {})} {one if len(ranks) == 1 else many}"
