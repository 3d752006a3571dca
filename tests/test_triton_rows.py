"""Rows copied between a GPU and the host's memory, in Triton, against indexing, and the compilation of the kernel.
Where there is no GPU it is interpreted, and all memory is the host's.
"""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

triton = pytest.importorskip("triton")

from peer_dist.kernels.triton import rows as kernels  # noqa: E402
from tests.gpu_kernels import (  # noqa: E402
    DEVICE,
    compiled,
    compiles,
    launches,
    needs_assembler,
    resources,
    run_interpreted,
    runs_kernels,
)

DTYPES = [torch.float32, torch.bfloat16, torch.int8, torch.uint8, torch.int64, torch.float64, torch.bool]


def pinned(tensor):
    """In the host's memory, where a GPU reads it if there is one."""
    return tensor.pin_memory() if DEVICE == "cuda" else tensor


def drawn(shape, dtype, generator):
    """Any bits of the dtype."""
    size = torch.empty(0, dtype=dtype).element_size()
    if dtype == torch.bool:
        return torch.randint(2, shape, generator=generator).bool()
    return torch.randint(256, (*shape, size), generator=generator).to(torch.uint8).view(dtype)[..., 0].contiguous()


def bits(tensor):
    """Whatever NaN there are."""
    return tensor.cpu().contiguous().view(torch.uint8) if tensor.dim() else tensor


CASES = {
    "dtype": st.sampled_from(DTYPES),
    "shape": st.sampled_from([(), (1,), (3,), (16,), (17,), (64,), (100,), (5, 4), (1025,), (0,)]),
    "count": st.integers(1, 30),
    "seed": st.integers(0, 2**20),
    "slotted": st.booleans(),
    "begin": st.sampled_from([0, 1, 3]),  # rows of a larger tensor, which begin anywhere
}


def chosen(count, seed, slotted, begin, shape, dtype):
    """Far rows, some of their numbers, and near rows with the slots of these."""
    generator = torch.Generator().manual_seed(seed)
    far = pinned(drawn((count + begin, *shape), dtype, generator))[begin:]
    touched = torch.randperm(count, generator=generator)[: seed % (count + 1)]
    slots = torch.randperm(len(touched) + 5, generator=generator)[: len(touched)] if slotted else None
    near = drawn((len(touched) + 5 * slotted, *shape), dtype, generator)
    return far, touched, near, slots


def there(value):
    return None if value is None else value.to(DEVICE)


@runs_kernels
@settings(max_examples=60, deadline=None)
@given(**CASES)
def test_gathered_rows(dtype, shape, count, seed, slotted, begin):
    far, touched, near, slots = chosen(count, seed, slotted, begin, shape, dtype)
    want = near.clone()
    want[torch.arange(len(touched)) if slots is None else slots] = far[touched]
    before, got = far.clone(), near.to(DEVICE, copy=True)
    kernels.gather_rows(far, there(touched), got, there(slots))
    assert bits(got).equal(bits(want))
    assert bits(far).equal(bits(before))


@runs_kernels
@settings(max_examples=60, deadline=None)
@given(**CASES)
def test_scattered_rows(dtype, shape, count, seed, slotted, begin):
    far, touched, near, slots = chosen(count, seed, slotted, begin, shape, dtype)
    want = far.clone()
    want[touched] = near if slots is None else near[slots]
    values = near.to(DEVICE, copy=True)
    kernels.scatter_rows(far, there(touched), values, there(slots))
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    assert bits(far).equal(bits(want))
    assert bits(values).equal(bits(near))


@runs_kernels
def test_rows_wider_than_a_program_and_rows_that_come_again(monkeypatch):
    monkeypatch.setattr(kernels, "MAX_BLOCK_W", 16)
    far = pinned(torch.randn(9, 50))
    touched = torch.tensor([8, 0, 8, 3], device=DEVICE)
    out = torch.empty(4, 50, device=DEVICE)
    kernels.gather_rows(far, touched, out)
    assert out.cpu().equal(far[touched.cpu()])


@runs_kernels
def test_a_table_that_autograd_has_saved_is_seen_to_change():
    x, near = torch.randn(3, 4, device=DEVICE, requires_grad=True), torch.randn(3, 4, device=DEVICE)
    y = (x * near).sum()
    kernels.gather_rows(pinned(torch.randn(3, 4)), torch.arange(3, device=DEVICE), near)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@runs_kernels
def test_mistakes_are_named():
    far, rows = pinned(torch.zeros(4, 6)), torch.tensor([0, 3], device=DEVICE)
    with pytest.raises(ValueError, match="one dtype whose rows are alike"):
        kernels.gather_rows(far, rows, torch.zeros(2, 6, dtype=torch.bfloat16, device=DEVICE))
    with pytest.raises(ValueError, match="one dtype whose rows are alike"):
        kernels.scatter_rows(far, rows, torch.zeros(2, 5, device=DEVICE))
    with pytest.raises(ValueError, match="2 numbers of rows need as many rows, not 3"):
        kernels.gather_rows(far, rows, torch.zeros(3, 6, device=DEVICE))
    with pytest.raises(ValueError, match="as many slots, not 1"):
        kernels.gather_rows(far, rows, torch.zeros(3, 6, device=DEVICE), rows[:1])
    with pytest.raises(ValueError, match="one after the other"):
        kernels.gather_rows(far[:, :3], rows, torch.zeros(2, 3, device=DEVICE))
    if DEVICE == "cuda":
        with pytest.raises(ValueError, match="pin_memory"):
            kernels.gather_rows(torch.zeros(4, 6), rows, torch.zeros(2, 6, device=DEVICE))


@runs_kernels
def test_offsets_beyond_two_to_the_31():
    """Memory that is hardly touched, of 2 GB."""
    if DEVICE == "cuda":
        pytest.skip("it would be pinned")
    far = torch.empty(2**21 + 2, 1024, dtype=torch.uint8)
    touched = torch.tensor([len(far) - 1, 1])
    far[touched] = torch.randint(256, (2, 1024)).to(torch.uint8)
    out = torch.empty(2, 1024, dtype=torch.uint8)
    kernels.gather_rows(far, touched, out)
    assert out.equal(far[touched])


@compiles
@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cuda", reason="the kernels run on the GPU")
def test_through_the_interpreter():
    run_interpreted(__file__, "not slow")


# ---------------------------------------------------------------------------------------------------------------------


ROWS = {
    "bfloat16": ((1024,), torch.bfloat16, 4),
    "int8": ((1024,), torch.int8, 4),
    "float32": ((4096 * 2,), torch.float32, 4),
    "a few columns": ((16,), torch.uint8, 4),
    "no multiple of 16 bytes": ((51,), torch.bfloat16, 1),
    "a number": ((), torch.float32, 1),
}


@compiles
@pytest.mark.parametrize(("row", "capability"), itertools.product(ROWS, [80, 90, 100]))
def test_each_row_passes_once_in_words_of_16_bytes(row, capability, monkeypatch, tmp_path):
    needs_assembler(capability)
    shape, dtype, words = ROWS[row]
    far, near, rows = torch.zeros(8, *shape, dtype=dtype), torch.zeros(8, *shape, dtype=dtype), torch.arange(8)

    def call():
        kernels.gather_rows(far, rows, near)
        kernels.gather_rows(far, rows, near, rows)
        kernels.scatter_rows(far, rows, near)
        kernels.scatter_rows(far, rows, near, rows)

    found = launches(call, monkeypatch)
    assert len(found) == 4
    for launch in found:
        binary = compiled(launch, capability)
        registers, stack = resources(binary, tmp_path)
        assert stack == 0
        assert registers <= 64
        assert binary.metadata.shared <= 16384
        ptx = binary.asm["ptx"]
        wide = set(re.findall(r"(ld|st)\.global\S*\.v4\.b32", ptx))
        narrow = set(re.findall(r"(ld|st)\.global(?:(?!\.v4)\S)*\.b(?:8|16|32) ", ptx))
        if words == 4:
            assert wide == {"ld", "st"}
            assert not narrow
        else:
            assert ("st" if launch[3]["BACK"] else "ld") in narrow
        assert set(re.findall(r"arith\.(?:muli|shli) .*: tensor<\d+x1xi(\d+)>", binary.asm["ttir"])) <= {"64"}


@compiles
def test_parts_do_not_compile_it_anew(monkeypatch):
    """Whatever the rows touched, and where the tensors of their numbers begin."""
    variants, far, near = set(), torch.zeros(64, 32), torch.zeros(64, 32)

    def record(kernel, grid, *args, num_warps, **constants):
        kinds = [
            (
                value.dtype,
                parameter.do_not_specialize or parameter.do_not_specialize_on_alignment or value.data_ptr() % 16,
            )
            if isinstance(value, torch.Tensor)
            else parameter.do_not_specialize or value
            for parameter, value in zip(kernel.params, args)
        ]
        variants.add((str(kinds), num_warps, str(constants)))

    monkeypatch.setattr(kernels.launching, "launch", record)
    for begin, count in ((0, 16), (1, 17), (3, 1)):
        numbers = torch.arange(64)[begin : begin + count]
        kernels.gather_rows(far, numbers, near, numbers)
    assert len(variants) == 1
