"""Runs that work on some matrices of a directory: what it promised of the others is promised again, and checked."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

DOWN = "model.layers.0.mlp.down_proj.weight"
W8A8 = ["quantize", "--bits", 8, "--activations", "dynamic", "--method", "rtn"]
TRAIN = ["train", "--method", "fixed", "--tokens", 128, "--seq-len", 16, "--batch", 4, "--set", "holdout=2"]
RUNS = {
    "ignore": [*W8A8, "--ignore", "down_proj"],
    "include": [*W8A8, "--include", "self_attn"],
    "blocks": [*W8A8, "--blocks", "1:2"],
    "prune": ["prune", "--method", "magnitude", "--sparsity", "0.6", "--ignore", "down_proj", "--dtype", "float16"],
    "lora": [*TRAIN, "--lora", 2, "--ignore", "down_proj"],
}


def promises(folder):
    return json.loads((folder / "secateur" / "promise.json").read_text())


def spoil(folder, change):
    """Change that matrix of a directory."""
    held = load_file(folder / "model.safetensors")
    change(held[DOWN])
    save_file(held, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture
def source(sparse, tmp_path):
    """The 2:4 model, one of its weights so small that it becomes zero in float16."""
    source = shutil.copytree(sparse, tmp_path / "source")
    spoil(source, lambda W: W.view(-1)[:4].copy_(W.new_tensor([-1e-9, 1, 0, 0])))
    return source


@pytest.fixture
def half(run, source, text_file, text, tmp_path):
    """OUT of a run."""

    def make(verb, *flags):
        given = ["--data", text_file] if verb == "train" else text
        return tmp_path / "out", run(verb, source, *flags, *given, "--out", tmp_path / "out", "--json")

    return make


@pytest.mark.parametrize("name", RUNS)
def test_what_a_run_leaves_alone_keeps_its_promise(name, half, source, run):
    out, ran = half(*RUNS[name])
    assert ran.code == 0, ran.err
    before, after = promises(source)["linears"], promises(out)
    assert after["linears"].keys() == before.keys()
    assert after["linears"][DOWN] == before[DOWN]
    if RUNS[name][0] == "quantize":
        held = load_file(source / "model.safetensors")
        assert after["zeros"] == sum(int((held[name] == 0).sum()) for name in before)
    assert run("inspect", out).code == 0
    spoil(out, lambda W: W.fill_(1))
    found = run("inspect", out)
    assert found.code == 1
    assert f"{DOWN}: 8192 of 8192 groups of 4 hold more than 2 weights" in found.out


def test_a_source_that_breaks_its_own_promise(half, source):
    spoil(source, lambda W: W.fill_(1))
    out, ran = half(*RUNS["ignore"])
    assert ran.code == 1
    assert f"{source} breaks a promise of its own, {DOWN}: 8192 of 8192 groups" in ran.error
    assert not out.exists()


def test_a_training_that_ends_a_promise_says_so(half):
    out, ran = half(*TRAIN, "--ignore", "down_proj")
    assert ran.code == 0, ran.err
    assert len(promises(out)["linears"]) == 12
    assert f"2 matrices that {out.parent / 'source'} promises sparse were outside" in ran.json["warnings"][-1]
    assert DOWN in ran.json["warnings"][-1]


def test_all_that_is_two_of_four_is_packed_for_gpus(half, run, tmp_path):
    from secateur.models.sparse24 import dense_state

    out, ran = half(*RUNS["ignore"])
    assert ran.code == 0, ran.err
    ran = run("export", out, "--to", "torch-2:4", "--out", tmp_path / "packed", "--json")
    assert ran.code == 0, ran.err
    assert len(ran.json["matrices"]) == 14
    assert ran.json["left_dense"] == []
    held, state = load_file(out / "model.safetensors"), dense_state(tmp_path / "packed")
    assert all((state[name] == held[name]).all() for name in held)
