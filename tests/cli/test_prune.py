"""The verbs from end to end on a model of 18,000 weights: what is printed, what is saved, what can be relied on."""

import json
import os
import re
import shutil
import signal

import pytest

from secateur.config import METHODS
from secateur.runs import lasting

SMALL = ["--samples", "4", "--seq-len", "32"]


@pytest.fixture(scope="module")
def pruned(run, model_dir, text_file, tmp_path_factory):
    """OUT of one run at 2:4, and what the run said."""
    out = tmp_path_factory.mktemp("runs") / "out"
    ran = run("prune", model_dir, "--pattern", "2:4", "--data", text_file, *SMALL, "--out", out)
    assert ran.code == 0, ran.err
    return out, ran


def test_out_is_a_hugging_face_directory(pruned):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, _ = pruned
    model = AutoModelForCausalLM.from_pretrained(out)
    weight = model.model.layers[0].mlp.gate_proj.weight
    assert int((weight.reshape(-1, 4) == 0).sum(dim=1).min()) == 2
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert AutoTokenizer.from_pretrained(out).chat_template == "{{ messages }}"
    assert (out / "generation_config.json").is_file()


def test_out_says_what_was_done(pruned, model_dir, text_file):
    out, _ = pruned
    report = json.loads((out / "secateur" / "report.json").read_text())
    assert report["sparsity"] == {"requested": 0.5, "achieved": 0.5}
    assert report["pattern"]["words"].startswith("keep 2 of every 4")
    assert report["blocks"] == {"pruned": 2, "total": 2}
    assert report["data"]["sha256"]
    assert report["data"]["samples"] == 4
    assert set(report["versions"]) == {"secateur", "torch", "transformers", "python"}
    assert set(report["seconds"]) == {"data", "load", "verify", "prune", "save", "inspect", "total"}
    assert report["peak_memory_bytes"] > 1e8
    assert report["model"]["fingerprint"]
    lines = (out / "secateur" / "records.jsonl").read_text().splitlines()
    assert [json.loads(line)["name"] for line in lines] == ["model.layers.0", "model.layers.1"]
    recipe = (out / "secateur" / "recipe.yaml").read_text()
    for word in (str(model_dir), str(text_file), "device: cpu", "dtype: float32", "blocks: 0:2", "name: admm"):
        assert word in recipe


def test_what_is_printed(pruned, model_dir):
    out, ran = pruned
    assert "2:4: keep 2 of every 4 weights (50% zeros)" in ran.out
    assert ran.err.startswith("2:4: keep 2 of every 4 weights"), "said before the work begins"
    assert "50.00% asked, 50.00% achieved" in ran.out
    assert f"secateur eval {out} --baseline {model_dir} --data wikitext2 --seq-len 32" in ran.out
    assert "prune 2/2, model.layers.1" in ran.err, "progress belongs on stderr"
    assert "left 0:00:00" in ran.err


def test_the_saved_recipe_gives_the_same_bytes(pruned, run, tmp_path, files):
    out, _ = pruned
    ran = run("prune", "--recipe", out / "secateur" / "recipe.yaml", "--out", tmp_path / "again")
    assert ran.code == 0, ran.err
    assert files(tmp_path / "again") == files(out)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_prunes_and_keeps_its_promises(method, run, model_dir, text_file, tmp_path):
    out = tmp_path / "out"
    flags = ["--method", method, "--sparsity", "0.6", "--data", text_file, *SMALL, "--out", out]
    ran = run("prune", model_dir, *flags, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["recipe"]["method"]["name"] == method
    assert ran.json["sparsity"]["achieved"] == pytest.approx(0.6, abs=1e-3)
    assert run("inspect", out).code == 0


def test_a_taper_is_planned_made_promised_and_trained_on(run, model_dir, text_file, tmp_path):
    out, flags = tmp_path / "out", ["--method", "sparsegpt", "--sparsity", 0.6, "--taper", 0.2]
    planned = run("plan", model_dir, *flags, "--samples", 4, "--seq-len", 32)
    assert "40% to 80%" in planned.out
    assert "40% in the first block to 80% in the last" in planned.out
    ran = run("prune", model_dir, *flags, "--data", text_file, *SMALL, "--out", out, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["sparsity"] == {"requested": pytest.approx(0.6), "achieved": pytest.approx(0.6, abs=1e-3)}
    more = ["--pattern", "unstructured", "--sparsity", 0.6, "--set", "taper=0.2", "--tokens", 512, "--seq-len", 32]
    assert run("train", out, "--data", text_file, *more, "--out", tmp_path / "trained").code == 0
    for place in (out, tmp_path / "trained"):
        rows = run("inspect", place, "--json").json["rows"]
        found = {row["name"].split(".")[2]: row["sparsity"] for row in rows if row["ok"]}
        assert found == {"0": pytest.approx(0.4, abs=1e-3), "1": pytest.approx(0.8, abs=1e-3)}


def test_magnitude_needs_no_text(run, model_dir, tmp_path):
    ran = run("prune", model_dir, "--method", "magnitude", "--sparsity", "0.5", "--out", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert "none: magnitude looks at the weights alone" in ran.out
    assert run("inspect", tmp_path / "out").code == 0
    assert run("plan", model_dir, "--method", "magnitude", "--sparsity", "0.5").code == 0


def test_only_the_chosen_blocks(run, model_dir, text_file, tmp_path):
    flags = ["--method", "magnitude", "--sparsity", "0.5", "--data", text_file, *SMALL, "--blocks", "first-half"]
    ran = run("prune", model_dir, *flags, "--out", tmp_path / "out", "--json")
    assert ran.json["blocks"] == {"pruned": 1, "total": 2}
    assert "blocks: 0:1" in (tmp_path / "out" / "secateur" / "recipe.yaml").read_text()
    rows = run("inspect", tmp_path / "out", "--baseline", model_dir, "--json").json["rows"]
    promised = [row["name"] for row in rows if row["ok"] is not None]
    assert promised
    assert all(name.startswith("model.layers.0.") for name in promised)


def test_include_and_ignore_are_told_and_kept(run, model_dir, text_file, tmp_path, files):
    flags = ["--method", "magnitude", "--sparsity", "0.5", "--data", text_file, *SMALL, "--include", "self_attn"]
    flags += ["--include", "mlp", "--ignore", "o_proj", "--ignore", r"layers\.0\.mlp", "--out", tmp_path / "out"]
    ran = run("prune", model_dir, *flags)
    assert ran.code == 0, ran.err
    assert "2: ignore 'o_proj' matches it" in ran.out
    report = json.loads((tmp_path / "out" / "secateur" / "report.json").read_text())
    assert report["linears"] == 9
    assert [(row["count"], len(row["names"])) for row in report["skipped"]] == [(2, 2), (3, 3), (2, 2)]
    assert report["recipe"]["ignore"] == ["o_proj", r"layers\.0\.mlp"]
    again = run("prune", "--recipe", tmp_path / "out" / "secateur" / "recipe.yaml", "--out", tmp_path / "again")
    assert again.code == 0, again.err
    assert files(tmp_path / "again") == files(tmp_path / "out")


def test_an_own_out_is_replaced_and_flags_win_over_the_recipe(pruned, run, tmp_path):
    out = shutil.copytree(pruned[0], tmp_path / "out")
    recipe = tmp_path / "recipe.yaml"
    shutil.copy(out / "secateur" / "recipe.yaml", recipe)
    ran = run("prune", "--recipe", recipe, "--pattern", "1:4", "--method", "wanda", "--out", out, "--json")
    assert ran.code == 0, ran.err
    assert f"{out} holds an earlier result, which this run will replace" in ran.err
    assert ran.json["sparsity"]["achieved"] == 0.75
    assert "1:4" in (out / "secateur" / "recipe.yaml").read_text()


def test_a_run_that_fails_keeps_the_old_out_and_its_blocks(pruned, run, tmp_path, monkeypatch, files):
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    out = shutil.copytree(pruned[0], tmp_path / "out")
    before, recipe = files(out), out / "secateur" / "recipe.yaml"
    with monkeypatch.context() as patch:
        patch.setattr("secateur.runs.save", fail)
        ran = run("prune", "--recipe", recipe, "--out", out, "--pattern", "1:4")
    assert ran.code == 1
    assert "No space left" in ran.error
    assert "out.unfinished keeps 2 finished blocks: go on with --resume, or delete it" in ran.error
    assert files(out) == before
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.unfinished"}
    ran = run("prune", "--recipe", recipe, "--out", out, "--pattern", "1:4", "--resume", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["resumed_after_blocks"] == 2
    assert files(out) != before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_run_that_is_ended_from_outside_says_how_to_go_on(run, pruned, tmp_path, monkeypatch):
    monkeypatch.setattr("secateur.runs.save", lambda *_: signal.raise_signal(signal.SIGTERM))
    ran = run("prune", "--recipe", pruned[0] / "secateur" / "recipe.yaml", "--out", tmp_path / "out")
    assert ran.code == 143
    assert ran.error.startswith("secateur: terminated; ")
    assert "out.unfinished keeps 2 finished blocks: go on with --resume" in ran.error
    assert [path.name for path in tmp_path.iterdir()] == ["out.unfinished"]


def test_a_run_that_is_ended_before_its_first_block_leaves_nothing(run, pruned, tmp_path, monkeypatch):
    monkeypatch.setattr("secateur.runs.prune_blocks", lambda *_: signal.raise_signal(signal.SIGINT))
    ran = run("prune", "--recipe", pruned[0] / "secateur" / "recipe.yaml", "--out", tmp_path / "out")
    assert ran.code == 130
    assert ran.error == "secateur: interrupted"
    assert list(tmp_path.iterdir()) == []


def test_a_signal_while_something_is_cleared_away_is_not_lost(run, pruned, tmp_path, monkeypatch):
    """Python prints and forgets what is raised in a finalizer; every chunk of hidden states has one."""
    import time
    import weakref

    class Chunk:
        pass

    def dropped(*_):
        chunk = Chunk()
        weakref.finalize(chunk, os.kill, os.getpid(), signal.SIGTERM)
        del chunk
        time.sleep(10)

    monkeypatch.setattr("secateur.runs.prune_blocks", dropped)
    ran = run("prune", "--recipe", pruned[0] / "secateur" / "recipe.yaml", "--out", tmp_path / "out")
    assert ran.code == 143
    assert ran.error == "secateur: terminated"


def test_a_save_that_breaks_a_promise_is_not_kept(pruned, run, tmp_path, monkeypatch):
    import torch

    import secateur.runs as runs

    def save_wrongly(model, tokenizer, folder):
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight.fill_(1.0)
        saved(model, tokenizer, folder)

    saved = runs.save
    monkeypatch.setattr(runs, "save", save_wrongly)
    ran = run("prune", "--recipe", pruned[0] / "secateur" / "recipe.yaml", "--out", tmp_path / "out")
    assert ran.code == 1
    assert "breaks 1 promises" in ran.error
    assert "model.layers.1.mlp.up_proj.weight" in ran.error
    assert not (tmp_path / "out").exists()


def test_resuming_what_is_complete_says_so(pruned, run, model_dir, text_file):
    out, _ = pruned
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    flags = ["--pattern", "2:4", "--data", text_file, *SMALL]
    ran = run("prune", model_dir, *flags, "--out", out, "--resume", "--json")
    assert ran.code == 0, ran.err
    assert "is complete: nothing was left to do" in ran.err
    assert ran.json == json.loads((out / "secateur" / "report.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("prune", "--pattern", "1:4"), "recipe.pattern was '2:4' and is '1:4'; repeat that request"),
        (("quantize", "--method", "rtn"), "is a run of another command"),
    ],
    ids=["prune", "quantize"],
)
def test_resuming_does_not_replace_another_result(words, said, pruned, run, model_dir, text_file, files):
    out, _ = pruned
    before = files(out)
    verb, *flags = words
    ran = run(verb, model_dir, *flags, "--data", text_file, *SMALL, "--out", out, "--resume")
    assert ran.code == 2, ran.err
    assert said in ran.error
    assert files(out) == before


# ---- inspect and eval


def test_inspect(pruned, run, model_dir):
    out, _ = pruned
    ran = run("inspect", out)
    assert ran.code == 0
    assert "every promise is kept" in ran.out
    assert "model.layers.1.mlp.down_proj.weight" in ran.out
    assert run("inspect", out, "--baseline", model_dir).code == 0


def test_the_room_is_counted_and_said_and_what_would_take_less(pruned, run):
    out, ran = pruned
    found = run("inspect", out, "--json").json
    room, rest = found["room"], found["elements"] - found["weights"]
    assert found["bytes"] == 4 * found["elements"], "float32, zeros stored"
    assert room["bytes"] == (out / "model.safetensors").stat().st_size, "and a header"
    assert room["bits_per_weight"]["mask and 16 bit values"] == 9, "half of 16, and a bit of mask"
    assert room["whole"]["dense int8"] == 2 * rest + found["weights"]
    report = json.loads((out / "secateur" / "report.json").read_text())
    assert report["room"] == room, "prune tells the same"
    assert "without any zeros: dense int8" in report["warnings"][0], "which takes 8 bits"
    for said in (ran.out, run("inspect", out).out):
        assert "9.00 bits a pruned weight" in said
        assert report["warnings"][0] in said


def test_without_promises_the_room_is_told_as_well(pruned, model_dir, run, tmp_path):
    from safetensors.torch import load_file, save_file

    bare = shutil.copytree(pruned[0], tmp_path / "bare", ignore=shutil.ignore_patterns("secateur"))
    promised, told = (run("inspect", path, "--json").json for path in (pruned[0], bare))
    assert not told["promised"]
    assert told["room"] == promised["room"]
    said = run("inspect", bare).out
    assert "9.00 bits a pruned weight" in said
    assert "smaller than the" in said
    said = run("inspect", model_dir).out
    assert "bits a weight in all\n" in re.sub(" +\n", "\n", said)
    assert re.search("instead +dense, 16 bit .*, dense int8 .*, dense int4, groups of 32 ", said)
    assert not re.search("mask|pruned weight|warning", said)
    held = load_file(bare / "model.safetensors")
    save_file({**held, "codes": held["model.norm.weight"].reshape(4, 8).int()}, bare / "model.safetensors")
    assert run("inspect", bare, "--json").json["room"] is None, "codes of somebody else"


def test_inspect_exits_1_when_a_promise_is_broken(pruned, run, tmp_path):
    from safetensors.torch import load_file, save_file

    out = shutil.copytree(pruned[0], tmp_path / "out")
    tensors = load_file(out / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"] += 1
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    ran = run("inspect", out)
    assert ran.code == 1
    assert "model.layers.0.self_attn.q_proj.weight: 256 of 256 groups of 4 hold more than 2 weights" in ran.out
    ran = run("inspect", out, "--json")
    assert ran.code == 1
    assert len(ran.json["broken"]) == 1


def test_inspect_finds_what_changed_outside_the_plan(pruned, run, tmp_path, model_dir):
    from safetensors.torch import load_file, save_file

    out = shutil.copytree(pruned[0], tmp_path / "out")
    tensors = load_file(out / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    assert run("inspect", out).code == 0
    ran = run("inspect", out, "--baseline", model_dir)
    assert ran.code == 1
    assert "model.norm.weight" in ran.out


def test_eval_beside_a_baseline(pruned, run, model_dir, text_file):
    out, _ = pruned
    flags = ["--baseline", model_dir, "--data", f"{text_file},embedded", "--seq-len", "64", "--limit", "3"]
    ran = run("eval", out, *flags, "--json")
    assert ran.code == 0, ran.err
    first, second = ran.json["results"]
    assert first["result"]["text"] == text_file.name
    assert second["result"]["text"] == "embedded"
    assert first["log_ppl_gap"] == pytest.approx(first["result"]["nll_per_token"] - first["baseline"]["nll_per_token"])
    table = run("eval", out, *flags)
    assert f"{first['log_ppl_gap']:+.4f}" in table.out
    assert "3 windows of 64 tokens, overlap 0" in table.out
    assert "CPython's own help text" in table.out
    assert "3/3" in table.err


@pytest.mark.parametrize(
    "words",
    [
        ("prune", "{out}", "--sparsity", "0.9", "--method", "magnitude"),
        ("quantize", "{out}/../out", "--method", "rtn"),
        ("train", "{out}", "--data", "embedded", "--tokens", "1000000", "--pattern", "2:4"),
        ("train", "{model}", "--teacher", "{out}", "--data", "embedded", "--tokens", "1000000", "--pattern", "2:4"),
    ],
    ids=["prune", "quantize", "student", "teacher"],
)
def test_a_run_does_not_replace_what_it_reads(words, pruned, run, model_dir, tmp_path, files):
    out = shutil.copytree(pruned[0], tmp_path / "out")
    before = files(out)
    ran = run(*(word.format(out=out, model=model_dir) for word in words), "--out", out)
    assert ran.code == 2
    assert f"would replace it at {out}; choose another --out" in ran.error
    assert files(out) == before


@pytest.mark.parametrize("part", ["up", "down"])
def test_half_of_a_late_ffn_is_refused_before_the_first_block(part, run, model_dir, text_file, tmp_path):
    flags = ["--sparsity", 0.5, "--ignore", f"layers.1.mlp.{part}", "--data", text_file, *SMALL]
    ran = run("prune", model_dir, *flags, "--out", tmp_path / "out")
    assert ran.code == 2
    assert f"model.layers.1: SparseLLM prunes an FFN as a whole, but the plan lacks mlp.{part}_proj" in ran.error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", ["prune", "train", "quantize"])
def test_a_run_does_not_write_into_what_it_reads(verb, run, model_dir):
    wanted = {"prune": ("--sparsity", 0.5), "train": ("--tokens", 1_000_000, "--data", "embedded"), "quantize": ()}
    ran = run(verb, model_dir, *wanted[verb], "--out", model_dir / "inner" / "out")
    assert ran.code == 2
    assert f"lies inside {model_dir}" in ran.error


@pytest.mark.parametrize("typo", ["TYPO", "./typo"], ids=["on no hub", "no directory"])
def test_a_baseline_that_is_not_there_costs_no_measurement(typo, run, model_dir, text_file):
    ran = run("eval", model_dir, "--baseline", typo, "--data", text_file, "--seq-len", "128")
    assert ran.code == 1
    assert typo in ran.error
    assert "perplexity of" not in ran.err


def test_eval_of_one_model(run, model_dir, text_file):
    ran = run("eval", model_dir, "--data", text_file, "--seq-len", "128")
    assert ran.code == 0, ran.err
    assert "perplexity" in ran.out
    assert "baseline" not in ran.out


def test_methods(run):
    described = {method["name"]: method for method in run("methods", "--json").json}
    assert list(described) == list(METHODS)
    assert described["sparsellm"]["arxiv"] == "2402.17946"
    assert described["wanda"]["needs"] == "norms of the inputs"
    damp = next(option for option in described["sparsegpt"]["options"] if option["name"] == "damp")
    assert damp["default"] == 0.01
    assert damp["doc"].startswith("Ridge")
    table = run("methods").out
    assert "2401.02938" in table
    assert "column_block" in table


# ---- Python


@pytest.mark.parametrize("name", ["demo", "embedded", "c4", "wikitext2", "ptb", "hf:allenai/c4"])
def test_a_name_that_means_the_same_everywhere_is_no_path(name, tmp_path, monkeypatch):
    for folder in (name, "mine"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert lasting(name) == name
    assert lasting("mine") == str(tmp_path / "mine")


def test_python_takes_a_model_object(model_dir, text_file, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from secateur import PruneConfig, evaluate, prune

    model = AutoModelForCausalLM.from_pretrained(model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    config = PruneConfig(sparsity=0.5, samples=4, seq_len=32)
    result = prune(model, config, data=str(text_file), tokenizer=tokenizer)
    assert result.model is model
    assert result.report["sparsity"]["achieved"] == 0.5
    assert result.report["out"] is None
    assert len(result.records) == 2
    compared = evaluate(model, str(text_file), baseline=model_dir, tokenizer=tokenizer, seq_len=64, limit=2)
    assert compared[0].log_ppl_gap is not None


def test_python_needs_the_tokenizer_of_a_model_object(model_dir):
    from transformers import AutoModelForCausalLM

    from secateur import PruneConfig, prune

    with pytest.raises(ValueError, match="tokenizer="):
        prune(AutoModelForCausalLM.from_pretrained(model_dir), PruneConfig(sparsity=0.5), data="embedded")
