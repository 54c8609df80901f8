"""Rates of this machine: there for every pattern, and what becomes of them."""

import pytest
import torch

from secateur.core.pattern import NM, Block, Unstructured
from secateur.planning.cost import Cost
from secateur.planning.rates import Probe, measure
from secateur.planning.shapes import BlockShape, Run, Shared


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4), Block(0.5, 3, 5)], ids=str)
def test_rates_are_measured_for_every_pattern(pattern, monkeypatch):
    monkeypatch.setattr("secateur.planning.rates.PATIENCE", 0.0)
    shape = BlockShape((Shared(30, 20, 30),), Shared(15, 15, 15), Shared(60, 20, 60), Shared(15, 40, 15))
    rates = measure(Probe(shape, Run(2, 16, 1, False), pattern, "cpu", "float32", torch.float32, head=5))
    assert all(rate > 0 for rate in rates.to_dict().values())
    assert rates.seconds(Cost(linear=rates.linear, swept=2 * rates.swept)) == pytest.approx(3)
