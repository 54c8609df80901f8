"""Row scales (CAST): the model computes with A ⊙ W, A learns as under torch's AdamW, and at the end it is in W."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur.core.pattern import NM, Unstructured, check_mask
from secateur.core.row_scales import scaled
from secateur.core.sparse_adamw import UPDATES, Schedule
from secateur.training import SparseAdamW

WANTED = 1.5 * torch.randn(6, 8, generator=torch.Generator().manual_seed(2))


def problem(dtype=torch.float32, *, transposed=False):
    """A matrix, and what puts the gradient of a loss at whatever it holds: of |x Wᵀ - y|²."""
    W = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    weight = nn.Parameter((W.T if transposed else W).to(dtype).contiguous())

    def backward(x):
        used = weight.T if transposed else weight
        F.mse_loss(F.linear(x.to(dtype), used).float(), F.linear(x, WANTED)).backward()

    return weight, backward


def inputs(steps):
    return torch.randn(steps, 16, 8, generator=torch.Generator().manual_seed(1))


def optimizer_for(weight, method="cast", transposed=False, pattern=NM(2, 4), **options):  # noqa: B008
    group = {"params": [weight], "pattern": pattern, "transposed": transposed}
    options = {"lr": 1e-2, "schedule": Schedule(40, refresh=4, freeze=0.5), "scales": 2, **options}
    return SparseAdamW([group], method=method, **options)


def train(optimizer, backward, steps):
    for x in steps:
        backward(x)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("transposed", [False, True], ids=["R x C", "C x R"])
@pytest.mark.parametrize("method", UPDATES)
def test_folded_weights_are_the_models_and_zeros_stay(method, transposed):
    weight, backward = problem(transposed=transposed)
    optimizer = optimizer_for(weight, method, transposed)
    train(optimizer, backward, inputs(40))
    A = optimizer.state[weight]["scale"]
    assert (A - 1).abs().mean() > 0.01, "they learn"
    before = weight.detach().clone()
    optimizer.project()
    assert torch.equal(weight, before)
    assert torch.equal(optimizer.state[weight]["master"], weight)
    assert (A == 1).all()
    if method != "none":
        rows = weight.T if transposed else weight
        assert check_mask(rows != 0, NM(2, 4)) is None
        assert not torch.signbit(weight[weight == 0]).any()


def test_it_is_adamw_of_two_tensors():
    """Nothing pruned: the same W and A as by autograd and torch's AdamW."""
    weight, backward = problem()
    wanted_W = nn.Parameter(weight.detach().clone())
    A = nn.Parameter(torch.ones(6, 2))
    options = {"lr": 1e-2, "betas": (0.9, 0.95)}
    reference = torch.optim.AdamW(
        [{"params": [wanted_W], "weight_decay": 0.1}, {"params": [A], "weight_decay": 0.0}], **options
    )
    optimizer = optimizer_for(weight, "none", weight_decay=0.1)
    for x in inputs(20):
        backward(x)
        optimizer.step()
        optimizer.zero_grad()
        F.mse_loss(F.linear(x, scaled(wanted_W, A)), F.linear(x, WANTED)).backward()
        reference.step()
        reference.zero_grad()
    state = optimizer.state[weight]
    assert torch.allclose(state["scale"], A, atol=1e-5)
    assert torch.allclose(state["master"], wanted_W, atol=1e-5)
    assert torch.allclose(weight, scaled(wanted_W, A), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["cast", "ast"])
def test_a_saved_and_loaded_run_goes_on_bit_for_bit(method, dtype):
    weight, backward = problem(dtype)
    optimizer = optimizer_for(weight, method)
    train(optimizer, backward, inputs(40)[:13])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    saved_weight = weight.detach().clone()
    train(optimizer, backward, inputs(40)[13:])
    resumed, other_backward = problem(dtype)
    other = optimizer_for(resumed, method)
    resumed.data.copy_(saved_weight)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.state[resumed]["scale"].dtype == torch.float32
    train(other, other_backward, inputs(40)[13:])
    assert torch.equal(weight, resumed)
    assert torch.equal(optimizer.state[weight]["scale"], other.state[resumed]["scale"])


def test_what_is_pruned_has_no_say_in_its_scale():
    """Of a matrix that the model sees masked, only kept weights move A."""
    weight, _ = problem()
    optimizer = optimizer_for(weight, "ast")
    weight.grad = torch.where(weight == 0, 1.0, 0.0)
    optimizer.step()
    assert (optimizer.state[weight]["scale"] == 1).all()


def test_the_mask_sees_scaled_weights():
    weight = nn.Parameter(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    optimizer = optimizer_for(weight, "ast", pattern=Unstructured(0.5), lr=0.0, schedule=Schedule(10, refresh=1))
    optimizer.state[weight]["scale"].copy_(torch.tensor([[9.0, 1.0]]))
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert (weight[0] != 0).tolist() == [True, True, False, False]


def test_a_matrix_whose_inputs_do_not_divide():
    weight, _ = problem()
    with pytest.raises(ValueError, match="scales 3 wants in_features divisible by 3, got 8"):
        optimizer_for(copy.deepcopy(weight), scales=3)
