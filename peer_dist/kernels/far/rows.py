"""The rows of far tables: those near the kernels, and their journeys."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from peer_dist.kernels import disk
from peer_dist.kernels.allocation import huge_pages
from peer_dist.kernels.eight_bit import scales_of
from peer_dist.kernels.far.ahead import Ahead
from peer_dist.kernels.far.background import Job
from peer_dist.kernels.far.hot import Exchange, Hot
from peer_dist.kernels.far.place import Place
from peer_dist.kernels.far.ranges import Range, Ranges
from peer_dist.kernels.picks import Picks

_BLOCK = 1 << 24  # bytes of rows that are put together at a time, on their way to or from a disk or a GPU
_SETTLED = 16  # steps after the cache was filled until the room for staged rows is first looked at
_ROOM = 1.25  # of a buffer for staged rows, over what the passes needed for which it was made

Parts = Mapping[str, Tensor]
"""What there is of a table's rows, by name: ``weights``, the ``scales`` of eight bits, and the optimizer's states."""

_READ = ("weights", "scales")  # the parts that kernels read


class Near(NamedTuple):
    """Tables that kernels can read, and which of their rows each token reads.

    Attributes:
        picks: of rows of these tables.
        tables: ``[rows, columns]`` each, on the picks' device; codes, where they have eight bits.
        scales: of each, ``[rows]``; None where it has none.
    """

    picks: Picks
    tables: list[Tensor]
    scales: list[Tensor | None]


class FarTraffic(NamedTuple):
    """What training passes and steps asked of the memory in which rows lie.

    Attributes:
        hits: rows that passes found near; one that several tokens of a pass picked counts once.
        misses: rows that had to be fetched.
        read: bytes of rows read where they lie: for passes, for steps and into the cache.
        written: bytes of rows written there.
    """

    hits: int
    misses: int
    read: int
    written: int

    def __add__(self, other: object) -> FarTraffic:
        """The sums."""
        return FarTraffic(*map(sum, zip(self, other))) if isinstance(other, FarTraffic) else NotImplemented


class RowStep(NamedTuple):
    """How some rows of a table are stepped.

    Attributes:
        table: one of the pool's.
        rows: ``[touched]`` int64, ascending, each once, near the kernels.
        values: ``[touched, columns]``, their gradients.
        squares: ``[touched]`` float32 as :func:`~peer_dist.kernels.updates.update_rows` takes them, or None.
        update: steps rows of ``(parts, values, rows, numbers, squares)``, as ``update_rows`` names them, of which
            ``rows`` or ``numbers`` may be None.
    """

    table: Tensor
    rows: Tensor
    values: Tensor
    squares: Tensor | None
    update: Callable[[Parts, Tensor, Tensor | None, Tensor | None, Tensor | None], None]


_P = ParamSpec("_P")
_R = TypeVar("_R")


def _one_at_a_time(method: Callable[Concatenate[FarRows, _P], _R]) -> Callable[Concatenate[FarRows, _P], _R]:
    """Threads that use a pool wait for each other here: each finds its rows, and leaves the others theirs."""

    @functools.wraps(method)
    def call(self: FarRows, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        with self._lock:
            return method(self, *args, **kwargs)

    return call


class _Buffer:
    """Of each table the rows near the kernels: those that are kept, and those staged for passes under way."""

    def __init__(self, far: Sequence[Parts], kept: int, staged: int, device: torch.device) -> None:
        self.kept, self.staged = kept, staged
        self.tables = [{part: _empty(kept + staged, far[part], device) for part in _READ if part in far} for far in far]
        self.ranges = Ranges(kept, kept + staged)


@dataclass
class _Staged:
    """What was found out about some picks, and their rows, while anybody refers to it.

    Attributes:
        steps, refreshed: of the pool, by which near rows change.
        expert: the picks' rows in the buffer's tables.
        missed: ``[n]`` int64 ascending, the rows in its range.
        cost: of the pass, until that is counted.
        version: of the picks.
        ahead: states of the missed rows that are read while the backward pass goes on.
    """

    steps: int
    refreshed: int
    expert: Tensor
    missed: Tensor
    buffer: _Buffer
    range: Range
    cost: FarTraffic
    version: int = 0
    ahead: Ahead | None = None


@dataclass
class _Sent:
    """A gradient whose far rows are copied to the host before the step.

    Attributes:
        gradient: ``[touched, columns]``, of which they are.
        host: the numbers and gradients of the rows that are not kept, once they are there.
    """

    gradient: Tensor
    host: tuple[Tensor, Tensor] | None = None


class FarRows:
    """What holds the rows of tables that the same picks read: a pool.

    Some rows are kept near, with their scales and all that an optimizer keeps of them, and are stepped there; where
    they lie they are old until :meth:`flush`. The others are staged for each pass, found again by its backward pass,
    and stepped where they lie, by a thread in the background. Everything that needs the rows waits for that thread, and
    has its error.

    A copy of a table (``copy.deepcopy``, pickle, ``detach``) is an ordinary CPU tensor of what lies there: to be made
    after a :meth:`flush`.

    Args:
        place: where they lie.
        tables: ``[rows, columns]`` each, made by ``place``, their scales too.

    Attributes:
        ahead_bytes: of states that are read from a disk from the moment a backward pass begins, for the step after it,
            at most. Meant for who steps after each pass: each backward pass reads anew.
        sends_ahead: whether gradients are worth a :meth:`send_ahead`.
    """

    def __init__(self, place: Place, tables: Sequence[Tensor]) -> None:
        self.place = place
        self._lock = threading.RLock()
        self._far: list[dict[str, Tensor]] = [{} for _ in tables]
        self._public: list[dict[str, Tensor]] = [{} for _ in tables]  # the same, whose writers torch counts
        for number, table in enumerate(tables):
            scales = scales_of(table)
            self._own(number, {"weights": table, **({} if scales is None else {"scales": scales})})
            table.far_rows = self  # type: ignore[attr-defined]
            table.far_number = number  # type: ignore[attr-defined]
        self._device = place.device
        self._job: Job | None = None
        self._traffic = FarTraffic(0, 0, 0, 0)
        self._steps = 0
        self._refreshed = 0  # times that kept rows were read again
        self.ahead_bytes = 0
        self.sends_ahead = place.device.type == "cuda"  # elsewhere they are with the host
        self._stale = False  # whether kept rows are to be read again
        self._versions = self._written()
        self._forget()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()  # what is pickled along with a table

    def _own(self, number: int, parts: Parts) -> None:
        for part, tensor in parts.items():
            self._far[number][part] = tensor.data  # has a count of its own
            self._public[number][part] = tensor.detach()  # has the tensor's, but does not refer to this object

    def _forget(self) -> None:
        """Keep no row."""
        width = sum(_width(tensor) for parts in self._far for tensor in parts.values())
        capacity = self.place.cache_bytes // max(width, 1)
        self._hot = Hot(len(self._far[0]["weights"]), capacity, self._device)
        self._dirty = torch.zeros(self._hot.capacity, dtype=torch.bool, device=self._device)
        self._states: list[dict[str, Tensor]] | None = None  # of kept rows, from the first on
        self._staged = WeakTensorKeyDictionary()  # Picks.expert to what was staged for it
        self._used = WeakTensorKeyDictionary()  # renumbered picks, whose rows must stay while kernels have them
        self._sent: dict[int, _Sent] = {}  # by the number of the table
        self._last: _Staged | None = None  # of the last training pass, whose step need not read its weights again
        self._buffer = _Buffer(self._far, 0, 0, self._device)
        self._peak = 0
        self._full = 0  # steps since every place is taken

    @property
    def device(self) -> torch.device:
        """Of the kernels, and of gradients."""
        return self._device

    @_one_at_a_time
    def keep(self, table: Tensor, states: Parts) -> None:
        """Say all that an optimizer keeps of a table's rows beside the weights: ``[rows, ...]``, made by the place.
        To say it again costs nothing.
        """
        number = self._number(table)
        known = {part: tensor for part, tensor in self._far[number].items() if part not in _READ}
        if known.keys() == states.keys() and all(known[part].data_ptr() == states[part].data_ptr() for part in known):
            return
        self.flush()
        for part in known:
            del self._far[number][part], self._public[number][part]
        self._own(number, states)
        self._versions = self._written()
        self._forget()

    @_one_at_a_time
    @torch.no_grad()
    def near(self, picks: Picks, tables: Sequence[Tensor]) -> Near:
        """Some of its tables with the rows that these picks read; see :func:`peer_dist.kernels.far.near`.

        They hold these rows while the picks that it returns are referred to, or those that were given, until the next
        step.
        """
        with torch.inference_mode(False):  # what is kept outlives it
            numbers = [self._number(table) for table in tables]
            if picks.expert.is_meta:
                far = [self._far[number] for number in numbers]
                return Near(
                    picks,
                    [parts["weights"].to("meta") for parts in far],
                    [parts["scales"].to("meta") if "scales" in parts else None for parts in far],
                )
            self._ready(picks.expert.device)
            staged = self._found(picks.expert) or self._stage(picks.expert)
            near = [staged.buffer.tables[number] for number in numbers]
            return Near(
                Picks(picks.offsets, staged.expert),
                [parts["weights"] for parts in near],
                [parts.get("scales") for parts in near],
            )

    @_one_at_a_time
    @torch.no_grad()
    def step(self, steps: Sequence[RowStep]) -> None:
        """Step rows of its tables, each table once, in the background."""
        if not steps:
            return
        device = steps[0].rows.device
        self.stop_ahead()
        self._ready(device)
        last, self._last = self._last, None
        if last is not None and (last.steps, last.refreshed) != (self._steps, self._refreshed):
            last = None
        all_sent, self._sent = self._sent, {}
        sent_of = [self._usable(all_sent.get(self._number(step.table)), step) for step in steps]
        self._steps += 1  # staged rows are old from now on
        slots_of = [self._hot.slots(step.rows) for step in steps]
        for slots in slots_of:
            self._dirty[slots[slots >= 0]] = True
        touched = steps[0].rows
        if not all(touched.shape == step.rows.shape and torch.equal(touched, step.rows) for step in steps[1:]):
            touched = torch.unique(torch.cat([step.rows for step in steps]))
        exchange = self._hot.step(touched)
        old = self._dirty[exchange.slots] & (exchange.going >= 0)
        self._dirty[exchange.slots] = False
        if len(exchange.coming) and self._states is None:  # from now on rows are kept; no pass is under way, as a rule
            self._buffer = _Buffer(self._far, self._hot.capacity, self._room(0), self._device)
            self._states = [
                {part: _empty(self._hot.capacity, far[part], self._device) for part in far if part not in _READ}
                for far in self._far
            ]
        elif 0 < self._hot.capacity == self._hot.used:
            self._shrink()

        def work() -> None:
            for step, slots, sent in zip(steps, slots_of, sent_of):
                self._step_kept(step, slots)
                self._step_far(step, slots, last, sent)
            self._exchange(exchange, old)

        self._job = Job(work, device)

    @_one_at_a_time
    @torch.no_grad()
    def flush(self) -> None:
        """Write the rows that are kept to where they lie. What lies there is the truth then, and whoever writes to it
        before the next pass or step is heard by that.
        """
        self._drop_reading()  # who writes then may use the mapping
        self._settle()
        if self._device.type == "cuda":  # whose kernels may still read over the bus
            torch.cuda.current_stream(self._device).synchronize()
        slots = self._dirty.nonzero()[:, 0]
        rows, order = self._hot.rows[slots].sort()
        self._write_back(rows, slots[order])
        self._dirty.zero_()
        self._stale = True

    @_one_at_a_time
    @torch.no_grad()
    def send_ahead(self, table: Tensor, rows: Tensor, values: Tensor) -> None:
        """Begin to copy to the host what a step will need there, if it is given these rows and values of a gradient."""
        sent, slots = _Sent(values), self._hot.slots(rows)  # now: a step changes places before the thread comes to this

        def work() -> None:
            away = (slots < 0).nonzero()[:, 0]
            sent.host = _on_host(rows[away]), _on_host(values[away])

        self._sent[self._number(table)] = sent
        Job(work, rows.device)  # the step's comes after it, and does without where it failed

    @_one_at_a_time
    def stop_ahead(self) -> None:
        """Read no more for a step: it begins, and reads what it needs."""
        if self._last is not None and self._last.ahead is not None:
            self._last.ahead.stop()

    @_one_at_a_time
    def drop_ahead(self) -> None:
        """Forget what was read and sent for a step that is not taken."""
        self._drop_reading()
        self._sent.clear()

    def _drop_reading(self) -> None:
        """Nothing is being read afterwards."""
        if self._last is not None and self._last.ahead is not None:
            self._last.ahead.drop()
            self._last.ahead = None

    @_one_at_a_time
    def traffic(self) -> FarTraffic:
        """What training asked of the far memory since the last call; of passes whose backward pass has begun. Waits for
        the step in the background.
        """
        self._wait()
        traffic, self._traffic = self._traffic, FarTraffic(0, 0, 0, 0)
        return traffic

    def near_tensors(self) -> Iterator[Tensor]:
        """All memory near the kernels: of rows and of numbers about them."""
        for parts in [*self._buffer.tables, *(self._states or ())]:
            yield from parts.values()
        yield from self._hot.tensors()
        yield self._dirty

    def ahead_tensors(self) -> Iterator[Tensor]:
        """The host's memory of what is read and sent for the next step."""
        for sent in self._sent.values():
            yield from sent.host or ()
        if self._last is not None and self._last.ahead is not None:
            yield from self._last.ahead.tensors()

    # -----------------------------------------------------------------------------------------------------------------
    # Whether what is near is true.

    def _number(self, table: Tensor) -> int:
        number: int = table.far_number  # type: ignore[attr-defined]
        return number

    def _written(self) -> list[int]:
        return [tensor._version for parts in self._public for tensor in parts.values()]

    def _wait(self) -> None:
        """For the job in the background. One that failed fails all that follow too: its rows are half stepped."""
        if self._job is not None:
            self._job.wait()
            self._job = None

    def _settle(self) -> None:
        """Wait, and hear who wrote to where rows lie."""
        stepped = self._job is not None
        self._wait()
        if self._versions == self._written():
            return
        if stepped or bool(self._dirty.any()):
            raise RuntimeError(
                f"somebody wrote to a far table of {list(self._far[0]['weights'].shape)}, or to its optimizer's "
                "states, while newer rows of it were near the kernels or on their way: call FarRows.flush "
                "(TableOptimizer.state does) before, so that these are not lost"
            )
        self._stale, self._versions = True, self._written()

    def _ready(self, device: torch.device) -> None:
        """Have the job done, and rows on this device that are true."""
        self._settle()
        if device != self._device:
            self.flush()
            self._device = device
            self._forget()
        if self._stale:
            self._refreshed += 1
            rows, slots = self._hot.rows[: self._hot.used].sort()
            self._read_kept(rows, slots)
            self._stale = False

    # -----------------------------------------------------------------------------------------------------------------
    # Passes.

    def _found(self, expert: Tensor) -> _Staged | None:
        """What a forward pass has staged for its backward pass."""
        found: _Staged | None = None if expert.is_inference() else self._staged.get(expert)
        if found is None or found.version != expert._version:
            return None
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward and found.steps != self._steps:
            raise RuntimeError("rows of a far table were stepped between a forward pass and its backward pass")
        if (found.steps, found.refreshed) != (self._steps, self._refreshed):
            return None
        if in_backward:  # it was a training pass
            self._traffic, found.cost = self._traffic + found.cost, FarTraffic(0, 0, 0, 0)
            if self._last is not found:
                self._drop_reading()
                self._last = found
                found.ahead = self._read_ahead(found.missed)
        return found

    def _read_ahead(self, rows: Tensor) -> Ahead | None:
        if not self.ahead_bytes or not len(rows):
            return None
        states = [
            {part: tensor for part, tensor in parts.items() if part not in _READ and disk.is_mapped(tensor)}
            for parts in self._far
        ]
        return Ahead(states, rows, self.ahead_bytes, self._block, self._device) if any(states) else None

    def _stage(self, expert: Tensor) -> _Staged:
        self._drop_reading()
        self._last = None  # its room may be needed
        touched, inverse = torch.unique(expert, return_inverse=True)
        absent = expert.is_cuda and len(touched) > 0 and int(touched[0]) < 0  # picks that are not there are of row -1
        if absent:
            touched, inverse = touched[1:], inverse - 1
        slots = self._hot.slots(touched)
        missed = (slots < 0).nonzero()[:, 0]
        count = len(missed)
        range_ = self._take(count)
        buffer = self._buffer
        slots[missed] = torch.arange(range_.begin, range_.end, dtype=torch.int64, device=slots.device)
        rows = touched[missed]
        size = 0
        for far, near in zip(self._far, buffer.tables):
            for part, tensor in near.items():
                self._fetch(far[part], rows, tensor[range_.begin : range_.end])
                size += count * _width(tensor)
        numbers = slots[inverse.clamp(min=0)].where(inverse >= 0, -1) if absent else slots.index_select(0, inverse)
        cost = FarTraffic(len(touched) - count, count, size, 0)
        if torch._C._current_graph_task_id() != -1:  # a checkpoint's second forward pass: the first had the same to do
            cost = cost + cost
        staged = _Staged(self._steps, self._refreshed, numbers, rows, buffer, range_, cost)
        if not expert.is_inference():  # nobody counts the changes of those
            staged.version = expert._version
            self._staged[expert] = staged
        self._used[numbers] = range_
        return staged

    def _take(self, count: int) -> Range:
        """A range of the buffer; of a larger one from now on where this has no room. Passes under way keep the old."""
        range_ = self._buffer.ranges.take(count)
        self._peak = max(self._peak, self._buffer.ranges.taken + (count if range_ is None else 0))
        if range_ is None:
            self._let_stage(self._room(count))
            range_ = self._buffer.ranges.take(count)
            assert range_ is not None
        return range_

    def _let_stage(self, staged: int) -> None:
        """Have a buffer with room for this many staged rows."""
        old = self._buffer
        self._buffer = _Buffer(self._far, old.kept, staged, self._device)
        for near, before in zip(self._buffer.tables, old.tables):
            for part, tensor in near.items():
                tensor[: self._hot.used].copy_(before[part][: self._hot.used])

    def _shrink(self) -> None:
        """Once the cache is full, passes stage fewer rows than before: look now and then what they needed of late."""
        self._full += 1
        if self._full & (self._full - 1):  # ever more seldom: a buffer is copied, and may have to grow again
            return
        if self._full >= _SETTLED and 2 * self._room(0) <= self._buffer.staged:
            self._let_stage(self._room(0))
        self._peak = self._buffer.ranges.taken

    def _room(self, count: int) -> int:
        return min(math.ceil(max(self._peak, count) * _ROOM), max(len(self._far[0]["weights"]), count))

    # -----------------------------------------------------------------------------------------------------------------
    # Steps.

    @staticmethod
    def _usable(sent: _Sent | None, step: RowStep) -> _Sent | None:
        """What was sent, if it is of the gradient that is stepped with."""
        if sent is None:
            return None
        there, here = sent.gradient, step.values
        return sent if (there.data_ptr(), there.shape) == (here.data_ptr(), here.shape) else None

    def _step_kept(self, step: RowStep, slots: Tensor) -> None:
        """Step the rows that are kept, in their ``slots [touched]``; -1 is of no other row."""
        here = (slots >= 0).nonzero()[:, 0]
        if not len(here):
            return
        at, order = slots[here].sort()
        some = here[order]
        squares = None if step.squares is None else step.squares[some]
        step.update(self._kept(self._number(step.table)), step.values[some], at, step.rows[some], squares)

    def _kept(self, number: int) -> dict[str, Tensor]:
        """The parts of a table's kept rows."""
        assert self._states is not None
        near = self._buffer.tables[number]
        return {**{part: tensor[: self._buffer.kept] for part, tensor in near.items()}, **self._states[number]}

    def _step_far(self, step: RowStep, slots: Tensor, last: _Staged | None, sent: _Sent | None) -> None:
        """Step the other rows, where they lie. A disk is not asked again for what the ``last`` pass has staged."""
        some = (slots < 0).nonzero()[:, 0]

        def here(tensor: Tensor) -> Tensor:
            return _on_host(tensor if len(some) == len(tensor) else tensor[some])

        number = self._number(step.table)
        far = self._far[number]
        host = None if sent is None else sent.host
        rows, values = (here(step.rows), here(step.values)) if host is None else host
        squares = None if step.squares is None else here(step.squares)
        written = read = len(rows) * sum(map(_width, far.values()))
        if not any(map(disk.is_mapped, far.values())):
            step.update(far, values, rows, None, squares)
        else:
            for block in self._blocks(len(rows)):
                numbers = rows[block]
                parts, saved = self._read_parts(number, numbers, last)
                read -= saved
                step.update(parts, values[block], None, numbers, None if squares is None else squares[block])
                for part, tensor in parts.items():
                    _write(far[part], numbers, tensor)
        self._traffic = self._traffic + FarTraffic(0, 0, read, written)

    def _read_parts(self, number: int, rows: Tensor, last: _Staged | None) -> tuple[dict[str, Tensor], int]:
        """All parts of some rows of a table, and the bytes of them that were near."""
        far = self._far[number]
        if last is None or not len(last.missed):
            return {part: _read(tensor, rows) for part, tensor in far.items()}, 0
        missed = last.missed.to("cpu")
        place = torch.searchsorted(missed, rows).clamp_(max=len(missed) - 1)
        found = missed[place] == rows
        there = (~found).nonzero()[:, 0]
        here = found.nonzero()[:, 0]
        begin, end = int(place[0]), int(place[-1]) + 1
        ahead = last.ahead if len(here) == len(rows) == end - begin else None
        parts, saved = {}, 0
        for part, tensor in far.items():
            early = None if ahead is None else ahead.take(number, part, begin, end)
            if early is not None:
                parts[part] = early
                continue
            near = last.buffer.tables[number].get(part)
            if near is None:
                parts[part] = _read(tensor, rows)
                continue
            values = torch.empty(len(rows), *tensor.shape[1:], dtype=tensor.dtype, device="cpu")
            values[here] = near[(place[here] + last.range.begin).to(near.device)].to("cpu")
            values[there] = _read(tensor, rows[there])
            parts[part] = values
            saved += len(here) * _width(tensor)
        return parts, saved

    def _exchange(self, exchange: Exchange, old: Tensor) -> None:
        """Let rows go, of which those that are newer than where they lie are written back, and others come."""
        rows, order = exchange.going[old].sort()
        self._write_back(rows, exchange.slots[old][order])
        rows, order = exchange.coming.sort()
        self._read_kept(rows, exchange.slots[order])

    def _write_back(self, rows: Tensor, slots: Tensor) -> None:
        """Write kept rows, in ascending order, to where they lie."""
        if not len(rows):
            return
        for block in self._blocks(len(rows)):
            for number, far in enumerate(self._far):
                for part, tensor in self._kept(number).items():
                    _write(far[part], rows[block].to("cpu"), _on_host(tensor.index_select(0, slots[block])))
        self._traffic = self._traffic + FarTraffic(0, 0, 0, len(rows) * self._row_bytes())

    def _read_kept(self, rows: Tensor, slots: Tensor) -> None:
        """Read rows, in ascending order, into places."""
        if not len(rows):
            return
        for block in self._blocks(len(rows)):
            for number, far in enumerate(self._far):
                for part, tensor in self._kept(number).items():
                    values = _read(far[part], rows[block].to("cpu"), pinned=tensor.is_cuda)
                    tensor.index_copy_(0, slots[block], values.to(tensor.device))
        self._traffic = self._traffic + FarTraffic(0, 0, len(rows) * self._row_bytes(), 0)

    # -----------------------------------------------------------------------------------------------------------------
    # Journeys.

    def _fetch(self, far: Tensor, rows: Tensor, out: Tensor) -> None:
        """Read rows into ``out``, near the kernels."""
        if not out.numel():
            return
        if not out.is_cuda:
            _read(far, rows, out)
            return
        if self.place.fetch == "direct" and far.is_pinned():
            from peer_dist.kernels import triton  # late, as in peer_dist.kernels.backend

            if triton.available():
                triton.rows.gather_rows(far, rows, out)
                return
        numbers = rows.to("cpu")
        for block in self._blocks(len(rows)):
            out[block].copy_(_read(far, numbers[block], pinned=True), non_blocking=True)

    def _row_bytes(self) -> int:
        return sum(_width(tensor) for parts in self._far for tensor in parts.values())

    @property
    def _block(self) -> int:
        """Rows that are put together at a time."""
        return max(1, _BLOCK // max(1, self._row_bytes()))

    def _blocks(self, count: int) -> list[slice]:
        size = self._block
        return [slice(begin, min(begin + size, count)) for begin in range(0, count, size)]


def _width(tensor: Tensor) -> int:
    """Bytes of a row."""
    return math.prod(tensor.shape[1:]) * tensor.element_size()


def _empty(rows: int, like: Tensor, device: torch.device) -> Tensor:
    return huge_pages(torch.empty(rows, *like.shape[1:], dtype=like.dtype, device=device))


def _read(far: Tensor, rows: Tensor, out: Tensor | None = None, *, pinned: bool = False) -> Tensor:
    """Ascending rows ``[n]`` of the CPU, in one piece there."""
    if out is None:
        out = torch.empty(len(rows), *far.shape[1:], dtype=far.dtype, device="cpu", pin_memory=pinned)
    if disk.is_mapped(far):
        disk.read_rows(far, rows, out)
    else:
        torch.index_select(far, 0, rows, out=out)
    return out


def _on_host(tensor: Tensor) -> Tensor:
    """The tensor on the CPU; from a GPU into pinned memory, which the bus is used whole for."""
    if not tensor.is_cuda:
        return tensor
    out = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
    out.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return out


def _write(far: Tensor, rows: Tensor, values: Tensor) -> None:
    if disk.is_mapped(far):
        disk.write_rows(far, rows, values)
    else:
        far.index_copy_(0, rows, values)
