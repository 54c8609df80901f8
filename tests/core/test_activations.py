"""Every activation's derivative against autograd, and its values at points known by heart."""

import pytest
import torch

from secateur.core.activations import ACTIVATIONS


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_derivative_equals_autograd(name):
    activation = ACTIVATIONS[name]
    z = torch.linspace(-8, 8, 1601, dtype=torch.float64).reshape(1, -1).requires_grad_()
    (expected,) = torch.autograd.grad(activation.f(z).sum(), z)
    torch.testing.assert_close(activation.df(z.detach()), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_kept_and_extremes_stay_finite(name, dtype):
    activation = ACTIVATIONS[name]
    z = torch.tensor([-100.0, -1.0, 0.0, 1.0, 100.0], dtype=dtype)
    for values in (activation.f(z), activation.df(z)):
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
    ],
)
def test_value_at_one(name, at_one):
    assert ACTIVATIONS[name].f(torch.ones(1)).item() == pytest.approx(at_one, abs=1e-6)


def test_keys_are_names():
    assert all(name == activation.name for name, activation in ACTIVATIONS.items())
