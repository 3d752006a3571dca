"""The planner against real runs: bytes that must be equal, activations that must be near, and layouts that it finds."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from peer_dist.cli import app
from peer_dist.config import ConfigError, load_config, parse_config
from peer_dist.megatron import Parallel, build_model, pack_documents, token_losses
from peer_dist.planning.counts import count
from peer_dist.planning.hardware import load_hardware
from peer_dist.planning.hit_rate import Skew, distinct, share_of_picks
from peer_dist.planning.layout import Layout, Place
from peer_dist.planning.peak_memory import kept_parts
from peer_dist.planning.plan import plan
from peer_dist.planning.search import advice, search, search_table
from peer_dist.planning.state import checkpoint_bytes, dense_shapes, shards, state
from peer_dist.planning.tiers import exposed, far_pools
from peer_dist.planning.traffic import exchange
from peer_dist.sharding.cost import Routes, bytes_of, exchange_bytes, synthetic_picks
from tests.layouts import BATCH, IMPROVED, LAZY, RECURRENT, RMS, SHARED, SIGMA, UNTIED, base_config
from tests.layouts import Layout as Case
from tests.models import CASES, make
from tests.ranks import run_ranks

CONFIGS = Path(__file__).parent.parent / "configs"


def held_and_planned(rank: int, world_size: int, tree: dict[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Of one rank in its second step: what its engine holds and its layers sent, and what the planner says."""
    from peer_dist.sharding import Traffic
    from peer_dist.training import Trainer

    tree["logging"]["interval"] = 1
    trainer = Trainer(parse_config(tree, "test"))
    config, sent, picked = trainer.config, [], []
    observe = trainer.route_observer
    reset = Traffic.reset
    trainer.step()
    Traffic.reset = lambda self: (sent.append(self.bytes_sent), reset(self))[1]
    trainer.route_observer = lambda number: (
        lambda indices, gates: (
            picked.append((number - 1, indices.flatten(1))),
            observe(number)(indices, gates),
        )
    )
    values = trainer.step()

    layout = Layout(config, world_size, 8)
    place = layout.place(rank)
    wanted = state(layout, place, trainer.data.tokenizer.padded_vocab_size, trainer.dtype.itemsize)
    held = {part: round(values[f"memory/{part}_gb"] * 1e9) for part in ("weights", "gradients", "optimizer")}
    planned = {"weights": wanted.weights, "gradients": wanted.gradients, "optimizer": wanted.optimizer + wanted.host}
    bytes_planned = 0.0
    for layer, indices in picked:
        experts = config.peer.num_experts if config.model.mlp_kinds[layer] == "peer" else config.pkm.num_values
        home, item = place.row * layout.columns + place.column, trainer.dtype.itemsize
        values = config.model.mlp_kinds[layer] == "pkm"
        counted = exchange_bytes(
            indices, experts, config.model.hidden_size, layout.rows, layout.columns, home, item, values=values
        )
        again = any(layer in chunk[: config.train.recompute_layers] for chunk in layout.layers(place.stage))
        there, back = exchange(layout, config.model.mlp_kinds[layer], item, sent=counted)
        bytes_planned += there.total * (2 if again else 1) + back.total
    return held | {"sent": sum(sent)}, planned | {"sent": bytes_planned, "rings": 2 * len(picked)}


BF16 = {"train": {"precision": "bf16"}}
TABLES16 = {"peer": {"query_norm": "rms", "table_dtype": "bfloat16"}}
COARSE = {**SIGMA, "model": {"mlp": ["sigma_moe", "sigma_moe", "dense", "sigma_moe"]}}
ROUNDED = {**TABLES16, **BF16, "table_optimizer": {"name": "rowwise_adam", "stochastic_rounding": True}}

EIGHT = {
    "peer": {"query_norm": "rms", "table_dtype": "int8"},
    "table_optimizer": {"name": "rowwise_adagrad", "lazy": True, "stochastic_rounding": True},
}

QUICK = [
    Case(2, {"expert": 2}, 1, settings=EIGHT),
    Case(3, {"expert": 3}, 3, sequences=6, settings=BF16),  # 225 rows and 32 columns of queries: uneven parts
    Case(4, {"tensor": 2, "pipeline": 2, "sequence": True, "expert_tensor": 2}, 1, settings={**BF16, **TABLES16}),
]
SLOW = [
    Case(2, {"expert": 2}, 0, settings={**BF16, **TABLES16}),
    Case(2, {"expert_tensor": 2}, 0),
    Case(2, {}, 2, settings=ROUNDED),
    Case(3, {"expert": 3}, 0, sequences=6, settings=BATCH),
    Case(3, {}, 1, sequences=6, settings=UNTIED),
    Case(4, {"expert": 2, "expert_tensor": 2}, 3, settings=SHARED),
    Case(4, {"expert": 2}, 2, settings=LAZY),
    Case(4, {"pipeline": 2, "virtual_pipeline": 2}, 1, settings=RMS),
    Case(4, {"pipeline": 2, "expert": 2}, 0, settings=BATCH, recompute=2),
    Case(4, {"tensor": 4, "sequence": True, "expert": 2, "expert_tensor": 2}, 3, settings={**RECURRENT, **UNTIED}),
    Case(4, {"tensor": 2, "sequence": True, "expert": 2}, 1, settings=COARSE),
    Case(4, {"expert": 2, "expert_tensor": 2}, 1, settings=IMPROVED),
    Case(2, {"expert": 2}, 2, offload=True),
    Case(2, {"expert": 2}, 3, offload=True, settings=BF16),
    Case(8, {"tensor": 2, "pipeline": 2, "expert": 2}, 2),
]


@pytest.mark.parametrize("case", [*QUICK, *(pytest.param(each, marks=pytest.mark.slow) for each in SLOW)], ids=str)
def test_bytes_are_those_of_a_real_run(case, text, tmp_path):
    tree = case.config(base_config(text, tmp_path))
    results = run_ranks(held_and_planned, case.ranks, tree)
    sent, counted, rings = (
        sum(results[rank][which].pop(key) for rank in range(case.ranks))
        for which, key in ((0, "sent"), (1, "sent"), (1, "rings"))
    )
    for held, planned in results:
        if case.settings.get("table_optimizer", {}).get("lazy"):  # which rows will be touched is not known
            assert held.pop("gradients") == pytest.approx(planned.pop("gradients"), rel=0.1)
        assert held == planned
    if case.settings is not COARSE:  # whose picks are no part of this
        chunks = tree["peer"].get("dispatch_chunks", 1)
        assert 0 <= counted - sent <= rings * chunks  # the last byte of a ring's part


def saved(rank: int, world_size: int, tree: dict[str, Any]) -> None:
    from peer_dist.training import Trainer

    trainer = Trainer(parse_config(tree, "test"))
    trainer.step()
    trainer.save()


@pytest.mark.parametrize(
    ("mlp", "stage", "precision", "more"),
    [
        (
            ["peer", "dense", "pkm"],
            3,
            "fp32",
            {"table_optimizer": {"name": "rowwise_adagrad"}, "peer": {"num_experts": 4900}},
        ),
        (["sigma_moe", "peer", "moe"], 1, "bf16", {"peer": {"table_dtype": "bfloat16", "num_experts": 4900}}),
    ],
    ids=str,
)
def test_a_checkpoint_is_as_large_as_planned(
    text: Path, tmp_path: Path, mlp: list[str], stage: int, precision: str, more: dict[str, Any]
) -> None:
    """Its files have a header per tensor and layer beside the numbers."""
    tree = base_config(text, tmp_path) | {"zero": {"stage": stage}, **more}
    tree["model"] |= {"num_layers": 3, "mlp": mlp, "hidden_size": 128, "num_attention_heads": 4}
    tree["train"] |= {"precision": precision}
    run_ranks(saved, 2, tree)
    (folder,) = Path(tree["checkpoint"]["dir"]).glob("step-*")
    written = sum(path.stat().st_size for path in folder.rglob("*.distcp"))
    planned = checkpoint_bytes(parse_config(tree, "test"), 384, 4 if precision == "fp32" else 2)
    assert planned <= written <= 1.03 * planned


def test_all_parameters_are_planned() -> None:
    """Shapes add up to the counts, which are tested against the model that is built."""
    for changes in CASES:
        config = make(changes)
        layout = Layout(config, 1, 1)
        dense = sum(math.prod(shape) for part in dense_shapes(layout, 0, 128).values() for shape in part)
        owned = sum(block.size for blocks in shards(layout, Place()).values() for block in blocks)
        assert dense + owned == count(config, 128).total.parameters, changes


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 1), (8, 1), (1, 8), (4, 4), (16, 4)])
def test_uniform_picks_send_what_is_expected(rows: int, columns: int) -> None:
    torch.manual_seed(0)
    tokens, experts, heads, top_k, dim = 512, 64**2, 4, 8, 96
    for home in (0, rows * columns - 1):
        picks = torch.rand(tokens * heads, experts).topk(top_k).indices.view(tokens, heads * top_k)
        counted = exchange_bytes(picks, experts, dim, rows, columns, home)
        route = Routes.uniform(tokens, experts, heads, top_k, rows)
        expected = bytes_of(route, dim, dim / columns, columns, 2)
        for part in ("forward", "backward", "column_forward", "column_backward", "total"):
            assert getattr(expected, part) == pytest.approx(getattr(counted, part), rel=0.02), (home, part)
        assert expected.hits == pytest.approx(counted.hits, rel=0.02)
        assert bytes_of(Routes.uniform(tokens, experts, heads, top_k, rows, counted.hits), dim, 0, columns, 2).hits == (
            pytest.approx(counted.hits)
        )


def kept(parallel: Parallel, changes: dict[str, Any], mask: bool) -> tuple[float, float]:
    """Bytes that autograd keeps of one forward pass beside the weights, and what the planner says."""
    config = make({"model.seq_length": 32, "model.hidden_size": 64, "train.micro_batch_size": 4, **changes})
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    model = build_model(config, parallel, 256, dtype)
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    tensors: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            tensors.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    tokens = torch.randint(1, 100, (4, 32))
    tokens[:, 9] = 0
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = token_losses(model, tokens, tokens, pack_documents(tokens, 0 if mask else 101))
    del loss
    layout = Layout(config, 1, 1)
    (parts,) = kept_parts(layout, 0, 256, dtype.itemsize, "cpu")
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors.values()), sum(p.activations for _, p in parts)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model.ffn_activation": "gelu", "train.precision": "bf16"},
        {"model.mlp": ["dense", "peer", "peer"], "peer.heads": 4, "peer.key_dim": 32, "peer.top_k": 8},
        {"model.mlp": "peer", "peer.query_norm": "rms", "peer.output_gate": True, "peer.dense_hidden": 40},
        {"model.mlp": ["pkm", "dense", "pkm"], "pkm.query_norm": "layer", "train.precision": "bf16"},
        {"model.mlp": "moe"},
        {"model.mlp": "peer", "train.recompute_layers": 3},
    ],
    ids=str,
)
def test_activations_are_those_that_autograd_keeps(parallel: Parallel, changes: dict[str, Any]) -> None:
    measured, planned = kept(parallel, changes, mask=True)
    assert planned == pytest.approx(measured, rel=0.1)


def test_hardware_is_written_and_read_again(tmp_path) -> None:
    mine = load_hardware("h100").model_copy(update={"name": "mine", "price_per_hour": 2.0})
    mine.dump(tmp_path / "mine.yaml")
    assert load_hardware(str(tmp_path / "mine.yaml")) == mine
    (tmp_path / "odd.yaml").write_text("mine: {memory_bytes: 1.0e+9, hbm: 3}")
    with pytest.raises(ConfigError, match=r"odd.yaml: mine: hbm: unknown key"):
        load_hardware(str(tmp_path / "odd.yaml"))
    with pytest.raises(ConfigError, match=r"--gpu: 'h1' is not known; h100, h200, a100, b200, cpu, or a .yaml file"):
        load_hardware("h1")


SIZES = {
    "model.num_layers": 4, "model.hidden_size": 1280, "model.num_attention_heads": 10, "model.seq_length": 1024,
    "model.ffn_hidden_size": 5120, "model.mlp": ["dense", "peer"] * 2, "peer.num_experts": 1024**2, "peer.heads": 8,
    "peer.top_k": 16, "peer.key_dim": 128, "train.global_batch_size": 1024, "train.micro_batch_size": 8,
}  # fmt: skip


def test_more_of_everything_takes_more() -> None:
    """Each change moves the figure that it must, and a step's parts add up."""
    h100 = load_hardware("h100")

    def of(changes: dict[str, Any], ranks: int = 64, **options: Any):
        return plan(make({**SIZES, "parallel.expert": 8, **changes}), ranks, 8, h100, 32768, **options)

    own = of({})
    assert own.times.total == pytest.approx(sum(own.values()["seconds"].values()) / 2)  # the parts, and the step
    assert own.wires["exchange"].network == 0 < own.wires["exchange"].node
    assert own.wires["tables"].network > 0  # eight copies
    across = of({"parallel.expert": 64})
    assert across.wires["exchange"].network > 0 == across.wires["tables"].total
    assert across.memory.weights < own.memory.weights
    assert of({"train.recompute_layers": 4}).memory.activations < own.memory.activations / 2
    assert of({"train.micro_batch_size": 16}).memory.activations > 1.9 * own.memory.activations
    assert of({"peer.dispatch_chunks": 4}).times.exchange < own.times.exchange
    assert of({"parallel.pipeline": 4}).times.bubble > 0 == own.times.bubble
    assert of({}, tokens=own.tokens * 2, price_per_hour=2.0).cost == pytest.approx(own.days * 2 * 24 * 64 * 2.0)
    assert of({}, hits=2.0).wires["exchange"].node < own.wires["exchange"].node / 2
    lazy = of({"table_optimizer.lazy": True, "train.global_batch_size": 64, "train.micro_batch_size": 1})
    assert lazy.memory.gradients < own.memory.gradients


def test_the_command_finds_a_layout_that_fits(tmp_path, capsys) -> None:
    path, best = tmp_path / "run.yaml", tmp_path / "best.yaml"
    tree = make(SIZES).model_dump(mode="json", exclude_defaults=True)
    path.write_text(yaml.safe_dump(tree))
    options = ["plan", "-c", str(path), "--gpus", "8", "--vocab-size", "32768", "--price", "2"]
    assert app(options, standalone_mode=False) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "does not fit: the rank that needs most takes" in told
    assert "parallel.expert=2" in told
    assert not app([*options, "--search", "--json", "--write", str(best)], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    assert all(each["memory"]["fits"] for each in found)
    steps = [each["seconds"]["step"] for each in found]
    assert steps == sorted(steps)
    assert not app(["plan", "-c", str(best), *options[3:], "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out) == found[0]
    assert load_config(best).train.global_batch_size == 1024
    with pytest.raises(ConfigError, match=r"--search: no layout of this model divides 7 device"):
        app([*options[:3], "--gpus", "7", "--vocab-size", "32768", "--search"], standalone_mode=False)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.plan.txt")), ids=lambda path: path.name)
def test_plans_that_lie_beside_configs(path, capsys) -> None:
    """By the command in their first line."""
    command, *lines = path.read_text().splitlines()
    name = f"{path.name.removesuffix('.plan.txt')}.yaml"
    options = [str(CONFIGS / name) if word == f"configs/{name}" else word for word in command.split()[2:]]
    assert not app(options, standalone_mode=False)
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == lines


def test_the_command_builds_a_rank(tmp_path, capsys) -> None:
    """And what is planned of a rank is what is built."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(make(SIZES | {"parallel.expert": 2}).model_dump(mode="json", exclude_defaults=True)))
    options = ["plan", "-c", str(path), "--gpus", "8", "--vocab-size", "32768", "--json"]
    with pytest.raises(ConfigError, match="--construct x: must be a rank's number, or stages"):
        app([*options, "--construct", "x"], standalone_mode=False)
    assert not app([*options, "--construct", "3"], standalone_mode=False)
    (made,) = json.loads(capsys.readouterr().out)
    app(options, standalone_mode=False)
    planned = json.loads(capsys.readouterr().out)["memory"]
    assert made["rank"] == 3
    for part in ("weights", "gradients", "optimizer"):
        assert planned[part] == sum(memory[part] for memory in made["memory"].values()) > 0


@pytest.mark.parametrize("exponent", [0.0, 0.7, 1.0, 1.6])
@pytest.mark.parametrize(("rows", "picks"), [(1, 3), (700, 40), (700, 5000), (60_000, 20_000)])
def test_a_cache_has_the_rows_that_a_simulation_finds_in_it(rows: int, picks: int, exponent: float) -> None:
    """Of distinct rows and of picks, for caches of none, some and all rows."""
    law = torch.arange(1, rows + 1, dtype=torch.float64, device="cpu").pow(-exponent)
    torch.manual_seed(rows + picks)
    drawn = [torch.multinomial(law, picks, replacement=True) for _ in range(max(3, 30_000 // picks))]
    touched = [torch.unique(one) for one in drawn]
    for cached in {0, 1, rows // 50, rows // 3, rows}:
        expected = distinct(rows, picks, cached, exponent)
        for found, planned in (
            (sum(len(one) for one in touched), expected.rows),
            (sum(int((one >= cached).sum()) for one in touched), expected.missed),
            (sum(int((one < cached).sum()) for one in drawn), picks * share_of_picks(rows, cached, exponent)),
        ):
            assert planned == pytest.approx(found / len(drawn), rel=0.02, abs=5 * (planned / len(drawn)) ** 0.5 + 0.01)
    assert distinct(rows, 0).hit_rate == 1
    assert Skew(exponent, 0.25).distinct(rows, picks, 0).hit_rate == pytest.approx(0.25)


FAR = {
    **LAZY,
    "peer": {"query_norm": "rms", "table_memory": "host", "table_cache_gb": 1e-5},
    "table_optimizer": {"name": "rowwise_adam", "lazy": True},
}


def held_far(rank: int, world_size: int, tree: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """Of each pool of a rank after some steps what it has, and what is planned: bytes, bytes on disk, rows and bytes of
    the cache; and the most rows that were staged.
    """
    from peer_dist.kernels import disk
    from peer_dist.kernels.far import far_rows_of
    from peer_dist.training import Trainer

    trainer = Trainer(parse_config(tree, "test"))
    for _ in range(3):
        trainer.step()
    layout = Layout(trainer.config, world_size, 8)
    place, found = layout.place(rank), []
    pools = dict.fromkeys(
        far_rows_of(table) for each in trainer.engine.shard_optimizers for table in each.tables.values()
    )
    for pool, planned in zip(pools, far_pools(layout, place), strict=True):
        tensors = [tensor for parts in pool._far for tensor in parts.values()]
        on_disk = sum(tensor.nbytes for tensor in tensors if disk.is_mapped(tensor))
        cache = [tensor[: pool._hot.capacity] for parts in pool._buffer.tables for tensor in parts.values()]
        cache += [tensor for parts in pool._states or () for tensor in parts.values()]
        kept = sum(tensor.nbytes for tensor in [*cache, *pool._hot.tensors(), pool._dirty])
        staged = pool._peak * planned.row_bytes
        held = [sum(tensor.nbytes for tensor in tensors), on_disk, pool._hot.capacity, kept]
        uniform = planned.staged_bytes(layout, place.stage, Skew())
        found.append((held, [planned.bytes, planned.disk_bytes, planned.cached, planned.cache_bytes], staged, uniform))
    return found


ROUND = {"lazy": True, "stochastic_rounding": True}
TIERS = {
    "host, columns, moments": ({"expert_tensor": 2}, FAR),
    "disk, rows, masters": (
        {"expert": 2},
        {**FAR, **BF16, "peer": {**FAR["peer"], "table_memory": "disk", "table_dtype": "bfloat16"}},
    ),
    "disk, eight bits": (
        {},
        {**FAR, "peer": {**FAR["peer"], "table_memory": "disk", "table_dtype": "int8"},
         "table_optimizer": {"name": "rowwise_adagrad", **ROUND}},
    ),
    "host, all rows cached, Adam": (
        {}, {**FAR, "peer": {**FAR["peer"], "table_cache_gb": 1.0}, "table_optimizer": {"name": "adam", "lazy": True}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TIERS)
def test_far_tables_are_as_large_as_planned(case: str, text: Path, tmp_path: Path) -> None:
    """In the memory where they lie, on a disk and in the cache, byte for byte; staged rows are no more than planned."""
    grid, settings = TIERS[case]
    tree = Case(2, grid, 1, settings=settings).config(base_config(text, tmp_path))
    if tree["peer"]["table_memory"] == "disk":
        tree["peer"]["table_folder"] = str(tmp_path)
    for pools in run_ranks(held_far, 2, tree):
        assert pools
        for held, planned, staged, most in pools:
            assert held == planned
            assert staged <= most


def test_tables_elsewhere_take_from_other_memory() -> None:
    """And from more of the time; a larger cache gives some back."""
    h100 = load_hardware("h100")
    own = {
        **SIZES, "table_optimizer.lazy": True, "table_optimizer.name": "rowwise_adagrad",
        "train.global_batch_size": 64, "peer.num_experts": 2048**2,
    }  # fmt: skip

    def of(changes: dict[str, Any], hardware: Any = h100, **options: Any) -> Any:
        return plan(make({**own, **changes}), 8, 8, hardware, 32768, **options)

    near = of({})
    host = of({"peer.table_memory": "host"})
    disk = of({"peer.table_memory": "disk"})
    assert not near.fits
    assert host.fits
    assert disk.fits
    tables = 2 * 2 * 2048**2 * (6 * 1280 + 4)  # bfloat16, with masters
    assert near.memory.weights + near.memory.optimizer - host.memory.weights - host.memory.optimizer == tables
    assert tables < host.memory.tables_host < tables + host.memory.gradients  # the tables' part of these goes there
    assert disk.memory.tables_disk == 2 * 2 * 2048**2 * 6 * 1280
    assert [need.memory for need in disk.needs] == ["device", "host", "disk"]
    assert near.times.far_rows == near.times.far_step == 0 < host.times.far_rows < disk.times.far_rows
    assert 0 < host.times.far_step < disk.times.far_step
    assert host.work.far.fetch.fastest == "direct"
    assert host.with_fastest_fetch().layout.config == host.layout.config
    slow = h100.model_copy(update={"bus_gather_bytes_per_s": 1e9})
    direct = of({"peer.table_memory": "host"}, slow)
    copied = direct.with_fastest_fetch()
    larger = make({**own, "peer.table_memory": "host", "peer.num_experts": 2500**2, "train.global_batch_size": 8})
    assert search(plan(larger, 1, 8, slow, 32768))[0].layout.config.peer.table_fetch == "copied"  # no cache has all
    assert copied.layout.config.peer.table_fetch == "copied"
    assert copied.times.far_rows == direct.work.far.fetch.copied < direct.times.far_rows == direct.work.far.fetch.direct
    for shown, advised in ((direct, True), (copied, False)):
        console = Console(width=200, file=io.StringIO())
        for table in shown.tables():
            console.print(table)
        assert ("peer.table_fetch=copied is faster" in console.file.getvalue()) == advised
    assert disk.with_fastest_fetch() is disk

    assert near.recommended_cache == 0
    best = host.with_cache(host.recommended_cache)
    assert best.fits
    assert not host.with_cache(host.recommended_cache + 0.3).fits
    assert best.work.far.hit_rate > host.work.far.hit_rate
    assert best.times.total < host.times.total
    skewed = of({"peer.table_memory": "host"}, skew=Skew(1.1))
    assert skewed.work.far.hit_rate > host.work.far.hit_rate
    assert skewed.memory.gradients < host.memory.gradients
    measured = of({"peer.table_memory": "host"}, skew=Skew(0.0, 0.9))
    assert measured.work.far.hit_rate == pytest.approx(0.9)
    assert measured.times.far_rows < host.times.far_rows / 5

    eight = of({"peer.table_dtype": "int8", "table_optimizer.stochastic_rounding": True})
    assert eight.memory.weights < near.memory.weights / 1.9
    assert eight.memory.optimizer < near.memory.optimizer / 100  # no masters

    with pytest.raises(ConfigError, match=r"h100 has no disk_reads_per_s, .* doctor --calibrate"):
        of({"peer.table_memory": "disk"}, h100.model_copy(update={"disk_reads_per_s": None})).times  # noqa: B018
    small = of({"peer.table_memory": "host"}, h100.model_copy(update={"host_memory_bytes": 1e9}))
    assert small.needs[0].met
    assert not small.fits
    tight = of({"peer.table_memory": "host"}, h100.model_copy(update={"host_memory_bytes": 1e9, "disk_bytes": 1e9}))
    assert (
        "of host memory takes 138.4 GB of 0.9, most of it tables and the states of their optimizer, and no single key"
        in advice(tight)
    )
    console = Console(width=200, file=io.StringIO())
    console.print(search_table([small, near, host]))
    told = console.file.getvalue()
    assert f"{small.memory.peak / 1e9:.1f}, host too much" in told
    assert f"{near.memory.peak / 1e9:.1f} too much" in told


@pytest.mark.parametrize(
    ("steps", "waited"),
    [([], 0), ([(3.0, 4.0)], 0), ([(3.0, 1.0)], 2), ([(1.0, 1.0), (1.0, 3.0), (5.0, 4.0)], 3), ([(4, 1), (0, 9)], 3)],
)
def test_a_step_in_the_background_is_waited_for_where_its_rows_are_needed(steps: Any, waited: float) -> None:
    assert exposed(steps) == waited


def test_an_eight_bit_checkpoint_holds_two_bytes_a_number() -> None:
    rounded = {"table_optimizer.lazy": True, "table_optimizer.stochastic_rounding": True}
    sizes = {
        dtype: checkpoint_bytes(make({**SIZES, **rounded, "peer.table_dtype": dtype}), 128, 2)
        for dtype in ("bfloat16", "int8", "float8_e4m3")
    }
    assert sizes["int8"] == sizes["float8_e4m3"] == sizes["bfloat16"]


def test_the_command_moves_tables_that_do_not_fit(tmp_path, capsys) -> None:
    """With the keys that this takes; the search does it by itself where no other model is trained by that."""
    path, best = tmp_path / "run.yaml", tmp_path / "best.yaml"
    tree = make({**SIZES, "peer.num_experts": 1536**2, "train.global_batch_size": 8}).model_dump(
        mode="json", exclude_defaults=True
    )
    path.write_text(yaml.safe_dump(tree))
    options = ["plan", "-c", str(path), "--gpus", "1", "--vocab-size", "32768"]
    assert app(options, standalone_mode=False) == 1
    told = " ".join(capsys.readouterr().err.split())
    for memory in ("host", "disk"):
        assert f"peer.table_memory={memory} with table_optimizer.lazy=true (" in told
    assert (
        "table_dtype" not in told  # which would not be enough
    )
    assert app([*options, "peer.num_experts=1000000"], standalone_mode=False) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert (
        "peer.table_dtype=int8 with table_optimizer.lazy=true with table_optimizer.stochastic_rounding=true (" in told
    )
    assert app([*options, "--search"], standalone_mode=False) == 1  # a lazy optimizer would train another model
    capsys.readouterr()
    lazy = ["table_optimizer.lazy=true"]
    assert not app([*options, *lazy, "--search", "--zipf", "1", "--json", "--write", str(best)], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)[0]
    assert found["far_tables"]["memories"] == ["host"]
    written = load_config(best)
    assert written.peer.table_memory == "host"
    assert written.peer.table_cache_gb == found["far_tables"]["recommended_cache_gb"] > 1
    assert not app(["plan", "-c", str(best), *options[3:], "--zipf", "1"], standalone_mode=False)
    shown = capsys.readouterr().out
    for words in ("tables in host memory", "fits beside the rest", "bytes per token", "read by kernels"):
        assert words in shown
    with pytest.raises(ConfigError, match="--hit-rate: was measured with one size of cache"):
        app([*options, "--search", "--hit-rate", "0.5"], standalone_mode=False)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.2])
@pytest.mark.parametrize("rows", [1 << 16, 1 << 40])
def test_picks_of_more_experts_than_memory_could_list(rows: int, exponent: float) -> None:
    """They follow the law as those of few experts do."""
    torch.manual_seed(0)
    picks = synthetic_picks(rows, 2000, 8, exponent)
    assert picks.shape == (2000, 8)
    assert 0 <= picks.min() < rows / 8 < 7 * rows / 8 < picks.max() < rows  # hot ones lie anywhere
    assert len(picks.unique()) == pytest.approx(distinct(rows, 16000, exponent=exponent).rows, rel=0.06)
    most = int(picks.unique(return_counts=True)[1].max())
    hottest = 16000 * share_of_picks(rows, 1, exponent)
    assert abs(most - hottest) < 5 * math.sqrt(hottest) + 5
