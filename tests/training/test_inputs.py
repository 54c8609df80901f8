"""What sparse linears are multiplied with, against sums by hand; every token once; the masks that follow from it."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from secateur.core.moments import ColumnNorms
from secateur.core.pattern import NM, Unstructured, keep_mask
from secateur.core.sparse_adamw import INPUT_MEMORY, Schedule
from secateur.errors import UsageError
from secateur.models.quiet import quiet
from secateur.training import SparseAdamW, deal_state, gather_state
from secateur.training.inputs import InputSums

PATTERN = NM(2, 4)


def inputs_of(seed, rows=6):
    """Columns of very different size."""
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed)) * torch.arange(1.0, 9)


def build(**options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        linear = nn.Linear(8, 4, bias=False)
    groups = [{"params": [linear.weight], "pattern": PATTERN}]
    options = {"metric": "wanda", "lr": 1e-3, "schedule": Schedule(10, refresh=2, freeze=1.0), **options}
    return linear, SparseAdamW(groups, **options)


def train(linear, optimizer, seeds):
    sums = InputSums({linear.weight: linear})
    for seed in seeds:
        with sums.watching():
            loss = linear(inputs_of(seed)).square().mean()
        linear(inputs_of(99))  # nobody watches
        loss.backward()
        optimizer.observe(sums.taken())
        optimizer.step()
        optimizer.zero_grad()


def test_the_mask_follows_from_weights_and_inputs_of_the_last_steps():
    linear, optimizer = build()
    train(linear, optimizer, range(3))
    before = optimizer.state[linear.weight]["master"].clone()
    train(linear, optimizer, [3])
    fades = [INPUT_MEMORY**age for age in (3, 2, 1, 0)]
    squares = sum(fade * inputs_of(seed).square().sum(0) for seed, fade in enumerate(fades))
    mean = squares / (6 * sum(fades))
    state = optimizer.state[linear.weight]
    assert torch.allclose(state["inputs"] / state["tokens"], mean, rtol=1e-5)
    assert torch.equal(state["mask"], keep_mask(state["master"].abs() * mean.sqrt(), PATTERN))
    assert not torch.equal(state["mask"], keep_mask(state["master"].abs(), PATTERN)), "the inputs matter here"
    assert not torch.equal(before, state["master"])


def test_a_recomputed_forward_is_not_counted_again(tiny_llama):
    with quiet():
        tiny_llama.requires_grad_().train().gradient_checkpointing_enable({"use_reentrant": False})
    linears = {m.weight: m for m in tiny_llama.model.layers.modules() if isinstance(m, nn.Linear)}
    sums, calls = InputSums(linears), []
    for linear in linears.values():
        linear.register_forward_pre_hook(lambda *_: calls.append(1))
    ids = torch.arange(24).view(2, 12)
    for part in ids.split(1):  # gradients add up over two
        with sums.watching():
            loss = tiny_llama(input_ids=part, labels=part, use_cache=False).loss
        loss.backward()
    assert len(calls) > 2 * len(linears), "activations were computed again"
    assert {norms.tokens for norms in sums.taken().values()} == {24}
    assert {norms.tokens for norms in sums.taken().values()} == {0}


@torch.no_grad()
def test_a_conv1d_has_its_inputs_in_rows():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        conv = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=8, n_layer=1, n_head=2)).transformer.h[0].mlp.c_fc
    groups = [{"params": [conv.weight], "pattern": Unstructured(0.5, "row"), "transposed": True}]
    optimizer = SparseAdamW(groups, metric="wanda", lr=0.0, schedule=Schedule(10, refresh=1))
    sums = InputSums({conv.weight: conv})
    with sums.watching():
        conv(inputs_of(0))
    optimizer.observe(sums.taken())
    conv.weight.grad = torch.zeros_like(conv.weight)
    optimizer.step()
    scores = optimizer.state[conv.weight]["master"].T.abs() * inputs_of(0).square().mean(0).sqrt()
    assert torch.equal(optimizer.state[conv.weight]["mask"].T, keep_mask(scores, Unstructured(0.5, "row")))


def test_sums_of_several_processes_are_added_once():
    linear, other = nn.Linear(8, 4), nn.Linear(3, 2)
    sums = InputSums({linear.weight: linear, other.weight: other})
    with sums.watching():
        linear(inputs_of(0))
    calls = []
    taken = sums.taken(lambda flat: calls.append(flat) or 2 * flat)
    assert len(calls) == 1
    assert taken[linear.weight].tokens == 12
    assert torch.equal(taken[linear.weight].sum, 2 * inputs_of(0).square().sum(0))
    assert (taken[other.weight].tokens, taken[other.weight].sum.tolist()) == (0, [0, 0, 0])


def test_a_matrix_that_no_token_has_reached_goes_by_magnitude():
    linear, optimizer = build()
    other = nn.Linear(8, 4, bias=False)
    optimizer.add_param_group({"params": [other.weight], "pattern": PATTERN})
    for _ in range(2):
        linear.weight.grad, other.weight.grad = torch.ones(4, 8), torch.ones(4, 8)
        optimizer.observe({linear.weight: ColumnNorms(torch.ones(8), 1)})
        optimizer.step()
    state = optimizer.state[other.weight]
    assert torch.equal(state["mask"], keep_mask(state["master"].abs(), PATTERN))


def test_a_resumed_run_remembers_its_inputs():
    straight, optimizer = build()
    train(straight, optimizer, range(5))
    state = gather_state(optimizer, straight.named_parameters())
    assert state[0]["weight.inputs"].shape == (8,)
    resumed, other = build()
    deal_state(other, resumed.named_parameters(), *state)
    train(straight, optimizer, range(5, 10))
    train(resumed, other, range(5, 10))
    assert torch.equal(straight.weight, resumed.weight)
    model, by_size = build(metric="magnitude")
    with pytest.raises(ValueError, match=r"weight.inputs was \(8,\) and is absent"):
        deal_state(by_size, model.named_parameters(), *state)


def test_what_cannot_be_is_said():
    linear, optimizer = build()
    linear.weight.grad = torch.ones(4, 8)
    with pytest.raises(RuntimeError, match="metric wanda has seen no inputs: call observe"):
        optimizer.step()
    linear, optimizer = build(metric="fisher")
    with pytest.raises(ValueError, match="metric fisher does not look at inputs; use wanda"):
        optimizer.observe({linear.weight: ColumnNorms(torch.ones(8), 1)})
    experts = nn.Parameter(torch.randn(3, 4, 8))
    with pytest.raises(UsageError, match=r"3 experts in one tensor of shape \(3, 4, 8\)"):
        SparseAdamW([{"params": [experts], "pattern": PATTERN}], metric="wanda", schedule=Schedule(10))
