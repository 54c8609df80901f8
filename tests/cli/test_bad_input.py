"""Every way to ask for something impossible: one line that says what came, what was wanted and what to do.

Exit code 2 = the request is wrong, 1 = something failed. A row: what is typed, the code, words the line must hold.
"""

import json
import shutil
import struct
from pathlib import Path

import pytest

GOOD = {"--sparsity": "0.5", "--data": "TEXT", "--samples": "2", "--seq-len": "32", "--out": "OUT"}


def prune(model: str = "MODEL", **changes: str | None) -> list[str]:
    """A good command with some flags changed, or left out where None."""
    flags = {**GOOD, **{f"--{name.replace('_', '-')}": value for name, value in changes.items()}}
    return ["prune", model, *(word for name, value in flags.items() if value is not None for word in (name, value))]


TYPED = {
    "sparsity above 1": (prune(sparsity="70"), 2, ["got 70", "share of zeros", "0.7"]),
    "sparsity 1": (prune(sparsity="1"), 2, ["got 1", "below 1"]),
    "sparsity negative": (prune(sparsity="-0.1"), 2, ["got -0.1", "at least 0"]),
    "sparsity no number": (prune(sparsity="half"), 2, ["half", "--sparsity"]),
    "no sparsity": (prune(sparsity=None), 2, ["needs a sparsity"]),
    "N:M does not divide": (prune(sparsity=None, pattern="3:5"), 2, ["divisible by 5", "got 32"]),
    "block does not divide": (prune(pattern="block:3x3"), 2, ["3x3", "divisible"]),
    "sparsity against pattern": (
        prune(pattern="2:4", sparsity="0.7"),
        2,
        ["keep 2 of every 4", "0.7", "one of"],
    ),
    "unknown pattern": (prune(pattern="2/4"), 2, ["'2/4'", "N:M"]),
    "unknown method": (prune(method="sparsegtp"), 2, ["'sparsegtp'", "did you mean sparsegpt", "known: sparsellm"]),
    "unknown data": (prune(data="c5"), 2, ["'c5'", "wikitext2", "embedded"]),
    "unknown recipe key": ([*prune(), "--set", "sampels=3"], 2, ["'sampels'", "did you mean samples"]),
    "malformed set": ([*prune(), "--set", "samples"], 2, ["--set", "'samples'"]),
    "recipe missing": ([*prune(), "--recipe", "TMP/none.yaml"], 2, ["cannot read", "none.yaml"]),
    "recipe no mapping": ([*prune(), "--recipe", "TEXT"], 2, ["mapping"]),
    "no model": (["prune", "--sparsity", "0.5", "--out", "OUT"], 2, ["no MODEL", "demo"]),
    "no out": (prune(out=None), 2, ["--out"]),
    "unknown flag": ([*prune(), "--nonsense"], 2, ["--nonsense"]),
    "unknown verb": (["purne"], 2, ["purne"]),
    "unknown device": (prune(device="tpu"), 2, ["'tpu'", "cuda"]),
    "blocks out of range": (prune(blocks="0:9"), 2, ["0:9", "at most 0:2"]),
    "blocks malformed": (prune(blocks="half"), 2, ["'half'", "first-half"]),
    "include in vain": (prune(include="qproj"), 2, ["include 'qproj'", "did you mean", "q_proj"]),
    "include of the head": (prune(include="lm_head"), 2, ["lm_head", "stay dense"]),
    "ignore no expression": (prune(ignore="*"), 2, ["ignore '*'", "no regular expression"]),
    "ignore of all": (prune(ignore="layers"), 2, ["nothing is left", "14 linears"]),
    "seq-len above context": (prune(seq_len="256"), 2, ["256", "context", "128"]),
    "no samples": (prune(samples="0"), 2, ["samples", "at least 1", "got 0"]),
    "too few tokens": (prune(samples="400"), 1, ["9000 tokens", "12800", "--samples 281"]),
    "text missing": (prune(data="TMP/none.txt"), 1, ["none.txt", "no file"]),
    "text empty": (prune(data="TMP/empty.txt"), 1, ["empty"]),
    "text binary": (prune(data="TMP/binary.txt"), 1, ["binary.txt", "UTF-8"]),
    "jsonl without text": (prune(data="TMP/lines.jsonl"), 1, ["line 2", "text"]),
    "out is somebody's": (prune(out="TMP/theirs"), 2, ["theirs", "holds"]),
    "out below a file": (prune(out="TMP/empty.txt/out"), 1, ["empty.txt"]),
    "gguf missing": (prune("TMP/none.gguf"), 1, ["none.gguf"]),
    "gguf corrupt": (prune("TMP/corrupt.gguf"), 1, ["corrupt.gguf"]),
    "directory without model": (prune("TMP/theirs"), 1, ["theirs", "config.json"]),
    "weights missing": (prune("TMP/weightless"), 1, ["weightless"]),
    "weights corrupt": (prune("TMP/corrupt"), 1, ["corrupt"]),
    "unknown architecture": (prune("TMP/alien"), 1, ["alien"]),
    "already quantized": (prune("TMP/quantized"), 1, ["already quantized"]),
    "hub unreachable": (prune("nobody/no-such-model"), 1, ["nobody/no-such-model"]),
    "hub data unreachable": (prune(data="wikitext2"), 1, ["wikitext", "embedded"]),
    "an OpenVINO graph": (prune("TMP/graph"), 1, ["was exported to openvino", "secateur bench"]),
    "inspect a graph": (["inspect", "TMP/graph"], 1, ["was exported to openvino", "graph/secateur/export.json"]),
    "eval without data": (["eval", "MODEL"], 2, ["--data"]),
    "eval unknown data": (["eval", "MODEL", "--data", "c5"], 2, ["'c5'"]),
    "eval above context": (["eval", "MODEL", "--data", "TEXT"], 2, ["2048", "context", "128"]),
    "eval too little text": (["eval", "MODEL", "--data", "TMP/short.txt", "--seq-len", "64"], 1, ["5 tokens"]),
    "eval missing model": (["eval", "TMP/none.gguf", "--data", "TEXT", "--seq-len", "64"], 1, ["none.gguf"]),
    "inspect nothing": (["inspect", "TMP/nowhere"], 1, ["nowhere"]),
    "inspect no model": (["inspect", "TMP/theirs"], 1, ["safetensors"]),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory, model_dir, text_file) -> dict[str, str]:
    """Every wrong file and directory that the table speaks of."""
    tmp = tmp_path_factory.mktemp("wrong")
    (tmp / "empty.txt").write_text(" \n")
    (tmp / "short.txt").write_text("short")
    (tmp / "binary.txt").write_bytes(bytes(range(256)))
    (tmp / "lines.jsonl").write_text('{"text": "a"}\n{"words": "b"}\n')
    (tmp / "corrupt.gguf").write_bytes(b"GGUF" + struct.pack("<I", 3) + b"\0" * 40)
    (tmp / "theirs").mkdir()
    (tmp / "theirs" / "thesis.tex").write_text("precious")
    copies = {name: Path(shutil.copytree(model_dir, tmp / name)) for name in ("weightless", "corrupt", "alien")}
    (copies["weightless"] / "model.safetensors").unlink()
    (copies["corrupt"] / "model.safetensors").write_bytes(b"not a checkpoint at all")
    change_config(copies["alien"], model_type="martian", architectures=["MartianForCausalLM"])
    shutil.copytree(model_dir, tmp / "graph", ignore=shutil.ignore_patterns("*.safetensors"))
    for suffix in ("xml", "bin"):
        (tmp / "graph" / f"openvino_model.{suffix}").write_bytes(b"a graph")
    shutil.copytree(model_dir, tmp / "quantized")
    change_config(tmp / "quantized", quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 32})
    return {"TMP": str(tmp), "MODEL": str(model_dir), "TEXT": str(text_file), "OUT": str(tmp / "out")}


def change_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def filled(word: str, places: dict[str, str]) -> str:
    head, slash, tail = word.partition("/")
    return places.get(head, head) + slash + tail


@pytest.mark.parametrize("case", TYPED)
def test_one_line_and_the_exit_code(case, places, run):
    typed, code, words = TYPED[case]
    ran = run(*(filled(word, places) for word in typed))
    assert ran.code == code, ran.err
    assert ran.error.startswith("secateur: ")
    assert "Traceback" not in ran.err
    assert ran.out == ""
    assert not [word for word in words if word not in ran.error], ran.error
    assert not Path(places["OUT"]).exists()


def test_nothing_was_touched_or_left(places):
    assert (Path(places["TMP"]) / "theirs" / "thesis.tex").read_text() == "precious"
    left = sorted(path.name for path in Path(places["TMP"]).iterdir())
    known = "alien binary.txt corrupt corrupt.gguf empty.txt graph lines.jsonl quantized short.txt theirs weightless"
    assert left == known.split()


def test_a_foreign_out_is_refused_before_the_work(places, run, monkeypatch):
    import secateur.runs as runs

    monkeypatch.setattr(runs, "load", lambda *_, **__: pytest.fail("the model was loaded first"))
    ran = run(*(filled(word, places) for word in prune(out="TMP/theirs")))
    assert ran.code == 2


@pytest.mark.parametrize(
    "typed", [prune(device="cuda"), ["cache", "MODEL", "--data", "TEXT", "--device", "cuda", "--out", "OUT"]]
)
def test_cuda_without_a_cuda_device(typed, places, run, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    ran = run(*(filled(word, places) for word in typed))
    assert ran.code == 1
    assert "use --device cpu" in ran.error


def test_debug_shows_the_traceback(run):
    ran = run("prune", "MODEL", "--sparsity", "2", "--out", "nowhere", "--debug")
    assert ran.code == 2
    assert "Traceback" in ran.err
    assert ran.error.startswith("secateur: ")


def test_what_nobody_foresaw_is_one_line_too(run, monkeypatch):
    def fail(*_: object) -> None:
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr("secateur.cli.prune.merged", fail)
    ran = run("prune", "MODEL", "--out", "nowhere")
    assert ran.code == 1
    assert ran.err == "secateur: RuntimeError: first second; run again with --debug to see where\n"


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied", "x"), OSError(28, "No space left on device")]
)
def test_disk_errors_are_one_line(run, monkeypatch, error):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("secateur.cli.prune.merged", fail)
    ran = run("prune", "MODEL", "--out", "nowhere")
    assert ran.code == 1
    assert str(error.strerror) in ran.err
    assert len(ran.err.splitlines()) == 1
