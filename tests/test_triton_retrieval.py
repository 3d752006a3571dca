"""Retrieval in Triton against whole sorted rows and float64, and its compilation for GPUs that are not here. It runs on
a GPU where there is one, and everywhere through Triton's interpreter.
"""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import peer_dist.kernels as package
from peer_dist.kernels import reference
from peer_dist.layers.product_keys import retrieve
from tests.definitions import top_pairs

triton = pytest.importorskip("triton")

from peer_dist.kernels import triton as kernels  # noqa: E402
from peer_dist.kernels.triton import retrieval  # noqa: E402
from tests.gpu_kernels import (  # noqa: E402
    DEVICE,
    INTERPRETED,
    SHARED_LIMIT,
    compiled,
    compiles,
    launches,
    needs_assembler,
    resources,
    run_interpreted,
    runs_kernels,
)

DTYPES = {torch.float32: 1e-6, torch.bfloat16: 2**-15, torch.float16: 1e-6}  # bounds of the sub-keys' gradient


def drawn(tokens, heads, n, half, shared, dtype, generator):
    """A query and keys."""
    shapes = (tokens, heads, 2 * half), (2, n, half) if shared else (heads, 2, n, half)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype) for shape in shapes]


def searched(query, keys, top_k, chunk=1 << 20):
    """Numbers and scores ``[tokens, heads, top_k]``, of memory that is full of nonsense before."""
    shape = *query.shape[:2], top_k
    numbers = torch.full(shape, -7, dtype=torch.int64, device=DEVICE)
    scores = torch.full(shape, math.nan, dtype=torch.float32, device=DEVICE)
    kernels.search(query.split(chunk), keys, numbers, scores)
    return numbers, scores


def halves_of(query, keys):
    """The scores of both halves, ``[2, tokens * heads, n]``, in float64 and back."""
    tokens, heads, key_dim = query.shape
    per_head = keys.expand(heads, *keys.shape[-3:]).double()
    scores = torch.einsum("thxd,hxnd->xthn", query.double().view(tokens, heads, 2, key_dim // 2), per_head)
    return scores.float().flatten(1, 2).cpu()


def gradients(dscores, numbers, query, keys):
    """Of the query and of the keys, which are added to ones."""
    dkeys = torch.ones(keys.shape, device=DEVICE)
    return kernels.search_backward(dscores, numbers, query, keys, dkeys, torch.float32), dkeys - 1


def check_gradients(query, keys, numbers, generator):
    """Against sums in float64, relative to the size of the whole."""
    dscores = torch.randn(numbers.shape, generator=generator).to(DEVICE)
    exact = dscores.double(), numbers, query.double(), keys.double(), torch.zeros_like(keys, dtype=torch.float64)
    dquery = reference.search_backward(reference.mix, reference.table_grad, *exact, torch.float64)
    got = gradients(dscores, numbers, query, keys)
    for one, other, bound in zip(got, (dquery, exact[-1]), (1e-6, DTYPES[query.dtype])):
        assert not one.isnan().any()
        assert (one - other).norm() <= bound * other.norm() + 1e-6


@runs_kernels
@settings(max_examples=6 if INTERPRETED else 30, deadline=None)
@given(
    tokens=st.sampled_from([1, 3, 70]), heads=st.integers(1, 2), n=st.sampled_from([1, 2, 17, 33, 64, 100]),
    half=st.sampled_from([1, 5, 16, 70]), shared=st.booleans(), dtype=st.sampled_from(list(DTYPES)),
    seed=st.integers(0, 2**20), data=st.data(),
)  # fmt: skip
def test_whole_numbers_are_searched_to_the_last_tie(tokens, heads, n, half, shared, dtype, seed, data):
    """Products and sums of small whole numbers are exact and tie often: numbers and scores are those of sorted rows."""
    top_k = data.draw(st.sampled_from([k for k in (1, 2, 3, 8, 16, 17, 33, 64) if k < n] + [n][: n <= 64]))
    generator = torch.Generator().manual_seed(seed)
    query, keys = (x.round() for x in drawn(tokens, heads, n, half, shared, dtype, generator))
    numbers, scores = searched(query, keys, top_k, chunk=data.draw(st.sampled_from([2, 1 << 20])))
    want = top_pairs(*halves_of(query, keys), top_k)
    assert numbers.cpu().flatten(0, 1).equal(want[0])
    assert scores.cpu().flatten(0, 1).equal(want[1])
    check_gradients(query, keys, numbers, generator)


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_are_float32_sums(dtype):
    """Whatever the dtype of queries and keys, scores are off by the rounding of float32 sums alone."""
    generator = torch.Generator().manual_seed(1)
    query, keys = drawn(20, 2, 300 if DEVICE == "cuda" else 70, 130, False, dtype, generator)
    numbers, scores = searched(query, keys, 12)
    halves = halves_of(query, keys)
    torch.testing.assert_close(scores.cpu().flatten(0, 1), top_pairs(*halves, 12)[1], rtol=1e-6, atol=1e-5)
    number, n = numbers.cpu().flatten(0, 1), keys.shape[-2]
    first, second = (half.gather(1, at) for half, at in zip(halves, (number // n, number % n)))
    torch.testing.assert_close(first + second, scores.cpu().flatten(0, 1), rtol=1e-6, atol=1e-5)
    check_gradients(query, keys, numbers, generator)


@runs_kernels
@pytest.mark.parametrize("kind", ["nan", "all nan", "infinite", "zeros"])
def test_scores_that_are_no_numbers(kind):
    """One column, so that scores are what is wanted of them: NaN, infinities, zeros of either sign."""
    generator = torch.Generator().manual_seed(2)
    query, keys = drawn(9, 2, 50, 1, False, torch.float32, generator)
    query = query.sign()
    spots = torch.rand(keys.shape, generator=generator).to(DEVICE) < 0.3
    if kind == "all nan":
        keys[:, 1] = math.nan
    elif kind == "zeros":
        keys = torch.where(spots, 0.0, -0.0)
    else:
        keys[spots] = math.nan if kind == "nan" else -math.inf
    numbers, scores = searched(query, keys, 16)
    halves = (query.view(9, 2, 2, 1).permute(2, 0, 1, 3) * keys[None, ..., 0].permute(2, 0, 1, 3)).flatten(1, 2).cpu()
    want = top_pairs(*halves, 16)
    torch.testing.assert_close(scores.cpu().flatten(0, 1), want[1], rtol=0, atol=0, equal_nan=True)
    assert numbers.cpu().flatten(0, 1).equal(want[0])


@runs_kernels
def test_two_runs_give_the_same_bits(monkeypatch):
    monkeypatch.setattr(retrieval, "KEY_GRAD_TOKENS", 16)  # sums in parts
    generator = torch.Generator().manual_seed(3)
    query, keys = drawn(70, 1, 40, 20, True, torch.bfloat16, generator)
    first, again = (searched(query, keys, 8) for _ in range(2))
    assert all(a.equal(b) for a, b in zip(first, again))
    numbers, scores = first
    first, again = (gradients(scores, numbers, query, keys) for _ in range(2))
    assert all(a.equal(b) for a, b in zip(first, again))
    check_gradients(query, keys, numbers, generator)


@runs_kernels
@pytest.mark.parametrize(("dtype", "top_k"), [(torch.float64, 3), (torch.float32, 65)], ids=str)
def test_what_kernels_do_not_serve_is_searched_all_the_same(dtype, top_k):
    generator = torch.Generator().manual_seed(4)
    query, keys = drawn(5, 2, 70, 3, True, dtype, generator)
    numbers, scores = (torch.empty(5, 2, top_k, dtype=kind, device=DEVICE) for kind in (torch.int64, dtype))
    kernels.search([query], keys, numbers, scores)
    want = top_pairs(*halves_of(query, keys), top_k)[1]
    torch.testing.assert_close(scores.cpu().flatten(0, 1).float(), want, rtol=1e-5, atol=1e-5)
    dkeys = torch.zeros_like(keys)
    dquery = kernels.search_backward(scores, numbers, query, keys, dkeys, dtype)
    first = keys[0][numbers // 70] * scores[..., None]
    torch.testing.assert_close(dquery[..., :3], first.sum(2), rtol=1e-4, atol=1e-4)
    every = (scores.sum(-1, keepdim=True) * query[..., :3]).sum((0, 1))
    torch.testing.assert_close(dkeys[0].sum(0), every, rtol=1e-4, atol=1e-3)


@runs_kernels
@pytest.mark.parametrize("norm", ["none", "rms", "layer"])
@pytest.mark.parametrize("tokens", [0, 21])
def test_behind_retrieve(norm, tokens, monkeypatch):
    """Every gradient of the operator, in float64 and by the kernels, where the picks are the same."""
    generator = torch.Generator().manual_seed(5)
    query, keys = drawn(tokens, 2, 20, 4, True, torch.float32, generator)
    affine = [torch.randn(16, generator=generator).to(DEVICE) for _ in range(0 if norm == "none" else 2)]
    dscores = torch.randn(tokens, 2, 3, generator=generator).to(DEVICE)
    results = []
    for dtype, ops in ((torch.float64, package._REFERENCE), (torch.float32, kernels)):
        monkeypatch.setattr(package, "backend", lambda *tensors, ops=ops: ops)
        leaves = [x.to(dtype).requires_grad_() for x in (query, keys, *affine)]
        indices, scores = retrieve(*leaves[:2], 3, norm, *leaves[2:], eps=1e-5)
        results.append([indices, scores, *torch.autograd.grad(scores, leaves, dscores.to(dtype))])
    for want, got in zip(*results):
        torch.testing.assert_close(got.to(want.dtype), want, rtol=2e-5, atol=2e-5)


@compiles
@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cuda", reason="the kernels run on the GPU")
def test_through_the_interpreter():
    run_interpreted(__file__, "not slow")


# ---------------------------------------------------------------------------------------------------------------------
# Ahead-of-time compilation: what the launcher would run, recorded and compiled for a GPU that need not be here.


def check_compilation(dtype, top_k, half, capability, monkeypatch, folder):
    """Registers, bytes spilled and bytes of shared memory of each kernel, at 1024 sub-keys a half."""
    needs_assembler(capability)
    query, keys = torch.empty(70, 2, 2 * half, dtype=dtype), torch.empty(2, 1024, half, dtype=dtype)
    numbers, scores = torch.empty(70, 2, top_k, dtype=torch.int64), torch.empty(70, 2, top_k)

    def call():
        kernels.search([query], keys, numbers, scores)
        kernels.search_backward(scores, numbers, query, keys, torch.zeros(keys.shape), dtype)

    used = {}
    for launch in launches(call, monkeypatch):
        kernel, _, num_warps, constants = launch
        binary = compiled(launch, capability)
        registers, stack = resources(binary, folder)
        name = f"{kernel.__name__} {constants}"
        assert stack == 0, f"{name} spills: {stack} bytes of stack"
        assert binary.metadata.shared <= SHARED_LIMIT[capability] // 2, name
        assert registers * num_warps * 32 <= 65536, f"{name}: no program fits a multiprocessor"
        used[kernel.__name__] = registers, stack, binary.metadata.shared
    assert used.keys() == {name for name in vars(retrieval) if name.endswith("_kernel")}
    return used


@compiles
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiles_without_spills(capability, monkeypatch, tmp_path):
    check_compilation(torch.bfloat16, 16, 64, capability, monkeypatch, tmp_path)


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("half", [64, 128, 256, 512])
@pytest.mark.parametrize("top_k", [8, 16, 32, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_compiles_at_any_size(dtype, top_k, half, capability, monkeypatch, tmp_path):
    check_compilation(dtype, top_k, half, capability, monkeypatch, tmp_path)


@compiles
@pytest.mark.slow
def test_table_of_resources(monkeypatch, tmp_path):
    """The one in docs/performance.md, of queries of twice 128 columns in bfloat16."""
    page = (Path(__file__).parent.parent / "docs" / "performance.md").read_text()
    version = re.search(r"compiled by Triton (\S+):", page)[1]
    if version != triton.__version__:
        pytest.skip(f"the table is of Triton {version}")
    cases = list(itertools.product([8, 16, 32, 64], [80, 90, 100]))
    columns = [check_compilation(torch.bfloat16, k, 128, where, monkeypatch, tmp_path) for k, where in cases]
    lines = [["kernel", *(f"k = {k}, sm_{capability}" for k, capability in cases)], ["---"] * (1 + len(cases))]
    for kernel in sorted(columns[0]):
        lines.append([f"`{kernel}`", *("{} / {} / {}".format(*column[kernel]) for column in columns)])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    assert table in page, f"docs/performance.md needs this table:\n{table}"
