"""Trained models, pruned, saved and opened again: a 260 k Llama at every method and pattern, SmolLM2-135M once."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from secateur.api import evaluate, prune
from secateur.config import METHODS, PruneConfig, method_from_dict
from secateur.core.pattern import zeros_in
from secateur.evaluation.inspect import inspect

PATTERNS = {
    "50%": ("unstructured", 0.5),
    "70% per row": ("row", 0.7),
    "2:4": ("2:4", None),
    "blocks": ("block:4x4", 0.5),
}
NAMES = [*METHODS, "paper"]


def method(name):
    return method_from_dict({"name": "sparsellm", "mode": "paper", "inner": "sparsegpt"} if name == "paper" else name)


@pytest.fixture(scope="module")
def stories(data_dir):
    """The trained model and a text of its own kind, calibration and held out."""
    text = data_dir / "train" / "tinystories_sample.jsonl"
    model = data_dir / "models" / "stories260k"
    for path in (text, model):
        if not path.exists():
            pytest.skip(f"no {path.name} in SECATEUR_DATA")
    return model, text


@pytest.fixture(scope="module")
def dense_loss(stories):
    model, text = stories
    return evaluate(str(model), str(text), seq_len=256, limit=16)[0].result.nll_per_token


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", NAMES)
def test_stories_at_every_method_and_pattern(stories, dense_loss, tmp_path, name, pattern):
    model, text = stories
    structure, sparsity = PATTERNS[pattern]
    config = PruneConfig(method=method(name), pattern=structure, sparsity=sparsity, samples=16, seq_len=128)
    result = prune(str(model), config, data=str(text), out=tmp_path / "out")
    found = inspect(tmp_path / "out")
    assert found.broken == []
    assert found.promised
    planned = [row for row in found.rows if row.pattern]
    assert [row.zeros for row in planned] == [zeros_in(row.shape, config.target) for row in planned]
    assert result.report["sparsity"]["achieved"] == found.sparsity
    loss = evaluate(str(tmp_path / "out"), str(text), seq_len=256, limit=16)[0].result.nll_per_token
    assert dense_loss < loss
    if name not in ("magnitude", "wanda"):  # without compensation, worse than guessing among the 512 tokens can happen
        assert loss < math.log(512)


def test_the_closed_loop_is_the_best_of_them_on_a_trained_model(stories):
    model, text = stories

    def loss(name):
        config = PruneConfig(method=method(name), sparsity=0.6, samples=32, seq_len=256)
        result = prune(str(model), config, data=str(text))
        return evaluate(result.model, str(text), seq_len=256, limit=24, tokenizer=result.tokenizer)[
            0
        ].result.nll_per_token

    losses = {name: loss(name) for name in ("magnitude", "wanda", "sparsegpt", "admm", "sparsellm")}
    assert min(losses, key=losses.__getitem__) == "sparsellm"
    assert max(losses, key=losses.__getitem__) == "magnitude"


def test_smollm2_end_to_end(tmp_path):
    config = PruneConfig(
        method=method_from_dict({"name": "sparsellm", "inner": "sparsegpt", "iterations": 1}),  # rounds: above
        sparsity=0.5,
        blocks="0:4",
        data="embedded",
        samples=4,
        seq_len=128,
    )
    report = prune("demo", config, out=tmp_path / "out").report
    assert report["linears"] == 28
    assert inspect(tmp_path / "out").broken == []
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert reopened.lm_head.weight is reopened.model.embed_tokens.weight
    ratio = (reopened.model.layers[3].mlp.down_proj.weight == 0).double().mean()
    assert float(ratio) == pytest.approx(0.5, abs=1e-6)
    records = [json.loads(line) for line in (tmp_path / "out/secateur/records.jsonl").read_text().splitlines()]
    assert [len(record["linears"]) for record in records] == [7] * 4 + [0] * 26
    assert torch.isfinite(reopened(torch.arange(16)[None]).logits).all()
