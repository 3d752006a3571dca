"""Picks by expert against Python's own stable sort, and how long what is known of picks lives."""

import gc
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from peer_dist.kernels import Picks, custom_ops, expert_mix, picks, value_table_grad
from peer_dist.kernels.picks import ByExpert
from tests.gpu.device import DEVICE

ROWS = 9


def picks_of(counts, expert):
    offsets = F.pad(torch.tensor(counts, dtype=torch.int64).cumsum(0), (1, 0))
    return Picks(offsets.to(DEVICE), torch.as_tensor(expert, dtype=torch.int64).to(DEVICE))


def check(made):
    """Everything that is worked out of picks, as Python works it out."""
    ends = made.offsets.tolist()
    token = [t for t in range(made.tokens) for _ in range(ends[t], ends[t + 1])]
    expert = made.expert.tolist()
    order = sorted(range(len(expert)), key=expert.__getitem__)  # stable
    assert made.token.tolist() == token
    assert made.by_expert.pick.tolist() == order
    assert made.by_expert.expert.tolist() == [expert[pick] for pick in order]
    assert made.by_expert.token.tolist() == [token[pick] for pick in order]
    touched = sorted(set(expert))
    assert made.segments[0].tolist() == touched
    assert made.segments[1].tolist() == [sum(e < row for e in expert) for row in touched] + [len(expert)]
    numbers = made.token, *vars(made.by_expert).values(), made.segments[1]
    assert {number.dtype for number in numbers} == {torch.int32}
    assert made.segments[0].dtype == torch.int64


@pytest.mark.gpu
@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.sampled_from([0, 1, 2, 17, 70]), max_size=6), most=st.integers(0, 40), data=st.data())
def test_as_a_stable_sort_in_python(counts, most, data):
    seed = data.draw(st.integers(0, 2**20))
    expert = torch.randint(most + 1, (sum(counts),), generator=torch.Generator().manual_seed(seed))
    check(picks_of(counts, expert))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "expert",
    [
        [],
        [3],
        [4] * 70,  # all of one expert
        list(range(70)),
        list(range(70))[::-1],
        [5] * 40 + [2, 5] * 10 + [0] * 10,  # popular ones
        [2**20 - 1, 0, 2**19, 2**20 - 1, 256, 255] * 5,  # digits of 8 bits, all of which matter
    ],
    ids=len,
)
def test_orders_of_all_kinds(expert):
    some = len(expert) // 3
    made = picks_of([some, 0, len(expert) - some], expert)
    if max(expert, default=0) < 1000:
        check(made)
    else:
        assert made.by_expert.expert.tolist() == sorted(expert)
        assert made.by_expert.pick.tolist() == sorted(range(len(expert)), key=expert.__getitem__)


@pytest.mark.gpu
@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(0, 6), rows=st.integers(0, 20), seed=st.integers(0, 2**20))
def test_rows_of_one_token_each(tokens, rows, seed):
    rows = rows if tokens else 0
    token = torch.randint(max(1, tokens), (rows,), generator=torch.Generator().manual_seed(seed))
    made = Picks.of_rows(token.to(DEVICE), tokens)
    ends = made.offsets.tolist()
    assert [made.expert[a:b].tolist() for a, b in itertools.pairwise(ends)] == [
        [row for row in range(rows) if token[row] == t] for t in range(tokens)
    ]


@pytest.fixture
def sorts(monkeypatch):
    """The numbers of the picks of every sort."""
    made, of = [], ByExpert.of
    monkeypatch.setattr(ByExpert, "of", lambda picks: made.append(len(picks.expert)) or of(picks))
    return made


@pytest.fixture
def in_operators(monkeypatch):
    """Picks are sorted as by operators that Python code calls."""
    monkeypatch.setattr(custom_ops.caller, "python", True)


def leaves(tokens=4):
    shapes = (tokens, 6), (2 * tokens,), (ROWS, 6), (ROWS, 6)
    return [torch.randn(shape, dtype=torch.float64, device="cpu", requires_grad=True) for shape in shapes]


def mixed(x, gate, down, up, numbers):
    """Of picks that nobody but autograd keeps."""
    return expert_mix(x, Picks.even(numbers.view(-1, 2)), gate, down, up, "gelu").sum()


@pytest.mark.parametrize("way", ["eager", "compiled", "recomputed"])
def test_a_pass_sorts_once(way, sorts):
    """For both tables, in MKL's backend."""
    call = torch.compile(mixed, backend="aot_eager", fullgraph=True) if way == "compiled" else mixed
    numbers, values = torch.randint(ROWS, (8,)), leaves()
    y = checkpoint(call, *values, numbers, use_reentrant=False) if way == "recomputed" else call(*values, numbers)
    y.backward()
    assert sorts == [8]


@pytest.mark.parametrize("way", ["eager", "recomputed"])
def test_an_order_made_in_the_forward_pass_is_found_in_the_backward_pass(way, sorts, in_operators):
    made = []

    def ordered(x, gate, down, up, numbers):
        expert = numbers.clone()
        made.append(Picks.even(expert.view(-1, 2)))
        assert made[-1].by_expert.pick.numel() == 8
        return expert_mix(x, made.pop(), gate, down, up, "gelu").sum()

    gc.disable()  # counts of references alone let go of it
    try:
        numbers, values, before = torch.randint(ROWS, (8,)), leaves(), len(picks._known)
        if way == "eager":
            y = ordered(*values, numbers)
            assert len(picks._known) == before + 1
        else:
            y = checkpoint(ordered, *values, numbers, use_reentrant=False)
            assert len(picks._known) == before
        y.backward()
        assert len(picks._known) == before
    finally:
        gc.enable()
    assert sorts == [8] * (1 if way == "eager" else 2)  # in each forward pass


def test_what_is_known_is_of_these_very_picks(sorts, in_operators):
    made = picks_of([2, 2], [3, 1, 2, 1])
    assert made.by_expert is made.by_expert
    assert Picks(made.offsets, made.expert).by_expert is made.by_expert
    assert len(sorts) == 1
    other = Picks(torch.tensor([0, 3, 4], device=DEVICE), made.expert)  # the same rows, of other tokens
    check(other)
    check(made)
    made.expert[0] = 0  # in place
    check(Picks(made.offsets, made.expert))
    with torch.inference_mode():  # changes are not counted
        made = picks_of([1, 2], [3, 1, 2])
        check(made)
        made.expert[0] = 0
        check(Picks(made.offsets, made.expert))


def twice(weight, x, first, second, offsets, values):
    """The second call's picks are written after the first one's are of no more use."""
    one = value_table_grad(weight, x, Picks(offsets, (first * 3 + 1) % ROWS), values)
    expert = (second * 5 + 2 + one.sum().isnan().long()) % ROWS
    return one, value_table_grad(weight, x, Picks(offsets, expert), values)


def test_a_compiled_graph_may_write_picks_into_the_memory_of_others():
    """As inductor does: past the tensor's count of versions."""
    x, weight, values, _ = leaves()
    made = picks_of([2] * 4, [3, 1, 2, 1, 8, 0, 0, 5])
    for rows in (made.expert.clone(), made.expert.flip(0)):
        made.expert.numpy()[:] = rows
        with torch.no_grad():
            (grad,) = torch.ops.peer_dist.table_grads([weight], [x], made.offsets, made.expert, ROWS, x.dtype)
            wanted = value_table_grad(weight, x, Picks(made.offsets, rows.clone()), values.new_empty(ROWS, 6))
        assert grad.equal(wanted)


@pytest.mark.slow
def test_a_graph_that_inductor_compiled_has_the_gradients_of_its_picks():
    x, weight, _, values = (leaf.detach() for leaf in leaves())
    offsets, first, second = torch.arange(5) * 2, *torch.randint(ROWS, (2, 8))
    given = weight, x, first, second, offsets, values
    for got, want in zip(torch.compile(twice, fullgraph=True)(*given), twice(*given)):
        torch.testing.assert_close(got, want)


def test_more_than_can_be_numbered():
    many = torch.empty(2**31, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match=r"2147483648 picks in one call are more than 2\*\*31 - 1; take the tokens"):
        _ = Picks(torch.zeros(2, dtype=torch.int64, device="meta"), many).by_expert
