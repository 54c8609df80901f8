"""Statistics on rounds that are set, and the order in which models take turns."""

import io
import json
import sys

import pytest
import torch

from secateur.errors import ProcessError, SecateurError, UsageError
from secateur.evaluation import bench
from secateur.evaluation.bench import BenchOptions, Shape, Spread, _ask, _cell, _rounds, _worker
from secateur.evaluation.bench_worker import open_runner, serve
from secateur.models.runners import Opened, file_bytes, greedy, runtime_of


def test_spread():
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)
    assert Spread.of([5.0, 1.0, 2.0, 3.0, 4.0]) == Spread(3.0, 2.0, 4.0)


def test_a_cell_is_medians_and_the_rounds_ratios():
    """A machine that slows down to a half in the middle changes the seconds and not the ratio."""
    rounds = [
        (
            {"prefill": 4.0 * slow, "decode": [0.2 * slow, 9.0, 0.2 * slow]},
            {"prefill": 2.0 * slow, "decode": [0.1 * slow]},
        )
        for slow in (1.0, 1.0, 2.0)
    ]
    cell = _cell("prefill", Shape(8, 10), rounds)
    assert (cell.batch, cell.prompt) == (8, 10)
    assert cell.speedup == Spread(2.0, 2.0, 2.0)
    assert cell.seconds[0] == Spread(4.0, 4.0, 6.0)
    assert cell.tokens_per_second == (8 * 10 / 4.0, 8 * 10 / 2.0)
    cell = _cell("decode", Shape(8, 10), rounds)
    assert cell.tokens_per_second == (8 / 0.2, 8 / 0.1)
    assert cell.seconds[0].median == 0.2  # the token that was disturbed does not count


def test_models_take_turns_and_the_first_round_does_not_count(monkeypatch):
    asked, told = [], []

    def ask(worker, request):
        asked.append((worker, request["batch"], request["prompt"]))
        return {"prefill": len(asked), "decode": [1.0], "memory": 1}

    monkeypatch.setattr(bench, "_ask", ask)
    options = BenchOptions(prompts=(16, 32), batches=(1, 8), rounds=2)
    taken = _rounds(["d", "p"], options, lambda *words: told.append(words))  # pyright: ignore
    loads = [(1, 16), (1, 32), (8, 16), (8, 32)]
    one = [(which, *load) for load in loads for which in "dp"]
    other = [(which, *load) for load in loads for which in "pd"]
    assert asked == one + other + one
    assert [[pair[0]["prefill"] < pair[1]["prefill"] for pair in taken[shape]] for shape in options.shapes] == [
        [False, True]
    ] * 4
    assert told[-1] == (24, 24, "batch 8, prompt 32")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prompts": (8, 0)}, "prompts"),
        ({"rounds": 0}, "rounds 0"),
        ({"batches": ()}, "batches"),
        ({"batches": (0,)}, "batches"),
    ],
)
def test_options_that_make_no_sense(options, said):
    with pytest.raises(UsageError, match=f"{said}.*; wanted at least"):
        BenchOptions(**options)


def test_the_runtime_goes_by_what_lies_there(tmp_path):
    for name in ("openvino_model.xml", "openvino_model.bin", "openvino_tokenizer.bin"):
        (tmp_path / name).write_bytes(b"1234")
    assert runtime_of(str(tmp_path)) == runtime_of(str(tmp_path), "openvino") == "openvino"
    assert file_bytes(str(tmp_path), "openvino") == 8
    (tmp_path / "low_rank").mkdir()
    for name in ("config.json", "model.safetensors", "low_rank/adapter_model.safetensors"):
        (tmp_path / name).write_bytes(b"123")
    assert file_bytes(str(tmp_path), "transformers") == 6
    assert runtime_of("some/model") == "transformers"
    with pytest.raises(UsageError, match="was exported to openvino and transformers is wanted"):
        runtime_of(str(tmp_path), "transformers")
    with pytest.raises(UsageError, match="first run `secateur export some/model --to openvino --out DIR`"):
        runtime_of("some/model", "openvino")


@pytest.mark.parametrize(
    ("answer", "kind", "said"),
    [
        ({"error": "no CUDA device", "code": 1}, SecateurError, "no CUDA device"),
        ({"error": "give fewer", "code": 2}, UsageError, "give fewer"),
        (None, ProcessError, "ended with 3 and no word"),
    ],
)
def test_a_worker_that_fails(answer, kind, said, monkeypatch, tmp_path):
    """Its line becomes ours, and the process is gone."""
    script = tmp_path / "worker"
    said_by_it = "sys.exit(3)" if answer is None else f"print({json.dumps(json.dumps(answer))}, flush=True)"
    script.write_text(f"#!{sys.executable}\nimport sys\nsys.stdin.readline()\n{said_by_it}\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with _worker(1) as worker, pytest.raises(kind, match=said):
        _ask(worker, {"facts": True})
    assert worker.poll() is not None


def test_a_worker_has_a_word_for_every_failure():
    answers = io.StringIO()
    assert serve(io.StringIO('{"facts": true}\n'), answers) == 1
    assert json.loads(answers.getvalue()) == {"error": "AssertionError: nothing was opened", "code": 1}


def test_a_context_that_is_too_short(tiny_llama, byte_tokenizer, tmp_path):
    tiny_llama.save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    opened = Opened(str(tmp_path), torch.get_num_threads(), "auto", "cpu", 1)
    with pytest.raises(UsageError, match=r"prompt and tokens are 65, the context of .* is 64; give fewer"):
        open_runner("transformers", opened, 65)
    runner, _ = open_runner("transformers", opened, 64)
    ids = torch.arange(6)[None]
    wanted = tiny_llama.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False)[0, 6:]
    assert torch.equal(greedy(runner, ids, 4)[0], wanted)
    assert torch.equal(greedy(runner, ids, 4)[0], wanted)  # it begins anew
