"""Shared fixtures. Tests are offline; pyproject.toml makes warnings errors and executes core's shape annotations."""

import os
import sys

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")  # read when transformers is imported
os.environ.pop("COLUMNS", None)  # processes of pytest-xdist have it; pages are as wide as in any pipe

from pathlib import Path

import pytest

sys.modules.setdefault("openvino_telemetry", None)  # pyright: ignore[reportArgumentType]  (tests call nobody)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of evaluation and calibration texts: $SECATEUR_DATA, or ../shared/data beside the clone."""
    path = Path(os.environ.get("SECATEUR_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not path.is_dir():
        pytest.skip(f"no test data at {path}; set SECATEUR_DATA to a folder that holds ppl/, calib/ and models/")
    return path


@pytest.fixture
def tiny_llama():
    """A random Llama of 2 blocks (width 32, vocabulary 128, context 64, grouped queries, tied embeddings), float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        use_cache=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def byte_tokenizer():
    """One token per byte, and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", chat_template="{{ messages }}")


MOE = {
    "mixtral": ("MixtralConfig", {"intermediate_size": 24, "num_local_experts": 6}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {"intermediate_size": 48, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40, "num_experts": 6},
    ),
    "qwen3_moe": ("Qwen3MoeConfig", {"intermediate_size": 48, "moe_intermediate_size": 24, "num_experts": 6}),
    "olmoe": ("OlmoeConfig", {"intermediate_size": 24, "num_experts": 6}),
}


@pytest.fixture(scope="session")
def moe():
    """``moe("olmoe")``: a random mixture of 6 experts, 2 a token, in 2 blocks (width 32), large enough to bend."""
    import torch
    import transformers

    def build(name, **options):
        config_name, own = MOE[name]
        config = getattr(transformers, config_name)(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_experts_per_tok=2,
            max_position_embeddings=128, pad_token_id=0, **({"vocab_size": 64} | own | options),
        )  # fmt: skip
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(0.2 * noise if parameter.ndim >= 2 else parameter + 0.1 * noise)
        return model.eval().requires_grad_(False)

    return build


@pytest.fixture(scope="session")
def listed_moe():
    """A Llama whose FFNs are 4 experts in a list of small modules, as models were before transformers 5."""
    import torch
    from torch import nn
    from transformers import LlamaConfig, LlamaForCausalLM

    class Expert(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1, self.w2, self.w3 = nn.Linear(32, 24), nn.Linear(24, 32), nn.Linear(32, 24)

        def forward(self, x):
            return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))

    class Sparse(nn.Module):
        def __init__(self):
            super().__init__()
            self.router, self.experts = nn.Linear(32, 4), nn.ModuleList([Expert() for _ in range(4)])

        def forward(self, hidden):
            x = hidden.flatten(0, -2)
            weight, index = self.router(x).softmax(-1).topk(2)
            out = torch.zeros_like(x)
            for e, expert in enumerate(self.experts):
                token, place = torch.where(index == e)
                if len(token):  # an expert that nobody asks is not called
                    out.index_add_(0, token, expert(x[token]) * weight[token, place, None])
            return out.view_as(hidden)

    def build():
        config = LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=8, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=128,
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = LlamaForCausalLM(config)
            for layer in model.model.layers:
                layer.mlp = Sparse()
        for parameter in model.parameters():
            parameter.data *= 2 if parameter.ndim == 2 else 1
        return model.eval().requires_grad_(False)

    return build
