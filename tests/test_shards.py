"""Sharded layers in the hands of torch's own tools: checkpoints, optimizers, clipping, DDP, FSDP, copies and meshes."""

import copy
import math
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

import peer_dist
from peer_dist import PEER, ProductKeyMemory
from peer_dist.sharding import ExpertGroups, GridLayout
from peer_dist.sharding.grid import first_of
from tests.ranks import run_ranks

DIM, EXPERTS, TOKENS = 10, 7**2, 24  # rows over 2, 3 and 4 ranks differ, and of 8 the last has none


class Model(nn.Module):
    """A dense part, experts and values; ``group`` may be None."""

    def __init__(self, group, seed=3, **options):
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(DIM, DIM)
        common = {"heads": 2, "top_k": 3, "key_dim": 4, "query_norm": "rms", "group": group, "seed": seed} | options
        self.peer = PEER(DIM, EXPERTS, **common)
        self.memory = ProductKeyMemory(DIM, EXPERTS, **common)
        self.double()

    def forward(self, x):
        x = self.first(x)
        return x + self.peer(x) + self.memory(x)


def batch(step):
    return torch.randn(TOKENS, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(step)).unbind()


def train(model, optimizer, steps, tables=(), rank=0, ranks=1, max_norm=math.inf):
    """The mean losses and gradient norms of these steps, over all ranks' tokens."""
    seen = []
    for step in steps:
        x = torch.stack(batch(step)[rank::ranks])
        optimizer.zero_grad()
        loss = (model(x) - x.roll(1, 1)).square().mean()
        loss.backward()
        for table in tables:
            table.grad /= ranks
        norm = peer_dist.clip_grad_norm_(model, max_norm)
        optimizer.step()
        mean = loss.detach() * len(x) / TOKENS
        if ranks > 1:
            dist.all_reduce(mean)
        seen.append((mean.item(), norm.item()))
    return seen


def adamw(model, **options):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, **options)


def wrapped(group, seed=3, **options):
    """The model in DDP, its tables, and an optimizer of all."""
    model = Model(group, seed, **options)
    tables = peer_dist.exempt_tables(model)
    model = DistributedDataParallel(model)
    return model, tables, adamw(model)


def grid(columns):
    return ExpertGroups.over(dist.group.WORLD, columns)


def close(got, want, tolerance=1e-10):
    torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=tolerance, atol=tolerance)


def save_case(rank, ranks, columns, path):
    model, tables, optimizer = wrapped(grid(columns))
    losses = train(model, optimizer, range(3), tables, rank, ranks, max_norm=0.05)
    weights, states = get_state_dict(model, optimizer)
    for part, whole in (("peer.down", weights["peer.down"]), ("exp_avg", states["state"]["memory.values"]["exp_avg"])):
        assert isinstance(whole, DTensor), part
        assert whole.shape == (EXPERTS, DIM)
        assert whole.placements == ((Shard(0),) if columns == 1 else (Shard(0), Shard(1)))
    dcp.save({"model": weights, "optimizer": states}, checkpoint_id=path)
    return losses


def load_case(rank, ranks, columns, path):
    """Continued from what other ranks saved, and saved again."""
    model, tables, optimizer = wrapped(grid(columns), seed=50)
    weights, states = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": states}, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=states)
    dcp.save({"model": model.module.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=f"{path}-again")
    return train(model, optimizer, range(3, 6), tables, rank, ranks, max_norm=0.05)


def alone(path):
    """In one process without groups, from the same checkpoint."""
    model = Model(None, seed=50)
    optimizer = adamw(model)
    weights, states = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": states}, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=states)
    return model, optimizer


@pytest.mark.parametrize(("saved", "loaded"), [((2, 1), [(3, 1), (4, 2)]), ((4, 2), [(2, 2), (8, 1)])], ids=str)
def test_checkpoints_fit_other_numbers_of_ranks(saved, loaded, tmp_path):
    """Weights and AdamW's moments, uneven and empty shards included: the losses go on as those of one process."""
    path = str(tmp_path / "checkpoint")
    model = Model(None)
    optimizer = adamw(model)
    before, after = (train(model, optimizer, steps, max_norm=0.05) for steps in (range(3), range(3, 6)))
    for losses in run_ranks(save_case, saved[0], saved[1], path):
        close(losses, before)
    model, optimizer = alone(path)
    close(train(model, optimizer, range(3, 6), max_norm=0.05), after)
    for ranks, columns in loaded:
        for losses in run_ranks(load_case, ranks, columns, path):
            close(losses, after)
    again = {"model": Model(None, seed=60).state_dict()}
    dcp.load(again, checkpoint_id=f"{path}-again")
    first = alone(path)[0].state_dict()
    for name, value in again["model"].items():
        assert torch.equal(value, first[name]), name


def save_alone_case(rank, ranks, columns, path):
    model, tables, optimizer = wrapped(grid(columns), seed=70)
    weights, states = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": states}, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=states)
    return train(model, optimizer, range(2, 4), tables, rank, ranks)


def test_ranks_load_what_one_process_saved(tmp_path):
    model = Model(None)
    optimizer = adamw(model)
    train(model, optimizer, range(2))
    weights, states = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": states}, checkpoint_id=tmp_path)
    want = train(model, optimizer, range(2, 4))
    for losses in run_ranks(save_alone_case, 3, 1, str(tmp_path)):
        close(losses, want)


def forms_case(rank, ranks, columns, folder):
    """Every form in which a state dict may come is this rank's block afterwards; others are refused in a sentence."""
    groups, whole = grid(columns), Model(None)
    optimizer_of_whole = adamw(whole)
    train(whole, optimizer_of_whole, range(2))
    want = whole.peer.down.detach()
    model = Model(groups, seed=9)
    layout = model.peer.layout
    block = want[layout.rows.start : layout.rows.stop, layout.columns.start : layout.columns.stop]
    full = StateDictOptions(full_state_dict=True)
    from_rank_0 = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)

    def fresh():
        return Model(groups, seed=9)

    for assign in (False, True):
        model = fresh()
        model.load_state_dict(whole.state_dict(), assign=assign)
        assert torch.equal(model.peer.down, block)
        other = fresh()
        other.load_state_dict(model.state_dict(), assign=assign)
        assert torch.equal(other.peer.down, block)
        other = fresh()
        other.load_state_dict(model.state_dict(keep_vars=True), assign=assign)  # plain blocks
        assert torch.equal(other.peer.down, block)
        assert isinstance(other.state_dict()["memory.values"], DTensor)
    gathered = get_model_state_dict(model, options=full)
    assert torch.equal(gathered["peer.down"], want)
    other = fresh()
    set_model_state_dict(other, whole.state_dict() if rank == 0 else {}, options=from_rank_0)
    assert torch.equal(other.peer.down, block)
    mesh = init_device_mesh("cpu", (ranks,))
    for place in (Replicate(), Shard(1), Shard(0)):
        state = model.state_dict()
        state["peer.down"] = dist.tensor.distribute_tensor(want, mesh, [place])
        other = fresh()
        other.load_state_dict(state)
        assert torch.equal(other.peer.down, block)

    # what an optimizer may be given: before or after its first step
    states = get_optimizer_state_dict(whole, optimizer_of_whole, options=full)
    fresh_one, stepped = adamw(model), adamw(model)
    set_optimizer_state_dict(model, stepped, states, options=full)
    moments = stepped.state_dict()
    assert all(
        isinstance(value, DTensor) == (value.dim() > 0 and id(parameter) in {id(model.peer.down)})
        for parameter in (model.first.bias, model.peer.down)
        for value in moments["state"][[*map(id, model.parameters())].index(id(parameter))].values()
    )
    fresh_one.load_state_dict(moments)
    for optimizer in (fresh_one, stepped, copy.deepcopy(stepped)):
        optimizer.zero_grad()
        optimizer.step()
        assert all(type(value) is torch.Tensor for state in optimizer.state.values() for value in state.values())
    mine = stepped.state[model.peer.down]["exp_avg"]
    theirs = optimizer_of_whole.state[whole.peer.down]["exp_avg"]
    assert torch.equal(mine, theirs[layout.rows.start : layout.rows.stop, layout.columns.start : layout.columns.stop])
    assert torch.equal(fresh_one.state[model.peer.down]["exp_avg"], mine)

    state = model.state_dict()
    state["peer.down"] = torch.zeros(5, 4)
    sentence = rf"peer.down has the shape \[5, 4\]: it must be of a table \[{EXPERTS}, {DIM}\]"
    with pytest.raises(RuntimeError, match=sentence) as error:
        model.load_state_dict(state)
    assert "Missing" not in str(error.value)
    torch.save(model.state_dict(), folder / f"{rank}.pt")
    dist.barrier()
    fresh().load_state_dict(torch.load(folder / f"{rank}.pt"))
    with pytest.raises(RuntimeError, match=r"peer[.]up has another rank's block alone"):
        fresh().load_state_dict(torch.load(folder / f"{(rank + 1) % ranks}.pt"))


@pytest.mark.parametrize(("ranks", "columns"), [(2, 1), (3, 3), (4, 2)])
def test_state_dicts_in_every_form(ranks, columns, tmp_path):
    run_ranks(forms_case, ranks, columns, tmp_path)


def gradients(model, ranks=1, rank=0):
    """Those of the mean loss over all ranks' tokens."""
    x = torch.stack(batch(0)[rank::ranks])
    (model(x) - x.roll(1, 1)).square().mean().backward()
    tables = peer_dist.exempt_tables(model)
    for table in tables:
        table.grad /= ranks
    for parameter in model.parameters():
        if ranks > 1 and not any(parameter is table for table in tables):
            dist.all_reduce(parameter.grad)
            parameter.grad /= ranks


def dense(grad):
    return grad.to_dense() if grad.is_sparse else grad


NORMS = (1.0, 2, 3.5, math.inf)


def clip_case(rank, ranks, columns, sparse):
    model = Model(grid(columns), sparse_grad=sparse)
    if sparse:  # accumulated: not coalesced
        gradients(model, ranks, rank)
        for table in peer_dist.exempt_tables(model):
            table.grad *= ranks  # as it came
        for parameter in model.parameters():
            parameter.grad = parameter.grad if parameter.grad.is_sparse else None
    gradients(model, ranks, rank)
    norms = [peer_dist.clip_grad_norm_(model.parameters(), math.inf, norm_type) for norm_type in NORMS]
    tables = peer_dist.exempt_tables(model)
    norms.append(peer_dist.clip_grad_norm_([*model.parameters(), *tables], 1e9))  # each once
    norms.append(peer_dist.clip_grad_norm_((p for p in model.parameters()), 0.01))
    norms.append(peer_dist.clip_grad_norm_(model, 1e9))
    one_table = peer_dist.clip_grad_norm_(model.peer.down, 1e9)
    model.peer.release_shards()
    norms.append(peer_dist.clip_grad_norm_(model, 1e9))
    assert all(norm.dtype == torch.float64 and norm.dim() == 0 for norm in norms)
    if rank == 0:
        model.peer.up.grad = None
    missing = peer_dist.clip_grad_norm_(model, 1e9)
    if not sparse:
        model.first.bias.grad.fill_(math.nan)
        with pytest.raises(RuntimeError, match="not finite"):
            peer_dist.clip_grad_norm_(model, 1.0, error_if_nonfinite=True)
    with pytest.raises(ValueError, match=r"norm_type must be above 0, not -1[.]0"):
        peer_dist.clip_grad_norm_(model, 1.0, -1)
    return [norm.item() for norm in norms], one_table.item(), missing.item(), model.peer.layout.rows.start


@pytest.mark.parametrize(
    ("ranks", "columns", "sparse"), [(1, 1, False), (2, 1, False), (2, 1, True), (3, 3, True), (4, 2, False)]
)
def test_every_rank_clips_by_the_norm_of_the_whole(ranks, columns, sparse):
    """Dense, sharded and sparse gradients; a gradient that one rank lacks. As torch clips those of one process."""
    model = Model(None)
    if sparse:
        gradients(model)
        for parameter in (*model.first.parameters(), *model.peer.parameters(), *model.memory.parameters()):
            if not any(parameter is table for table in (model.peer.down, model.peer.up, model.memory.values)):
                parameter.grad = None
    gradients(model)
    clip = torch.nn.utils.clip_grad_norm_
    want = [clip(model.parameters(), math.inf, norm_type).item() for norm_type in NORMS]
    want += [want[1], want[1], *[0.01] * 2]
    results = run_ranks(clip_case, ranks, columns, sparse)
    clip(model.parameters(), 0.01)
    for norms, one_table, missing, _ in results:
        assert norms == results[0][0], "all ranks have the same bits"
        assert missing == results[0][2]
        close(norms, want, 1e-6)
        close(one_table, dense(model.peer.down.grad).norm().item(), 1e-6)
    if ranks > 1:
        lost = dense(model.peer.up.grad)[: first_of(EXPERTS, 1, ranks // columns), : first_of(DIM, 1, columns)]
        close(missing, math.sqrt(0.01**2 - lost.square().sum().item()), 1e-6)


def test_clipping_what_is_not_spread_is_torchs():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        layers = []
        for clip in (torch.nn.utils.clip_grad_norm_, peer_dist.clip_grad_norm_):
            torch.manual_seed(0)
            layer = nn.Sequential(nn.Linear(5, 7, dtype=dtype), nn.Linear(7, 2, dtype=dtype))
            layer[0].bias.requires_grad_(False)
            layer(torch.ones(3, 5, dtype=dtype)).square().sum().backward()
            norm = clip(layer.parameters(), 0.1)
            layers.append((norm, [p.grad for p in layer.parameters() if p.grad is not None]))
        tolerance = {"rtol": 1e-2, "atol": 1e-3} if dtype == torch.bfloat16 else {"rtol": 1e-6, "atol": 0}
        torch.testing.assert_close(*(each[0].double() for each in layers), **tolerance)
        for ours, torchs in zip(layers[1][1], layers[0][1]):
            torch.testing.assert_close(ours, torchs, **tolerance)
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1, 1, 2])).sum().backward()
    assert peer_dist.clip_grad_norm_(embedding, 1.0).item() == pytest.approx(math.sqrt(3 * 2**2 + 3))
    assert embedding.weight.grad.to_dense().norm().item() == pytest.approx(1.0, abs=1e-5)
    assert peer_dist.clip_grad_norm_([], 1.0).item() == 0


def wrappers_case(rank, ranks, sparse):
    """DDP and FSDP around tables that are not theirs: one sentence, before anything is broadcast or averaged."""
    model = Model(None if sparse else dist.group.WORLD, seed=3, sparse_grad=sparse)
    way_out = "build the layer without sparse_grad" if sparse else "peer_dist.exempt_tables"
    for wrap in (
        DistributedDataParallel,
        lambda model: DistributedDataParallel(nn.Sequential(model)),
        lambda model: fully_shard(model, mesh=init_device_mesh("cpu", (ranks,))),
        lambda model: FullyShardedDataParallel(model, device_id=torch.device("cpu")),
        lambda model: FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True),
    ):
        victim = copy.deepcopy(model)
        before = victim.peer.down.detach().clone()
        with pytest.raises(ValueError, match=way_out) as error:
            wrap(victim)
        assert "\n" not in str(error.value)
        if wrap is DistributedDataParallel:
            assert torch.equal(victim.peer.down, before)
    if not sparse:
        nested = nn.Sequential(model)
        peer_dist.exempt_tables(model)  # of the inner one, which is not what is wrapped
        with pytest.raises(ValueError, match=r"0\.peer\.down.*exempt_tables"):
            DistributedDataParallel(nested)
        frozen = Model(dist.group.WORLD)
        frozen.peer.release_shards()
        frozen.memory.requires_grad_(False)  # and would be broadcast
        with pytest.raises(ValueError, match=r"memory\.values"):
            DistributedDataParallel(frozen)


@pytest.mark.parametrize("sparse", [False, True])
def test_wrappers_are_refused(sparse):
    run_ranks(wrappers_case, 2, sparse)


def roots_case(rank, ranks):
    """The layer itself is wrapped, whose tables DDP calls by two names; or torch's checkpointing of it is."""
    whole = PEER(DIM, 8**2, 2, 3, 4, "rms", seed=1)  # as many rows on both ranks: nothing but numbers would tell
    x = torch.stack(batch(0)).float()
    whole(x).sum().backward()
    for wrap in (
        lambda layer: layer,
        checkpoint_wrapper,
        nn.Sequential,
        lambda layer: nn.Sequential(checkpoint_wrapper(layer)),
    ):
        layer = PEER(DIM, 8**2, 2, 3, 4, "rms", group=dist.group.WORLD, seed=1)
        model, before, rows = (
            wrap(layer),
            layer.down.detach().clone(),
            slice(layer.layout.rows.start, layer.layout.rows.stop),
        )
        peer_dist.exempt_tables(model)
        model = DistributedDataParallel(model)
        assert torch.equal(layer.down, before)
        model(x[rank::ranks]).sum().backward()
        torch.testing.assert_close(layer.down.grad, whole.down.grad[rows], rtol=1e-5, atol=1e-5)
        weights = get_model_state_dict(model)
        assert sum(isinstance(value, DTensor) for value in weights.values()) == 2
        set_model_state_dict(model, weights)


def test_tables_of_the_wrapped_module_itself_are_exempt():
    run_ranks(roots_case, 2)


def zero_redundancy_case(rank, ranks):
    model, tables, _ = wrapped(grid(1))
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.0)
    before = tables[0].detach().clone()
    model(torch.stack(batch(0)[rank::ranks])).sum().backward()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"ZeroRedundancyOptimizer .* an optimizer of their own"):
            optimizer.step()
    assert torch.equal(tables[0], before)
    mine = {id(table) for table in tables}
    dense = ZeroRedundancyOptimizer([p for p in model.parameters() if id(p) not in mine], torch.optim.SGD, lr=0.1)
    dense.step()


def test_zero_redundancy_optimizer_is_refused():
    run_ranks(zero_redundancy_case, 2)


def alike_case(rank, ranks):
    """What is not finite on one rank alone stops all of them, or scales the gradients of all."""
    for value in (math.nan, math.inf):
        for part in ("first.bias", "peer.down"):
            model = Model(grid(1))
            gradients(model, ranks, rank)
            if rank == 1:
                model.get_parameter(part).grad.view(-1)[0] = value
            with pytest.raises(RuntimeError, match="not finite"):
                peer_dist.clip_grad_norm_(model, 1.0, error_if_nonfinite=True)
            assert not peer_dist.clip_grad_norm_(model, 1.0).isfinite()


def test_ranks_stop_together():
    run_ranks(alike_case, 2)


def scaler_case(rank, ranks):
    model, _, optimizer = wrapped(grid(1))
    scaler = ShardedGradScaler("cpu", init_scale=8.0)
    scaler.scale(model(torch.stack(batch(0)[rank::ranks])).square().mean()).backward()
    if rank == 1:
        model.module.peer.down.grad[0, 0] = math.inf
    scaler.unscale_(optimizer)
    peer_dist.clip_grad_norm_(model, 1.0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 4.0
    assert all(map(torch.equal, before, model.parameters()))


def test_overflow_on_one_rank_stops_the_step_on_all():
    run_ranks(scaler_case, 2)


def fsdp_case(rank, ranks, flat):
    model = Model(grid(1))
    tables = peer_dist.exempt_tables(model)
    if flat:
        model = FullyShardedDataParallel(
            model, device_id=torch.device("cpu"), ignored_states=tables, use_orig_params=True
        )
        for parameters in (model, model.parameters()):
            with pytest.raises(ValueError, match=r"FSDP1.* use fully_shard"):
                peer_dist.clip_grad_norm_(parameters, 1.0)
        return train_without_clipping(model, adamw(model), tables, rank, ranks)
    fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)), ignored_params=set(tables))
    optimizer = adamw(model)
    losses = train(model, optimizer, range(3), tables, rank, ranks, max_norm=0.05)
    assert all(isinstance(value, DTensor) for value in model.state_dict().values())
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return losses, full


def train_without_clipping(model, optimizer, tables, rank, ranks):
    losses = []
    for step in range(3):
        x = torch.stack(batch(step)[rank::ranks])
        optimizer.zero_grad()
        loss = (model(x) - x.roll(1, 1)).square().mean()
        loss.backward()
        for table in tables:
            table.grad /= ranks
        optimizer.step()
        dist.all_reduce(loss.detach())
        losses.append(loss.item() / ranks)
    return losses, None


@pytest.mark.parametrize("flat", [False, True])
def test_fsdp_leaves_exempt_tables_alone(flat):
    model = Model(None)
    want = train(model, adamw(model), range(3), max_norm=math.inf if flat else 0.05)
    for losses, full in run_ranks(fsdp_case, 2, flat):
        close(losses, [loss for loss, _ in want] if flat else want)
        for name, value in (full or {}).items():
            torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-9, atol=1e-9)


def exempt_case(rank, ranks):
    model = Model(dist.group.WORLD)
    model._ddp_params_and_buffers_to_ignore = ["mine"]
    other = Model(None)
    assert peer_dist.exempt_tables(other) == []  # whole tables are DDP's
    tables = peer_dist.exempt_tables(model)
    assert [id(t) for t in tables] == [id(t) for t in (model.peer.down, model.peer.up, model.memory.values)]
    assert "mine" in model._ddp_params_and_buffers_to_ignore
    wrapped = DistributedDataParallel(model)
    listed = {id(parameter) for parameter in wrapped.parameters()}
    assert all(id(table) in listed for table in tables)
    wrapped(torch.stack(batch(0)[rank::ranks])).sum().backward()
    wrapped.zero_grad()
    wrapped.requires_grad_(False)
    assert all(table.grad is None and not table.requires_grad for table in tables)
    whole = Model(None)
    gathered = get_model_state_dict(wrapped, options=StateDictOptions(full_state_dict=True))
    for name in ("peer.down", "peer.up", "memory.values"):
        assert torch.equal(gathered[name], whole.state_dict()[name])

    # shared tables, under every name
    first = PEER(DIM, EXPERTS, 2, 3, 4, "rms", group=dist.group.WORLD, seed=1)
    pool = nn.ModuleList([first, PEER(DIM, EXPERTS, 2, 3, 4, "rms", group=dist.group.WORLD, seed=2, tables_of=first)])
    assert len(peer_dist.exempt_tables(pool)) == 2
    assert set(pool._ddp_params_and_buffers_to_ignore) == {"0.down", "0.up", "1.down", "1.up"}
    DistributedDataParallel(pool)

    layer = Model(dist.group.WORLD).peer
    down = layer.down
    for _ in range(2):
        layer.release_shards()
    assert layer.down is down
    assert "down" not in layer.state_dict()
    assert not any(parameter is down for parameter in layer.parameters())
    with pytest.raises(KeyError):
        peer_dist.sharding.release(layer, ("nothing",))


def test_exempt_and_released_tables():
    run_ranks(exempt_case, 2)


def copies_case(rank, ranks):
    for norm in ("rms", "batch"):
        model, tables, optimizer = wrapped(grid(1), query_norm=norm)
        train(model, optimizer, range(1), tables, rank, ranks)
        average = torch.optim.swa_utils.AveragedModel(
            model.module, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
        )
        average.update_parameters(model.module)
        other = copy.deepcopy(model.module)
        assert other.peer.layout.groups is model.module.peer.layout.groups
        assert other.peer.down is not model.module.peer.down
        x = torch.stack(batch(4)[rank::ranks])
        for each in (other, average.module):
            assert torch.equal(each.eval()(x), model.module.eval()(x))
            assert isinstance(each.state_dict()["peer.down"], DTensor)
            assert len(peer_dist.exempt_tables(each)) == 3
        model.train()
        with torch.no_grad():
            other.peer.down.zero_()
        assert model.module.peer.down.abs().max() > 0
        other.peer.release_shards()
        assert isinstance(copy.deepcopy(other).peer.down, nn.Parameter)

    # whatever puts new parameters into the place of the old ones, tables stay tables
    for swap in (False, True):
        torch.__future__.set_swap_module_params_on_conversion(swap)
        model = Model(grid(1)).float().to("meta").to_empty(device="cpu")
        torch.__future__.set_swap_module_params_on_conversion(False)
        assert model.state_dict()["peer.down"].shape == (EXPERTS, DIM)
        assert len(peer_dist.exempt_tables(model)) == 3
        for table in model.parameters():
            table.grad = torch.ones_like(table)
        count = sum(p.numel() for p in Model(None).parameters())
        close(peer_dist.clip_grad_norm_(model, 1.0).item(), math.sqrt(count), 1e-6)


def test_copies_and_conversions():
    run_ranks(copies_case, 2)


def seeds_case(rank, ranks):
    options = {"heads": 2, "top_k": 3, "key_dim": 4, "group": dist.group.WORLD}
    for build in (PEER, ProductKeyMemory):
        with pytest.raises(ValueError, match=r"seed must be the same on all ranks, .*: 5 on rank 0, 6 on rank 1"):
            build(DIM, EXPERTS, **options, seed=5 + rank)
        with pytest.raises(ValueError, match="None on rank 0, 0 on rank 1"):
            build(DIM, EXPERTS, **options, seed=None if rank == 0 else 0)
        build(DIM, EXPERTS, **options, seed=rank, device="meta")
        torch.manual_seed(rank)
        layer = build(DIM, EXPERTS, **options)
        keys = [torch.empty_like(layer.keys) for _ in range(ranks)]
        dist.all_gather(keys, layer.keys.detach())
        assert torch.equal(*keys)
        with torch.device("meta"):
            layer = build(DIM, EXPERTS, 2, 3, 4, seed=5 + rank)
        fully_shard(layer, mesh=init_device_mesh("cpu", (ranks,)))
        layer.to_empty(device="cpu")
        with pytest.raises(ValueError, match="5 on rank 0, 6 on rank 1"):
            layer.reset_parameters()


def test_ranks_are_told_of_different_seeds():
    run_ranks(seeds_case, 2)


def meshes_case(rank, ranks):
    world = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "columns"))
    x = torch.stack(batch(0)[rank::ranks])
    outputs = []
    for group in (
        world, ExpertGroups.of(world), world["rows"], init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (1, 4)),
        init_device_mesh("cpu", (4, 1)), dist.group.WORLD,
        init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=("copies", "rows", "columns"))["rows", "columns"],
        init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("copies", "rows", "columns"))["rows", "columns"],
    ):  # fmt: skip
        model = Model(group)
        value = model.state_dict()["peer.down"]
        if isinstance(group, dist.DeviceMesh):
            assert value.device_mesh is group
            assert model.peer.layout.groups is model.memory.layout.groups
            assert (model.peer.layout.row_shards, model.peer.layout.column_shards) == (*group.shape, 1)[:2]
        assert torch.equal(value.full_tensor(), Model(None).peer.down)
        outputs.append(model(x))
    for output in outputs:
        torch.testing.assert_close(output, Model(None)(x), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"one dimension .* or two .*, not 3"):
        Model(init_device_mesh("cpu", (1, 2, 2)))
    with pytest.raises(ValueError, match=r"a mesh whose ranks ascend, row by row: it has \[\[0, 2\], \[1, 3\]\]"):
        Model(dist.DeviceMesh("cpu", [[0, 2], [1, 3]]))
    outside = dist.DeviceMesh("cpu", [0, 1])
    pair = dist.new_group([0, 1])
    if rank > 1:
        with pytest.raises(ValueError, match=rf"a mesh with this rank, {rank}, in it: it has \[0, 1\]"):
            Model(outside)
        with pytest.raises(TypeError, match="a process group with this rank in it"):
            Model(pair)
    with pytest.raises(TypeError, match="not list"):
        Model([0, 1])


def test_groups_are_meshes_too():
    run_ranks(meshes_case, 4)


def optimizers_case(rank, ranks):
    for make, names in (
        (lambda tables: torch.optim.SGD(tables, 0.1, momentum=0.9), {"momentum_buffer"}),
        (lambda tables: torch.optim.Adagrad(tables, 0.1), {"sum"}),
        (lambda tables: torch.optim.RMSprop(tables, 0.1, momentum=0.1), {"square_avg", "momentum_buffer"}),
        (lambda tables: torch.optim.SparseAdam(tables, 0.1), {"exp_avg", "exp_avg_sq"}),
    ):
        model = Model(dist.group.WORLD, sparse_grad=make([torch.zeros(1)]).__class__ is torch.optim.SparseAdam)
        tables = peer_dist.exempt_tables(model)
        optimizer = make(tables)
        gradients(model, ranks, rank)
        optimizer.step()
        for state in optimizer.state_dict()["state"].values():
            found = {name for name, value in state.items() if isinstance(value, DTensor)}
            assert found == names
            assert all(state[name].shape == (EXPERTS, DIM) for name in names)

    class Nested(torch.optim.Optimizer):
        """Somebody's own, which keeps its states in dictionaries and lists."""

        def step(self):
            for table in self.param_groups[0]["params"]:
                self.state[table].setdefault("of", {"mean": torch.ones_like(table), "past": [torch.zeros_like(table)]})

    optimizer = Nested(tables, {})
    optimizer.step()
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        assert all(isinstance(value, DTensor) for value in (state["of"]["mean"], *state["of"]["past"]))
    optimizer.load_state_dict(saved)
    assert type(optimizer.state[tables[0]]["of"]["past"][0]) is torch.Tensor

    model = Model(dist.group.WORLD)
    rows = model.peer.layout.rows
    optimizer = torch.optim.Adafactor([model.peer.down])
    gradients(model, ranks, rank)
    optimizer.step()
    with pytest.raises(ValueError, match=r"the optimizer's 'col_var' has the shape \[1, 10\] on this rank"):
        optimizer.state_dict()
    state = optimizer.state[model.peer.down]
    del state["col_var"]
    state["row"] = torch.arange(rows.start, rows.stop)
    saved = optimizer.state_dict()
    assert torch.equal(saved["state"][0]["row"].full_tensor(), torch.arange(EXPERTS))
    assert saved["state"][0]["row_var"].shape == (EXPERTS, 1)
    optimizer.load_state_dict(saved)
    assert torch.equal(optimizer.state[model.peer.down]["row"], state["row"])


def test_states_of_other_optimizers():
    run_ranks(optimizers_case, 2)


def test_the_split_is_that_of_dtensor():
    for size in range(1, 40):
        for shards in range(1, 12):
            rows = [len(chunk) for chunk in torch.arange(size).chunk(shards)]
            rows += [0] * (shards - len(rows))
            edges = [first_of(size, shard, shards) for shard in range(shards + 1)]
            assert [end - begin for begin, end in pairwise(edges)] == rows
            assert first_of(size, torch.arange(shards + 1), shards).tolist() == edges
    assert GridLayout(9, 4).shape == (9, 4)
