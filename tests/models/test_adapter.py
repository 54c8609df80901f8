"""Replaying a model's blocks one by one equals the model, in every architecture; weights come and go as (out, in)."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from secateur.errors import ModelError
from secateur.models.adapter import Call, DecoderAdapter

BLOCKS = {
    "llama": "model.layers",
    "llama-tied": "model.layers",
    "qwen2": "model.layers",
    "qwen3": "model.layers",
    "mistral": "model.layers",
    "opt": "model.decoder.layers",
    "opt-post-norm": "model.decoder.layers",
    "opt-projected": "model.decoder.layers",
    "gpt2": "transformer.h",
    "gptj": "transformer.h",
    "gemma2": "model.layers",
    "gemma3": "model.layers",
    "granite": "model.layers",
    "phi3": "model.layers",
    "phi": "model.layers",
    "neox": "gpt_neox.layers",
    "olmo2": "model.layers",
    "bloom": "transformer.h",
}


@pytest.mark.parametrize("name", BLOCKS)
def test_replay_equals_the_forward(tiny, input_ids, name):
    model = tiny(name)
    adapter = DecoderAdapter(model)
    assert adapter.block_names == [f"{BLOCKS[name]}.{i}" for i in range(3)]
    assert adapter.verify(input_ids) <= 1e-5

    with torch.no_grad():
        expected = model(input_ids).logits
    capture = adapter.capture(input_ids)
    hidden = capture.hidden
    for block, call in zip(adapter.blocks, capture.calls, strict=True):
        hidden = adapter.replay(block, hidden, call)
    torch.testing.assert_close(adapter.logits(input_ids, hidden), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_replay_equals_the_forward_in_16_bit(tiny, input_ids, dtype):
    assert DecoderAdapter(tiny("llama").to(dtype)).verify(input_ids) == 0.0


def test_sliding_windows_give_each_block_its_own_mask(tiny, input_ids):
    calls = DecoderAdapter(tiny("gemma2")).calls(*input_ids.shape)
    masks = [call.kwargs["attention_mask"] for call in calls]
    assert masks[0] is not None  # the window of 5 is shorter than the row
    assert masks[1] is None or not torch.equal(masks[0], masks[1])


def test_calls_are_cached_per_shape_and_say_nothing_of_tokens(tiny, input_ids):
    adapter = DecoderAdapter(tiny("mistral"))
    assert adapter.calls(2, 16) is adapter.calls(2, 16)
    assert adapter.calls(1, 16) is not adapter.calls(2, 16)
    with torch.no_grad():
        expected = adapter.model.model.embed_tokens(input_ids)
    assert torch.equal(adapter.first_hidden(input_ids), expected)


def test_a_call_moves_to_a_device_with_everything_in_it(tiny):
    call = DecoderAdapter(tiny("llama")).calls(1, 8)[0].to("meta")
    cos, sin = call.kwargs["position_embeddings"]
    assert cos.device.type == sin.device.type == "meta"
    mixed = Call((torch.zeros(2), None), {"mask": None, "rotary": (torch.zeros(1), 3)}).to("meta")
    assert mixed.args[0].is_meta
    assert mixed.args[1] is mixed.kwargs["mask"] is None
    assert mixed.kwargs["rotary"][0].is_meta
    assert mixed.kwargs["rotary"][1] == 3


def test_the_model_is_left_as_it_was(tiny, input_ids):
    model = tiny("qwen2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapter = DecoderAdapter(model)
    adapter.verify(input_ids)
    assert all("forward" not in vars(block) for block in adapter.blocks)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("name", "kind"), [("llama", nn.Linear), ("gpt2", Conv1D)])
def test_weights_are_out_in_and_survive_a_round_trip(tiny, name, kind):
    adapter = DecoderAdapter(tiny(name))
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(2))
    for linear in adapter.linears(adapter.blocks[0]).values():
        assert isinstance(linear, kind)
        W, b = adapter.read(linear), adapter.bias(linear)
        assert W.is_contiguous()
        if W.shape[1] == 32:
            torch.testing.assert_close(linear(x), x @ W.T + (0 if b is None else b))
        before = linear.weight.clone()
        adapter.write(linear, W)
        assert torch.equal(linear.weight, before)
        W += 1  # a copy: the model does not notice
        assert torch.equal(linear.weight, before)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_written_zeros_are_positive(tiny, name):
    adapter = DecoderAdapter(tiny(name).to(torch.float16))
    linear = next(iter(adapter.linears(adapter.blocks[0]).values()))
    W = adapter.read(linear)
    W[0, :3] = torch.tensor([-0.0, 0.0, -1e-30])  # the last one underflows in float16
    adapter.write(linear, W)
    written = adapter.read(linear)[0, :3]
    assert torch.equal(written, torch.zeros(3))
    assert not written.signbit().any()
    assert linear.weight.dtype == torch.float16


def test_a_wrong_shape_is_not_broadcast(tiny):
    adapter = DecoderAdapter(tiny("llama"))
    linear = adapter.linears(adapter.blocks[0])["mlp.up_proj"]
    with pytest.raises(ValueError, match=r"\(1, 32\).*\(48, 32\)"):
        adapter.write(linear, torch.zeros(1, 32))


def test_weights_shared_between_blocks_are_refused(tiny):
    model = tiny("llama")
    model.model.layers[2].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.up_proj\.weight and .*layers\.2.* are one tensor"):
        DecoderAdapter(model)


def test_a_quantized_model_is_refused(tiny):
    model = tiny("llama")
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(ModelError, match="already quantized"):
        DecoderAdapter(model)


def test_a_model_without_a_list_of_blocks_is_refused(tiny):
    model = tiny("llama")
    model.model.layers[1] = _Other(model.model.layers[1])
    with pytest.raises(ModelError, match="no list of same-class blocks"):
        DecoderAdapter(model)


def test_a_smaller_list_is_no_substitute_for_the_blocks(tiny):
    model = tiny("llama")
    model.model.layers[1] = _Other(model.model.layers[1])
    model.model.norm = _InTurn(nn.Linear(32, 32), nn.Linear(32, 32))
    with pytest.raises(ModelError, match=r"model\.layers .* it holds LlamaDecoderLayer and _Other"):
        DecoderAdapter(model)


def test_verify_names_the_block_whose_replay_differs(tiny, input_ids):
    adapter = DecoderAdapter(tiny("llama"))
    calls = adapter.calls(*input_ids.shape)
    cos, sin = calls[1].kwargs["position_embeddings"]
    calls[1].kwargs["position_embeddings"] = (cos.flip(1), sin)
    with pytest.raises(ModelError, match=r"replaying block model\.layers\.1 differs"):
        adapter.verify(input_ids)


def test_a_block_that_hands_on_more_than_its_hidden_states_is_noticed(tiny, input_ids):
    model, state = tiny("llama"), {}
    first, second, _ = model.model.layers
    first.self_attn.k_proj.register_forward_hook(lambda *call: state.update(keys=call[-1]))
    second.mlp.register_forward_hook(lambda *call: call[-1] + state["keys"].mean(dim=-1, keepdim=True))
    with pytest.raises(ModelError, match=r"replaying block model\.layers\.1 differs"):
        DecoderAdapter(model).verify(input_ids)


class _Other(nn.Module):
    """A block of another class than its neighbours."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


class _InTurn(nn.Module):
    """A list of modules that run once each, one after the other."""

    def __init__(self, *members):
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, hidden):
        for member in self.members:
            hidden = member(hidden)
        return hidden
