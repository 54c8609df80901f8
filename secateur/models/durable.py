"""Files that survive a kill at any moment, and directories of unfinished runs: one at a time, and only the same one."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from secateur.errors import UsageError
from secateur.models.save import flush

UNFINISHED = ".unfinished"
"""What such a directory is called behind the name of its OUT."""
LOCK, RUN, STATE = "lock", "run.json", "state.json"
"""Files of such a directory: what the process at work holds, what decides the bytes of the run, and how far it is."""
HASHES = {"tokens": "the tokens of the text", "model": "the model", "student": "the student"}
"""What keys of a run stand for, whose values say nothing to anybody."""


def durable(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file all or nothing: under another name, flushed, renamed, and the rename itself flushed."""
    new = path.with_name(path.name + ".new")
    write(new)
    flush(new)
    os.replace(new, path)
    flush(path.parent)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Nobody else works in this directory meanwhile; UsageError where somebody does."""
    lock = FileLock(path / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UsageError(f"another process is at work in {path}; wait for it, or choose another --out") from None
    try:
        yield
    finally:
        lock.release()


def admit(path: Path, run: Mapping[str, Any], *, resume: bool, kept: Callable[[], str]) -> None:
    """Note in a directory which run works in it. ``kept``: what an earlier one of this command left, "" for nothing.

    UsageError where something is left and ``resume`` was not asked for, and where it is a run of something else: the
    keys that differ are named, or that it is another command, whose state nobody here can read.
    """
    run = json.loads(json.dumps(run))  # as it will be read back: tuples become lists
    if (path / RUN).exists():
        then = json.loads((path / RUN).read_text(encoding="utf-8"))
        if then.keys() != run.keys():
            refuse_other(path, then, run)  # before its state is read, which nobody here can
        if (left := kept()) and not resume:
            raise UsageError(f"{path} holds an unfinished run of {left}; go on with --resume, or delete it first")
        if left:
            refuse_other(path, then, run)
    text = json.dumps(run, indent=2, sort_keys=True) + "\n"
    durable(path / RUN, lambda new: new.write_text(text, encoding="utf-8"))


def unfinished_of(out: Path) -> Path:
    return out.with_name(out.name + UNFINISHED)


def refuse_other(path: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """UsageError where what lies at `path` is not the run that was asked for."""
    if then.keys() != now.keys():
        raise UsageError(f"{path} is a run of another command; repeat that, delete it, or choose another --out")
    if differ := differences(then, now):
        raise UsageError(f"{path} is a run of something else: {'; '.join(differ)}; repeat that request, or delete it")


def differences(then: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Keys of two nested mappings whose values differ, with both values."""
    found = []
    for key in sorted(then.keys() | now.keys()):
        old, new = then.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            what = HASHES.get(f"{prefix}{key}")
            found.append(f"{what} changed" if what else f"{prefix}{key} was {old!r} and is {new!r}")
    return found
