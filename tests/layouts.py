"""The table of parallel layouts, each of which must train as one process does.

python -m tests.layouts      trains them all and prints the table of docs/layouts.md
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.ranks import run_ranks
from tests.runs import small_config

STEPS = 10
LOSS, NORM = 1e-5, 1e-4  # relative differences allowed at every step
SEED = 11
SEQUENCES = 8  # per forward pass over all data-parallel ranks, in every layout that does not say otherwise


@dataclass(frozen=True)
class Layout:
    """One row of the table; ``settings`` hold for the one process that it is compared with, too.

    Attributes:
        parallel: the config's parallel section.
        zero, offload: the config's zero section.
        recompute: layers of each stage whose activations are recomputed.
        sequences: per forward pass over all data-parallel ranks.
        passes: forward passes a step.
        quick: part of the tests that run every time.
    """

    ranks: int
    parallel: dict[str, Any]
    zero: int = 1
    recompute: int = 0
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    sequences: int = SEQUENCES
    passes: int = 2
    offload: bool = False
    quick: bool = False

    @property
    def data_parallel(self) -> int:
        return self.ranks // (self.parallel.get("tensor", 1) * self.parallel.get("pipeline", 1))

    @property
    def name(self) -> str:
        short = {
            "tensor": "TP", "pipeline": "PP", "virtual_pipeline": "VPP", "expert": "EP", "expert_tensor": "ETP"
        }  # fmt: skip
        parts = [f"{short[key]}{size}" for key, size in self.parallel.items() if key in short]
        parts += ["SP"] * self.parallel.get("sequence", False) + ["batched"] * self.parallel.get("batch_p2p", False)
        if self.data_parallel > 1:
            parts.append(f"DP{self.data_parallel}")
        sharded = self.parallel.get("pipeline", 1) * self.parallel.get("expert", 1)
        copies = self.ranks // (sharded * self.parallel.get("expert_tensor", 1))
        if copies > 1:
            parts.append(f"EDP{copies}")
        return " x ".join(parts) or "one process"

    @property
    def options(self) -> str:
        parts = ["recomputation"] * bool(self.recompute) + ["offload"] * self.offload
        for section in self.settings.values():
            parts += [f"{key}: {value}" for key, value in section.items()]
        return ", ".join(parts).replace("'", "")

    def __str__(self) -> str:
        options = f", {self.options}" if self.options else ""
        return f"{self.ranks} ranks, {self.name}, ZeRO {self.zero}{options}"

    def config(self, base: dict[str, Any]) -> dict[str, Any]:
        """The base config as plain values, in this layout."""
        tree = self._with_settings(base, self.sequences // self.data_parallel)
        tree["train"]["recompute_layers"] = self.recompute
        return {**tree, "parallel": self.parallel, "zero": {"stage": self.zero, "offload": self.offload}}

    def alone(self, base: dict[str, Any]) -> dict[str, Any]:
        """The same run in one process."""
        return self._with_settings(base, self.sequences)

    def _with_settings(self, base: dict[str, Any], micro_batch_size: int) -> dict[str, Any]:
        sections = base.keys() | self.settings.keys()
        tree = {section: {**base.get(section, {}), **self.settings.get(section, {})} for section in sorted(sections)}
        tree["train"] = {
            **tree["train"], "micro_batch_size": micro_batch_size, "global_batch_size": self.passes * self.sequences
        }  # fmt: skip
        return tree


def base_config(text: Path, folder: Path) -> dict[str, Any]:
    """Four layers, PEER in the first and the last, so that they divide into four stages.

    Few tokens and a chosen seed: in float32 a pick whose score is within rounding of the next one's may fall either
    way, which is no layout's fault.
    """
    tree = small_config(text, folder)
    tree["train"]["seed"] = SEED
    tree["peer"]["heads"] = 2
    tree["model"] |= {
        "num_layers": 4,
        "num_attention_heads": 4,
        "seq_length": 16,
        "mlp": ["peer", "dense", "dense", "peer"],
    }
    tree["pkm"] = {"num_values": 225, "heads": 2, "top_k": 4, "key_dim": 8}
    return tree


BATCH = {"peer": {"query_norm": "batch"}}
RMS = {"peer": {"query_norm": "rms"}}
UNTIED = {"model": {"tied_embeddings": False}}
# of four layers on two stages: none on the first; on four: two, none, one, ... of eight
LATE = {"model": {"mlp": ["dense", "dense", "peer", "peer"]}}
UNEQUAL = {"model": {"num_layers": 8, "mlp": ["peer", "peer", "dense", "dense", "peer", "dense", "peer", "peer"]}}
EVERY_LAYER = {"num_layers": 4, "mlp": "peer"}
SHARED = {"model": EVERY_LAYER, "peer": {"query_norm": "rms", "layers_per_pool": 2}}
# interleaved, layers 1 and 3 are on the first stage
SHARED_APART = {"model": {"mlp": ["peer", "dense", "peer", "dense"]}, "peer": {"layers_per_pool": 2}}
PER_HEAD = {
    "peer": {
        "query_norm": "rms",
        "shared_keys": False,
        "output_gate": True,
        "dense_hidden": 24,
        "dispatch_chunks": 3,
    }
}
ROWWISE = {"table_optimizer": {"name": "rowwise_adam"}, **RMS}
MOE = {"model": {"mlp": ["moe", "dense", "moe", "moe"]}, "moe": {"num_experts": 4, "z_loss": 1e-3, "balance_loss": 0.1}}
BIAS = {**MOE, "moe": {"num_experts": 4, "score": "sigmoid", "expert_bias": True, "expert_bias_rate": 0.02}}
SWITCH = {**MOE, "moe": {"num_experts": 4, "top_k": 1, "normalize": False, "expert_hidden_size": 24}}
EXPERT_CHOICE = {**MOE, "moe": {"num_experts": 4, "routing": "expert_choice"}}
SIGMA = {
    "model": {"mlp": ["sigma_moe", "sigma_moe", "dense", "sigma_moe"], "ffn_top_k": 20},
    "sigma_moe": {"num_experts": 6, "expert_hidden_size": 16, "top_k": 2, "entropy_loss": 0.1},
}
RECURRENT = {"router": {"kind": "recurrent", "state_size": 12}}
PERCEPTRON = {"router": {"kind": "mlp", "state_size": 12, "shared_projector": True}}
COSINE = {"router": {"kind": "cosine", "state_size": 12}}
LAZY = {"table_optimizer": {"name": "rowwise_adagrad", "lazy": True}, **RMS}
MEMORY = {"model": {"mlp": ["pkm", "dense", "dense", "pkm"]}}  # BatchNorm and softmax
# the improved one of the sigma-MoE paper
IMPROVED = {
    **MEMORY, "pkm": {"query_norm": "none", "query_projection": False, "gate": "relu", "init": "dense"}
}  # fmt: skip

_WITH_EVERY_ZERO: list[tuple[int, dict[str, Any]]] = [
    (2, {}),
    (4, {"expert": 4}),
    (4, {"expert_tensor": 4}),
    (4, {"expert": 2, "expert_tensor": 2}),
    (4, {"expert": 2}),
    (4, {"tensor": 2, "sequence": True, "expert_tensor": 2}),
    (4, {"tensor": 2, "expert": 4}),
    (4, {"pipeline": 2}),
    (4, {"pipeline": 2, "virtual_pipeline": 2}),
    (8, {"tensor": 2, "pipeline": 2, "expert": 2}),
]

TABLE: list[Layout] = [
    *(
        Layout(ranks, parallel, zero, quick=(ranks, zero) == (2, 0) or (ranks == 8 and zero == 2))
        for ranks, parallel in _WITH_EVERY_ZERO
        for zero in range(3 if "pipeline" in parallel else 4)
    ),
    Layout(1, {}, 0),
    Layout(2, {"expert": 2}, quick=True),
    Layout(2, {"expert_tensor": 2}, settings=PER_HEAD, quick=True),
    Layout(1, {}, 3, recompute=2, settings=BATCH),
    Layout(2, {"tensor": 2}, settings=UNTIED),
    Layout(2, {"expert": 2}, 1, offload=True),
    Layout(2, {"expert": 2}, 3, offload=True),
    Layout(4, {"tensor": 2, "pipeline": 2}, 2, offload=True, quick=True),
    Layout(2, {"tensor": 2, "expert": 2}, settings=BATCH, recompute=4, quick=True),
    Layout(2, {"tensor": 2, "sequence": True}, 3, settings=BATCH, recompute=2),
    Layout(2, {"pipeline": 2}, settings=UNTIED),
    Layout(2, {"pipeline": 2}, settings=LATE),
    Layout(2, {"pipeline": 2, "virtual_pipeline": 2}, settings=BATCH, recompute=1, quick=True),
    Layout(2, {"pipeline": 2}, settings=SHARED, quick=True),
    Layout(2, {"pipeline": 2, "virtual_pipeline": 2}, 0, settings=SHARED_APART),
    Layout(4, {"expert": 2, "expert_tensor": 2}, 3, settings=SHARED),
    Layout(4, {"tensor": 2, "expert": 2}, 0, settings={**SHARED, **{"table_optimizer": {"lazy": True}}}),
    Layout(3, {}, sequences=6),
    Layout(3, {"expert": 3}, 3, sequences=6, settings=BATCH, quick=True),
    Layout(3, {"expert_tensor": 3}, 2, sequences=6, settings=PER_HEAD),
    Layout(4, {"tensor": 4, "expert": 2, "expert_tensor": 2}, settings=BATCH),
    Layout(4, {"tensor": 4, "sequence": True, "expert": 4}, 0, settings=PER_HEAD),
    Layout(4, {"pipeline": 4}, settings=UNEQUAL),
    Layout(4, {"pipeline": 4, "virtual_pipeline": 2, "batch_p2p": True}, settings=UNEQUAL, passes=4),
    Layout(4, {"pipeline": 4, "virtual_pipeline": 2}, 0, settings=UNEQUAL, recompute=1, passes=4),
    Layout(4, {"pipeline": 2, "expert": 2}, settings=BATCH, recompute=2),
    Layout(4, {"pipeline": 2, "expert_tensor": 2}, 2, settings=ROWWISE, quick=True),
    Layout(4, {"tensor": 2, "pipeline": 2, "expert": 2}, settings={**BATCH, **LATE}),
    Layout(4, {"tensor": 2, "pipeline": 2, "sequence": True, "expert_tensor": 2}, 0, settings=UNTIED, recompute=1),
    Layout(4, {"tensor": 2, "sequence": True, "expert": 2, "expert_tensor": 2}, 3, settings=BATCH),
    *(Layout(2, {}, zero, settings=MOE) for zero in range(4)),
    *(Layout(2, {"expert": 2}, zero, settings=MOE, quick=zero == 3) for zero in range(4)),
    Layout(1, {}, 1, recompute=3, settings=MOE),
    Layout(4, {"expert": 2}, 2, settings=BIAS, quick=True),
    Layout(2, {"tensor": 2, "sequence": True, "expert": 2}, settings=MOE, quick=True),
    Layout(2, {"tensor": 2, "sequence": True}, 0, settings=BIAS, recompute=4),
    Layout(2, {"tensor": 2, "sequence": True, "expert": 2}, settings=EXPERT_CHOICE, quick=True),
    Layout(4, {"pipeline": 2, "expert": 2}, settings=EXPERT_CHOICE, recompute=2),
    Layout(2, {"expert": 2}, settings={**SWITCH, **COSINE}),
    Layout(2, {"pipeline": 2}, settings=MOE),
    Layout(4, {"pipeline": 2, "expert": 2}, settings=SWITCH, recompute=1),
    Layout(8, {"tensor": 2, "pipeline": 2, "sequence": True, "expert": 2}, 2, settings=BIAS),
    Layout(2, {}, settings=SIGMA),
    Layout(2, {"expert": 2}, 3, settings=SIGMA),
    Layout(2, {"tensor": 2, "sequence": True, "expert": 2}, settings={**SIGMA, "model": {"mlp": "sigma_moe"}}),
    Layout(4, {"pipeline": 2, "expert": 2}, settings=SIGMA, quick=True),
    Layout(2, {}, settings={**MOE, **RECURRENT}),
    Layout(2, {"expert": 2}, 3, settings={**MOE, **RECURRENT}),
    Layout(4, {"tensor": 2, "pipeline": 2, "sequence": True, "expert": 2}, settings={**MOE, **RECURRENT}, quick=True),
    Layout(2, {"pipeline": 2, "virtual_pipeline": 2}, 0, settings={**MOE, **RECURRENT}, recompute=1),
    Layout(4, {"pipeline": 2, "expert": 2}, settings={**SIGMA, **RECURRENT}, quick=True),
    Layout(2, {"expert": 2}, settings={**SIGMA, **COSINE}),
    Layout(2, {"expert": 2}, 3, settings={**RMS, **RECURRENT}),
    Layout(2, {"tensor": 2, "sequence": True, "expert": 2}, settings={**RMS, **RECURRENT}),
    Layout(2, {"pipeline": 2}, 0, settings={**RMS, **RECURRENT}, recompute=1),
    Layout(4, {"pipeline": 2, "virtual_pipeline": 2, "expert": 2}, settings={**RMS, **RECURRENT}, quick=True),
    Layout(8, {"expert": 2, "expert_tensor": 2}, 3, settings=ROWWISE),
    Layout(8, {"expert": 4, "expert_tensor": 2}, settings=PER_HEAD),
    Layout(8, {"tensor": 2, "expert": 2, "expert_tensor": 2}, 2, settings=BATCH),
    Layout(8, {"tensor": 2, "pipeline": 2, "expert_tensor": 2}, 0, settings=LAZY, recompute=2),
    Layout(8, {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2, "sequence": True, "expert": 4}, settings=BATCH),
    Layout(8, {"tensor": 2, "pipeline": 4, "sequence": True, "expert": 2}, settings={**UNEQUAL, **BATCH}, recompute=1),
    Layout(8, {"pipeline": 2, "expert": 2, "expert_tensor": 2}, settings=PER_HEAD),
    Layout(2, {"pipeline": 2}, 0, settings={**RMS, **PERCEPTRON}),
    Layout(8, {"tensor": 2, "pipeline": 2, "sequence": True, "expert": 2}, settings={**RMS, **RECURRENT}),
    *(
        Layout(ranks, parallel, zero, settings=settings, quick=(ranks, parallel.get("pipeline")) == (4, 2))
        for settings in (MEMORY, IMPROVED)
        for ranks, parallel, zero in (
            (2, {}, 0),
            (2, {"expert": 2}, 2),
            (2, {"expert_tensor": 2}, 3),
            (2, {"tensor": 2}, 0),
            (2, {"tensor": 2, "sequence": True}, 1),
            (2, {"pipeline": 2}, 0),
            (4, {"pipeline": 2, "expert": 2}, 1),
            (4, {"expert": 2, "expert_tensor": 2}, 3),
        )
    ),
    Layout(2, {"tensor": 2, "expert": 2}, settings=MEMORY, recompute=4, quick=True),
    Layout(4, {"expert": 2, "expert_tensor": 2}, 1, settings={**IMPROVED, "table_optimizer": {"lazy": True}}),
]


@dataclass(frozen=True)
class Differences:
    """The largest relative ones from one process, over all steps and ranks.

    Attributes:
        held_out: of the loss after the last step, in evaluation mode: with the statistics that BatchNorm kept.
    """

    loss: float
    norm: float
    held_out: float

    @property
    def fine(self) -> bool:
        return self.loss < LOSS and self.norm < NORM and self.held_out < LOSS


def trained(
    rank: int, world_size: int, tree: dict[str, Any], steps: int
) -> tuple[list[float], list[float], list[float]]:
    """Losses and gradient norms of the first steps, or of the next ones where there is a checkpoint, and the held-out
    loss after them.
    """
    from peer_dist.config import check_world, parse_config
    from peer_dist.training import Trainer

    config = parse_config(tree, "test")
    check_world(config, world_size)
    trainer = Trainer(config)
    values = [trainer.step() for _ in range(steps)]
    held_out = [trainer.validate()["val/loss"]]
    return [v["train/loss"] for v in values], [v["optimizer/grad_norm"] for v in values], held_out


_alone: dict[str, tuple[list[float], ...]] = {}


def compare(layout: Layout, base: dict[str, Any]) -> Differences:
    """Train the layout and, once per setting, one process."""
    alone = layout.alone(base)
    if repr(alone) not in _alone:
        _alone[repr(alone)] = run_ranks(trained, 1, alone, STEPS)[0]
    wanted = _alone[repr(alone)]
    assert wanted[0][-1] < wanted[0][0] - 0.5, "one process learns"

    def largest(which: int) -> float:
        return max(abs(a - b) / abs(b) for rank in ranks for a, b in zip(rank[which], wanted[which], strict=True))

    ranks = run_ranks(trained, layout.ranks, layout.config(base), STEPS)
    return Differences(largest(0), largest(1), largest(2))


def rows() -> Iterator[str]:
    """The table in Markdown, line by line."""
    from peer_dist.data.prepare import prepare

    yield "| ranks | layout | ZeRO | beside that | loss | gradient norm | held-out loss |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    with tempfile.TemporaryDirectory() as folder:
        prepare(None, Path(folder) / "text")
        base = base_config(Path(folder) / "text", Path(folder))
        for layout in TABLE:
            got = compare(layout, base)
            mark = "" if got.fine else " **too much**"
            yield (
                f"| {layout.ranks} | {layout.name} | {layout.zero} | {layout.options} "
                f"| {got.loss:.0e} | {got.norm:.0e} | {got.held_out:.0e}{mark} |"
            )


if __name__ == "__main__":
    for row in rows():
        print(row, flush=True)
    print(f"{len(TABLE)} layouts", file=sys.stderr)
