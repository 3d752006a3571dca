"""Tensors in scratch files: their rows against plain tensors, their memory, and what becomes of them when a process
ends or a disk fails.
"""

from __future__ import annotations

import ast
import copy
import ctypes
import errno
import gc
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from peer_dist.kernels import disk
from peer_dist.machine import mount_of
from peer_dist.shortage import shortage
from tests.ranks import run_each

DTYPES = (torch.float32, torch.bfloat16, torch.int8, torch.uint8, torch.int64, torch.bool)
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux's own files are read")


def file_of(tensor):
    found = disk._place(tensor)
    assert found is not None
    return found[0]


def some(shape, dtype):
    bits = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, device="cpu")
    return (bits % 2 if dtype == torch.bool else bits).view(dtype).view(shape)


def same(a, b):
    return a.shape == b.shape and torch.equal(disk._bytes(a), disk._bytes(b.contiguous()))


@pytest.fixture(params=["sectors of 512", "sectors of 4096", "no compiler"])
def way(request, monkeypatch):
    """How rows reach the file."""
    if request.param == "no compiler":
        monkeypatch.setattr(disk, "load_library", lambda: None)
    return request.param


def made(shape, dtype, folder, way):
    table = disk.mapped(shape, dtype, folder)
    file = file_of(table)
    if way == "no compiler":
        assert file.sector == 1
    elif file.sector == 1:
        pytest.skip("no C compiler here, or a disk that is always cached")
    elif way == "sectors of 4096":
        file.sector = 4096
    return table


@pytest.mark.parametrize("columns", [1, 3, 128, 250, 256, 1024, 1250, 70001])
def test_rows_are_those_of_a_plain_tensor(columns, way, tmp_path):
    """Whatever was written through the file or through the mapping."""
    torch.manual_seed(columns)
    for dtype in DTYPES:
        length = int(torch.randint(1, 20 if columns > 10_000 else 700, ()))
        table, want = made((length, columns), dtype, tmp_path, way), torch.zeros(length, columns, dtype=dtype)
        assert same(table, want)
        for turn in range(9):
            low = int(torch.randint(0, length, ()))
            high = int(torch.randint(low + 1, length + 1, ()))
            here, there = table[low:high], want[low:high]
            picked = max(1, (high - low) // (1, 2, 20)[turn % 3])
            rows = torch.randperm(high - low)[:picked].sort().values
            values = some((picked, columns), dtype)
            if turn % 4 == 3:
                here[rows] = values
            else:
                disk.write_rows(here, rows, values)
            there[rows] = values
            rows = torch.randint(0, length, (picked,)).sort().values  # some of them more than once
            out = torch.empty(picked, columns, dtype=dtype)
            disk.read_rows(table, rows, out)
            assert same(out, want[rows])
            if turn % 3 == 2:
                assert same(table, want)
        assert same(table, want)


def test_rows_of_one_or_three_axes(way, tmp_path):
    for shape in ((5000,), (300, 3, 50)):
        table, want = made(shape, torch.float32, tmp_path, way), torch.zeros(shape)
        rows = torch.randperm(shape[0])[:99].sort().values
        want[rows] = values = torch.randn(99, *shape[1:])
        disk.write_rows(table, rows, values)
        out = torch.empty_like(values)
        disk.read_rows(table, rows, out)
        assert same(table, want)
        assert same(out, values)


def test_what_is_empty(way, tmp_path):
    none, table = torch.zeros(0, dtype=torch.int64), made((4, 6), torch.int8, tmp_path, way)
    disk.write_rows(table, none, torch.empty(0, 6, dtype=torch.int8))
    disk.read_rows(table, none, torch.empty(0, 6, dtype=torch.int8))
    assert not table.any()
    for shape in ((0, 5), (5, 0), (0,)):
        table = disk.mapped(shape, torch.bfloat16, tmp_path)
        assert table.shape == shape
        assert table.dtype == torch.bfloat16
        assert disk.is_mapped(table)
    wide = disk.mapped((5, 0), torch.bfloat16, tmp_path)
    disk.write_rows(wide, torch.tensor([1, 3]), torch.empty(2, 0, dtype=torch.bfloat16))
    disk.read_rows(wide, torch.tensor([1, 3]), torch.empty(2, 0, dtype=torch.bfloat16))


def test_torchs_defaults_do_not_matter(tmp_path):
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        table = disk.mapped((50, 128), torch.float32, tmp_path)
        rows = torch.tensor([3, 9], device="cpu")
        values, out = (torch.full((2, 128), fill, dtype=torch.float32, device="cpu") for fill in (3.0, 0.0))
        disk.write_rows(table, rows, values)
        disk.read_rows(table, rows, out)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert table.device.type == "cpu"
    assert table.dtype == torch.float32
    assert same(out, values)


def test_tables_are_found_by_where_they_lie(tmp_path):
    table = disk.mapped((10, 8), torch.float32, tmp_path)
    parameter = torch.nn.Parameter(table)
    for found in (table, parameter, parameter.detach(), table[7:], table.view(-1), torch.from_numpy(table.numpy()[3:])):
        assert disk.is_mapped(found)
    for other in (torch.zeros(10, 8), table.clone(), copy.deepcopy(parameter), torch.zeros(3, 8, device="meta")):
        assert not disk.is_mapped(other)
    disk.write_rows(parameter[7:], torch.tensor([1]), torch.ones(1, 8))
    assert table.sum(1).tolist() == [0] * 8 + [8, 0]


@pytest.mark.parametrize("move", [disk.read_rows, disk.write_rows])
def test_what_does_not_fit_is_refused(move, way, tmp_path):
    table, out = made((10, 8), torch.float32, tmp_path, way), torch.zeros(2, 8)
    for rows in ([1, 10], [-1, 3], [4, 2], [0, 1 << 62]):
        with pytest.raises(IndexError, match="not all of a table of 10"):
            move(table, torch.tensor(rows), out)
    with pytest.raises(IndexError, match="not all of a table of 3"):
        move(table[2:5], torch.tensor([2, 3]), out)
    rows = torch.tensor([1, 2])
    for wrong in (out[:1], out.double(), torch.zeros(2, 16)[:, ::2], out.to("meta"), torch.zeros(2, 9)):
        with pytest.raises(ValueError, match="do not fit"):
            move(table, rows, wrong)
    for other in (torch.zeros(10, 8), table[:, :4], table.T, table[0, 0]):
        with pytest.raises(ValueError, match="contiguous tensor that lies in one"):
            move(other, rows, out)
    assert not table.any()


def test_a_row_is_written_once(way, tmp_path):
    with pytest.raises(IndexError, match="do not ascend"):
        disk.write_rows(made((10, 8), torch.float32, tmp_path, way), torch.tensor([3, 3]), torch.ones(2, 8))


def test_files_have_no_name_and_go_with_their_tensors(tmp_path):
    gc.collect()
    descriptors, files = len(os.listdir("/dev/fd")), len(disk._files)
    tables = [disk.mapped((1000, 100), torch.float32, tmp_path) for _ in range(5)]
    assert not list(tmp_path.iterdir())
    assert len(os.listdir("/dev/fd")) == descriptors + 5, "one each: there may be hundreds of tables"
    assert os.fstat(file_of(tables[0]).descriptor).st_mode & 0o777 == 0o600
    part = tables[3][500:]
    tables.clear()
    gc.collect()
    assert len(disk._files) == files + 1
    assert part.sum() == 0
    del part
    gc.collect()
    assert len(disk._files) == files
    assert len(os.listdir("/dev/fd")) == descriptors


@needs_linux
def test_more_than_four_gigabytes(tmp_path):
    length = (9 << 30) // 4096
    try:
        table = disk.mapped((length, 1024), torch.float32, tmp_path)
    except OSError as error:
        pytest.skip(f"no space: {error}")
    rows = torch.tensor([0, 5, (1 << 31) // 4096, length // 2, length - 1])
    values, out = torch.randn(5, 1024), torch.empty(5, 1024)
    disk.write_rows(table, rows, values)
    disk.read_rows(table, rows, out)
    assert same(out, values)
    assert same(table[rows], values)
    assert table[length - 2].sum() == 0


def test_threads_read_and_write_at_once(way, tmp_path):
    """Rows that share sectors, too."""
    for columns in (25, 1024):
        table = made((3000, columns), torch.float32, tmp_path, way)
        want = torch.randn(3000, columns)
        faults = []

        def write(part, table=table, want=want, faults=faults):
            rows = torch.arange(part, 3000, 4)
            for piece in rows.split(97):
                disk.write_rows(table, piece, want[piece])
                out = torch.empty(len(piece), want.shape[1])
                disk.read_rows(table, piece, out)
                if not torch.equal(out, want[piece]):
                    faults.append(part)

        threads = [threading.Thread(target=write, args=(part,)) for part in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not faults
        assert same(table, want)


def test_traffic_is_counted(way, tmp_path):
    table = made((1000, 2048), torch.float32, tmp_path, way)
    rows, values = torch.arange(0, 1000, 50), torch.randn(20, 2048)
    before = copy.copy(disk.traffic)
    disk.write_rows(table, rows, values)
    assert (disk.traffic.read - before.read, disk.traffic.written - before.written) == (0, values.nbytes)
    disk.read_rows(table, rows, values)
    assert (disk.traffic.read - before.read, disk.traffic.written - before.written) == (values.nbytes, values.nbytes)


def test_a_failing_disk_is_named(way, tmp_path):
    """The kernel's own errors, of devices that are always full and always empty."""
    table, rows = made((100, 1024), torch.float32, tmp_path, way), torch.arange(0, 100, 3)
    file = file_of(table)
    for device, move, number in (
        ("/dev/full", disk.write_rows, errno.ENOSPC),
        ("/dev/null", disk.read_rows, errno.EIO),
    ):
        descriptor = os.open(device, os.O_RDWR)
        os.dup2(descriptor, file.descriptor)
        os.close(descriptor)
        with pytest.raises(OSError, match="scratch file") as caught:
            move(table, rows, torch.zeros(len(rows), 1024))
        assert caught.value.errno == number
        assert caught.value.filename == str(tmp_path)


def fill_a_small_disk(folder):
    """What is said of a file that is too large, and what is in one that is not."""
    with pytest.raises(OSError, match="scratch file") as caught:
        disk.mapped((64, 1 << 20), torch.uint8, folder)
    table = disk.mapped((2, 1 << 20), torch.uint8, folder)
    table.fill_(3)
    disk.write_rows(table, torch.tensor([1]), torch.full((1, 1 << 20), 4, dtype=torch.uint8))
    return shortage(caught.value), table[:, 9].tolist()


def with_small_files(folder):
    resource.setrlimit(resource.RLIMIT_FSIZE, (10 << 20, 10 << 20))
    return fill_a_small_disk(folder)


def test_a_file_larger_than_allowed(tmp_path):
    said, values = run_each(with_small_files, [(tmp_path,)])[0]
    assert "ulimit -f allows (10.5 MB)" in said
    assert values == [3, 4]


def with_a_small_disk(folder):
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(folder)]
    if ctypes.CDLL(None).unshare(0x20000):  # mounts of its own
        return None
    for command in (["mount", "--make-rprivate", "/"], mount):
        if subprocess.run(command, capture_output=True, check=False).returncode:
            return None
    return fill_a_small_disk(folder)


@needs_linux
def test_a_full_disk_is_met_at_the_start(tmp_path):
    """And not by a signal at some write to the mapping."""
    found = run_each(with_a_small_disk, [(tmp_path,)])[0]
    if found is None:
        pytest.skip("no file system can be mounted here")
    assert found == (f"{tmp_path}: no space is left on the disk; free some", [3, 4])


def outlive_another(folder):
    """The exit status of a process that is killed, what it left behind, and what this one has in the same folder."""
    ours = disk.mapped((100, 1000), torch.float32, folder)
    disk.write_rows(ours, torch.arange(100), torch.full((100, 1000), 2.0))
    child = os.fork()
    if child == 0:
        theirs = disk.mapped((100, 1000), torch.float32, folder)
        disk.write_rows(theirs, torch.arange(100), torch.full((100, 1000), 1.0))
        theirs[5] = 1.0
        os.kill(os.getpid(), signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    return os.WTERMSIG(status), os.listdir(folder), ours.unique().tolist()


def test_a_killed_process_leaves_nothing(tmp_path):
    assert run_each(outlive_another, [(tmp_path,)])[0] == (signal.SIGKILL, [], [2.0])


def peak():
    """The most memory that this process had, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) >> 10 for line in lines if line.startswith("VmHWM"))


def stream(table):
    """Fill a table and read it; whether all was there, and the memory that this took at most."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what it has now
    before = peak()
    for number, row in enumerate(table):
        row.fill_(number)
    right = all(row[::1024].eq(number).all() and row[-1] == number for number, row in enumerate(table))
    return right, peak() - before


def stream_within(folder, size, budget, forked, group=None):
    if group is not None:
        (group / "cgroup.procs").write_text(str(os.getpid()))
    disk.let_resident(budget << 20)
    table = disk.mapped((size, 1 << 18), torch.int32, folder)
    if not forked:
        return stream(table)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, repr(stream(table)).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert [table[number, 7] for number in range(9)] == list(range(9))  # it is one table
    return ast.literal_eval(os.read(reader, 1000).decode())


@needs_linux
@pytest.mark.parametrize("forked", [False, True])
def test_a_process_keeps_no_more_in_memory_than_it_may(forked, tmp_path):
    """The peak of all its memory, while far more is filled and read through the mapping."""
    right, most = run_each(stream_within, [(tmp_path, 768, 64, forked)])[0]
    assert right
    assert most < 64 + 192  # a busy machine lets the thread wait


@needs_linux
@pytest.mark.slow
def test_a_memory_group_needs_to_take_nothing_back(tmp_path):
    """The page cache of what was streamed is given back, too, before the group comes to its limit."""
    group = Path(f"/sys/fs/cgroup/memory/peer_dist-test-{os.getpid()}")
    try:
        group.mkdir()
    except OSError:
        pytest.skip("no memory group can be made here")
    try:
        (group / "memory.limit_in_bytes").write_text(str(1 << 30))
        assert run_each(stream_within, [(tmp_path, 3072, 128, False, group)])[0][0]
        assert int((group / "memory.max_usage_in_bytes").read_text()) < 900 << 20
    finally:
        (group / "memory.force_empty").write_text("0")
        group.rmdir()


@needs_linux
def test_folders_that_hold_no_scratch_files(tmp_path):
    disk.check_folder(tmp_path if mount_of(tmp_path)[1] not in ("tmpfs", "ramfs") else Path.home(), 1)
    (tmp_path / "file").write_text("")
    for folder, needed, said in (
        (tmp_path / "none", 1, "does not exist"),
        (tmp_path / "file", 1, "is no folder"),
        (Path("/proc"), 1, "takes none"),
        (Path("/dev/shm"), 1, "is in memory"),
        (tmp_path, 1 << 70, "GB free, the tables need 1,180,591,620,717.4 GB"),
    ):
        if mount_of(tmp_path)[1] in ("tmpfs", "ramfs") and folder == tmp_path:
            continue
        with pytest.raises(disk.FolderError, match=said) as caught:
            disk.check_folder(folder, needed)
        assert str(folder) in str(caught.value)
        assert "peer.table_folder" in str(caught.value)


@needs_linux
def test_mounts_and_the_default_folder(tmp_path, monkeypatch):
    assert mount_of(Path("/proc/self")) == ("/proc", "proc")
    assert mount_of(tmp_path)[0] in [str(place) for place in (tmp_path, *tmp_path.resolve().parents)]
    assert disk.network_file_system(Path("/proc/none")) is None
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path))
    assert disk.default_folder() == tmp_path
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path / "gone"))
    assert disk.default_folder().is_dir()


def test_the_rates_of_a_disk(tmp_path):
    before = copy.copy(disk.traffic)
    rates = disk.disk_rates(tmp_path, 1024, 4 << 20)
    assert min(rates) > 0
    assert disk.traffic.written - before.written >= 4 << 20
