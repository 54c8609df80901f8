"""``openvino``: the graph gives torch's numbers at once and step by step, and opens with nothing but openvino."""

import json
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from secateur import ExportOptions, export_to, exports
from secateur.data.tokens import tokenize
from secateur.errors import ArtefactError, DeviceError, ModelError, UsageError
from secateur.evaluation import bench
from secateur.evaluation.bench_worker import measure, open_runner
from secateur.export import int8
from secateur.export.int8 import Int8Linear, Int8Record, calibrate, row_codes, to_int8
from secateur.export.openvino import OpenVINOOptions, sparse_properties
from secateur.exports import _windows
from secateur.models import openvino as runtime
from secateur.models.openvino import PRECISE, RUNTIME, SPARSE_RATE, OpenVINOModel, crc32_of, lacks_amx
from secateur.models.runners import RUNTIMES, Opened

pytest.importorskip("openvino", reason="openvino is not installed: pip install -e '.[openvino]'")

from secateur.export.openvino_graph import convert

FAMILIES = {
    "llama": ("LlamaConfig", {"num_key_value_heads": 2, "intermediate_size": 64}),
    "qwen2": ("Qwen2Config", {"num_key_value_heads": 2, "intermediate_size": 64}),
    "gpt_neox": ("GPTNeoXConfig", {"intermediate_size": 64}),
    "gpt2": ("GPT2Config", {}),
}

SLOW = ("qwen2", "gpt_neox")


def family(name: str) -> torch.nn.Module:
    import transformers

    config_name, more = FAMILIES[name]
    options = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **more}
    config = getattr(transformers, config_name)(max_position_embeddings=64, use_cache=False, **options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data *= 4 if parameter.ndim == 2 else 1
    return model.eval().requires_grad_(False)


@cache
def converted(name: str) -> tuple[torch.nn.Module, OpenVINOModel]:
    model = family(name)
    return model, OpenVINOModel.of(convert(model), model.config, PRECISE)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in FAMILIES])
def test_the_graph_is_the_model_at_once_and_in_steps(name):
    model, graph = converted(name)
    ids = torch.randint(0, 128, (3, 12), generator=torch.Generator().manual_seed(0))
    wanted = model(input_ids=ids).logits
    torch.testing.assert_close(graph(ids).logits, wanted, rtol=1e-3, atol=1e-4)
    graph.start()
    stepped = torch.cat([graph.step(ids[:, :7]), graph.step(ids[:, 7:8]), graph.step(ids[:, 8:])], 1)
    torch.testing.assert_close(stepped, wanted, rtol=1e-3, atol=1e-4)


def test_rows_may_be_padded_on_the_left_and_change_places():
    """What openvino-genai does with a batch and with beams."""
    model, graph = converted("llama")
    graph.start()
    ids = torch.randint(1, 128, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    graph.request.infer([ids.numpy(), mask.numpy(), positions.numpy(), np.array([0, 1], np.int32)])
    got = torch.from_numpy(graph.request.get_tensor("logits").data.copy())
    torch.testing.assert_close(got[0, 2:], model(input_ids=ids[:1, 2:]).logits[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(got[1], model(input_ids=ids[1:]).logits[0], rtol=1e-3, atol=1e-4)
    more = torch.ones(2, 1, dtype=torch.int64)
    swapped = torch.cat([mask.flip(0), more], 1)
    graph.request.infer(
        [more.numpy(), swapped.numpy(), (swapped.sum(1) - 1)[:, None].numpy(), np.array([1, 0], np.int32)]
    )
    got = torch.from_numpy(graph.request.get_tensor("logits").data.copy())
    wanted = model(input_ids=torch.cat([ids[1:], more[:1]], 1)).logits[0, -1]
    torch.testing.assert_close(got[0, -1], wanted, rtol=1e-3, atol=1e-4)


def test_int8_of_a_pruned_model_keeps_every_zero_and_the_function():
    model = family("llama")
    for name, parameter in model.named_parameters():
        if "_proj" in name:
            parameter[parameter.abs() < parameter.abs().median()] = 0
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    ids = torch.randint(0, 128, (4, 32), generator=torch.Generator().manual_seed(0))
    before = model(input_ids=ids).logits
    records = to_int8(model, calibrate(model, [ids]), 0.8)
    assert len(records) == 14
    for record in records:
        codes = model.get_submodule(record.name).codes
        zero = weights[f"{record.name}.weight"] == 0
        assert not codes[zero].any()
        assert record.sparsity >= float(zero.float().mean())
    attention = model.get_submodule("model.layers.0.self_attn")
    assert isinstance(attention.q_proj, Int8Linear)
    assert torch.equal(attention.q_proj.inverse, attention.v_proj.inverse)  # one input, rounded once
    assert attention.q_proj.step == attention.v_proj.step != attention.o_proj.step
    after = model(input_ids=ids).logits
    assert 0 < float((after - before).norm() / before.norm()) < 0.05


@pytest.fixture(scope="module")
def saved(tmp_path_factory, byte_tokenizer) -> Path:
    """Sides of 64 and more, which OpenVINO packs; 70 % zeros; 260 words, tied."""
    path = tmp_path_factory.mktemp("openvino") / "pruned"
    config = LlamaConfig(
        vocab_size=260, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=128, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter *= 4 if parameter.ndim == 2 else 1
        if "_proj" in name:
            parameter[parameter.abs() < parameter.abs().quantile(0.7)] = 0
    model.save_pretrained(path)
    byte_tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> ExportOptions:
    """A short text: one token for each of its bytes."""
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(" ".join(str(number * number) for number in range(600)))
    return ExportOptions(str(text), samples=4, held_out=2, seq_len=64)


def test_a_tied_table_is_coded_once(tiny_llama, monkeypatch):
    calls = []
    monkeypatch.setattr(int8, "row_codes", lambda W: calls.append(W.shape) or row_codes(W))
    int8._tables_to_int8(tiny_llama)
    assert calls == [(128, 32)]
    assert tiny_llama.lm_head.codes is tiny_llama.model.embed_tokens.codes


def test_what_checks_does_not_calibrate(byte_tokenizer, tmp_path, monkeypatch):
    """One file for both, tokenized once: with just enough text, calibration is all but the windows held out."""
    calls = []
    monkeypatch.setattr(exports, "tokenize", lambda *given: calls.append(given) or tokenize(*given))
    text = "".join(f"{number:04}" for number in range(128))
    (tmp_path / "text.txt").write_text(text)
    loaded: Any = SimpleNamespace(model=SimpleNamespace(config=LlamaConfig()), tokenizer=byte_tokenizer)
    made = _windows(loaded, ExportOptions(str(tmp_path / "text.txt"), samples=6, held_out=2, seq_len=64))
    tokens = torch.tensor(byte_tokenizer(text)["input_ids"]).view(8, 64)
    assert len(calls) == 1
    assert torch.equal(made.held_out, tokens[:2])
    assert sorted(made.calibration.tolist()) == sorted(tokens[2:].tolist())


@pytest.fixture(scope="module")
def exported(saved, options, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("openvino") / "out"
    return out, export_to(saved, "openvino", out, options)


def test_what_is_told(exported):
    out, told = exported
    assert told["packed"] == len(told["linears"]) == 14
    assert told["properties"] == {SPARSE_RATE: 0.49}
    assert told["logits_apart"] < 1e-4
    assert abs(told["gap"]) < 0.05
    assert list(told["alternatives"]) == ["dense, 16 bit", "dense int8", "dense int4, groups of 64"]
    assert told["greedy"]["tokens"] == 32
    assert told["greedy"]["same"] >= 24
    assert 0 <= told["greedy"]["before_first_other"] <= 32
    assert sum(told["kernels"].values()) == 15
    assert all(name.lower().endswith("i8") for name in list(told["kernels"])[:-1])  # the last one is the head's
    parameters = told["parameters"]
    assert told["model_bytes"] > (out / "openvino_model.bin").stat().st_size
    assert parameters < (out / "openvino_model.bin").stat().st_size < 1.2 * parameters  # one byte each, and scales
    assert json.loads((out / "secateur" / "export.json").read_text())["properties"] == told["properties"]


def test_it_says_where_the_processor_has_no_amx(tmp_path, monkeypatch):
    flags = tmp_path / "cpuinfo"
    for text, lacking in (("flags : avx512f amx_int8 amx_tile", False), ("flags : avx512f", True)):
        flags.write_text(text)
        monkeypatch.setattr("secateur.models.openvino.CPUINFO", flags)
        assert (lacks_amx() is not None) == lacking
    assert "no amx_int8" in lacks_amx()


FRESH = """
import json, sys
import numpy as np
import openvino as ov
properties = json.load(open("openvino_runtime.json"))["properties"]
model = ov.Core().compile_model("openvino_model.xml", "CPU", properties)
request = model.create_infer_request()
ids, found = [[5, 6, 7, 8]], []
seen = 0
for _ in range(5):
    new = np.array(ids)
    seen += new.shape[1]
    request.infer({"input_ids": new, "attention_mask": np.ones((1, seen), np.int64),
                   "position_ids": np.arange(seen - new.shape[1], seen)[None], "beam_idx": np.zeros(1, np.int32)})
    ids = [[int(request.get_tensor("logits").data[0, -1].argmax())]]
    found += ids[0]
assert not {"secateur", "torch", "transformers"} & set(sys.modules)
print(json.dumps(found))
"""


def test_a_fresh_process_generates_with_openvino_alone(exported):
    out, _ = exported
    ran = subprocess.run([sys.executable, "-c", FRESH], cwd=out, capture_output=True, text=True, check=True)
    model = OpenVINOModel.open(out)
    ids, found = torch.tensor([[5, 6, 7, 8]]), []
    for _ in range(5):
        ids = model.step(ids)[:, -1:].argmax(-1)
        found.append(int(ids))
    assert json.loads(ran.stdout) == found


def test_the_last_token_alone_is_the_same(exported):
    out, _ = exported
    ids = torch.arange(20)[None]
    whole, last = OpenVINOModel.open(out)(ids).logits, OpenVINOModel.open(out, last_only=True)(ids).logits
    assert last.shape == (1, 1, 260)
    torch.testing.assert_close(last, whole[:, -1:])


def test_the_tokenizer_as_a_graph(exported, byte_tokenizer):
    import openvino
    import openvino_tokenizers

    out, told = exported
    assert told["tokenizer"] == "converted"
    encode = openvino.Core()
    encode.add_extension(str(openvino_tokenizers._ext_path))
    text = "A (small) text."
    ids = encode.compile_model(out / "openvino_tokenizer.xml", "CPU")([text])["input_ids"]
    assert ids[0].tolist() == byte_tokenizer(text)["input_ids"]


def test_packing_is_switched_on_where_there_is_something_to_pack():
    full, odd, dense = (
        Int8Record("a", (64, 64), 0.5, True),
        Int8Record("b", (65, 64), 0.5, False),
        Int8Record("c", (64, 64), 0.4, True),
    )
    assert sparse_properties([dense, odd, full], 0.49) == {SPARSE_RATE: 0.49}
    assert sparse_properties([dense, odd], 0.49) == {}


def test_what_bench_asks_of_a_graph(exported):
    runner, told = open_runner("openvino", Opened(str(exported[0]), 1, "auto", "cpu", 1), 24)
    assert 0 < told["own_memory"] < told["memory"]
    took = measure(runner, batch=2, prompt=16, tokens=3)
    assert took["prefill"] > 0
    assert len(took["decode"]) == 3
    assert sum(runner.facts()["kernels"].values()) == 15
    with pytest.raises(UsageError, match=r"prompt and tokens are 200, the context of .* is 128"):
        open_runner("openvino", Opened(str(exported[0]), 1, "auto", "cpu", 1), 200)


# ---- what is refused


def test_without_the_package(saved, options, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(DeviceError, match=r"not installed here .*pip install -e '\.\[openvino\]'"):
        export_to(saved, "openvino", tmp_path / "out", options)


def test_models_that_do_not_fit(moe, saved, options, tmp_path, monkeypatch):
    window = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1))
    window.config.sliding_window = 16
    with pytest.raises(ModelError, match="sees a window of 16 tokens"):
        convert(window.eval())
    with pytest.raises(ModelError, match="routed experts cannot be exported"):
        calibrate(moe("olmoe"), [])
    moe("mixtral").save_pretrained(tmp_path / "moe")
    monkeypatch.setattr("secateur.export.openvino.load", lambda *_, **__: pytest.fail("was loaded first"))
    with pytest.raises(ModelError, match="routed experts cannot be exported"):
        export_to(tmp_path / "moe", "openvino", tmp_path / "out", options)
    branched = tmp_path / "branched"
    shutil.copytree(saved, branched)
    (branched / "low_rank").mkdir()
    with pytest.raises(UsageError, match="has low-rank branches"):
        export_to(branched, "openvino", tmp_path / "out", options)
    with pytest.raises(UsageError, match=r"balance 1.5; wanted a share"):
        OpenVINOOptions(balance=1.5)


def later(out: Path) -> None:
    told = json.loads((out / RUNTIME).read_text())
    (out / RUNTIME).write_text(json.dumps({**told, "version": 2}))


def cut(out: Path) -> None:
    (out / "openvino_model.bin").write_bytes(b"")


def flipped(out: Path) -> None:
    data = bytearray((out / "openvino_model.bin").read_bytes())
    data[5000] ^= 1
    (out / "openvino_model.bin").write_bytes(data)


def garbled(out: Path) -> None:
    (out / "openvino_model.xml").write_text("<net")
    told = json.loads((out / RUNTIME).read_text())
    told["crc32"]["openvino_model.xml"] = crc32_of(out / "openvino_model.xml")
    (out / RUNTIME).write_text(json.dumps(told))


def no_json(out: Path) -> None:
    (out / RUNTIME).write_text("[]")


def gone(out: Path) -> None:
    (out / RUNTIME).unlink()


def test_bench_checks_a_directory_once_and_before_a_process_starts(exported, tmp_path, monkeypatch):
    summed = []
    monkeypatch.setattr(runtime, "crc32_of", lambda path: summed.append(path.name) or crc32_of(path))
    monkeypatch.setattr(bench, "_worker", lambda threads: pytest.fail("a process was started"))
    shutil.copytree(exported[0], tmp_path / "out")
    RUNTIMES["openvino"].check(str(tmp_path / "out"), "cpu")
    open_runner("openvino", Opened(str(tmp_path / "out"), 1, "auto", "cpu", 1), 24)
    assert summed == ["openvino_model.xml", "openvino_model.bin"]
    flipped(tmp_path / "out")
    with pytest.raises(ArtefactError, match="is damaged: its checksum"):
        bench.bench(str(exported[0]), str(tmp_path / "out"), bench.BenchOptions(), print)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (later, "is of version 2, this secateur reads 1"),
        (cut, "openvino_model.bin is damaged"),
        (flipped, "openvino_model.bin is damaged"),
        (garbled, "OpenVINO cannot open"),
        (no_json, "cannot be read"),
        (gone, "lacks openvino_model.xml or openvino_runtime.json"),
    ],
)
def test_damaged_directories(spoil, said, exported, tmp_path):
    shutil.copytree(exported[0], tmp_path / "out")
    spoil(tmp_path / "out")
    with pytest.raises(ArtefactError, match=said):
        OpenVINOModel.open(tmp_path / "out")
