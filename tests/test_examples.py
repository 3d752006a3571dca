"""Every script of examples/ runs, and does what it says."""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import _free_port, run_each
from tests.test_stacks import hide_broken_mpi, needs

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def _script(path: Path, arguments: list[str], variables: dict[str, str]) -> str:
    """What it prints, run in this process."""
    os.environ |= variables
    sys.argv = [str(path), *arguments]
    hide_broken_mpi()
    if path.parent != EXAMPLES:
        os.chdir(path.parent)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        runpy.run_path(str(path), run_name="__main__")
    return output.getvalue()


def run(script: str | Path, *arguments: str, ranks: int = 0) -> str:
    """What the first process prints, of as many as torchrun would start; of one, without torchrun, for 0."""
    launched = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    variables = [launched | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)] or [{}]
    output, *others = run_each(_script, [(EXAMPLES / script, list(arguments), each) for each in variables])
    assert not any(others), "one rank speaks for all"
    return output


def numbers(pattern: str, output: str) -> list[float]:
    """The groups of what must be in it, as numbers."""
    found = re.search(pattern, output)
    assert found, output
    return [float(group.replace(",", "")) for group in found.groups()]


@needs("transformers", "accelerate")
def test_transformers_trainer(tmp_path):
    output = run("transformers_trainer.py", str(tmp_path))
    before, after, loaded = numbers(
        r"loss (\S+) before, (\S+) after 40 steps\n(?:.*\n)?loss (\S+) loaded again", output
    )
    assert after < 0.8 * before
    assert loaded == pytest.approx(after, abs=5e-3)  # in bfloat16


@needs("lightning")
def test_lightning_module():
    before, after, steps = numbers(r"loss (\S+) before, (\S+) after (\d+) steps", run("lightning_module.py"))
    assert after < 0.8 * before
    assert steps > 10


@needs("peft")
def test_lora():
    output = run("lora.py")
    trained, before, after = numbers(r"(\S+) parameters trained: loss (\S+) -> (\S+)", output)
    assert trained < 10_000
    assert after < 0.8 * before
    (difference,) = numbers(r"merged, the output differs by (\S+)", output)
    assert difference < 1e-4


def test_compiled():
    """In a process of its own: those that are forked have the compiler turned off."""
    done = subprocess.run([sys.executable, EXAMPLES / "compiled.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    off, ratio = numbers(r"gradients agree to (\S+)\neager / compiled, .*: (\S+)", done.stdout)
    assert off < 1e-4
    assert ratio > 0  # how large is the benchmark's matter


def test_fsdp2():
    """With the tables gathered, and spread: the same losses."""
    output = run("fsdp2.py", ranks=2)
    losses = re.findall(r"rows here (\S+)  loss (\S+) -> (\S+)", output)
    assert len(losses) == 2, output
    assert {rows for rows, _, _ in losses} == {"2,048"}
    (first, last), spread = ([float(value) for value in values] for _, *values in losses)
    assert last < 0.8 * first
    assert spread == pytest.approx([first, last], abs=2e-3)


def test_larger_tables():
    """In host memory and on a disk, on one rank and spread over two: the same curve."""
    curves = []
    for arguments, ranks in ((["--memory", "disk"], 0), ([], 2)):
        output = run("larger_tables.py", "--steps", "21", *arguments, ranks=ranks)
        curves.append(re.findall(r"step \d+  loss (\S+)  gradient (\S+)", output))
        assert "in the state dict torch.bfloat16" in output
    (first, _), (last, _) = ([float(value) for value in values] for values in curves[0])
    assert last < 0.6 * first
    for one, other in zip(*curves, strict=True):
        assert [float(value) for value in one] == pytest.approx([float(value) for value in other], abs=2e-2)


def steps(output: str) -> dict[int, tuple[float, float]]:
    """Loss and norm of the gradient, by step."""
    lines = re.findall(r"step (\d+)  loss (\S+)  gradient (\S+)  rows", output)
    return {int(step): (float(loss), float(norm)) for step, loss, norm in lines}


def test_checkpoint(tmp_path):
    """Saved on two ranks, loaded on one and on three, the run goes on as if it had never stopped."""
    never_stopped = steps(run("checkpoint.py", "--steps", "21", ranks=2))
    assert list(never_stopped) == [0, 10, 20]
    assert never_stopped[20][0] < 0.6 * never_stopped[0][0]
    stopped = steps(run("checkpoint.py", "--steps", "11", "--save", str(tmp_path / "saved"), ranks=2))
    for ranks in (1, 3):
        went_on = steps(run("checkpoint.py", "--steps", "21", "--load", str(tmp_path / "saved"), ranks=ranks))
        assert list(stopped | went_on) == list(never_stopped)
        for step, values in (stopped | went_on).items():
            assert values == pytest.approx(never_stopped[step], abs=2e-3), step


@pytest.mark.parametrize("page", ["README.md", "docs/tutorials/layer.md"])
def test_whole_scripts_of(page, tmp_path):
    """Those of its Python blocks that are: they begin with an import."""
    blocks = re.findall(r"^```python\n(import .*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    for place, block in enumerate(blocks):
        script = tmp_path / f"{place}.py"
        script.write_text(block)
        run(script, ranks=2 if "init_process_group" in block else 0)
    assert (tmp_path / "checkpoint" / ".metadata").exists() == (page == "README.md")


def test_every_example_is_run():
    missing = [path.name for path in EXAMPLES.glob("*.py") if f"test_{path.stem}" not in globals()]
    assert not missing, "examples without a test"
    for path in EXAMPLES.glob("*.py"):
        assert f"examples/{path.name}" in path.read_text().split('"""')[1], f"{path.name}: does not say how it is run"
