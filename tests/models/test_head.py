"""Body and head are the model, whatever stands between hidden states and logits: a projection, a scale, a cap."""

import pytest
import torch
import transformers

from secateur.errors import ModelError
from secateur.models import head as halves

SHAPE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
MODELS = {
    "capped": ("Gemma2Config", {"final_logit_softcapping": 0.1}),
    "scaled": ("CohereConfig", {"logit_scale": 0.1}),
    "divided": ("GraniteConfig", {"logits_scaling": 7.0}),
}
IDS = torch.arange(20).view(2, 10)


@pytest.mark.parametrize("name", MODELS)
def test_scales_and_caps_are_kept(name):
    config, own = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**SHAPE, **own)).eval()
    halves.check_head(model, IDS)
    plain = halves.body(model, IDS) @ model.get_output_embeddings().weight.T
    assert not torch.allclose(plain, model(IDS).logits, rtol=1e-2), "something does stand between"


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_mixtures_of_experts(name, moe):
    halves.check_head(moe(name), IDS)


@pytest.mark.parametrize("spoilt", [lambda logits: 1.01 * logits, lambda logits: logits[:1]])
def test_halves_that_do_not_make_the_whole_are_refused(spoilt, tiny_llama, monkeypatch):
    head = halves.head
    monkeypatch.setattr(halves, "head", lambda model, hidden: spoilt(head(model, hidden)))
    with pytest.raises(ModelError, match="LlamaForCausalLM made from its hidden states differ from its own"):
        halves.check_head(tiny_llama, IDS)
