"""Grids: zero is on every one of them, codes stay in range, scales are no worse than those of the full range."""

import itertools

import pytest
import torch

from secateur.core.grid import BITS, Grid, Scheme, column_rounder, fit_grid, on_grid, to_codes

SCHEMES = [
    Scheme(bits, 0 if size == "channel" else size, symmetric, scales)
    for bits, sizes in BITS.items()
    for size, symmetric, scales in itertools.product(sizes, (True, False), (torch.float32, torch.bfloat16))
    if symmetric or bits < 8
]


def weights(R=6, C=128, seed=0):
    """Half of them zero, rows of very different size, one row and one group of zeros only, one row without a sign."""
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(R, C, generator=g) * torch.logspace(-4, 2, R)[:, None]
    W[torch.rand(R, C, generator=g) < 0.5] = 0.0
    W[1], W[2, :32], W[3] = 0.0, 0.0, W[3].abs()
    return W


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"{s.words()} {s.scales}".replace("torch.", ""))
def test_no_zero_is_lost_and_codes_say_it_all(scheme):
    W = weights()
    grid = fit_grid(W, scheme)
    rounded, codes = on_grid(W, grid, scheme), to_codes(W, grid, scheme)
    assert (rounded[W == 0] == 0).all()
    assert not torch.signbit(rounded[W == 0]).any()
    assert int(codes.min()) >= scheme.lowest
    assert int(codes.max()) <= scheme.highest
    assert torch.equal(grid.scale, grid.scale.to(scheme.scales).float()), "a scale is what will be stored"
    assert (grid.scale > 0).all()
    assert torch.equal(grid.zero_point, grid.zero_point.round())
    groups = grid.scale.shape[1]
    s, z = (values.repeat_interleave(128 // groups, dim=1) for values in grid)
    assert torch.equal(rounded, (codes.float() - z) * s)
    assert torch.equal(to_codes(rounded, grid, scheme), codes), "codes are found again from the values"


@pytest.mark.parametrize("scheme", [Scheme(8, scales=torch.bfloat16), Scheme(4, 32, False, torch.bfloat16)])
def test_codes_are_found_again_from_values_in_16_bit(scheme):
    """What writing relies on: a value rounded to bfloat16 is nearer to its own code than to any other."""
    W = torch.linspace(-1, 1, 4096).view(8, 512)
    grid = fit_grid(W, scheme)
    assert torch.equal(to_codes(on_grid(W, grid, scheme).bfloat16().float(), grid, scheme), to_codes(W, grid, scheme))


@pytest.mark.parametrize("largest", [5e-3, 2e-4])
def test_small_rows_are_as_fine_with_scales_in_float16(largest):
    """The smallest normal number of float16, 6e-5, would be a step of a fifth of such a row."""
    W = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    W *= largest / W.abs().amax(dim=1, keepdim=True)
    lost = {}
    for scales in (torch.float32, torch.float16):
        scheme = Scheme(8, scales=scales)
        lost[scales] = float((on_grid(W, fit_grid(W, scheme), scheme) - W).norm() / W.norm())
    assert lost[torch.float16] < 1.15 * lost[torch.float32]


@pytest.mark.parametrize("symmetric", [True, False])
def test_shrunken_ranges_lose_less_than_the_full_one(symmetric):
    W, scheme = weights(), Scheme(3, 32, symmetric)
    low, high = W.view(6, 4, 32).amin(2).clamp(max=0), W.view(6, 4, 32).amax(2).clamp(min=0)
    scale = torch.maximum(-low, high) / 3 if symmetric else (high - low) / 7
    scale = torch.where(scale > 0, scale, 1.0)
    full = Grid(scale, torch.zeros_like(scale) if symmetric else (-4 - low / scale).round().clamp(-4, 3))
    found = (on_grid(W, fit_grid(W, scheme), scheme) - W).square()
    assert found.sum() < (on_grid(W, full, scheme) - W).square().sum()
    assert (found.view(6, 4, 32).sum(2) <= (on_grid(W, full, scheme) - W).square().view(6, 4, 32).sum(2) + 1e-12).all()


def test_weights_of_the_inputs_decide_whose_error_counts():
    g = torch.Generator().manual_seed(0)
    W, scheme = torch.randn(4, 64, generator=g), Scheme(3, 64)
    W[:, 0] = 9.0
    loud = torch.ones(64)
    loud[0] = 1e4
    first = on_grid(W, fit_grid(W, scheme, loud), scheme)[:, 0]
    others = on_grid(W, fit_grid(W, scheme, 1 / loud), scheme)
    assert (first - 9).abs().max() < 0.5
    assert (others[:, 1:] - W[:, 1:]).square().sum() < (on_grid(W, fit_grid(W, scheme, loud), scheme) - W)[
        :, 1:
    ].square().sum()


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(3, 32, False), Scheme(8)], ids=Scheme.words)
def test_a_column_is_rounded_as_in_the_whole_matrix(scheme):
    W = weights()
    grid = fit_grid(W, scheme)
    rounded = column_rounder(grid, scheme, 0, 128)
    assert torch.equal(torch.stack([rounded(W[:, j], j) for j in range(128)], 1), on_grid(W, grid, scheme))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Scheme(5, 32), "5 bits are not in the table; known: 8, 4, 3"),
        (lambda: Scheme(4, 48), "4 bits with group size 48 are not in the table"),
        (lambda: Scheme(8, 128), "8 bits with group size 128 .* known for 8 bits: channel"),
        (lambda: Scheme(8, symmetric=False), "8 bits are symmetric always"),
        (lambda: fit_grid(torch.zeros(2, 48), Scheme(4, 32)), "group size 32 does not divide 48 inputs"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
