"""What is known of this machine and its processes."""

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from peer_dist import machine


def test_the_processor_has_a_name_and_cores():
    assert machine.cpu_name().strip()
    assert 1 <= machine.usable_cores() <= os.cpu_count()
    assert 0 < machine.free_memory() <= psutil.virtual_memory().total


def test_a_processor_of_which_the_kernel_does_not_say_the_name(monkeypatch):
    named = machine.cpu_name()
    monkeypatch.setattr(machine, "_cpu_lines", lambda *keys: [])
    machine.cpu_name.cache_clear()
    assert machine.cpu_name().strip()
    assert machine.cpu_features() == platform.machine()
    monkeypatch.undo()
    machine.cpu_name.cache_clear()
    assert machine.cpu_name() == named


def test_a_container_limits_memory(monkeypatch, tmp_path):
    real = machine.Path
    monkeypatch.setattr(machine, "Path", lambda path: tmp_path if path == "/sys/fs/cgroup" else real(path))
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    assert machine.free_memory() == 4000000
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.free_memory() > 4000000


@pytest.mark.skipif(platform.system() != "Linux", reason="control groups are Linux's")
def test_the_most_memory_is_what_a_control_group_allows():
    whole = psutil.virtual_memory().total + psutil.swap_memory().total
    assert 0 < machine.most_memory() <= whole
    group = Path(f"/sys/fs/cgroup/memory/peer_dist-most-{os.getpid()}")
    if not (group.parent / "memory.limit_in_bytes").exists() or not os.access(group.parent, os.W_OK):
        pytest.skip("no control group can be made here")
    group.mkdir()
    ask = "from peer_dist import machine; input(); print(machine.most_memory())"
    child = subprocess.Popen([sys.executable, "-c", ask], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        (group / "memory.limit_in_bytes").write_text(str(1 << 30))
        (group / "cgroup.procs").write_text(str(child.pid))
        assert child.communicate("\n")[0] == f"{1 << 30}\n"
    finally:
        child.kill()
        child.wait()
        group.rmdir()


def test_a_process_is_told_from_others_by_its_start():
    assert machine.process_start(os.getpid()) == machine.process_start(os.getpid()) != ""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert machine.process_start(child.pid) not in ("", machine.process_start(os.getpid()))
    child.stdin.close()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert machine.process_start(child.pid) == ""  # ended, and not yet reaped
    child.wait()
    assert machine.process_start(child.pid) == ""


@pytest.mark.skipif(platform.system() != "Linux", reason="elsewhere both come from psutil")
def test_start_and_age_without_the_kernels_files(monkeypatch):
    """As on another system, where psutil alone says when a process began."""
    age = machine.process_age()
    assert age == pytest.approx(time.time() - psutil.Process().create_time(), abs=1.5)
    monkeypatch.setattr(psutil, "LINUX", False)
    assert machine.process_age() == pytest.approx(age, abs=2)
    assert machine.process_start(os.getpid()) == machine.process_start(os.getpid()) != ""
    assert machine.process_start(2**22 + 1) == ""
    assert machine.process_space() == platform.node()
