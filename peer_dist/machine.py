"""Asks the operating system about this machine: its processor, cores and memory, and the age of its processes.

psutil and py-cpuinfo are asked. Linux's own files are read here, and nowhere else, for what these two do not say, or
take a second to say: the processor's name and instruction sets, the limits of a container, the identity of a boot,
start times that do not change when the clock is set, and NVIDIA's driver, which is asked itself for what no file says.
It also makes and checks folders that are this user's alone, and tells whether files have changed.

Both are imported where they are asked: the layer alone wants the processor's features, and is installed without them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import shutil
import socket
import stat
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

_NVIDIA = Path("/proc/driver/nvidia")


@cache
def cpu_name() -> str:
    """The processor's name, or its architecture where it has none.

    py-cpuinfo starts processes, for a second, so it is asked only where the kernel's file does not say.
    """
    for line in _cpu_lines("model name"):
        if name := line.partition(":")[2].strip():
            return name
    import cpuinfo

    return str(cpuinfo.get_cpu_info().get("brand_raw") or platform.machine())


def cpu_features() -> str:
    """A text that differs between kinds of processors: name and instruction sets on Linux, else the architecture.

    It is part of the key under which compiled kernels are cached, and every process that uses them asks.
    """
    return "\n".join(_cpu_lines("flags", "Features", "model name")) or platform.machine()


def _cpu_lines(*keys: str) -> list[str]:
    """The different lines of the kernel's file that begin with one of the keys, sorted; none off Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return []
    return sorted({line for line in lines if line.startswith(keys)})


def usable_cores() -> int:
    """The number of cores that this process may run on."""
    import psutil

    process = psutil.Process()
    if hasattr(process, "cpu_affinity"):  # macOS binds no process to cores
        return len(process.cpu_affinity())
    return psutil.cpu_count() or 1


def nearest_existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists, absolute: for questions about what is not created yet."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if os.path.exists(place))


def private_folder(path: Path) -> Path:
    """A folder that this user alone can enter, made if need be: what is read from it may be believed.

    Raises:
        OSError: it cannot be made, is a link or no folder, or is another user's; or others can write to it, or could
            have. The text says which.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise OSError(f"{path} is {'a link' if stat.S_ISLNK(status.st_mode) else 'no folder'}")
    if sys.platform != "win32":
        if status.st_uid != os.geteuid():
            raise OSError(f"{path} belongs to another user")
        if status.st_mode & 0o022:
            raise OSError(f"others can write to {path}")
        if status.st_mode & 0o055:  # made by hand, or by an earlier version: nobody else can have put anything there
            with contextlib.suppress(OSError):
                path.chmod(0o700)
    return path


def file_stamp(*paths: str | os.PathLike[str]) -> tuple[object, ...] | None:
    """What differs if one of the files has changed since; None if they changed so lately that it might not.

    Raises:
        OSError: one of them is not there.
    """
    states = [os.stat(path) for path in paths]
    if time.time() - max(max(state.st_mtime, state.st_ctime) for state in states) < 2:  # clocks of files are coarse
        return None
    return tuple((s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in states)


def free_memory() -> int:
    """Bytes of memory that are free on this machine, or that the container's limit leaves if those are fewer."""
    import psutil

    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # "max", or no cgroup of version 2: no limit
        free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return int(free)


def most_memory() -> int:
    """Bytes of memory and swap that processes such as this one may have together, whatever is free of them: this
    machine's, or the least that a control group allows which it is in.
    """
    import psutil

    most = psutil.virtual_memory().total + psutil.swap_memory().total
    with contextlib.suppress(OSError):  # off Linux
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            if controllers in ("", "memory"):
                root = Path("/sys/fs/cgroup", controllers)
                file = "memory.max" if controllers == "" else "memory.limit_in_bytes"
                group = root / name.lstrip("/")
                for folder in (group, *group.parents):  # a container may see its own group as the root
                    with contextlib.suppress(OSError, ValueError):  # "max": no limit
                        most = min(most, int((folder / file).read_text()))
    return int(most)


def mapped_memory() -> int:
    """Bytes of files and of shared memory that this process has mapped, as far as they are in memory; 0 off Linux."""
    try:
        with open("/proc/self/statm", "rb", buffering=0) as file:
            return int(file.read().split()[2]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def mount_of(path: Path) -> tuple[str, str]:
    """Where the file system that holds an existing file is mounted, and of what kind it is: ("", "") off Linux."""
    found = "", ""
    real = os.path.realpath(path)
    try:
        lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return found
    for line in lines:
        before, _, after = line.partition(" - ")
        place = re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), before.split()[4])  # spaces are spelled so
        inside = place == "/" or real == place or real.startswith(f"{place}/")
        if inside and len(place) >= len(found[0]):  # of several at one place the last is seen
            found = place, after.split()[0]
    return found


def process_start(pid: int) -> str:
    """The time at which a process began, in a unit of the system's own, to be compared for equality within one boot.

    It is empty if no such process runs. One that has ended and is not reaped yet does not run.
    """
    import psutil

    if psutil.LINUX:
        ticks = _start_ticks(pid)
        return "" if ticks is None else str(ticks)
    try:
        process = psutil.Process(pid)
        return "" if process.status() == psutil.STATUS_ZOMBIE else repr(process.create_time())
    except psutil.NoSuchProcess:
        return ""
    except psutil.AccessDenied:
        return "unknown"


def process_age() -> float:
    """Seconds since this process began, which may have been before it ran this program."""
    import psutil

    ticks = _start_ticks(os.getpid()) if psutil.LINUX else None
    if ticks is None:
        return time.time() - psutil.Process().create_time()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def _start_ticks(pid: int) -> int | None:
    """Clock ticks from the machine's boot to the start of a process; None if it does not run.

    psutil adds the time of the boot, which is known only to the second and changes when the clock is set, so that the
    same process would seem to be another one.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def ancestors() -> list[tuple[int, list[str]]]:
    """Process id and command line of this process's parent, of that one's parent and so on, as far as they are seen."""
    import psutil

    found: list[tuple[int, list[str]]] = []
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process().parents():
            found.append((process.pid, process.cmdline()))
    return found


def process_space() -> str:
    """A name for the space in which process ids are unique: this boot of the kernel and the pid namespace in it.

    Two containers on one machine do not see each other's processes. The name is empty if Linux does not tell, and the
    host's name on other systems.
    """
    import psutil

    if not psutil.LINUX:
        return socket.gethostname()
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def nvidia_smi(*arguments: str) -> list[str]:
    """The lines that ``nvidia-smi`` prints; none if it is not there, fails, or hangs as it does on a broken GPU."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


def nvidia_driver() -> str | None:
    """The version of NVIDIA's kernel driver; None if it is not loaded."""
    with contextlib.suppress(OSError, IndexError):
        return (_NVIDIA / "version").read_text().splitlines()[0].split("  ")[1].strip()
    lines = nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader")  # Windows's Linux has no such file
    return lines[0].strip() if lines else None


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA, major and minor, that NVIDIA's driver supports; None without the driver's library."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
        version = ctypes.c_int()
        if library.cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return version.value // 1000, version.value % 1000 // 10


def nvidia_devices() -> bool:
    """Whether the system shows this process NVIDIA's devices, which a container may not have been given."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def has_nvidia_gpus() -> bool:
    """Whether this machine has NVIDIA's GPUs, even if this process may not use them and torch sees none."""
    return (_NVIDIA / "gpus").exists() or nvidia_devices() or bool(nvidia_smi("-L"))
