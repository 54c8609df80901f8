"""Branches beside linears: the function is W + S X, nothing else changes, PEFT opens what is saved."""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from secateur.core.low_rank import Branch
from secateur.errors import ArtefactError, ModelError, UsageError
from secateur.models.branches import attach, attached, detach, load_branches, save_branches, set_aside
from secateur.models.linears import matrix
from secateur.models.load import load
from secateur.models.save import save

TOKENS = torch.arange(24).view(2, 12)


def branches_for(model, *suffixes, rank=3):
    """Random branches, the ranks of which differ by linear."""
    generator = torch.Generator().manual_seed(0)
    names = [name for name, _ in model.named_modules() if name.endswith(suffixes)]
    shapes = {name: matrix(model.get_submodule(name)).shape for name in names}
    return {
        name: Branch(
            torch.randn(R, rank + i % 2, generator=generator) / 4, torch.randn(rank + i % 2, C, generator=generator) / 4
        )
        for i, (name, (R, C)) in enumerate(shapes.items())
    }


@torch.no_grad()
def logits(model):
    return model(input_ids=TOKENS, use_cache=False).logits


@torch.no_grad()
def folded(model, branches):
    """The same model with S X added to its weights."""
    dense = copy.deepcopy(model)
    for name, branch in branches.items():
        matrix(dense.get_submodule(name)).add_(branch.product)
    return dense


CASES = {"llama": ("q_proj", "down_proj"), "gpt2": ("c_attn", "c_proj"), "opt": ("fc1", "out_proj")}


@pytest.mark.parametrize("name", CASES)
def test_the_function_is_that_of_the_folded_weights(tiny, name):
    model = tiny(name)
    branches = branches_for(model, *CASES[name])
    before, expected = logits(model), logits(folded(model, branches))
    state = copy.deepcopy(model.state_dict())
    attach(model, branches)
    assert torch.allclose(logits(model), expected, atol=1e-4)
    assert not torch.allclose(expected, before, atol=1e-2), "or this test says nothing"
    assert torch.equal(logits(copy.deepcopy(model)), logits(model)), "a copy has branches of its own"
    assert attached(copy.deepcopy(model)).keys() == branches.keys()
    back = detach(model)
    assert all(torch.equal(back[n].S, b.S) and torch.equal(back[n].X, b.X) for n, b in branches.items())
    assert torch.equal(logits(model), before)
    assert model.state_dict().keys() == state.keys()


def test_a_copy_can_be_detached_without_the_original(tiny):
    model = tiny("llama")
    attach(model, branches_for(model, "q_proj"))
    with_branches = logits(model)
    other = copy.deepcopy(model)
    detach(other)
    assert torch.equal(logits(model), with_branches)
    assert not torch.equal(logits(other), with_branches)


def test_set_aside_and_back(tiny):
    model = tiny("llama")
    before = logits(model)
    attach(model, branches_for(model, "q_proj"))
    with_branches = logits(model)
    with set_aside(model) as branches:
        assert torch.equal(logits(model), before)
    assert branches.keys() == attached(model).keys()
    assert torch.equal(logits(model), with_branches)


def test_factors_train_and_take_the_dtype_of_the_weight(tiny):
    model = tiny("llama").to(torch.bfloat16)
    parameters = attach(model, branches_for(model, "up_proj"))
    assert {parameter.dtype for parameter in parameters} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in parameters)
    for parameter in parameters:
        parameter.requires_grad_(True)
    model(input_ids=TOKENS).logits.float().square().mean().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in parameters)


def test_what_cannot_be(tiny, moe):
    model = tiny("llama")
    good = branches_for(model, "0.self_attn.q_proj")
    (name, branch), *_ = good.items()
    for wrong, error, said in (
        ({"model.layers.9.q_proj": branch}, UsageError, "model.layers.9.q_proj, which is no module"),
        ({"model.embed_tokens": branch}, ModelError, "model.embed_tokens is a Embedding; .* beside an nn.Linear"),
        ({name: Branch(branch.S[:5], branch.X)}, UsageError, r"is \(32, 32\) \(out, in\), its branch \(5, 3\)"),
        ({name: Branch(branch.S[:, :2], branch.X)}, UsageError, r"wanted \(R, r\) times \(r, C\)"),
    ):
        with pytest.raises(error, match=said):
            attach(model, good | wrong)
        assert not attached(model), "all or none"
    attach(model, good)
    with pytest.raises(UsageError, match="has a low-rank branch already"):
        attach(model, good)
    with pytest.raises(ModelError, match=r"mlp.experts is a \w+; .*fused experts carry none"):
        attach(moe("mixtral"), {"model.layers.0.mlp.experts": branch})


@pytest.mark.parametrize("name", CASES)
def test_saved_and_loaded(tiny, tmp_path, name):
    branches = branches_for(tiny(name), *CASES[name])
    save_branches(branches, tmp_path / "low_rank")
    back = load_branches(tmp_path / "low_rank")
    assert back.keys() == branches.keys()
    assert all(torch.equal(a, b) for n in branches for a, b in zip(back[n], branches[n], strict=True))


@pytest.mark.parametrize("name", CASES)
def test_a_saved_model_is_loaded_with_its_branches(tiny, byte_tokenizer, tmp_path, name):
    model = tiny(name)
    bare = logits(model)
    attach(model, branches_for(model, *CASES[name]))
    save(model, byte_tokenizer, tmp_path)
    assert len(attached(model)) == len(load_branches(tmp_path / "low_rank")), "still there after saving"
    loaded = load(str(tmp_path))
    assert torch.equal(logits(loaded.model), logits(model))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), bare)
    config = json.loads((tmp_path / "low_rank" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] == (name == "gpt2")
    shutil.rmtree(tmp_path / "low_rank")
    assert load(str(tmp_path)).fingerprint != loaded.fingerprint


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lora_alpha": 7}, "has lora_alpha 7 where its factors want"),
        ({"use_rslora": True}, "has use_rslora True"),
        ({"rank_pattern": {}}, "has rank_pattern {}"),
        ({"target_modules": ["q_proj"]}, "name different linears"),
        ({"peft_type": "IA3"}, "has peft_type 'IA3' where its factors want 'LORA'"),
    ],
)
def test_a_foreign_adapter_is_refused(tiny, tmp_path, change, said):
    save_branches(branches_for(tiny("llama"), "q_proj", "k_proj"), tmp_path / "low_rank")
    path = tmp_path / "low_rank" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ArtefactError, match=said):
        load_branches(tmp_path / "low_rank")


def test_a_damaged_adapter_is_one_line(tiny, tmp_path):
    folder = tmp_path / "low_rank"
    save_branches(branches_for(tiny("llama"), "q_proj"), folder)
    factors = load_file(folder / "adapter_model.safetensors")
    save_file({n: t for n, t in factors.items() if "lora_A" in n}, folder / "adapter_model.safetensors")
    with pytest.raises(ArtefactError, match="not a readable adapter"):
        load_branches(folder)
    (folder / "adapter_model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(ArtefactError, match="not a readable adapter"):
        load_branches(folder)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore")  # of PEFT's own
def test_peft_opens_it(tiny, tmp_path, name):
    import peft

    model = tiny(name)
    branches = branches_for(model, *CASES[name])
    model.save_pretrained(tmp_path)
    save_branches(branches, tmp_path / "low_rank", transposed=name == "gpt2")
    attach(model, branches)
    opened = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path), tmp_path / "low_rank")
    assert torch.allclose(logits(opened.eval()), logits(model), atol=1e-5)
    merged = opened.merge_and_unload()
    assert torch.allclose(logits(merged), logits(model), atol=1e-4)
