"""SIGKILL at random moments: whatever is on the disk then, going on gives the bytes of an undisturbed run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

DRIVER = Path(__file__).parent / "killed.py"
KILLS = 30
WITH_BRANCHES = pytest.param(["--low-rank", "4"], id="with branches", marks=pytest.mark.slow)


@pytest.mark.parametrize("more", [pytest.param([], id="default"), WITH_BRANCHES])
def test_killed_at_random_moments(more, model_dir, text_file, files, tmp_path):
    flags = [model_dir, *more, "--sparsity", "0.6", "--data", text_file, "--samples", "4", "--seq-len", "64"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    command = [sys.executable, DRIVER, str(KILLS), "0", tmp_path / "out", *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith(f"{KILLS} kills, ")
    whole = files(tmp_path / "out.first")
    others = [path for path in tmp_path.iterdir() if path.name != "out.first"]
    assert others
    for path in others:  # finished runs only: nothing unfinished, half written or set aside is left
        assert files(path) == whole
