"""The layers in tools and trainers of others: Accelerate, Hugging Face, Lightning, PEFT, offload, quantizers."""

from __future__ import annotations

import copy
import importlib.util
import os
import sys
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import peer_dist
from peer_dist import PEER
from tests.ranks import run_ranks
from tests.test_any_model import DIM, LAYERS, every_layer, inputs

STEPS, RATE = 8, 0.5


def needs(*packages: str) -> pytest.MarkDecorator:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)} (of the dev extra)")


class Model(nn.Module):
    """A layer of any kind between linear maps, as trainers like it: it returns its loss."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.ffw, self.head = layer, nn.Linear(DIM, DIM)

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None, state: torch.Tensor | None = None):
        out = self.head(self.ffw(x) if state is None else self.ffw(x, state))
        return out if y is None else {"loss": F.mse_loss(out.float(), y), "out": out}


def data(rows: int = 64) -> list[dict[str, torch.Tensor]]:
    """Something to learn: what another model makes of random numbers."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, DIM, generator=generator)
    w = torch.randn(DIM, DIM, generator=generator) / DIM**0.5
    return [{"x": row, "y": y} for row, y in zip(x, (x @ w).tanh())]


# ---------------------------------------------------------------------------------------------------------------------
# Tools.


@needs("accelerate")
@every_layer
def test_offloaded(name, tmp_path):
    """Weights that lie on the disk, or in memory, and come for the time of a call, into sub-modules that are called."""
    from accelerate import cpu_offload, disk_offload

    layer = LAYERS[name]().eval()
    here = torch.device("cpu")
    for offload in (lambda model: disk_offload(model, tmp_path, here), lambda model: cpu_offload(model, here)):
        with torch.no_grad():
            offloaded = offload(copy.deepcopy(layer))
            assert {parameter.device.type for parameter in offloaded.parameters()} == {"meta"}
            assert torch.equal(offloaded(*inputs(layer)), layer(*inputs(layer)))


@every_layer
def test_quantized(name):
    """Every linear map is one for quantizers, and is called as quantized."""
    layer = LAYERS[name]().eval()
    linear = [key for key, module in layer.named_modules() if isinstance(module, nn.Linear)]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(layer), {nn.Linear}, dtype=torch.qint8)
        y, got = layer(*inputs(layer)), quantized(*inputs(layer))
    assert all(not isinstance(quantized.get_submodule(key), nn.Linear) for key in linear)
    assert linear or torch.equal(got, y)
    assert not linear or 0 < (got - y).norm() < 0.5 * y.norm()  # other picks, here and there


@needs("peft")
@every_layer
def test_low_rank_adapters(name):
    from peft import LoraConfig, get_peft_model

    model = Model(LAYERS[name]()).eval()
    x, *state = inputs(model.ffw)
    arguments = {"x": x, "state": state[0] if state else None}
    before = model(**arguments).detach()
    names = [key for key, module in model.named_modules() if isinstance(module, nn.Linear)]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=names, init_lora_weights=False)).eval()
    y = adapted(**arguments)
    y.square().mean().backward()
    trained = {key: parameter.grad for key, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * len(names)
    assert all(grad is not None and grad.any() for grad in trained.values())
    assert not torch.allclose(y, before, rtol=1e-2)
    with adapted.disable_adapter():
        assert torch.equal(adapted(**arguments), before)
    merged = adapted.merge_and_unload()
    assert sorted(merged.state_dict()) == sorted(Model(LAYERS[name]()).state_dict())
    torch.testing.assert_close(merged(**arguments), y, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Trainers.


@pytest.fixture
def own_accelerator():
    """Its settings are the process's, until somebody takes them back."""
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@needs("accelerate")
@pytest.mark.parametrize("name", ["peer", "everything", "query_norm=batch", "memory", "sparse_grad=True"])
def test_accelerate(name, tmp_path, own_accelerator):
    """A loop in mixed precision with clipping, saved and loaded."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, mixed_precision="bf16")

    def built():
        model = Model(LAYERS[name]())
        kind = torch.optim.SparseAdam if model.ffw.sparse_grad else torch.optim.AdamW
        parameters = [model.ffw.down, model.ffw.up] if model.ffw.sparse_grad else model.parameters()
        return accelerator.prepare(model, kind(parameters, lr=1e-2))

    model, optimizer = built()
    loader = accelerator.prepare(torch.utils.data.DataLoader(data(), batch_size=16))
    losses = []
    for _ in range(8):
        for batch in loader:
            if name == "everything":
                batch["state"] = torch.ones(len(batch["x"]), 5)
            with accelerator.accumulate(model):
                loss = model(**batch)["loss"]
                accelerator.backward(loss)
                peer_dist.clip_grad_norm_(model, 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    accelerator.save_state(tmp_path)
    want = {key: value.clone() for key, value in model.state_dict().items()}
    for value in model.state_dict().values():
        value.zero_()
    accelerator.load_state(tmp_path)
    assert all(torch.equal(value, want[key]) for key, value in model.state_dict().items())


def spread_model(ranks: int) -> Model:
    """For a trainer without a loop to put a line into: the tables' gradients are divided where they come from."""
    torch.manual_seed(0)
    model = Model(PEER(DIM, 49, 3, 4, 6, query_norm="rms", seed=3, group=dist.group.WORLD))
    for table in peer_dist.exempt_tables(model):
        table.register_hook(lambda grad: grad / ranks)
    return model


def whole(model: Model) -> dict[str, torch.Tensor]:
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    values = model.state_dict().items()
    return {key: value.full_tensor() if hasattr(value, "full_tensor") else value.clone() for key, value in values}


def as_launched(rank: int, ranks: int) -> None:
    """The variables of torchrun, for those who look at these and not at the process group that is there."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


def in_hugging_faces_trainer(rank: int, ranks: int, folder: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    from transformers import Trainer, TrainingArguments

    as_launched(rank, ranks)
    model = spread_model(ranks)
    arguments = TrainingArguments(
        folder,
        max_steps=STEPS,
        per_device_train_batch_size=16 // ranks,
        learning_rate=RATE,
        optim="sgd",  # which a gradient of another size changes
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        bf16=True,
        use_cpu=True,
        ddp_backend="gloo",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=data(16 * STEPS))
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], whole(model)


def in_lightning(rank: int, ranks: int, folder: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    hide_broken_mpi()
    import lightning
    from lightning.fabric.plugins.environments import LightningEnvironment
    from lightning.pytorch.strategies import DDPStrategy

    as_launched(rank, ranks)
    losses = []

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = None

        def configure_model(self) -> None:
            if self.model is None:
                self.model = spread_model(ranks)  # the process group is there, and nothing is wrapped yet
                peer_dist.exempt_tables(self)  # what Lightning is going to wrap

        def training_step(self, batch, _):
            loss = self.model(**batch)["loss"]
            mean = loss.detach() / ranks
            dist.all_reduce(mean)
            losses.append(float(mean))
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=RATE)

    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=DDPStrategy(cluster_environment=LightningEnvironment(), process_group_backend="gloo"),
        precision="bf16-mixed",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    module = Module()
    trainer.fit(module, torch.utils.data.DataLoader(data(16 * STEPS), batch_size=16 // ranks))
    return losses, whole(module.model)


def hide_broken_mpi() -> None:
    """Lightning stumbles over an mpi4py that finds no MPI."""
    try:
        from mpi4py import MPI  # noqa: F401
    except RuntimeError:
        sys.modules["mpi4py"] = None
    except ImportError:
        pass


def first_weights(rank: int, ranks: int) -> dict[str, torch.Tensor]:
    return whole(spread_model(ranks))


@pytest.mark.parametrize(
    "trainer",
    [
        pytest.param(in_hugging_faces_trainer, marks=needs("transformers", "accelerate")),
        pytest.param(in_lightning, marks=needs("lightning")),
    ],
)
def test_trainers_on_two_ranks(trainer, tmp_path):
    """In bfloat16, with tables that are spread: as on one."""
    before, *_ = run_ranks(first_weights, 1)
    (alone, weights), *_ = run_ranks(trainer, 1, str(tmp_path))
    assert len(alone) == STEPS
    assert sum(alone[-3:]) < sum(alone[:3])
    for losses, got in run_ranks(trainer, 2, str(tmp_path)):
        torch.testing.assert_close(losses, alone, rtol=3e-2, atol=0)
        for key, value in weights.items():
            assert (got[key] - value).norm() < 0.1 * (value - before[key]).norm(), key
