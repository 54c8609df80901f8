"""Mixture of experts: every expert is pruned exactly, on the tokens routed to it or by the rule for those without."""

import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config

from secateur.core.moments import ColumnNorms, Gram
from secateur.core.pattern import NM, Unstructured, check_mask
from secateur.core.plan import Plan
from secateur.core.solvers import ADMM, Magnitude, SparseGPT, Wanda
from secateur.core.sparsellm import SparseLLM
from secateur.errors import UsageError
from secateur.models.adapter import DecoderAdapter
from secateur.pruning.experts import expert_forms, routed_tokens
from secateur.pruning.hidden import Budget, Hidden
from secateur.pruning.layerwise import expert_groups, observe, planned_groups
from secateur.pruning.oneshot import RunOptions, block_targets, prune_blocks
from secateur.pruning.selection import select
from secateur.pruning.shortage import blended
from secateur.pruning.work import Work

HALF = Unstructured(0.5)
METHODS = {
    "magnitude": Magnitude(),
    "wanda": Wanda(),
    "sparsegpt": SparseGPT(),
    "admm": ADMM(iterations=4, ramp=2),
    "closed": SparseLLM(inner=SparseGPT(), iterations=2),
    "paper": SparseLLM(inner=SparseGPT(), mode="paper", iterations=2),
}
EVERYWHERE = list(itertools.product(["mixtral", "qwen2_moe"], METHODS)) + [
    (name, method) for name in ("qwen3_moe", "olmoe") for method in ("sparsegpt", "closed")
]
ROWS = torch.randint(3, 64, (8, 32), generator=torch.Generator().manual_seed(0))


def run(model, method, pattern=HALF, rows=ROWS, **options):
    adapter = DecoderAdapter(model)
    plan = select(adapter, pattern, range(len(adapter.blocks))).plan
    records = [done.record for done in prune_blocks(adapter, rows, plan, method, RunOptions(**options))]
    return adapter, plan, {linear.name: linear for record in records for linear in record.linears}, records


def starved(model):
    """Experts 0 and 5 never win: of 1 and 2, and of 3 and 4, one always has a positive score."""
    for layer in model.model.layers:
        gate = layer.mlp.gate.weight
        gate[[0, 5]] = 0
        gate[2], gate[4] = -gate[1], -gate[3]
    return model


def work_on(model, method="gram", rows=ROWS, batch=3):
    adapter = DecoderAdapter(model)
    plan = select(adapter, HALF, range(1)).plan
    hidden = Hidden(Budget(), (adapter.first_hidden(chunk) for chunk in rows.split(batch)))
    return Work(adapter, 0, hidden, block_targets(plan, adapter.block_names[0]), RunOptions(batch=batch))


@pytest.mark.parametrize("pattern", [HALF, NM(2, 4)], ids=str)
@pytest.mark.parametrize(("name", "method"), EVERYWHERE)
def test_every_expert_is_pruned_exactly_and_the_rest_untouched(moe, name, method, pattern):
    model = moe(name)
    before = {n: p.clone() for n, p in model.named_parameters()}
    adapter, plan, done, _ = run(model, METHODS[method], pattern)
    assert done.keys() == plan.keys()
    zeros = 0
    for block_name, block in zip(adapter.block_names, adapter.blocks, strict=True):
        for linear, view in adapter.linears(block).items():
            W = adapter.read(view)
            assert check_mask(W != 0, pattern) is None, linear
            assert torch.isfinite(W).all()
            assert not W[W == 0].signbit().any()
            assert done[f"{block_name}.{linear}"].sparsity == 0.5
            zeros += int((W == 0).sum())
    assert zeros == plan.size / 2
    planned = {f"{n}.weight" for n in plan}
    for parameter, tensor in model.named_parameters():
        if parameter not in planned and not parameter.endswith(("experts.gate_up_proj", "experts.down_proj")):
            assert torch.equal(tensor, before[parameter]), f"{parameter} is in no plan"


@torch.no_grad()
def routed(model, rows):
    """Inputs of the experts in the first block, and who is asked, by the model's own forward."""
    seen = {}
    handle = model.model.layers[0].mlp.experts.register_forward_pre_hook(lambda _, args: seen.update(args=args))
    model(rows)
    handle.remove()
    return seen["args"]


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize("solver", [SparseGPT(), Wanda()], ids=["gram", "diag"])
@torch.no_grad()
def test_moments_are_those_of_the_tokens_routed_to_each_expert(moe, name, solver):
    model = moe(name)
    rows = torch.randint(3, 64, (16, 32), generator=torch.Generator().manual_seed(5))
    work = work_on(model, rows=rows)
    sums, notes = observe(work, planned_groups(work) + expert_groups(work), solver, {})
    assert notes == {}, "enough tokens for everybody, or this test says nothing"
    X, index, _ = routed(model, rows)
    fused = model.model.layers[0].mlp.experts
    for e in range(6):
        own = X[(index == e).any(dim=1)]
        gate, up = (own @ fused.gate_up_proj[e].T).chunk(2, dim=1)
        inner = torch.nn.functional.silu(gate) * up
        for linears, inputs in ((("gate_proj", "up_proj"), own), (("down_proj",), inner)):
            total = sums[tuple(f"mlp.experts.{e}.{linear}" for linear in linears)]
            expected = inputs.T @ inputs if solver.needs == "gram" else inputs.square().sum(dim=0)
            assert total.tokens == len(own)
            torch.testing.assert_close(total.sum, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_an_expert_without_tokens_gets_the_moments_of_an_even_sample_of_all(moe):
    model = starved(moe("mixtral"))
    work = work_on(model, batch=8)
    sums, notes = observe(work, expert_groups(work), SparseGPT(), {})
    X, index, _ = routed(model, ROWS)
    assert not ((index == 0) | (index == 5)).any()
    first, down = [("mlp.experts.5.gate_proj", "mlp.experts.5.up_proj"), ("mlp.experts.5.down_proj",)]
    every = len(X) // 32  # the widest matrix of an expert has 32 inputs
    pool = X[::every]
    torch.testing.assert_close(sums[first].mean(), pool.T @ pool / len(pool), rtol=1e-4, atol=1e-4)
    fused = model.model.layers[0].mlp.experts
    gate, up = (pool @ fused.gate_up_proj[5].T).chunk(2, dim=1)
    inner = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(sums[down].mean(), inner.T @ inner / len(pool), rtol=1e-4, atol=1e-4)
    assert notes[first].startswith("no calibration tokens were routed to this expert, 32 wanted")
    assert {linears[0].split(".")[2] for linears in notes} >= {"0", "5"}


def test_the_pool_is_the_same_however_rows_are_chunked(moe):
    model = starved(moe("mixtral"))
    pools = []
    for batch in (1, 3, 8):
        work = work_on(model, batch=batch)
        _, (pool,) = routed_tokens(work, expert_forms(work))
        pools.append(torch.cat(pool.chunks))
    assert pools[0].shape == (32, 32)
    for pool in pools[1:]:
        torch.testing.assert_close(pool, pools[0])


def test_topping_up_is_continuous():
    own, pool = Gram(torch.eye(2) * 3, 3), Gram(torch.ones(2, 2) * 10, 5)
    assert torch.equal(blended(own, pool, 4).mean(), (torch.eye(2) * 3 + torch.ones(2, 2) * 2) / 4)
    assert torch.equal(blended(own, pool, 3).mean(), own.mean())
    none = ColumnNorms(torch.zeros(2), 0)
    assert torch.equal(blended(none, ColumnNorms(torch.ones(2), 5), 4).mean(), torch.ones(2) / 5)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "admm", "closed", "paper"])
def test_experts_without_tokens_are_pruned_and_said(moe, method):
    adapter, plan, done, _ = run(starved(moe("mixtral")), METHODS[method], NM(2, 4))
    assert done.keys() == plan.keys()
    for name, linear in done.items():
        if ".experts.0." in name or ".experts.5." in name:
            assert "no calibration tokens were routed to this expert" in linear.note
            assert linear.relative_error > 0
    for linear, view in adapter.linears(adapter.blocks[1]).items():
        assert check_mask(adapter.read(view) != 0, NM(2, 4)) is None, linear


def test_experts_with_few_tokens_are_not_fitted_and_said(moe):
    _, _, done, records = run(moe("mixtral"), METHODS["closed"])
    fitted = {r.ffn for r in records[0].rounds}
    for e in range(6):
        notes = {done[f"model.layers.0.mlp.experts.{e}.{p}_proj"].note for p in ("gate", "up", "down")}
        assert (f"mlp.experts.{e}" in fitted) == ("of 64 tokens that SparseLLM's fits want" not in "".join(notes))
    assert 0 < len(fitted) < 6, "some of each kind, or this test says nothing"


def test_rounds_lower_the_error_of_experts_with_tokens_enough(moe):
    rows = torch.randint(3, 64, (48, 32), generator=torch.Generator().manual_seed(1))
    _, _, done, records = run(moe("qwen2_moe"), METHODS["closed"], rows=rows, batch=8)
    assert {r.ffn for r in records[0].rounds} == {"", *(f"mlp.experts.{e}" for e in range(6))}
    for record in records:
        for _, rounds in itertools.groupby(record.rounds, key=lambda r: r.ffn):
            rounds = list(rounds)
            assert next(r.error for r in rounds if r.chosen) == min(r.error for r in rounds)
    assert not any(linear.note for linear in done.values())


def test_the_closed_loop_loses_less_of_the_first_block(moe):
    rows = torch.randint(3, 64, (48, 32), generator=torch.Generator().manual_seed(1))
    lost = {m: run(moe("mixtral"), METHODS[m], rows=rows, batch=8)[3][0].output_error for m in ("sparsegpt", "closed")}
    assert lost["closed"] < lost["sparsegpt"]


def test_paper_mode_with_one_iteration_is_the_inner_solver_bit_for_bit(moe):
    one, other = moe("qwen2_moe"), moe("qwen2_moe")
    run(one, SparseGPT())
    run(other, SparseLLM(inner=SparseGPT(), mode="paper", iterations=1))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_experts_in_a_list_even_one_that_nobody_asks(listed_moe, method):
    model = listed_moe()
    for layer in model.model.layers:
        layer.mlp.router.bias[3] = -100
    adapter, plan, done, _ = run(model, METHODS[method])
    assert done.keys() == plan.keys()
    assert "model.layers.0.mlp.router" not in plan
    for linear, view in adapter.linears(adapter.blocks[0]).items():
        assert check_mask(adapter.read(view) != 0, HALF) is None, linear
    said = "no calibration tokens were routed to this expert" in done["model.layers.1.mlp.experts.3.w2"].note
    assert said == (method != "magnitude")


@pytest.mark.parametrize("method", ["sparsegpt", "closed", "paper"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounded_products_and_16_bit_models_keep_the_promise(moe, method, dtype):
    model = moe("olmoe").to(dtype)
    adapter, *_ = run(model, METHODS[method], precision="bfloat16", rows=ROWS[:4])
    assert {p.dtype for p in model.parameters()} == {dtype}
    for linear, view in adapter.linears(adapter.blocks[0]).items():
        assert check_mask(adapter.read(view) != 0, HALF) is None, linear


@pytest.mark.parametrize("method", ["sparsegpt", "closed"])
def test_rows_that_turn_non_finite_reach_no_expert(moe, method):
    model = moe("mixtral")
    rows = torch.randint(3, 64, (16, 32), generator=torch.Generator().manual_seed(0))
    rows[0, 5] = 1
    model.model.embed_tokens.weight[1] = float("inf")
    *_, records = run(model, METHODS[method], rows=rows, batch=4)
    assert [record.dropped_rows for record in records] == [1, 0]
    assert all(torch.isfinite(parameter).all() for parameter in model.model.layers.parameters())


def test_a_plan_without_a_part_of_an_expert_is_refused_for_sparsellm_only(moe):
    for method in (SparseGPT(), METHODS["closed"]):
        adapter = DecoderAdapter(moe("olmoe"))
        targets = dict(select(adapter, HALF, range(2)).plan.targets)
        del targets["model.layers.0.mlp.experts.2.down_proj"]
        runs = prune_blocks(adapter, ROWS, Plan(targets), method, RunOptions())
        if isinstance(method, SparseGPT):
            assert len(next(runs).record.linears) == 4 + 17
        else:
            with pytest.raises(UsageError, match=r"the plan lacks mlp\.experts\.2\.down_proj"):
                next(runs)


@pytest.mark.parametrize("method", ["closed", "paper"])
def test_dense_blocks_and_shared_experts_beside_routed_ones(method):
    config = DeepseekV3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1,
        first_k_dense_replace=1, n_group=1, topk_group=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=8, max_position_embeddings=64, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter *= 8 if parameter.ndim >= 2 else 1
    adapter, plan, done, records = run(model, METHODS[method], NM(2, 4))
    assert done.keys() == plan.keys()
    assert [len(record.linears) for record in records] == [5 + 3, 5 + 3 + 4 * 3]
    assert adapter.left_alone() == ["model.layers.1.mlp.gate.weight"]
    assert {r.ffn for r in records[0].rounds} == {""}
    assert "" in {r.ffn for r in records[1].rounds}, "the shared expert"
    for linear, view in adapter.linears(adapter.blocks[1]).items():
        assert check_mask(adapter.read(view) != 0, NM(2, 4)) is None, linear


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("method", ["sparsegpt", "closed", "paper"])
def test_on_a_gpu_views_follow_the_block(moe, method):
    adapter, plan, done, _ = run(starved(moe("mixtral")), METHODS[method], device="cuda")
    assert done.keys() == plan.keys()
    for linear, view in adapter.linears(adapter.blocks[1]).items():
        assert view.weight.device.type == "cpu", "blocks go back to host memory"
        assert check_mask(adapter.read(view) != 0, HALF) is None, linear
