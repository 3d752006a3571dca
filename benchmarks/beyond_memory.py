"""Tables that are larger than the memory that a process may have, trained from scratch files under that limit.

    peer-dist prepare --output data/tinyshakespeare
    python benchmarks/beyond_memory.py [--limit-gb 3] [--json FILE] [--figure FILE.png] [section.key=value ...]

Four processes, one after the other, each the ordinary command ``python -m peer_dist train --config CONFIG``:

- ``device``: with the tables in memory, under the limit. It is refused.
- ``disk``: as the config says, under the limit; half-way it gets a SIGTERM, upon which it saves and leaves.
- ``resumed``: the same command again, under the limit; it goes on to the end.
- ``memory``: with the tables in memory and no limit: losses of all steps, and the checkpoint, must be the same. With
  the config that ships it takes 8 GB.

The limit is that of a memory cgroup, which is made for each process and removed again (version 1 or 2; this takes
root). The kernel counts there what the process has, and the pages of files that it brought into memory. Where no group
can be made, the process is watched and killed when what is resident of it exceeds the limit.

Memory is sampled four times a second. Bytes read and written of the disk are the kernel's count for the process
(``/proc/PID/io``) between the ends of the first and of the last step. The floor is what had to be read: the distinct
rows that each step touched (``experts/..._usage_percent``, with ``logging.interval=1``), less what the cache had.

The figure is drawn of what a former run wrote by ``--draw FILE.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from measure import show, write_json
from torch.distributed.checkpoint import FileSystemReader

from peer_dist.config import Config, load_config
from peer_dist.kinds import KINDS, PEER
from peer_dist.kinds.kind import Tables
from peer_dist.machine import cpu_name, free_memory, usable_cores
from peer_dist.measures.metrics import read_metrics

GROUPS = Path("/sys/fs/cgroup")
SECONDS = 0.25  # between samples
STATUS = {"RssAnon": "anonymous", "RssFile": "file", "RssShmem": "shared"}  # lines of /proc/PID/status
PROCESS = 1.2e9  # bytes that a process has beside tables and optimizer, about


class Limit:
    """A memory cgroup of one process, or the intention to kill it.

    Args:
        size: bytes at most; None: no limit, but what is held is counted, where a group can be made.
    """

    def __init__(self, size: int | None) -> None:
        self.size, self.folder = size, None
        second = (GROUPS / "cgroup.controllers").exists()
        names = (
            ("memory.max", "memory.swap.max") if second else ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
        )
        self._used = "memory.current" if second else "memory.usage_in_bytes"
        folder = (GROUPS if second else GROUPS / "memory") / f"peer-dist-{os.getpid()}"
        with contextlib.suppress(OSError):
            if second and "memory" not in (GROUPS / "cgroup.subtree_control").read_text().split():
                raise OSError("memory is not limited here")
            folder.mkdir()
            self.folder = folder
        if self.folder is not None and size is not None:
            (folder / names[0]).write_text(str(size))
            with contextlib.suppress(OSError):  # no swap, or none that is counted
                (folder / names[1]).write_text("0" if second else str(size))

    @property
    def kind(self) -> str:
        """How the limit is kept."""
        return "watched" if self.folder is None else "cgroup"

    def command(self, words: Sequence[str]) -> list[str]:
        """A command line that begins in the group."""
        if self.folder is None:
            return [*words]
        return ["sh", "-c", f'echo $$ > "{self.folder}/cgroup.procs" && exec "$@"', "sh", *words]

    def used(self) -> int | None:
        """Bytes that the kernel counts in the group, pages of files among them; None without a group."""
        return None if self.folder is None else int((self.folder / self._used).read_text())

    def remove(self) -> None:
        """Remove the group, in which no process is any more."""
        if self.folder is not None:
            for _ in range(50):  # a killed process may take a moment to leave
                with contextlib.suppress(OSError):
                    self.folder.rmdir()
                    return
                time.sleep(0.1)


@contextlib.contextmanager
def limited(size: int | None) -> Iterator[Limit]:
    """A :class:`Limit` that is removed at the end."""
    limit = Limit(size)
    try:
        yield limit
    finally:
        limit.remove()


def numbers(path: Path, keys: Sequence[str]) -> dict[str, int]:
    """Lines ``key: number`` of a file of the kernel's, as they are there."""
    lines = (line.partition(":") for line in path.read_text().splitlines())
    return {key: int(value.split()[0]) for key, _, value in lines if key in keys}


def sample(pid: int, limit: Limit, begin: float, steps: int) -> dict[str, Any]:
    """What a process holds now, in bytes, and has read and written; nothing of one that has ended."""
    try:
        held = numbers(Path(f"/proc/{pid}/status"), list(STATUS))
        moved = numbers(Path(f"/proc/{pid}/io"), ("read_bytes", "write_bytes"))
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    except (OSError, ValueError, IndexError):
        return {}
    if not held:
        return {}
    row: dict[str, Any] = {"seconds": round(time.monotonic() - begin, 2), "steps": steps}
    row["processor_seconds"] = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
    row |= {name: held[key] << 10 for key, name in STATUS.items()} | moved
    if (used := limit.used()) is not None:
        row["group"] = used
    return row


def run(name: str, command: list[str], size: int | None, metrics: Path, log: Path, stop: int | None) -> dict[str, Any]:
    """Run a command to its end under a limit, and return how it went.

    Args:
        metrics: the file to whose lines, a step each, the process adds.
        stop: the step after which it is asked to save and leave; None: never.
    """
    begin, samples, asked, killed = time.monotonic(), [], False, False
    steps = step_of(metrics)
    with limited(size) as limit, log.open("w") as output:
        process = subprocess.Popen(limit.command(command), stdout=output, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                steps = step_of(metrics)
                row = sample(process.pid, limit, begin, steps)
                if row:
                    samples.append(row)
                    held = sum(row[part] for part in STATUS.values())
                    if limit.folder is None and size is not None and held > size:
                        killed = True
                        process.kill()
                if stop is not None and steps >= stop and not asked:
                    asked = True
                    process.send_signal(signal.SIGTERM)
                time.sleep(SECONDS)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        kind = limit.kind
    words = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return {
        "name": name,
        "limit": size,
        "limit_kept_by": None if size is None else kind,
        "exit_code": process.returncode,
        "killed_by_this_script": killed,
        "stopped_after": stop if asked else None,
        "seconds": time.monotonic() - begin,
        "last_words": words[-12:],
        "most": {part: max((row.get(part, 0) for row in samples), default=0) for part in (*STATUS.values(), "group")}
        | {"resident": max((sum(row[part] for part in STATUS.values()) for row in samples), default=0)},
        "samples": samples,
    }


def step_of(metrics: Path) -> int:
    """The last step that a run has written; 0 before the first one."""
    try:
        lines = metrics.read_text().splitlines()
        return int(json.loads(lines[-1])["step"])
    except (OSError, ValueError, IndexError, KeyError):
        return 0


def tables_of(config: Config) -> tuple[int, int, Tables]:
    """Bytes of all tables and of their optimizer's states, and what the last layer with tables says of its own."""
    tables, states, last = 0, 0, None
    names = {"adam": 2, "rowwise_adam": 1, "rowwise_adagrad": 0}
    for kind in config.model.mlp_kinds:
        layer = KINDS[kind].tables(config)
        if layer is not None:
            last = layer
            elements = len(layer.names) * layer.rows * config.model.hidden_size
            tables += elements * layer.itemsize
            states += names[config.table_optimizer.name] * elements * 4
            states += 0 if config.table_optimizer.name == "adam" else len(layer.names) * layer.rows * 4
    if last is None:
        raise SystemExit("the config has no layer with tables")
    return tables, states, last


def traffic(config: Config, lines: list[dict[str, float]], samples: list[dict[str, Any]]) -> dict[str, float]:
    """Of the steps of one process but its first: bytes per token by the kernel's count, by the run's own and at least,
    and processor time.
    """
    table = tables_of(config)[2]
    row_bytes = len(table.names) * config.model.hidden_size * table.itemsize
    tokens = config.train.global_batch_size * config.model.seq_length
    first, last = int(lines[0]["step"]), int(lines[-1]["step"])
    at = {step: next((row for row in samples if row["steps"] >= step), None) for step in (first, last)}
    begin, end = at[first], at[last]  # the first samples after these steps: before anything is saved
    result: dict[str, float] = {}
    if begin is not None and end is not None and end["steps"] > begin["steps"]:
        taken = (end["steps"] - begin["steps"]) * tokens
        for what in ("read", "write"):
            moved = end[f"{what}_bytes"] - begin[f"{what}_bytes"]
            result[f"disk_{what}_bytes_per_token"] = moved / taken
        spent = end["processor_seconds"] - begin["processor_seconds"]
        result["processor_seconds_per_step"] = spent / (end["steps"] - begin["steps"])
    touched, missed = [], []
    for line in lines[1:]:
        shares = [line[key] for key in line if re.fullmatch(r"experts/layer\d+_usage_percent", key)]
        rows = sum(share / 100 * table.rows for share in shares)
        touched.append(rows)
        if "tables/cache_hit_rate" in line:
            missed.append(rows * (1 - line["tables/cache_hit_rate"]))
    if touched:
        result["rows_touched_per_step"] = statistics.mean(touched)
        result["touched_bytes_per_token"] = statistics.mean(touched) * row_bytes / tokens
    if missed:
        result["floor_bytes_per_token"] = statistics.mean(missed) * row_bytes / tokens
    for key in ("cache_hit_rate", "far_read_bytes_per_token", "far_written_bytes_per_token"):
        values = [line[f"tables/{key}"] for line in lines[1:] if f"tables/{key}" in line]
        if values:
            result[key] = statistics.mean(values)
    return result


def losses(lines: list[dict[str, float]]) -> dict[int, list[float | None]]:
    """What must be the same of each step: loss, norm of the gradients, and held-out loss where there is one."""
    names = ("train/loss", "optimizer/grad_norm", "val/loss")
    return {int(line["step"]): [line.get(name) for name in names] for line in lines if line["step"]}


def digests(folder: Path) -> dict[tuple[str, tuple[int, ...]], str]:
    """The digest of every piece of a tensor in the newest checkpoint of a folder, by its name and place.

    Files are not compared: which of them a piece is in may differ.
    """
    newest = max(folder.glob("step-*"), key=lambda path: path.name)
    found = {}
    for index, at in FileSystemReader(newest).read_metadata().storage_data.items():
        with (newest / at.relative_path).open("rb") as file:
            file.seek(at.offset)
            content = file.read(at.length)
        with contextlib.suppress(Exception):  # a tensor; anything else is compared as it is
            value = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            content = value.contiguous().reshape(-1).view(torch.uint8).numpy().data
        found[index.fqn, tuple(index.offset or ())] = hashlib.sha256(content).hexdigest()
    return found


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run the four processes, and return what came of them."""
    config = load_config(options.config, options.overrides)
    tables, states, _ = tables_of(config)
    limit = int(options.limit_gb * 1e9)
    needed, disk = tables + states + PROCESS, 4 * (tables + states) + 1e9
    if free_memory() < needed:
        raise SystemExit(f"the run in memory needs {needed / 1e9:.1f} GB, and {free_memory() / 1e9:.1f} are free")
    if shutil.disk_usage(folder).free < disk:
        raise SystemExit(f"{folder}: {disk / 1e9:.1f} GB are needed; name another disk by --folder")
    half, runs = config.train.steps // 2, []
    lines: dict[str, list[dict[str, float]]] = {}

    def train(name: str, where: str, size: int | None, stop: int | None, *more: str) -> dict[str, Any]:
        own = [f"checkpoint.dir={folder / where}/checkpoints", f"logging.dir={folder / where}/logs", *more]
        command = [
            sys.executable,
            "-m",
            "peer_dist",
            "train",
            "--config",
            str(options.config),
            *options.overrides,
            *own,
        ]
        metrics = folder / where / "logs" / "metrics.jsonl"
        before = step_of(metrics)
        result = run(name, command, size, metrics, folder / f"{name}.log", stop)
        if metrics.exists():
            lines[name] = [line for line in read_metrics(metrics) if line["step"] > before]
        steps = lines.get(name, [])
        result["steps"] = [int(line["step"]) for line in steps]
        if len(steps) > 1:
            result["tokens_per_second"] = statistics.median(line["speed/tokens_per_second"] for line in steps[1:])
            result["step_seconds"] = [line["time/step"] for line in steps]
            result |= {key: value for line in steps[:1] for key, value in line.items() if key.startswith("startup/")}
            result |= traffic(config, steps, result["samples"])
        result["samples"] = drawn(result["samples"])
        result["last_words"] = [line.replace(str(folder), "FOLDER") for line in result["last_words"]]
        print(
            f"{name}: exit code {result['exit_code']} after {result['seconds']:.0f} s", *result["last_words"], sep="\n"
        )
        runs.append(result)
        return result

    in_files = [f"peer.table_folder={folder}"] if PEER.keys(config).table_memory == "disk" else []
    train("device", "device", limit, None, "peer.table_memory=device")
    shutil.rmtree(folder / "device", ignore_errors=True)
    train("disk", "disk", limit, half, *in_files)
    resumed = train("resumed", "disk", limit, None, *in_files)
    under = digests(folder / "disk" / "checkpoints") if resumed["exit_code"] == 0 else None
    shutil.rmtree(folder / "disk" / "checkpoints", ignore_errors=True)
    memory = train("memory", "memory", None, None, "peer.table_memory=device")
    both = losses(lines.get("disk", []) + lines.get("resumed", [])), losses(lines.get("memory", []))
    same = under is not None and memory["exit_code"] == 0 and under == digests(folder / "memory" / "checkpoints")
    return {
        "title": f"Tables of {tables / 1e9:.2f} GB in {limit / 1e9:.2f} GB on {cpu_name()}, {usable_cores()} cores",
        "config": config.model_dump(mode="json"),
        "limit": limit,
        "tables": tables,
        "states": states,
        "tables_over_limit": tables / limit,
        "steps_compared": len(both[0].keys() & both[1].keys()),
        "losses_equal": both[0] == both[1] and len(both[0]) == config.train.steps,
        "checkpoints_equal": same,
        "losses": {
            name: [[line["step"], line["train/loss"]] for line in each if "train/loss" in line]
            for name, each in lines.items()
        },
        "runs": runs,
    }


def drawn(samples: list[dict[str, Any]]) -> dict[str, list[float]]:
    """By name, what is drawn of the samples, of a second each the first; of a process that ended early, all."""
    seen: set[int] = set()
    kept = []
    for row in samples:
        if (second := int(row["seconds"])) not in seen or row is samples[-1]:
            seen.add(second)
            kept.append(row)
    columns = {"seconds": [row["seconds"] for row in kept], "steps": [row["steps"] for row in kept]}
    for part in ("anonymous", "file", "group"):
        if all(part in row for row in kept):
            columns[f"{part}_gb"] = [round(row[part] / 1e9, 3) for row in kept]
    return columns


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """What is shown of a process: a number a line."""
    left_out = ("samples", "steps", "step_seconds", "last_words", "most")
    shown = {key: value for key, value in result.items() if key not in left_out and value is not None}
    steps = result["steps"]
    shown["steps"] = f"{steps[0]} to {steps[-1]}" if steps else "none"
    return shown | {f"most GB, {part}": size / 1e9 for part, size in result["most"].items()}


def draw(results: dict[str, Any], path: Path) -> None:
    """Memory over time: on the left the processes under the limit, on the right the one in memory."""
    import matplotlib.pyplot as plt
    import numpy as np

    from peer_dist.plots.panels import empty_panels, style

    runs = {one["name"]: one for one in results["runs"]}
    most = max(results["tables"], *(one["most"][part] for one in results["runs"] for part in ("resident", "group")))
    with style():
        figure, panels = empty_panels(2, 7.0, 3.2)
        for panel, names in zip(panels, (("disk", "resumed"), ("memory",))):
            begin = 0.0
            for name in names:
                samples, steps = runs[name]["samples"], runs[name]["steps"]
                x = begin + np.array(samples["seconds"])
                hidden = "_" * (name != names[0])  # from the legend
                labels = [f"{hidden}its own memory", f"{hidden}pages of files, mapped"]
                parts = [samples[f"{part}_gb"] for part in ("anonymous", "file")]
                panel.stackplot(x, *parts, labels=labels, colors=("C0", "C1"), alpha=0.6, linewidth=0)
                if "group_gb" in samples:
                    label = f"{hidden}what the kernel counts"
                    panel.plot(x, samples["group_gb"], color="C2", linewidth=0.8, label=label)
                training = [at for at, step in zip(x, samples["steps"]) if steps and steps[0] <= step < steps[-1]]
                if training:
                    panel.axvspan(training[0], training[-1], color="0.9", zorder=-1, linewidth=0)
                begin += runs[name]["seconds"]
                if name != names[-1]:
                    panel.axvline(begin, color="0.5", linewidth=0.8, linestyle=":")
            killed = runs["device"]["samples"]
            if names[0] == "disk" and "group_gb" in killed and runs["device"]["exit_code"] < 0:
                label = "tables in memory, under the limit: killed"
                panel.plot(killed["seconds"], killed["group_gb"], color="k", linewidth=0.8, label=label)
            panel.axhline(results["tables"] / 1e9, color="C3", linestyle="--", linewidth=0.8, label="the tables")
            if names[0] == "disk":
                panel.axhline(results["limit"] / 1e9, color="k", linestyle="--", linewidth=0.8, label="the limit")
                panel.set_title("tables on the disk, under the limit; stopped once")
            else:
                panel.set_title("tables in memory, without a limit")
            panel.set(xlabel="seconds", ylabel="GB", xlim=(0, None), ylim=(0, 1.05 * most / 1e9))
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        plt.close(figure)


def main() -> None:
    """Measure what the command line asks for, and show it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/beyond-memory.yaml"))
    parser.add_argument("--limit-gb", type=float, default=3.0, help="10^9 bytes that a process may have")
    parser.add_argument("--folder", type=Path, help="on the disk that is to hold the tables (a temporary folder)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--draw", type=Path, help="draw what a former run wrote, and run nothing")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args()
    if options.draw is not None:
        results = json.loads(options.draw.read_text())
    else:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            results = measure(options, Path(folder))
        show(results["title"], [summary(one) for one in results["runs"]])
        shown = ("tables", "limit", "tables_over_limit", "steps_compared", "losses_equal", "checkpoints_equal")
        show("compared", [{key: results[key] for key in shown}])
        write_json(options.json, results)
    if options.figure is not None:
        draw(results, options.figure)


if __name__ == "__main__":
    main()
