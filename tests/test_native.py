"""The C library: what its functions are called with, and its life on machines of all kinds."""

import contextlib
import ctypes
import os
import resource
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from peer_dist.kernels import Picks, allocation, native, reference, signatures
from peer_dist.kernels.rounding import Rounding
from peer_dist.kernels.updates import Step
from tests.ranks import run_each

SIZES = {
    "tokens": 5,
    "dim": 16,
    "picks": 12,
    "rows": 9,
    "queries": 3,
    "n": 20,
    "k": 4,
    "most": 9,
    "written": 9,
    "touched": 9,
    "blocks": 9,
}
PICKS = Picks(torch.tensor([0, 2, 2, 5, 5, 12]), torch.tensor([8, 0, 3, 3, 5, 0, 1, 2, 2, 7, 8, 8]))
REFUSED = (TypeError, ValueError, IndexError)


@pytest.fixture(autouse=True)
def _a_library():
    if native.load_library() is None:
        pytest.skip("no C compiler here")


def arguments(name):
    """What a function takes, for it to work."""
    touched, order, token, starts = native._group(PICKS, SIZES["rows"])
    sizes = SIZES | {"segments": len(touched)}
    known = {"offsets": PICKS.offsets, "expert": PICKS.expert, "row": torch.arange(SIZES["rows"])}
    if name.startswith("table_grad"):
        known |= {"token": token, "order": order, "starts": starts, "rows": touched}
    given = {}
    for key, (dtype, shape) in signatures.SIGNATURES[name].tensors.items():
        whole = [sizes[text] if code is None else eval(code, {}, sizes) for text, code in shape]
        given[key] = known[key].clone() if key in known else torch.ones(whole, dtype=dtype)
    integers = [key for key in signatures.SIGNATURES[name].integers if key not in given]
    given |= {key: sizes.get(key, 1) for key in integers}
    given |= {key: sizes[key] for key in ("tokens", "written") if name.startswith("table_grad")}
    given |= {"most": sizes["most"]} if name == "group" else {}
    return given


class Outer(torch.Tensor):
    """Has a shape and a dtype, and its numbers elsewhere, as DTensor has."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError(function)


def wrong_tensors(right):
    """Of every kind that is not the tensor that C was promised."""
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool):
        if dtype != right.dtype:
            yield f"in {dtype}", right.to(dtype)
    yield "complex", right.to(torch.complex64)
    for axis in range(right.dim()):
        yield f"longer in {axis}", torch.cat([right, right.narrow(axis, 0, 1)], axis)
        yield f"shorter in {axis}", right.narrow(axis, 0, right.shape[axis] - 1).contiguous()
    yield "empty", right[:0]
    yield "flat" if right.dim() > 1 else "of two axes", right.reshape(-1) if right.dim() > 1 else right[None]
    yield "a number", right.reshape(-1)[0]
    wide = torch.stack([right, right], -1)
    yield "with gaps", wide[..., 0]
    yield "repeated", right.reshape(-1)[:1].expand(right.numel()).view(right.shape)
    if right.dim() > 1:
        yield "transposed", right.T.contiguous().T
    yield "on meta", right.to("meta")
    with FakeTensorMode() as mode:
        yield "fake", mode.from_tensor(right)
    yield "functional", torch._to_functional_tensor(right)
    yield "a subclass without memory", Outer(right)
    yield "zeros without memory", torch._efficientzerotensor(right.shape, dtype=right.dtype)
    freed, half = right.clone(), right.clone()
    freed.untyped_storage().resize_(0)
    half.untyped_storage().resize_(right.nbytes // 2)
    yield "freed", freed
    yield "half freed", half
    yield "sparse", right.to_sparse()
    if right.is_floating_point():
        yield "negative by a bit", torch._neg_view(right)
    if right.dim() == 2 and right.dtype == torch.float32:
        yield "compressed", right.to_sparse_csr()
    yield from (("an array", right.float().numpy()), ("a list", right.tolist()), ("an address", right.data_ptr()))
    yield from (("a float", 1.0), ("nothing", None))


WRONG_NUMBERS = (1.0, True, torch.tensor(1), "1", None, [1], -1, 1 << 63, 1 << 62)


# What is as good as the right argument: one table may have any number of rows, and rows need not be told, nor what an
# optimizer may lack.
AS_GOOD = {
    *((f"{name}_{row}", "table", "longer in 0") for name in ("dots", "mix") for row in ("f32", "bf16")),
    *((f"table_grad_{row}", "rows", "nothing") for row in ("f32", "bf16")),
    *(
        (f"update_{way}", part, "nothing")
        for way in ("in_place", "master", "stochastic", "i8", "e4m3")
        for part in ("row", "squares", "exp_avg", "exp_avg_sq", "row_sq")
    ),
    *((f"update_{way}", "called", "nothing") for way in ("stochastic", "i8", "e4m3")),
    ("wrong_picks", "rows", str(1 << 62)),
}


def refusal(name, given):
    """What a call with these arguments is answered with; None if nothing is wrong with them."""
    try:
        signatures.call(native.load_library(), name, **given)
    except REFUSED as error:
        return str(error)
    return None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", signatures.SIGNATURES)
def test_every_argument_of_every_function_is_checked(name):
    right = arguments(name)
    for key, value in right.items():
        cases = wrong_tensors(value) if isinstance(value, torch.Tensor) else ((repr(w), w) for w in WRONG_NUMBERS)
        for kind, wrong in cases:
            said = refusal(name, right | {key: wrong})
            assert (said is None) == ((name, key, kind) in AS_GOOD), (key, kind)
            assert said is None or name in said, (key, kind)
    assert refusal(name, right) is None


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("top_pairs", {"k": 0}),
        ("group", {"most": 8}),
        ("forward_f32", {"kind": 3}),
        ("backward_bf16", {"kind": 3}),
        ("table_grad_f32", {"stream": 2}),
        ("update_master", {"touched": 10}),
    ],
)
def test_sizes_that_a_function_does_not_serve(name, numbers):
    given = arguments(name)
    given |= numbers
    if name == "group":
        given |= {"touched": given["touched"][:8], "starts": given["starts"][:9]}
    if name == "top_pairs":
        given |= {key: given[key][:, :0].contiguous() for key in ("number", "score")}
    if name == "update_master":
        given |= {key: torch.cat([given[key], given[key][:1]]) for key in ("grad", "row", "squares")}
    with pytest.raises(ValueError, match="does not hold"):
        signatures.call(native.load_library(), name, **given)


def test_the_search_keeps_at_most_what_it_has_room_for():
    for n, k in ((100, 65), (8, 9)):
        with pytest.raises(ValueError, match="k <= min"):
            native.top_pairs(torch.randn(2, n), torch.randn(2, n), k)


WRONG_PICKS = {
    "offsets from 1": ([1, 2, 2, 5, 5, 12], None),
    "offsets to fewer": ([0, 2, 2, 5, 5, 11], None),
    "offsets to more": ([0, 2, 2, 5, 5, 13], None),
    "offsets that descend": ([0, 5, 2, 5, 5, 12], None),
    "offsets far away": ([0, 2, 1 << 60, 5, 5, 12], None),
    "row -1": (None, -1),
    "row 9 of 9": (None, 9),
    "row 2**62": (None, 1 << 62),
    "row -2**63": (None, -(1 << 63)),
}


@pytest.mark.parametrize("rows", [[-1, 3], [3, 9], [3, 3], [5, 4], [1 << 62, 4], [-(1 << 63), 4]])
@pytest.mark.parametrize("rounding", [None, Rounding(7, 0, 0)])
def test_rows_that_lead_out_of_the_table_are_not_stepped(rows, rounding):
    """In one sentence, and nothing is written."""
    table, moments = torch.ones(9, 16, dtype=torch.bfloat16), {"row_sq": torch.ones(9)}
    master = torch.ones(9, 16) if rounding is None else None
    step = Step.of("rowwise_adagrad", 0.1, (0.9, 0.99), 1e-8, 0.1, count=1, scale=1.0, dim=16)
    with pytest.raises(IndexError, match="must ascend, each once, within the table's 9"):
        native.update_rows(
            step, torch.ones(2, 16).bfloat16(), table, moments, master, torch.tensor(rows), None, rounding
        )
    assert all(value is None or bool((value == 1).all()) for value in (table, master, moments["row_sq"]))


@pytest.mark.parametrize("picks", WRONG_PICKS)
@pytest.mark.parametrize("name", [name for name, each in signatures.SIGNATURES.items() if "expert" in each.tensors])
def test_picks_that_lead_out_of_the_table(name, picks):
    given, (offsets, row) = arguments(name), WRONG_PICKS[picks]
    if offsets is not None:
        given["offsets"] = torch.tensor(offsets)
    else:
        given["expert"][6] = row
    if name == "wrong_picks":
        assert native.load_library().wrong_picks(5, 12, 9, given["offsets"].data_ptr(), given["expert"].data_ptr())
    with pytest.raises(IndexError if row is not None else ValueError, match="rows" if row is not None else "offsets"):
        signatures.call(native.load_library(), name, **given)


@pytest.mark.parametrize("where", [0, 70_000, 99_999])
def test_a_wrong_pick_among_many(where):
    """So many that several threads look."""
    expert = torch.randint(50, (1000, 100))
    expert.view(-1)[where] = 50
    with pytest.raises(IndexError, match="rows 0 to 50 from a table of 50"):
        native.dots(torch.randn(1000, 4), torch.randn(50, 4), Picks.even(expert))


def operations(x, weight, table, up, picks, out):
    """Every public function, under its name."""
    rows, dtype = 9, torch.float32
    sums = [(weight, x), (weight, x)]
    return {
        "dots": lambda: native.dots(x, table, picks),
        "mix": lambda: native.mix(weight, table, picks),
        "forward": lambda: native.forward(x, picks, weight, table, up, "gelu"),
        "backward": lambda: native.backward(x, x, picks, weight, weight, table, up, "silu"),
        "table_grad": lambda: native.table_grad(weight, x, picks, out),
        "table_grads": lambda: native.table_grads(sums, picks, rows, dtype=dtype),
        "sparse_table_grads": lambda: native.sparse_table_grads(sums, picks, rows, dtype=dtype),
        "top_pairs": lambda: native.top_pairs(x, x, 4),
    }


def tensors(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    shapes = {"x": (5, 16), "weight": (12,), "table": (9, 16), "up": (9, 16), "out": (9, 16)}
    values = {key: torch.randn(shape, generator=generator, dtype=torch.float32) for key, shape in shapes.items()}
    return values | {key: values[key].to(dtype) for key in ("table", "up")}


# What each function uses as it is, and what it makes contiguous float32 of first: only the former has to be that.
OPERATIONS = {
    "dots": ("table", "x"), "mix": ("table", "weight"), "forward": ("table up", "x weight"),
    "backward": ("table up", "x weight"), "table_grad": ("out", "x weight"), "table_grads": ("", "x weight"),
    "sparse_table_grads": ("", "x weight"), "top_pairs": ("", "x"),
}  # fmt: skip
NO_MEMORY = (
    "on meta",
    "fake",
    "functional",
    "a subclass",
    "zeros",
    "freed",
    "half",
    "sparse",
    "negative",
    "compressed",
)
ANY_TABLE = {"dots": ("longer in 0", "in torch.bfloat16"), "table_grad": ("longer in 0",)}
ANY_TABLE["mix"] = (*ANY_TABLE["dots"], "longer in 1", "shorter in 1")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OPERATIONS)
def test_what_is_no_plain_tensor_is_refused_in_this_process(name):
    given = tensors() | {"offsets": PICKS.offsets, "expert": PICKS.expert}
    as_it_is, converted = (keys.split() for keys in OPERATIONS[name])
    for key in [*as_it_is, *converted, *(["offsets", "expert"] if name != "top_pairs" else [])]:
        for kind, wrong in wrong_tensors(given[key]):
            if not isinstance(wrong, torch.Tensor) or (key in converted and not kind.startswith(NO_MEMORY)):
                continue
            changed = given | {key: wrong}
            picks = Picks(changed.pop("offsets"), changed.pop("expert"))
            refused = False
            try:
                operations(picks=picks, **changed)[name]()
            except (*REFUSED, RuntimeError):  # some are torch's own, of conversions
                refused = True
            assert refused != (key in as_it_is and kind in ANY_TABLE.get(name, ())), (key, kind)


def flat(outcome):
    """Tensors in a list, whatever they came in."""
    if isinstance(outcome, torch.Tensor):
        return [outcome]
    return [tensor for each in outcome or () for tensor in flat(each)]


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device():
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_depends_on_the_defaults_of_torch(dtype, large, monkeypatch):
    """Bit for bit, with both kinds of memory that gradients have."""
    monkeypatch.setattr(allocation, "_LARGE", 64 if large else 1 << 24)
    given = tensors(dtype)

    def results():
        out = given["out"].clone()
        named = {name: operation() for name, operation in operations(picks=PICKS, **given | {"out": out}).items()}
        return {name: flat(outcome) for name, outcome in named.items()} | {"table_grad": [out]}

    want = results()
    contexts = [default_dtype(kind) for kind in (torch.float64, torch.bfloat16, torch.float16)]
    for context in (*contexts, torch.device("meta"), default_device()):
        with context:
            got = results()
        for name, values in want.items():
            for value, other in zip(values, got[name], strict=True):
                assert (other.dtype, other.device) == (value.dtype, value.device), name
                assert torch.equal(other, value), name


def test_tracing_is_refused_and_ends_nothing():
    """Tracing hands out tensors where a shape has numbers."""
    given = tensors()
    with pytest.raises(TypeError, match=r"dots_f32: .* int"):
        torch.jit.trace(lambda x: native.dots(x, given["table"], PICKS), (given["x"],))


def test_huge_pages_of_what_has_no_memory():
    with FakeTensorMode():
        fake = torch.empty(allocation._LARGE, dtype=torch.float32, device="cpu")
    for tensor in (fake, torch.empty(allocation._LARGE, device="meta"), Outer(torch.empty(allocation._LARGE))):
        assert allocation.huge_pages(tensor) is tensor


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes are forked here")
def test_a_forked_process_has_gradients_of_its_own():
    grad = allocation.gradient_memory(allocation._LARGE // 64, 16, torch.float32).zero_()
    child = os.fork()
    if child == 0:
        ctypes.memset(grad.data_ptr(), 1, grad.nbytes)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert not grad.any()


# --- The library's life


@pytest.fixture(scope="module")
def world():
    """A folder that any user can read, with a library that was really compiled, and compilers that copy it."""
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder)
        world.chmod(0o755)
        shutil.copy(native.load_library()._name, world / "whole.so")
        trap = "#include <stdlib.h>\n#include <stdio.h>\n__attribute__((constructor)) void spring(void) { "
        (world / "trap.c").write_text(trap + 'char *at = getenv("TRAP"); if (at) fopen(at, "w"); }\n')
        subprocess.run([*native._compiler(), "-shared", "-fPIC", "trap.c", "-o", "trap.so"], cwd=world, check=True)
        copying = f'while [ "$1" != -o ]; do shift; done; cp {world}/whole.so "$2"'
        for name, body in {
            "copying": copying,
            "no-openmp": f'case "$*" in *-fopenmp*) exit 1;; esac; {copying}',
            "plain": f'case "$*" in *march=native*) exit 1;; esac; {copying}',
            "failing": 'echo "native.c:1: error: broken" >&2; exit 1',
            "lazy": "exit 0",
            "scribbling": 'while [ "$1" != -o ]; do shift; done; echo rubbish > "$2"',
            "hanging": f"sleep 600 & echo $! > {world}/sleeper; wait",
            "slow": f"sleep 1; {copying}",
        }.items():
            program = world / name
            program.write_text(f'#!/bin/sh\n[ -z "$CALLS" ] || echo {name} "$@" >> "$CALLS"\n{body}\n')
            program.chmod(0o755)
        yield world


def use(changes, uid=None, most_bytes=None, seconds=None):
    """With other variables, in a process of its own: the library's path and what is said. Its sums must be right."""
    for name in (*native._LOCAL_RANKS, "CC", "XDG_CACHE_HOME"):
        os.environ.pop(name, None)
    native._sources()
    for name, value in changes.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    if uid is not None:
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)
    if most_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    native.COMPILER_SECONDS = seconds or native.COMPILER_SECONDS
    tempfile.tempdir = None
    native.load_library.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        library, again = native.load_library(), native.load_library()
    assert library is again
    x, table = torch.randn(5, 16), torch.randn(9, 16)
    assert native.available(x, table) == (library is not None)
    if library is not None:
        torch.testing.assert_close(native.dots(x, table, PICKS), reference.dots(x, table, PICKS))
    return None if library is None else library._name, [str(each.message) for each in said]


def use_each(*changes):
    """One after the other in the same process."""
    return [use(each) for each in changes]


class Home:
    """One user's folders, and what happens with them."""

    def __init__(self, world, folder):
        self.world, self.folder, self.calls = world, folder, folder / "calls"
        self.cache = folder / "home/.cache/peer_dist"
        self.variables = {"HOME": str(folder / "home"), "CALLS": str(self.calls), "TRAP": str(folder / "sprung")}
        self.variables |= {"TMPDIR": str(folder / "tmp"), "PATH": os.environ["PATH"]}
        for name in ("home", "tmp"):
            (folder / name).mkdir()

    def setting(self, compiler="copying", **changes):
        """The variables of a user who has this compiler, or none."""
        found = {"CC": str(self.world / compiler)} if compiler else {"CC": None, "PATH": ""}
        return self.variables | found | changes

    def use(self, compiler="copying", uid=None, most_bytes=None, seconds=None, **changes):
        return run_each(use, [(self.setting(compiler, **changes), uid, most_bytes, seconds)])[0]

    def compiled(self):
        """How often a compiler ran since this was last asked."""
        lines = self.calls.read_text().splitlines() if self.calls.exists() else []
        self.calls.unlink(missing_ok=True)
        return len(lines)

    def left(self):
        return [path.name for folder in ("home", "tmp") for path in (self.folder / folder).rglob("*building-*")]


@pytest.fixture
def home(world):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Home(world, Path(folder))


def other_elf(data):
    """A library for another machine: as much as the header says of it."""
    return data[:18] + b"\xf3\x00" + data[20:]


DAMAGE = {
    "half": lambda data: data[: len(data) // 2],
    "a page": lambda data: data[:4096],
    "its header": lambda data: data[:64],
    "nothing": lambda data: b"",
    "text": lambda data: b"not a library\n",
    "zeros": lambda data: bytes(len(data)),
    "one bit": lambda data: data[:-100] + bytes([data[-100] ^ 1]) + data[-99:],
    "of another machine": other_elf,
    "the head alone, zeros after": lambda data: data[:8192] + bytes(len(data) - 8192),
}


@pytest.mark.parametrize("named", ["as it was", "as it is"])
def test_a_cached_file_that_is_no_library_of_ours_is_built_again(home, named):
    """Also if its name has the digest of what it holds: then it is whole, and foreign."""
    path, said = home.use()
    assert (Path(path).parent, said, home.compiled()) == (home.cache, [], 1)
    assert home.use() == (path, [])
    assert home.compiled() == 0
    whole = Path(path).read_bytes()
    kinds = {kind: make(whole) for kind, make in DAMAGE.items()}
    if named == "as it is":  # half of one ends the process that loads it, and nobody but us gives these names
        kinds = {kind: kinds[kind] for kind in ("nothing", "text", "of another machine")}
        kinds |= {"one without the functions": (home.world / "trap.so").read_bytes()}
    for kind, data in kinds.items():
        Path(path).unlink()
        name = path if named == "as it was" else f"{path[:-19]}{native._digest(data)}.so"
        Path(name).write_bytes(data)
        (none, words), rebuilt = run_each(use_each, [(home.setting(None), home.setting())])[0]
        assert (none, len(words), rebuilt, home.compiled()) == (None, 1, (path, []), 1), kind
        Path(name).unlink() if name != path else None
    for make in (Path.mkdir, lambda place: place.symlink_to("nowhere"), lambda place: place.symlink_to(place.name)):
        Path(path).unlink()
        make(Path(path))
        library, said = home.use()
        assert (library is not None, said) == (True, []), make
        if library != path:  # a folder is in its place: the library was this process's alone
            Path(path).rmdir()
            assert home.use() == (path, [])
    assert home.left() == []


def test_a_cached_library_serves_without_a_compiler_and_is_not_said(home):
    path, _ = home.use()
    for compiler in (None, "failing", "lazy"):
        assert home.use(compiler) == (path, [])
    other, _ = home.use("no-openmp")  # another compiler's is another
    assert other != path
    assert home.use() == (path, [])
    Path(path).unlink()
    assert home.use(None) == (other, [])


def test_no_compiler_is_said_once_on_one_rank(home):
    ranks = [{}, {"LOCAL_RANK": "0", "SLURM_LOCALID": "3"}, {"LOCAL_RANK": "3", "SLURM_LOCALID": "0"}]
    ranks += [{name: number} for name in native._LOCAL_RANKS for number in ("0", "7")]
    outcomes = run_each(use, [(home.setting(None, **rank),) for rank in ranks])
    assert {library for library, _ in outcomes} == {None}
    assert [len(said) for _, said in outcomes] == [1, 1, 0, *[1, 0] * len(native._LOCAL_RANKS)]
    assert all(word in outcomes[0][1][0] for word in ("twice as long", "there is no C compiler", "install gcc", "CC"))


@pytest.mark.parametrize(
    ("compiler", "why"),
    [("failing", "native.c:1: error: broken"), ("lazy", "No such file"), ("scribbling", "cannot be loaded")],
)
def test_a_compiler_that_fails(home, compiler, why):
    library, said = home.use(compiler)
    assert library is None
    assert len(said) == 1
    assert why in said[0]
    assert home.left() == []
    assert list(home.cache.iterdir()) == []


def test_a_compiler_that_hangs_is_ended_with_all_that_it_started(home):
    begin = time.monotonic()
    library, said = home.use("hanging", seconds=1)
    assert time.monotonic() - begin < 20
    assert library is None
    assert "did not end within 1 s" in said[0]
    assert home.compiled() == 1
    sleeper = int((home.world / "sleeper").read_text())
    state = Path(f"/proc/{sleeper}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"
    assert home.left() == []


def test_what_a_compiler_does_not_know_is_left_out(home):
    for compiler, tries in (("no-openmp", 2), ("plain", 3)):
        path, said = home.use(compiler)
        assert path.startswith(str(home.cache))
        assert said == []
        assert home.compiled() == tries


def test_compilers_with_arguments_and_such_as_there_are_not(home):
    """What CC names and is not there is passed over for cc."""
    copying = home.world / "copying"
    bin, spaced = home.folder / "bin", home.folder / "my compilers"
    for folder in (bin, spaced):
        folder.mkdir()
        shutil.copy(copying, folder / "cc")
    path = f"{bin}{os.pathsep}{os.environ['PATH']}"
    for command in (f"env SOME=thing {copying} -O1", f"{spaced}/cc", shlex.join([f"{spaced}/cc", "-O1"])):
        assert home.use(CC=command)[1] == []
        assert home.compiled() == 1, command
    commands = ("", " ", "no-such-compiler", "no-such-compiler -O1", "a 'quote", f"{home.world}", None)
    outcomes = run_each(use_each, [[home.setting(CC=command, PATH=path) for command in commands]])[0]
    assert [(library is not None, said) for library, said in outcomes] == [(True, [])] * len(commands)
    assert home.compiled() == 1


def other_user(path):
    """Give a file to somebody else, if this one may."""
    if os.geteuid() != 0:
        pytest.skip("only root gives files away")
    os.chown(path, 54321, 54321)


def test_nothing_is_run_that_others_could_have_put_there(home):
    """They know the names too; here what they leave says that it was loaded."""
    path, _ = home.use()
    sprung, trap = home.folder / "sprung", (home.world / "trap.so").read_bytes()
    Path(path).unlink()
    bait = Path(f"{path[:-19]}{native._digest(trap)}.so")

    def sprang():
        there = sprung.exists()
        sprung.unlink(missing_ok=True)
        return there

    bait.write_bytes(trap)
    assert home.use() == (path, [])
    assert sprang()  # it works where it is the user's own
    Path(path).unlink()
    bait.rename(path)  # another digest
    assert home.use() == (path, [])
    assert not sprang()
    shutil.copy(home.world / "trap.so", bait)
    for mode in (0o777, 0o770, 0o702):
        home.cache.chmod(mode)
        library, said = home.use()
        assert library.startswith(str(home.folder / "tmp"))
        assert said == []
    assert home.use(None)[0] is None
    home.cache.chmod(0o700)
    bait.chmod(0o666)
    assert home.use() == (path, [])
    assert not sprang()
    bait.chmod(0o600)
    other_user(bait)
    assert home.use() == (path, [])
    other_user(home.cache)
    assert home.use()[0].startswith(str(home.folder / "tmp"))
    assert not sprang()
    assert list((home.folder / "tmp").iterdir()) == []


@pytest.mark.parametrize("kind", ["a file", "no folder", "of the kernel", "relative", "empty"])
def test_homes_that_are_none(home, kind):
    """A library is built for the process alone; nothing is left where it was."""
    (home.folder / "file").write_bytes(b"")
    where = {"a file": f"{home.folder}/file", "no folder": "/dev/null/home", "of the kernel": "/proc/1/home"}
    where |= {"relative": "home", "empty": ""}
    if kind == "empty" and os.geteuid() == 0:
        pytest.skip("root writes anywhere")
    for variables in ({"HOME": where[kind]}, {"XDG_CACHE_HOME": where[kind]}):
        library, said = home.use(**variables)
        assert said == []
        ignored = "XDG_CACHE_HOME" in variables and kind in ("relative", "empty")
        expected = home.cache if ignored else home.folder / "tmp"
        assert library.startswith(str(expected))
        assert home.left() == []
    assert home.use(None, HOME=where[kind])[0] is None


def test_a_user_without_a_home_and_one_who_cannot_write_it(home):
    if os.geteuid() != 0:
        pytest.skip("only root becomes another user")
    (home.folder / "tmp").chmod(0o1777)
    path, _ = home.use()
    (home.folder / "home").chmod(0o755)
    for variables in ({"HOME": None}, {}):  # no line in passwd; a folder of somebody else
        library, said = home.use(uid=54321, CALLS="", **variables)
        assert said == []
        assert library.startswith(str(home.folder / "tmp"))
        library, said = home.use(None, uid=54321, CALLS="", **variables)
        assert library is None
        assert len(said) == 1
    # the user's own folder, which cannot be written any more, serves still
    for place in (*home.cache.parents[:2], home.cache, Path(path)):
        os.chown(place, 54321, 54321)
        place.chmod(0o500)
    assert home.use(uid=54321, CALLS="") == (path, [])
    assert home.use(None, uid=54321) == (path, [])
    Path(path).unlink()
    library, said = home.use(uid=54321, CALLS="")
    assert library.startswith(str(home.folder / "tmp"))


def test_a_disk_without_room(home):
    library, said = home.use(most_bytes=1024)
    assert library is None
    assert "File too large" in said[0]
    assert home.left() == []
    path, said = home.use()
    assert path.startswith(str(home.cache))


def test_builds_that_were_interrupted_and_builds_at_once(home):
    """What a killed process left goes when it is old; ranks that start together have one library."""
    home.cache.mkdir(parents=True)
    for name, age in (("building-old", 7200), ("building-now", 0)):
        (home.cache / name).mkdir()
        (home.cache / name / "native.so").write_bytes(b"half")
        os.utime(home.cache / name, (time.time() - age,) * 2)
    variables = home.variables | {"CC": str(home.world / "slow")}
    outcomes = run_each(use, [(variables,)] * 3)
    assert len({path for path, _ in outcomes}) == 1
    assert [said for _, said in outcomes] == [[]] * 3
    library = Path(outcomes[0][0])
    assert sorted(path.name for path in home.cache.iterdir()) == ["building-now", library.name]
    assert stat.S_IMODE(library.stat().st_mode) == 0o755


def without_unix(platform):
    """As on a system that has none of these functions."""
    for name in ("uname", "geteuid", "getuid", "killpg"):
        delattr(os, name)
    sys.platform = platform
    import importlib

    importlib.reload(native)
    native._ahead()
    native._cached_name(None)
    return native._is_ours(Path("/"))


def test_systems_without_the_functions_of_unix():
    assert run_each(without_unix, [("win32",)]) == [True]
