"""SIGKILL at random moments: whatever is on the disk then, going on gives the bytes of an undisturbed run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

DRIVER = Path(__file__).parent / "killed.py"
PRUNE = ["prune", "--sparsity", "0.6", "--samples", "4", "--seq-len", "64"]
TRAIN = ["train", "--tokens", "2048", "--seq-len", "32", "--batch", "4", "--set", "holdout=4", "--set", "checkpoint=2"]
CASES = [
    pytest.param(30, PRUNE, id="prune"),
    pytest.param(30, [*PRUNE, "--low-rank", "4"], id="with branches", marks=pytest.mark.slow),
    pytest.param(8, TRAIN, id="train"),
]


@pytest.mark.parametrize(("kills", "words"), CASES)
def test_killed_at_random_moments(kills, words, model_dir, text_file, files, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    command = [sys.executable, DRIVER, str(kills), "0", tmp_path / "out", *words, model_dir, "--data", text_file]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith(f"{kills} kills, ")
    whole = files(tmp_path / "out.first")
    others = [path for path in tmp_path.iterdir() if path.name != "out.first"]
    assert others
    for path in others:  # finished runs only: nothing unfinished, half written or set aside is left
        assert files(path) == whole
