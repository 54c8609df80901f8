"""Checkpoints that are cut, flipped or lie about what they hold: one line, or the very weights."""

import json
import random
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from secateur.errors import ModelError
from secateur.models.load import load
from secateur.models.offload import weights

INDEX = "model.safetensors.index.json"


@pytest.fixture
def broken(tiny_llama, byte_tokenizer, tmp_path):
    """A checkpoint of several files, to be damaged, and its shards."""
    folder = tmp_path / "broken"
    tiny_llama.save_pretrained(folder, max_shard_size="20KB")
    byte_tokenizer.save_pretrained(folder)
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 3
    return folder, shards


@pytest.fixture(params=["off", "on"])
def offload(request):
    return request.param


def refused(folder, offload):
    with pytest.raises(ModelError) as caught:
        load(str(folder), offload=offload)
    said = str(caught.value)
    assert str(folder) in said
    assert "\n" not in said
    return said


@pytest.mark.parametrize("keep", [0, 4, 8, 300, -1])
def test_a_shard_cut_short(broken, offload, keep):
    folder, shards = broken
    shards[1].write_bytes(shards[1].read_bytes()[:keep])
    assert "download it again" in refused(folder, offload)


def rewrite_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


NAME = "model.layers.1.mlp.up_proj.weight"


def test_an_index_that_names_a_missing_shard(broken, offload):
    folder, shards = broken
    shards[0].unlink()
    assert shards[0].name in refused(folder, offload)


def test_an_index_that_lacks_a_tensor(broken, offload, tiny_llama):
    folder, _ = broken
    rewrite_index(folder, lambda places: places.pop(NAME))
    expected = tiny_llama.get_parameter(NAME)
    loaded = load_or_refuse(folder, offload)
    if loaded:
        found = dict(weights(loaded.model))
        assert torch.equal(found[NAME], expected)


def test_an_index_that_names_the_wrong_shard(broken, offload):
    folder, shards = broken
    rewrite_index(folder, lambda places: places.update({NAME: shards[0].name}))
    assert f"the index has {NAME} in {shards[0].name}, which lacks it" in refused(folder, offload)


def load_or_refuse(folder, offload):
    """The model, or None where it was refused in one line."""
    try:
        return load(str(folder), offload=offload)
    except ModelError as error:
        said = str(error)
    assert str(folder) in said
    assert "\n" not in said
    return None


def test_an_index_that_is_not_json(broken, offload):
    folder, _ = broken
    (folder / INDEX).write_text("{")
    refused(folder, offload)


def rewrite_header(shard, change):
    """The header of a safetensors file with one entry changed, the bytes behind it as they were."""
    content = shard.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(next(entry for name, entry in header.items() if name.endswith("proj.weight")))
    text = json.dumps(header).encode()
    shard.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


LIES = {
    "shape": lambda entry: entry.update(shape=entry["shape"][::-1] if len(set(entry["shape"])) > 1 else [16, 64]),
    "more bytes": lambda entry: entry.update(data_offsets=[entry["data_offsets"][0], entry["data_offsets"][1] + 4000]),
    "type": lambda entry: entry.update(dtype="I32"),
    "half the type": lambda entry: entry.update(dtype="F16"),
    "unknown type": lambda entry: entry.update(dtype="F3"),
    "negative": lambda entry: entry.update(shape=[-32, -32]),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies(broken, offload, lie):
    folder, shards = broken
    rewrite_header(shards[1], LIES[lie])
    refused(folder, offload)


def test_flipped_bits_of_headers(broken):
    """120 single bits: one line, or the model that was saved where the bit did not matter."""
    folder, shards = broken
    expected = load(str(folder)).model.state_dict()
    chosen, refusals = random.Random(0), 0
    for _ in range(120):
        shard = chosen.choice(shards)
        content = bytearray(shard.read_bytes())
        (length,) = struct.unpack("<Q", content[:8])
        flipped = content.copy()
        flipped[chosen.randrange(8 + length)] ^= 1 << chosen.randrange(8)
        shard.write_bytes(flipped)
        loaded = load_or_refuse(folder, "off")
        shard.write_bytes(content)
        refusals += loaded is None
        if loaded:
            found = loaded.model.state_dict()
            assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert refusals > 60


def test_a_gguf_file_that_lacks_tensors(write_gguf, tmp_path):
    for lacking in ("blk.1.ffn_up", "token_embd", "output_norm"):
        path = write_gguf(tmp_path / "lacking.gguf", lacking=lacking)
        with pytest.raises(ModelError, match=r"lacking\.gguf.*lacks \d of the model's tensors") as caught:
            load(str(path))
        assert "\n" not in str(caught.value)


def test_weights_of_another_type_are_refused(broken, offload):
    folder, shards = broken
    tensors = {name: tensor.to(torch.int8) for name, tensor in load_file(shards[2]).items()}
    save_file(tensors, shards[2], metadata={"format": "pt"})
    refused(folder, offload)
