"""A state by names goes through a file into another model, bit for bit; that of another training is refused."""

import json
import re

import pytest
import torch
from safetensors.torch import load, save
from torch import nn
from torch.nn import functional as F

from secateur.core.pattern import NM, Unstructured
from secateur.core.sparse_adamw import UPDATES, Schedule
from secateur.training import SparseAdamW, deal_state, gather_state

PATTERN = NM(2, 4)


def build(seed=0, dtype=torch.float32, pattern=PATTERN, method="ast", width=32, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(16, width), nn.GELU(), nn.Linear(width, 8)).to(dtype)
    groups = [
        {"params": [model[0].weight, model[2].weight], "pattern": pattern},
        {"params": [model[0].bias, model[2].bias]},
    ]
    return model, SparseAdamW(groups, method=method, lr=1e-2, schedule=Schedule(30, refresh=4), **options)


def train(model, optimizer, first, last):
    generator = torch.Generator().manual_seed(1)
    for x in torch.randn(30, 32, 16, generator=generator)[first:last]:
        F.mse_loss(model(x.to(model[0].weight.dtype)).float(), x[:, :8].sin()).backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] *= 0.99


def through_a_file(tensors, numbers):
    return load(save(tensors)), json.loads(json.dumps(numbers))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", UPDATES)
def test_a_run_goes_on_in_another_model(method, dtype):
    straight, optimizer = build(dtype=dtype, method=method)
    train(straight, optimizer, 0, 13)
    tensors, numbers = through_a_file(*gather_state(optimizer, straight.named_parameters()))
    assert {str(tensor.dtype) for name, tensor in tensors.items() if not name.endswith("mask")} == {"torch.float32"}
    assert ("0.weight.mask" in tensors) == (method != "none")
    resumed, other = build(seed=1, dtype=dtype, method=method, begin=False)
    deal_state(other, resumed.named_parameters(), tensors, numbers)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))
    assert other.flip_rate() == optimizer.flip_rate()
    train(straight, optimizer, 13, 30)
    train(resumed, other, 13, 30)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))


def test_a_gathered_state_is_a_copy():
    model, optimizer = build()
    tensors, _ = gather_state(optimizer, model.named_parameters())
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    train(model, optimizer, 0, 4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors.items())


def test_wrappers_leave_no_trace_in_names():
    model, optimizer = build()
    wrapped = [
        (f"module._orig_mod.{name}".replace("0.", "0._checkpoint_wrapped_module."), parameter)
        for name, parameter in model.named_parameters()
    ]
    assert gather_state(optimizer, wrapped)[0].keys() == gather_state(optimizer, model.named_parameters())[0].keys()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "srste"}, "method was ast and is srste"),
        ({"pattern": NM(1, 4)}, "0.weight was {'group': 0, 'pattern': {'kind': 'n:m', 'n': 2, 'm': 4}, 'transposed'"),
        ({"pattern": Unstructured(0.5)}, "and is {'group': 0, 'pattern': {'kind': 'unstructured', 'sparsity': 0.5,"),
        ({"width": 16}, "0.weight.master was (32, 16) and is (16, 16)"),
    ],
)
def test_the_state_of_another_training(options, words):
    model, optimizer = build()
    saved = through_a_file(*gather_state(optimizer, model.named_parameters()))
    model, optimizer = build(**options)
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match="this state is of another training: .*" + re.escape(words)):
        deal_state(optimizer, model.named_parameters(), *saved)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_tensor_that_is_missing_and_one_without_a_name():
    model, optimizer = build()
    tensors, numbers = gather_state(optimizer, model.named_parameters())
    del tensors["2.weight.mask"]
    with pytest.raises(ValueError, match=r"2.weight.mask was absent and is \(8, 32\)"):
        deal_state(optimizer, model.named_parameters(), tensors, numbers)
    with pytest.raises(ValueError, match=r"2 parameters have no name, the first of shape \(8, 32\)"):
        gather_state(optimizer, model[0].named_parameters())
