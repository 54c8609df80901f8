"""Blocks that stay in their files: the model computes the same, one block is in memory, the source stays as it is."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from secateur.errors import ModelError, UsageError
from secateur.models.adapter import DecoderAdapter
from secateur.models.load import load
from secateur.models.offload import at_hand, disk_map, is_offloaded, relocate, stays_on_disk
from secateur.models.save import save

TOKENS = torch.arange(20)[None]


@pytest.fixture
def folder(tiny_llama, byte_tokenizer, tmp_path):
    tiny_llama.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    byte_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_computes_the_same_with_its_blocks_on_disk(folder):
    whole, lazy = load(str(folder)), load(str(folder), offload="on")
    assert is_offloaded(lazy.model)
    assert not lazy.model.lm_head.weight.is_meta
    assert lazy.fingerprint == whole.fingerprint
    assert torch.equal(lazy.model(TOKENS).logits, whole.model(TOKENS).logits)
    assert DecoderAdapter(lazy.model).verify(TOKENS) == 0


def test_a_block_at_hand_is_its_own_copy(folder):
    model = load(str(folder), offload="on").model
    before = {path: path.read_bytes() for path in folder.glob("*.safetensors")}
    block, others = model.model.layers[1], model.model.layers[0]
    logits = model(TOKENS).logits
    with at_hand(block):
        assert not is_offloaded(block)
        assert is_offloaded(others)
        block.mlp.up_proj.weight.zero_()
        assert not torch.equal(model(TOKENS).logits, logits)
    assert is_offloaded(block)
    assert torch.equal(model(TOKENS).logits, logits), "what was not relocated is forgotten"
    assert {path: path.read_bytes() for path in folder.glob("*.safetensors")} == before


def test_relocated_weights_are_read_from_their_new_file(folder, byte_tokenizer, tmp_path):
    from safetensors.torch import save_file

    model, whole = load(str(folder), offload="on").model, load(str(folder)).model
    new = torch.zeros_like(whole.model.layers[1].mlp.up_proj.weight)
    save_file({"up": new}, tmp_path / "new.safetensors")
    relocate(model, tmp_path / "new.safetensors", {"model.layers.1.mlp.up_proj.weight": "up"})
    whole.model.layers[1].mlp.up_proj.weight.zero_()
    assert torch.equal(model(TOKENS).logits, whole(TOKENS).logits)
    (tmp_path / "saved").mkdir()
    save(model, byte_tokenizer, tmp_path / "saved")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")(TOKENS).logits, whole(TOKENS).logits)


def test_a_model_in_memory_is_left_alone(tiny_llama):
    weight = tiny_llama.model.layers[0].mlp.up_proj.weight
    with at_hand(tiny_llama.model.layers[0]):
        assert tiny_llama.model.layers[0].mlp.up_proj.weight is weight


def test_one_block_is_not_left_on_disk(tiny_llama):
    tiny_llama.config.num_hidden_layers = 1
    with pytest.raises(ModelError, match="two or more blocks to leave on disk; use --offload off"):
        disk_map(tiny_llama.config)


def test_a_gguf_file_is_read_as_a_whole():
    assert not stays_on_disk("auto", 10**15, gguf=True)
    with pytest.raises(UsageError, match="a GGUF file can only be read as a whole"):
        stays_on_disk("on", 0, gguf=True)
