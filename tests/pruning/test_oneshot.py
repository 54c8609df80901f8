"""The pipeline on tiny random models: every method and pattern, promises met, what must not change does not."""

import copy
import itertools

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from secateur.core.pattern import NM, Unstructured, check_mask, zeros_in
from secateur.core.solvers import ADMM, Magnitude, SparseGPT, Wanda
from secateur.core.sparsellm import SparseLLM
from secateur.errors import ModelError, NumericalError
from secateur.models.adapter import DecoderAdapter
from secateur.pruning.oneshot import RunOptions, prune_blocks
from secateur.pruning.selection import select

VOCABULARY, BLOCKS = 64, 3


def llama():
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=BLOCKS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def opt(post_norm=False):
    config = OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, ffn_dim=48, num_hidden_layers=BLOCKS, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32, do_layer_norm_before=not post_norm, dropout=0.0,
    )  # fmt: skip
    return OPTForCausalLM(config)


def gpt2():
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_inner=48, n_layer=BLOCKS, n_head=4, n_positions=64)
    return GPT2LMHeadModel(config)


def post_norm_opt():
    return opt(post_norm=True)


MODELS = {"llama": llama, "opt": opt, "opt post-norm": post_norm_opt, "gpt2": gpt2}
CLOSED = SparseLLM(inner=SparseGPT(), iterations=2)
PAPER = SparseLLM(inner=SparseGPT(), mode="paper", iterations=3)
METHODS = {
    "magnitude": Magnitude(),
    "wanda": Wanda(),
    "sparsegpt": SparseGPT(),
    "admm": ADMM(iterations=6, ramp=4),
    "closed": CLOSED,
    "paper": PAPER,
}
ROWS = torch.randint(VOCABULARY, (8, 32), generator=torch.Generator().manual_seed(0))


def make(name, dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[name]().to(dtype).eval().requires_grad_(False)
    for parameter in model.parameters():  # random initial weights are so small that every FFN looks linear
        if parameter.ndim == 2:
            parameter *= 8
    return model


HALF = Unstructured(0.5)


def run(model, method, pattern=HALF, blocks=range(BLOCKS), rows=ROWS, **options):
    adapter = DecoderAdapter(model)
    plan = select(adapter, pattern, blocks).plan
    return plan, [done.record for done in prune_blocks(adapter, rows, plan, method, RunOptions(**options))]


@pytest.mark.parametrize(
    ("name", "method", "pattern"),
    list(itertools.product(MODELS, METHODS, [Unstructured(0.6), Unstructured(0.5, "row"), NM(2, 4)])),
    ids=str,
)
def test_every_model_method_and_pattern(name, method, pattern):
    model = make(name)
    untouched = {n: p.clone() for n, p in model.named_parameters()}
    plan, records = run(model, METHODS[method], pattern)
    adapter = DecoderAdapter(model)
    done = {linear.name: linear for record in records for linear in record.linears}
    assert done.keys() == plan.keys()
    for linear, target in plan.items():
        W = adapter.read(model.get_submodule(linear))
        assert check_mask(W != 0, target.pattern) is None
        assert torch.isfinite(W).all()
        assert not torch.signbit(W[W == 0]).any()
        assert int((W == 0).sum()) == zeros_in(target.shape, target.pattern)
        assert done[linear].sparsity == zeros_in(target.shape, target.pattern) / W.numel()
    for parameter, before in untouched.items():
        if parameter.removesuffix(".weight") not in plan:
            assert torch.equal(model.get_parameter(parameter), before)


@pytest.mark.parametrize("inner", [SparseGPT(), ADMM(), Wanda(), Magnitude()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_paper_mode_with_one_iteration_is_the_inner_solver_bit_for_bit(name, inner):
    one, other = make(name), make(name)
    run(one, inner)
    run(other, SparseLLM(inner=inner, mode="paper", iterations=1))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_the_closed_loop_loses_less_of_the_first_block(name):
    lost = {}
    for label, method in (("base", SparseGPT()), ("closed", SparseLLM(inner=SparseGPT(), iterations=1))):
        rows = torch.randint(VOCABULARY, (32, 64), generator=torch.Generator().manual_seed(1))
        lost[label] = run(make(name), method, Unstructured(0.6), rows=rows)[1][0].output_error
    assert lost["closed"] < lost["base"]


def test_the_same_run_twice_gives_the_same_weights():
    one, other = make("llama"), make("llama")
    run(one, CLOSED)
    run(other, CLOSED)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("batch", [3, 8])  # 8 rows: the last chunk of 3 is shorter
@pytest.mark.parametrize("name", ["llama", "opt"])  # OPT flattens the tokens of its FFN
@pytest.mark.parametrize("method", METHODS)
def test_chunks_of_rows_change_nothing(method, name, batch):
    """A row's forward does not depend on the others, and sums go row by row."""
    one, other = make(name), make(name)
    _, alone = run(one, METHODS[method], batch=1)
    _, together = run(other, METHODS[method], batch=batch)
    assert [r.output_error for r in together] == pytest.approx([r.output_error for r in alone], rel=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_threads_change_nothing_but_rounding(method):
    one, other = make("llama"), make("llama")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        _, alone = run(one, METHODS[method])
        torch.set_num_threads(4)
        _, together = run(other, METHODS[method])
    finally:
        torch.set_num_threads(threads)
    assert [r.output_error for r in together] == pytest.approx([r.output_error for r in alone], rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_massive_activations_are_survived_and_told(method):
    """One channel of the residual stream a thousand times larger than the others, as in many large models."""
    model = make("llama")
    model.model.embed_tokens.weight[:, 7] *= 1000
    _, records = run(model, METHODS[method])
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    linears = [linear for record in records for linear in record.linears]
    if method != "magnitude":
        assert max(linear.inputs.largest for linear in linears) > 100
        assert all(0 <= linear.relative_error < 1 for linear in linears)
    assert all(record.output_error < 1 for record in records)


def test_only_the_chosen_blocks_are_pruned():
    model = make("llama")
    before = copy.deepcopy(model.state_dict())
    _, records = run(model, SparseGPT(), blocks=range(1, 2))
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert all(name.startswith("model.layers.1.") for name in changed)
    assert [len(record.linears) for record in records] == [0, 7, 0]


def test_bfloat16_models_stay_bfloat16():
    model = make("llama", torch.bfloat16)
    plan, _ = run(model, CLOSED)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    for linear in plan:
        assert check_mask(model.get_submodule(linear).weight != 0, Unstructured(0.5)) is None


@pytest.mark.parametrize("method", ["sparsegpt", "closed", "paper"])
def test_rounded_products_keep_the_promise_and_lose_little(method):
    exact, rounded = make("llama"), make("llama")
    _, records = run(exact, METHODS[method], precision="float32")
    seen = set()
    rounded.model.layers[0].mlp.down_proj.register_forward_hook(
        lambda *_: seen.add((torch.is_autocast_enabled("cpu"), torch.get_float32_matmul_precision()))
    )
    plan, close = run(rounded, METHODS[method], precision="bfloat16")
    for linear, target in plan.items():
        assert check_mask(rounded.get_submodule(linear).weight != 0, target.pattern) is None
    assert {p.dtype for p in rounded.parameters()} == {torch.float32}
    assert (True, "medium") in seen
    assert any(not torch.equal(p, exact.get_parameter(name)) for name, p in rounded.named_parameters())
    assert close[0].output_error == pytest.approx(records[0].output_error, rel=0.1)
    assert torch.get_float32_matmul_precision() == "highest"


def test_rounds_are_recorded_and_the_best_is_chosen():
    _, records = run(make("llama"), CLOSED)
    for record in records:
        errors = [r.error for r in record.rounds]
        assert [r.iteration for r in record.rounds] == list(range(len(errors)))
        assert next(r.error for r in record.rounds if r.chosen) == min(errors)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "closed", "paper"])
@pytest.mark.parametrize(("bad", "ends"), [(1, False), (3, True)])
def test_rows_that_turn_non_finite_are_dropped_and_end_the_run_above_a_tenth(method, bad, ends):
    model = make("llama")
    rows = torch.randint(1, VOCABULARY, (16, 32), generator=torch.Generator().manual_seed(0))
    rows[:bad, 5] = 0
    model.model.embed_tokens.weight[0] = float("inf")
    if ends:
        with pytest.raises(NumericalError, match=f"{bad} of 16 calibration rows are not finite after model.layers.0"):
            run(model, METHODS[method], rows=rows)
    else:
        _, records = run(model, METHODS[method], rows=rows, batch=4)
        assert [record.dropped_rows for record in records] == [1, 0, 0]
        assert all(torch.isfinite(parameter).all() for parameter in model.model.layers.parameters())


@pytest.mark.parametrize(("method", "pattern"), [("sparsegpt", HALF), ("closed", Unstructured(0.9999))])
def test_a_linear_whose_inputs_are_all_zero_is_named(method, pattern):
    """Since its values are zero, or since everything before it was pruned away."""
    model = make("llama")
    if pattern == HALF:
        model.model.layers[0].self_attn.v_proj.weight.zero_()
    with pytest.raises(NumericalError, match=r"^model\.layers\.0\.self_attn\.o_proj: every calibration input"):
        run(model, METHODS[method], pattern)


def test_an_ffn_of_unknown_form_is_refused_for_sparsellm_only():
    model = make("llama")
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.Softsign()
    with pytest.raises(ModelError, match="layer solver such as admm"):
        run(model, CLOSED)
    run(model, SparseGPT())
