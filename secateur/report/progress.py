"""One progress bar with the time left; plain lines where nobody looks at a terminal. Always on stderr.

Library code takes any ``Progress``. A run is a sequence of stages; in a stage of known length, ``update`` tells how far
it is:

    progress.stage("prune")
    for record, _ in prune_blocks(...): progress.update(record.index + 1, 30, f"error {record.output_error:.3f}")
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

A_DAY = 24 * 3600.0


class Progress(Protocol):
    """Told what begins, how much of it is done, and what should stay to be read."""

    def stage(self, name: str) -> None: ...
    def update(self, done: int, total: int, detail: str = "") -> None: ...
    def note(self, line: str) -> None: ...


class Silent:
    """Says nothing."""

    def stage(self, name: str) -> None:
        pass

    def update(self, done: int, total: int, detail: str = "") -> None:
        pass

    def note(self, line: str) -> None:
        pass


class Lines:
    """A plain line for each stage and for an update every few seconds, for log files and pipes."""

    def __init__(self, stream: TextIO, every: float = 2.0) -> None:
        self._stream, self._every = stream, every
        self._name, self._last = "", 0.0
        self._first: tuple[int, float] | None = None

    def stage(self, name: str) -> None:
        self._name, self._last, self._first = name, time.monotonic(), None
        print(name, file=self._stream, flush=True)

    def update(self, done: int, total: int, detail: str = "") -> None:
        now = time.monotonic()
        first, start = self._first = self._first or (done, now)  # an earlier run may have done what was before
        if done < total and now - self._last < self._every:
            return
        self._last = now
        left = timedelta(seconds=round((now - start) / (done - first) * (total - done))) if done > first else None
        parts = [f"{self._name} {done}/{total}", detail, "" if left is None else f"left {left}"]
        print(", ".join(filter(None, parts)), file=self._stream, flush=True)

    def note(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


class Bar:
    """One line on a terminal that is redrawn."""

    def __init__(self, bar: RichProgress) -> None:
        self._bar = bar
        self._task = bar.add_task("", total=None, detail="")

    def stage(self, name: str) -> None:
        self._bar.reset(self._task, total=None, description=name, detail="")

    def update(self, done: int, total: int, detail: str = "") -> None:
        self._bar.update(self._task, completed=done, total=total, detail=detail)

    def note(self, line: str) -> None:
        self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def on_stderr() -> Iterator[Progress]:
    """A bar when stderr is a terminal, else lines."""
    if not sys.stderr.isatty():
        yield Lines(sys.stderr)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}"),
    )
    console = Console(stderr=True)
    with RichProgress(*columns, console=console, transient=True, speed_estimate_period=A_DAY) as bar:
        yield Bar(bar)
