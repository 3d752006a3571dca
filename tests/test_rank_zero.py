"""What one rank does or finds, all of them hear of: results, and the same errors."""

import pytest
import torch.distributed as dist

from peer_dist.ranks.rank_zero import first_problem, from_every_rank, on_rank_zero
from tests.ranks import run_ranks


class NoRoomError(RuntimeError):
    """What the action below fails with."""


class DiskFullError(NoRoomError):
    """A kind of it."""


def case_results(rank, world_size):
    calls = []
    result = on_rank_zero(lambda: calls.append(rank) or {"from": rank}, raises=NoRoomError)
    return result, calls


def test_rank_zero_alone_acts_and_all_have_its_result():
    assert run_ranks(case_results, 3) == [({"from": 0}, [0]), ({"from": 0}, []), ({"from": 0}, [])]


def fail():
    raise DiskFullError("no room")


def case_failure(rank, world_size):
    with pytest.raises(NoRoomError) as caught:
        on_rank_zero(fail, raises=NoRoomError)
    dist.barrier()  # nobody was left waiting
    return type(caught.value).__name__, str(caught.value)


def test_its_failure_is_every_ranks():
    assert run_ranks(case_failure, 2) == [("NoRoomError", "no room")] * 2


def test_without_a_process_group_this_process_is_rank_zero():
    assert not dist.is_initialized()
    assert on_rank_zero(lambda: 3, raises=NoRoomError) == 3
    with pytest.raises(NoRoomError, match="no room"):
        on_rank_zero(fail, raises=NoRoomError)


def case_problems(rank, world_size):
    gathered = from_every_rank(rank * 10)
    alone = [dist.new_group([number]) for number in range(world_size)][rank]
    problems = [first_problem(f"rank {rank} is full" if rank in full else None) for full in ((), (1, 2), (2,))]
    return gathered, from_every_rank(rank, alone), problems


def test_any_ranks_problem_is_every_ranks():
    wanted = [None, "rank 1 is full", "rank 2 is full"]
    assert run_ranks(case_problems, 3) == [([0, 10, 20], [rank], wanted) for rank in range(3)]
