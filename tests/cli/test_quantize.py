"""``secateur quantize`` from end to end: not a zero is lost, and transformers loads what was computed with."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import count

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from secateur.core.pattern import NM, check_mask
from secateur.quantization import compressed as form
from secateur.quantization.compressed import Dequantized
from secateur.quantize_config import QuantizeConfig

SCHEMES = {
    "int8": ["--bits", 8],
    "int4": ["--bits", 4],
    "int4 g32": ["--bits", 4, "--group-size", 32],
    "int4 g64 asymmetric": ["--bits", 4, "--group-size", 64, "--asymmetric"],
    "int4 rows asymmetric": ["--bits", 4, "--group-size", "channel", "--asymmetric"],
    "int3 g128": ["--bits", 3, "--group-size", 128],
    "int3 g32 asymmetric": ["--bits", 3, "--group-size", 32, "--asymmetric"],
    "int3 rows": ["--bits", 3, "--group-size", "channel"],
    "w8a8 dynamic": ["--bits", 8, "--activations", "dynamic"],
    "w8a8 static": ["--bits", 8, "--activations", "static"],
}
CASES = [*((name, "rtn") for name in SCHEMES), *((name, "gptq") for name in list(SCHEMES)[3::3])]


def linears(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}


def opened(folder):
    """What everybody does; any missing, unexpected or mismatched key would be a warning, and so an error."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.mark.parametrize(("name", "method"), CASES)
def test_every_zero_survives_and_transformers_computes_the_same(name, method, run, sparse, text, tmp_path):
    ran = run("quantize", sparse, *SCHEMES[name], "--method", method, *text, "--out", tmp_path / "out", "--json")
    assert ran.code == 0, ran.err
    before, after = opened(sparse), opened(tmp_path / "out")
    after_logits = logits(after)  # the first forward decompresses
    lost = broken = 0
    for linear, source in linears(before).items():
        W = after.get_submodule(linear).weight
        lost += int(((source.weight == 0) & (W != 0)).sum())
        broken += check_mask(W != 0, NM(2, 4)) is not None
        if source.bias is not None:
            assert torch.equal(after.get_submodule(linear).bias, source.bias)
    assert (lost, broken) == (0, 0)
    assert ran.json["zeros"]["after"] >= ran.json["zeros"]["before"] == ran.json["weights"] // 2
    assert torch.equal(after.model.embed_tokens.weight, before.model.embed_tokens.weight)
    assert after.lm_head.weight.data_ptr() == after.model.embed_tokens.weight.data_ptr()
    fake = opened(sparse)
    for linear in linears(fake):
        fake.get_submodule(linear).weight = torch.nn.Parameter(after.get_submodule(linear).weight.detach())
    expected = logits(fake if "w8a8" not in name else rounding_inputs(fake, tmp_path / "out"))
    assert torch.equal(after_logits, expected)
    assert float((after_logits - logits(before)).abs().max()) > 0


FRESH = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(".").eval()
with torch.no_grad():
    torch.save(model(input_ids=torch.load("../ids")).logits, "../logits")
assert not any(name.split(".")[0] == "secateur" for name in sys.modules)
"""


def test_a_fresh_process_opens_it_without_secateur(int4, tmp_path):
    out = shutil.copytree(int4[0], tmp_path / "out")
    torch.save(IDS, tmp_path / "ids")
    subprocess.run([sys.executable, "-c", FRESH], cwd=out, check=True)
    torch.testing.assert_close(torch.load(tmp_path / "logits"), logits(opened(out)))


def rounding_inputs(model, folder):
    """Inputs of every linear on their int8 grid: a scale a token, or the stored one. Written out once more here."""
    stored = load_file(folder / "model.safetensors")
    for name, linear in linears(model).items():

        def rounded(_, args, name=name):
            scale = stored.get(f"{name}.input_scale")
            s = args[0].abs().amax(-1, keepdim=True) / 127.5 if scale is None else scale
            s = torch.where(s == 0, torch.finfo(s.dtype).eps, s)
            return ((args[0] / s).round().clamp(-128, 127) * s,)

        linear.register_forward_pre_hook(rounded)
    return model


def test_a_static_scale_is_the_largest_input_of_the_calibration(sparse, text_file, tmp_path):
    """Seen after the weights of the block were quantized, so it is what the quantized model computes."""
    from secateur import quantize
    from secateur.data.sources import read_texts
    from secateur.data.tokens import sample_windows, tokenize

    config = QuantizeConfig(
        bits=8, activations="static", method="rtn", data=str(text_file), samples=4, seq_len=32, precision="float32"
    )
    result = quantize(sparse, config, out=tmp_path / "out")
    model, largest = result.model, {}
    tokens = tokenize(read_texts(str(text_file), "calibration"), result.tokenizer)
    windows = sample_windows(tokens, 4, 32, torch.Generator().manual_seed(0))
    for name, linear in linears(model).items():

        def see(_, args, name=name):
            largest[name] = max(largest.get(name, 0.0), float(args[0].abs().max()))

        linear.register_forward_pre_hook(see)
    for row in windows:
        model(row[None])
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name, seen in largest.items():
        assert float(stored[f"{name}.input_scale"]) == pytest.approx(seen / 127, rel=2**-7)


@pytest.fixture(scope="module")
def uneven(sparse, byte_tokenizer, tmp_path_factory):
    """The sparse model with norms that make some channels of their outputs 40 times as large as others."""
    model = opened(sparse)
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data[::16] *= 40
    path = tmp_path_factory.mktemp("models") / "uneven"
    model.save_pretrained(path)
    byte_tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_smoothing_helps_inputs_that_differ_and_loses_no_zero(activations, run, uneven, text, tmp_path):
    dense, lost = opened(uneven), {}
    for balance, folded in (("smooth", 6), ("none", 0)):
        flags = ["--bits", 8, "--activations", activations, "--method", "rtn", "--balance", balance, *text]
        ran = run("quantize", uneven, *flags, "--out", tmp_path / balance, "--json")
        assert ran.code == 0, ran.err
        assert ran.json["balance"] == {"folded": folded, "refused": []}
        assert run("inspect", tmp_path / balance, "--baseline", uneven).code == 0
        lost[balance] = float((logits(opened(tmp_path / balance)) - logits(dense)).float().square().mean())
    assert lost["smooth"] < 0.7 * lost["none"]
    before, after = load_file(uneven / "model.safetensors"), load_file(tmp_path / "smooth" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert ((before[name] == 0) <= (after[name] == 0)).all()


def test_awq_helps_inputs_that_differ_and_loses_no_zero(run, uneven, text, tmp_path):
    dense, lost = opened(uneven), {}
    for balance in ("awq", "none"):
        flags = ["--group-size", 32, "--method", "rtn", "--balance", balance, *text]
        ran = run("quantize", uneven, *flags, "--out", tmp_path / balance, "--json")
        assert ran.code == 0, ran.err
        assert run("inspect", tmp_path / balance).code == 0
        lost[balance] = float((logits(opened(tmp_path / balance)) - logits(dense)).float().square().mean())
    assert lost["awq"] < 0.9 * lost["none"]


def test_a_balanced_run_that_was_stopped_goes_on_to_the_same_bytes(run, uneven, text, tmp_path, monkeypatch, files):
    """What could not be folded, here for want of a quantized reader, is told of all blocks."""
    flags = ["--bits", 8, "--activations", "static", "--balance", "smooth", "--ignore", "up_proj", *text]
    refused = stop_and_go_on(uneven, flags, run, tmp_path, monkeypatch, files)
    assert {name.split(".")[2] for name in refused} == {"0", "1"}


def test_eval_measures_it(int4, run, sparse, text_file, tmp_path, text):
    out, _ = int4
    ran = run("eval", out, "--baseline", sparse, "--data", text_file, "--seq-len", 64, "--limit", 8, "--json")
    assert ran.code == 0, ran.err
    assert 0 < abs(ran.json["results"][0]["log_ppl_gap"]) < 0.1
    assert "Dispatching" not in ran.err
    assert run("quantize", sparse, *SCHEMES["w8a8 dynamic"], *text, "--out", tmp_path / "a8").code == 0
    ran = run("eval", tmp_path / "a8", "--baseline", sparse, "--data", text_file, "--seq-len", 64, "--limit", 8)
    assert ran.code == 0, ran.err
    assert "Decompressing" not in ran.err


def test_the_saved_recipe_gives_the_same_bytes(int4, run, tmp_path, files):
    out, _ = int4
    ran = run("quantize", "--recipe", out / "secateur" / "recipe.yaml", "--out", tmp_path / "again")
    assert ran.code == 0, ran.err
    assert files(tmp_path / "again") == files(out)
    ran = run("quantize", "--recipe", out / "secateur" / "recipe.yaml", "--out", tmp_path / "again", "--resume")
    assert "is complete: nothing was left to do" in ran.err


@pytest.mark.parametrize(
    ("pattern", "share", "promised"),
    [
        (["--pattern", "2:4"], 0.5, {"2:4"}),
        (["--sparsity", "0.6"], 0.6, {"60%"}),
        (["--sparsity", "0.6", "--set", "taper=0.2"], 0.6, {"40%", "80%"}),
        (["--bits", 8, "--pattern", "row", "--sparsity", "0.603"], 0.6, {"60.3% per row"}),
        (["--bits", 8, "--pattern", "block:16x32", "--sparsity", "0.7"], 0.68, {"70% in 16x32 blocks"}),
    ],
    ids=["2:4", "60 %", "40 to 80 %", "row", "blocks"],
)
def test_joint_prunes_and_quantizes_a_dense_model(pattern, share, promised, run, dense, text, tmp_path):
    ran = run("quantize", dense, "--method", "joint", *pattern, *text, "--out", tmp_path / "out", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["zeros"]["before"] == 0
    assert ran.json["zeros"]["after"] >= share * ran.json["weights"] - 14
    inspected = run("inspect", tmp_path / "out", "--json").json
    assert {row["pattern"] for row in inspected["rows"] if row["ok"] is not None} == promised
    logits(opened(tmp_path / "out"))


@pytest.mark.parametrize(("sparsity", "promised"), [("0.3", "2:4"), ("0.6", "60%")])
def test_joint_keeps_the_pattern_of_what_is_pruned_already(sparsity, promised, run, sparse, text, tmp_path):
    flags = ["--method", "joint", "--sparsity", sparsity, "--bits", 8, "--activations", "dynamic", *text]
    assert run("quantize", sparse, *flags, "--out", tmp_path / "out").code == 0
    rows = run("inspect", tmp_path / "out", "--json").json["rows"]
    assert {row["pattern"] for row in rows if row["ok"]} == {promised}
    assert promised != "2:4" or run("export", tmp_path / "out", "--to", "torch-2:4", "--out", tmp_path / "x").code == 0


def test_only_what_is_chosen(run, dense, text, tmp_path):
    flags = ["--blocks", "0:1", "--ignore", "down_proj", "--method", "rtn", *text]
    assert run("quantize", dense, *flags, "--out", tmp_path / "out").code == 0
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert "model.layers.0.mlp.up_proj.weight_packed" in stored
    assert "model.layers.0.mlp.down_proj.weight" in stored
    assert "model.layers.1.mlp.up_proj.weight" in stored
    logits(opened(tmp_path / "out"))


def test_a_saved_weight_is_made_from_its_codes_once(run, sparse, text, tmp_path, monkeypatch):
    made, read = Counter(), Dequantized.__getitem__

    def counted(self, name):
        made[name] += 1
        return read(self, name)

    monkeypatch.setattr(Dequantized, "__getitem__", counted)
    assert run("quantize", sparse, "--method", "rtn", *text, "--out", tmp_path / "out").code == 0
    assert {made[f"{name}.weight"] for name in linears(opened(sparse))} == {1}


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda made: made["weight_packed"].bitwise_not_(), "zeros of model.layers.0.mlp.up_proj were lost"),
        (lambda made: made["weight_scale"].mul_(2), "model.layers.0.mlp.up_proj does not come back from its codes"),
    ],
    ids=["codes", "scales"],
)
def test_codes_that_were_written_wrong(spoil, said, run, sparse, text, tmp_path, monkeypatch):
    def spoilt(*args):
        made = compressed(*args)
        if next(codes) == 5:  # the mlp's second, behind the attention's four
            spoil(made)
        return made

    compressed, codes = form._compressed, count()
    monkeypatch.setattr(form, "_compressed", spoilt)
    ran = run("quantize", sparse, "--method", "rtn", *text, "--out", tmp_path / "out")
    assert ran.code == 1
    assert said in ran.error
    assert not (tmp_path / "out").exists()


def test_a_stopped_run_goes_on_to_the_same_bytes(run, sparse, text, tmp_path, monkeypatch, files):
    stop_and_go_on(sparse, ["--bits", 3, *text], run, tmp_path, monkeypatch, files)


def stop_and_go_on(source, flags, run, tmp_path, monkeypatch, files):
    from secateur.pruning.workdir import Workdir

    assert run("quantize", source, *flags, "--out", tmp_path / "whole").code == 0
    keep = Workdir.keep

    def killed(self, adapter, plan, finished):
        keep(self, adapter, plan, finished)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Workdir, "keep", killed)
        ran = run("quantize", source, *flags, "--out", tmp_path / "out")
    assert ran.code == 130
    assert "keeps 1 finished blocks" in ran.error
    ran = run("quantize", source, *flags, "--out", tmp_path / "out", "--resume", "--json")
    assert ran.json["resumed_after_blocks"] == 1
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert ran.json["balance"] == json.loads((tmp_path / "whole/secateur/report.json").read_text())["balance"]
    return ran.json["balance"]["refused"]


def test_from_python(dense, byte_tokenizer, tmp_path):
    from secateur import quantize

    model = AutoModelForCausalLM.from_pretrained(dense)
    config = QuantizeConfig(method="rtn", bits=3)
    result = quantize(model, config, tokenizer=byte_tokenizer, out=tmp_path / "out")
    assert result.model is model
    assert torch.equal(logits(opened(tmp_path / "out")), logits(model))
    assert replace(config, bits=4) == QuantizeConfig(method="rtn")
