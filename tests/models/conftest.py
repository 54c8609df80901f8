"""Tiny random models of many architectures, built from configs; a tiny GGUF file; the stories model of the data."""

from itertools import groupby

import pytest
import torch
import transformers
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WIDE = SHAPE | {"intermediate_size": 48}
GROUPED = WIDE | {"num_key_value_heads": 2}
HEADS = GROUPED | {"head_dim": 8}
OPT = SHAPE | {"ffn_dim": 48, "word_embed_proj_dim": 32}
GPT = {
    "vocab_size": 64,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

TINY = {
    "llama": (transformers.LlamaConfig, HEADS),
    "llama-tied": (transformers.LlamaConfig, HEADS | {"tie_word_embeddings": True}),
    "llama-mish": (transformers.LlamaConfig, HEADS | {"hidden_act": "mish"}),
    "qwen2": (transformers.Qwen2Config, GROUPED),
    "qwen3": (transformers.Qwen3Config, HEADS),
    "mistral": (transformers.MistralConfig, HEADS | {"sliding_window": 5}),
    "opt": (transformers.OPTConfig, OPT),
    "opt-post-norm": (transformers.OPTConfig, OPT | {"do_layer_norm_before": False}),
    "opt-projected": (transformers.OPTConfig, OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "gpt2": (transformers.GPT2Config, GPT),
    "gptj": (transformers.GPTJConfig, GPT | {"rotary_dim": 4}),
    "gemma2": (transformers.Gemma2Config, HEADS | {"sliding_window": 5}),
    "gemma3": (transformers.Gemma3TextConfig, HEADS | {"sliding_window": 5}),
    "granite": (transformers.GraniteConfig, GROUPED | {"residual_multiplier": 0.25}),
    "phi3": (transformers.Phi3Config, GROUPED),
    "phi": (transformers.PhiConfig, WIDE),
    "neox": (transformers.GPTNeoXConfig, WIDE),
    "olmo2": (transformers.Olmo2Config, GROUPED),
    "bloom": (transformers.BloomConfig, {"vocab_size": 64, "hidden_size": 32, "n_layer": 3, "n_head": 4}),
}


def _describe(layout):
    parts = []
    for part, groups in groupby(layout.groups, key=lambda group: group.part):
        names = ("+".join(name.rpartition(".")[2] for name in group.linears) for group in groups)
        parts.append(f"{part} " + " > ".join(names))
    if layout.ffn is None:
        return "; ".join(parts) + f" ({layout.ffn_refusal})"
    inside = f"{layout.ffn.activation}(gate) * up" if layout.ffn.gate else f"{layout.ffn.activation}(up)"
    return "; ".join(parts) + f", {inside}" + ("" if layout.additive else ", output normalised or scaled afterwards")


@pytest.fixture(scope="session")
def describe():
    """A layout in a line: "attention q_proj+k_proj+v_proj > o_proj; ffn gate_proj+up_proj > down_proj, silu(gate) * up"
    or why there is no FFN, in brackets."""
    return _describe


@pytest.fixture(scope="session")
def tiny():
    """``tiny("opt")``: a new random model with weights large enough for its activations to bend."""

    def build(name):
        config_class, options = TINY[name]
        model = AutoModelForCausalLM.from_config(config_class(**options), dtype=torch.float32)
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(0.2 * noise if parameter.ndim >= 2 else parameter + 0.1 * noise)
        return model.eval()

    return build


@pytest.fixture(scope="session")
def input_ids():
    return torch.randint(3, 64, (2, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def stories(data_dir):
    """The directory of the stories260k model."""
    folder = data_dir / "models" / "stories260k"
    if not folder.is_dir():
        pytest.skip(f"no models/stories260k in {data_dir}; set SECATEUR_DATA to a folder that holds it")
    return folder


@pytest.fixture
def stories_copy(stories, tmp_path):
    """A copy of it that may be spoilt."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in stories.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture(scope="session")
def tiny_gguf(write_gguf, tmp_path_factory):
    """A two-block Llama with tied embeddings and a byte-level vocabulary, in float32."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="session")
def write_gguf():
    """``write_gguf(path, lacking="...")``: that model, without tensors whose name begins so."""
    import gguf

    def write(path, lacking="nothing"):
        tokens = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "he"]
        hidden, inner, heads = 32, 64, 4
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_context_length(64)
        writer.add_embedding_length(hidden)
        writer.add_block_count(2)
        writer.add_feed_forward_length(inner)
        writer.add_head_count(heads)
        writer.add_head_count_kv(heads // 2)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_dimension_count(hidden // heads)
        writer.add_vocab_size(len(tokens))
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(tokens)
        writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
        writer.add_token_merges(["h e"])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        writer.add_chat_template("{{ messages[0]['content'] }}")
        for name, shape in _gguf_tensors(len(tokens), hidden, inner).items():
            if name.startswith(lacking):
                continue
            values = 0.2 * torch.randn(shape, generator=torch.Generator().manual_seed(len(name)))
            writer.add_tensor(name, (values + 1 if len(shape) == 1 else values).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def _gguf_tensors(vocabulary, hidden, inner):
    block = {
        "attn_norm": (hidden,),
        "attn_q": (hidden, hidden),
        "attn_k": (hidden // 2, hidden),
        "attn_v": (hidden // 2, hidden),
        "attn_output": (hidden, hidden),
        "ffn_norm": (hidden,),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }
    blocks = {f"blk.{i}.{name}.weight": shape for i in range(2) for name, shape in block.items()}
    return {"token_embd.weight": (vocabulary, hidden), "output_norm.weight": (hidden,)} | blocks
