"""The threshold over all matrices against a sort of all scores; exact totals, ties, and none emptied."""

import math

import pytest
import torch

from secateur.core.allotment import MOST, allotted


def below(matrices):
    return lambda bits: torch.stack([(matrix.view(torch.int32) < bits).sum() for matrix in matrices])


def sizes(matrices):
    return torch.tensor([matrix.numel() for matrix in matrices])


def by_sorting(matrices, zeros):
    """Smallest first; of equal ones those of later matrices first. A full matrix is passed over."""
    left = [math.ceil(MOST * matrix.numel()) for matrix in matrices]
    counts = [0] * len(matrices)
    scores = [(score, -i) for i, matrix in enumerate(matrices) for score in matrix.flatten().tolist()]
    for _, i in sorted(scores):
        if sum(counts) < zeros and counts[-i] < left[-i]:
            counts[-i] += 1
    return counts


@pytest.mark.parametrize("levels", [None, 5, 1])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.8, 0.93])
def test_it_is_what_sorting_gives(share, levels):
    generator = torch.Generator().manual_seed(0)
    matrices = [scale * torch.rand(rows, 7, generator=generator) for scale, rows in ((1, 9), (3, 20), (0.5, 4))]
    if levels:  # many ties
        matrices = [(matrix * levels).round() for matrix in matrices]
    zeros = round(share * 33 * 7)
    found = allotted(below(matrices), sizes(matrices), zeros)
    assert found.tolist() == by_sorting(matrices, zeros)
    assert int(found.sum()) == zeros


def test_no_matrix_is_emptied_and_the_others_make_up_for_it():
    small, large = torch.full((10, 10), 1e-30), torch.linspace(1, 2, 100).view(10, 10)
    assert allotted(below([small, large]), sizes([small, large]), 150).tolist() == [95, 55]
    assert allotted(below([small, large]), sizes([small, large]), 190).tolist() == [95, 95]
    with pytest.raises(
        ValueError, match="191 zeros in 200 weights leave some matrix less than 5% of its own; at most 190"
    ):
        allotted(below([small, large]), sizes([small, large]), 191)


def test_zeros_and_infinities_have_their_place():
    one = torch.tensor([[0.0, 0.0, torch.inf, 1.0] * 5])
    assert allotted(below([one, one]), sizes([one, one]), 12).tolist() == [2, 10]
    assert allotted(below([one, one]), sizes([one, one]), 36).tolist() == [17, 19]
