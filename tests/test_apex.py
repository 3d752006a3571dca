"""Apex and TransformerEngine: the same losses with what is used of them, without it, and with broken ones installed.

Neither is installed where these tests are written: stand-ins have their interfaces.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from tests.layouts import MOE, SIGMA, UNTIED, Layout, base_config
from tests.models import make
from tests.ranks import run_ranks
from tests.runs import in_folder, losses_of, make_trainer, run_to_the_end, trained, with_keys

ZERO = {"zero": {"stage": 0}}


def accumulate(calls: list[Any]) -> SimpleNamespace:
    """Apex's ``fused_weight_gradient_mlp_cuda`` in plain PyTorch."""

    def wgrad_gemm_accum_fp32(rows: torch.Tensor, d_output: torch.Tensor, d_weight: torch.Tensor) -> None:
        assert d_weight.dtype == torch.float32
        assert rows.dim() == d_output.dim() == 2
        assert rows.is_contiguous()
        assert d_output.is_contiguous()
        assert d_weight.is_contiguous()
        calls.append(tuple(d_weight.shape))
        d_weight += d_output.float().T @ rows.float()

    return SimpleNamespace(wgrad_gemm_accum_fp32=wgrad_gemm_accum_fp32)


def with_apex(calls: list[Any]) -> None:
    """Let this process have the stand-in, and use it on its CPU."""
    from megatron.core.tensor_parallel import layers

    from peer_dist.megatron import fused

    layers.fused_weight_gradient_mlp_cuda = accumulate(calls)
    layers._grad_accum_fusion_available = True
    fused._DEVICES = ("cuda", "cpu")


# ---------------------------------------------------------------- the choice


@pytest.mark.parametrize(
    ("fused", "stage", "device", "there", "wanted"),
    [
        ("auto", 0, "cuda", True, True),
        ("auto", 0, "cuda", False, False),
        ("auto", 0, "cpu", True, False),
        ("auto", 0, "meta", True, False),
        ("auto", 1, "cuda", True, False),
        ("none", 0, "cuda", True, False),
    ],
)
def test_when_apex_is_used(
    fused: str, stage: int, device: str, there: bool, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peer_dist.megatron import fuses_weight_gradients  # before Megatron: it is imported quietly

    monkeypatch.setattr("megatron.core.tensor_parallel.layers._grad_accum_fusion_available", there)
    config = make({"train.fused": fused, "zero.stage": stage})
    assert fuses_weight_gradients(config, torch.device(device)) is wanted


# ---------------------------------------------------------------- gradients of weights


def trained_with_apex(rank: int, world_size: int, tree: dict[str, Any], steps: int) -> tuple[Any, ...]:
    """As :func:`tests.runs.trained`, and the shapes of the gradients that apex added up."""
    calls: list[Any] = []
    with_apex(calls)
    return *trained(rank, world_size, tree, steps), calls


@pytest.mark.parametrize(
    ("layout", "precision"),
    [
        pytest.param(layout, precision, id=f"{layout}, {precision}")
        for layout, precision in (
            (Layout(1, {}, 0, recompute=1), "fp32"),
            (Layout(1, {}, 0, settings=UNTIED), "bf16"),
            (Layout(2, {"tensor": 2, "sequence": True}, 0, settings=MOE), "fp32"),
            (Layout(2, {"pipeline": 2, "virtual_pipeline": 2}, 0, settings=SIGMA), "fp32"),
        )
    ],
)
def test_the_same_losses_with_and_without(layout: Layout, precision: str, text: Path, tmp_path: Path) -> None:
    """bf16 differs by the rounding of each pass's gradient, which apex's sum does not have."""
    tree = with_keys(layout.config(base_config(text, tmp_path)), train={"precision": precision})
    wanted = run_ranks(trained, layout.ranks, with_keys(tree, train={"fused": "none"}), 6)
    got = run_ranks(trained_with_apex, layout.ranks, tree, 6)
    losses, norms = {"fp32": (1e-5, 1e-4), "bf16": (2e-3, 2e-2)}[precision]
    for (ours, our_norms, calls), (theirs, their_norms) in zip(got, wanted, strict=True):
        assert ours == pytest.approx(theirs, rel=losses)
        assert our_norms == pytest.approx(their_norms, rel=norms)
        assert calls


def test_none_and_other_stages_leave_apex_alone(small: dict[str, Any]) -> None:
    for changes in ({**ZERO, "train": {"fused": "none"}}, {"zero": {"stage": 1}}):
        (_, _, calls), = run_ranks(trained_with_apex, 1, with_keys(small, **changes), 1)  # fmt: skip
        assert not calls


def run_with_apex(rank: int, world_size: int, tree: dict[str, Any]) -> None:
    with_apex([])
    run_to_the_end(rank, world_size, tree)


def test_checkpoints_go_both_ways_and_the_run_says_what_it_used(small: dict[str, Any], tmp_path: Path) -> None:
    alone = with_keys(in_folder(small, tmp_path / "alone"), **ZERO, train={"fused": "none"})
    run_ranks(run_to_the_end, 1, alone)
    for number, (first, then) in enumerate(((run_with_apex, run_to_the_end), (run_to_the_end, run_with_apex))):
        tree = with_keys(in_folder(small, tmp_path / str(number)), **ZERO)
        run_ranks(first, 1, with_keys(tree, train={"steps": 4}))
        run_ranks(then, 1, with_keys(tree, train={"fused": "auto"}))
        assert losses_of(tree) == pytest.approx(losses_of(alone), rel=1e-5)
        events = [json.loads(line) for line in (Path(tree["logging"]["dir"]) / "events.jsonl").read_text().splitlines()]
        used = [event["fused"] for event in events if event["event"] == "start"]
        assert sorted(used) == ["apex: weight gradients", "none"]


# ---------------------------------------------------------------- what Megatron would take by itself

STAND_INS = {
    "amp_C.py": "def multi_tensor_l2norm(*_): raise AssertionError\nmulti_tensor_scale = multi_tensor_l2norm\n",
    "apex/__init__.py": "",
    "apex/multi_tensor_apply.py": "def multi_tensor_applier(*_): raise AssertionError\n",
    "apex/optimizers.py": """
import torch

class FusedAdam(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True,
                 weight_decay=0.0, amsgrad=False, set_grad_none=True, capturable=False, master_weights=False):
        super().__init__(params, dict(lr=lr, bias_correction=bias_correction, betas=betas, eps=eps,
                                      weight_decay=weight_decay))

    def step(self):
        raise AssertionError("Megatron's choice of Adam was used")

class FusedSGD(FusedAdam):
    pass
""",
}
MEGATRON_FIRST = """
import json, sys
import torch
import apex.optimizers
import megatron.core.optimizer

assert megatron.core.optimizer.Adam is apex.optimizers.FusedAdam
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=0, world_size=1)
from tests.test_apex import saved_and_went_on
print("losses", json.dumps(saved_and_went_on(json.loads(sys.argv[1]))))
assert sys.modules["apex"] is apex
"""


def saved_and_went_on(tree: dict[str, Any]) -> list[float]:
    """The losses of two steps, a checkpoint, and the losses of two more."""
    trainer = make_trainer(tree)
    before = [trainer.step()["train/loss"] for _ in range(2)]
    trainer.save()
    return before + [trainer.step()["train/loss"] for _ in range(2)]


def written(files: dict[str, str], folder: Path) -> dict[str, str]:
    """The environment of a process that finds these modules."""
    for name, source in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(source)
    paths = [str(folder), str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}


def test_apexs_adam_and_norms_are_left_alone(small: dict[str, Any], tmp_path: Path) -> None:
    """Even where the program has imported Megatron before, which then has them."""
    small = with_keys(small, **ZERO, train={"precision": "bf16"})
    out = subprocess.run(
        [sys.executable, "-c", MEGATRON_FIRST, json.dumps(small), str(tmp_path / "store")],
        env=written(STAND_INS, tmp_path / "installed"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert out.returncode == 0, out.stderr
    losses = json.loads(out.stdout.split("losses")[1])
    assert losses[2:] == pytest.approx(run_ranks(trained, 1, small, 2)[0][0], rel=1e-5), "resumes without apex"
    fresh = with_keys(small, checkpoint={"dir": str(tmp_path / "fresh")})
    assert losses == pytest.approx(run_ranks(trained, 1, fresh, 4)[0][0], rel=1e-5)


@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_broken_ones_end_nothing_and_say_nothing(stage: int, small: dict[str, Any], tmp_path: Path) -> None:
    """TransformerEngine raises what its own loader does where its libraries are missing."""
    tree = with_keys(small, zero={"stage": stage}, train={"steps": 1}, evaluation={"interval": 1})
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(tree))
    broken = {
        "apex/__init__.py": "import no_such_extension_of_apex\n",
        "transformer_engine/__init__.py": "raise FileNotFoundError('no shared object of transformer_engine')\n",
        "fused_weight_gradient_mlp_cuda.py": "raise ImportError('undefined symbol')\n",
    }
    out = subprocess.run(
        [sys.executable, "-m", "peer_dist", "train", "--config", str(config)],
        env=written(broken, tmp_path / "installed"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert out.returncode == 0, out.stderr
    for word in ("apex", "ransformer", "fused", "Warning"):
        assert word not in out.stdout + out.stderr
    assert len(losses_of(tree)) == 1


# ---------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 1e-2)])
def test_apex_itself(precision: str, tolerance: float, small: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("apex")
    pytest.importorskip("fused_weight_gradient_mlp_cuda")
    losses = []
    for fused in ("auto", "none"):
        tree = in_folder(with_keys(small, **ZERO, train={"precision": precision, "fused": fused}), tmp_path / fused)
        config = tmp_path / f"{fused}.yaml"
        config.write_text(yaml.safe_dump(tree))
        command = [sys.executable, "-m", "peer_dist", "train", "--config", str(config)]
        out = subprocess.run(command, capture_output=True, text=True, timeout=250)
        assert out.returncode == 0, out.stderr
        assert ("used of apex: weight gradients" in out.stderr) == (fused == "auto")
        losses.append(losses_of(tree))
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_in_one_kernel_is_the_formula(dtype: torch.dtype) -> None:
    from peer_dist.megatron.norm import RMSNorm

    norm = RMSNorm(SimpleNamespace(params_dtype=dtype, sequence_parallel=False), 1024).cuda()
    torch.manual_seed(0)
    norm.weight.data.uniform_(0.5, 2)
    x = (3 * torch.randn(64, 2, 1024, device="cuda")).to(dtype).requires_grad_()
    dy = torch.randn_like(x)
    out = norm(x)
    out.backward(dy)

    wide, weight = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    expected = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight
    expected.backward(dy.double())
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for got, want in ((out, expected), (x.grad, wide.grad), (norm.weight.grad, weight.grad)):
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance * float(want.abs().mean()))
