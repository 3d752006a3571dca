"""Counts what a computation would ask of a GPU, without one: launches, bytes through memory, FLOPs and host waits.

The computation runs on torch's ``meta`` device, whose tensors have shapes and no numbers, with the kernels that a GPU
would run. Each operator of torch's counts as a launch that reads its arguments once and writes its results once, but
for those that are listed here with their reasons; each of our own kernels by the formula under its name. What would
stay in a GPU's L2 by its size is read from memory once. Nothing here has been measured.
"""

from __future__ import annotations

import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from peer_dist.kernels.custom_ops import functions
from peer_dist.kernels.triton import launching
from peer_dist.tracing import position

META, CPU = torch.device("meta"), torch.device("cpu")

L2_BYTES = 50 << 20
"""An H100's. What is larger is read from memory each time; what is not, once."""

PLACES = (
    # (part, file, function): the first line that names something on Python's stack says what the time goes to
    ("gradient norm", r"/peer_dist/optim/", r"grad_norm|sum_over_copies"),
    ("update of tables", r"/peer_dist/optim/", r""),
    ("retrieval", r"/layers/product_keys\.py|/kernels/(triton/)?retrieval\.py", r""),
    ("experts", r"/kernels/picks\.py", r"even"),
    ("sort", r"/kernels/picks\.py|/kernels/triton/sort\.py", r""),
    ("sort", r"/kernels/triton/experts\.py", r"_bounds"),
    ("table gradients", r"/peer_dist/kernels/", r"_grads_of_tables|_?(sparse_)?table_grads?|_run_sums"),
    ("rotation", r"/kernels/(triton/)?dense\.py", r"split_heads|join_heads"),
    ("cross-entropy", r"/kernels/(triton/)?dense\.py", r"label_logs|logits_to_gradient"),
    ("dense feed-forward", r"/kernels/(triton/)?dense\.py", r""),
    ("attention", r"/megatron/attention\.py", r""),
    ("documents", r"/megatron/|/measures/", r"segment_mask|make_micro_batch"),
    ("norms", r"/megatron/norm\.py", r""),
    ("rotation", r"/rope_utils\.py|/rotary_pos_embedding\.py", r""),
    ("projections of attention", r"/transformer/attention\.py", r""),
    ("dense feed-forward", r"/transformer/mlp\.py", r""),
    ("embedding", r"/language_model_embedding\.py", r""),
    ("cross-entropy", r"cross_entropy", r""),
    ("output layer", r"/gpt_model\.py", r"_postprocess|compute_output.*"),
    ("combine", r"/sharding/", r"add_rows_at_home"),
    ("experts", r"/peer_dist/kernels/", r""),
)
SPANS = {"retrieve": "queries", "optimizer": "update of the dense part"}  # others are parts by their own name
OTHER = "other"


@dataclass
class Count:
    """What a part asks of the device.

    Attributes:
        launches: of kernels, collectives among them.
        bytes: read and written.
        flops: of matrix products and of sums over picks.
        waits: how often the host would wait for the device.
    """

    launches: int = 0
    bytes: int = 0
    flops: int = 0
    waits: int = 0

    def add(self, launches: int = 0, moved: float = 0, flops: int = 0, waits: int = 0) -> None:
        self.launches += launches
        self.bytes += round(moved)
        self.flops += flops
        self.waits += waits


class Counter:
    """A context in which everything on ``meta`` is counted. Python sees ``meta`` as it sees CUDA (``is_cuda``).

    Args:
        touched: the number of distinct rows among so many picks, which a device would be asked for.
        seen: the mean number of keys that a query sees within its document, where attention keeps to documents.

    Attributes:
        parts: the counts, by ``(part, pass)``; a pass is ``forward`` or ``backward``.
    """

    def __init__(self, touched: Callable[[int], int] = lambda picks: picks, seen: float = 0.0) -> None:
        self.parts: dict[tuple[str, str], Count] = defaultdict(Count)
        self.touched, self.seen = touched, seen
        self.part_of: dict[int, str] = {}  # of autograd's nodes, by number
        self.in_ours = 0  # depth of operators whose FLOPs are counted as a whole
        self.operators = _Operators(self)

    def __enter__(self) -> Counter:
        self._stack = ExitStack()
        self._stack.enter_context(patch.object(launching, "launch", self._launch))
        self._stack.enter_context(_as_on_cuda(self))
        self._stack.enter_context(self.operators)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def here(self) -> Count:
        """The count of what is being done now."""
        node = torch._C._current_autograd_node()
        return self.parts[self.part(node), "forward" if node is None else "backward"]

    def part(self, node: Any) -> str:
        """What is being done: by Python's stack, by the span, in a backward pass by what the forward pass did."""
        executed, frame = [], sys._getframe(1)
        while frame is not None:
            executed.append((frame.f_code.co_filename, frame.f_code.co_name))
            frame = frame.f_back  # type: ignore[assignment]
        for part, file, function in PLACES:
            if any(re.search(file, path) and (not function or re.fullmatch(function, name)) for path, name in executed):
                return part
        if position.span:
            return SPANS.get(position.span, position.span)
        return OTHER if node is None else self.part_of.get(node._sequence_nr(), OTHER)

    def _launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int, **constants: Any) -> None:
        if 0 in grid:
            return
        given = dict(zip(kernel.arg_names, args)) | constants
        name = kernel.__name__
        moved = KERNELS[name](given) if name in KERNELS else once(given.values())
        self.here().add(1, moved)


def total(parts: Iterable[Count]) -> Count:
    """The sum of several counts."""
    whole = Count()
    for part in parts:
        whole.add(part.launches, part.bytes, part.flops, part.waits)
    return whole


# ---------------------------------------------------------------------------------------------------------------------
# Our kernels, by the name of the function. What is not here reads or writes each of its tensors once.


def once(values: Iterable[Any]) -> int:
    """Each tensor read, or written, once."""
    return sum(size(value) for value in values)


def rows_read(table: Tensor, picks: int) -> int:
    """A table's row for each pick: from memory each time, or once where the whole table stays in L2."""
    by_pick = picks * table.shape[-1] * table.element_size()
    return min(by_pick, size(table)) if size(table) <= L2_BYTES else by_pick


def _but(given: dict[str, Any], *names: str) -> int:
    return once(value for name, value in given.items() if name not in names)


def _token_kernel(given: dict[str, Any]) -> int:
    picks = given["expert"].numel()
    tables = rows_read(given["first_table"], picks) + rows_read(given["second_table"], picks)
    return tables + _but(given, "first_table", "second_table")


def _dots_kernel(given: dict[str, Any]) -> int:
    picks, table = given["expert"].numel(), given["table"]
    slices = -(-given["DIM"] // given["WIDTH"])
    numbers = slices * once((given["token"], given["expert"], given["order"], given["scales"])) + size(given["out"])
    by_expert = given["order"] is not None  # a row then comes from memory once, x stays in L2
    return (
        numbers
        + size(given["x"])
        + (min(size(table), rows_read(table, picks)) if by_expert else rows_read(table, picks))
    )


def _mix_kernel(given: dict[str, Any]) -> int:
    picks, table = given["expert"].numel(), given["table"]
    slices = -(-given["DIM"] // given["BLOCK_D"])
    slice_bytes = table.shape[0] * min(given["BLOCK_D"], given["DIM"]) * table.element_size()
    rows = min(size(table), rows_read(table, picks)) if slice_bytes <= L2_BYTES else rows_read(table, picks)
    return (
        rows + size(given["out"]) + slices * once((given["weight"], given["offsets"], given["expert"], given["scales"]))
    )


def _runs_kernel(given: dict[str, Any]) -> int:
    grads = once((given["ddown"], given["dup"]))
    if given["ADD"]:  # only rows that were picked are read and written
        share = min(1.0, given["order"].numel() / given["ddown"].shape[0])
        grads = round(2 * share * grads)
    return grads + _but(given, "ddown", "dup", "partial")  # a piece is there for popular rows only


def _pieces_kernel(given: dict[str, Any]) -> int:
    return once((given.get("owner"), given.get("base")))  # sums are of popular rows, which uniform picks do not have


def _update_kernel(given: dict[str, Any]) -> int:
    rows = given["grad"].shape[0]  # all, or those that were picked
    share = rows / given["weights"].shape[0]
    kept = once(given[name] for name in ("weights", "exp_avg", "exp_avg_sq", "row_sq"))
    return once((given["grad"], given["rows"], given["squares"])) + round(share * (2 * kept + size(given["table"])))


def _update_eight_bit_kernel(given: dict[str, Any]) -> int:
    return _update_kernel({**given, "weights": given["codes"], "table": None}) + 8 * given["grad"].shape[0]  # scales


def _copy_rows_kernel(given: dict[str, Any]) -> int:
    row = given["WORDS"] * given["far"].element_size()
    return once((given["rows"], given["slots"])) + given["rows"].numel() * row  # of the GPU's memory


def _gradient_kernel(given: dict[str, Any]) -> int:
    return once(given.values()) + size(given["logits"])  # logits become their gradient


def _run_squares_kernel(given: dict[str, Any]) -> int:
    return _but(given, "partial_down", "partial_up")


def _update_runs_kernel(given: dict[str, Any]) -> int:
    share = -math.expm1(-given["order"].numel() / given["weights"].shape[0])  # of the rows, picked at all if uniformly
    kept = once(given[name] for name in ("weights", "exp_avg", "exp_avg_sq", "row_sq"))
    numbers = once(given[name] for name in ("order", "token", "dpre", "x", "bounds"))
    return numbers + round(share * (size(given["squares"]) + 2 * kept + size(given["table"])))


KERNELS: dict[str, Callable[[dict[str, Any]], int]] = {
    kernel.__name__: kernel
    for kernel in (
        _token_kernel,
        _dots_kernel,
        _mix_kernel,
        _runs_kernel,
        _pieces_kernel,
        _update_kernel,
        _update_eight_bit_kernel,
        _copy_rows_kernel,
        _gradient_kernel,
        _run_squares_kernel,
        _update_runs_kernel,
    )
}


# ---------------------------------------------------------------------------------------------------------------------
# Operators of torch's.

FREE = {
    "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "resize_", "_unsafe_view",
    "_reshape_alias", "lift_fresh", "set_", "is_coalesced", "_coalesced_", "sparse_dim", "dense_dim", "_nnz",
    "_indices", "_values", "_sparse_coo_tensor_with_dims_and_tensors", "_sparse_coo_tensor_unsafe", "record_stream",
    "_has_compatible_shallow_copy_type", "is_same_size",
}  # fmt: skip
"""Operators that launch nothing, beside all that give a view."""

FILLS = {"copy_", "fill_", "zero_", "normal_", "uniform_", "random_"}
"""Operators that write their first argument without having read it."""

CROSSES = {"_to_copy", "copy_", "_local_scalar_dense"}
"""Operators that may copy between host and device, which launches no kernel."""

LAUNCHES = {
    "topk": 2,  # a radix select of each slice, which is read from memory once, and a sort of the k that it found
    "cumsum": 2,  # cub's scan sets up its state first
    "repeat_interleave": 3,  # a cumsum, and the kernel that writes
    "unique_consecutive": 6,  # flags, a scan, a selection, differences, their copies
    "nonzero": 4,  # cub's reduction and its selection, two launches each
    "_flash_attention_backward": 3,  # products of rows with their gradients, the gradients, a sum of the query's
}
"""Operators of several launches; sorts have a formula."""

FLASH = {"_flash_attention_forward": (4, 0), "_flash_attention_backward": (10, 1)}
"""FLOPs for each number of the query and each key that it sees, and the query's place among the arguments."""

ROWS = {"index", "index_select", "gather", "embedding", "take"}
"""Operators that read the rows they pick: what they give, read and written, and the numbers of the rows."""

WRITES_ROWS = {"index_copy_": 2, "index_put_": 2, "scatter_": 2, "index_add_": 3, "scatter_add_": 3}
"""Operators that write the rows they are given, how often what is given passes: those that add also read the rows."""

UNKNOWN_SIZE = ("nonzero", "unique_consecutive", "unique_dim", "_unique2", "masked_select")
"""Operators whose result has a size that the host asks the device for."""

WITHOUT_META = ("_fused_adamw_", "_fused_adam_")
"""Operators on arguments in place that ``meta`` has no kernel of."""


def size(value: Any) -> int:
    """Bytes of a tensor's numbers; repeated ones (``expand``) are there once."""
    if not isinstance(value, Tensor):
        return 0
    if value.layout is torch.sparse_coo:
        return size(value._indices()) + size(value._values())
    return value.element_size() * math.prod(n for n, stride in zip(value.shape, value.stride()) if stride or n == 0)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)


def radix_sort(keys: Tensor, value_bytes: int = 8) -> tuple[int, int]:
    """Launches and bytes of cub's radix sort of pairs: all bits of the keys, 8 in a pass.

    The numbers of the values are written first. A histogram of all digits and its scan; then each pass reads and
    writes keys and values.
    """
    passes, pair = keys.element_size(), keys.element_size() + value_bytes
    return 3 + passes, keys.numel() * (value_bytes + keys.element_size() + 2 * passes * pair)


def sort(keys: Tensor) -> tuple[int, int]:
    """Launches and bytes of ``torch.sort``: short rows are sorted in place in shared memory, after a copy."""
    if keys.shape[-1] <= 4096 and keys.numel() > keys.shape[-1]:
        return 3, 2 * size(keys) + keys.numel() * 8 + 2 * keys.numel() * (keys.element_size() + 8)
    return radix_sort(keys)


def cost(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> tuple[int, int]:
    """Launches and bytes of an operator."""
    name, schema = function.name().partition("::")[2].partition(".")[0], function._schema
    views = any(result.alias_info is not None and not result.alias_info.is_write for result in schema.returns)
    involved = list(_tensors([args, list(kwargs.values()), out]))
    if name in FREE or views or not any(value.numel() for value in involved):
        return 0, 0
    if name in CROSSES and (name == "_local_scalar_dense" or len({value.device for value in involved}) > 1):
        return 0, once(value for value in involved if value.device == META)
    if name.endswith("_like") or name.startswith("new_"):  # of the shape of a tensor that is not read
        return 1, once(_tensors(out))
    if name == "clone" and args[0].layout is torch.sparse_coo:
        return 0, 0  # autograd keeps a gradient that nobody else holds, which it cannot see under this mode
    if name == "sort":
        return sort(args[0])
    if name in ROWS:
        picked = list(_tensors([args[1:], list(kwargs.values())]))
        numbers = once(value for value in picked if value.dtype in (torch.int32, torch.int64))
        return 1, 2 * size(out) + numbers
    if name in WRITES_ROWS:
        given = list(_tensors([args[1:], list(kwargs.values())]))
        numbers = once(value for value in given if value.dtype in (torch.int32, torch.int64, torch.bool))
        sorted_first, moved_first = radix_sort(given[0]) if name == "index_put_" and True in args[3:] else (0, 0)
        return 1 + sorted_first, moved_first + WRITES_ROWS[name] * (once(given) - numbers) + numbers
    moved, seen = 0, set()
    for place, argument in enumerate(schema.arguments):
        value = args[place] if place < len(args) else kwargs.get(argument.name)
        writes = argument.alias_info is not None and argument.alias_info.is_write
        reads = not writes or not (argument.is_out or name in FILLS)
        given = [each for each in _tensors(value) if id(each) not in seen]  # x * x reads x once
        seen |= set(map(id, given))
        moved += (reads + writes) * once(given)
    results = [value for value, result in zip(_results(out), schema.returns) if result.alias_info is None]
    return LAUNCHES.get(name, 1), moved + once(_tensors(results))


def _results(out: Any) -> tuple[Any, ...]:
    return tuple(out) if isinstance(out, tuple) else (out,)


@contextmanager
def _as_on_cuda(counter: Counter) -> Iterator[None]:
    """Tensors on ``meta`` say that they are on CUDA; what is made on the host for the device is a wait; what torch has
    a kernel for on CUDA alone, attention and RMSNorm, is not what ``meta`` makes of it.

    The attributes themselves are replaced: a mode of torch's for functions would not be on in backward passes.
    """
    base = torch._C.TensorBase

    def place(tensor: Tensor) -> int:
        if tensor.device != META:
            return base.data_ptr(tensor)
        # those of parts of one tensor differ, and on meta all would be 0
        return tensor.untyped_storage()._cdata + tensor.storage_offset() * tensor.element_size()

    def attend(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: Any = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        return _Attention.apply(counter, query, key, value, attn_mask, is_causal)

    def norm(x: Tensor, normalized_shape: Any, weight: Tensor, eps: Any = None) -> Tensor:
        return _RMSNorm.apply(counter, x, weight)

    def from_host(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            out = make(*args, **kwargs)
            counter.here().add(waits=int(out.device == META))
            return out

        return made

    with ExitStack() as stack:
        is_cuda = property(lambda tensor: tensor.device == META or base.is_cuda.__get__(tensor))
        stack.enter_context(patch.object(torch.Tensor, "is_cuda", is_cuda))
        stack.enter_context(patch.object(torch.Tensor, "data_ptr", place))
        stack.enter_context(patch.object(torch.cuda, "is_current_stream_capturing", lambda: False))
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", attend))
        stack.enter_context(patch.object(F, "rms_norm", norm))
        for owner, name in ((torch, "tensor"), (torch, "as_tensor"), (torch.Tensor, "new_tensor")):
            stack.enter_context(patch.object(owner, name, from_host(getattr(owner, name))))
        yield


class _Operators(TorchDispatchMode):
    """Counts each operator. Our own are really run, where torch would ask for shapes alone."""

    def __init__(self, counter: Counter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, counter = kwargs or {}, self.counter
        name = function.name().partition("::")[2].partition(".")[0]
        if (
            torch._C._current_autograd_node() is None
        ):  # the newest node is this operator's, or of the function around it
            counter.part_of.setdefault(torch.autograd._get_sequence_nr() - 1, counter.part(None))
        formula = flop_registry.get(function.overloadpacket)
        if function.namespace == "peer_dist":
            with self:
                counter.in_ours += formula is not None
                try:
                    out = functions[name](*args)
                finally:
                    counter.in_ours -= formula is not None
        elif not any(value.device == META for value in _tensors([args, list(kwargs.values())])):
            out = function(*args, **kwargs)  # on the host, or made on the device from nothing
            if not any(value.device == META for value in _tensors(out)):
                return out
            counter.here().add(waits=int(name == "_to_copy" and not kwargs.get("non_blocking")))
        else:
            out, waits = self._answer(name, function, args, kwargs)
            counter.here().add(waits=waits)
        count = counter.here()
        if name in FLASH:  # torch's formula asks for the lengths of the documents
            flops, query = FLASH[name]
            count.add(flops=round(flops * args[query].numel() * counter.seen))
        elif formula is not None and not counter.in_ours:
            count.add(flops=int(formula(*args, **kwargs, out_val=out)))
        if function.namespace == "c10d":
            if torch.distributed.get_world_size() > 1:  # each tensor is read, or written, once
                count.add(1, once(set(_tensors([args, list(kwargs.values())]))))
        elif function.namespace != "peer_dist":
            count.add(*cost(function, args, kwargs, out))
        return out

    def _answer(self, name: str, function: Any, args: Any, kwargs: Any) -> tuple[Any, int]:
        """What the operator gives, made up where it asks the device for numbers; and how often the host waits."""
        if name == "clone" and args[0].layout is torch.sparse_coo:  # of which meta forgets how many rows it has
            parts = args[0]._indices(), args[0]._values(), args[0].shape
            options = {"dtype": args[0].dtype, "device": META, "check_invariants": False}
            return torch.sparse_coo_tensor(*parts, is_coalesced=args[0].is_coalesced(), **options), 0
        if name == "_local_scalar_dense":
            return torch.ones((), dtype=args[0].dtype, device=CPU).item(), 1
        if name == "_to_copy" and kwargs.get("device") == CPU:
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device=CPU), 1
        if name == "copy_" and args[0].device != args[1].device:
            blocking = not (kwargs.get("non_blocking") or True in args[2:])
            return (args[0] if args[0].device == META else args[0].fill_(1)), int(blocking)
        if name == "equal":
            return True, 1
        if name in UNKNOWN_SIZE:
            rows = self.counter.touched(args[0].numel())
            numbers = torch.empty(rows, dtype=torch.int64, device=META)
            if name == "nonzero":
                return numbers.new_empty(rows, args[0].dim()), 1
            values = torch.empty(rows, dtype=args[0].dtype, device=META)
            if name == "masked_select":
                return values, 1
            return (values, torch.empty(args[0].shape, dtype=torch.int64, device=META), numbers), 1
        if name == "index" and any(index.dtype == torch.bool for index in _tensors(args[1])):
            raise NotImplementedError("a boolean mask picks rows, whose number the host waits for")
        if name in WITHOUT_META:
            return None, 0
        if name == "allreduce_coalesced_":
            return FakeWork().boxed(), 0
        return function(*args, **kwargs), 0


class _Attention(torch.autograd.Function):
    """``softmax(q k') v`` as a flash kernel would: scores never pass through memory, masks do."""

    @staticmethod
    def forward(
        ctx: Any, counter: Counter, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.counter, ctx.mask = counter, size(mask)
        ctx.flops = 4 * query.numel() * key.shape[-2] // (2 if causal else 1)
        ctx.sums = 4 * query.shape[:-1].numel()  # a float32 for each row of the scores
        counter.parts["attention", "forward"].add(1, once((query, key, value, out)) + ctx.sums + ctx.mask, ctx.flops)
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        query, key, value = ctx.saved_tensors
        moved = 2 * once((query, key, value)) + 2 * size(dy) + ctx.sums + ctx.mask
        # the products of rows with dy first; then all products again, and those of three gradients
        ctx.counter.parts["attention", "backward"].add(2, moved + 2 * size(dy), ctx.flops * 5 // 2)
        return None, torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None, None


class _RMSNorm(torch.autograd.Function):
    """torch's fused kernels from 2.9 on: one forward; backward one for the input and two for the weight's sum."""

    @staticmethod
    def forward(ctx: Any, counter: Counter, x: Tensor, weight: Tensor) -> Tensor:
        ctx.counter, ctx.rows = counter, 4 * x.shape[:-1].numel()
        ctx.save_for_backward(x, weight)
        counter.parts["norms", "forward"].add(1, 2 * size(x) + size(weight) + ctx.rows)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        ctx.counter.parts["norms", "backward"].add(3, 5 * size(x) + 2 * size(weight) + 2 * ctx.rows)
        return None, torch.empty_like(x), torch.empty_like(weight)
