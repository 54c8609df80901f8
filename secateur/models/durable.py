"""Files that survive a kill at any moment, and directories of unfinished runs: one at a time, and only the same one."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from secateur.errors import ArtefactError, UsageError
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


def admit(path: Path, run: Mapping[str, Any], *, resume: bool, kept: Callable[[], int], of: str) -> None:
    """Note in a directory which run works in it. ``kept``: how many ``of`` these an earlier one of this command left.

    UsageError where something is left and ``resume`` was not asked for, and where it is a run of something else: the
    keys that differ are named, or that it is another command, whose state nobody here can read.
    """
    run = json.loads(json.dumps(run))  # as it will be read back: tuples become lists
    if (path / RUN).exists():
        then = json.loads((path / RUN).read_text(encoding="utf-8"))
        if then.keys() != run.keys():
            refuse_other(path, then, run)  # before its state is read, which nobody here can
        if (left := kept()) and not resume:
            raise UsageError(f"{path} holds an unfinished run of {left} {of}; go on with --resume, or delete it first")
        if left:
            refuse_other(path, then, run)
    text = json.dumps(run, indent=2, sort_keys=True) + "\n"
    durable(path / RUN, lambda new: new.write_text(text, encoding="utf-8"))


@contextmanager
def at_work(
    path: Path,
    run: Mapping[str, Any],
    *,
    resume: bool,
    kept: Callable[[], int],
    of: str,
    first: bool,
    wait: Callable[[], object],
) -> Iterator[None]:
    """In a run's directory, locked and admitted. A failure inside leaves it, unless nothing was ``kept``.

    Of several processes the first locks and removes it; the others ``wait`` until it is admitted and until it is done.
    """
    if not first:
        wait()
        yield
        wait()
        return
    path.mkdir(parents=True, exist_ok=True)
    with locked(path):
        admit(path, run, resume=resume, kept=kept, of=of)
        wait()
        try:
            yield
            wait()
        except BaseException as error:
            if left := kept():
                error.add_note(f"{path} keeps {left} {of}: go on with --resume, or delete it")
            else:
                shutil.rmtree(path)
            raise
        shutil.rmtree(path)


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """How far the run in a directory is."""
    durable(path / STATE, lambda new: new.write_text(json.dumps(state), encoding="utf-8"))


def read_state(path: Path, nothing: dict[str, Any]) -> dict[str, Any]:
    """How far it is; ``nothing`` where no state was ever written."""
    file = path / STATE
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else nothing
    except ValueError as error:
        raise unreadable(file, error) from error


def unreadable(path: Path, error: Exception) -> ArtefactError:
    return ArtefactError(f"{path} of an unfinished run is not readable ({error}); delete the directory")


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
