"""One step of every method by hand, the schedule's end points, and the bug that the published code has."""

import math

import pytest
import torch

from secateur.core.sparse_adamw import (
    UPDATES,
    Absolute,
    Relative,
    Schedule,
    Step,
    Weights,
    by_fisher,
    by_taylor,
    by_wanda,
    dual_,
    flipped,
    masked,
    pruned_part,
)

KEEP = torch.tensor([[True, True, False, False], [False, True, False, True]])
DECAYING = ["ast", "ast_g", "srste", "cast"]


def fresh(seed=0):
    W = torch.randn(2, 4, generator=torch.Generator().manual_seed(seed))
    return Weights(W, torch.zeros(2, 4), torch.zeros(2, 4), KEEP)


@pytest.mark.parametrize("method", DECAYING)
def test_without_a_gradient_pruned_weights_shrink_and_kept_ones_stay(method):
    """The released GPT-2 optimizer lets both grow: bitwise not of an integer mask is not its complement."""
    held = fresh()
    before = held.W.clone()
    for number in range(1, 301):
        UPDATES[method](held, torch.zeros(2, 4), Step(number, lr=1e-2, decay=1e-2, progress=number / 300))
    assert torch.equal(held.W[KEEP], before[KEEP])
    assert (held.W[~KEEP].abs() < 0.2 * before[~KEEP].abs()).all()


@pytest.mark.parametrize("method", ["fixed", "none"])
def test_without_decay_nothing_moves_by_itself(method):
    held = fresh()
    before = held.W.clone()
    UPDATES[method](held, torch.zeros(2, 4), Step(1, lr=1e-2, decay=1e-2))
    assert torch.equal(held.W, before)


def by_hand(
    method, W, g, number, m, v, kept, lr=0.1, b1=0.9, b2=0.95, lam=0.5, alpha=0.25, wd=0.2, split=0.4, eps=1e-8
):
    """One weight, equations as in the papers."""
    W *= 1 - lr * wd
    decay = 0.0 if kept else lam * W
    if method == "srste":
        g = g + decay
    if method == "fixed" and not kept:
        g = 0.0
    m = b1 * m + (1 - b1) * g
    u = m + decay if method in ("ast", "ast_g") else m
    if method == "cast" and not kept:
        u = (1 - alpha) * m + alpha * lam * math.copysign(1, W)
    if method == "admm":
        pull, v = lam * (W - (split if kept else -split)), b2 * v + (1 - b2) * g**2
        root = math.sqrt(v / (1 - b2**number) + pull**2) + eps
        return W - lr * (m / (1 - b1**number) + pull) / root, m, v
    seen = u if method in ("ast", "cast") else math.hypot(g, decay) if method == "ast_g" else g
    v = b2 * v + (1 - b2) * seen**2
    root = math.sqrt(v) / math.sqrt(1 - b2**number) + eps
    return W - lr / (1 - b1**number) * u / root, m, v


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("method", UPDATES)
def test_two_steps_by_hand(method, kept):
    wd = 0.0 if method == "srste" else 0.2  # there the pull is taken before AdamW's own decay
    held = Weights(*(torch.tensor([[x]], dtype=torch.float64) for x in (0.7, 0.0, 0.0)), torch.tensor([[kept]]))
    held = held._replace(split=torch.tensor([[0.4]], dtype=torch.float64), penalty=0.5)
    W, m, v = 0.7, 0.0, 0.0
    for number, g in ((1, 0.3), (2, -0.2)):
        step = Step(number, lr=0.1, weight_decay=wd, decay=0.5, progress=0.25)
        UPDATES[method](held, torch.tensor([[g]], dtype=torch.float64), step)
        W, m, v = by_hand(method, W, g, number, m, v, kept, wd=wd)
    assert held.W.item() == pytest.approx(W, rel=1e-12)
    assert held.m.item() == pytest.approx(m, rel=1e-12)
    assert held.v.item() == pytest.approx(v, rel=1e-12)


def test_a_dual_step_by_hand():
    """W + U - Z, with U scaled so that lambda U is what it was."""
    held = Weights(torch.tensor([[1.0, -3.0, 0.5, 2.0]]), *torch.zeros(2, 1, 4), torch.tensor([[True, False] * 2]))
    held = held._replace(split=torch.tensor([[9.0, 0.25, 9.0, -0.5]]), penalty=0.2)
    dual_(held, 0.4)
    assert held.split.tolist() == [[1.0, -3.0 + 0.25 / 2, 0.5, 2.0 - 0.5 / 2]]
    unscaled = held._replace(split=torch.ones(1, 4), penalty=0.0)
    dual_(unscaled, 0.0)
    assert unscaled.split.tolist() == [[1.0, -2.0, 0.5, 3.0]]


def test_admm_ends_where_the_sparse_minimum_is():
    """f = (W - a)² / 2, the two largest of each row kept: W comes to a there and to 0 elsewhere, and stays dense."""
    a = torch.tensor([[3.0, -2.0, 0.5, 0.25], [0.1, 1.0, -0.2, -1.5]])
    held = Weights(a.clone(), torch.zeros(2, 4), torch.zeros(2, 4), a.abs() >= 1, split=a.clone(), penalty=0.3)
    for number in range(1, 2001):
        UPDATES["admm"](held, held.W - a, Step(number, lr=2e-3))
        if number % 20 == 0:
            dual_(held, 0.3)
    assert (held.W - torch.where(held.keep, a, 0.0)).abs().max() < 0.02
    assert torch.allclose(held.split[~held.keep], (a / 0.3)[~held.keep], atol=0.15), "lambda U = -gradient"


def test_the_published_second_moment_makes_steps_larger():
    """v from u² against v from g², under noise: sqrt((1 + beta1) / (1 - beta1)) = 4.36 for kept weights."""
    noise = torch.randn(400, 1, 500, generator=torch.Generator().manual_seed(0))
    keep = torch.ones(1, 500, dtype=torch.bool)
    travelled = {}
    for method in ("ast", "ast_g"):
        held = Weights(*(torch.zeros(1, 500) for _ in range(3)), keep)
        steps = []
        for number, g in enumerate(noise, 1):
            before = held.W.clone()
            UPDATES[method](held, g, Step(number, lr=1e-3))
            steps.append(float((held.W - before).norm()))
        travelled[method] = sum(steps[200:])
    assert travelled["ast"] / travelled["ast_g"] == pytest.approx(math.sqrt(19), rel=0.1)


def test_what_is_written_has_clean_zeros():
    held = Weights(-torch.ones(2, 4), torch.zeros(2, 4), torch.zeros(2, 4), KEEP)
    written = masked(held)
    assert torch.equal(written, torch.where(KEEP, -1.0, 0.0))
    assert not torch.signbit(written[~KEEP]).any()
    assert torch.equal(pruned_part(held), torch.where(KEEP, 0.0, -1.0))


def test_an_update_that_needs_a_mask_says_so():
    held = Weights(*(torch.zeros(1, 2) for _ in range(3)))
    with pytest.raises(ValueError, match="needs a mask; use adamw_"):
        UPDATES["ast"](held, torch.zeros(1, 2), Step(1, lr=0.1))
    with pytest.raises(ValueError, match="give Weights a split"):
        UPDATES["admm"](held, torch.zeros(1, 2), Step(1, lr=0.1))


def test_the_schedule_ends_where_it_should():
    schedule = Schedule(steps=100, refresh=10, anneal=0.25, sparsify=0.5, freeze=0.75)
    assert [schedule.annealed(t) for t in (1, 25, 26, 100)] == [0.04, 1, 1, 1]
    assert [t for t in range(1, 101) if schedule.refreshes(t)] == [10, 20, 30, 40, 50, 60, 70, 75]
    assert [schedule.frozen(t) for t in (75, 76, 100)] == [False, True, True]
    assert [schedule.sparsity_reached(t) for t in (0, 25, 50, 75)] == [0, 0.5, 1, 1]
    assert schedule.progress(100) == 1
    waved = Schedule(steps=100, anneal=0.5, ramp="cosine")
    assert [waved.annealed(t) for t in (0, 25, 50, 99)] == pytest.approx([0, 0.5, 1, 1])
    at_once = Schedule(steps=7, anneal=0.0, freeze=1.0)
    assert (at_once.annealed(1), at_once.sparsity_reached(0)) == (1, 1)
    odd = Schedule(steps=10, sparsify=0.75, freeze=0.75)
    assert odd.refreshes(7)
    assert odd.sparsity_reached(7) == 1, "arrived when the mask is frozen"


def test_a_share_of_the_steps_is_not_a_step_short():
    assert 0.7 * 90 < 63
    assert [Schedule(90, freeze=0.7).frozen(number) for number in (63, 64)] == [False, True]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "at least 1"),
        ({"steps": 5, "refresh": 0}, "at least 1"),
        ({"steps": 5, "anneal": 1.5}, r"anneal is a share of all steps, in \[0, 1\]"),
        ({"steps": 5, "ramp": "square"}, "ramp 'square' is unknown; use one of linear, cosine"),
        ({"steps": 5, "sparsify": 0.9, "freeze": 0.5}, "must end before the mask is frozen"),
    ],
)
def test_schedules_that_make_no_sense(options, words):
    with pytest.raises(ValueError, match=words):
        Schedule(**options)


def test_decay_without_a_scale():
    held = Weights(torch.full((2, 2), 4.0), torch.full((2, 2), 0.5), torch.zeros(2, 2), torch.ones(2, 2).bool())
    assert Relative(3.0).of(held, "ast") == pytest.approx(3 * 0.5 / 4)
    larger = held._replace(W=held.W * 10, m=held.m * 7)
    assert Relative(3.0).of(larger, "ast") * 10 / 7 == pytest.approx(Relative(3.0).of(held, "ast"))
    assert Relative(3.0).of(held._replace(W=torch.zeros(2, 2)), "ast") == 0
    assert Relative(3.0).of(larger, "cast") == pytest.approx(3 * 3.5)
    half = held._replace(m=torch.tensor([[0.5, 70.0], [0.5, 70.0]]), keep=torch.tensor([[True, False]] * 2))
    assert Relative(3.0).of(half, "srste") == pytest.approx(3 * 0.5 / 4)
    assert Absolute(1e-4).of(larger, "ast") == Absolute(1e-4).of(larger, "cast") == 1e-4


def test_metrics_and_flips():
    held = Weights(torch.tensor([[1.0, -2.0]]), torch.zeros(1, 2), torch.tensor([[9.0, 1.0]]))
    step = Step(1, lr=0.1)
    assert by_fisher(held, step).tolist() == [[9.0, 4.0]]
    assert by_fisher(held._replace(fisher=torch.tensor([[1.0, 2.0]])), step).tolist() == [[1.0, 8.0]]
    assert by_taylor(held._replace(m=torch.tensor([[-3.0, 0.5]])), step).tolist() == [[3.0, 1.0]]
    assert by_wanda(held, step).tolist() == [[1.0, 2.0]]
    assert by_wanda(held._replace(inputs=torch.tensor([16.0, 0.25])), step).tolist() == [[4.0, 1.0]]
    assert flipped(KEEP, ~KEEP) == KEEP.numel()
    assert flipped(KEEP, KEEP) == 0
