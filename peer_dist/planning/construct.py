"""The real model of any rank of a large run, built without its memory and without the other ranks.

The trainer's own way from a config to groups, model and optimizers runs under torch's fake process group, in which
every rank can be built as one of all, and on the meta device, whose tensors have shapes and no numbers. Nothing is
estimated here but what routing does to the exchange, whose picks are drawn.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from rich.table import Table
from torch.overrides import TorchFunctionMode

from peer_dist.config import Config, ConfigError, check_world
from peer_dist.mistake import in_words
from peer_dist.optim import HeldBytes
from peer_dist.planning.layout import check_vocabulary
from peer_dist.sharding.cost import exchange_bytes, exchange_pairs, synthetic_picks
from peer_dist.sharding.wire import WIRES

ROUTINGS = {"uniform": 0.0, "zipf": 1.0}
"""Drawn picks, by name: the exponent of their distribution."""

_SAMPLE = 1024  # tokens whose picks are drawn
_META = torch.device("meta")


@dataclass(frozen=True)
class Exchange:
    """What a step's tokens of one rank cause between the ranks of its expert domain, forward and backward.

    Attributes:
        inside, between: bytes inside a node, and between nodes; layers that are recomputed send more.
        hits: mean number of distinct row shards that a token hits in a layer.
    """

    inside: int
    between: int
    hits: float


@dataclass(frozen=True)
class RankModel:
    """One rank's part of a run.

    Attributes:
        layers: kind of feed-forward of each layer on the rank's pipeline stage, by its number from 1.
        groups: the ranks, itself among them, of each group that it is in: ``tensor``, ``pipeline``, ``data``,
            ``experts`` (which hold one copy of the tables), ``expert rows`` and ``expert columns`` (of that grid), and
            ``expert data`` (which hold copies of this rank's shards).
        shapes: of its dense parameters and of its shards, by name.
        memory, parameters: ``dense``, ``tables``, and ``experts`` (coarse ones, where the model has them).
        exchange: by the names of :data:`ROUTINGS`, for layers of PEER and of product-key memory.
    """

    rank: int
    stage: int
    layers: dict[int, str]
    groups: dict[str, list[int]]
    shapes: dict[str, tuple[int, ...]]
    parameters: dict[str, int]
    memory: dict[str, HeldBytes]
    exchange: dict[str, Exchange]

    @property
    def bytes(self) -> int:
        """All that is in ``memory``: weights, gradients and states of optimizers, without activations."""
        return sum(memory.total for memory in self.memory.values())


def construct(
    config: Config, world_size: int, rank: int, gpus_per_node: int, vocab_size: int | None = None, device: str = "cuda"
) -> RankModel:
    """One rank of a world. It is built in a process of its own, which sets up torch.distributed for it.

    Args:
        gpus_per_node: ranks of a node.
        vocab_size: rows of the embedding; by default those of the data's tokenizer, padded.
        device: of the ranks, ``cuda`` or ``cpu``.

    Raises:
        ConfigError: the config does not fit the world, or has no such rank.
        DataError: without ``vocab_size``, where the data set cannot be read.
    """
    return _apart(config, world_size, [rank], gpus_per_node, vocab_size, device)[0]


def construct_stages(
    config: Config, world_size: int, gpus_per_node: int, vocab_size: int | None = None, device: str = "cuda"
) -> list[RankModel]:
    """As :func:`construct`, of each pipeline stage the first and the last rank: those with its largest and its smallest
    shards, where sizes do not divide.
    """
    size = max(1, world_size // config.parallel.pipeline)
    ranks = sorted({rank for first in range(0, world_size, size) for rank in (first, first + size - 1)})
    return _apart(config, world_size, ranks, gpus_per_node, vocab_size, device)


def construct_chosen(
    config: Config, chosen: str, world_size: int, gpus_per_node: int, vocab_size: int | None, device: str
) -> list[RankModel]:
    """As :func:`construct` of the rank whose number is ``chosen``, or as :func:`construct_stages` if it is ``stages``.

    Raises:
        ConfigError: it is neither, and see there.
    """
    if chosen == "stages":
        return construct_stages(config, world_size, gpus_per_node, vocab_size, device)
    if not chosen.isdecimal() or len(chosen) > 9:
        word = in_words(chosen, 40)
        raise ConfigError(f"--construct {word}: must be a rank's number, or stages: the first and last rank of each")
    return [construct(config, world_size, int(chosen), gpus_per_node, vocab_size, device)]


def built(ranks: Sequence[RankModel]) -> list[Table]:
    """For a terminal: what each rank holds, what it sends in a step, and whom it talks to."""
    held = _table("built without its machines: what a rank holds", "rank", "stage", "layers", "part", "parameters")
    for size in ("weights", "gradients", "optimizer", "buckets", "in all"):
        held.add_column(f"{size}, GB", justify="right")
    sent = _table("a step's tokens of a rank, forward and backward", "rank", "routing", "shards hit")
    for link in ("inside a node", "between nodes"):
        sent.add_column(f"{link}, GB", justify="right")
    groups = _table("groups", "rank", *ranks[0].groups)
    for built in ranks:
        first = (str(built.rank), str(built.stage), _span(list(built.layers)))
        for part, memory in built.memory.items():
            sizes = (memory.weights, memory.gradients, memory.optimizer, memory.buckets, memory.total)
            held.add_row(*first, part, f"{built.parameters[part]:,}", *(f"{size / 1e9:.3f}" for size in sizes))
            first = ("", "", "")
        number = str(built.rank)
        for routing, moved in built.exchange.items():
            sent.add_row(
                number, routing, f"{moved.hits:.2f}", f"{moved.inside / 1e9:.3f}", f"{moved.between / 1e9:.3f}"
            )
            number = ""
        groups.add_row(str(built.rank), *(_span(members) for members in built.groups.values()))
    return [held, sent, groups]


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None)
    for column in columns:
        table.add_column(column)
    return table


def _span(numbers: Sequence[int]) -> str:
    """``0 to 56 by 8``; numbers that are not at equal distances one by one."""
    if len(numbers) < 3:
        return ", ".join(map(str, numbers))
    step = numbers[1] - numbers[0]
    if list(numbers) != list(range(numbers[0], numbers[-1] + 1, step)):
        return ", ".join(map(str, numbers))
    return f"{numbers[0]} to {numbers[-1]}" + (f" by {step}" if step > 1 else "")


def _apart(
    config: Config, world_size: int, ranks: Sequence[int], gpus_per_node: int, vocab_size: int | None, device: str
) -> list[RankModel]:
    check_world(config, world_size)
    for rank in ranks:
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank}: there are ranks 0 to {world_size - 1}; name one of them")
    if vocab_size is None:
        from peer_dist.data.stream import open_tokenizer

        vocab_size = open_tokenizer(config.data).padded_vocab_size
    check_vocabulary(config, vocab_size)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(build_ranks, config, world_size, ranks, gpus_per_node, vocab_size, device).result()


def build_ranks(
    config: Config, world_size: int, ranks: Sequence[int], gpus_per_node: int, vocab_size: int, device: str
) -> list[RankModel]:
    """The ranks one after the other, each in a fork of this process, which has imported what takes long."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # nothing is to be allocated on this machine's
    import peer_dist.engines.building  # noqa: F401

    models = []
    for rank in ranks:
        with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
            models.append(pool.submit(build_rank, config, world_size, rank, gpus_per_node, vocab_size, device).result())
    return models


def build_rank(
    config: Config, world_size: int, rank: int, gpus_per_node: int, vocab_size: int, device: str = "cuda"
) -> RankModel:
    """In this process, which is of no other use afterwards."""
    import torch.distributed._tools.fake_collectives  # noqa: F401  (makes collectives take tensors on meta)
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from peer_dist.engines.building import dtype_of, join_groups, make_engine
    from peer_dist.megatron import build_model, shards_of, sparse_layers

    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    dist.all_gather_object = _same_everywhere  # type: ignore[assignment]
    # nothing travels here, and a transport may need machines that are not here
    local = config.parallel.model_copy(update={"transport": "all_to_all"})
    parallel = join_groups(config.model_copy(update={"parallel": local}), _META)
    dtype = dtype_of(config, device)
    model = build_model(config, parallel, vocab_size, dtype)
    shards = {name: shard.parameter for name, shard in shards_of(model).items()}
    for layer in sparse_layers(model).values():
        layer.release_shards()
    dense = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    shapes = {name: tuple(parameter.shape) for name, parameter in (dense | shards).items()}
    parameters = {"dense": sum(parameter.numel() for parameter in dense.values())}
    with _META, _OnMeta():
        engine = make_engine(config, model, parallel, dtype)
        with engine.whole_shapes():
            eager = (optimizer.tables.values() for optimizer in engine.shard_optimizers if not optimizer.lazy)
            _give_gradients([*engine.parameters.values(), *itertools.chain(*eager)])
        _gather_small(engine.parameters.values())
    for name, optimizer in zip(("tables", "experts"), engine.shard_optimizers):
        parameters[name] = sum(table.numel() for table in optimizer.tables.values())
    groups = {
        "tensor": parallel.tensor_group,
        "pipeline": parallel.pipeline_group,
        "data": parallel.data_parallel_group,
        "experts": parallel.experts.domain,
        "expert rows": parallel.experts.rows,
        "expert columns": parallel.experts.columns,
        "expert data": parallel.expert_data_group,
    }
    ranks = {name: [rank] if group is None else dist.get_process_group_ranks(group) for name, group in groups.items()}
    chunks: list[Any] = list(model)
    numbers = [layer.layer_number for chunk in chunks for layer in chunk.decoder.layers]
    layers = {number: config.model.mlp_kinds[number - 1] for number in sorted(numbers)}
    exchange = {
        name: _exchange(config, ranks, rank, dtype.itemsize, gpus_per_node, list(layers.values()), zipf)
        for name, zipf in ROUTINGS.items()
    }
    memory = engine.memory()
    return RankModel(rank, parallel.pipeline_rank, layers, ranks, shapes, parameters, memory, exchange)


def _give_gradients(parameters: Sequence[torch.Tensor]) -> None:
    """Those that a step's last backward pass leaves. (Of lazy tables it depends on the text.)"""
    for parameter in parameters:
        if not hasattr(parameter, "main_grad"):
            parameter.grad = torch.empty_like(parameter)


def _gather_small(parameters: Iterable[Any]) -> None:
    """As ZeRO-3's first pass does with the parameters that it then leaves whole on every rank."""
    for parameter in parameters:
        ranks = dist.get_world_size(parameter.ds_process_group) if getattr(parameter, "ds_persist", False) else 1
        if ranks > 1:
            padded = parameter.new_empty(ranks * parameter.ds_tensor.numel())
            parameter.data = padded[: parameter.ds_numel].view(parameter.ds_shape)


def _exchange(
    config: Config,
    groups: dict[str, list[int]],
    rank: int,
    itemsize: int,
    gpus_per_node: int,
    kinds: Sequence[str],
    zipf: float,
) -> Exchange:
    domain, columns = groups["experts"], len(groups["expert columns"])
    node = torch.tensor([member // gpus_per_node for member in domain], dtype=torch.int64, device="cpu")
    near = node[:, None] == node
    sequences = config.train.global_batch_size // len(groups["data"])
    tokens = sequences * config.model.seq_length // len(groups["tensor"])
    sample = min(tokens, _SAMPLE)
    inside, between, hits, layers = 0, 0, 0.0, 0
    for kind in config.kinds:
        tables, count = kind.tables(config), kinds.count(kind.name)
        if not tables or not count:
            continue
        torch.manual_seed(rank)
        drawn = synthetic_picks(tables.rows, sample, tables.picks, zipf)
        sizes = (tables.rows, config.model.hidden_size, len(domain) // columns, columns)
        home, values = domain.index(rank), not tables.tokens_travel
        wire = WIRES[config.parallel.wire]
        pairs = exchange_pairs(drawn, *sizes, home=home, itemsize=itemsize, values=values, wire=wire)
        all_bytes, near_bytes = int(pairs.sum()), int(pairs[near].sum())
        inside += count * near_bytes * tokens // sample
        between += count * (all_bytes - near_bytes) * tokens // sample
        hits += count * exchange_bytes(drawn, *sizes).hits
        layers += count
    return Exchange(inside, between, hits / layers if layers else 0.0)


def _same_everywhere(everyone: list[Any], mine: Any, group: dist.ProcessGroup | None = None) -> None:
    """``all_gather_object`` where no other rank is there to speak."""
    everyone[:] = [mine] * len(everyone)


class _OnMeta(TorchFunctionMode):
    """Whatever is made on a device, or moved to one, is on meta: engines name the devices that they want."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.Tensor.cpu, torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if kwargs.get("device") is not None:
            kwargs["device"] = _META
        if func is torch.Tensor.to:
            args = tuple(_META if isinstance(argument, (str, torch.device)) else argument for argument in args)
        return func(*args, **kwargs)
