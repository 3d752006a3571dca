"""What the watchdog makes of what it knows, without a rank or a clock."""

import dataclasses

import pytest

from peer_dist.ranks.verdict import Beat, Verdict, gone_sentence, judge, limit

SECONDS, INTERVAL = 10.0, 0.5  # soon, after a lost connection, is 2 s
WORKS = Beat(
    number=7, step=3, phase="step", span="experts", collectives=20, idle=0.0, where="at layers/peer.py:9", waits=False
)
WAITS = dataclasses.replace(WORKS, span="dispatch", where="wait at sharding/exchange.py:5", waits=True)


def verdict_of(*beats, silence=None, since_loss=0.0):
    known = dict.fromkeys(range(len(beats)), 0.0) | (silence or {})
    return judge(dict(enumerate(beats)), known, since_loss, SECONDS, INTERVAL)


def still(beat, **changes):
    """As long without a move as is more than allowed."""
    return dataclasses.replace(beat, idle=10.1, **changes)


def test_whoever_works_or_waits_is_left_in_peace():
    assert verdict_of(WORKS, WAITS, WAITS) is None
    assert verdict_of(still(WAITS), dataclasses.replace(WORKS, idle=9.9)) is None, "the one that moved last counts"
    assert verdict_of(WORKS, WORKS, silence={1: 9.9}) is None


def test_silence_is_the_end_of_a_rank():
    assert verdict_of(WORKS, WAITS, WORKS, silence={1: 10.1}) == Verdict(
        "rank 1 is gone: no sign of life for 10.1 s, last in step 3, dispatch, wait at sharding/exchange.py:5", (1,)
    )
    both = verdict_of(WORKS, WORKS, WORKS, silence={1: 10.1, 2: 12.0})
    assert both.text.startswith("ranks 1, 2 are gone: no sign of life for 12.0 s, last in step 3, experts")
    assert both.gone == (1, 2)


@pytest.mark.parametrize("phase", ["start", "first step", "validation", "save"])
def test_long_phases_have_ten_times_as_long(phase):
    long = dataclasses.replace(WORKS, phase=phase, span="", where="")
    assert limit(SECONDS, [WORKS, long]) == 10 * limit(SECONDS, [WORKS]) == 100.0
    assert verdict_of(WORKS, long, silence={1: 99.0}) is None
    assert verdict_of(WORKS, long, silence={1: 100.1}).text.endswith(f"100.1 s, last in {phase}")
    assert verdict_of(*[dataclasses.replace(long, idle=99.0)] * 2) is None
    assert verdict_of(dataclasses.replace(long, idle=100.1), still(WORKS)) is None, "one of them is enough"


def test_after_a_lost_connection_a_moment_of_silence_is_enough():
    lost = dataclasses.replace(WAITS, lost=True)
    assert verdict_of(lost, WORKS, silence={1: 1.9}, since_loss=3.0) is None
    assert verdict_of(lost, WORKS, silence={1: 2.1}, since_loss=3.0).gone == (1,)
    saves = dataclasses.replace(WORKS, phase="save")
    assert verdict_of(lost, saves, silence={1: 2.1}, since_loss=3.0).gone == (1,), "whatever its phase"


def test_a_lost_connection_between_living_ranks_is_the_networks():
    lost = dataclasses.replace(WAITS, lost=True)
    assert verdict_of(lost, WORKS, lost, since_loss=10.0) is None
    wanted = "ranks 0, 2 lost a connection, but every rank is alive: look at the network"
    assert verdict_of(lost, WORKS, lost, since_loss=10.1) == Verdict(wanted)


def test_the_error_of_a_rank_is_quoted_before_its_silence():
    failed = dataclasses.replace(WORKS, failed="KeyError: 'x'", phase="save", span="", where="")
    got = verdict_of(WAITS, WORKS, failed, silence={1: 10.1, 2: 100.1})
    assert got == Verdict("rank 2 is gone: it failed with KeyError: 'x', last in save", (1, 2))
    assert verdict_of(WAITS, failed) is None, "until it is silent"


def test_a_hang_is_blamed_on_who_does_not_wait():
    assert verdict_of(still(WAITS), still(WORKS), still(WAITS)) == Verdict(
        "rank 1 hangs: nothing for 10.1 s, last in step 3, experts, at layers/peer.py:9; "
        "the others wait, last in step 3, dispatch, wait at sharding/exchange.py:5 (rank 0)"
    )


def test_if_all_wait_it_is_who_has_begun_the_fewest_collectives():
    behind = still(WAITS, collectives=19)
    assert verdict_of(still(WAITS), behind, still(WAITS), behind).text.startswith("ranks 1, 3 hang: nothing for 10.1 s")
    earlier = still(WAITS, step=2, collectives=30)
    assert verdict_of(earlier, still(WAITS)).text.startswith("rank 0 hangs"), "of the earlier step"
    assert verdict_of(*[still(WAITS)] * 3).text.startswith("all 3 ranks hang: nothing for 10.1 s, last in step 3")
    assert verdict_of(*[still(WORKS)] * 2).text.startswith("all 2 ranks hang: nothing for 10.1 s, last in step 3")


def test_so_it_is_if_none_is_seen_to_wait():
    """With NCCL every rank, the culprit too, stands where it reads a number from its device."""
    behind = still(WORKS, collectives=19)
    text = verdict_of(still(WORKS), behind, still(WORKS)).text
    assert text.startswith("rank 1 hangs: nothing for 10.1 s, last in step 3, experts")
    assert text.endswith("(rank 0)")


def test_words_travel_and_may_be_missing():
    assert Beat.parse(still(WAITS, failed="x").json()) == still(WAITS, failed="x")
    assert gone_sentence([0], "no answer for 3.0 s", {}) == "rank 0 is gone: no answer for 3.0 s"
