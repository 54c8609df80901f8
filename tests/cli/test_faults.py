"""What the machine does to a run: disks that fill up, memory that ends, files that change or are not what they claim.

Whatever happens, one line says what, nothing half written is taken for a result, and a run goes on where it stood.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import OutOfMemoryError

from secateur.errors import ModelError

DRIVER = Path(__file__).parent / "limited.py"
TINY = ["--sparsity", "0.6", "--samples", "4", "--seq-len", "64"]
TRAINING = ["--tokens", 1024, "--seq-len", 32, "--batch", 4, "--set", "holdout=4", "--set", "checkpoint=2"]


def limited(limit: str, values: list[int], *arguments: object) -> list[dict]:
    """One line of ``limited.py`` for every value."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    command = [sys.executable, DRIVER, limit, json.dumps(values), *arguments]
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_line(ran: dict, *words: str) -> None:
    """It failed, and the last line says so in words that help."""
    assert ran["code"] == 1, ran
    assert "Traceback" not in ran["err"]
    last = ran["err"].strip().splitlines()[-1]
    assert last.startswith("secateur: ")
    assert not [word for word in words if word not in last], last


@pytest.fixture
def one_thread():
    """As the runs under limits have: two threads may add up in another order."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def whole(run, one_thread, model_dir, text_file, files, tmp_path):
    """What an undisturbed run writes."""
    assert run("prune", model_dir, *TINY, "--data", text_file, "--out", tmp_path / "whole").code == 0
    return files(tmp_path / "whole")


def test_every_file_may_be_too_large(model_dir, text_file, files, whole, tmp_path):
    """A limit on the size of files stops a run at each of its writes, the later ones resumed from the earlier."""
    out = tmp_path / "out"
    sizes = sorted({len(content) for content in whole.values()})
    limits = [0, 100, 3_000, *(size - 1 for size in sizes if size > 3_000)]
    ended = limited(
        "FSIZE", [*limits, 1 << 30], "prune", model_dir, *TINY, "--data", text_file, "--out", out, "--resume"
    )
    for ran in ended[:-1]:
        check_line(ran, "File too large", "free space")
    assert "going on after 2 blocks" in ended[-1]["err"]
    assert ended[-1]["code"] == 0, ended[-1]
    assert files(out) == whole
    assert {path.name for path in tmp_path.iterdir()} == {"out", "whole"}


@pytest.fixture
def disk(tmp_path):
    """``disk(bytes)``: a disk of its own, which may be made larger later. Only root may mount one."""
    place = tmp_path / "disk"
    place.mkdir()

    def resize(size: int) -> Path:
        option = "remount," if place.is_mount() else ""
        command = ["mount", "-t", "tmpfs", "-o", f"{option}size={size}", "tmpfs", place]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no disk of limited size can be mounted here: {error}")
        return place

    yield resize
    if place.is_mount():
        subprocess.run(["umount", place], check=True)


FULL = {"prune": ((1, 8, 24, 40), TINY), "train": ((1, 60, 100, 160), TRAINING)}
"""Pages of the disks on which a run fails, one after the other; the two last ones hold one state of a training."""


@pytest.mark.parametrize("verb", FULL)
def test_the_disk_is_full(verb, run, one_thread, model_dir, text_file, files, disk, tmp_path):
    sizes, more = FULL[verb]
    flags = [verb, model_dir, *more, "--data", text_file]
    assert run(*flags, "--out", tmp_path / "whole").code == 0
    for pages in sizes:
        place = disk(4096 * pages)
        ran = run(*flags, "--resume", "--out", place / "out")
        check_line(vars(ran), "No space left", "free space")
        assert not (place / "out").exists()
    place = disk(1 << 24)
    assert run(*flags, "--resume", "--out", place / "out").code == 0
    assert files(place / "out") == files(tmp_path / "whole")
    assert [path.name for path in place.iterdir()] == ["out"]


def test_memory_runs_out(model_dir, text_file, files, whole, tmp_path):
    """Address space above what the libraries have mapped. Where too little is left the interpreter may say anything, or
    a library crash by itself, as oneDNN does (SIGSEGV); even then nothing half done is taken for a result."""
    out = tmp_path / "out"
    limits = [0, 3 * 10**7, 5 * 10**7, 1 << 34]
    ended = limited("AS", limits, "prune", model_dir, *TINY, "--data", text_file, "--out", out, "--resume")
    assert ended[0]["code"] != 0
    assert all("Traceback" not in ran["err"] for ran in ended)
    assert ended[-1]["code"] == 0, ended[-1]
    assert files(out) == whole


FAILED_ALLOCATIONS = [
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to ..."),
    RuntimeError("could not create a primitive"),
    OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
]


@pytest.mark.parametrize("error", FAILED_ALLOCATIONS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("wrapped", [False, True])
def test_an_allocation_that_fails_is_told_as_such(error, wrapped, run, monkeypatch):
    def fail(*_: object) -> None:
        if not wrapped:
            raise error
        try:
            raise error
        except Exception as cause:
            raise ModelError("cannot load it") from cause

    monkeypatch.setattr("secateur.cli.prune.merged", fail)
    check_line(vars(run("prune", "MODEL", "--out", "nowhere")), "memory ran out", "secateur plan", "--offload on")


def test_a_place_that_cannot_be_written(run, model_dir, text_file):
    ran = run("prune", model_dir, *TINY, "--data", text_file, "--out", "/proc/nothing/out")
    check_line(vars(ran), "/proc/nothing", "permissions")


def test_what_is_saved_can_be_read_by_all(run, model_dir, text_file, tmp_path):
    before = os.umask(0o027)
    try:
        assert run("prune", model_dir, *TINY, "--data", text_file, "--out", tmp_path / "out").code == 0
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert modes == {0o640}
