"""A run that is stopped at any write goes on to the same bytes, and nothing of it is forgotten or overwritten."""

import json

import pytest

SMALL = ["--samples", "4", "--seq-len", "32"]


class PowerCutError(BaseException):
    """Stands for the end of the process."""


def stop_at(number, monkeypatch):
    """The process ends instead of making the given file durable (counted from 0), with its new name half written."""
    from secateur.models import durable as files
    from secateur.pruning import workdir

    durable, calls = files.durable, iter(range(1000))

    def cut(path, write):
        if next(calls) == number:
            path.with_name(path.name + ".new").write_bytes(b"half")
            raise PowerCutError
        durable(path, write)

    for module in (files, workdir):
        monkeypatch.setattr(module, "durable", cut)


WRITES = ["run.json", "block 0", "hidden 1", "state 1", "block 1", "hidden 2", "state 2"]
METHODS = {
    "sparsellm": ["--method", "sparsellm"],
    "wanda": ["--method", "wanda"],
    "with branches": ["--method", "sparsegpt", "--low-rank", "4"],
}


@pytest.mark.parametrize("number", range(len(WRITES)), ids=WRITES)
@pytest.mark.parametrize("method", METHODS)
def test_stopped_at_any_write_and_resumed_gives_the_same_bytes(
    number, method, run, model_dir, text_file, tmp_path, monkeypatch, files
):
    flags = [*METHODS[method], "--sparsity", "0.6", "--data", text_file, *SMALL]
    assert run("prune", model_dir, *flags, "--out", tmp_path / "whole").code == 0
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_at(number, patch)
        with pytest.raises(PowerCutError):
            run("prune", model_dir, *flags, "--out", out)
    assert not out.exists()
    ran = run("prune", model_dir, *flags, "--out", out, "--resume", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["resumed_after_blocks"] == max(0, (number - 1) // 3)
    assert files(out) == files(tmp_path / "whole")
    assert not (tmp_path / "out.unfinished").exists()
    names = [json.loads(line)["name"] for line in (out / "secateur" / "records.jsonl").read_text().splitlines()]
    assert names == ["model.layers.0", "model.layers.1"]


@pytest.fixture
def unfinished(run, model_dir, text_file, tmp_path, monkeypatch):
    """OUT, the flags and the directory of a run that was stopped after its first block."""
    flags = ["--sparsity", "0.6", "--data", text_file, *SMALL]
    with monkeypatch.context() as patch:
        stop_at(WRITES.index("state 2"), patch)
        with pytest.raises(PowerCutError):
            run("prune", model_dir, *flags, "--out", tmp_path / "out")
    return tmp_path / "out", flags, tmp_path / "out.unfinished"


def test_an_unfinished_run_is_neither_forgotten_nor_overwritten(unfinished, run, model_dir):
    out, flags, kept = unfinished
    ran = run("prune", model_dir, *flags, "--out", out)
    assert ran.code == 2
    assert f"{kept} holds an unfinished run; repeat its command with --resume, or delete it first" in ran.error
    assert f"load {model_dir}" not in ran.err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--sparsity", "0.7"], "recipe.sparsity was 0.6 and is 0.7"),
        (["--seed", "1"], "recipe.seed was 0 and is 1; the tokens of the text changed"),
        (["--set", "method.iterations=7"], "recipe.method.iterations was 3 and is 7"),
    ],
)
def test_a_changed_request_is_refused_with_the_keys_that_differ(change, said, unfinished, run, model_dir):
    out, flags, _ = unfinished
    ran = run("prune", model_dir, *flags, *change, "--out", out, "--resume")
    assert ran.code == 2
    assert said in ran.error
    assert "repeat that request, or delete it" in ran.error


@pytest.mark.parametrize("resume", [[], ["--resume"]], ids=["anew", "resumed"])
@pytest.mark.parametrize("first", ["prune", "train"])
def test_what_another_command_left_is_not_touched(
    first, resume, request, run, killed_at, model_dir, text_file, tmp_path
):
    train = ["train", model_dir, "--data", text_file, *("--tokens", 384, "--seq-len", 32, "--batch", 4)]
    train += [*("--micro-batch", 2), *("--set", "holdout=2", "--set", "checkpoint=1"), "--out", tmp_path / "out"]
    prune = ["prune", model_dir, "--sparsity", 0.6, "--data", text_file, *SMALL, "--out", tmp_path / "out"]
    if first == "prune":
        request.getfixturevalue("unfinished")
    else:
        killed_at(2, *train)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out.unfinished").rglob("*.*")}
    ran = run(*(train if first == "prune" else prune), *resume)
    assert ran.code == 2, ran.err
    said = "is a run of another command" if resume else "holds an unfinished run; repeat its command"
    assert said in ran.error
    assert kept == {path: path.stat().st_mtime_ns for path in kept}


def test_two_runs_never_work_in_one_directory(unfinished, run, model_dir):
    from filelock import FileLock

    out, flags, kept = unfinished
    with FileLock(kept / "lock"):
        ran = run("prune", model_dir, *flags, "--out", out, "--resume")
    assert ran.code == 2
    assert "another process is at work in" in ran.error


def test_a_damaged_state_is_one_line(unfinished, run, model_dir):
    out, flags, kept = unfinished
    for name in ("hidden/00001-000-00000.safetensors", "blocks/00000.safetensors", "state.json"):
        (kept / name).write_bytes(b"\0" * 40)
        ran = run("prune", model_dir, *flags, "--out", out, "--resume")
        assert ran.code == 1
        assert f"{name} of an unfinished run is not readable" in ran.error


def test_blocks_left_on_disk_can_be_resumed(run, model_dir, text_file, tmp_path, monkeypatch, files):
    flags = ["--sparsity", "0.6", "--data", text_file, *SMALL, "--offload", "on", "--json"]
    assert run("prune", model_dir, *flags, "--out", tmp_path / "whole").code == 0
    with monkeypatch.context() as patch:
        stop_at(WRITES.index("state 2"), patch)
        with pytest.raises(PowerCutError):
            run("prune", model_dir, *flags, "--out", tmp_path / "out")
    ran = run("prune", model_dir, *flags, "--out", tmp_path / "out", "--resume")
    assert ran.json["resumed_after_blocks"] == 1
    assert files(tmp_path / "out") == files(tmp_path / "whole")
