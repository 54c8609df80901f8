"""The tests of test_gpu.py on a device that is pretended, in a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path


def test_on_a_gpu_that_is_not_there():
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    command += ["-o", "addopts=--import-mode=importlib"]  # shapes are checked by other tests
    ran = subprocess.run(
        [*command, Path(__file__).with_name("test_gpu.py")], cwd=Path(__file__).parents[2],
        env=os.environ | {"SECATEUR_PRETENDED_GPU": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-5000:]
    passed = re.search(r"(\d+) passed, 2 skipped", ran.stdout)
    assert passed is not None
    assert int(passed[1]) >= 20, "what was skipped was not tried"
