"""Models and hidden states that do not fit: blocks and chunks that wait on disk change no weight, and memory holds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from secateur.planning.footprint import COPIES

SMALL = ["--samples", "4", "--seq-len", "32"]
GB = 10**9
BUDGET = 0.001
"""GB for hidden states; the 2 x 64 tokens below need twice that in closed mode."""


def tensors(folder: Path) -> dict[str, "object"]:
    from safetensors.torch import load_file

    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("method", ["sparsellm", "magnitude"])
def test_blocks_left_on_disk_are_pruned_to_the_same_weights(method, run, model_dir, text_file, tmp_path):
    flags = ["--method", method, "--sparsity", "0.6", "--data", text_file, *SMALL, "--json"]
    whole = run("prune", model_dir, *flags, "--out", tmp_path / "whole", "--offload", "off")
    lazy = run("prune", model_dir, *flags, "--out", tmp_path / "lazy", "--offload", "on")
    assert lazy.code == 0, lazy.err
    assert lazy.json["sparsity"] == whole.json["sparsity"]
    expected, found = tensors(tmp_path / "whole"), tensors(tmp_path / "lazy")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert run("inspect", tmp_path / "lazy", "--baseline", model_dir).code == 0


@pytest.mark.parametrize("method", ["sparsellm", "wanda"])
def test_hidden_states_that_wait_on_disk_change_nothing(method, run, model_dir, text_file, tmp_path, files):
    flags = ["--method", method, "--sparsity", "0.6", "--data", text_file, *SMALL]
    assert run("prune", model_dir, *flags, "--out", tmp_path / "whole").code == 0
    chunk = 32 * 32 * 4
    room = ["--set", f"hidden_memory={2 * chunk / 1e9}"]
    ran = run("prune", model_dir, *flags, *room, "--out", tmp_path / "out", "--json")
    assert ran.code == 0, ran.err
    waited = 4 * COPIES["closed" if method == "sparsellm" else "layerwise"]
    assert ran.json["hidden_states"] == {"memory_peak": 2 * chunk, "disk_peak": (waited - 2) * chunk}
    changed = {"secateur/recipe.yaml"}
    expected, found = files(tmp_path / "whole"), files(tmp_path / "out")
    assert {name for name in expected if expected[name] != found[name]} == changed


def test_python_gets_a_working_model_whose_blocks_are_on_disk(model_dir, text_file, tmp_path):
    from secateur import PruneConfig, prune
    from secateur.models.load import load
    from secateur.models.offload import is_offloaded

    config = PruneConfig(sparsity=0.5, samples=4, seq_len=32, offload="on")
    model = prune(str(model_dir), config, data=str(text_file), out=tmp_path / "out").model
    tokens = torch.arange(9)[None]
    assert torch.equal(model(tokens).logits, load(str(tmp_path / "out")).model(tokens).logits)
    assert is_offloaded(prune(str(model_dir), config, data=str(text_file), out=tmp_path / "out", resume=True).model)
    with pytest.raises(ValueError, match="needs an OUT"):
        prune(str(model_dir), config, data=str(text_file))


# ---- 4 GB of weights in 2 GB of memory


@pytest.fixture
def four_gigabytes(tmp_path, byte_tokenizer):
    """A Llama of 40 blocks of 103 MB in bfloat16, one file for each block, written block by block."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path / "large"
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=40,
        num_attention_heads=16,
        max_position_embeddings=128,
        dtype="bfloat16",
    )
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    config.save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    files: dict[str, list[str]] = {}
    for name in shapes:
        files.setdefault("-".join(name.split(".")[:3] if ".layers." in name else ["rest"]), []).append(name)
    generator = torch.Generator().manual_seed(0)
    for file, names in files.items():
        tensors = {name: (0.02 * torch.randn(shapes[name], generator=generator)).bfloat16() for name in names}
        save_file(tensors, folder / f"{file}.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: f"{file}.safetensors" for file, names in files.items() for n in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


LARGE = {"magnitude": [], "wanda": [], "sparsellm": ["--blocks", "0:2"]}
"""Two blocks tell what all would take: of the others nothing stays in memory."""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsellm"])
def test_peak_memory(method, four_gigabytes, text_file, tmp_path):
    size = sum(path.stat().st_size for path in four_gigabytes.glob("*.safetensors"))
    assert size > 4 * GB
    flags = ["--method", method, "--pattern", "2:4", "--data", text_file, "--samples", "2", "--seq-len", "64"]
    flags += [*LARGE[method], "--offload", "on", "--set", f"hidden_memory={BUDGET}", "--out", tmp_path / "out"]
    command = [sys.executable, "-m", "secateur", "prune", four_gigabytes, *flags, "--json"]
    child = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    report = json.loads(child.stdout.read())
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    child.stdout.close()
    assert child.returncode == 0
    assert usage.ru_maxrss * 1024 < (2 + BUDGET) * GB
    assert report["sparsity"]["achieved"] == 0.5
    assert sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")) > 4 * GB
    print(f"{method}: peak {usage.ru_maxrss * 1024 / GB:.2f} GB, {report['seconds']}")
