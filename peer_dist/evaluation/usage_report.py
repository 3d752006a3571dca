"""``peer-dist usage``: which experts a checkpoint uses on held-out text, by layer and by head."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.table import Table
from rich.text import Text
from torch import Tensor

from peer_dist.config import unwritable
from peer_dist.data.documents import DataError
from peer_dist.evaluation.loading import check_text, load_model, open_text, read_settings
from peer_dist.layers.sparse_layer import SparseLayer
from peer_dist.measures.held_out import held_out_loss
from peer_dist.measures.usage import UsageSummary, shared_picks, summarize, unevenness
from peer_dist.megatron import sparse_layers
from peer_dist.ranks.world import World
from peer_dist.writing import no_empty_folders, whole, why_unwritten

FEW_PICKS = 64  # per expert: with fewer, chance alone adds more than 1 / 128 to the unevenness


@dataclass(frozen=True)
class SubkeyUsage:
    """Use of the sub-keys of one half of the product keys.

    Attributes:
        half: 0 or 1.
        usage_percent: share of sub-keys in the key of an expert with a gate other than 0.
        unevenness: of the gates' distribution over sub-keys, in nats.
    """

    half: int
    usage_percent: float
    unevenness: float


@dataclass(frozen=True)
class LayerUsage:
    """Use of one layer's experts.

    Attributes:
        together: by all heads together.
        heads: by each head.
        overlap: ``[heads, heads]``: mean share of a token's picks that both heads have; 1 on the diagonal.
        similarity: ``[heads, heads]``: cosine of the gates' distributions over experts.
        subkeys: of both halves of the product keys; empty where experts have none.
    """

    together: UsageSummary
    heads: list[UsageSummary]
    overlap: list[list[float]]
    similarity: list[list[float]]
    subkeys: list[SubkeyUsage]

    def warning(self) -> str | None:
        """A sentence if there was too little text to judge by, else None."""
        if self.together.picks_per_expert >= FEW_PICKS:
            return None
        return (
            f"{self.together.picks_per_expert:.1f} picks per expert: with fewer than {FEW_PICKS} the unevenness is "
            "biased upward, by about (N - 1) / (2 picks); compare it with that of uniform picks, or take more text"
        )


@dataclass(frozen=True)
class UsageReport:
    """A checkpoint's use of experts on held-out text.

    Attributes:
        layers: by number, from 1.
        arrays: by the names of ``usage.npz`` (see docs/usage.md).
    """

    checkpoint: str
    step: int
    data: str
    split: str
    tokens: int
    layers: dict[int, LayerUsage]
    arrays: dict[str, np.ndarray[Any, Any]]

    def json(self) -> str:
        """One JSON object of all but ``arrays``; each layer with its ``warning`` or null."""
        layers = {n: {**asdict(layer), "warning": layer.warning()} for n, layer in self.layers.items()}
        return json.dumps({**{k: v for k, v in vars(self).items() if k != "arrays"}, "layers": layers})


class HeadUsage:
    """Adds up a layer's gates per expert and head; feed it to ``on_route``.

    Holds a float64 number and a byte per expert and head, and 8 bytes more per expert, on the layer's device.
    """

    def __init__(self, num_experts: int, device: torch.device) -> None:
        """Begin with no picks; the number of heads is that of the first ones."""
        self.mass = torch.zeros(0, num_experts, dtype=torch.float64, device=device)
        """``[heads, num_experts]``: sums of the gates."""
        self.first = torch.zeros(0, num_experts, dtype=torch.uint8, device=device)
        """``[heads, num_experts]``: 1 where the expert was the head's best for some token."""
        self.counts = torch.zeros(num_experts, dtype=torch.int64, device=device)
        """``[num_experts]``: picks."""
        self.shared = torch.zeros(0, 0, dtype=torch.int64, device=device)
        """``[heads, heads]``: picks that two heads had in common for a token."""

    def __call__(self, indices: Tensor, gates: Tensor) -> None:
        """Add the picks ``[tokens, heads, top_k]`` of one forward pass, best first along the last axis."""
        heads, n = indices.shape[1], len(self.counts)
        if not len(self.mass):
            self.mass, self.first = self.mass.new_zeros(heads, n), self.first.new_zeros(heads, n)
            self.shared = self.shared.new_zeros(heads, heads)
        for head in range(heads):
            self.mass[head].index_add_(0, indices[:, head].flatten(), gates[:, head].flatten().double())
            self.first[head, indices[:, head, 0]] = 1
        self.counts += torch.bincount(indices.flatten(), minlength=n)
        self.shared += shared_picks(indices)

    def reduce(self, group: dist.ProcessGroup) -> None:
        """Add up over the ranks of ``group``, in place. A collective call."""
        for tensor in (self.mass, self.counts, self.shared):
            dist.all_reduce(tensor, group=group)
        dist.all_reduce(self.first, dist.ReduceOp.MAX, group)

    def subkey_mass(self, n: int) -> Tensor:
        """``[heads, 2, n]``: sums of the gates per sub-key, where key ``(a, b)`` is that of expert ``a * n + b``."""
        table = self.mass.view(-1, n, n)
        return torch.stack([table.sum(2), table.sum(1)], 1)

    def layer_usage(self, subkeys: int | None) -> LayerUsage:
        """The layer's usage, of all that was added up.

        Args:
            subkeys: sqrt(num_experts) where experts have product keys, else None.
        """
        picks = self.shared.diagonal()
        unit = torch.nn.functional.normalize(self.mass)
        return LayerUsage(
            together=summarize(self.mass.sum(0), self.first.amax(0), int(picks.sum())),
            heads=[summarize(*head) for head in zip(self.mass, self.first, picks.tolist())],
            overlap=self.overlap.tolist(),
            similarity=(unit @ unit.T).tolist(),
            subkeys=[]
            if subkeys is None
            else [
                SubkeyUsage(half, 100 * int((mass != 0).sum()) / subkeys, unevenness(mass))
                for half, mass in enumerate(self.subkey_mass(subkeys).sum(0))
            ],
        )

    @property
    def overlap(self) -> Tensor:
        """See :class:`LayerUsage`; float64."""
        return self.shared.double() / self.shared.diagonal().clamp(min=1)

    def arrays(self, number: int, subkeys: int | None) -> Iterator[tuple[str, Tensor]]:
        """Names and values of layer ``number`` in ``usage.npz``."""
        yield f"mass_layer{number}", self.mass.sum(0)
        yield f"counts_layer{number}", self.counts
        yield f"overlap_layer{number}", self.overlap
        yield f"head_mass_layer{number}", self.mass.float()
        if subkeys is not None:
            yield f"subkey_mass_layer{number}", self.subkey_mass(subkeys)


def _subkeys(layer: SparseLayer) -> int | None:
    """The number of sub-keys in each half of the layer's product keys; None if it has no product keys."""
    keys = getattr(layer, "keys", None)
    n = keys.shape[-2] if isinstance(keys, Tensor) and keys.dim() > 2 else 0
    return n if n * n == layer.num_experts else None


def analyze_usage(
    checkpoint: str, prefix: str | None, split: str, batch_size: int, output: Path | None
) -> UsageReport | None:
    """Count on every rank; rank 0 has the report and writes ``usage.npz`` into the folder ``output``.

    Args:
        prefix, split: as in :func:`peer_dist.evaluation.evaluate.evaluate`.

    Raises:
        DataError: the data set cannot be read, has another tokenizer, or has no such split; the model has no experts;
            or nothing can be written to ``output``.
        CheckpointError: the checkpoint cannot be read.
    """
    check_text(read_settings(checkpoint), prefix, split)
    world = World.from_environment()
    if output is not None and world.rank == 0 and (problem := unwritable(output)):
        raise DataError(f"--output {output}: cannot be written to ({problem}); name a folder")
    with world.joined():
        loaded = load_model(checkpoint, world.world_size)
        layers = sparse_layers(loaded.model)
        if not layers:
            raise DataError(f"{loaded.path}: is of a model without experts (model.mlp)")
        text = open_text(loaded, prefix, split)
        usage = {number: HeadUsage(layer.num_experts, loaded.parallel.device) for number, layer in layers.items()}
        result = held_out_loss(
            loaded.model, text.stream, loaded.parallel, loaded.tokenizer, batch_size, observers=usage
        )
        for counter in usage.values():
            counter.reduce(loaded.parallel.token_group)
    if world.rank != 0:
        return None
    subkeys = {number: _subkeys(layer) for number, layer in layers.items()}
    report = UsageReport(
        checkpoint=str(loaded.path),
        step=loaded.step,
        data=text.name,
        split=split,
        tokens=result.tokens,
        layers={number: counter.layer_usage(subkeys[number]) for number, counter in usage.items()},
        arrays={
            name: array.cpu().numpy()
            for number, counter in usage.items()
            for name, array in counter.arrays(number, subkeys[number])
        },
    )
    if output is not None:
        with no_empty_folders(output):
            try:
                output.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise DataError(f"--output {output}: {why_unwritten(error)}; name a folder") from None
            with whole(output / "usage.npz", DataError, f"--output {output}") as path, path.open("wb") as file:
                np.savez(file, **report.arrays)  # type: ignore[arg-type]
    return report


def usage_tables(report: UsageReport) -> Iterator[Table | Text | str]:
    """What the command prints: for each layer its usage, and what its heads have in common."""
    yield f"{report.checkpoint} (step {report.step}) on {report.data}, {report.split}: {report.tokens:,} tokens"
    for number, layer in report.layers.items():
        table = Table(title=f"layer {number}", title_justify="left", box=None, padding=(0, 2, 0, 0))
        for name in ("", "used", "top-1", "dead", "not top-1", "unevenness", "uniform", "picks each"):
            table.add_column(name, justify="right" if name else "left", no_wrap=True)
        by_head = {f"head {head}": usage for head, usage in enumerate(layer.heads, 1)} if len(layer.heads) > 1 else {}
        for name, usage in {"all heads": layer.together, **by_head}.items():
            table.add_row(
                name,
                f"{usage.usage_percent:.1f}%",
                f"{usage.top1_usage_percent:.1f}%",
                f"{usage.dead_experts:,}",
                f"{usage.never_first_experts:,}",
                f"{usage.unevenness:.3f}",
                f"{usage.unevenness_if_uniform:.3f}",
                f"{usage.picks_per_expert:.1f}",
            )
        for half in layer.subkeys:
            name, used = f"sub-keys {half.half + 1}", f"{half.usage_percent:.1f}%"
            table.add_row(name, used, "", "", "", f"{half.unevenness:.3f}")
        yield table
        if by_head:
            table = Table(
                *("", *by_head),
                title=f"layer {number}, pairs of heads: picks in common (upper), cosine of usage (lower)",
                title_justify="left",
                box=None,
                padding=(0, 2, 0, 0),
            )
            for row, name in enumerate(by_head):
                cells = [*(f"{value:.3f}" for value in layer.similarity[row][:row]), ""]
                table.add_row(name, *cells, *(f"{value:.3f}" for value in layer.overlap[row][row + 1 :]))
            yield table
        if (warning := layer.warning()) is not None:
            yield Text.assemble((f"layer {number}:", "yellow"), f" {warning}")
