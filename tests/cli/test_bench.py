"""``bench`` and the targets of ``export``, as they are typed."""

import io
import json

import pytest
import torch
from safetensors.torch import load_file, save_file


def test_dense_against_pruned(run, model_dir, tmp_path):
    """Two real processes, two random models: that all of it is told, not how fast they are."""
    ran = run("bench", model_dir, model_dir, "--prompt", "16,8", "--tokens", 2, "--batch", "1,2", "--rounds", 2,
              "--json", "--plot", tmp_path / "bench.svg", "--threads", 1)  # fmt: skip
    assert ran.code == 0, ran.err
    told = ran.json
    assert [(cell["phase"], cell["batch"], cell["prompt"]) for cell in told["cells"]] == [
        (phase, batch, prompt) for phase in ("prefill", "decode") for batch in (1, 2) for prompt in (16, 8)
    ]
    for cell in told["cells"]:
        assert 0 < cell["speedup"]["low"] <= cell["speedup"]["median"] <= cell["speedup"]["high"]
        assert min(cell["tokens_per_second"]) > 0
    for model in (told["dense"], told["pruned"]):
        assert (model["runtime"], model["dtype"], model["device"]) == ("transformers", "float32", "cpu")
        assert model["file_bytes"] == (model_dir / "model.safetensors").stat().st_size
        assert 0 < model["own_memory"] < model["memory"] <= model["peak_memory"] + model["own_memory"]
    assert told["options"]["threads"] == 1
    assert "<svg" in (tmp_path / "bench.svg").read_text()
    from rich.console import Console

    from secateur.report.bench_page import bench_page

    console = Console(width=160, record=True, file=io.StringIO())
    told["machine"]["busy"] = True
    for part in bench_page(told):
        console.print(part)
    words = console.export_text()
    assert "tokens of a prompt, to the first new one" in words
    assert "tokens/s" in words
    assert "under load" in words


def test_a_plot_that_fails_costs_no_measurement(run, monkeypatch, tmp_path):
    """Told first, then drawn."""

    def full(told, path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("secateur.evaluation.bench.bench", lambda *_: {"cells": []})
    monkeypatch.setattr("secateur.report.bench_page.bench_page", lambda told: ["measured"])
    monkeypatch.setattr("secateur.report.bench_page.draw", full)
    ran = run("bench", "a", "b", "--plot", tmp_path / "bench.svg")
    assert (ran.code, ran.out) == (1, "measured\n")
    assert "bench.svg: No space left" in ran.error


@pytest.fixture(scope="module")
def two_of_four(run, model_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("pruned") / "out"
    assert run("prune", model_dir, "--method", "magnitude", "--pattern", "2:4", "--out", out).code == 0
    return out


def test_two_of_four(run, two_of_four, tmp_path):
    ran = run("export", two_of_four, "--to", "torch-2:4", "--out", tmp_path / "packed")
    assert ran.code == 0, ran.err
    assert "14 matrices" in ran.out
    assert "17.00 in sparse matrices, " in ran.out  # of float32
    assert f"secateur.load_sparse('{tmp_path / 'packed'}')" in ran.out
    ran = run("inspect", tmp_path / "packed")
    assert ran.code == 0
    assert "every promise is kept" in ran.out
    assert "bits a weight in all: packed, two of every four and where they are" in ran.out
    assert "sparse-safetensors" not in ran.out
    stored = (tmp_path / "packed" / "model.sparse24.safetensors").stat().st_size
    assert run("inspect", tmp_path / "packed", "--json").json["room"]["bytes"] == stored
    evaluate = ("eval", tmp_path / "packed", "--data", "embedded")
    again = ("export", tmp_path / "packed", "--to", "sparse-safetensors", "--out", tmp_path / "more")
    for words in (evaluate, again):
        ran = run(*words)
        assert ran.code == 1
        assert "is packed for" in ran.error
    if not torch.cuda.is_available():
        ran = run("bench", model_dir_of(two_of_four), tmp_path / "packed", "--prompt", 8, "--tokens", 1)
        assert ran.code == 1
        assert "no CUDA device here" in ran.error


def model_dir_of(pruned):
    return json.loads((pruned / "secateur" / "report.json").read_text())["model"]["source"]


def not_two_of_four(pruned, out):
    held = load_file(pruned / "model.safetensors")
    held["model.layers.1.mlp.down_proj.weight"][:] = 1
    out.mkdir()
    for path in pruned.glob("*.json"):
        (out / path.name).write_bytes(path.read_bytes())
    (out / "secateur").mkdir()
    (out / "secateur" / "promise.json").write_bytes((pruned / "secateur" / "promise.json").read_bytes())
    save_file(held, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (
            ("export", "{good}", "--to", "zip", "--out", "{out}"),
            2,
            "unknown target 'zip'; there is sparse-safe",
        ),
        (
            ("export", "{bad}", "--to", "torch-2:4", "--out", "{out}"),
            2,
            "1.mlp.down_proj.weight is not 2:4: row 0",
        ),
        (("export", "{nowhere}", "--to", "torch-2:4", "--out", "{out}"), 1, "no directory"),
        (
            ("export", "{good}", "--to", "torch-2:4", "--samples", "3", "--out", "{out}"),
            2,
            "openvino and not torch-2:4",
        ),
        (
            ("export", "{good}", "--to", "sparse-safetensors", "--data", "{nowhere}", "--out", "{out}"),
            2,
            "calibrate openvino and not sparse-safetensors; leave them out",
        ),
        (("bench", "{good}", "{good}", "--runtime", "openvino"), 2, "is not for openvino; first run `secateur export"),
        (("bench", "{good}", "{good}", "--batch", "1;8"), 2, "wanted numbers with commas"),
        (("bench", "{good}", "{good}", "--prompt", "8,0"), 2, "prompts (8, 0); wanted at least one"),
        (("bench", "{good}", "{good}", "--rounds", "0"), 2, "rounds 0; wanted at least 1"),
        (("bench", "{nowhere}", "{good}"), 1, "there is nothing at"),
        (("bench", "{good}", "{good}", "--plot", "{nowhere}/bench.svg"), 2, "nothing can be written to"),
        (
            ("bench", "{good}", "{good}", "--plot", "bench.png"),
            2,
            "--plot bench.png, but what is drawn is an .svg file",
        ),
        (("bench", "{graph}", "{graph}", "--device", "cuda"), 2, "--device cuda is for models that transformers runs"),
        (
            ("bench", "{graph}", "{graph}", "--dtype", "float32"),
            2,
            "transformers runs; here it is up to openvino",
        ),
        (("bench", "{good}", "{good}", "--device", "cuda"), 1, "torch sees no CUDA device here; use --device cpu"),
    ],
)
def test_what_is_refused(words, code, said, run, two_of_four, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    places = {"good": two_of_four, "bad": tmp_path / "bad", "out": tmp_path / "out", "nowhere": tmp_path / "nowhere"}
    not_two_of_four(two_of_four, tmp_path / "bad")
    places["graph"] = tmp_path / "graph"
    places["graph"].mkdir()
    (places["graph"] / "openvino_model.xml").write_text("<net/>")
    ran = run(*(word.format(**places) for word in words))
    assert ran.code == code
    assert said in ran.error
    assert "\n" not in ran.error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "codes decoded when opened"),
        (["--bits", 8, "--activations", "dynamic"], "codes decoded when opened, inputs rounded by PyTorch"),
    ],
)
def test_codes_are_not_taken_for_their_runtime(flags, said, run, sparse, text, tmp_path):
    from secateur.models.runners import RUNTIMES, Opened
    from secateur.report.bench_page import notes

    assert run("quantize", sparse, "--method", "rtn", *flags, *text, "--out", tmp_path / "out").code == 0
    models = {}
    for name, place in (("dense", sparse), ("pruned", tmp_path / "out")):
        opened = Opened(str(place), torch.get_num_threads(), "auto", "cpu", 1)
        models[name] = {"source": name, **RUNTIMES["transformers"].open(opened).facts()}
    assert "codes" not in models["dense"]
    assert models["pruned"]["codes"] == said
    (line,) = notes({**models, "machine": {"busy": False}})
    assert line.startswith(f"pruned is quantized, {said}: what its format computes, not its speed")
