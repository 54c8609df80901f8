"""SparseAdamW against an autograd straight-through reference and torch's AdamW; masks exact at every step; resume."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur.core.pattern import NM, Block, Unstructured, check_mask, keep_mask
from secateur.core.sparse_adamw import DENSE_UNTIL_FROZEN, UPDATES, Absolute, Relative, Schedule
from secateur.training import SparseAdamW

PATTERNS = [NM(2, 4), NM(1, 4), NM(8, 16), Unstructured(0.7), Unstructured(0.6, "row"), Block(0.5, 4, 2)]
SPARSE = [method for method in UPDATES if method != "none"]


def network(dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8)).to(dtype)


def groups(model, pattern):
    return [
        {"params": [p for p in model.parameters() if p.ndim == 2], "pattern": pattern},
        {"params": [p for p in model.parameters() if p.ndim == 1]},
    ]


def data(steps, rows=32):
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(steps, rows, 16, generator=generator)
    return zip(X, X[..., :8].sin() + X[..., 8:], strict=True)


def train(model, optimizer, steps):
    losses = []
    dtype = next(model.parameters()).dtype
    for x, y in data(steps):
        loss = F.mse_loss(model(x.to(dtype)).float(), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("method", SPARSE)
def test_the_loss_falls_and_masks_are_exact_after_every_step(method, pattern):
    model = network()
    optimizer = SparseAdamW(groups(model, pattern), method=method, lr=1e-2, schedule=Schedule(60, refresh=5))
    batches, losses = list(data(60)), []
    for x, y in batches:
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if method not in DENSE_UNTIL_FROZEN:
            assert not [p.shape for p in model.parameters() if p.ndim == 2 and check_mask(p != 0, pattern)]
    optimizer.project()
    assert not [p.shape for p in model.parameters() if p.ndim == 2 and check_mask(p != 0, pattern)]
    assert not any(torch.signbit(p[p == 0]).any() for p in model.parameters())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


class StraightThrough(torch.autograd.Function):
    """The reference: mask forward, identity backward."""

    @staticmethod
    def forward(ctx, W, mask):
        return W * mask

    @staticmethod
    def backward(ctx, grad):
        return grad, None


@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_it_is_the_straight_through_estimator(decay):
    """Dense weights, masked by an autograd function, the decay added to the gradient, torch's AdamW: srste."""
    ours = network()
    theirs = copy.deepcopy(ours)
    schedule = Schedule(30, refresh=4, anneal=0.0, freeze=1.0)
    optimizer = SparseAdamW(groups(ours, NM(2, 4)), method="srste", decay=Absolute(decay), lr=1e-2, schedule=schedule)
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    first, last = theirs[0], theirs[2]
    masks = {linear: keep_mask(linear.weight.abs(), NM(2, 4)) for linear in (first, last)}

    def masked(linear, x):
        return F.linear(x, StraightThrough.apply(linear.weight, masks[linear]), linear.bias)

    expected = []
    for number, (x, y) in enumerate(data(30), 1):
        loss = F.mse_loss(masked(last, F.gelu(masked(first, x))), y)
        loss.backward()
        for linear, mask in masks.items():
            linear.weight.grad += decay * torch.where(mask, 0.0, linear.weight.detach())
        reference.step()
        reference.zero_grad()
        if number % 4 == 0 or number == 30:
            masks = {linear: keep_mask(linear.weight.detach().abs(), NM(2, 4)) for linear in masks}
        expected.append(loss.item())
    assert train(ours, optimizer, 30) == pytest.approx(expected, rel=1e-4)
    for a, b in ((ours[0], first), (ours[2], last)):
        assert torch.equal(a.weight != 0, masks[b])
        assert torch.allclose(a.weight, b.weight * masks[b], atol=1e-5)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_without_patterns_it_is_adamw(weight_decay):
    ours, theirs = network(), network()
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": weight_decay}
    optimizer = SparseAdamW(ours.parameters(), schedule=Schedule(20), **options)
    reference = torch.optim.AdamW(theirs.parameters(), **options)
    assert train(ours, optimizer, 20) == pytest.approx(train(theirs, reference, 20), rel=1e-5)
    pruned = network()
    optimizer = SparseAdamW(groups(pruned, NM(2, 4)), method="none", schedule=Schedule(20), **options)
    train(pruned, optimizer, 20)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(pruned.parameters(), ours.parameters(), strict=True))


def test_the_model_is_sparse_before_the_first_step():
    model = network()
    dense = model[0].weight.detach().clone()
    SparseAdamW(groups(model, NM(2, 4)), schedule=Schedule(10))
    assert torch.equal(model[0].weight, dense * keep_mask(dense.abs(), NM(2, 4)))


def test_pruned_weights_come_back():
    """What a fixed mask cannot do: the target needs the very inputs whose weights were pruned at the start."""
    results = {}
    for method in ("ast", "fixed"):
        model = nn.Linear(16, 1, bias=False)
        with torch.no_grad():
            model.weight.copy_(torch.where(torch.arange(16) % 4 < 2, 1.0, 0.1))
        schedule = Schedule(400, refresh=10)
        optimizer = SparseAdamW(
            [{"params": model.parameters(), "pattern": NM(2, 4)}], method=method, lr=2e-2, schedule=schedule
        )
        wanted = torch.where(torch.arange(16) % 4 < 2, 0.0, 1.0)
        for x in torch.randn(400, 32, 16, generator=torch.Generator().manual_seed(2)):
            F.mse_loss(model(x)[:, 0], x @ wanted).backward()
            optimizer.step()
            optimizer.zero_grad()
        results[method] = (model.weight[0] != 0).tolist() == wanted.bool().tolist()
        assert optimizer.flip_rate() == 0, "settled"
    assert results == {"ast": True, "fixed": False}


def test_cast_computes_dense_until_the_mask_is_frozen():
    model = network()
    optimizer = SparseAdamW(groups(model, NM(2, 4)), method="cast", lr=1e-2, schedule=Schedule(20, freeze=0.5))
    train(model, optimizer, 9)
    assert int((model[0].weight == 0).sum()) == 0
    train(model, optimizer, 1)
    assert check_mask(model[0].weight != 0, NM(2, 4)) is None
    mask = model[0].weight != 0
    train(model, optimizer, 10)
    assert torch.equal(model[0].weight != 0, mask)


def test_sparsity_rises_along_its_schedule():
    model = network()
    schedule = Schedule(40, refresh=5, sparsify=0.5)
    optimizer = SparseAdamW(groups(model, Unstructured(0.8)), lr=1e-3, schedule=schedule)
    seen = []
    for _ in range(8):
        seen.append(float((model[0].weight == 0).float().mean()))
        train(model, optimizer, 5)
    assert seen[0] == 0
    assert seen[1] == pytest.approx(0.8 * (1 - 0.75**3), abs=0.01)
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(0.8, abs=0.001)


def test_an_unfinished_rise_is_found_at_the_end():
    model = network()
    optimizer = SparseAdamW(groups(model, Unstructured(0.8)), schedule=Schedule(40, sparsify=0.5))
    with pytest.raises(RuntimeError, match="102 were promised"):
        optimizer.project()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", UPDATES)
def test_a_saved_and_loaded_run_goes_on_bit_for_bit(method, dtype):
    def build():
        model = network(dtype)
        return model, SparseAdamW(groups(model, NM(2, 4)), method=method, lr=1e-2, schedule=Schedule(30, refresh=4))

    straight, optimizer = build()
    train(straight, optimizer, 13)
    file = io.BytesIO()
    torch.save({"model": straight.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(straight, optimizer, 17)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed, other = build()
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    state = other.state[resumed[0].weight]
    assert state["master"].dtype == state["exp_avg"].dtype == torch.float32
    assert method == "none" or state["mask"].dtype == torch.bool
    train(resumed, other, 17)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))


def test_small_steps_are_not_lost_in_sixteen_bits():
    """The master is float32: 50 steps of 1e-4 move a bfloat16 weight of 1 that single ones would not."""
    weight = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    optimizer = SparseAdamW([weight], lr=1e-4, schedule=Schedule(100))
    for _ in range(50):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert weight[0, 0].item() == pytest.approx(0.995, abs=0.004)
    assert weight[0, 0].item() < 1


def test_accumulated_halves_are_a_whole():
    whole, halves = network(), network()
    schedule = Schedule(20, refresh=3)
    one = SparseAdamW(groups(whole, NM(2, 4)), lr=1e-2, schedule=schedule)
    two = SparseAdamW(groups(halves, NM(2, 4)), lr=1e-2, schedule=schedule)
    train(whole, one, 20)
    for x, y in data(20):
        for part in (slice(0, 16), slice(16, 32)):
            (F.mse_loss(halves(x[part]), y[part]) / 2).backward()
        two.step()
        two.zero_grad()
    assert torch.equal(whole[0].weight != 0, halves[0].weight != 0)
    assert torch.allclose(whole[0].weight, halves[0].weight, atol=1e-4)


def test_transposed_matrices_and_stacks():
    """Conv1D stores (in, out); experts lie in one tensor, each with the pattern for itself."""
    generator = torch.Generator().manual_seed(0)
    conv, experts = (nn.Parameter(torch.randn(*shape, generator=generator)) for shape in ((8, 6), (3, 4, 10)))
    SparseAdamW(
        [
            {"params": [conv], "pattern": NM(2, 4), "transposed": True},
            {"params": [experts], "pattern": Unstructured(0.5)},
        ],
        schedule=Schedule(10),
    ).project()
    assert check_mask((conv != 0).T, NM(2, 4)) is None
    assert [int((expert != 0).sum()) for expert in experts] == [20, 20, 20]


def test_the_fisher_metric_keeps_what_the_loss_is_steep_in():
    weight = nn.Parameter(torch.tensor([[1.0, 0.9, 0.8, 0.7]]))
    optimizer = SparseAdamW(
        [{"params": [weight], "pattern": NM(2, 4)}], metric="fisher", lr=0.0, schedule=Schedule(10, refresh=1)
    )
    weight.grad = torch.tensor([[0.1, 0.1, 5.0, 5.0]])
    optimizer.step()
    assert (weight != 0).tolist() == [[False, False, True, True]]
    assert optimizer.flip_rate() == 1


@pytest.mark.parametrize("method", ["ast", "ast_g", "srste", "cast", "admm"])
def test_the_fisher_metric_sees_gradients_and_not_the_decay(method):
    """Gradients of one size, either sign: the mask is that of the magnitudes, however hard the others are pulled."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(16, 32, generator=generator))
    options = {"method": method, "metric": "fisher", "decay": Absolute(5.0), "lr": 1e-5}
    optimizer = SparseAdamW([{"params": [weight], "pattern": NM(2, 4)}], schedule=Schedule(20, refresh=5), **options)
    for _ in range(16):
        weight.grad = torch.randn(16, 32, generator=generator).sign()
        optimizer.step()
    state = optimizer.state[weight]
    judged = state["split"] if method == "admm" else state["master"]
    assert torch.equal(state["mask"], keep_mask(judged.abs(), NM(2, 4)))


@pytest.mark.parametrize("method", ["ast", "srste"])
def test_a_relative_decay_does_not_feed_on_itself(method):
    """Noise for gradients, 90 %, the run's own rates: lambda stays where the first refresh finds it."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(0.02 * torch.randn(64, 128, generator=generator))
    schedule = Schedule(400, refresh=10)
    optimizer = SparseAdamW(
        [{"params": [weight], "pattern": Unstructured(0.9)}],
        method=method,
        lr=2e-5,
        decay=Relative(10.0),
        schedule=schedule,
    )
    found = []
    for _ in range(400):
        weight.grad = 1e-3 * torch.randn(64, 128, generator=generator)
        optimizer.step()
        found.append(float(optimizer.state[weight]["decay"]))
    assert found[-1] == pytest.approx(found[50], rel=0.5)


def test_the_decay_follows_gradients_and_weights():
    model = network()
    optimizer = SparseAdamW(groups(model, NM(2, 4)), decay=Relative(2.0), lr=0.0, schedule=Schedule(10, refresh=1))
    train(model, optimizer, 1)
    state = optimizer.state[model[0].weight]
    expected = 2 * state["exp_avg"].norm() / state["master"].norm()
    assert float(state["decay"]) == pytest.approx(float(expected))


def test_cast_draws_all_weights_alike_and_without_a_ramp():
    """With c average gradients, whatever the size of the weights."""
    weights = []
    for anneal in (0.0, 1.0):
        model = network()
        schedule = Schedule(10, refresh=1, anneal=anneal)
        optimizer = SparseAdamW(groups(model, NM(2, 4)), method="cast", decay=Relative(2.0), schedule=schedule)
        train(model, optimizer, 5)
        state = optimizer.state[model[0].weight]
        assert float(state["decay"]) == pytest.approx(2 * float(state["exp_avg"].square().mean().sqrt()))
        weights.append(state["master"])
    assert torch.equal(*weights)


def test_a_step_without_gradients_goes_on_in_the_schedule():
    """The last refresh, at which the sparsity arrives, falls on it."""
    model = network()
    schedule = Schedule(10, refresh=3, sparsify=1.0, freeze=1.0)
    optimizer = SparseAdamW(groups(model, Unstructured(0.6)), lr=1e-2, schedule=schedule)
    train(model, optimizer, 9)
    optimizer.step()
    optimizer.project()
    assert float((model[0].weight == 0).float().mean()) == pytest.approx(0.6, abs=1e-3)


def test_one_threshold_over_all_matrices():
    """Against a sort of all scores, at every refresh, with the sparsity on its rise."""
    model = network()
    model[2].weight.data *= 2
    schedule = Schedule(20, refresh=5, sparsify=0.5)
    optimizer = SparseAdamW(groups(model, Unstructured(0.7)), scope="global", lr=1e-2, schedule=schedule)
    reached, sparse = [], [p for p in model.parameters() if p.ndim == 2]
    for _ in range(4):
        train(model, optimizer, 5)
        scores = torch.cat([optimizer.state[p]["master"].abs().flatten() for p in sparse])
        kept = torch.cat([(p != 0).flatten() for p in sparse])
        reached.append(int((~kept).sum()))
        if len(reached) < 4:  # the last mask was chosen at 16, and then stayed
            assert scores[kept].min() >= scores[~kept].max()
    assert reached == [round(768 * 0.7 * (1 - 0.5**3)), 538, 538, 538]
    optimizer.project()
    shares = [float((p == 0).float().mean()) for p in sparse]
    assert abs(shares[0] - shares[1]) > 0.05, "matrices differ"
    assert {p: pattern.sparsity for p, pattern in optimizer.promised().items()} == pytest.approx(
        dict(zip(sparse, shares, strict=True))
    )


def test_ties_over_all_matrices_have_an_order():
    first, last = (nn.Parameter(torch.ones(4, 5)) for _ in range(2))
    options = {"scope": "global", "schedule": Schedule(10)}
    SparseAdamW([{"params": [first, last], "pattern": Unstructured(0.6)}], **options)
    assert int((first == 0).sum()) == 5
    assert int((last == 0).sum()) == 19, "no more than 95 % of one"
    assert last[0, 0] == 1


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"pattern": NM(2, 4)}, "scope global wants one unstructured pattern for all matrices, .*got .*2:4"),
        ({"pattern": Unstructured(0.5, "row")}, "got .*50% per row"),
        ({"params": [nn.Parameter(torch.ones(2, 4, 4))]}, r"got 50%, \(2, 4, 4\)"),
        ({"params": [nn.Parameter(torch.ones(10, 10))], "pattern": Unstructured(0.96)}, "got 50%, 96%|got 96%, 50%"),
    ],
)
def test_what_one_threshold_is_not_for(more, words):
    group = {"params": [nn.Parameter(torch.ones(4, 4))], "pattern": Unstructured(0.5)}
    other = {"params": [nn.Parameter(torch.ones(4, 4))], "pattern": Unstructured(0.5), **more}
    with pytest.raises(ValueError, match=words):
        SparseAdamW([group, other], scope="global", schedule=Schedule(10))
    optimizer = SparseAdamW([group], scope="global", schedule=Schedule(10))
    with pytest.raises(ValueError, match="later"):
        optimizer.add_param_group(other)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "asst"}, "method 'asst' is unknown; use one of ast, ast_g"),
        ({"metric": "wands"}, "metric 'wands' is unknown; use one of magnitude, fisher, taylor, wanda"),
        ({"lr": -1.0}, "wanted lr >= 0"),
        ({"betas": (0.9, 1.0)}, r"betas in \[0, 1\)"),
    ],
)
def test_options_that_make_no_sense(options, words):
    with pytest.raises(ValueError, match=words):
        SparseAdamW(network().parameters(), schedule=Schedule(10), **options)


def test_shapes_that_cannot_carry_the_pattern():
    with pytest.raises(ValueError, match="a pattern is for matrices"):
        SparseAdamW([{"params": network().parameters(), "pattern": NM(2, 4)}], schedule=Schedule(10))
    with pytest.raises(ValueError, match="divisible by 3"):
        SparseAdamW(groups(network(), NM(2, 3)), schedule=Schedule(10))
