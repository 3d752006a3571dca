"""The model built without memory and without other ranks is the one that real ranks build."""

import dataclasses
import gc
import resource
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from peer_dist.config import ConfigError, load_config
from peer_dist.config.load import parse_config
from peer_dist.planning.construct import build_rank, construct, construct_stages
from tests.ranks import run_ranks

CONFIGS = Path(__file__).parent.parent / "configs"

CASES = {
    "stages, columns, tied embeddings, rounded tables": {
        "parallel": {"tensor": 2, "pipeline": 2, "expert_tensor": 2, "sequence": True},
        "zero": {"stage": 1},
        "peer": {"table_dtype": "bfloat16", "query_norm": "batch"},
        "table_optimizer": {"name": "rowwise_adam", "stochastic_rounding": True},
        "train": {"precision": "bf16"},
    },
    "grid, ZeRO-3": {
        "parallel": {"expert": 2, "expert_tensor": 2},
        "zero": {"stage": 3},
        "train": {"precision": "bf16"},
    },
    "uneven rows, memory, ZeRO-0": {
        "model": {"mlp": ["peer", "pkm", "dense", "peer"]},
        "parallel": {"expert": 4},
        "zero": {"stage": 0},
        "peer": {"table_dtype": "bfloat16"},
        "train": {"precision": "bf16"},
    },
}
MORE = {
    "ZeRO-2, shared tables, recurrent routers": {
        "model": {"mlp": ["peer", "peer", "dense", "dense"]},
        "parallel": {"pipeline": 2, "expert": 2},
        "zero": {"stage": 2},
        "peer": {"layers_per_pool": 2},
        "router": {"kind": "recurrent", "state_size": 12},
    },
    "interleaved, ZeRO-0, untied": {
        "model": {"tied_embeddings": False},
        "parallel": {"pipeline": 2, "virtual_pipeline": 2},
        "zero": {"stage": 0},
    },
    "coarse experts": {
        "model": {"mlp": ["moe", "dense", "sigma_moe", "moe"]},
        "parallel": {"tensor": 2, "sequence": True, "expert": 2},
        "zero": {"stage": 1},
        "moe": {"num_experts": 4},
    },
    "ZeRO-3 in float32, lazy": {
        "zero": {"stage": 3}, "table_optimizer": {"name": "rowwise_adagrad", "lazy": True}
    },
}  # fmt: skip
CASES_AND_MORE = [
    *(pytest.param(case, id=name) for name, case in CASES.items()),
    *(pytest.param(case, id=name, marks=pytest.mark.slow) for name, case in MORE.items()),
]


def tree_of(case, small):
    model = {"num_layers": 4, "num_attention_heads": 4, "mlp": ["peer", "dense", "dense", "peer"]}
    small["train"]["global_batch_size"] = 16  # several micro-batches in any layout
    tree = small | {"model": small["model"] | model, "pkm": {"num_values": 225, "heads": 2, "top_k": 4, "key_dim": 8}}
    return tree | {section: tree.get(section, {}) | keys for section, keys in case.items()}


def sizes_of(tensors):
    return {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}


def storages():
    gc.collect()
    return sizes_of(each for each in gc.get_objects() if isinstance(each, torch.Tensor) and not each.is_sparse)


def real(rank, world_size, tree):
    """What a trainer's model has; and in bytes what was allocated for it beside what its engine counts, gradients
    apart, and the gradients.
    """
    from peer_dist.megatron import run_forward_backward, shards_of
    from peer_dist.training import Trainer

    before = storages()
    trainer = Trainer(parse_config(tree, "test"))
    after = storages()
    engine, shards = trainer.engine, {name: shard.parameter for name, shard in shards_of(trainer.model).items()}
    dense = dict(trainer.model.named_parameters())
    shapes = {name: tuple(getattr(each, "ds_shape", each.shape)) for name, each in dense.items()}
    shapes |= {name: tuple(each.shape) for name, each in shards.items()}
    at_first = [*engine.memory().values()]
    with engine.accumulate():
        run_forward_backward(trainer.model, list(trainer._micro_batches(0)), 1.0)
        memory = engine.memory()
        grads = [each.main_grad if tree["zero"]["stage"] == 0 else each.grad for each in dense.values()]
        grads += [each.grad for each in shards.values() if each.grad is not None and not each.grad.is_sparse]
        if tree["zero"]["stage"] == 3:
            grads.append(engine._zero.grad_partitions_flat_buffer)
        sizes = sizes_of(grads)
    allocated = sum(size for each, size in after.items() if each not in before and each not in sizes)
    allocated -= sum(each.weights + each.optimizer for each in at_first)
    if tree.get("table_optimizer", {}).get("lazy"):  # of rows touched
        assert memory["tables"].gradients > 0
        memory["tables"] = dataclasses.replace(memory["tables"], gradients=0)
    parallel = trainer.parallel
    groups = (parallel.tensor_group, parallel.pipeline_group, parallel.experts.domain)
    return shapes, memory, [dist.get_process_group_ranks(each) for each in groups], allocated, sum(sizes.values())


def fake(rank, world_size, tree, vocab_size):
    dist.barrier()  # until all are connected
    dist.destroy_process_group()
    return build_rank(parse_config(tree, "test"), world_size, rank, 2, vocab_size)


@pytest.mark.parametrize("case", CASES_AND_MORE)
def test_shapes_and_bytes_are_those_of_real_ranks(case, small):
    tree = tree_of(case, small)
    for (shapes, memory, groups, allocated, grads), made in zip(
        run_ranks(real, 4, tree), run_ranks(fake, 4, tree, 384), strict=True
    ):
        assert made.shapes == shapes
        assert made.memory == memory
        memory = list(memory.values())
        assert [made.groups[name] for name in ("tensor", "pipeline", "experts")] == groups
        assert grads == sum(each.gradients for each in memory)
        kept = memory[0].buckets if tree["zero"]["stage"] == 3 else 0
        # Beside what is counted there are statistics of queries and counts of picks; and on CPU ranks some of the
        # parameters as they were before ZeRO flattened them may still be there.
        beside = 32_000 + (memory[0].weights if tree["zero"]["stage"] in (1, 2) else 0)
        assert 0 <= allocated - kept < beside


@pytest.mark.slow
def test_a_run_of_512_ranks():
    """100 billion parameters in experts, on 64 nodes, from a laptop's memory."""
    model = {"num_layers": 24, "hidden_size": 2048, "num_attention_heads": 16, "ffn_hidden_size": 8192}
    tree = {
        "model": {**model, "seq_length": 2048, "mlp": ["dense", "dense", "dense", "peer"] * 6},
        "peer": {"num_experts": 2048**2, "table_dtype": "bfloat16", "query_norm": "rms"},
        "table_optimizer": {"name": "rowwise_adam"},
        "parallel": {"tensor": 4, "pipeline": 2, "sequence": True, "expert": 8, "expert_tensor": 4},
        "data": {"prefix": "nowhere"},
        "train": {"micro_batch_size": 4, "global_batch_size": 1024, "precision": "bf16"},
    }
    begin = time.monotonic()
    made = construct_stages(parse_config(tree, "test"), 512, 8, 32000)
    gigabytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    assert time.monotonic() - begin < 120
    assert gigabytes < 4
    assert [each.rank for each in made] == [0, 255, 256, 511]
    for each in made:
        assert [len(each.groups[name]) for name in ("tensor", "pipeline", "data", "experts")] == [4, 2, 64, 32]
        assert each.rank in each.groups["expert rows"]
        assert list(each.layers) == list(range(12 * each.stage + 1, 12 * each.stage + 13))
        tables = 2 * 3 * 2048**2 * 2048 // 32
        assert each.parameters["tables"] == tables
        assert each.memory["tables"].weights == 2 * tables
        # masters and first moments; second moments, one a row
        assert each.memory["tables"].optimizer == 8 * tables + 4 * tables // 512
        tokens = 1024 * 2048 // (64 * 4)
        uniform = each.exchange["uniform"]
        assert uniform.hits == pytest.approx(8 * (1 - (7 / 8) ** 128), rel=0.01)
        # most of 8 nodes' x, y, dx and dy
        assert uniform.between == pytest.approx(3 * tokens * 7 * 4 * 2048 * 2, rel=0.2)
    assert made[0].shapes["0.embedding.word_embeddings.weight"] == (8000, 2048)


def test_a_rank_whose_transport_this_machine_lacks(small):
    """It is built all the same: nothing travels."""
    made = [
        construct(parse_config(small | {"parallel": {"expert": 2, "transport": transport}}, "test"), 2, 0, 2)
        for transport in ("all_to_all", "symmetric_memory")
    ]
    assert made[0] == made[1]


def test_what_has_no_place_in_the_world_is_refused(small):
    with pytest.raises(ConfigError, match="does not divide the 4 rank"):
        construct(parse_config(small | {"parallel": {"expert": 3}}, "test"), 4, 0, 0)
    with pytest.raises(ConfigError, match="rank 2: there are ranks 0 to 1"):
        construct(parse_config(small, "test"), 2, 2, 0)


WORLDS = {  # ranks, GPUs of a node, GB
    "laptop": (4, 4, 0.5),
    "one-gpu": (1, 1, 40),
    "one-node": (8, 8, 40),
    "8-nodes": (64, 8, 40),
    "64-nodes": (512, 8, 50),
}
SMALLER = list(WORLDS)[:-1]


def sizes_case(rank, world_size, name):
    dist.destroy_process_group()
    ranks, gpus_per_node, _ = WORLDS[name]
    return build_rank(
        load_config(CONFIGS / f"{name}.yaml"), ranks, 0, gpus_per_node, 32000, "cpu" if name == "laptop" else "cuda"
    )


@pytest.mark.parametrize("name", [*(pytest.param(name, marks=pytest.mark.slow) for name in SMALLER), "64-nodes"])
def test_configs_that_ship_fit_their_machines(name):
    """With room for activations; and tokens stay inside their node."""
    (made,) = run_ranks(sizes_case, 1, name)
    assert made.bytes < WORLDS[name][2] * 1e9
    assert made.exchange["uniform"].between == 0
