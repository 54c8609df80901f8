"""What ``secateur quantize`` refuses, and what becomes of a directory that somebody damaged: one line each."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from secateur.quantization.compressed import is_quantized


def test_a_lost_zero_would_be_found(int4, run, tmp_path):
    out = shutil.copytree(int4[0], tmp_path / "out")
    stored = load_file(out / "model.safetensors")
    stored["model.layers.0.mlp.up_proj.weight_packed"][0] += 1  # the first code of every word
    save_file(stored, out / "model.safetensors", {"format": "pt"})
    ran = run("inspect", out)
    assert ran.code == 1
    assert "model.layers.0.mlp.up_proj.weight" in ran.out
    assert "hold more than 2 weights" in ran.out


def damaged(stored, config):
    del stored["model.layers.0.mlp.up_proj.weight_packed"]


def wrong_scales(stored, config):
    stored["model.layers.0.mlp.up_proj.weight_scale"] = torch.ones(7, 3)


UP = "model.layers.0.mlp.up_proj"


def shape_of_a_giant(stored, config):
    stored[f"{UP}.weight_shape"] = torch.tensor([10**9, 10**9])


def shape_below_zero(stored, config):
    stored[f"{UP}.weight_shape"] *= -1


def shape_of_a_half(stored, config):
    stored[f"{UP}.weight_shape"][1] //= 2
    stored[f"{UP}.weight_scale"] = stored[f"{UP}.weight_scale"][:, :1].contiguous()


def scales_twice(stored, config):
    stored[f"{UP}.weight_scale"] = torch.cat(2 * [stored[f"{UP}.weight_scale"]], 1)


def one_row_of_scales(stored, config):
    stored[f"{UP}.weight_scale"] = stored[f"{UP}.weight_scale"][:1].contiguous()


def other_scheme(stored, config):
    config["quantization_config"]["config_groups"] = {
        "group_0": {"targets": ["Linear"], "weights": {"num_bits": "four"}}
    }


def no_scheme(stored, config):
    config["quantization_config"]["config_groups"] = {"group_0": []}


def no_weights(stored, config):
    config["quantization_config"]["config_groups"]["group_0"]["weights"] = None


@pytest.mark.parametrize("damage", [damaged, wrong_scales, other_scheme, no_scheme, no_weights])
def test_a_damaged_directory_is_one_line(damage, int4, run, tmp_path):
    out = shutil.copytree(int4[0], tmp_path / "out")
    stored, config = load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text())
    damage(stored, config)
    save_file(stored, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(config))
    for words in (["inspect", out], ["eval", out, "--data", "embedded", "--seq-len", 32, "--limit", 1]):
        ran = run(*words)
        assert ran.code == 1, words
        assert "Traceback" not in ran.err
        assert str(out) in ran.error


SHAPES = [shape_of_a_giant, shape_below_zero, shape_of_a_half, scales_twice, one_row_of_scales]


@pytest.mark.parametrize("damage", SHAPES)
def test_inspect_believes_no_shape(damage, int4, run, tmp_path):
    """What is counted and checked is what the codes stand for, whatever is said beside them."""
    out = shutil.copytree(int4[0], tmp_path / "out")
    stored = load_file(out / "model.safetensors")
    damage(stored, None)
    save_file(stored, out / "model.safetensors", {"format": "pt"})
    ran = run("inspect", out)
    assert (ran.code, ran.out) == (1, "")
    assert f"{out}: codes and scales of {UP} do not fit" in ran.error


@pytest.mark.parametrize("told", ["3", "[]", '"x"', "null", '{"quant_method": []}', "[" * 9999])
def test_what_is_no_quantization_config(told, tmp_path):
    (tmp_path / "config.json").write_text(f'{{"quantization_config": {told}}}')
    assert not is_quantized(tmp_path)


REFUSED = {
    "bits": (["--bits", 5], 2, ["5 bits are not in the table", "8, 4, 3"]),
    "group of int8": (["--bits", 8, "--group-size", 128], 2, ["known for 8 bits: channel"]),
    "group size": (["--group-size", 48], 2, ["group size 48", "32, 64, 128"]),
    "group size no number": (["--group-size", "row"], 2, ["group_size", "'row'"]),
    "asymmetric int8": (["--bits", 8, "--asymmetric"], 2, ["8 bits are symmetric"]),
    "activations of int4": (["--activations", "dynamic"], 2, ["8 bit weights", "--bits 8"]),
    "smooth without activations": (["--balance", "smooth"], 2, ["smooth eases", "--activations"]),
    "awq beside activations": (
        ["--bits", 8, "--activations", "static", "--balance", "awq"],
        2,
        ["awq eases", "take smooth"],
    ),
    "unknown method": (["--method", "awq"], 2, ["method", "'awq'", "gptq"]),
    "pattern without joint": (["--pattern", "2:4"], 2, ["gptq keeps the zeros", "--method joint"]),
    "taper without joint": (["--set", "taper=0.1"], 2, ["gptq keeps the zeros", "--method joint"]),
    "damp of rtn": (["--method", "rtn", "--set", "damp=0.5"], 2, ["rtn solves nothing", "take gptq"]),
    "strength of awq": (["--balance", "awq", "--set", "strength=0.9"], 2, ["smooth's alone", "--balance smooth"]),
    "joint without a pattern": (["--method", "joint"], 2, ["needs a sparsity"]),
    "unknown key": (["--set", "bit=4"], 2, ["'bit'", "did you mean bits"]),
    "somebody's out": (["--out", "theirs"], 2, ["theirs", "holds file"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_one_line(case, run, dense, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "file").write_text("theirs")
    flags, code, words = REFUSED[case]
    ran = run("quantize", dense, *text, "--out", "out", *flags)
    assert ran.code == code
    assert len(ran.err.strip().splitlines()) == 1
    assert all(word in ran.error for word in words), ran.error
    assert not (tmp_path / "out").exists()


def test_group_sizes_that_do_not_divide(run, model_dir, text, tmp_path):
    """Width 32: 128 and 64 do not divide it; auto finds 32."""
    ran = run("quantize", model_dir, "--group-size", 64, "--method", "rtn", "--out", tmp_path / "out")
    assert ran.code == 2
    assert "q_proj: group size 64 does not divide 32 inputs" in ran.error
    ran = run("quantize", model_dir, "--method", "rtn", "--out", tmp_path / "out", "--json")
    assert ran.json["storage"]["group_size"] == 32


def test_quantized_twice_pruned_after_or_with_branches(int4, run, dense, text, tmp_path):
    for verb, more in (("quantize", []), ("prune", ["--sparsity", "0.5"])):
        ran = run(verb, int4[0], *more, *text, "--out", tmp_path / "out")
        assert ran.code == 1
        assert "is already quantized" in ran.error
    flags = ["--method", "magnitude", "--pattern", "2:4", "--low-rank", 4, *text]
    assert run("prune", dense, *flags, "--out", tmp_path / "branched").code == 0
    ran = run("quantize", tmp_path / "branched", *text, "--out", tmp_path / "out")
    assert ran.code == 2
    assert "low-rank branches beside 14 linears" in ran.error


def test_what_the_format_has_no_place_for(run, moe, byte_tokenizer, text, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    moe("mixtral", vocab_size=260).save_pretrained(tmp_path / "moe")
    config = GPT2Config(vocab_size=260, n_embd=32, n_layer=2, n_head=2, n_positions=128)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    for name, kind in (("moe", "ExpertLinear"), ("gpt2", "Conv1D")):
        byte_tokenizer.save_pretrained(tmp_path / name)
        ran = run("quantize", tmp_path / name, "--method", "rtn", *text, "--out", tmp_path / "out")
        assert ran.code == 1
        assert f"is a {kind}; only nn.Linear can be quantized so far" in ran.error


def test_without_the_package(int4, run, dense, tmp_path, monkeypatch):
    import importlib.util
    import sys

    find = importlib.util.find_spec
    for name in [name for name in sys.modules if name.split(".")[0] == "compressed_tensors"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    monkeypatch.setattr("secateur.models.codes.find_spec", lambda name: None if "compressed" in name else find(name))
    for words, code in (
        (["quantize", dense, "--out", tmp_path / "out"], 2),
        (["inspect", int4[0]], 2),
        (["eval", int4[0], "--data", "embedded"], 1),
    ):
        ran = run(*words)
        assert ran.code == code
        assert "pip install -e '.[quantize]'" in ran.error
