"""Every decoder family that secateur is proven on: one row each, and every row meets every promise.

A row is a tiny random model - its config's kind and options - and what is to be observed of its blocks, in the words
of the fixture ``describe``. No family has a line of code anywhere in the library; a new one is a row here. Sliding
windows (8) are shorter than the rows of tokens (24 and 32), and blocks differ from one another where the config lets
them.
"""

import copy
import functools
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from secateur.core.pattern import NM, Unstructured, check_mask
from secateur.core.solvers import ADMM, Magnitude, SparseGPT, Wanda
from secateur.core.sparsellm import SparseLLM
from secateur.errors import ModelError
from secateur.models.adapter import DecoderAdapter
from secateur.models.head import check_head
from secateur.models.layout import observe
from secateur.models.stored import stored_state
from secateur.pruning.oneshot import RunOptions, prune_blocks
from secateur.pruning.selection import select


class Family(NamedTuple):
    """A tiny model and what it is made of."""

    kind: str
    """``model_type`` of its config."""
    options: dict
    words: str
    """``describe`` of its blocks. Without an activation at its end, SparseLLM refuses the FFN."""
    second: str = ""
    """The same of the second block, where it differs."""


VOCABULARY, WINDOW = 64, 8
IDS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SHAPE = IDS | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
WIDE = SHAPE | {"intermediate_size": 48}
GROUPED = WIDE | {"num_key_value_heads": 2}
HEADS = GROUPED | {"head_dim": 8}
GPT = IDS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
FALCON = IDS | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_hidden_size": 48}
OPT = SHAPE | {"ffn_dim": 48, "word_embed_proj_dim": 32}
FAIRSEQ = IDS | {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48, "max_position_embeddings": 64}
SLIDING = {"sliding_window": WINDOW}
MIXED = SLIDING | {"layer_types": ["sliding_attention", "full_attention"]}
LOW_RANK = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
MULTIPLIERS = {"residual_multiplier": 0.25, "attention_multiplier": 0.1, "embedding_multiplier": 12.0}

QKV = "attention q_proj+k_proj+v_proj > o_proj; ffn "
QKV_OUT = "attention q_proj+k_proj+v_proj > out_proj; ffn "
FUSED = "attention query_key_value > dense; ffn dense_h_to_4h > dense_4h_to_h, "
CONV1D = "attention c_attn > c_proj; ffn c_fc > c_proj, "
LATENT = "attention q_a_proj+kv_a_proj_with_mqa > q_b_proj > kv_b_proj > o_proj; ffn "
GATED = "gate_proj+up_proj > down_proj, "
HALVES = "gate_up_proj > down_proj, "
PLAIN = "up_proj > down_proj, "
AFTER = ", output normalised or scaled afterwards"
LLAMA = QKV + GATED + "silu(gate) * up"
GEMMA = QKV + GATED + "gelu_tanh(gate) * up"

FAMILIES = {
    # the families that were asked for
    "llama": Family("llama", HEADS, LLAMA),
    "llama-tied": Family(
        "llama", HEADS | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}, LLAMA
    ),
    "mistral": Family("mistral", HEADS | SLIDING, LLAMA),
    "qwen2": Family("qwen2", GROUPED | MIXED | {"use_sliding_window": True, "max_window_layers": 1}, LLAMA),
    "qwen3": Family("qwen3", HEADS | MIXED | {"use_sliding_window": True, "max_window_layers": 1}, LLAMA),
    "gemma2": Family("gemma2", HEADS | MIXED | {"query_pre_attn_scalar": 8}, GEMMA + AFTER),
    "gemma3": Family("gemma3_text", HEADS | MIXED | {"query_pre_attn_scalar": 8}, GEMMA + AFTER),
    "phi3": Family("phi3", GROUPED | SLIDING, "attention qkv_proj > o_proj; ffn " + HALVES + "silu(gate) * up"),
    "olmo2": Family("olmo2", GROUPED, LLAMA + AFTER),
    "smollm3": Family("smollm3", GROUPED | {"no_rope_layers": [1, 0]}, LLAMA),
    "granite": Family("granite", GROUPED | MULTIPLIERS | {"logits_scaling": 6.0}, LLAMA + AFTER),
    "gpt2": Family("gpt2", GPT, CONV1D + "gelu_tanh(up)"),
    "opt": Family("opt", OPT, QKV_OUT + "fc1 > fc2, relu(up)"),
    "opt-350m": Family(
        "opt", OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 16}, QKV_OUT + "fc1 > fc2, relu(up)" + AFTER
    ),
    "galactica": Family(
        "opt",
        OPT | {"enable_bias": False, "layer_norm_elementwise_affine": False, "activation_function": "gelu"},
        QKV_OUT + "fc1 > fc2, gelu(up)",
    ),
    "pythia": Family("gpt_neox", WIDE, FUSED + "gelu(up)"),
    "neox-sequential": Family("gpt_neox", WIDE | {"use_parallel_residual": False}, FUSED + "gelu(up)"),
    "gptj": Family("gptj", GPT | {"rotary_dim": 4}, QKV_OUT + "fc_in > fc_out, gelu_tanh(up)"),
    "falcon-7b": Family("falcon", FALCON, FUSED + "gelu(up)"),
    "falcon-40b": Family("falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}, FUSED + "gelu(up)"),
    "falcon-rw": Family(
        "falcon",
        FALCON | {"multi_query": False, "parallel_attn": False, "alibi": True, "bias": True},
        FUSED + "gelu(up)",
    ),
    "bloom": Family("bloom", IDS | {"hidden_size": 32, "n_layer": 2, "n_head": 4}, FUSED + "gelu_tanh(up)"),
    "stablelm": Family("stablelm", GROUPED, LLAMA),
    "stablelm-parallel": Family("stablelm", GROUPED | {"use_parallel_residual": True, "qk_layernorm": True}, LLAMA),
    "cohere": Family("cohere", GROUPED | {"use_qk_norm": True, "logit_scale": 0.5}, LLAMA),
    # taken as they come
    "apertus": Family("apertus", GROUPED, QKV + PLAIN + "xielu(up)"),
    "arcee": Family("arcee", HEADS, QKV + PLAIN + "relu2(up)"),
    "biogpt": Family("biogpt", WIDE, QKV_OUT + "fc1 > fc2, gelu(up)"),
    "bitnet": Family("bitnet", GROUPED, QKV + "gate_proj+up_proj > down_proj"),
    "codegen": Family(
        "codegen", GPT | {"rotary_dim": 4}, "attention qkv_proj > out_proj; ffn fc_in > fc_out, gelu_tanh(up)"
    ),
    "cohere2": Family("cohere2", HEADS | MIXED, LLAMA),
    "ctrl": Family("ctrl", GPT | {"dff": 48}, "attention Wq+Wk+Wv > dense; ffn 0 > 2, relu(up)"),
    "cwm": Family("cwm", HEADS | MIXED, LLAMA),
    "diffllama": Family("diffllama", HEADS, LLAMA),
    "doge": Family(
        "doge", HEADS | SLIDING, "attention q_proj+k_proj+v_proj > dt_proj > o_proj; ffn " + GATED + "silu(gate) * up"
    ),
    "ernie4_5": Family("ernie4_5", HEADS | {"use_bias": True}, LLAMA),
    "exaone4": Family("exaone4", HEADS | MIXED, LLAMA + AFTER),
    "gemma": Family("gemma", HEADS, GEMMA),
    "gemma4": Family(
        "gemma4_text",
        HEADS
        | MIXED
        | {"global_head_dim": 16, "num_global_key_value_heads": 1, "attention_k_eq_v": True}
        | {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 64},
        GEMMA + AFTER,
        second=GEMMA.replace("+v_proj", "") + AFTER,
    ),
    "glm": Family("glm", HEADS, QKV + HALVES + "silu(gate) * up"),
    "glm4": Family("glm4", HEADS, QKV + HALVES + "silu(gate) * up" + AFTER),
    "gpt_bigcode": Family("gpt_bigcode", GPT, CONV1D + "gelu_tanh(up)"),
    "gpt_neo": Family(
        "gpt_neo",
        IDS
        | {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 48, "max_position_embeddings": 64}
        | {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
        QKV_OUT + "c_fc > c_proj, gelu_tanh(up)",
    ),
    "helium": Family("helium", HEADS, LLAMA),
    "hunyuan": Family("hunyuan_v1_dense", HEADS, LLAMA),
    "hyperclovax": Family("hyperclovax", GROUPED | MULTIPLIERS, LLAMA + AFTER),
    "internlm3": Family("internlm3", HEADS, LLAMA),
    "jais2": Family("jais2", HEADS, QKV + PLAIN + "relu2(up)"),
    "minicpm3": Family("minicpm3", WIDE | LOW_RANK | {"scale_depth": 0.5}, LATENT + GATED + "silu(gate) * up" + AFTER),
    "ministral": Family("ministral", HEADS | MIXED, LLAMA),
    "ministral3": Family("ministral3", HEADS, LLAMA),
    "modernbert-decoder": Family(
        "modernbert-decoder",
        WIDE | MIXED | {"local_attention": WINDOW, "cls_token_id": 1, "sep_token_id": 2},
        "attention q_proj+k_proj+v_proj > Wo; ffn Wi > Wo, gelu(gate) * up",
    ),
    "mpt": Family(
        "mpt",
        {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, "expansion_ratio": 2},
        "attention Wqkv > out_proj; ffn " + PLAIN + "gelu(up)",
    ),
    "nanochat": Family("nanochat", GROUPED, QKV + "fc1 > fc2, relu2(up)"),
    "nemotron": Family("nemotron", HEADS, QKV + PLAIN + "relu2(up)"),
    "neox-japanese": Family("gpt_neox_japanese", SHAPE | {"intermediate_multiple_size": 2}, FUSED + "gelu(up)"),
    "olmo": Family("olmo", GROUPED | {"clip_qkv": 2.0}, LLAMA),
    "olmo3": Family("olmo3", GROUPED | MIXED, LLAMA + AFTER),
    "openai-gpt": Family("openai-gpt", GPT, CONV1D + "gelu_tanh(up)" + AFTER),
    "persimmon": Family("persimmon", WIDE, FUSED + "relu2(up)"),
    "phi": Family(
        "phi", WIDE | {"qk_layernorm": True}, "attention q_proj+k_proj+v_proj > dense; ffn fc1 > fc2, gelu_tanh(up)"
    ),
    "seed_oss": Family("seed_oss", HEADS, LLAMA),
    "starcoder2": Family("starcoder2", GROUPED | SLIDING, QKV + "c_fc > c_proj, gelu_tanh(up)"),
    "vaultgemma": Family("vaultgemma", HEADS | MIXED | {"query_pre_attn_scalar": 8}, GEMMA),
    "xglm": Family("xglm", FAIRSEQ, QKV_OUT + "fc1 > fc2, gelu(up)"),
    "youtu": Family("youtu", WIDE | LOW_RANK | {"num_key_value_heads": 4}, LATENT + GATED + "silu(gate) * up"),
}
REFUSED = {
    "bitnet": "neither phi(up) nor phi(gate) * up",  # a norm stands between the activation and the down projection
}
"""FFNs of another form: SparseLLM says so and stops, layer solvers prune them."""
TOKENS = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))


def random_model(kind, options):
    """Weights large enough for activations to bend, nothing zero or one."""
    config = CONFIG_MAPPING[kind](**options)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(0.2 * noise if parameter.ndim >= 2 else parameter + 0.1 * noise)
    return model


@functools.lru_cache(maxsize=1)
def made(name):
    """The family's model; tests that change it take a copy."""
    return random_model(FAMILIES[name].kind, FAMILIES[name].options)


def adapted(name):
    model = copy.deepcopy(made(name))
    return model, DecoderAdapter(model)


@pytest.mark.parametrize("name", FAMILIES)
def test_replay_equals_the_forward_and_weights_survive_a_round_trip(name):
    model, adapter = adapted(name)
    assert len(adapter.blocks) == 2
    assert adapter.verify(TOKENS) <= 1e-5
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for block in adapter.blocks:
        for linear in adapter.linears(block).values():
            W = adapter.read(linear)
            assert W.shape == adapter.shape(linear)
            adapter.write(linear, W)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_structure_of_every_block_is_observed(name, describe):
    _, adapter = adapted(name)
    capture = adapter.capture(TOKENS)
    hidden = capture.hidden
    for index, call in enumerate(capture.calls):
        layout = observe(adapter, index, hidden, call)
        words, _, refusal = describe(layout).partition(" (")
        assert words == ((index == 1 and FAMILIES[name].second) or FAMILIES[name].words)
        assert (layout.ffn is None) == (name in REFUSED)
        assert REFUSED.get(name, "") in refusal
        parts = [group.part for group in layout.groups]
        assert parts == sorted(parts)  # attention, then ffn
        before_the_ffn = [linear for group in layout.groups if group.part == "attention" for linear in group.linears]
        assert before_the_ffn[-1] == layout.attention_out
        grouped = [linear for group in layout.groups for linear in group.linears]
        assert sorted(grouped) == sorted(adapter.linears(adapter.blocks[index]))
        hidden = adapter.replay(index, hidden, call)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_head_makes_the_logits_of_the_hidden_states(name):
    check_head(made(name), TOKENS)


@pytest.mark.parametrize("name", FAMILIES)
def test_tensors_are_known_by_the_names_in_which_they_are_saved(name, tmp_path):
    model = made(name)
    model.save_pretrained(tmp_path)
    saved, known = load_file(tmp_path / "model.safetensors"), stored_state(model)
    assert saved.keys() <= known.keys()
    assert all(torch.equal(tensor, known[key]) for key, tensor in saved.items())
    assert known.keys() - saved.keys() <= model.all_tied_weights_keys.keys()


HALF = Unstructured(0.5)
RUNS = {
    "magnitude": (Magnitude(), HALF),
    "wanda": (Wanda(), HALF),
    "sparsegpt 2:4": (SparseGPT(), NM(2, 4)),
    "admm": (ADMM(iterations=6, ramp=4), HALF),
    "closed": (SparseLLM(inner=SparseGPT(), iterations=2), HALF),
    "closed 2:4": (SparseLLM(inner=ADMM(iterations=6, ramp=4), iterations=2), NM(2, 4)),
    "paper": (SparseLLM(inner=SparseGPT(), mode="paper", iterations=2), HALF),
}
WINDOWS = torch.randint(VOCABULARY, (8, 32), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_method_prunes_every_family(name, run):
    method, pattern = RUNS[run]
    model, adapter = adapted(name)
    plan = select(adapter, pattern, range(len(adapter.blocks))).plan
    work = prune_blocks(adapter, WINDOWS, plan, method, RunOptions(batch=8))
    if isinstance(method, SparseLLM) and name in REFUSED:
        with pytest.raises(ModelError, match=r"^[^\n]*prune it with a layer solver such as admm instead$"):
            next(work)
        assert unchanged(model, name, set())
        return
    records = [done.record for done in work]
    assert {linear.name for record in records for linear in record.linears} == plan.keys()
    for linear in plan:
        W = adapter.read(model.get_submodule(linear))
        assert check_mask(W != 0, pattern) is None
        assert W.isfinite().all()
    assert unchanged(model, name, {f"{linear}.weight" for linear in plan})
    outside = (model.get_input_embeddings(), model.get_output_embeddings())
    assert not any(model.get_submodule(linear) in outside for linear in plan)


def unchanged(model, name, but):
    """Embeddings, head, norms and biases are to the bit what they were."""
    before = made(name).state_dict()
    return all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items() if key not in but)


SSM = {"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_chunk_size": 16}
SMALL_SSM = {"mamba_d_state": 4, "mamba_dt_rank": 4}
DELTA = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
ZAMBA = WIDE | {"num_key_value_heads": 4, "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2}
SECOND = {"layer_types": ["full_attention", "linear_attention"]}
HYBRIDS = {
    "bamba": (GROUPED | SSM | {"attn_layer_indices": [0]}, r"layers\.1\.mamba \(BambaMixer\)"),
    "falcon_h1": (HEADS | SSM | {"mamba_d_ssm": 64}, r"layers\.0\.mamba \(FalconH1Mixer\)"),
    "falcon_mamba": (IDS | {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}, r"layers\.0\.mixer \("),
    "granitemoehybrid": (
        GROUPED | SSM | {"layer_types": ["attention", "mamba"], "num_local_experts": 0},
        r"layers\.1\.mamba \(",
    ),
    "jamba": (
        GROUPED
        | SMALL_SSM
        | {"attn_layer_period": 2, "attn_layer_offset": 0, "expert_layer_offset": 7, "expert_layer_period": 8},
        r"layers\.1\.mamba \(JambaMambaMixer\)",
    ),
    "lfm2": (GROUPED | {"layer_types": ["full_attention", "conv"]}, r"layers\.1\.conv \(Lfm2ShortConv\)"),
    "mamba": (IDS | {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}, r"layers\.0\.mixer \(MambaMixer\)"),
    "mamba2": (
        IDS
        | {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1},
        r"layers\.0\.mixer \(Mamba2Mixer\)",
    ),
    "nemotron_h": (
        HEADS
        | {"layers_block_type": ["attention", "mlp", "mamba"], "num_hidden_layers": 3, "mamba_num_heads": 4}
        | {"mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1},
        r"layers\.2\.mixer \(NemotronHMamba2Mixer\)",
    ),
    "olmo_hybrid": (GROUPED | DELTA | SECOND | {"linear_num_key_heads": 4}, r"layers\.1\.linear_attn \("),
    "qwen3_5_text": (HEADS | DELTA | SECOND, r"layers\.1\.linear_attn \(Qwen3_5GatedDeltaNet\)"),
    "qwen3_next": (HEADS | DELTA | SECOND | {"num_experts": 0}, r"layers\.1\.linear_attn \(Qwen3NextGatedDeltaNet\)"),
    "recurrent_gemma": (
        HEADS | {"lru_width": 32, "attention_window_size": WINDOW, "block_types": ["attention", "recurrent"]},
        r"layers\.1\.temporal_block \(RecurrentGemmaRecurrentBlock\)",
    ),
    "zamba": (
        ZAMBA | SMALL_SSM | {"attention_head_dim": 16, "n_mamba_heads": 2},
        r"layers\.0\.mamba \(ZambaMambaMixer\)",
    ),
    "zamba2": (
        ZAMBA | {"mamba_d_state": 8, "n_mamba_heads": 4, "mamba_ngroups": 1, "chunk_size": 16},
        r"layers\.0\.mamba \(Zamba2MambaMixer\)",
    ),
}


@pytest.mark.parametrize("kind", HYBRIDS)
def test_hybrids_are_refused_by_the_name_of_their_mixer(kind):
    options, mixer = HYBRIDS[kind]
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**options), dtype=torch.float32)
    with pytest.raises(ModelError, match=mixer + r".* mixes tokens by a convolution along time [^\n]*$"):
        DecoderAdapter(model)


PER_LAYER = HEADS | MIXED | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64}
UNSUPPORTED = {
    "bart": (
        IDS
        | {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
        | {"encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48},
        r"encoder_attn\.k_proj ran 0 times",
    ),
    "cpmant": (
        IDS | {"hidden_size": 32, "num_attention_heads": 4, "dim_head": 8, "dim_ff": 48, "num_hidden_layers": 2},
        r"replaying block cpmant\.encoder\.layers\.0 differs",  # the mask depends on the tokens
    ),
    "gemma3n_text": (
        PER_LAYER | {"laurel_rank": 4, "num_kv_shared_layers": 0, "altup_num_inputs": 2},
        r"replaying block model\.layers\.0 differs",  # blocks are given embeddings of the tokens
    ),
    "gemma4_text": (PER_LAYER, r"replaying block model\.layers\.0 differs"),  # the same
    "hrm_text": (WIDE, "no list of same-class blocks that run once each"),
    "rwkv": (
        IDS | {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "context_length": 64},
        r"holds matrices outside any linear: attention\.time_mix_key",
    ),
    "xlm": (
        {"vocab_size": VOCABULARY, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "causal": True},
        r"replaying block transformer\.ffns\.1 differs",  # attentions and FFNs are two lists
    ),
    "xlnet": (
        {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
        r"holds matrices outside any linear: rel_attn\.q \(32x4x8\)",
    ),
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_what_does_not_fit_is_refused_in_a_line(kind):
    options, why = UNSUPPORTED[kind]
    with pytest.raises(ModelError, match=r"^[^\n]*" + why + r"[^\n]*$"):
        seen(DecoderAdapter(random_model(kind, options)))


def seen(adapter):
    """What a run asks before it prunes anything."""
    adapter.verify(TOKENS)
    capture = adapter.capture(TOKENS)
    return observe(adapter, 0, capture.hidden, capture.calls[0])
