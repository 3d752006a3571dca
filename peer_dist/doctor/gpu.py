"""The checks of a rank's GPU: driver, Triton, the kernels against their reference, rows of the host's memory, a PEER
layer against its floor.

What is measured takes its device from the rank and its sizes from :data:`SIZES`, so that it runs on a CPU too.
"""

from __future__ import annotations

import functools
import gc
import os
import re
import shutil
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peer_dist.config import ConfigError
from peer_dist.kernels import Picks, backend, expert_mix, reference
from peer_dist.kernels.eight_bit import CODES, LARGEST, dequantised, is_eight_bit, let_scales, quantised, scales_of
from peer_dist.layers.peer import PEER
from peer_dist.machine import driver_cuda, free_memory, has_nvidia_gpus, nvidia_devices, nvidia_driver, nvidia_smi
from peer_dist.planning.hardware import Hardware, load_hardware
from peer_dist.planning.rates import copy_seconds, fastest
from peer_dist.ranks.examination import Check, Finding, Here, Ranks
from peer_dist.sharding.cost import synthetic_picks
from peer_dist.units import sized

_TOLERANCE = {torch.bfloat16: 2**-7, torch.float32: 2**-16}  # of the largest number of a result; by its dtype
_RESULTS = ("output", "dx", "dgate", "gradient of down", "gradient of up")
_WIDEST_MEMORY = 0.1  # fraction by which a known card's memory may differ from the vendor's figure
_SPARE = 2 << 30  # bytes that a layer's pass may take beside its tables and their gradients


@dataclass(frozen=True)
class Sizes:
    """Sizes of what is measured on a kind of device.

    Attributes:
        dim: width of tokens and experts.
        tables: rows and dtype of the tables by which kernels are compared: few picks a row, and many; those of integers
            are codes of eight bits.
        compared: number of tokens there.
        experts: numbers of experts of the layer; the first that there is memory for is taken.
        tokens: number of tokens of the layer.
        copied: float32 numbers to copy.
        far: rows in the host's memory, half of which are fetched.
        dtype: of tokens, and of the layer.
        heads, top_k: of the layer; ``heads * top_k`` picks a token everywhere.
    """

    dim: int
    tables: tuple[tuple[int, torch.dtype], ...]
    compared: int
    experts: tuple[int, ...]
    tokens: int
    copied: int
    far: int
    dtype: torch.dtype
    heads: int = 8
    top_k: int = 16


SIZES = {
    "cuda": Sizes(
        dim=1024,
        tables=((256**2, torch.float32), (128**2, torch.bfloat16), (128**2, torch.uint8)),
        compared=1024,
        experts=(1024**2, 512**2, 256**2),
        tokens=4096,
        copied=1 << 28,
        far=1 << 16,
        dtype=torch.bfloat16,
    ),
    "cpu": Sizes(
        dim=32,
        tables=((32**2, torch.float32), (16**2, torch.bfloat16), (16**2, torch.uint8)),
        compared=16,
        experts=(32**2,),
        tokens=32,
        copied=1 << 16,
        far=1 << 6,
        dtype=torch.bfloat16,
    ),
}


# ---------------------------------------------------------------------------------------------------------------------
# The card, its driver and the torch that is to use them.


def unseen_gpus() -> list[str] | None:
    """Why torch sees no GPU on a machine that has some, and what to do; None if there are none, or they are hidden."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible in ("", "-1") or not has_nvidia_gpus():
        return None
    built, supported = torch.version.cuda, driver_cuda()
    newest = "" if supported is None else f" (CUDA {supported[0]}.{supported[1]} or lower)"
    if built is None:
        advice = (
            f"install a build of torch for a CUDA that the driver supports{newest}: https://pytorch.org/get-started"
        )
        return [f"the machine has GPUs, but torch {torch.__version__} is built without CUDA", advice]
    if not nvidia_devices() and supported is None:
        text = "the machine has GPUs, but this process is shown no /dev/nvidia* and no libcuda.so.1"
        return [text, "start the container with --gpus all (podman: --device nvidia.com/gpu=all); ask Slurm for GPUs"]
    if supported is not None and supported[0] < int(built.partition(".")[0]):
        text = (
            f"the driver {nvidia_driver()} is too old for this torch: CUDA {supported[0]}.{supported[1]}, not {built}"
        )
        return [text, f"update the driver, or install a build of torch for an older CUDA{newest}"]
    try:
        torch.cuda.init()
        reason = "it does not say why"
    except Exception as error:
        reason = str(error).partition("\n")[0]
    hidden = f" (CUDA_VISIBLE_DEVICES is {visible!r})" if visible else ""
    return [f"the machine has GPUs, but torch sees none{hidden}: {reason}", "see whether nvidia-smi answers there"]


def memory_users(unique: str) -> list[str]:
    """The other processes with memory on a GPU, as ``python (pid 7, 12 GB)``; those that nvidia-smi may tell of.

    Args:
        unique: a part of the GPU's UUID.
    """
    lines = nvidia_smi("--query-compute-apps=gpu_uuid,pid,used_memory,process_name", "--format=csv,noheader,nounits")
    users = []
    for line in lines:
        uuid, pid, used, name = [*(part.strip() for part in line.split(",", 3)), "", "", ""][:4]
        if unique in uuid and pid != str(os.getpid()):
            size = sized(int(used) << 20) if used.isdigit() else "unknown memory"
            users.append(f"{Path(name).name or 'a process'} (pid {pid}, {size})")
    return users


def known_card(name: str, memory: int) -> Hardware | None:
    """The entry of ``hardware.yaml`` for a GPU of this name and these bytes of memory, if there is one."""
    words = re.split(r"[^a-z0-9]+", name.lower())
    for word in words:
        try:
            known = load_hardware(word)
        except ConfigError:
            continue
        # PCIe cards of the same name and memory are slower; other variants have another amount of memory
        alike = "pcie" not in words and abs(memory / known.memory_bytes - 1) < _WIDEST_MEMORY
        return known if alike and known.device == "cuda" else None
    return None


def _card(here: Here) -> dict[str, Any]:
    """Versions of the driver and of what torch was built for, and the card's compute capability."""
    cuda = here.device.type == "cuda"
    supported = driver_cuda()
    return {
        "driver": nvidia_driver(),
        "driver_cuda": None if supported is None else "{}.{}".format(*supported),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
        "capability": list(torch.cuda.get_device_capability(here.device)) if cuda else [9, 0],
        "built_for": torch.cuda.get_arch_list(),
    }


def _judge_card(values: dict[int, dict[str, Any]], ranks: Ranks) -> list[Finding]:
    """Whether torch has code for the cards, and the cards know bfloat16."""
    findings = []
    figures = values[min(values)]
    foreign = {rank: value for rank, value in values.items() if not _has_code(value["built_for"], value["capability"])}
    if foreign:
        value = foreign[min(foreign)]
        capability = "{}.{}".format(*value["capability"])
        text = f"{ranks.named(foreign)}: torch {value['torch']} has no code for compute capability {capability}"
        text += f", only for {' '.join(value['built_for'])}"
        advice = "install a build of torch for a newer CUDA, or for an older card an older torch"
        findings.append(Finding("driver", "fail", text, advice, figures))
    old = {rank: value for rank, value in values.items() if value["capability"] < [8, 0]}
    if old:
        capability = "{}.{}".format(*old[min(old)]["capability"])
        text = f"{ranks.named(old)}: compute capability {capability} has no bfloat16, which needs 8.0"
        advice = "set train.precision=fp32, and leave peer.table_dtype at float32"
        findings.append(Finding("driver", "warn", text, advice, figures))
    text = "driver {driver} for CUDA up to {driver_cuda}, torch built for CUDA {torch_cuda}, NCCL {nccl}"
    text = text.format_map(figures) + ", compute capability {}.{}".format(*figures["capability"])
    return findings or [Finding("driver", "ok", text, figures=figures)]


def _has_code(built_for: list[str], capability: list[int]) -> bool:
    """Whether any of torch's architectures, such as sm_90 or compute_90, serves a card."""
    major, minor = capability
    for architecture in built_for:
        parts = re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", architecture)
        if parts is None:
            return True  # of a kind that is not known here
        kind, its_major, its_minor, variant = parts[1], int(parts[2]), int(parts[3]), parts[4]
        if variant == "a":  # that one alone
            serves = [its_major, its_minor] == capability
        elif kind == "compute" and not variant:  # the driver compiles it for newer cards
            serves = [its_major, its_minor] <= capability
        else:
            serves = its_major == major and its_minor <= minor
        if serves:
            return True
    return not built_for


# ---------------------------------------------------------------------------------------------------------------------
# The kernels.


def _triton(here: Here) -> dict[str, Any]:
    """What computes the experts on this device, and the seconds or the error of its first pass."""
    inputs = _inputs(here, rows=64, tokens=4, picks=4, dim=32, dtype=torch.float32, table_dtype=torch.float32)
    ops = backend(inputs.x, inputs.down)
    name = getattr(ops, "__name__", "plain PyTorch").rpartition(".")[2]
    value: dict[str, Any] = {
        "backend": name,
        "version": getattr(getattr(ops, "triton", None), "__version__", None),
        "compiler": _compiler(),
        "headers": Path(sysconfig.get_paths()["include"], "Python.h").exists(),
    }
    begin = time.perf_counter()
    try:
        inputs.passed()
        here.finish()
    except Exception as error:
        value["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
    return {**value, "seconds": time.perf_counter() - begin}


def _compiler() -> str | None:
    """The C compiler with which Triton would build what launches its kernels."""
    named = os.environ.get("CC")
    return shutil.which(named.split()[0]) if named and named.split() else shutil.which("gcc") or shutil.which("clang")


def _judge_triton(values: dict[int, dict[str, Any]], ranks: Ranks) -> list[Finding]:
    """Whether Triton is there and compiles."""
    findings = []
    figures = values[min(values)]
    failed = {rank: value for rank, value in values.items() if "error" in value}
    without = {rank: value for rank, value in values.items() if value["backend"] != "triton" and rank not in failed}
    tools = {rank: value for rank, value in values.items() if not (value["compiler"] and value["headers"])}
    missing = ""
    if tools:
        value = tools[min(tools)]
        missing = "Python.h" if value["compiler"] else "C compiler"
    advice = "install gcc, or name a compiler in CC" if missing == "C compiler" else "install python3-dev"
    if failed:
        value = failed[min(failed)]
        why = f", and there is no {missing}" if missing else ""
        text = f"{ranks.named(failed)}: Triton {value['version']} runs no kernel{why} ({value['error']})"
        advice = advice if missing else "install the Triton that belongs to this torch, and empty ~/.triton/cache"
        findings.append(Finding("Triton", "fail", text, advice, value))
    elif tools and not without:
        text = f"{ranks.named(tools)}: a kernel ran from Triton's cache, but there is no {missing} to compile others"
        findings.append(Finding("Triton", "warn", text, advice, value))
    if without:
        value = without[min(without)]
        text = f"{ranks.named(without)}: no Triton, so that {value['backend']} computes the experts, which is slow"
        advice = "install the Triton that belongs to this torch: pip install triton"
        findings.append(Finding("Triton", "warn", text, advice, value))
    seconds = max(value["seconds"] for value in values.values())
    text = f"Triton {figures['version']} compiles and runs a kernel; its first pass took {seconds:.1f} s"
    return findings or [Finding("Triton", "ok", text, figures={**figures, "seconds": seconds})]


@dataclass
class _Inputs:
    """Tokens, tables, picks and an output's gradient, to pass through the experts."""

    x: Tensor
    dy: Tensor
    gate: Tensor
    down: Tensor
    up: Tensor
    picks: Picks

    def passed(self) -> list[Tensor]:
        """The results of :func:`expert_mix` and its backward pass, in the order of :data:`_RESULTS`; of tables of eight
        bits, which autograd knows no gradients of, without theirs.
        """
        x, gate, down, up = (
            tensor if is_eight_bit(tensor) else tensor.detach().requires_grad_()
            for tensor in (self.x, self.gate, self.down, self.up)
        )
        y = expert_mix(x, self.picks, gate, down, up, "gelu")
        leaves = [tensor for tensor in (x, gate, down, up) if tensor.requires_grad]
        return [y.detach(), *torch.autograd.grad(y, leaves, self.dy)]

    def expected(self) -> list[Tensor]:
        """The same in float64 by plain PyTorch."""
        x, dy, gate = (value.double() for value in (self.x, self.dy, self.gate))
        down, up = (_values(table).double() for table in (self.down, self.up))
        plain = reference.Composed(reference)
        y, pre = plain.forward(x, self.picks, gate, down, up, "gelu")
        dx, dgate, dpre, hidden = plain.backward(dy, x, self.picks, pre, gate, down, up, "gelu")
        return [
            y,
            dx,
            dgate,
            *plain.table_grads([(dpre, x), (hidden, dy)], self.picks, len(down), dtype=torch.float64),
        ]


def _values(table: Tensor) -> Tensor:
    """What a table's elements stand for."""
    scales = scales_of(table)
    return table if scales is None else dequantised(table, scales)


def _inputs(
    here: Here, *, rows: int, tokens: int, picks: int, dim: int, dtype: torch.dtype, table_dtype: torch.dtype
) -> _Inputs:
    """Always the same ones of these sizes."""
    generator = torch.Generator(here.device).manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32, device=here.device)

    def table(std: float) -> Tensor:
        values = drawn(rows, dim) * std
        if table_dtype not in LARGEST:
            return values.to(table_dtype)
        codes, scales = quantised(values, table_dtype)
        let_scales(codes, scales)
        return codes

    return _Inputs(
        x=drawn(tokens, dim).to(dtype),
        dy=drawn(tokens, dim).to(dtype),
        gate=drawn(tokens * picks),
        down=table(dim**-0.5),
        up=table(1.0),
        picks=Picks.even(synthetic_picks(rows, tokens, picks, device=here.device)),
    )


def _kernels(here: Here) -> dict[str, Any]:
    """For each of the tables, the results that differ from the reference and by how much, and between two passes."""
    sizes = SIZES[here.device.type]
    cases = {}
    for rows, table_dtype in sizes.tables:
        inputs = _inputs(
            here,
            rows=rows,
            tokens=sizes.compared,
            picks=sizes.heads * sizes.top_k,
            dim=sizes.dim,
            dtype=sizes.dtype,
            table_dtype=table_dtype,
        )
        first, again, expected = inputs.passed(), inputs.passed(), inputs.expected()
        errors = [_error(mine, theirs) for mine, theirs in zip(first, expected)]
        formats = {codes: name for name, codes in CODES.items()}
        cases[f"{rows} rows of {formats.get(table_dtype, str(table_dtype).rpartition('.')[2])}"] = {
            "errors": dict(zip(_RESULTS, errors)),
            "wrong": [name for name, mine, error in zip(_RESULTS, first, errors) if error > _TOLERANCE[mine.dtype]],
            "unlike": [name for name, one, two in zip(_RESULTS, first, again) if not torch.equal(one, two)],
        }
    return cases


def _error(mine: Tensor, theirs: Tensor) -> float:
    """The largest difference, in parts of the largest number that was expected; huge if it is no number."""
    error = (mine - theirs).abs().amax() / theirs.abs().amax()
    return float(error.nan_to_num(nan=1e30, posinf=1e30))


def _judge_kernels(values: dict[int, dict[str, Any]], ranks: Ranks) -> list[Finding]:
    """Whether results are those of the reference, and bit for bit the same in two passes."""
    findings: list[Finding] = []
    worst: dict[str, float] = {}
    for case in values[min(values)]:
        errors = [value[case]["errors"] for value in values.values()]
        largest = {name: max(error[name] for error in errors) for name in errors[0]}
        worst[case] = max(largest.values())
        wrong = {rank: value[case]["wrong"] for rank, value in values.items() if value[case]["wrong"]}
        if wrong:
            names = sorted({name for names in wrong.values() for name in names})
            told = ", ".join(f"{name} by {largest[name]:.1g}" for name in names)
            text = f"{ranks.named(wrong)}: with {case} other results than plain PyTorch's in float64: {told}"
            advice = "do not train there: report it with the output of peer-dist doctor --json"
            findings.append(Finding("kernels", "fail", text, advice, largest))
        unlike = {rank: value[case]["unlike"] for rank, value in values.items() if value[case]["unlike"]}
        if unlike:
            told = ", ".join(sorted({name for names in unlike.values() for name in names}))
            text = f"{ranks.named(unlike)}: with {case} two passes differ: {told}"
            advice = "runs there do not repeat or resume bit for bit; if other results are well, see what Triton it is"
            findings.append(Finding("kernels", "fail", text, advice, largest))
    text = "; ".join(f"{case}: within {error:.1g}" for case, error in worst.items())
    text = f"forward and all gradients as in plain PyTorch in float64 ({text}), the same bits in two passes"
    return findings or [Finding("kernels", "ok", text, figures=worst)]


# ---------------------------------------------------------------------------------------------------------------------
# Rows that lie in the host's memory.


def _far(here: Here) -> dict[str, Any]:
    """Whether rows of pinned memory come as they are and go back as they are told to, and the bytes a second of rows,
    each way, and of a copy; nothing where no kernel can do it.
    """
    from peer_dist.kernels import triton  # late: importing it takes a while, and needs a GPU to be of use

    sizes, device = SIZES[here.device.type], here.device
    near = torch.zeros(sizes.far // 2, sizes.dim, dtype=sizes.dtype, device=device)
    if not triton.available(near):
        return {}
    pinned = device.type == "cuda"
    far = torch.empty(sizes.far, sizes.dim, dtype=sizes.dtype, device="cpu", pin_memory=pinned)
    generator = torch.Generator("cpu").manual_seed(0)
    far.copy_(torch.randn(far.shape, generator=generator, dtype=torch.float32, device="cpu"))
    chosen = torch.randperm(sizes.far, generator=generator, dtype=torch.int64, device="cpu")[: len(near)]
    rows, wanted = chosen.to(device), far.clone()

    gathered = fastest(here, lambda: triton.rows.gather_rows(far, rows, near))
    right = torch.equal(near.cpu(), wanted[chosen]) and torch.equal(far, wanted)
    wanted[chosen] = -wanted[chosen]
    near.neg_()
    scattered = fastest(here, lambda: triton.rows.scatter_rows(far, rows, near))
    half = far[: len(near)]
    copied = fastest(here, lambda: near.copy_(half, non_blocking=True))
    return {
        "right": right and torch.equal(far, wanted),
        "row_bytes": sizes.dim * sizes.dtype.itemsize,
        "gathered_bytes_per_s": near.nbytes / gathered,
        "scattered_bytes_per_s": near.nbytes / scattered,
        "copied_bytes_per_s": near.nbytes / copied,
    }


def _judge_far(values: dict[int, dict[str, Any]], ranks: Ranks) -> list[Finding]:
    """Whether the rows are right, and the slowest rank's rates."""
    values = {rank: value for rank, value in values.items() if value}
    wrong = {rank: value for rank, value in values.items() if not value["right"]}
    if wrong:
        text = f"{ranks.named(wrong)}: rows of the host's memory come or go other than they are"
        advice = "leave peer.table_memory at device there, and report it with the output of peer-dist doctor --json"
        return [Finding("host memory", "fail", text, advice, wrong[min(wrong)])]
    if not values:
        return []
    slowest = min(values, key=lambda rank: values[rank]["gathered_bytes_per_s"])
    value = values[slowest]
    text = (
        f"rows of {value['row_bytes']:,} bytes are read from the host's memory at "
        f"{value['gathered_bytes_per_s'] / 1e9:.3g} GB/s and written there at "
        f"{value['scattered_bytes_per_s'] / 1e9:.3g} GB/s; a copy reads {value['copied_bytes_per_s'] / 1e9:.3g} GB/s"
    )
    if len(values) > 1:
        text = f"slowest is {ranks.named([slowest])}: {text}"
    return [Finding("host memory", "ok", text, figures=value)]


# ---------------------------------------------------------------------------------------------------------------------
# A whole layer.


def _layer(here: Here) -> dict[str, Any]:
    """Seconds of a PEER layer's passes, the least bytes that they must move, and the rate of a copy.

    What counts: the rows of both tables that were picked, each once, read in the forward pass and again in the
    backward pass; both gradients, of all rows, written; x, y, dy and dx, and x and dy once more for the gradients.
    Retrieval, whose keys and scores fit in caches, and the numbers of the picks count nothing.
    """
    sizes = SIZES[here.device.type]
    itemsize = sizes.dtype.itemsize
    rate = 8 * sizes.copied / copy_seconds(here, sizes.copied)
    free = torch.cuda.mem_get_info(here.device)[0] if here.device.type == "cuda" else free_memory()
    spare = 0 if here.device.type == "cpu" else _SPARE
    fitting = [count for count in sizes.experts if 4 * count * sizes.dim * itemsize + spare <= free]
    if not fitting:
        return {"free": free}
    experts = fitting[0]
    layer = PEER(sizes.dim, experts, sizes.heads, sizes.top_k, seed=0, device=here.device, dtype=sizes.dtype)
    picked: list[Tensor] = []
    layer.on_route = lambda indices, gates: picked.append(indices)
    generator = torch.Generator(here.device).manual_seed(0)
    x, dy = (
        torch.randn(sizes.tokens, sizes.dim, generator=generator, dtype=torch.float32, device=here.device).to(
            sizes.dtype
        )
        for _ in range(2)
    )
    x.requires_grad_()

    def passed() -> None:
        layer.zero_grad()
        x.grad = None
        picked.clear()
        layer(x).backward(dy)

    seconds = fastest(here, passed)
    rows = int(torch.unique(picked[0]).numel())
    assert x.grad is not None
    # a sum shows what is not finite without as much memory again
    finite = all(
        bool(grad.sum().isfinite()) for grad in (x.grad, *(p.grad for p in layer.parameters())) if grad is not None
    )
    row = sizes.dim * itemsize
    return {
        "experts": experts,
        "seconds": seconds,
        "rows": rows,
        "floor_bytes": 4 * rows * row + 2 * experts * row + 6 * sizes.tokens * row,
        "copy_bytes_per_s": rate,
        "finite": finite,
    }


def _judge_layer(device_type: str, values: dict[int, dict[str, Any]], ranks: Ranks) -> list[Finding]:
    """How near the slowest rank's layer is to its floor."""
    sizes = SIZES[device_type]
    findings = []
    full = {rank: value["free"] for rank, value in values.items() if "free" in value}
    if full:
        text = f"{ranks.named(full)}: not tried, {sized(min(full.values()))} of memory is too little"
        findings.append(Finding("PEER layer", "warn", text, "see with nvidia-smi who uses the memory"))
    timed = {rank: value for rank, value in values.items() if "seconds" in value}
    broken = [rank for rank, value in timed.items() if not value["finite"]]
    if broken:
        text = f"{ranks.named(broken)}: gradients that are no finite numbers"
        advice = "do not train there: report it with the output of peer-dist doctor --json"
        findings.append(Finding("PEER layer", "fail", text, advice))
    if not timed:
        return findings
    floors = {rank: value["floor_bytes"] / value["copy_bytes_per_s"] for rank, value in timed.items()}
    slowest = max(timed, key=lambda rank: timed[rank]["seconds"] / floors[rank])
    value, floor = timed[slowest], floors[slowest]
    times = value["seconds"] / floor
    text = (
        f"forward and backward {value['seconds'] * 1e3:.2f} ms, {times:.1f} times the floor of {floor * 1e3:.2f} ms, "
        f"in which a copy moves the {value['floor_bytes'] / 1e9:.3g} GB of picked rows, gradients and tokens at "
        f"{value['copy_bytes_per_s'] / 1e9:,.0f} GB/s ({value['experts']} experts of width {sizes.dim}, "
        f"{sizes.heads} heads x {sizes.top_k}, {sizes.tokens} tokens, {str(sizes.dtype).rpartition('.')[2]})"
    )
    if len(timed) > 1:
        text = f"slowest is {ranks.named([slowest])}: {text}"
    figures = {**value, "floor_seconds": floor, "times_the_floor": times}
    return [*findings, Finding("PEER layer", "ok", text, figures=figures)]


# ---------------------------------------------------------------------------------------------------------------------


def gpu_checks(device_type: str = "cuda") -> tuple[Check, ...]:
    """The checks; ranks on other types of devices than this are passed over, and say nothing if all are."""

    def check(name: str, measure: Callable[[Here], Any], judge: Callable[..., list[Finding]], advice: str) -> Check:
        return Check(
            name,
            functools.partial(_measured, device_type, measure),
            functools.partial(_judged, judge),
            advice,
        )

    advice = "see the checks before it, and with nvidia-smi who uses the memory; compiling may want more --seconds"
    return (
        check("driver", _card, _judge_card, "see whether nvidia-smi answers there"),
        check("Triton", _triton, _judge_triton, "install the Triton that belongs to this torch"),
        check("kernels", _kernels, _judge_kernels, advice),
        check("host memory", _far, _judge_far, "see the checks before it; pinned memory may be limited: ulimit -l"),
        check("PEER layer", _layer, functools.partial(_judge_layer, device_type), advice),
    )


def _measured(device_type: str, measure: Callable[[Here], Any], here: Here) -> Any:
    """What is measured; None on another device."""
    if here.device.type != device_type:
        return None
    try:
        return measure(here)
    finally:
        gc.collect()
        if device_type == "cuda":
            torch.cuda.empty_cache()  # the next check, and other ranks, need the memory


def _judged(judge: Callable[..., list[Finding]], values: dict[int, Any], ranks: Ranks) -> list[Finding]:
    """What the ranks with a device of the type give rise to."""
    values = {rank: value for rank, value in values.items() if value is not None}
    return judge(values, ranks) if values else []
