"""Several processes train one model as one process would, and go on where another number of processes stopped."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SMALL = ["--tokens", 1536, "--seq-len", 32, "--batch", 4, "--micro-batch", 1, "--lr", 1e-3, "--set", "holdout=4"]
EXACT = ["--set", "precision=float32", "--set", "refresh=3", "--set", "checkpoint=6"]
BRANCHES = ["--slorb", 8, "--set", "slorb_follow=true"]
DRIVER = Path(__file__).parent / "many.py"
WAYS = {"DDP": [], "FSDP2": ["--set", "shard=true"]}


def two(*arguments: object, death: str = "none") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    command = [sys.executable, DRIVER, "2", death, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def flags(model_dir, text_file):
    return ["train", model_dir, "--data", text_file, *SMALL, *EXACT, *BRANCHES, "--json"]


@pytest.fixture(scope="module")
def alone(flags, run, tmp_path_factory):
    """``alone("wanda")``: what one process saves with that metric, and its report; trained once."""

    @cache
    def train(metric):
        out = tmp_path_factory.mktemp("alone") / "out"
        ran = run(*flags, "--set", f"metric={metric}", "--out", out)
        assert ran.code == 0, ran.err
        return out, ran.json

    return train


def apart(one, other):
    """The largest difference of two saved models' weights, and the share of zeros that lie elsewhere."""
    files = ("model.safetensors", "low_rank/adapter_model.safetensors")
    pairs = [(load_file(one / file), load_file(other / file)) for file in files]
    assert all(a.keys() == b.keys() for a, b in pairs)
    tensors = [(a[name], b[name]) for a, b in pairs for name in a]
    moved = sum(((x == 0) != (y == 0)).sum().item() for x, y in tensors) / sum(x.numel() for x, _ in tensors)
    return max((x - y).abs().max().item() for x, y in tensors), moved


@pytest.mark.parametrize("metric", ["magnitude", "wanda"])
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_train_as_one(way, metric, flags, alone, run, tmp_path):
    one, expected = alone(metric)
    ran = two(*flags, *WAYS[way], "--set", f"metric={metric}", "--out", tmp_path / "two")
    assert ran.returncode == 0, ran.stderr[-3000:]
    report = json.loads(ran.stdout)  # one report, of the first process
    assert report["processes"] == 2
    for place in ("before", "after"):
        divergence = report["held_out"][place]["divergence"]
        assert divergence == pytest.approx(expected["held_out"][place]["divergence"], rel=1e-3)
    difference, moved = apart(one, tmp_path / "two")
    assert difference < 1e-3
    assert moved < 1e-3
    assert run("inspect", tmp_path / "two").code == 0


def test_two_processes_train_adapters_as_one(flags, run, tmp_path):
    adapters = [*flags[: flags.index("--slorb")], "--method", "fixed", "--lora", 4, "--json"]
    alone = run(*adapters, "--out", tmp_path / "one")
    assert alone.code == 0, alone.err
    ran = two(*adapters, "--out", tmp_path / "two")
    assert ran.returncode == 0, ran.stderr[-3000:]
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name] == 0, other[name] == 0) for name in one)
    assert max((one[name] - other[name]).abs().max().item() for name in one) < 1e-4


def test_two_go_on_where_one_was_killed(flags, alone, killed_at, tmp_path):
    out = tmp_path / "out"
    killed_at(7, *flags, "--out", out)
    ran = two(*flags, "--out", out, "--resume")
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert json.loads(ran.stdout)["resumed_after_steps"] == 6
    assert apart(alone("magnitude")[0], out)[0] < 1e-3


@pytest.mark.parametrize("way", WAYS)
def test_one_goes_on_where_two_were_killed(way, flags, alone, run, tmp_path):
    out = tmp_path / "out"
    died = two(*flags, *WAYS[way], "--out", out, death="1:7")
    assert died.returncode != 0
    assert not out.exists()
    ran = run(*flags, "--out", out, "--resume")
    assert ran.code == 0, ran.err
    assert ran.json["resumed_after_steps"] == 6
    assert apart(alone("magnitude")[0], out)[0] < 1e-3


def test_one_process_alone_shards_nothing(flags, run, tmp_path):
    ran = run(*flags, "--set", "shard=true", "--out", tmp_path / "out")
    assert ran.code == 2
    assert "start it with torchrun" in ran.error


def test_a_batch_must_divide(flags, tmp_path):
    ran = two(*flags, "--batch", 3, "--out", tmp_path / "out")
    assert ran.returncode != 0
    assert "batch 3 does not divide over 2 processes" in ran.stderr
