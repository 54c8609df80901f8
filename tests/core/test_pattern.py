"""Patterns: literal masks readable by eye, exact counts, ties to the left, contradictions refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.core.pattern import (
    NM,
    Block,
    Stacked,
    Unstructured,
    check_mask,
    keep_mask,
    make_pattern,
    pattern_from_dict,
    pattern_to_dict,
    ramped,
    zeros_in,
)

K, o = True, False

SCORES = torch.tensor([[1.0, 9.0, 2.0, 8.0], [7.0, 3.0, 6.0, 4.0]])

LITERAL = [
    (Unstructured(0.5), [[o, K, o, K], [K, o, K, o]]),
    (Unstructured(0.75), [[o, K, o, K], [o, o, o, o]]),
    (Unstructured(0.75, "row"), [[o, K, o, o], [K, o, o, o]]),
    (NM(2, 4), [[o, K, o, K], [K, o, K, o]]),
    (NM(1, 4), [[o, K, o, o], [K, o, o, o]]),
    (NM(1, 2), [[o, K, o, K], [K, o, K, o]]),
    (Block(0.5, 1, 2), [[K, K, K, K], [o, o, o, o]]),
    (Block(0.5, 2, 2), [[K, K, o, o], [K, K, o, o]]),
    (Stacked(((1, Unstructured(0.75)), (1, NM(3, 4)))), [[o, K, o, o], [K, o, K, K]]),
]


@pytest.mark.parametrize(
    ("pattern", "expected"), LITERAL, ids=lambda value: str(value) if not isinstance(value, list) else ""
)
def test_literal_masks(pattern, expected):
    assert keep_mask(SCORES, pattern).tolist() == expected


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (Unstructured(0.5), [[K, K, K, K], [o, o, o, o]]),
        (Unstructured(0.5, "row"), [[K, K, o, o], [K, K, o, o]]),
        (NM(1, 2), [[K, o, K, o], [K, o, K, o]]),
        (Block(0.5, 1, 2), [[K, K, K, K], [o, o, o, o]]),
    ],
    ids=str,
)
def test_ties_go_to_the_left(pattern, expected):
    assert keep_mask(torch.ones(2, 4), pattern).tolist() == expected


PATTERNS = [Unstructured(0.0), Unstructured(0.37), Unstructured(0.9, "row"), NM(2, 4), NM(1, 4), Block(0.6, 4, 2)]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_exact_count_and_check(pattern):
    scores = torch.rand(8, 16, generator=torch.Generator().manual_seed(0)).round(decimals=1)  # many ties
    mask = keep_mask(scores, pattern)
    assert check_mask(mask, pattern) is None
    assert zeros_in((8, 16), pattern) == (~mask).sum()
    grain = 8 if isinstance(pattern, Block) else 1
    rows = 8 if pattern == Unstructured(0.9, "row") else 1
    zeros = (~mask).sum().item() / grain
    assert abs(zeros - pattern.sparsity * mask.numel() / grain) <= 0.5 * rows
    if pattern.sparsity:
        broken = torch.ones_like(mask)
        assert check_mask(broken, pattern) is not None


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_slices_add_up_to_the_whole_count(pattern):
    scores = torch.rand(8, 16, generator=torch.Generator().manual_seed(1))
    slices = [
        keep_mask(part, pattern, start) for start, part in zip((0, 4, 8, 12), scores.split(4, dim=1), strict=True)
    ]
    assert torch.cat(slices, dim=1).sum() == keep_mask(scores, pattern).sum()


@given(st.floats(0, 0.999), st.integers(1, 12), st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_unstructured_count_is_rounded_for_any_sparsity(sparsity, rows, cols):
    scores = torch.zeros(rows, cols)
    zeros = (~keep_mask(scores, Unstructured(sparsity))).sum().item()
    assert abs(zeros - sparsity * rows * cols) <= 0.5 + 1e-9


@pytest.mark.parametrize(
    ("structure", "sparsity", "words"),
    [
        ("2:4", None, "keep 2 of every 4"),
        ("1:4", 0.75, "keep 1 of every 4"),
        ("unstructured", 0.7, "70%"),
        ("row", 0.5, "every output row"),
        ("block:4x2", 0.5, "4x2 blocks"),
    ],
)
def test_make_pattern_says_itself_in_words(structure, sparsity, words):
    pattern = make_pattern(structure, sparsity)
    assert words in pattern.words()
    assert pattern_from_dict(pattern_to_dict(pattern)) == pattern


@pytest.mark.parametrize(
    ("structure", "sparsity", "message"),
    [
        ("2:4", 0.7, "contradicts sparsity 0.7"),
        ("4:2", None, "1 <= N < M"),
        ("0:4", None, "1 <= N < M"),
        ("unstructured", None, "needs a sparsity"),
        ("unstructured", 1.0, "below 1"),
        ("unstructured", -0.1, "at least 0"),
        ("unstructured", float("nan"), "below 1"),
        ("diagonal", 0.5, "unknown pattern"),
        ("block:0x4", 0.5, "at least one row"),
    ],
)
def test_contradictions_are_refused(structure, sparsity, message):
    with pytest.raises(ValueError, match=message):
        make_pattern(structure, sparsity)


@pytest.mark.parametrize(("pattern", "message"), [(NM(2, 4), "divisible by 4, got 6"), (Block(0.5, 2, 4), "divisible")])
def test_shapes_that_cannot_carry_the_pattern(pattern, message):
    with pytest.raises(ValueError, match=message):
        keep_mask(torch.rand(3, 6), pattern)


def test_nan_scores_are_refused():
    with pytest.raises(ValueError, match="1 of 4 scores are NaN"):
        keep_mask(torch.tensor([[1.0, float("nan")], [0.0, 2.0]]), Unstructured(0.5))


def test_unknown_pattern_dictionary():
    with pytest.raises(ValueError, match="unknown pattern kind"):
        pattern_from_dict({"kind": "spiral"})
    with pytest.raises(ValueError, match="does not take these fields"):
        pattern_from_dict({"kind": "n:m", "sparsity": 0.5})


def test_ramp_starts_dense_and_ends_on_target():
    assert ramped(Unstructured(0.8), 0.0).sparsity == 0
    assert ramped(Unstructured(0.8), 1.0).sparsity == pytest.approx(0.8)
    assert ramped(NM(2, 4), 0.1) == NM(2, 4)


@pytest.mark.parametrize("sparsity", [0.001, 0.3, 0.7, 0.95, 0.9999])
@pytest.mark.parametrize(
    "make", [torch.rand, torch.ones, torch.zeros, lambda *n, **g: torch.rand(*n, **g).round(decimals=2)]
)
def test_large_matrices_are_cut_at_the_exact_rank(make, sparsity):
    g = {} if make in (torch.ones, torch.zeros) else {"generator": torch.Generator().manual_seed(2)}
    scores = make(300, 400, **g)
    mask = keep_mask(scores, Unstructured(sparsity))
    assert (~mask).sum() == int(sparsity * 120_000 + 0.5)
    assert scores[mask].min() >= scores[~mask].max()
