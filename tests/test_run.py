"""What a run tells its launcher and its operator: exit codes, start-up times, slow ranks, a folder taken over."""

import json
import os
import signal
import time

import psutil
import pytest
import torch.distributed as dist
from rich.console import Console

from peer_dist.config import parse_config
from peer_dist.ranks import exit_codes
from peer_dist.ranks.lock import LockError, RunLock
from peer_dist.ranks.signals import StopRequest
from peer_dist.training.startup import Startup
from tests.ranks import run_ranks
from tests.runs import make_trainer, metrics_of, scalars_of, with_keys


def coded_run(rank, world_size, tree, stop_at=None, elastic=False):
    """A run's exit code; in step ``stop_at`` rank 1 is asked to stop."""
    from peer_dist.training import Trainer

    class Signalled(Trainer):
        def step(self):
            if rank == 1 and self.steps_done == stop_at:
                os.kill(os.getpid(), signal.SIGUSR1)
            return super().step()

    if elastic:
        os.environ["TORCHELASTIC_RUN_ID"] = "x"
    with StopRequest() as stop:
        return Signalled(parse_config(tree, "test")).run(stop)


def test_exit_codes(small):
    """75 asks for another start; torchrun would start again at once whatever is not 0."""
    assert (exit_codes.DONE, exit_codes.MISTAKE, exit_codes.STOPPED) == (0, 2, 75)
    small = with_keys(small, parallel={"expert": 2}, train={"steps": 6})
    assert run_ranks(coded_run, 2, small, 1) == [75, 75]
    assert run_ranks(coded_run, 2, small, 3, True) == [0, 0]
    assert run_ranks(coded_run, 2, small, 5) == [0, 0], "stopped in its last step, it is done"
    assert run_ranks(coded_run, 2, small) == [0, 0], "nothing to do"


def test_a_run_that_lost_its_folder_writes_no_more(small, tmp_path):
    assert run_ranks(overtaken, 2, with_keys(small, parallel={"expert": 2})) == ["another run has taken it over"] * 2
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"run.lock"}


def overtaken(rank, world_size, tree):
    trainer = make_trainer(tree)
    lock = RunLock(tree["checkpoint"]["dir"]) if rank == 0 else None
    if lock is not None:
        lock.path.parent.mkdir()
        lock.path.write_text(json.dumps({"host": "other"}))
        lock.lost = True
    with StopRequest() as stop:
        try:
            trainer.run(stop, lock)
        except LockError as error:
            return str(error).split(": ")[1].partition(";")[0]


def whole_run(rank, world_size, tree):
    """`peer-dist train` from the ranks' own start."""
    return coded_run(rank, world_size, tree)


def test_the_time_to_the_first_step_is_told_by_phase(small):
    small = with_keys(small, train={"steps": 4})
    run_ranks(whole_run, 1, small)
    first, second = metrics_of(small)[1:3]
    phases = [key for key in first if key.startswith("startup/")]
    assert phases == [f"startup/{name}" for name in ("data", "build", "validation", "first_step")]
    assert all(first[phase] >= 0 for phase in phases)
    assert not [key for key in second if key.startswith("startup/")]
    run_ranks(whole_run, 1, with_keys(small, train={"steps": 5}))
    assert "startup/resume" in metrics_of(small)[5]


def calls_of_steps(rank, world_size, tree):
    """Collective calls between the update and the next step, in two steps of a run, and the seconds of the last one."""
    from peer_dist.training import Trainer

    trainer = Trainer(parse_config(tree, "test"))
    calls, all_reduce, read, values = [], dist.all_reduce, trainer.times.read, {}

    def late():
        calls.clear()
        time.sleep(0.3)  # as on a GPU, which has queued work to do still
        return read()

    trainer.times.read = late
    dist.all_reduce = lambda *args, **kwargs: (calls.append(1), all_reduce(*args, **kwargs))[1]
    step, counts = trainer.step, []

    def counted():
        if trainer.steps_done:
            counts.append(len(calls))
        values.update(step())
        return values

    trainer.step = counted
    with StopRequest() as stop:
        trainer.run(stop)
    return counts, values["time/step"]


def test_after_the_update_ranks_agree_on_nothing_and_nothing_is_left_out_of_the_time(small):
    small = with_keys(small, parallel={"expert": 2}, train={"steps": 3}, logging={"interval": 9})
    for counts, seconds in run_ranks(calls_of_steps, 2, small):
        assert counts == [0, 0]
        assert seconds > 0.3


def test_startup_begins_with_the_process():
    startup = Startup()
    startup.ended("import")
    startup.ended("join")
    age = time.time() - psutil.Process().create_time()
    assert startup.seconds["import"] == pytest.approx(age, abs=1)
    assert str(startup).startswith("first step done ")
    assert 0 <= startup.seconds["join"] < 1, "since the last phase ended, not since the process began"
    assert str(startup).endswith(f", join {startup.seconds['join']:.1f}")


def lame_run(rank, world_size, tree, lame):
    """One rank takes long over its experts, in every step; what rank 0 said of it."""
    from peer_dist import kernels
    from peer_dist.tracing import span

    said = []
    forward = kernels.expert_mix_forward

    def slow(*args, **kwargs):
        if rank == lame:
            with span("experts"):
                time.sleep(0.02)
        return forward(*args, **kwargs)

    import peer_dist.sharding.dispatch as routed

    routed.expert_mix_forward = slow
    told = Console.print
    Console.print = lambda self, *args, **kwargs: (said.append(str(args[0])), told(self, *args, **kwargs))[1]
    coded_run(rank, world_size, tree)
    dist.barrier()
    return [line for line in said if "slow rank" in line]


def test_a_slow_rank_is_named_once_while_it_is_slow(small):
    small = with_keys(small, parallel={"expert": 3}, train={"steps": 9, "global_batch_size": 6})
    small = with_keys(small, logging={"interval": 3}, model={"num_layers": 1, "mlp": "peer"})
    lines = run_ranks(lame_run, 3, small, 2)[0]
    assert len(lines) == 1
    assert lines[0].startswith(f"slow rank: 2 on {os.uname().nodename} computes ")
    ratios = scalars_of(small, "speed/slowest_rank_ratio")
    assert [step for step, _ in ratios] == [3, 6, 9]
    assert min(value for _, value in ratios) > 1.2  # other programs may make the others slow too
