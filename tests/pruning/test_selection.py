"""include and ignore on a Llama of 3 blocks: what is planned, what is skipped and why, what is refused."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from secateur.core.pattern import NM, Unstructured
from secateur.errors import UsageError
from secateur.models.adapter import DecoderAdapter
from secateur.pruning.oneshot import RunOptions, prune_blocks
from secateur.pruning.selection import OUTSIDE, select

HALF = Unstructured(0.5)


@pytest.fixture(scope="module")
def adapter():
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return DecoderAdapter(LlamaForCausalLM(config).eval().requires_grad_(False))


def counts(selection):
    return {row.why: len(row.names) for row in selection.skipped}


def test_everything_in_the_blocks_without_expressions(adapter):
    selection = select(adapter, HALF, range(3))
    assert len(selection.plan) == 21
    assert counts(selection) == {OUTSIDE: 2}
    assert selection.skipped[0].names == ("model.embed_tokens", "lm_head")


def test_no_block_at_all(adapter):
    """The first half of a single one."""
    with pytest.raises(UsageError, match=r"nothing is left to prune \(21 linears: not in blocks 0:0\)"):
        select(adapter, HALF, range(0))


def test_every_linear_is_planned_or_stands_under_its_reason(adapter):
    selection = select(adapter, HALF, range(1, 3), ["q_proj", "mlp"], [r"down_proj$", r"layers\.2\..*up"])
    assert list(selection.plan) == [
        "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj",
        "model.layers.2.self_attn.q_proj", "model.layers.2.mlp.gate_proj",
    ]  # fmt: skip
    assert counts(selection) == {
        "not in blocks 1:3": 7,
        "no include matches it": 6,
        "ignore 'down_proj$' matches it": 2,
        "ignore 'layers\\\\.2\\\\..*up' matches it": 1,
        OUTSIDE: 2,
    }
    assert selection.skipped[0].to_dict()["names"][0] == "model.layers.0.self_attn.q_proj"


def test_ignore_may_name_what_is_never_pruned(adapter):
    assert len(select(adapter, HALF, range(3), ignore=["lm_head"]).plan) == 21


def test_a_linear_that_cannot_carry_the_pattern_can_be_ignored(adapter):
    with pytest.raises(ValueError, match="divisible by 32, got 48"):
        select(adapter, NM(16, 32), range(3))
    assert len(select(adapter, NM(16, 32), range(3), ignore=["down_proj"]).plan) == 18


@pytest.mark.parametrize(
    ("blocks", "taper", "sparsities"),
    [
        (range(3), 0.2, [0.3, 0.5, 0.7]),
        (range(3), -0.1, [0.6, 0.5, 0.4]),
        (range(1, 3), 0.2, [0.3, 0.7]),
        (range(1, 2), 0.2, [0.5]),
        (range(3), 0.0, [0.5, 0.5, 0.5]),
    ],
)
def test_sparsity_rises_evenly_with_depth(adapter, blocks, taper, sparsities):
    plan = select(adapter, HALF, blocks, taper=taper).plan
    for index, sparsity in zip(blocks, sparsities, strict=True):
        found = [target.pattern for name, target in plan.items() if name.startswith(f"model.layers.{index}.")]
        assert len(found) == 7
        assert [pattern.sparsity for pattern in found] == pytest.approx([sparsity] * 7)
    assert plan.sparsity == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("include", "ignore", "words"),
    [
        (["q_prj"], [], ["include 'q_prj' matches no linear", "did you mean", "q_proj", "named like model.layers.0"]),
        ([], ["dwon_proj$"], ["ignore 'dwon_proj$' matches no linear", "down_proj"]),
        (["xyz"], [], ["include 'xyz' matches no linear; they are named like"]),
        (["lm_head"], [], ["include 'lm_head' names lm_head", "stay dense"]),
        (["q_proj", "embed"], [], ["include 'embed' names model.embed_tokens", "stay dense"]),
        ([r"layers\.2\."], [], ["matches 7 linears, none of them in the chosen blocks"]),
        (["q_proj"], ["attn"], ["nothing is left", "2 linears: ignore 'attn'", "12 linears: no include"]),
        ([], [""], ["nothing is left", "14 linears: ignore ''"]),
    ],
)
def test_what_means_nothing_is_refused_in_one_line(adapter, include, ignore, words):
    with pytest.raises(UsageError) as caught:
        select(adapter, HALF, range(2), include, ignore)
    assert "\n" not in str(caught.value)
    assert not [word for word in words if word not in str(caught.value)], caught.value


def test_sparsellm_refuses_an_ffn_in_parts(adapter):
    from secateur.core.sparsellm import SparseLLM

    plan = select(adapter, HALF, range(3), ignore=["up_proj"]).plan
    rows = torch.randint(64, (2, 16))
    with pytest.raises(UsageError, match=r"layers\.0: .* as a whole, but the plan lacks mlp\.up_proj; let include"):
        next(prune_blocks(adapter, rows, plan, SparseLLM(), RunOptions()))
