"""What benchmarks/counts.py counts, against counts by hand; and benchmarks/gpu.py, small, on the CPU."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import counting  # noqa: E402
import counts  # noqa: E402
import gpu  # noqa: E402
import page  # noqa: E402
from counting import META, Count, Counter, total  # noqa: E402

from peer_dist.tracing import position, span  # noqa: E402


@pytest.fixture(autouse=True)
def outside_of_spans(monkeypatch):
    """An error in another test leaves the span in which it was."""
    monkeypatch.setattr(position, "span", "")


SMALL = counts.Sizes(tokens=64, dim=32, experts=32**2, heads=2, top_k=4, key_dim=16)


def counted(call, *shapes, dtype=torch.float32, touched=lambda picks: picks):
    tensors = [torch.empty(shape, dtype=dtype, device=META) for shape in shapes]
    with Counter(touched) as counter:
        call(*tensors)
    return total(counter.parts.values())


@pytest.mark.parametrize(
    ("call", "shapes", "expected"),
    [
        (lambda x, y: x + y, [(10, 7), (10, 7)], Count(1, 3 * 280)),
        (lambda x, y: x + y, [(10, 7), (7,)], Count(1, 2 * 280 + 28)),
        (lambda x: x + x, [(10, 7)], Count(1, 2 * 280)),
        (lambda x: x.add_(1), [(10, 7)], Count(1, 2 * 280)),
        (lambda x: x.zero_(), [(10, 7)], Count(1, 280)),
        (lambda x, y: x.copy_(y), [(10, 7), (10, 7)], Count(1, 2 * 280)),
        (lambda x, y: torch.mul(x, 2, out=y), [(10, 7), (10, 7)], Count(1, 2 * 280)),
        (lambda x: x.view(70).t()[3:], [(10, 7)], Count()),
        (lambda x: x[:, None].expand(10, 5, 7).sum(), [(10, 7)], Count(1, 280 + 4)),
        (lambda x: torch.empty_like(x), [(10, 7)], Count()),
        (lambda x: x.new_zeros(10), [(10, 7)], Count(1, 40)),
        (lambda x, y: x @ y, [(10, 7), (7, 3)], Count(1, 280 + 84 + 120, 2 * 10 * 7 * 3)),
        (lambda x: x.topk(2), [(10, 7)], Count(2, 280 + 20 * (4 + 8))),
        (lambda x: x.sum().item(), [(10, 7)], Count(1, 280 + 4 + 4, waits=1)),
        (lambda x: x.cpu(), [(10, 7)], Count(0, 280, waits=1)),
        (lambda x: x.sum(0).tolist(), [(10, 7)], Count(1, 280 + 28 + 28, waits=1)),
        (lambda x: x.new_tensor([1.0, 2.0]), [(10, 7)], Count(waits=1)),
        (lambda x: torch.zeros(3, dtype=torch.float32, device="cpu").to(META), [(1,)], Count(0, 12, waits=1)),
        (
            lambda x: torch.zeros(3, dtype=torch.float32, device="cpu").to(META, non_blocking=True),
            [(1,)],
            Count(0, 12),
        ),
        (lambda x: x + 1, [(0, 7)], Count()),
    ],
)  # fmt: skip
def test_operators(call, shapes, expected):
    assert counted(call, *shapes) == expected


def test_rows_by_number():
    """Rows that are picked are read, not the table; those that are added to are read and written."""
    table, rows, values = ((1000, 8), torch.empty(5, dtype=torch.int64, device=META), (5, 8))
    assert counted(lambda table: table[rows], table) == Count(1, 2 * 160 + 40)
    assert counted(lambda table: table.index_select(0, rows), table) == Count(1, 2 * 160 + 40)
    assert counted(lambda table, x: table.index_copy_(0, rows, x), table, values) == Count(1, 2 * 160 + 40)
    assert counted(lambda table, x: table.index_add_(0, rows, x), table, values) == Count(1, 3 * 160 + 40)


def test_sorts():
    """64-bit keys take 8 passes over pairs of 16 bytes, 32-bit keys 4 over pairs of 12."""
    for dtype, passes, pair in ((torch.int64, 8, 16), (torch.int32, 4, 12)):
        moved = 10_000 * (8 + dtype.itemsize + 2 * passes * pair)
        assert counted(lambda x: x.sort(stable=True), (10_000,), dtype=dtype) == Count(3 + passes, moved)


def test_sizes_that_the_device_knows():
    found = []

    def unique(x):
        found.extend(torch.unique_consecutive(x, return_counts=True))

    count = counted(unique, (100,), dtype=torch.int64, touched=lambda picks: picks // 4)
    assert [len(each) for each in found] == [25, 25]
    assert count.waits == 1


def test_a_backward_pass_belongs_to_what_its_forward_pass_did():
    x = torch.empty(4, 8, device=META, requires_grad=True)
    with Counter() as counter:
        with span("retrieve"):
            y = x.exp()
        y.sin().sum().backward()
    assert {key: count.launches for key, count in counter.parts.items()} == {
        ("queries", "forward"): 1,
        (counting.OTHER, "forward"): 3,  # the sine, the sum, and the one that the backward pass begins with
        (counting.OTHER, "backward"): 2,  # a cosine and a product; that of the sum is a view
        ("queries", "backward"): 1,
    }


def test_a_layer_moves_what_its_docstring_says():
    """peer_dist/kernels/triton/experts.py: by pick, where a table is larger than L2."""
    large = counts.Sizes(tokens=512, dim=256, experts=512**2)
    parts = counts.layer_step(large, "rowwise_adam", False).parts
    picks, token_bytes = large.picks, 2 * 512 * 256 * 2
    forward = 2 * picks * 256 * 2 + token_bytes + picks * (8 + 4 + 4) + 513 * 8
    offsets = 3 * 513 * 8  # made in two steps, of which the first is read by the second
    assert parts["experts", "forward"].bytes == forward + offsets
    assert parts["experts", "forward"].flops == 4 * picks * 256
    # numbers of rows besides, if sums are made row by row
    assert parts["gradient norm", "forward"].bytes == pytest.approx(2 * 512**2 * 256 * 2, rel=0.03)


@pytest.mark.parametrize(("ranks", "lazy", "waits"), [(1, False, 0), (1, True, 1), (4, False, 1)])
def test_a_step_is_counted_to_its_end(ranks, lazy, waits):
    sizes = counts.Sizes(**{**vars(SMALL), "ranks": ranks})
    parts = counts.layer_step(sizes, "rowwise_adam", lazy).parts
    assert total(parts.values()).waits == waits
    rows = counts.rows_of(parts, counts.floors(sizes, "rowwise_adam", lazy))
    named = {row["part"] for row in rows}
    assert {"queries", "retrieval", "experts", "sort", "table gradients", "gradient norm", "update of tables"} <= named
    assert ({"dispatch", "combine"} <= named) == (ranks > 1)
    for key, floor in counts.floors(sizes, "rowwise_adam", lazy).items():
        if key[0] in ("experts", "table gradients", "gradient norm", "update of tables"):
            assert floor <= 1.02 * parts[key].bytes, key
    assert counts.markdown(rows).count("\n") == len(rows) + 1


def test_sums_in_the_step_move_no_gradients_and_wait_for_nothing():
    """The gradients are neither written nor read twice; what they are sums of is read once more."""
    sizes = counts.Sizes(**{**vars(SMALL), "dim": 1024})
    before, after = (counts.layer_step(sizes, "rowwise_adam", True, one_pass).parts for one_pass in (False, True))
    saved = sum(part.bytes for part in before.values()) - sum(part.bytes for part in after.values())
    gradients = 2 * sizes.hit(sizes.picks, sizes.rows) * sizes.dim * sizes.item
    operands = 2 * sizes.tokens * sizes.dim * sizes.item
    assert saved == pytest.approx(3 * gradients - operands, rel=0.05)
    assert total(after.values()).waits == 0
    for key, floor in counts.floors(sizes, "rowwise_adam", True, True).items():
        if key[0] in ("gradient norm", "update of tables"):
            assert floor <= 1.02 * after[key].bytes, key


def test_the_update_alone_is_that_of_the_step():
    alone = counts.table_update(SMALL, "rowwise_adam", False, False)
    assert alone == counts.layer_step(SMALL, "rowwise_adam", False).parts["update of tables", "forward"]


@pytest.mark.parametrize("kind", counts.KINDS)
def test_eight_bits_are_stepped_in_one_launch_a_table_and_read_by_the_kernels(kind):
    sizes = counts.Sizes(tokens=512, dim=256, experts=512**2)
    count = counts.eight_bit_update(sizes, kind)
    assert (count.launches, count.waits) == (2, 0)
    hit = sizes.hit(sizes.picks, sizes.rows)
    numbers = 2 * (8 * hit + (0 if kind == "adam" else 8 * hit))  # of rows, and their second moments
    floor = counts.update_floor(sizes, kind, True, True, eight_bit=True)
    assert floor + numbers == pytest.approx(count.bytes, rel=1e-6)
    for one, other in zip(counts.products(sizes, False), counts.products(sizes, True)):
        assert one.launches == other.launches == 1
        assert other.bytes < 0.55 * one.bytes


def test_a_backward_pass_is_on_the_device_too():
    """Its kernels are the GPU's, its waits are counted, and its spans say what it does."""

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x + x

        @staticmethod
        def backward(ctx, dy):
            assert dy.is_cuda
            with span("dispatch"):
                return dy + dy.new_tensor([2.0])

    x = torch.empty(4, dtype=torch.float32, device=META, requires_grad=True)
    with Counter() as counter:
        Doubled.apply(x).backward(torch.empty_like(x))
    assert counter.parts["dispatch", "backward"].launches == 1
    assert counter.parts["dispatch", "backward"].waits == 1
    assert not x.is_cuda


@pytest.fixture
def small_run(monkeypatch, tmp_path):
    """A run of benchmarks/gpu.py on the CPU, and the JSON that it wrote."""

    def run(*options):
        sizes = ["--device", "cpu", "--experts", "1024", "--tokens", "64", "--dim", "64", "--rounds", "1"]
        monkeypatch.setattr(sys, "argv", ["gpu.py", *sizes, "--json", str(tmp_path / "gpu.json"), *options])
        gpu.main()
        return json.loads((tmp_path / "gpu.json").read_text())

    monkeypatch.setattr(
        gpu, "large_copy", lambda device: (8192, partial(torch.ones, 2048, dtype=torch.float32, device=device))
    )
    return run


def test_every_part_runs_small(small_run, capsys):
    results = small_run()
    assert set(results["not_measured"]) <= {"PEER-pytorch", "rows over the bus"}, results["not_measured"]
    parts = [row["part"] for row in results["rows"]]
    assert len(parts) == len(set(parts))
    for part in ("experts, forward, 32 picks a row", "gradient norm, sparse", "retrieval, backward", "layer, forward"):
        assert part in parts
    assert sum("stochastic rounding" in part for part in parts) == 6
    assert all(row["ms"] > 0 and row["share"] == row["floor_ms"] / row["ms"] for row in results["rows"])
    assert {each["met"] for each in results["goals"]} <= {True, False}
    assert results["device"]
    assert results["command"].startswith("python gpu.py --device cpu")
    assert "no part begins after 270" in capsys.readouterr().out


def test_a_part_that_fails_is_a_sentence_and_others_go_on(small_run, monkeypatch):
    def broken(bench):
        raise RuntimeError("no kernel image\nis there")

    monkeypatch.setitem(gpu.PARTS, "retrieval", (broken, 1.0))
    results = small_run("--only", "retrieval", "combine")
    assert results["not_measured"] == {"retrieval": "RuntimeError: no kernel image"}
    assert [row["part"] for row in results["rows"]] == [
        "rows of 8 owners summed at home", "the same, added one owner after the other",
    ]  # fmt: skip


def test_no_part_begins_when_time_is_up(small_run):
    results = small_run("--limit", "0", "--only", "combine")
    assert results["not_measured"] == dict.fromkeys(("speeds", "combine"), "no time was left")
    assert not results["rows"]


def test_pages_show_what_was_counted_and_measured(monkeypatch, tmp_path, small_run):
    """If not:  python benchmarks/page.py"""
    for file, text in page.generated().items():
        assert file.read_text(encoding="utf-8") == text, f"{file}: run python benchmarks/page.py"
    assert "Nothing has been timed" in page.times()
    found = small_run("--only", "combine")
    for name in ("counts-before.json", "counts-after.json"):
        (tmp_path / name).write_text((page.FILES / "counts-before.json").read_text())
    monkeypatch.setattr(page, "FILES", tmp_path)
    assert f"| rows of 8 owners summed at home | {found['rows'][0]['ms']:.3f} |" in page.times()
    assert "| gradient norm | 9 → 9 | 4.29 → 4.29 | 0 → 0 | 4.29 | 1.28 → 1.28 | 1.28 |" in page.counts("PEER,")


def test_asking_what_writes_the_pages_writes_none(monkeypatch, capsys):
    monkeypatch.setattr(page, "generated", lambda: pytest.fail("pages were made"))
    monkeypatch.setattr(sys, "argv", ["page.py", "--help"])
    with pytest.raises(SystemExit):
        page.main()
    assert "Puts counts and figures" in capsys.readouterr().out
