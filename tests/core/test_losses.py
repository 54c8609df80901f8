"""Distillation losses: identical models, hand-made distributions, chunks against the whole, gradients, memory."""

import math
import weakref

import pytest
import torch
from torch.nn import functional as F

from secateur.core.losses import DIVERGENCES, IGNORED, Distillation, TopK, distill, forward_kl, shifted, tail_kl

T, D, V = 23, 8, 37


def problem(seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(T, D, generator=generator).requires_grad_()
    weight = torch.randn(V, D, generator=generator).requires_grad_()
    teacher = 2 * torch.randn(T, V, generator=generator)
    targets = torch.randint(V, (T,), generator=generator)
    targets[[4, T - 1]] = IGNORED
    return hidden, weight, teacher, targets


def losses(hidden, weight, teacher, targets, **options):
    return distill(hidden, lambda x: x @ weight.T, targets, lambda i, j: teacher[i:j], Distillation(**options))


def logs(*p):
    return torch.tensor([p]).log()


def test_divergences_by_hand():
    p, q = logs(0.5, 0.5), logs(0.9, 0.1)
    there = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    back = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert DIVERGENCES["forward"](q, p).item() == pytest.approx(there, rel=1e-5)
    assert DIVERGENCES["reverse"](q, p).item() == pytest.approx(back, rel=1e-5)
    middle = [0.5 * (math.log(0.5 / 0.7) + math.log(0.5 / 0.3)), 0.9 * math.log(0.9 / 0.7) + 0.1 * math.log(0.1 / 0.3)]
    assert DIVERGENCES["jensen-shannon"](q, p).item() == pytest.approx(sum(middle) / 2, rel=1e-5)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_model_is_no_distance_from_itself(divergence):
    hidden, weight, _, targets = problem()
    own = (hidden @ weight.T).detach()
    found = losses(hidden, weight, own, targets, alpha=1.0, divergence=divergence)
    assert found.total.item() == pytest.approx(0, abs=1e-6)
    found.total.backward()
    assert hidden.grad.abs().max() < 1e-6


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_chunks_are_the_whole_in_value_and_gradient(divergence, temperature, alpha):
    hidden, weight, teacher, targets = problem()
    options = {"alpha": alpha, "temperature": temperature, "divergence": divergence}
    logits, there = hidden @ weight.T, targets != IGNORED
    log_q, log_p = (F.log_softmax(x / temperature, dim=-1) for x in (logits, teacher))
    apart = DIVERGENCES[divergence](log_q, log_p)[there].mean()
    entropy = F.cross_entropy(logits, targets, ignore_index=IGNORED)
    expected = alpha * temperature**2 * apart + (1 - alpha) * entropy
    gradients = torch.autograd.grad(expected, (hidden, weight))
    for chunk in (1, 7, T, 1000):
        found = losses(hidden, weight, teacher, targets, chunk=chunk, **options)
        assert found.total.item() == pytest.approx(expected.item(), rel=1e-5)
        assert found.divergence.item() == pytest.approx(apart.item(), rel=1e-5)
        assert found.cross_entropy.item() == pytest.approx(entropy.item(), rel=1e-5)
        for ours, theirs in zip(torch.autograd.grad(found.total, (hidden, weight)), gradients, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-6)


def test_the_temperature_hardly_changes_the_size_of_the_gradient():
    """T² undoes what T takes away, to first order: the ratio goes to a constant as logits become small."""
    hidden, weight, teacher, targets = problem()
    sizes = []
    for temperature in (10.0, 20.0):
        total = losses(hidden, weight, teacher, targets, alpha=1.0, temperature=temperature).total
        sizes.append(torch.autograd.grad(total, hidden)[0].norm().item())
    assert sizes[1] == pytest.approx(sizes[0], rel=0.2)


def test_a_batch_without_targets_is_zero_and_not_nan():
    hidden, weight, teacher, targets = problem()
    found = losses(hidden, weight, teacher, torch.full_like(targets, IGNORED))
    assert found.total.item() == 0


def test_logits_of_a_chunk_are_gone_when_the_next_one_comes():
    """Neither head's output outlives its chunk, in forward or in backward."""
    hidden, weight, teacher, targets = problem()
    seen, most = [], []

    def noted(logits):
        seen.append(weakref.ref(logits))
        most.append(sum(one() is not None for one in seen))
        return logits

    options = Distillation(chunk=4)
    found = distill(hidden, lambda x: noted(x @ weight.T), targets, lambda i, j: noted(teacher[i:j].clone()), options)
    assert not any(one() is not None for one in seen), "between forward and backward none is left"
    found.total.backward()
    assert len(seen) == 2 * 2 * math.ceil(T / 4), "both heads, forward and backward"
    assert max(most) <= 4, "those of a chunk, and of the one before it that is just being dropped"


def test_all_tokens_kept_is_the_full_divergence():
    hidden, weight, teacher, _ = problem()
    logits = (hidden @ weight.T).detach()
    full = forward_kl(F.log_softmax(logits / 2, -1), F.log_softmax(teacher / 2, -1))
    assert torch.allclose(tail_kl(logits, TopK.of(teacher, V, 2.0), 2.0), full, atol=1e-4)


@pytest.mark.parametrize("k", [1, 4, 16])
def test_a_few_tokens_and_a_bucket_are_a_divergence(k):
    hidden, weight, teacher, _ = problem()
    logits = (hidden @ weight.T).detach()
    full = forward_kl(F.log_softmax(logits, -1), F.log_softmax(teacher, -1))
    some = tail_kl(logits, TopK.of(teacher, k, 1.0), 1.0)
    assert (some >= -1e-6).all()
    assert (some <= full + 1e-5).all(), "merging outcomes never adds to a divergence"
    assert torch.allclose(tail_kl(teacher, TopK.of(teacher, k, 1.0), 1.0), torch.zeros(T), atol=1e-6)


def test_mass_moved_to_tokens_that_were_not_kept_is_seen():
    teacher = torch.tensor([[5.0, 4.0, 0.0, 0.0]])
    cache = TopK.of(teacher, 2, 1.0)
    moved = torch.tensor([[5.0, 4.0, 6.0, 0.0]])
    assert tail_kl(moved, cache, 1.0).item() > tail_kl(teacher, cache, 1.0).item() + 0.5


def test_targets():
    ids = torch.tensor([[5, 6, 7, 0]])
    assert shifted(ids).tolist() == [[6, 7, 0, IGNORED]]


@pytest.mark.parametrize("wrong", [{"alpha": 1.1}, {"temperature": 0.0}, {"chunk": 0}, {"divergence": "kl"}])
def test_options_that_make_no_sense(wrong):
    with pytest.raises(ValueError, match=r"wanted alpha|'kl' is unknown; use one of forward, reverse"):
        Distillation(**wrong)
