"""``secateur cache``: a student learns from answers on disk as it does from the model that gave them."""

import json
import shlex

import pytest

SMALL = ["--tokens", 1024, "--seq-len", 32, "--batch", 4, "--lr", 1e-2, "--set", "holdout=4", "--set", "loss.alpha=1"]


@pytest.fixture(scope="module")
def cache(run, sharp_dir, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("cache") / "cache"
    flags = ["--data", text_file, "--seq-len", 32, "--top-k", 255, "--out", out, "--json"]
    ran = run("train", "cache", sharp_dir, *flags)  # which is "cache"
    assert ran.code == 0, ran.err
    return out


def test_learning_from_the_cache_is_learning_from_the_model(run, cache, sharp_dir, text_file, tmp_path, files):
    """255 of 260 tokens and a bucket: nearly the whole divergence."""
    flags = ["train", sharp_dir, "--data", text_file, *SMALL, "--json"]
    model = run(*flags, "--out", tmp_path / "model")
    cached = run(*flags, "--teacher", cache, "--out", tmp_path / "cached")
    assert cached.code == 0, cached.err
    assert cached.json["teacher"]["source"] == str(sharp_dir)
    again = run("train", "--recipe", tmp_path / "cached" / "secateur" / "recipe.yaml", "--out", tmp_path / "again")
    assert again.code == 0, again.err
    assert files(tmp_path / "again") == files(tmp_path / "cached")
    for place in ("before", "after"):
        there, here = (ran.json["held_out"][place]["divergence"] for ran in (model, cached))
        assert here == pytest.approx(there, rel=0.05)


def test_size_and_facts(cache):
    facts = json.loads((cache / "cache.json").read_text())
    assert (facts["k"], facts["seq_len"], facts["windows"], facts["vocabulary"]) == (255, 32, 281, 260)
    size = sum(file.stat().st_size for file in cache.glob("*.safetensors"))
    assert size == pytest.approx(281 * 32 * (255 * 6 + 4), rel=0.01)


def test_a_build_that_was_killed_goes_on_to_the_same_bytes(run, cache, sharp_dir, text_file, tmp_path, monkeypatch):
    from secateur.training import cache as room

    flags = ["cache", sharp_dir, "--data", text_file, "--seq-len", 32, "--top-k", 255, "--out", tmp_path / "out"]
    answer, calls = room._answer, iter(range(1000))

    def killed(*args):
        if next(calls) == 150:
            raise KeyboardInterrupt
        return answer(*args)

    with monkeypatch.context() as patch:
        patch.setattr(room, "_answer", killed)
        assert run(*flags).code == 130
    assert not (tmp_path / "out").exists()
    assert "holds an unfinished run of 2 files" in run(*flags).error
    assert run(*flags, "--resume").code == 0
    for file in cache.glob("*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_the_command_that_it_prints_next_runs(run, sharp_dir, text_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = run(
        "cache", sharp_dir, "--data", text_file, "--seq-len", 64, "--temperature", 3, "--out", tmp_path / "cache"
    )
    assert made.code == 0
    line = next(line for line in made.out.splitlines() if line.startswith("Next:"))
    words = shlex.split(line.removeprefix("Next:"))[1:]
    ran = run(*words, "--set", "holdout=4", "--tokens", 1024)
    assert ran.code == 0, ran.err


def test_who_learned_from_a_cache_is_taught_by_it_again(run, cache, sharp_dir, text_file, tmp_path):
    flags = ["--data", text_file, *SMALL, "--tokens", 256, "--json"]
    assert run("train", sharp_dir, "--teacher", cache, *flags, "--out", tmp_path / "one").code == 0
    ran = run("train", tmp_path / "one", *flags, "--out", tmp_path / "two")
    assert ran.code == 0, ran.err
    assert ran.json["teacher"]["source"] == str(sharp_dir)


def test_a_build_goes_on_with_the_same_text_only(run, sharp_dir, tmp_path, monkeypatch):
    from secateur.training import cache as room

    text = tmp_path / "text.txt"
    text.write_text("one text " * 300)
    flags = ["cache", sharp_dir, "--data", text, "--seq-len", 32, "--out", tmp_path / "out"]
    durable, calls = room.durable, iter(range(1000))

    def killed(*args):
        if next(calls) == 1:
            raise KeyboardInterrupt
        durable(*args)

    with monkeypatch.context() as patch:
        patch.setattr(room, "durable", killed)
        assert run(*flags).code == 130
    text.write_text("two text " * 300)
    ran = run(*flags, "--resume")
    assert ran.code == 2
    assert "the tokens of the text changed" in ran.error


def test_what_cannot_be_built(run, cache, sharp_dir, text_file, tmp_path):
    again = run("cache", sharp_dir, "--data", text_file, "--out", cache)
    assert again.code == 2
    assert "is a finished cache; train with it, or delete it" in again.error
    many = run("cache", sharp_dir, "--data", text_file, "--top-k", 300, "--out", tmp_path / "out")
    assert many.code == 2
    assert "top-k 300 of a vocabulary of 260 tokens" in many.error
    assert not list(tmp_path.iterdir())


WRONG = {
    "other windows": (["--seq-len", 16], 1, "does not hold a window of this text"),
    "other temperature": (["--set", "loss.temperature=1"], 2, "set loss.temperature=2"),
    "other divergence": (["--set", "loss.divergence=reverse"], 2, "set loss.divergence=forward"),
}


@pytest.mark.parametrize(("flags", "code", "said"), WRONG.values(), ids=WRONG)
def test_a_cache_that_does_not_fit(flags, code, said, run, cache, sharp_dir, text_file, tmp_path):
    base = ["train", sharp_dir, "--data", text_file, *SMALL, "--teacher", cache]
    ran = run(*base, *flags, "--out", tmp_path / "out")
    assert ran.code == code, ran.err
    assert said in ran.error


DAMAGED = {"cut short": (b"{", "build it again"), "later version": (b'{"version": 9}', "this Secateur knows 1")}


@pytest.mark.parametrize(("damage", "said"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_manifest(damage, said, run, cache, sharp_dir, text_file, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "cache.json").write_bytes(damage)
    ran = run("train", sharp_dir, "--data", text_file, *SMALL, "--teacher", broken, "--out", tmp_path / "out")
    assert ran.code == 1
    assert said in ran.error
