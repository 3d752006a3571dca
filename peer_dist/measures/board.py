"""Writes TensorBoard's files, in the caller's thread: an error comes up where it can be dealt with.

torch's SummaryWriter has a thread for it, which ends at the first error, with a traceback, and from which no later call
recovers.
"""

from __future__ import annotations

import itertools
import os
import socket
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

_SECONDS = 10.0  # after which waiting records are written
_numbers = itertools.count()


class Board:
    """Records for TensorBoard, in a file of their own in ``folder``.

    What cannot be written is lost. A new file is begun then, because nothing after half a record can be read.

    Args:
        folder: of the files; it is created if need be.
        purge: records of an earlier file from this step on are no longer shown.
    """

    def __init__(self, folder: Path, purge: int) -> None:
        self._folder, self._path = folder, folder
        self._waiting: list[bytes] = []
        self._started = False  # whether the file is there
        self._written_at = time.monotonic()
        self._begin()
        self._record(Event(step=purge, session_log=SessionLog(status=SessionLog.START)))

    def add(self, *summaries: Summary, step: int = 0) -> None:
        """Add values for ``step``, which wait until they are written."""
        self._record(Event(step=step, summary=Summary(value=[value for part in summaries for value in part.value])))

    @property
    def due(self) -> bool:
        """Whether there is something that has waited, or been tried last, long ago."""
        return bool(self._waiting) and time.monotonic() - self._written_at >= _SECONDS

    def flush(self) -> None:
        """Write what waits.

        Raises:
            OSError: it cannot be written.
        """
        self._written_at = time.monotonic()
        if self._started and not os.path.exists(self._path):  # somebody has removed it
            waiting, self._waiting = self._waiting, []
            self._begin()
            self._waiting += waiting
        data, self._waiting = b"".join(self._waiting), []
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab", buffering=0) as file:
                self._started = True
                while data:
                    data = data[file.write(data) :]
        except OSError:
            self._begin()
            raise

    def _begin(self) -> None:
        """Begin a file, with the record that is first in each."""
        ends = f"{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_numbers)}"
        self._path, self._started = self._folder / f"events.out.tfevents.{ends}", False
        self._record(Event(file_version="brain.Event:2"))

    def _record(self, event: Event) -> None:
        event.wall_time = time.time()
        RecordWriter(self).write(event.SerializeToString())

    def write(self, data: bytes) -> None:
        """Take a record's bytes, for TensorBoard's own :class:`RecordWriter`."""
        self._waiting.append(data)
