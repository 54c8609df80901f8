import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from secateur.data.sources import Texts
from secateur.errors import UsageError
from secateur.evaluation import perplexity as module
from secateur.evaluation.perplexity import evaluate_text, log_gap, perplexity

PROTOCOL = {"bytes_per_token": 4.0, "text": "random", "joiner": "", "bos": "none"}


@pytest.fixture
def windows():
    return torch.randint(0, 128, (5, 24), generator=torch.Generator().manual_seed(0))


def test_equals_the_papers_loop(tiny_llama, windows):
    nlls = []
    for ids in windows:  # as in the published code: mean CE of the window times S, summed, divided by n * S
        logits = tiny_llama(ids[None]).logits
        nlls.append(F.cross_entropy(logits[0, :-1], ids[1:]).float() * 24)
    expected = torch.exp(torch.stack(nlls).sum() / (5 * 24))
    result = perplexity(tiny_llama, windows, **PROTOCOL)
    assert result.ppl == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("positions", [1, 7, 23, 256])
def test_chunks_of_positions_and_batches_change_nothing(tiny_llama, windows, monkeypatch, batch, positions):
    whole = perplexity(tiny_llama, windows, **PROTOCOL)
    monkeypatch.setattr(module, "PIECE", positions * batch * tiny_llama.config.vocab_size)
    assert perplexity(tiny_llama, windows, batch=batch, **PROTOCOL).ppl == pytest.approx(whole.ppl, rel=1e-5)


class Stub(torch.nn.Module):
    """A language model with the logits that a test wants."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, logits):
        super().__init__()
        self.logits = logits
        self.eval()

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


def test_a_uniform_model_has_perplexity_vocabulary_and_its_bits(windows):
    result = perplexity(Stub(torch.zeros(128)), windows, **PROTOCOL)
    assert result.ppl == pytest.approx(128)
    assert result.bits_per_byte == pytest.approx(math.log2(128) / 4.0)


def test_a_broken_model_is_reported_not_hidden(windows):
    assert math.isnan(perplexity(Stub(torch.full((128,), math.nan)), windows, **PROTOCOL).ppl)
    certain = torch.zeros(128).index_fill(0, torch.tensor([0]), 1e6)
    assert perplexity(Stub(certain), windows.clamp(min=1), **PROTOCOL).ppl == math.inf


def test_capped_logits_count_as_the_model_gives_them(windows):
    """Gemma 2 caps its logits after the head: the loss must see the capped ones."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.01, attn_implementation="eager",
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Gemma2ForCausalLM(config).eval()
    model.lm_head.weight.data *= 50
    capped = perplexity(model, windows % 64, **PROTOCOL).ppl
    model.config.final_logit_softcapping = None
    assert perplexity(model, windows % 64, **PROTOCOL).ppl > 100, "or this test says nothing"
    assert capped == pytest.approx(64, rel=0.03)


def test_every_choice_is_named(tiny_llama, windows):
    seen = []
    result = perplexity(tiny_llama, windows, batch=2, progress=lambda *at: seen.append(at), **PROTOCOL)
    assert seen == [(2, 5), (4, 5), (5, 5)]
    named = (result.text, result.joiner, result.bos, result.tokens, result.windows, result.seq_len, result.overlap)
    assert named == ("random", "", "none", 120, 5, 24, 0)
    assert (result.dtype, result.loss_dtype, len(result.window_nll)) == ("float32", "float32", 5)
    assert json.loads(json.dumps(result.to_dict()))["ppl"] == result.ppl
    low = perplexity(tiny_llama, windows, autocast=torch.bfloat16, **PROTOCOL)
    assert low.dtype == "float32, bfloat16 autocast"
    assert low.ppl == pytest.approx(result.ppl, rel=0.02)
    assert low.ppl != result.ppl


def test_training_mode_is_refused(tiny_llama, windows):
    with pytest.raises(ValueError, match="training mode"):
        perplexity(tiny_llama.train(), windows, **PROTOCOL)


def test_log_gap_needs_the_same_protocol(tiny_llama, windows):
    result = perplexity(tiny_llama, windows, **PROTOCOL)
    worse = replace(result, ppl=2 * result.ppl, nll_per_token=result.nll_per_token + math.log(2))
    assert log_gap(worse, result) == pytest.approx(math.log(2))
    with pytest.raises(ValueError, match="differ in joiner, seq_len"):
        log_gap(replace(result, joiner=" ", seq_len=12), result)


def test_a_text_from_end_to_end(data_dir):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = data_dir / "models" / "stories260k"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source).eval(), AutoTokenizer.from_pretrained(source)
    story = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park.\n"
    texts = Texts("story", [story] * 40, "\n\n", windows=3)
    result = evaluate_text(model, tokenizer, texts, seq_len=128)
    assert (result.text, result.joiner, result.windows, result.tokens) == ("story", "\n\n", 3, 384)
    assert result.ppl < 20
    assert 0.1 < result.bits_per_byte < 3
    assert evaluate_text(model, tokenizer, texts, seq_len=128, limit=2).windows == 2
    with pytest.raises(UsageError, match="context of 512"):
        evaluate_text(model, tokenizer, texts, seq_len=1024)
