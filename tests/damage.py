"""Damages real files in every way that a seed draws, and watches what their readers make of them.

A reader may refuse what it is given, by a :class:`~peer_dist.mistake.Mistake` whose message is one sentence, or take
it. Anything else that it raises, or that takes long, is a fault of the reader's.
"""

from __future__ import annotations

import random
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peer_dist.mistake import Mistake

PATIENCE = 20  # seconds that a reader may take
LEAST = 10  # inputs of a reader, however busy the machine is
# What a value of a text is replaced by: all of JSON, and of YAML where it is not JSON.
NASTY = (
    *("null", "true", "false", "0", "-1", "1", "3.5", "1e400", "-1e400", "NaN", "Infinity", "-Infinity", "1e-320"),
    *("9223372036854775808", "1" * 40, "9" * 5000, '""', '"x"', '"\\u0000"', '"\\ud800"', '"a\\nb"', '"[red]x"'),
    *("[]", "{}", "[[]]", '{"": null}', "[null]", '[1, "a"]', "[" * 5000, '{"a":' * 5000, '"../../x"', '"/etc/passwd"'),
    *('"' + "n" * 300 + '"', ".inf", ".nan", "1:30", "0o17", "yes", "~", "!!int foo", "!!python/name:os.system", "*a"),
    *("&a [*a]", "2020-99-99", "<<", "-", "'", '"', "\t", "\0", "\ud83d", "@", "%"),
)


@dataclass(frozen=True)
class Reader:
    """What reads some files, and which files of a sample they are.

    Attributes:
        name: for people.
        files: patterns of the files to damage, relative to the sample's folder.
        read: reads them, given that folder.
        seal: makes checksums agree with the damaged files, as who can write the one can the other; applied to half of
            the inputs.
        guarded: whether no change of a byte may be taken, unless sealed.
        text: whether values are replaced by nasty ones too.
        refusals: the errors by which it refuses.
    """

    name: str
    files: tuple[str, ...]
    read: Callable[[Path], Any]
    seal: Callable[[Path], None] | None = None
    guarded: bool = False
    text: bool = False
    refusals: tuple[type[Exception], ...] = (Mistake,)


@dataclass
class Tally:
    """What became of a reader's inputs.

    Attributes:
        taken, refused, faulty: numbers of inputs.
        faults: traceback or complaint, by the last line of it; the first of each kind.
        slowest: seconds that one input took.
    """

    taken: int = 0
    refused: int = 0
    faulty: int = 0
    faults: dict[str, str] = field(default_factory=dict)
    slowest: float = 0.0

    @property
    def tried(self) -> int:
        return self.taken + self.refused + self.faulty


_unraisable: list[str] = []  # what destructors raised, which Python prints as a traceback


class _TookLong(BaseException):
    pass


def _ring(number: int, frame: Any) -> None:
    raise _TookLong


def damaged(data: bytes, draw: random.Random, text: bool) -> bytes:
    """``data`` with one or two of its kinds of damage."""
    for _ in range(draw.choice((1, 1, 1, 2))):
        data = draw.choice(_TEXTS if text and draw.random() < 0.7 else _BYTES)(data, draw)
    return data


def _place(data: bytes, draw: random.Random) -> int:
    """A place in ``data``, often in its head or at its end, where formats keep what matters."""
    size = max(1, len(data))
    return draw.choice((draw.randrange(size), draw.randrange(min(size, 128)), size - 1 - draw.randrange(min(size, 64))))


def _flip(data: bytes, draw: random.Random) -> bytes:
    at = _place(data, draw)
    return data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :] if data else b"\1"


def _set(data: bytes, draw: random.Random) -> bytes:
    at, size = _place(data, draw), draw.choice((1, 2, 4, 8, 64))
    return data[:at] + draw.choice((b"\0", b"\xff", b"\x80", draw.randbytes(1))) * size + data[at + size :]


def _cut(data: bytes, draw: random.Random) -> bytes:
    return data[: _place(data, draw)]


def _behead(data: bytes, draw: random.Random) -> bytes:
    return data[_place(data, draw) :]


def _insert(data: bytes, draw: random.Random) -> bytes:
    at = _place(data, draw)
    return data[:at] + draw.randbytes(draw.choice((1, 3, 8, 200))) + data[at:]


def _swap(data: bytes, draw: random.Random) -> bytes:
    size = draw.choice((1, 2, 4, 8, 16))
    first, second = sorted((_place(data, draw), _place(data, draw)))
    if second + size > len(data) or first + size > second:
        return data[::-1]
    a, b = data[first : first + size], data[second : second + size]
    return data[:first] + b + data[first + size : second] + a + data[second + size :]


def _other(data: bytes, draw: random.Random) -> bytes:
    return draw.choice((b"", b"\0" * len(data), b"null", b"{}", b"[]", b"\x80\x04N.", b"PK\3\4", draw.randbytes(64)))


def _grow(data: bytes, draw: random.Random) -> bytes:
    return data + draw.choice((data, b"\0" * 4096, b"\n", b"garbage", b"{"))


def _spot(text: str, draw: random.Random) -> tuple[int, int]:
    """Begin and end of something between the signs of JSON or YAML."""
    signs = [place for place, sign in enumerate(text) if sign in ":,[]{}\n"] or [0]
    at = draw.randrange(len(signs))
    return signs[at] + 1, signs[at + 1] if at + 1 < len(signs) else len(text)


def _retype(data: bytes, draw: random.Random) -> bytes:
    text = data.decode("utf-8", "replace")
    begin, end = _spot(text, draw)
    return f"{text[:begin]} {draw.choice(NASTY)}{text[end:]}".encode("utf-8", "surrogatepass")


def _repeat(data: bytes, draw: random.Random) -> bytes:
    text = data.decode("utf-8", "replace")
    begin, end = _spot(text, draw)
    _, further = _spot(text[end:], draw)
    part = text[begin : end + further]
    return f"{text[:begin]}{part}{text[begin - 1 : begin]}{part}{text[end + further :]}".encode()


def _drop_line(data: bytes, draw: random.Random) -> bytes:
    lines = data.splitlines(keepends=True) or [b""]
    lines.pop(draw.randrange(len(lines)))
    return b"".join(lines)


def _add_line(data: bytes, draw: random.Random) -> bytes:
    lines = data.splitlines(keepends=True)
    new = draw.choice(NASTY).encode("utf-8", "surrogatepass") + draw.choice((b"\n", b"\r\n", b""))
    lines.insert(
        draw.randrange(len(lines) + 1), draw.choice((new, b'{"step": %b' % new, b"\n", b"\xff\xfe\n", b"\0\n"))
    )
    return b"".join(lines)


_BYTES = (_flip, _flip, _set, _cut, _behead, _insert, _swap, _other, _grow)
_TEXTS = (_retype, _retype, _retype, _repeat, _drop_line, _add_line)


def watch(
    readers: Sequence[Reader], samples: dict[str, Path], seconds: float, seed: int, keep: Path | None = None
) -> dict[str, Tally]:
    """Give each reader its share of the time; what became of its inputs, by its name.

    Args:
        samples: folder of sound files, by the reader's name; each is as it was when this returns.
        seconds: for all readers together.
        keep: a folder for the inputs that brought faults to light.
    """
    tallies = {}
    signal.signal(signal.SIGALRM, _ring)
    sys.unraisablehook = lambda late: _unraisable.append(f"{late.object!r} raised {late.exc_value!r} unheard")
    for reader in readers:
        tallies[reader.name] = _watched(reader, samples[reader.name], seconds / len(readers), seed, keep)
    return tallies


def _watched(reader: Reader, folder: Path, seconds: float, seed: int, keep: Path | None) -> Tally:
    draw, tally = random.Random(f"{reader.name} {seed}"), Tally()
    files = sorted({path for pattern in reader.files for path in folder.glob(pattern) if path.is_file()})
    assert files, f"{reader.name}: no {reader.files} in {folder}"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.is_symlink()}
    reader.read(folder)  # sound files are taken
    end = time.monotonic() + seconds
    while time.monotonic() < end or tally.tried < LEAST:
        path = draw.choice(files)
        data = damaged(before[path], draw, reader.text)
        if data == before[path]:
            continue
        path.write_bytes(data)
        sealed = reader.seal is not None and draw.random() < 0.5
        begin = time.monotonic()
        signal.alarm(PATIENCE)
        try:
            if sealed and reader.seal is not None:
                reader.seal(folder)
            reader.read(folder)
            fault = "a change was not noticed" if reader.guarded and not sealed else ""
            tally.taken += not fault
        except reader.refusals as error:
            fault = _no_sentence(str(error))
            tally.refused += not fault
        except _TookLong:
            fault = f"took more than {PATIENCE} s\n{traceback.format_exc()}"
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            fault = traceback.format_exc()
        finally:
            signal.alarm(0)
        if _unraisable:
            fault = fault or _unraisable[0]
            _unraisable.clear()
        tally.slowest = max(tally.slowest, time.monotonic() - begin)
        if fault:
            tally.faulty += 1
            kind = fault.splitlines()[-1][:100] if "Traceback" in fault else fault[:100]
            tally.faults.setdefault(kind, f"{path.relative_to(folder)}: {data[:200]!r}\n{fault}")
            if keep is not None:
                to = keep / f"{reader.name.replace(' ', '-')}-{len(tally.faults)}"
                shutil.copytree(folder, to, dirs_exist_ok=True)
        for there in folder.rglob("*"):
            if there.is_file() and there not in before:
                there.unlink()
        for file, content in before.items():
            if not file.is_file() or file.read_bytes() != content:
                file.write_bytes(content)
    return tally


def _no_sentence(text: str) -> str:
    """What is wrong with the message of a mistake; '' if it is one sentence."""
    if "\n" in text.strip() or "Traceback" in text:
        return f"no sentence: {text[:300]}"
    if len(text) > 2500:
        return f"a sentence of {len(text)} characters: {text[:300]}"
    if any(ord(char) < 32 and char != "\t" for char in text):
        return f"control characters: {text[:300]!r}"
    return ""


def table(tallies: dict[str, Tally]) -> str:
    """What became of all inputs, a line for each reader."""
    lines = [f"{'reader':24} {'inputs':>8} {'refused':>8} {'taken':>8} {'faults':>7} {'slowest':>8}"]
    for name, tally in tallies.items():
        counts = f"{tally.tried:8,} {tally.refused:8,} {tally.taken:8,} {tally.faulty:7}"
        lines.append(f"{name:24} {counts} {tally.slowest:7.2f}s")
    total: Counter[str] = Counter()
    for tally in tallies.values():
        total.update(inputs=tally.tried, refused=tally.refused, taken=tally.taken, faults=tally.faulty)
    lines.append(f"{'all':24} {total['inputs']:8,} {total['refused']:8,} {total['taken']:8,} {total['faults']:7}")
    return "\n".join(lines)
