"""Warnings of a training: each is said when it is true, with its remedy, and not otherwise."""

import re

import pytest
import torch
from torch import nn

from secateur.core.pattern import NM
from secateur.core.sparse_adamw import Schedule
from secateur.training import SparseAdamW
from secateur.training.loop import StepRecord
from secateur.training.outcome import Outset, outset, spacing, warnings


def records(lr=1e-3, flips=0.0, steps=100):
    return [StepRecord(n, lr, 1.0, 1.0, 1.0, 1.0, flips, 0.1, False) for n in range(1, steps + 1)]


GOOD = {"method": "ast", "records": records(), "start": Outset(0.01, 0.02), "dtype": torch.bfloat16, "skipped": 0}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"records": records(flips=2e-3)}, "0.20% of the masks changed.*larger c"),
        ({"records": records(flips=2e-3), "method": "fixed"}, None),
        ({"records": records(lr=5e-5)}, "add up to 0.005, and pruned weights were 0.01 away.*larger lr"),
        ({"records": records(lr=5e-5), "method": "fixed"}, None),
        (
            {"records": records(lr=5e-10, steps=10**6), "method": "fixed"},
            "5e-10 are less than float32 resolves.*raise lr",
        ),
        ({"records": records(lr=2e-7), "method": "fixed"}, "2e-05, less than bfloat16 resolves.*dtype float32"),
        ({"records": records(lr=2e-7), "method": "fixed", "dtype": torch.float32}, None),
        ({"records": records(lr=2e-7), "method": "none", "start": Outset(0.0, 0.0)}, None),
        ({"skipped": 3}, "3 steps were left out.*lower lr"),
    ],
)
def test_what_is_warned_of(change, said):
    lines = warnings(**{**GOOD, **change})
    assert len(lines) == (said is not None)
    if said:
        assert re.search(said, lines[0])


def test_where_a_run_starts():
    weight = nn.Parameter(torch.tensor([[1.0, -2.0, 3.0, 5.0]]))
    groups = [{"params": [weight], "pattern": NM(2, 4)}, {"params": [nn.Parameter(torch.ones(3))]}]
    assert outset(SparseAdamW(groups, schedule=Schedule(10))) == Outset(1.5, 4.0)
    assert outset(SparseAdamW(groups[1:], schedule=Schedule(10))) == Outset(0.0, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_spacing_is_to_the_next_number(dtype):
    for size in (0.02, 1.0, 1.5, 2.0):
        x = torch.tensor(size, dtype=dtype)
        assert spacing(float(x), dtype) == float(torch.nextafter(x, torch.tensor(9.0, dtype=dtype)) - x)
