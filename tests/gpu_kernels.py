"""How tests run Triton's kernels where there is no GPU, interpreted, and compile them for GPUs that are not here.

Whether kernels are interpreted is chosen by an environment variable before they are imported, so that a file of their
tests runs itself again in such a process: :func:`run_interpreted`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from peer_dist.kernels.triton import launching

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.uint8: "*u8",
    torch.int8: "*i8",
}
SCALARS = {bool: "i1", int: "i32", float: "fp32"}

Launch = tuple[Any, tuple[Any, ...], int, dict[str, Any]]
"""A kernel, its arguments, its warps and its constants."""


def runs_kernels(test: Any) -> Any:
    """On a GPU where there is one and tests see it, else interpreted."""
    elsewhere = DEVICE == "cpu" and not INTERPRETED
    return pytest.mark.gpu(pytest.mark.skipif(elsewhere, reason="no GPU: run by test_through_the_interpreter")(test))


compiles = pytest.mark.skipif(INTERPRETED, reason="interpreted kernels have nothing to compile")


def run_interpreted(file: str, which: str) -> None:
    """Run a file's tests of the kernels in a process in which they are interpreted; ``which``: its ``-m``."""
    options = ["--numprocesses=0", "-p", "no:cacheprovider", "-m", which, "--durations=0"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, file],
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout


def launches(call: Callable[[], Any], patch: pytest.MonkeyPatch) -> list[Launch]:
    """Every distinct launch of a call, none of which is run."""
    found: dict[Any, Launch] = {}

    def record(kernel: Any, grid: Any, *args: Any, num_warps: int, **constants: Any) -> None:
        kinds = tuple(value.dtype if isinstance(value, torch.Tensor) else value for value in args)
        found.setdefault((kernel, kinds, num_warps, str(constants)), (kernel, args, num_warps, constants))

    with patch.context() as inner:
        inner.setattr(launching, "launch", record)
        call()
    return list(found.values())


def compiled(launch: Launch, capability: int) -> Any:
    """As the launcher's just-in-time compilation would: pointers of 16 bytes' alignment but for those by pick, block
    sizes as constants.
    """
    from triton.backends import compiler
    from triton.compiler import ASTSource

    kernel, args, num_warps, constants = launch
    signature, constexprs, aligned = {}, dict(constants), []
    for index, (parameter, value) in enumerate(zip(kernel.params, args)):
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            if not parameter.do_not_specialize_on_alignment:
                aligned.append(index)
        elif value is None:
            constexprs[parameter.name] = None
        else:
            long = isinstance(value, int) and not -(1 << 31) <= value < 1 << 31
            signature[parameter.name] = "i64" if long else SCALARS[type(value)]
    options = {key: constexprs.pop(key) for key in ("num_stages", "maxnreg", "enable_fp_fusion") if key in constexprs}
    if hasattr(compiler, "AttrsDescriptor"):  # up to Triton 3.2, of torch 2.6
        attributes = compiler.AttrsDescriptor.from_hints(dict.fromkeys(aligned, 16))
    else:
        attributes = {(index,): [["tt.divisibility", 16]] for index in aligned}
        signature |= dict.fromkeys(constexprs, "constexpr")
        signature = {name: signature[name] for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constexprs, attributes)
    target = compiler.GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=launching.OPTIONS | options | {"num_warps": num_warps})


def resources(binary: Any, folder: Path) -> tuple[int, int]:
    """Registers a thread and bytes of stack a thread, where spilled registers go."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    text = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout

    def found(name: str) -> int:
        match = re.search(rf"{name}:(\d+)", text)
        assert match is not None
        return int(match[1])

    return found("REG"), found("STACK")


def needs_assembler(capability: int) -> None:
    """Skip what this Triton's assembler is too old for."""
    if capability == 100 and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
        pytest.skip("this Triton's assembler is older than sm_100")
