"""``secateur train``: it learns, it saves an ordinary sparse model, and a killed run goes on to the same bytes."""

import json
import math
import re
import shlex
from itertools import combinations

import pytest
import torch

SMALL = [
    "--tokens",
    8192,
    "--seq-len",
    32,
    "--batch",
    4,
    "--micro-batch",
    2,
    "--lr",
    1e-2,
    "--set",
    "holdout=4",
    "--set",
    "loss.alpha=1",
]
"""64 steps."""


@pytest.fixture(scope="module")
def trained(run, sharp_dir, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("train") / "out"
    ran = run("train", sharp_dir, "--data", text_file, *SMALL, "--out", out, "--json")
    assert ran.code == 0, ran.err
    return out, ran


def test_a_student_comes_closer_to_its_dense_self(trained):
    _, ran = trained
    report = ran.json
    assert report["held_out"]["after"]["divergence"] < 0.6 * report["held_out"]["before"]["divergence"]
    assert report["steps"] == 64
    assert report["tokens"] == 8192
    assert report["skipped_steps"] == 0


def test_what_is_saved_keeps_its_pattern_and_opens_without_us(run, trained):
    from transformers import AutoModelForCausalLM

    out, _ = trained
    assert run("inspect", out).code == 0
    model = AutoModelForCausalLM.from_pretrained(out)
    for block in model.model.layers:
        for weight in (block.self_attn.q_proj.weight, block.mlp.down_proj.weight):
            assert ((weight.view(len(weight), -1, 4) != 0).sum(-1) <= 2).all()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    promise = json.loads((out / "secateur" / "promise.json").read_text())
    assert len(promise["linears"]) == 14


def test_the_room_is_that_of_inspect(run, trained):
    out, ran = trained
    assert ran.json["room"] == run("inspect", out, "--json").json["room"]
    assert any("without any zeros: dense int8" in line for line in ran.json["warnings"])


@pytest.mark.parametrize("method", ["ast", "none"])
def test_what_is_printed_and_the_command_after_it(method, run, sharp_dir, tmp_path):
    flags = [*SMALL, "--tokens", 256, "--method", method, "--set", "loss.temperature=3"]
    ran = run("train", sharp_dir, "--data", "embedded", *flags, "--out", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert "nats on held-out windows, forward KL at temperature 3\n" in re.sub(" +\n", "\n", ran.out)
    for words in ("2:4", "changed at the last refresh", "every promise is kept"):
        assert (words in ran.out) == (method == "ast"), words
    line = next(line for line in ran.out.splitlines() if line.startswith("Next:"))
    ran = run(*shlex.split(line.removeprefix("Next:"))[1:], "--limit", 2)
    assert ran.code == 0, ran.err


def test_its_recipe_gives_the_same_bytes_again(run, trained, tmp_path, files):
    out, _ = trained
    assert run("train", "--recipe", out / "secateur" / "recipe.yaml", "--out", tmp_path / "again").code == 0
    assert files(tmp_path / "again") == files(out)


def test_every_step_is_recorded(trained):
    out, _ = trained
    steps = [json.loads(line) for line in (out / "secateur" / "records.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [*range(1, 65)]
    assert all(math.isfinite(step["loss"]) for step in steps)
    assert steps[-1]["lr"] == pytest.approx(1e-3)  # a tenth, as final_lr says
    assert max(step["lr"] for step in steps) == 1e-2
    assert any(step["flip_rate"] for step in steps)


WAYS = {
    "ast": ["--method", "ast"],
    "cast": ["--method", "cast"],
    "admm": [
        *("--method", "admm", "--pattern", "unstructured", "--sparsity", 0.8),
        *("--set", "metric=fisher", "--set", "ramp=cosine", "--set", "refresh=4"),
    ],
    "lora": ["--method", "fixed", "--lora", 4, "--set", "gradient_checkpointing=true"],
    "slorb": ["--slorb", 8],
    "slorb that follows": ["--slorb", 8, "--set", "slorb_follow=true", "--set", "slorb_train_X=false"],
    "wanda": ["--set", "metric=wanda", "--set", "gradient_checkpointing=true"],
    "global": ["--pattern", "global", "--sparsity", 0.6, "--set", "sparsify=0.5"],
}


SHORT = ["--tokens", 2048, "--set", "refresh=3", "--set", "checkpoint=4"]
"""16 steps; the mask moves until step 12."""


@pytest.fixture(scope="module", params=WAYS)
def whole(request, run, sharp_dir, text_file, tmp_path_factory):
    """The flags of a way, and what an undisturbed run saves."""
    flags, out = ["--data", text_file, *SMALL, *SHORT, *WAYS[request.param]], tmp_path_factory.mktemp("whole") / "out"
    assert run("train", sharp_dir, *flags, "--out", out).code == 0
    return flags, out


@pytest.mark.parametrize("at", [2, 10])  # nothing kept yet; between a state and a refresh
def test_killed_and_resumed_gives_the_same_bytes(at, whole, run, killed_at, sharp_dir, tmp_path, files):
    flags, undisturbed = whole
    out = tmp_path / "out"
    killed_at(at, "train", sharp_dir, *flags, "--out", out)
    assert not out.exists()
    kept = 4 * (at // 4)
    if kept:
        refused = run("train", sharp_dir, *flags, "--out", out)
        assert refused.code == 2
        assert "holds an unfinished run; repeat its command with --resume" in refused.error
        differs = run("train", sharp_dir, *flags, "--set", "c=2", "--out", out, "--resume")
        assert differs.code == 2
        assert "recipe.c was 3.0 and is 2.0" in differs.error
    ran = run("train", sharp_dir, *flags, "--out", out, "--resume", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["resumed_after_steps"] == kept
    assert files(out) == files(undisturbed)
    assert not list(tmp_path.glob("*.unfinished"))
    again = run("train", sharp_dir, *flags, "--out", out, "--resume")
    assert again.code == 0
    assert "is complete: nothing was left to do" in again.err


def test_a_pruned_student_learns_from_what_it_was_pruned_from(run, sharp_dir, text_file, tmp_path):
    pruned = tmp_path / "pruned"
    assert run("prune", sharp_dir, "--method", "magnitude", "--pattern", "2:4", "--out", pruned).code == 0
    flags = ["--data", text_file, *SMALL, "--method", "fixed", "--out", tmp_path / "out", "--json"]
    ran = run("train", pruned, *flags)
    assert ran.code == 0, ran.err
    assert ran.json["teacher"]["source"] == str(sharp_dir)
    assert ran.json["held_out"]["after"]["divergence"] < 0.7 * ran.json["held_out"]["before"]["divergence"]
    assert masks(pruned) == masks(tmp_path / "out")


def test_adapters_keep_every_zero_of_a_pruned_student(run, sharp_dir, text_file, tmp_path):
    pruned = tmp_path / "pruned"
    assert run("prune", sharp_dir, "--method", "magnitude", "--pattern", "2:4", "--out", pruned).code == 0
    flags = ["--data", text_file, *SMALL, "--method", "fixed", "--lora", 4, "--out", tmp_path / "out", "--json"]
    ran = run("train", pruned, *flags)
    assert ran.code == 0, ran.err
    assert ran.json["held_out"]["after"]["divergence"] < 0.8 * ran.json["held_out"]["before"]["divergence"]
    assert run("inspect", tmp_path / "out").code == 0
    before, after = (load_all(folder) for folder in (pruned, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, W in before.items():
        assert (after[name][W == 0] == 0).all()
        assert ("proj" in name) == bool((after[name] != W).any())


def load_all(directory):
    from safetensors.torch import load_file

    return load_file(directory / "model.safetensors")


def masks(directory):
    from safetensors.torch import load_file

    tensors = load_file(directory / "model.safetensors")
    return {
        name: (t == 0).sum().item() and (t == 0).nonzero().tolist() for name, t in tensors.items() if "proj" in name
    }


def test_fused_experts_are_trained_and_keep_their_pattern(run, moe, byte_tokenizer, text_file, tmp_path):
    moe("mixtral", vocab_size=260).save_pretrained(tmp_path / "moe")
    byte_tokenizer.save_pretrained(tmp_path / "moe")
    ran = run("train", tmp_path / "moe", "--data", text_file, *SMALL, "--out", tmp_path / "out", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["held_out"]["after"]["divergence"] < 0.9 * ran.json["held_out"]["before"]["divergence"]
    assert run("inspect", tmp_path / "out").code == 0


@pytest.mark.parametrize(
    "flags", [["--method", "none"], ["--pattern", "row", "--sparsity", "0.7"]], ids=["none", "row"]
)
def test_other_patterns_and_none(flags, run, sharp_dir, text_file, tmp_path):
    ran = run("train", sharp_dir, "--data", text_file, *SMALL, *flags, "--out", tmp_path / "out", "--json")
    assert ran.code == 0, ran.err
    assert run("inspect", tmp_path / "out").code == 0
    zeros = sum(map(bool, masks(tmp_path / "out").values()))
    assert zeros == (0 if "none" in flags else 14)
    assert ran.json["linears"] == zeros
    assert ran.json["sparsity"] == (0 if "none" in flags else 0.7)


def test_admm_keeps_exactly_what_it_promised(run, sharp_dir, text_file, tmp_path):
    """And is better than what it would be pruned to at once."""
    pattern = ["--data", text_file, *SMALL, "--pattern", "unstructured", "--sparsity", 0.9, "--json"]
    flags = {"fixed": ["--tokens", 128], "admm": ["--set", "metric=fisher"]}
    ran = {m: run("train", sharp_dir, *pattern, "--method", m, *flags[m], "--out", tmp_path / m) for m in flags}
    assert ran["admm"].code == 0, ran["admm"].err
    at_once, ours = (
        ran[m].json["held_out"][when]["divergence"] for m, when in (("fixed", "before"), ("admm", "after"))
    )
    assert ours < 0.7 * at_once
    assert run("inspect", tmp_path / "admm").code == 0
    matrices = {name: W for name, W in load_all(tmp_path / "admm").items() if "proj" in name}
    assert len(matrices) == 14
    assert all(int((W == 0).sum()) == round(0.9 * W.numel()) for W in matrices.values())


@pytest.mark.parametrize("start", ["dense", "pruned"])
def test_branches_are_trained_and_saved_apart(start, run, sharp_dir, text_file, tmp_path):
    from secateur.models.branches import attached
    from secateur.models.load import load

    student = sharp_dir
    if start == "pruned":
        student = tmp_path / "pruned"
        assert run("prune", sharp_dir, "--method", "magnitude", "--pattern", "2:4", "--out", student).code == 0
    before, after = (
        run("train", student, "--data", text_file, *SMALL, *more, "--out", tmp_path / name, "--json").json
        for name, more in {"bare": [], "branched": ["--slorb", 8]}.items()
    )
    assert before["low_rank"] is None
    numbers = 2 * (2 * (32 * 4 + 4 * 32) + 2 * (16 * 4 + 4 * 32) + 2 * (64 * 4 + 4 * 32) + (32 * 8 + 8 * 64))
    assert after["low_rank"]["numbers"] == numbers
    assert after["held_out"]["after"]["divergence"] < 0.6 * after["held_out"]["before"]["divergence"]
    assert run("inspect", tmp_path / "branched").code == 0
    branches = attached(load(str(tmp_path / "branched")).model)
    assert len(branches) == 14
    assert all(branch.S.any() for branch in branches.values())


def test_one_threshold_for_all_matrices(run, sharp_dir, text_file, tmp_path):
    out = tmp_path / "out"
    flags = ["--data", text_file, *SMALL, "--pattern", "global", "--sparsity", 0.7, "--out", out, "--json"]
    ran = run("train", sharp_dir, *flags)
    assert ran.code == 0, ran.err
    assert ran.json["pattern"]["words"] == "70% of the weights of all matrices together are zero, at most 95% of one"
    promise = json.loads((out / "secateur" / "promise.json").read_text())
    found = run("inspect", out, "--json").json
    assert found["zeros"] == promise["zeros"] == round(0.7 * ran.json["weights"])
    shares = {name: entry["pattern"]["sparsity"] for name, entry in promise["linears"].items()}
    assert len(set(shares.values())) > 1
    assert {row["name"]: row["sparsity"] for row in found["rows"] if row["pattern"]} == pytest.approx(shares)
    promise["zeros"] += 1
    (out / "secateur" / "promise.json").write_text(json.dumps(promise))
    assert run("inspect", out).code == 1
    recipe = run("train", "--recipe", out / "secateur" / "recipe.yaml", "--out", tmp_path / "again", "--json")
    assert recipe.json["sparsity"] == ran.json["sparsity"]


def test_the_metric_decides(run, sharp_dir, text_file, trained, tmp_path):
    found = [masks(trained[0])]
    for metric in ("wanda", "taylor"):
        out = tmp_path / metric
        ran = run("train", sharp_dir, "--data", text_file, *SMALL, "--set", f"metric={metric}", "--out", out, "--json")
        assert ran.code == 0, ran.err
        assert ran.json["held_out"]["after"]["divergence"] < 0.7 * ran.json["held_out"]["before"]["divergence"]
        assert run("inspect", out).code == 0
        found.append(masks(out))
    assert all(one != other for one, other in combinations(found, 2))


WRONG = {
    "global without a share": (["--data", "{text}", *SMALL, "--pattern", "global"], 2, "'global' needs a sparsity"),
    "too much to be global": (
        ["--data", "{text}", *SMALL, "--pattern", "global", "--sparsity", 0.96],
        2,
        "in [0, 0.95]; got 0.96",
    ),
    "global with branches": (
        ["--data", "{text}", *SMALL, "--pattern", "global", "--sparsity", 0.5, "--slorb", 8],
        2,
        "use unstructured",
    ),
    "adapters under a moving mask": (
        ["--data", "{text}", *SMALL, "--lora", 4],
        2,
        "lora trains adapters under a mask that stays, and method ast does not keep it; use method fixed",
    ),
    "adapters and branches": (
        ["--data", "{text}", *SMALL, "--method", "fixed", "--lora", 4, "--slorb", 8],
        2,
        "leave out slorb",
    ),
    "adapters too large": (
        ["--data", "{text}", *SMALL, "--method", "fixed", "--lora", 40],
        2,
        "an adapter's rank must lie in 1..",
    ),
    "a fixed mask that grows": (
        ["--data", "{text}", *SMALL, "--method", "fixed", "--set", "sparsify=0.5"],
        2,
        "sparsify lets the mask move, and method fixed keeps it",
    ),
    "scales that do not divide": (["--data", "{text}", *SMALL, "--set", "scales=3"], 2, "in_features divisible by 3"),
    "unknown metric": (["--data", "{text}", *SMALL, "--set", "metric=wands"], 2, "metric: input should be 'magnitude'"),
    "no tokens": (["--data", "{text}"], 2, "no --tokens; say how long to train"),
    "too few tokens": (["--data", "{text}", "--tokens", 10], 2, "10 tokens are less than one step"),
    "unknown method": (["--data", "{text}", *SMALL, "--method", "magic"], 2, "method: input should be 'ast'"),
    "pattern does not divide": (["--data", "{text}", *SMALL, "--pattern", "3:7"], 2, "7"),
    "k does not divide": (["--data", "{text}", *SMALL, "--slorb", 5], 2, "k to divide in_features, got k = 5 and 32"),
    "branches beside dense weights": (
        ["--data", "{text}", *SMALL, "--method", "cast", "--slorb", 8],
        2,
        "use ast, ast_g, srste or fixed instead of cast",
    ),
    "branches beside a rising sparsity": (
        ["--data", "{text}", *SMALL, "--pattern", "row", "--sparsity", 0.5, "--slorb", 8, "--set", "sparsify=0.5"],
        2,
        "leave out sparsify",
    ),
    "a decay that feeds": (["--data", "{text}", *SMALL, "--set", "decay=-1"], 2, "decay must be at least 0 and finite"),
    "no decay": (["--data", "{text}", *SMALL, "--set", "weight_decay=-1"], 2, "weight_decay must be at least 0"),
    "endless moments": (
        ["--data", "{text}", *SMALL, "--set", "betas=[0.9, 1.0]"],
        2,
        "betas are two numbers in [0, 1)",
    ),
    "heat": (["--data", "{text}", *SMALL, "--set", "loss.temperature=1e999"], 2, "a finite temperature > 0"),
    "float16": (["--data", "{text}", *SMALL, "--set", "dtype=float16"], 2, "--set dtype=bfloat16 or dtype=float32"),
    "unknown key": (["--data", "{text}", *SMALL, "--set", "los.alpha=1"], 2, "did you mean loss?"),
    "bad loss": (["--data", "{text}", *SMALL, "--set", "loss.alpha=2"], 2, "wanted alpha in [0, 1]"),
    "text too short": (["--data", "{text}", *SMALL, "--seq-len", 128, "--set", "holdout=9999"], 1, "give more text"),
    "window too long": (["--data", "{text}", *SMALL, "--seq-len", 1024], 2, "above the model's context of 128"),
    "no such teacher": (["--data", "{text}", *SMALL, "--teacher", "./nowhere"], 1, "there is nothing at ./nowhere"),
}


def test_one_of_several_texts_is_too_short(run, sharp_dir, text_file, tmp_path):
    (tmp_path / "short.txt").write_text("short")
    ran = run(
        "train", sharp_dir, "--data", text_file, "--data", tmp_path / "short.txt", *SMALL, "--out", tmp_path / "o"
    )
    assert ran.code == 1
    assert "short.txt holds 5 tokens, fewer than one window of 32" in ran.error


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that is not there")
def test_a_teacher_on_a_gpu_that_is_not_there(run, sharp_dir, text_file, tmp_path):
    ran = run("train", sharp_dir, "--data", text_file, *SMALL, "--set", "teacher_device=cuda", "--out", tmp_path / "o")
    assert ran.code != 0
    assert "torch sees no CUDA device here" in ran.error


def test_as_many_zeros_as_one_threshold_may_make(run, sharp_dir, text_file, tmp_path):
    most = ["--pattern", "global", "--sparsity", 0.95, "--tokens", 256, "--out", tmp_path / "out"]
    ran = run("train", sharp_dir, "--data", text_file, *SMALL, *most)
    assert ran.code == 0, ran.err


@pytest.mark.parametrize(("flags", "code", "said"), WRONG.values(), ids=WRONG)
def test_bad_input_ends_in_one_line(flags, code, said, run, sharp_dir, text_file, tmp_path):
    flags = [str(text_file) if flag == "{text}" else flag for flag in flags]
    ran = run("train", sharp_dir, *flags, "--out", tmp_path / "out")
    assert ran.code == code, ran.err
    assert said in ran.error
    assert not list(tmp_path.iterdir())


def test_a_teacher_of_other_words_is_refused(run, sharp_dir, text_file, tmp_path, tiny_llama, byte_tokenizer):
    tiny_llama.save_pretrained(tmp_path / "other")
    byte_tokenizer.save_pretrained(tmp_path / "other")
    flags = ["--data", text_file, *SMALL, "--teacher", tmp_path / "other", "--out", tmp_path / "out"]
    ran = run("train", sharp_dir, *flags)
    assert ran.code == 2
    assert "the student has 260 tokens and the teacher 128" in ran.error


def test_steps_without_a_finite_gradient_are_left_out_and_counted(run, sharp_dir, text_file, tmp_path, monkeypatch):
    from secateur.training.loop import Loop

    gradients = Loop._gradients

    def poisoned(self, ids):
        losses = gradients(self, ids)
        if self.step in bad:
            next(self.learner.parameters()).grad.fill_(math.nan)
        return losses

    monkeypatch.setattr(Loop, "_gradients", poisoned)
    flags = ["--data", text_file, *SMALL, "--set", "checkpoint=10", "--set", "tolerated=2"]
    bad = {3, 30}
    ran = run("train", sharp_dir, *flags, "--out", tmp_path / "out", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["skipped_steps"] == 2
    assert "2 steps were left out" in " ".join(ran.json["warnings"])
    assert run("inspect", tmp_path / "out").code == 0
    bad = {3, 30, 31}
    ran = run("train", sharp_dir, *flags, "--out", tmp_path / "broken")
    assert ran.code == 1
    assert "step 32: the gradient is not finite" in ran.error
    assert "keeps 30 steps: go on with --resume" in ran.error


SHAPES = {
    "opt": {"hidden_size": 32, "ffn_dim": 64, "word_embed_proj_dim": 32, "num_hidden_layers": 2},
    "gpt2": {"n_embd": 32, "n_layer": 2},
}


@pytest.mark.parametrize("kind", SHAPES)
def test_models_of_another_build_are_trained_too(kind, run, text_file, byte_tokenizer, tmp_path):
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    ids = {"vocab_size": 260, "bos_token_id": 0, "eos_token_id": 0}
    config = AutoConfig.for_model(kind, num_attention_heads=4, **ids, **SHAPES[kind])
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    byte_tokenizer.save_pretrained(tmp_path / "model")
    flags = ["--data", text_file, *SMALL, "--tokens", 512, "--out", tmp_path / "out"]
    ran = run("train", tmp_path / "model", *flags)
    assert ran.code == 0, ran.err
    found = run("inspect", tmp_path / "out", "--baseline", tmp_path / "model", "--json")
    assert found.code == 0, found.out
    planned = json.loads((tmp_path / "out" / "secateur" / "promise.json").read_text())["linears"]
    assert found.json["uncompared"] == len(load_file(tmp_path / "out" / "model.safetensors")) - len(planned)
