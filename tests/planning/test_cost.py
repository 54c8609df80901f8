"""The formulas of what a run costs: against hand counts, and against every product that torch counts in a real run."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, addmm_flop, sdpa_flop_count
from transformers import LlamaConfig, LlamaForCausalLM

from secateur.core.pattern import Unstructured
from secateur.core.solvers import ADMM, Magnitude, SparseGPT, Wanda
from secateur.core.sparsellm import SparseLLM
from secateur.models.adapter import DecoderAdapter
from secateur.planning.cost import Cost, admm, fit, forward, gram, measured_error, observe, sparsegpt
from secateur.planning.cost_sparsellm import block_stages
from secateur.planning.footprint import footprint
from secateur.planning.shapes import BlockShape, Routed, Run, Shared
from secateur.pruning import layerwise, paper
from secateur.pruning.hidden import Budget
from secateur.pruning.oneshot import RunOptions, prune_blocks
from secateur.pruning.selection import select

SMOLLM2 = BlockShape(
    (Shared(960, 576, 960),), Shared(576, 576, 576), Shared(3072, 576, 3072), Shared(576, 1536, 576)
)  # fmt: skip
TEXT = Run(16, 2048, 1, rounded=True)
COUNTED = {  # torch counts neither sums in place nor attention on processors by itself
    torch.ops.aten.addmm_: lambda c, a, b, *_, **__: addmm_flop(c, a, b),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
}


def test_the_table_of_the_documentation():
    """docs/performance.md, for 30 blocks of SmolLM2-135M and 16 x 2048 tokens."""
    one = forward(SMOLLM2, TEXT.tokens, TEXT)
    assert 30 * one.linear == pytest.approx(6.96e12, rel=1e-3)
    assert 30 * one.attention == pytest.approx(2.3e12, rel=0.02)
    grams = sum(gram(group.columns, TEXT.tokens).moment for group in SMOLLM2.groups)
    assert 30 * grams == pytest.approx(6.6e12, rel=0.01)
    solves = [admm(ADMM(), group.rows, group.columns).exact for group in SMOLLM2.groups]
    assert 30 * sum(solves) == pytest.approx(5.2e12 * 31 / 30, rel=0.01)


def test_hand_counts():
    assert gram(3, 5).moment == 2 * 5 * 9
    assert sparsegpt(SparseGPT(), 4, 3) == Cost(factor=9 + 27, exact=36, swept=12)
    assert fit(4, 3) == Cost(factor=9 + 72)
    assert admm(ADMM(iterations=2, ramp=1), 4, 3).exact == 3 * 2 * 36
    assert (TEXT.tokens, TEXT.chunk, TEXT.held, TEXT.fitted) == (32768, 2048, 4096, 28672)
    few = Run(4, 32, 1, rounded=False)
    assert (few.held, few.fitted) == (16, 112)
    assert Cost(1, 2) + Cost(1).times(3) == Cost(4, 2)


METHODS = {
    "magnitude": Magnitude(),
    "wanda": Wanda(),
    "admm": ADMM(iterations=6, ramp=4),
    "sparsegpt": SparseGPT(),
    "closed": SparseLLM(inner=ADMM(iterations=3, ramp=2), iterations=1),
    "closed, a round": SparseLLM(inner=ADMM(iterations=3, ramp=2), iterations=2),
    "closed, dense target": SparseLLM(inner=ADMM(iterations=3, ramp=2), iterations=1, target="ffn"),
    "paper": SparseLLM(mode="paper", inner=ADMM(iterations=3, ramp=2), iterations=3),
    "paper, no round": SparseLLM(mode="paper", inner=ADMM(iterations=3, ramp=2), iterations=1),
}
PARTLY = {"everything": ([], 64, 32), "without q and o": (["q_proj", "o_proj"], 32, 0)}


def pruned_block(ignore=(), **options):
    """A Llama of one block, calibration rows, and a plan at 50 %."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, **options,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
        rows = torch.randint(64, (16, 64))
    for parameter in model.parameters():
        parameter *= 8 if parameter.ndim == 2 else 1
    adapter = DecoderAdapter(model)
    return adapter, rows, select(adapter, Unstructured(0.5), range(1), ignore=ignore).plan


@pytest.mark.parametrize("ignored", PARTLY)
@pytest.mark.parametrize("method", METHODS)
def test_every_product_of_a_run_is_foreseen(method, ignored):
    """All matrix products and all attention of pruning one block, as torch counts them; the sweep to 1 %."""
    ignore, attention, out = PARTLY[ignored]
    adapter, rows, plan = pruned_block(ignore)
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        list(prune_blocks(adapter, rows, plan, METHODS[method], RunOptions()))
    counts = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    attended = sum(count for op, count in counts.items() if "scaled_dot" in op)
    shape = BlockShape((Shared(64, 32, attention),), Shared(32, 32, out), Shared(96, 32, 96), Shared(32, 48, 32))
    total = sum(block_stages(shape, METHODS[method], Run(16, 64, 1, rounded=False)).values(), Cost())
    foreseen = total.linear + total.moment + total.product + total.exact
    assert sum(counts.values()) - attended == pytest.approx(foreseen, rel=0.01 if method == "sparsegpt" else 0)
    assert attended == 2 * total.attention, "torch counts the masked half too"


@pytest.mark.parametrize("ignored", PARTLY)
def test_the_products_of_branches_are_foreseen(ignored):
    """All but those of the branches themselves, of rank 1 here."""
    ignore, attention, out = PARTLY[ignored]
    counted = []
    for rank in (0, 1):
        adapter, rows, plan = pruned_block(ignore)
        with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
            list(prune_blocks(adapter, rows, plan, Wanda(), RunOptions(), low_rank=rank))
        flops = counter.get_flop_counts()["Global"].items()
        counted.append(sum(count for op, count in flops if "scaled_dot" not in str(op)))
    shape = BlockShape((Shared(64, 32, attention),), Shared(32, 32, out), Shared(96, 32, 96), Shared(32, 48, 32))
    cost = block_stages(shape, Wanda(), Run(16, 64, 1, rounded=False), 1)["low rank"]
    assert counted[1] - counted[0] == pytest.approx(cost.linear + cost.moment + cost.product + cost.exact, rel=0.03)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_every_product_of_experts_is_foreseen(method, family, moe):
    """The sum over experts does not depend on who is routed where. Not foreseen: the router, the held-out remainder."""
    adapter = DecoderAdapter(moe(family, experts_implementation="eager"))
    rows = torch.randint(64, (16, 64), generator=torch.Generator().manual_seed(0))
    plan = select(adapter, Unstructured(0.5), range(2)).plan
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        list(prune_blocks(adapter, rows, plan, METHODS[method], RunOptions()))
    attended = ("scaled_dot", "attention")
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if not any(w in str(op) for w in attended))
    shared = (Shared(80, 32, 80), Shared(32, 40, 32)) if family == "qwen2_moe" else (None, None)
    experts = Routed(Shared(48, 32, 48), Shared(32, 24, 32), 6, share=2 / 6)
    shape = BlockShape((Shared(64, 32, 64),), Shared(32, 32, 32), *shared, (experts,))
    foreseen_method = METHODS[method]
    if family == "qwen2_moe" and isinstance(foreseen_method, SparseLLM):
        foreseen_method = replace(foreseen_method, target="ffn")  # what a gate multiplies is not fitted to the block
    total = sum(block_stages(shape, foreseen_method, Run(16, 64, 1, rounded=False)).values(), Cost())
    foreseen = 2 * (total.linear + total.moment + total.product + total.exact)
    assert counted == pytest.approx(foreseen, rel=0.03)


def test_a_short_expert_costs_a_sample_and_no_fits():
    experts = Routed(Shared(48, 32, 48), Shared(32, 24, 32), 6, share=2 / 6)
    shape = BlockShape((Shared(64, 32, 64),), Shared(32, 32, 32), None, None, (experts,))
    few, enough = (block_stages(shape, SparseLLM(), Run(1, n, 1, rounded=False)) for n in (60, 240))
    again = 6 * 2 * 2 * (admm(ADMM(), 32, 24) + measured_error(ADMM(), 32, 24)).exact
    assert enough["solve"].exact - few["solve"].exact == again, "two rounds of two steps, a down for each"
    seen = observe(shape, SparseGPT(), Run(1, 60, 1, rounded=False)).moment
    assert seen == 2 * 60 * 2 * 32**2 + 6 * 2 * 20 * (32**2 + 24**2) + 6 * 2 * 60 * (32**2 + 24**2)


def test_a_block_without_roles_costs_its_forwards():
    shape = BlockShape((Shared(64, 32, 64), Shared(32, 64, 32)), None, None, None)
    stages = block_stages(shape, SparseLLM(), TEXT)
    assert stages["ffn"] == Cost()
    assert stages["propagate"].linear == 2 * TEXT.tokens * 2 * 64 * 32


def test_memory_grows_with_the_tokens():
    state = 4 * TEXT.tokens * 576
    assert footprint(SMOLLM2, SparseGPT(), TEXT, 4).state == state
    assert footprint(SMOLLM2, Magnitude(), TEXT, 4).state == 4 * 64 * 576
    paper = footprint(SMOLLM2, SparseLLM(mode="paper"), TEXT, 4)
    assert paper.carried == 2 * 4 * TEXT.tokens * 3072
    assert footprint(SMOLLM2, SparseLLM(mode="paper", iterations=1), TEXT, 4).carried == 0
    single, double = (footprint(SMOLLM2, SparseLLM(), TEXT._replace(samples=n), 4) for n in (16, 32))
    assert double.hidden == 2 * single.hidden
    assert double.work == single.work


@pytest.mark.parametrize("head", [8, 32], ids="head of {}".format)
@pytest.mark.parametrize("method", METHODS)
def test_what_waits_is_foreseen(method, head):
    """The most hidden states that ever wait at one time, as the run itself counts them."""
    adapter, rows, plan = pruned_block(head_dim=head)
    budget = Budget()
    list(prune_blocks(adapter, rows, plan, METHODS[method], RunOptions(budget=budget)))
    width = 4 * head
    shape = BlockShape(
        (Shared(2 * width, 32, 2 * width),), Shared(32, width, 32), Shared(96, 32, 96), Shared(32, 48, 32)
    )
    assert budget.peak_used == footprint(shape, METHODS[method], Run(16, 64, 1, rounded=False), 4).hidden


@pytest.mark.parametrize("iterations", [1, 2])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_what_paper_mode_holds_of_all_experts_is_foreseen(family, iterations, moe, monkeypatch):
    """Gram matrices of a pass over the block, and the dense matrices that are read before it."""
    method, held = SparseLLM(mode="paper", inner=SparseGPT(), iterations=iterations), {"grams": 0, "dense": 0}

    def noted(name, function, size):
        def call(*args):
            made = function(*args)
            held[name] += 4 * size(made)
            return made

        return call

    monkeypatch.setattr(layerwise, "accumulator", noted("grams", layerwise.accumulator, lambda gram: gram.sum.numel()))
    monkeypatch.setattr(
        paper, "ffn_view", noted("dense", paper.ffn_view, lambda ffn: sum(m.W.numel() for m in ffn[:3] if m))
    )
    monkeypatch.setattr(paper, "rounds", lambda work, form, *_: None)
    monkeypatch.setattr(paper, "rounds_of", lambda *_: ())
    adapter = DecoderAdapter(moe(family, experts_implementation="eager"))
    rows = torch.randint(64, (16, 64), generator=torch.Generator().manual_seed(0))
    list(prune_blocks(adapter, rows, select(adapter, Unstructured(0.5), range(1)).plan, method, RunOptions()))
    shared = (Shared(80, 32, 80), Shared(32, 40, 32)) if family == "qwen2_moe" else (None, None)
    experts = Routed(Shared(48, 32, 48), Shared(32, 24, 32), 6, share=2 / 6)
    shape = BlockShape((Shared(64, 32, 64),), Shared(32, 32, 32), *shared, (experts,))
    foreseen = footprint(shape, method, Run(16, 64, 1, rounded=False), 4)
    largest = 4 * (shared[0].size + shared[1].size if shared[0] else 48 * 32 + 32 * 24)
    assert foreseen.moments == held["grams"]
    assert foreseen.copies == (held["dense"] + 2 * largest if iterations > 1 else 0)
