"""Adapters under a mask: merged they compute what they computed apart, and no zero is lost."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from secateur.core.pattern import NM, keep_mask
from secateur.core.sparse_adamw import Schedule
from secateur.errors import ModelError, UsageError
from secateur.training import SparseAdamW
from secateur.training.masked_lora import merge_lora, start_lora

X = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
WANTED = torch.randn(16, 6, generator=torch.Generator().manual_seed(2))


def network(kind, dtype=torch.float32):
    """A linear whose mask is 2:4 with one zero more, and another that stays as it is."""
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(8, 6) if kind == "Linear" else Conv1D(6, 8)
    model = nn.ModuleDict({"one": linear, "two": nn.Linear(6, 6)}).to(dtype)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    W = linear.weight.data if kind == "Linear" else linear.weight.data.T
    mask = keep_mask(W.float().abs(), NM(2, 4))
    W[0, int(mask[0].nonzero()[0])] = 0.0
    return model, mask


def answer(model, dtype=torch.float32):
    return model["two"](model["one"](X.to(dtype)))


def trained(kind, dtype, steps=20, seed=0):
    model, mask = network(kind, dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = start_lora(model, {"one": mask}, 3, 2.0, torch.Generator().manual_seed(seed))
    optimizer = SparseAdamW([{"params": parameters}], lr=3e-2, schedule=Schedule(20))
    losses = []
    for _ in range(steps):
        loss = F.mse_loss(answer(model, dtype).float(), WANTED)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model, mask, before, losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_merged_is_the_forward_with_adapters_and_zeros_stay(kind, dtype):
    model, mask, before, losses = trained(kind, dtype)
    assert losses[-1] < 0.9 * losses[0]
    apart = answer(model, dtype)
    assert merge_lora(model) == 1
    assert torch.equal(answer(model, dtype), apart)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert type(model["one"]).__name__ == kind
    same = [name for name in before if name != "one.weight"]
    assert all(torch.equal(before[name], after[name]) for name in same)
    old, new = (state["one.weight"] if kind == "Linear" else state["one.weight"].T for state in (before, after))
    gone = ~mask | (old == 0)
    assert (new[gone] == 0).all()
    assert not torch.signbit(new[gone]).any()
    assert (new[~gone] != old[~gone]).float().mean() > 0.5
    assert merge_lora(model) == 0


def test_nothing_changes_before_the_first_step():
    model, mask = network("Linear")
    model["one"].weight.data *= mask
    before = answer(model)
    start_lora(model, {"one": mask}, 3)
    assert torch.equal(answer(model), before)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "one.parametrizations.weight.0.A",
        "one.parametrizations.weight.0.B",
    }


def test_autocast_does_not_change_what_is_merged():
    model, *_ = trained("Linear", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        seen = model["one"].weight
    merge_lora(model)
    assert torch.equal(model["one"].weight, seen)


def test_the_gradient_is_that_of_the_product_under_the_mask():
    model, mask = network("Linear", torch.float64)
    A, B = start_lora(model, {"one": mask}, 3, 0.5, torch.Generator().manual_seed(0))
    B.data.normal_(generator=torch.Generator().manual_seed(3))
    kept = (model["one"].parametrizations.weight.original != 0).double()
    G = torch.randn(6, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    (model["one"].weight * G).sum().backward()
    assert torch.allclose(A.grad.double(), 0.5 * B.double().T @ (G * kept), atol=1e-5)
    assert torch.allclose(B.grad.double(), 0.5 * (G * kept) @ A.double().T, atol=1e-5)


def test_the_seed_decides():
    one, other, third = (trained("Linear", torch.float32, seed=seed)[3] for seed in (0, 0, 1))
    assert one == other
    assert one != third


def test_what_cannot_carry_an_adapter():
    model, mask = network("Linear")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError, match=r"one is \(6, 8\), an adapter's rank must lie in 1..6, got 7"):
        start_lora(model, {"one": mask}, 7)
    with pytest.raises(UsageError, match="three, which is no module"):
        start_lora(model, {"three": mask}, 2)
    with pytest.raises(ModelError, match="is a ModuleDict"):
        start_lora(model, {"": mask}, 2)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
