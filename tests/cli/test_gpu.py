"""Commands on a GPU, or on one that is pretended (test_pretended_gpu.py), beside the same ones on the CPU."""

import json
import os
import shutil
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import secateur
from secateur.core.solvers import Wanda

PRETENDED = "SECATEUR_PRETENDED_GPU" in os.environ
pytestmark = pytest.mark.gpu

FULL = ["--set", "precision=float32"]
STEPS = [
    *("--tokens", 256, "--seq-len", 32, "--batch", 4, "--micro-batch", 2, "--lr", 1e-2, "--set", "holdout=4"),
    *FULL,
]
SMALL = ["--samples", 4, "--seq-len", 32, *FULL]
PRUNE = {
    "wanda": ["--method", "wanda"],
    "sparsegpt": ["--method", "sparsegpt"],
    "the default": [],
    "paper mode": ["--set", "method.mode=paper", "--set", "method.inner=sparsegpt"],
    "low rank": ["--method", "sparsegpt", "--low-rank", 4],
    "rows": ["--method", "sparsegpt", "--pattern", "row", "--sparsity", 0.5],
}
QUANTIZE = {
    "gptq": ["--bits", 4, "--group-size", 32],
    "joint": ["--bits", 4, "--group-size", 32, "--method", "joint", "--pattern", "2:4"],
    "awq": ["--bits", 4, "--group-size", 32, "--balance", "awq"],
    "static": ["--bits", 8, "--activations", "static", "--balance", "smooth"],
}
TRAIN = {
    "ast": ["--method", "ast"],
    "cast": ["--method", "cast"],
    "admm": ["--method", "admm", "--pattern", "unstructured", "--sparsity", 0.8, "--set", "metric=fisher"],
    "wanda": ["--set", "metric=wanda"],
    "global": ["--pattern", "global", "--sparsity", 0.5],
    "slorb": ["--slorb", 16],
    "adapters": ["--method", "fixed", "--lora", 4],
    "checkpointed": ["--set", "gradient_checkpointing=true", "--set", "scales=2"],
}


@pytest.fixture(scope="module")
def modes():
    """What the pretended device needs around whatever runs on it; skips where there is no device."""
    if not PRETENDED:
        return () if torch.cuda.is_available() else pytest.skip("no CUDA device")
    sys.path.insert(0, str(Path(__file__).parent))
    import pretended
    from accelerate.state import PartialState

    from secateur import runs

    pretended.register()
    PartialState.default_device = property(lambda _: torch.device(pretended.NAME, 0))
    known = runs.resolve_device
    runs.resolve_device = lambda device: device if device == "cuda" else known(device)
    return (pretended.Operations, pretended.Methods)


@contextmanager
def entered(modes):
    with ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode())
        yield


@pytest.fixture
def run(run, modes):
    """The command; on the CPU it is spared the modes, which slow everything down."""

    def command(*args):
        with entered(modes if "cuda" in args else ()):
            return run(*args)

    return command


def work() -> int:
    """Grows when something is computed on the device."""
    if PRETENDED:
        from pretended import Far

        return Far.operations
    return torch.cuda.memory_stats().get("allocation.all.allocated", 0)


def both(run, *command, out=None):
    """What the command says on the CPU and on the GPU, each at a place of that name; the latter computes there."""
    said = []
    for device in ("cpu", "cuda"):
        before = work()
        ran = run(*command, "--device", device, "--json", *(["--out", out / device] if out else []))
        assert ran.code == 0, ran.err
        assert (work() > before) == (device == "cuda")
        said.append(ran.json)
    return said


def same(one, other, share=0.002, within=0.01):
    """Nearly all weights are: rounding may move few of a mask."""
    assert one.keys() == other.keys()
    apart = torch.cat([
        (one[name].float() - other[name].float()).abs().flatten() > within * one[name].float().abs().max()
        for name in one
    ])  # fmt: skip
    assert apart.float().mean() < share


def saved(out):
    return [load_file(place / "model.safetensors") for place in sorted(out.iterdir()) if place.is_dir()]


@pytest.mark.parametrize("flags", PRUNE.values(), ids=PRUNE)
def test_prune(flags, run, sharp_dir, text_file, tmp_path):
    """One block: behind it rounding is amplified."""
    command = ["prune", sharp_dir, "--pattern", "2:4", *flags, "--blocks", "0:1", "--data", text_file, *SMALL]
    both(run, *command, out=tmp_path)
    same(*saved(tmp_path))
    assert run("inspect", tmp_path / "cuda").code == 0


@pytest.mark.parametrize("flags", QUANTIZE.values(), ids=QUANTIZE)
def test_quantize(flags, run, sharp_dir, text_file, tmp_path):
    both(run, "quantize", sharp_dir, *flags, "--data", text_file, *SMALL, out=tmp_path)
    same(*saved(tmp_path), share=0.02)
    assert run("inspect", tmp_path / "cuda").code == 0


@pytest.mark.parametrize("flags", TRAIN.values(), ids=TRAIN)
def test_train(flags, run, sharp_dir, text_file, tmp_path):
    cpu, gpu = both(run, "train", sharp_dir, *flags, "--data", text_file, *STEPS, out=tmp_path)
    assert gpu["held_out"]["after"]["divergence"] == pytest.approx(cpu["held_out"]["after"]["divergence"], rel=0.01)
    same(*saved(tmp_path))
    assert run("inspect", tmp_path / "cuda").code == 0


@pytest.fixture
def there(sharp_dir, modes):
    """A model on the device, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with entered(modes):
        yield AutoModelForCausalLM.from_pretrained(sharp_dir).to("cuda"), AutoTokenizer.from_pretrained(sharp_dir)


@pytest.mark.parametrize("verb", ["prune in memory", "prune", "quantize"])
def test_a_model_that_is_there_already_stays_there(verb, there, text_file, tmp_path):
    model, tokenizer = there
    home, before = model.device, model.model.layers[0].mlp.down_proj.weight.detach().clone()
    common = {"data": str(text_file), "samples": 4, "seq_len": 32, "device": "cuda"}
    if verb == "quantize":
        config = secateur.QuantizeConfig(method="rtn", **common)
        changed = secateur.quantize(model, config, out=tmp_path / "out", tokenizer=tokenizer)
    else:
        config = secateur.PruneConfig(Wanda(), pattern="2:4", **common)
        changed = secateur.prune(model, config, out=tmp_path / "out" if verb == "prune" else None, tokenizer=tokenizer)
    assert changed.model is model
    assert {parameter.device for parameter in model.parameters()} == {home}
    assert not torch.equal(model.model.layers[0].mlp.down_proj.weight, before)


def test_a_model_comes_back_from_an_evaluation_that_fails(there, text_file, monkeypatch):
    from secateur import api

    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(api, "_perplexity", fail)
    model, tokenizer = there
    home = model.device
    with pytest.raises(RuntimeError, match="out of memory"):
        secateur.evaluate(model, str(text_file), tokenizer=tokenizer, device="cpu")
    assert model.device == home


def test_evaluate(run, sharp_dir, text_file):
    cpu, gpu = both(run, "eval", sharp_dir, "--data", text_file, "--seq-len", 64, "--limit", 4)
    assert gpu["results"][0]["result"]["ppl"] == pytest.approx(cpu["results"][0]["result"]["ppl"], rel=1e-3)


def test_experts(run, moe, byte_tokenizer, text_file, tmp_path):
    """A fused mixture; its experts go to the device and come back with their block."""
    place = tmp_path / "moe"
    moe("mixtral", vocab_size=260).save_pretrained(place)
    byte_tokenizer.save_pretrained(place)
    command = ["prune", place, "--pattern", "2:4", "--blocks", "0:1", "--data", text_file, *SMALL]
    both(run, *command, out=tmp_path / "out")
    same(*saved(tmp_path / "out"))
    assert run("inspect", tmp_path / "out" / "cuda").code == 0


@pytest.mark.skipif(PRETENDED, reason="the pretended device does not get along with accelerate's hooks")
def test_blocks_that_lie_on_disk(run, sharp_dir, text_file, tmp_path):
    command = ["prune", sharp_dir, "--method", "sparsegpt", "--pattern", "2:4", "--data", text_file, *SMALL]
    command += ["--device", "cuda"]
    for offload in ("off", "on"):
        assert run(*command, "--offload", offload, "--out", tmp_path / offload).code == 0
    one, other = saved(tmp_path)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_killed_training_goes_on(run, killed_at, sharp_dir, text_file, files, tmp_path):
    """Dropout too, whose numbers come from the device's own generator."""
    student = shutil.copytree(sharp_dir, tmp_path / "student")
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.1}))
    command = ["train", student, "--data", text_file, *STEPS, "--device", "cuda", "--set", "checkpoint=1"]
    assert run(*command, "--out", tmp_path / "whole").code == 0
    killed_at(1, *command, "--out", tmp_path / "killed")
    assert run(*command, "--out", tmp_path / "killed", "--resume").code == 0
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_a_teacher_elsewhere(run, sharp_dir, text_file, tmp_path):
    """In host memory, and on disk: both teach the same as the one beside the student, which is nearly all of it."""
    command = ["train", sharp_dir, "--data", text_file, *STEPS, "--device", "cuda"]
    cache = ["cache", sharp_dir, "--data", text_file, "--seq-len", 32, "--top-k", 200, "--out", tmp_path / "cache"]
    assert run(*cache).code == 0
    ways = {"beside": [], "host": ["--set", "teacher_device=cpu"], "disk": ["--teacher", tmp_path / "cache"]}
    after = {}
    for name, way in ways.items():
        ran = run(*command, *way, "--out", tmp_path / name, "--json")
        assert ran.code == 0, ran.err
        after[name] = ran.json["held_out"]["after"]["divergence"]
    assert after["host"] == pytest.approx(after["beside"], rel=1e-4)
    assert after["disk"] == pytest.approx(after["beside"], rel=0.1)


@pytest.mark.skipif(PRETENDED, reason="it times the device")
def test_plan(run, sharp_dir):
    assert run("plan", sharp_dir, "--sparsity", 0.5, *SMALL, "--device", "cuda").code == 0
