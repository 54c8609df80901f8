"""Several processes prune one model as one process would, up to the order of sums; none is lost when one dies."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

FLAGS = ["--samples", "9", "--seq-len", "64", "--set", "precision=float32"]  # shares differ in size
DRIVER = Path(__file__).parent / "many.py"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "secateur"]


def python(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


CASES = {
    "sparsegpt, rows shared": (2, ["--method", "sparsegpt", "--pattern", "2:4"]),
    "wanda, four": (4, ["--method", "wanda", "--sparsity", "0.6", "--pattern", "row"]),
    "admm": (2, ["--method", "admm", "--sparsity", "0.6"]),
    "paper": (2, ["--sparsity", "0.5", "--set", "method.mode=paper", "--set", "method.iterations=2"]),
    "closed, four": (4, ["--pattern", "2:4", "--set", "method.iterations=1"]),
    "with branches": (2, ["--method", "sparsegpt", "--pattern", "2:4", "--low-rank", "4"]),
    "magnitude": (2, ["--method", "magnitude", "--sparsity", "0.6"]),
}


def often_enough(case):
    """One case in every run of the tests, the others among the slow ones."""
    return case if case == "closed, four" else pytest.param(case, marks=pytest.mark.slow)


@pytest.mark.parametrize("case", list(map(often_enough, CASES)))
def test_as_one_process_within_rounding(case, run, model_dir, text_file, tmp_path):
    processes, method = CASES[case]
    flags = ["prune", model_dir, *method, "--data", text_file, *FLAGS, "--json"]
    alone = run(*flags, "--out", tmp_path / "one")
    assert alone.code == 0
    ran = python(DRIVER, processes, "none", *flags, "--out", tmp_path / "many")
    assert ran.returncode == 0, ran.stderr[-3000:]
    report = json.loads(ran.stdout)  # one report, of the first process
    assert report["processes"] == processes
    assert report["output_error"]["last"] == pytest.approx(alone.json["output_error"]["last"], rel=1e-4)
    assert run("inspect", tmp_path / "many", "--baseline", model_dir).code == 0
    one, many = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "many"))
    for name, weight in one.items():
        torch.testing.assert_close(many[name], weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["sparsegpt", pytest.param("sparsellm", marks=pytest.mark.slow)])
def test_experts_are_pruned_together(method, run, moe, byte_tokenizer, text_file, tmp_path):
    moe("mixtral", vocab_size=260).save_pretrained(tmp_path / "moe")
    byte_tokenizer.save_pretrained(tmp_path / "moe")
    flags = ["prune", tmp_path / "moe", "--method", method, "--pattern", "2:4", "--data", text_file, *FLAGS, "--json"]
    alone = run(*flags, "--out", tmp_path / "one")
    assert alone.code == 0, alone.err
    ran = python(DRIVER, 2, "none", *flags, "--out", tmp_path / "many")
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert json.loads(ran.stdout)["sparsity"] == alone.json["sparsity"]
    assert json.loads(ran.stdout)["output_error"]["last"] == pytest.approx(alone.json["output_error"]["last"], rel=0.05)
    assert run("inspect", tmp_path / "many", "--baseline", tmp_path / "moe").code == 0


def test_a_process_that_dies_ends_the_run_and_all_go_on(run, model_dir, text_file, files, tmp_path):
    flags = ["prune", model_dir, "--sparsity", "0.6", "--data", text_file, *FLAGS]
    assert python(DRIVER, 2, "none", *flags, "--out", tmp_path / "whole").returncode == 0
    out = tmp_path / "out"
    died = python(DRIVER, 2, "1:1", *flags, "--out", out)
    assert died.returncode != 0
    assert "Traceback" not in died.stderr
    assert "out.unfinished keeps 1 finished blocks: go on with --resume" in died.stderr
    assert not out.exists()
    alone = run(*flags, "--out", out, "--resume")
    assert alone.code == 2
    assert "processes was 2 and is 1" in alone.error
    ran = python(DRIVER, 2, "none", *flags, "--out", out, "--resume", "--json")
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert json.loads(ran.stdout)["resumed_after_blocks"] == 1
    assert files(out) == files(tmp_path / "whole")
    assert not (tmp_path / "out.unfinished").exists()


@pytest.mark.slow
def test_torchrun_itself(model_dir, text_file, tmp_path):
    flags = ["prune", model_dir, "--sparsity", "0.6", "--data", text_file, "--samples", "1", "--seq-len", "64"]
    ran = python(*TORCHRUN, *flags, "--out", tmp_path / "out")
    assert ran.returncode != 0
    assert "secateur: 2 processes for 1 samples; start fewer, or use more samples" in ran.stderr
