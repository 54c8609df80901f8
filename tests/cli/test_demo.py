"""``secateur demo`` with a tiny model in place of SmolLM2: one table, plain words about the text, the next command."""

import signal

import pytest

import secateur.cli.demo as demo
import secateur.models.load as loading


@pytest.fixture
def small_demo(monkeypatch, tmp_path, model_dir):
    load = loading.load
    tiny = {"demo": str(model_dir)}
    monkeypatch.setattr(loading, "load", lambda source, **options: load(tiny.get(source, source), **options))
    monkeypatch.setattr(demo, "SAMPLES", 4)
    monkeypatch.setattr(demo, "TRAIN_SAMPLES", 4)
    monkeypatch.setattr(demo, "SEQ_LEN", 64)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_demo_prints_one_table_and_the_next_command(small_demo, run):
    ran = run("demo")
    assert ran.code == 0, ran.err
    for words in ("perplexity on held-out text", "dense", "pruned", "50.00%", "time to prune", "peak memory"):
        assert words in ran.out
    assert "CPython's own help text" in ran.out
    assert "Next:  secateur prune demo --pattern 2:4 --data embedded" in ran.out
    assert "CPython's own help text" in ran.err, "said before the work begins"
    assert (small_demo / "secateur-demo" / "secateur" / "recipe.yaml").is_file()
    assert run("inspect", "secateur-demo").code == 0


def test_demo_goes_on_where_it_was_stopped(small_demo, run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("secateur.runs.save", lambda *_: signal.raise_signal(signal.SIGINT))
        stopped = run("demo")
    assert stopped.code == 130
    assert "keeps 2 finished blocks: go on with --resume" in stopped.error
    ran = run("demo", "--resume", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["prune"]["resumed_after_blocks"] == 2


def test_demo_trains_and_shows_what_it_won_back(small_demo, run):
    ran = run("demo", "--train")
    assert ran.code == 0, ran.err
    for words in ("dense", "one-shot", "trained", "forward KL at temperature 2", "masks moved", "tokens, "):
        assert words in ran.out
    assert run("inspect", "secateur-demo").code == 0
    again = run("demo", "--train", "--json").json
    assert again["train"]["steps"] == 8
    assert set(again["eval"]) == {"dense", "one-shot", "trained"}


def test_demo_replaces_its_own_out_and_speaks_json(small_demo, run):
    assert run("demo", "--out", "mine").code == 0
    ran = run("demo", "--out", "mine", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["prune"]["sparsity"]["achieved"] == 0.5
    assert ran.json["eval"]["log_ppl_gap"] is not None
