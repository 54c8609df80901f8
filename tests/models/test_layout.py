"""What is observed of every architecture, and that what does not fit is said and not guessed."""

import pytest
import torch

from secateur.core.activations import ACTIVATIONS
from secateur.errors import ModelError
from secateur.models.adapter import DecoderAdapter
from secateur.models.layout import FeedForwardForm, Half, observe

QKV = "attention q_proj+k_proj+v_proj > o_proj"
GATED = "ffn gate_proj+up_proj > down_proj"
AFTER = ", output normalised or scaled afterwards"

EXPECTED = {
    "llama": (f"{QKV}; {GATED}, silu(gate) * up", "self_attn.o_proj"),
    "qwen2": (f"{QKV}; {GATED}, silu(gate) * up", "self_attn.o_proj"),
    "qwen3": (f"{QKV}; {GATED}, silu(gate) * up", "self_attn.o_proj"),
    "mistral": (f"{QKV}; {GATED}, silu(gate) * up", "self_attn.o_proj"),
    "gemma2": (f"{QKV}; {GATED}, gelu_tanh(gate) * up{AFTER}", "self_attn.o_proj"),
    "gemma3": (f"{QKV}; {GATED}, gelu_tanh(gate) * up{AFTER}", "self_attn.o_proj"),
    "olmo2": (f"{QKV}; {GATED}, silu(gate) * up{AFTER}", "self_attn.o_proj"),
    "granite": (f"{QKV}; {GATED}, silu(gate) * up{AFTER}", "self_attn.o_proj"),
    "opt": ("attention q_proj+k_proj+v_proj > out_proj; ffn fc1 > fc2, relu(up)", "self_attn.out_proj"),
    "opt-post-norm": (
        f"attention q_proj+k_proj+v_proj > out_proj; ffn fc1 > fc2, relu(up){AFTER}",
        "self_attn.out_proj",
    ),
    "gpt2": ("attention c_attn > c_proj; ffn c_fc > c_proj, gelu_tanh(up)", "attn.c_proj"),
    "gptj": ("attention q_proj+k_proj+v_proj > out_proj; ffn fc_in > fc_out, gelu_tanh(up)", "attn.out_proj"),
    "phi3": ("attention qkv_proj > o_proj; ffn gate_up_proj > down_proj, silu(gate) * up", "self_attn.o_proj"),
    "phi": ("attention q_proj+k_proj+v_proj > dense; ffn fc1 > fc2, gelu_tanh(up)", "self_attn.dense"),
    "neox": ("attention query_key_value > dense; ffn dense_h_to_4h > dense_4h_to_h, gelu(up)", "attention.dense"),
    "bloom": (
        "attention query_key_value > dense; ffn dense_h_to_4h > dense_4h_to_h, gelu_tanh(up)",
        "self_attention.dense",
    ),
}


def observed(model, input_ids, index=0):
    adapter = DecoderAdapter(model)
    capture = adapter.capture(input_ids)
    return adapter, observe(adapter, index, capture.hidden, capture.calls[index])


@pytest.mark.parametrize("name", EXPECTED)
def test_every_architecture_is_observed_without_a_word_about_it(tiny, input_ids, name, describe):
    words, attention_out = EXPECTED[name]
    adapter, layout = observed(tiny(name), input_ids)
    assert describe(layout) == words
    assert layout.attention_out == attention_out
    assert layout.additive == (AFTER not in words)
    grouped = [linear for group in layout.groups for linear in group.linears]
    assert sorted(grouped) == sorted(adapter.linears(adapter.blocks[0]))


@pytest.mark.parametrize("name", ["llama", "opt", "gemma3", "phi3", "neox"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models_show_the_same_layout(tiny, input_ids, name, dtype):
    _, exact = observed(tiny(name), input_ids)
    _, rounded = observed(tiny(name).to(dtype), input_ids)
    assert rounded == exact


def test_all_blocks_of_a_model_look_alike(tiny, input_ids):
    model = tiny("gemma2")  # windows alternate with full attention
    assert len({observed(model, input_ids, index)[1] for index in range(3)}) == 1


@pytest.mark.parametrize(("name", "ends"), [("llama", ("mlp.gate_proj", "mlp.up_proj")), ("phi3", None)])
def test_the_form_computes_what_the_last_linear_reads(tiny, input_ids, name, ends):
    adapter, layout = observed(tiny(name), input_ids)
    form = layout.ffn
    if ends:
        assert (form.gate, form.up) == tuple(Half(linear, 0, 48) for linear in ends)
    else:
        assert (form.gate, form.up) == (Half("mlp.gate_up_proj", 0, 48), Half("mlp.gate_up_proj", 48, 96))
    linears = adapter.linears(adapter.blocks[0])
    seen = {}
    for linear in {form.up.linear, form.gate.linear, form.down}:
        linears[linear].register_forward_hook(lambda _, args, output, key=linear: seen.update({key: (args[0], output)}))
    adapter.verify(input_ids[:, :8])

    def half(h):
        return seen[h.linear][1][..., h.start : h.stop]

    inner = ACTIVATIONS[form.activation].f(half(form.gate)) * half(form.up)
    torch.testing.assert_close(inner, seen[form.down][0])


def test_an_unknown_activation_is_refused_with_the_nearest_one(tiny, input_ids):
    _, layout = observed(tiny("llama-mish"), input_ids)
    assert layout.ffn is None
    assert "mlp.down_proj is neither phi(up) nor phi(gate) * up" in layout.ffn_refusal
    assert "nearest" in layout.ffn_refusal
    assert layout.additive
    assert layout.attention_out == "self_attn.o_proj"


def test_a_linear_that_runs_twice_is_refused(tiny, input_ids):
    model = tiny("llama")
    model.model.layers[0].mlp.register_forward_hook(lambda mlp, args, _: 0 * mlp.gate_proj(args[0])[..., :32])
    with pytest.raises(ModelError, match=r"model\.layers\.0\.mlp\.gate_proj ran 2 times"):
        observed(model, input_ids)


def test_one_token_is_too_little(tiny, input_ids):
    with pytest.raises(ValueError, match="at least 2 tokens"):
        observed(tiny("llama"), input_ids[:, :1])


def test_layouts_are_values(tiny, input_ids):
    _, layout = observed(tiny("opt"), input_ids)
    assert layout.ffn == FeedForwardForm(Half("fc1", 0, 48), None, "fc2", "relu")
    assert [group.part for group in layout.groups] == ["attention", "attention", "ffn", "ffn"]
