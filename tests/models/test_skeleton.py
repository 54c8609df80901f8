"""A model of shapes is the model: blocks, linears and roles as with weights, for every architecture; GGUF too."""

import pytest
import torch

from secateur.errors import ModelError
from secateur.models.adapter import DecoderAdapter
from secateur.models.layout import observe
from secateur.models.load import Place
from secateur.models.outline import outline
from secateur.models.skeleton import skeleton

ARCHITECTURES = ["llama-tied", "opt", "opt-post-norm", "gpt2", "gptj", "gemma2", "granite", "phi3", "phi", "neox"]
ARCHITECTURES += ["olmo2", "bloom", "qwen3", "mistral"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_roles_are_those_that_numbers_will_show(name, tiny, input_ids, tmp_path):
    model = tiny(name)
    model.save_pretrained(tmp_path)
    real = DecoderAdapter(model)
    hidden, call = real.first_hidden(input_ids[:1]), real.calls(1, input_ids.shape[1])[0]
    layout = observe(real, 0, hidden, call)
    bones = skeleton(str(tmp_path))
    with bones.adapter() as adapter:
        roles = outline(adapter, 0)
        assert adapter.block_names == real.block_names
        for block, other in zip(adapter.blocks, real.blocks, strict=True):
            shapes = {key: adapter.shape(linear) for key, linear in adapter.linears(block).items()}
            assert shapes == {key: real.shape(linear) for key, linear in real.linears(other).items()}
    assert layout.ffn is not None
    assert (roles.out, roles.down) == (layout.attention_out, layout.ffn.down)
    assert [*roles.attention, (roles.out,), roles.first, (roles.down,)] == [group.linears for group in layout.groups]
    assert bones.dtype == torch.float32
    assert bones.file_bytes == (tmp_path / "model.safetensors").stat().st_size


def test_a_gguf_file(tiny_gguf):
    bones = skeleton(str(tiny_gguf))
    assert bones.gguf
    assert bones.dtype == torch.float32
    with bones.adapter() as adapter:
        assert outline(adapter, 0).down == "mlp.down_proj"


def test_a_truncated_gguf_file(tiny_gguf, tmp_path):
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny_gguf.read_bytes()[:200])
    with pytest.raises(ModelError, match=r"cannot load .*cut\.gguf"):
        skeleton(str(path))


def test_the_type_is_the_one_that_would_be_loaded(tiny, tmp_path):
    tiny("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    assert skeleton(str(tmp_path)).dtype == torch.bfloat16
    assert skeleton(str(tmp_path), "float32").dtype == torch.float32


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_experts_are_found_by_their_shapes(name, moe, input_ids, tmp_path):
    model = moe(name)
    model.save_pretrained(tmp_path)
    real = DecoderAdapter(model)
    hidden, call = real.first_hidden(input_ids[:1] % 64), real.calls(1, input_ids.shape[1])[0]
    layout = observe(real, 0, hidden, call)
    with skeleton(str(tmp_path)).adapter() as adapter:
        roles = outline(adapter, 0)
    assert roles == outline(real, 0), "by shapes as by numbers"
    (mixture,) = roles.experts
    assert (len(mixture.members), mixture.share) == (6, 2 / 6)
    assert mixture.members[3][1] == "mlp.experts.3.down_proj"
    shared = layout.ffn.down if layout.ffn else None
    assert (roles.out, roles.down) == (layout.attention_out, shared)
    assert (shared is not None) == (name == "qwen2_moe")


def test_experts_in_a_list_are_refused(listed_moe):
    with pytest.raises(ModelError, match=r"mlp\.experts: experts in a list .* prune can"):
        outline(DecoderAdapter(listed_moe()), 0)


def test_of_a_hub_model_config_and_headers_are_fetched(tiny, tmp_path, monkeypatch):
    from huggingface_hub import parse_local_safetensors_file_metadata as parse_file
    from huggingface_hub.utils import SafetensorsRepoMetadata

    tiny("llama").save_pretrained(tmp_path)
    file = parse_file(tmp_path / "model.safetensors")
    repo = SafetensorsRepoMetadata(None, False, dict.fromkeys(file.tensors, "model.safetensors"), {"model": file})
    monkeypatch.setattr("secateur.models.hub.get_safetensors_metadata", lambda name: repo)
    monkeypatch.setattr("secateur.models.skeleton.locate", lambda name: Place(str(tmp_path), {}, "", on_hub=True))
    there, here = skeleton("somebody/llama"), skeleton(str(tmp_path))
    assert there.file_bytes == sum(tensor.numel() * 4 for tensor in here.model.state_dict().values())
    file.tensors.pop("model.norm.weight")
    with pytest.raises(ModelError, match=r"lacks 1 of the model's tensors, such as model\.norm"):
        skeleton("somebody/llama")
