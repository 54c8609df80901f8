"""Branches of a pruned block: each is the best of its rank for what its output lacks, and the block loses less."""

import copy
import itertools

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from secateur.core.low_rank import Branch, residual_fit
from secateur.core.pattern import NM, Unstructured, check_mask
from secateur.core.solvers import ADMM, Magnitude, SparseGPT, Wanda
from secateur.core.sparsellm import SparseLLM
from secateur.errors import UsageError
from secateur.models.adapter import DecoderAdapter
from secateur.models.branches import attach, attached, detach
from secateur.models.linears import matrix
from secateur.pruning.low_rank import check_ranks
from secateur.pruning.oneshot import RunOptions, prune_blocks
from secateur.pruning.selection import select

RANK, BLOCKS = 4, 2
ROWS = torch.randint(64, (24, 32), generator=torch.Generator().manual_seed(1))
SMALL = {"vocab_size": 64, "max_position_embeddings": 64, "hidden_size": 32, "num_hidden_layers": BLOCKS}
MODELS = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, **SMALL)
    ),
    "opt": lambda: OPTForCausalLM(OPTConfig(ffn_dim=48, num_attention_heads=4, word_embed_proj_dim=32, **SMALL)),
    "opt post-norm": lambda: OPTForCausalLM(
        OPTConfig(ffn_dim=48, num_attention_heads=4, word_embed_proj_dim=32, do_layer_norm_before=False, **SMALL)
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_inner=48, n_layer=BLOCKS, n_head=4, n_positions=64)
    ),
}
METHODS = {
    "magnitude": Magnitude(),
    "wanda": Wanda(),
    "sparsegpt": SparseGPT(),
    "admm": ADMM(iterations=6, ramp=4),
    "closed": SparseLLM(inner=SparseGPT(), iterations=2),
    "paper": SparseLLM(inner=SparseGPT(), mode="paper", iterations=2),
}


@torch.no_grad()
def make(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[name]().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter *= 8 if parameter.ndim == 2 else 1
    return model


def run(model, method, rank, pattern=Unstructured(0.6), ignore=(), rows=ROWS, **options):  # noqa: B008
    adapter = DecoderAdapter(model)
    plan = select(adapter, pattern, range(BLOCKS), ignore=ignore).plan
    blocks = prune_blocks(adapter, rows, plan, method, RunOptions(batch=4, **options), low_rank=rank)
    return plan, [done.record for done in blocks]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_the_block_loses_less(name, method):
    bare, compensated = make(name), make(name)
    _, without = run(bare, METHODS[method], 0)
    plan, with_branches = run(compensated, METHODS[method], RANK)
    assert with_branches[0].output_error < without[0].output_error  # later blocks get other inputs
    assert attached(compensated).keys() == plan.keys()
    for record in with_branches:
        for linear in record.linears:
            R, C = plan[linear.name].shape
            assert (linear.branch.rank, linear.branch.numbers) == (RANK, RANK * (R + C))
            assert 0 < linear.branch.returned <= 1
    if method != "magnitude":  # which has seen another text
        first = dict(bare.named_parameters())
        for linear in (one.name for one in with_branches[0].linears):
            assert torch.equal(compensated.get_submodule(linear).weight, first[f"{linear}.weight"]), "W is not touched"
    for linear in plan:
        assert check_mask(matrix(compensated.get_submodule(linear)) != 0, Unstructured(0.6)) is None


@torch.no_grad()
def inputs_and_outputs(model, name, rows=ROWS):
    """Of one linear, in the model's own forward; and the output of the first block."""
    seen = {}
    linear = model.get_submodule(name)
    block = model.model.layers[0]
    handles = [
        linear.register_forward_hook(lambda _, args, out: seen.update(X=args[0].flatten(0, 1), Z=out.flatten(0, 1))),
        block.register_forward_hook(
            lambda _, args, out: seen.update(block=(out if isinstance(out, torch.Tensor) else out[0]).flatten(0, 1))
        ),
    ]
    model(rows)
    for handle in handles:
        handle.remove()
    return seen


@torch.no_grad()
@pytest.mark.parametrize("inside", ["self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"])
@pytest.mark.parametrize("method", ["sparsegpt", "closed"])
def test_each_branch_is_the_reduced_rank_regression_of_what_its_output_lacks(method, inside):
    """An oracle from plain forwards of whole models: branches of later linears taken off, this one's too."""
    dense, model = make("llama"), make("llama")
    _, records = run(model, METHODS[method], RANK, ignore=["layers.1"])
    name = f"model.layers.0.{inside}"
    order = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    last = name.rpartition(".")[2]
    earlier = [*itertools.chain(*itertools.takewhile(lambda group: last not in group, order))]
    before = copy.deepcopy(model)
    branch = attached(model)[name]
    branches = detach(before)
    attach(before, {n: b for n, b in branches.items() if n.rpartition(".")[2] in earlier})
    here, there = inputs_and_outputs(before, name), inputs_and_outputs(dense, name)
    key = "block" if last == "down_proj" else "Z"
    X, E = here["X"].double(), (there[key] - here[key]).double()
    H = X.T @ X / len(X)
    ridge = 0.01 * H.diagonal().mean()
    full = torch.linalg.solve(H + ridge * torch.eye(len(H)), X.T @ E / len(X)).T  # ridge regression
    L = torch.linalg.cholesky(H + ridge * torch.eye(len(H)))
    U, sigma, Vt = torch.linalg.svd(full @ L, full_matrices=False)
    expected = U[:, :RANK] * sigma[:RANK] @ Vt[:RANK] @ torch.linalg.inv(L)
    product = branch.product.double()
    assert torch.allclose(product, expected, atol=2e-3 * float(expected.abs().max()))
    left = (E - X @ product.T).square().sum() / E.square().sum()
    record = next(linear for linear in records[0].linears if linear.name == name)
    assert record.branch.returned == pytest.approx(1 - float(left), abs=1e-3)
    assert left < 1


def test_where_nothing_else_was_pruned_it_is_eora():
    """Inputs are the dense ones and nothing follows in the residual stream: e = x (W0 - W)ᵀ."""
    dense, model = make("llama"), make("llama")
    run(model, SparseGPT(), RANK, ignore=["k_proj", "v_proj", "o_proj", "mlp", "layers.1"])
    ((name, branch),) = attached(model).items()
    X = inputs_and_outputs(dense, name)["X"]
    lost = dense.get_submodule(name).weight - model.get_submodule(name).weight
    H = X.T @ X / len(X)
    best = residual_fit(lost @ H, H, RANK)

    def left(one: Branch) -> float:
        return float((X @ (lost - one.product).T).square().sum())

    assert left(branch) == pytest.approx(left(best), rel=1e-3)


def test_the_same_run_twice_and_at_another_precision():
    one, other, rounded = make("llama"), make("llama"), make("llama")
    run(one, SparseGPT(), RANK)
    run(other, SparseGPT(), RANK)
    _, records = run(rounded, SparseGPT(), RANK, precision="bfloat16")
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    assert any(not torch.equal(p, one.get_parameter(name)) for name, p in rounded.named_parameters())
    assert records[0].output_error == pytest.approx(run(make("llama"), SparseGPT(), RANK)[1][0].output_error, rel=0.1)


def test_rows_that_are_not_finite_are_not_fitted_to():
    model = make("llama")
    rows = torch.randint(1, 64, (16, 32), generator=torch.Generator().manual_seed(0))
    rows[0, 5] = 0
    model.model.embed_tokens.weight[0] = float("inf")
    _, records = run(model, Magnitude(), RANK, rows=rows)
    assert [record.dropped_rows for record in records] == [1, 0]
    assert all(torch.isfinite(factor).all() for branch in attached(model).values() for factor in branch)


def test_ranks_and_experts_are_checked_before_any_work(listed_moe):
    adapter = DecoderAdapter(make("llama"))
    plan = select(adapter, NM(2, 4), range(BLOCKS)).plan
    check_ranks(adapter, plan, 16)
    with pytest.raises(UsageError, match=r"low_rank 17 is more than model\.layers\.0\.self_attn\.k_proj of 16 x 32"):
        check_ranks(adapter, plan, 17)
    adapter = DecoderAdapter(listed_moe())
    with pytest.raises(UsageError, match=r"experts.0.w1 is a matrix of an expert.*--ignore experts"):
        check_ranks(adapter, select(adapter, NM(2, 4), range(2)).plan, 2)
