"""Every activation's derivative against autograd, and its values at points known by heart."""

import pytest
import torch

from secateur.core.activations import ACTIVATIONS, activation, fit_xielu

SLOPES = (0.8, 1.3)
ROWS = {**ACTIVATIONS, "xielu": activation("xielu", SLOPES)}


@pytest.mark.parametrize("name", ROWS)
def test_derivative_equals_autograd(name):
    row = ROWS[name]
    z = torch.linspace(-8, 8, 1601, dtype=torch.float64).reshape(1, -1).requires_grad_()
    (expected,) = torch.autograd.grad(row.f(z).sum(), z)
    torch.testing.assert_close(row.df(z.detach()), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_kept_and_extremes_stay_finite(name, dtype):
    row = ROWS[name]
    z = torch.tensor([-100.0, -1.0, 0.0, 1.0, 100.0], dtype=dtype)
    for values in (row.f(z), row.df(z)):
        assert values.dtype == dtype
        assert values.isfinite().all()


@pytest.mark.parametrize(
    ("name", "at_one"),
    [
        ("relu", 1.0),
        ("silu", 0.731059),
        ("gelu", 0.841345),
        ("gelu_tanh", 0.841192),
        ("quick_gelu", 0.845796),
        ("relu2", 1.0),
        ("sigmoid", 0.731059),
        ("tanh", 0.761594),
        ("xielu", 1.3),
    ],
)
def test_value_at_one(name, at_one):
    assert ROWS[name].f(torch.ones(1)).item() == pytest.approx(at_one, abs=1e-6)


def test_keys_are_names():
    assert all(name == row.name for name, row in ROWS.items())
    assert all(activation(name) is row for name, row in ACTIVATIONS.items())


def test_the_numbers_of_xielu_are_found_from_what_it_does():
    z = torch.randn(4, 300, generator=torch.Generator().manual_seed(0))
    assert fit_xielu(z, ROWS["xielu"].f(z)) == pytest.approx(SLOPES, abs=1e-5)
