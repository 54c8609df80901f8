"""SLoRB's start in a model: the branch holds the group means, trains, and goes with any mask and orientation."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from secateur.core.low_rank import group_mean
from secateur.core.pattern import NM, keep_mask
from secateur.core.sparse_adamw import Schedule
from secateur.errors import ModelError, UsageError
from secateur.models.branches import attached, detach
from secateur.models.linears import matrix
from secateur.training import SparseAdamW
from secateur.training.low_rank import follow_masks, start_slorb

IDS = torch.arange(32).view(2, 16)
NAMES = ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"]


def masks_of(model, names=NAMES):
    return {name: keep_mask(matrix(model.get_submodule(name)).abs(), NM(2, 4)) for name in names}


@torch.no_grad()
def test_the_start_is_the_group_mean_of_what_the_mask_takes(tiny_llama):
    masks = masks_of(tiny_llama)
    W = {name: matrix(tiny_llama.get_submodule(name)).clone() for name in NAMES}
    parameters = start_slorb(tiny_llama, masks, k=16)
    branches = attached(tiny_llama)
    assert [id(p) for p in parameters] == [id(factor) for name in NAMES for factor in branches[name]]
    assert all(parameter.requires_grad for parameter in parameters)
    for name in NAMES:
        assert torch.equal(branches[name].product, group_mean(W[name], masks[name], 16).product)
        groups = (W[name] * masks[name] + branches[name].product).view(len(W[name]), -1, 16).sum(2)
        assert torch.allclose(groups, W[name].view(len(W[name]), -1, 16).sum(2), atol=1e-5)


def test_x_can_stay_as_it_is(tiny_llama):
    parameters = start_slorb(tiny_llama, masks_of(tiny_llama), k=8, train_X=False)
    assert [tuple(p.shape) for p in parameters] == [(64, 4), (32, 4)]
    assert not any(branch.X.requires_grad for branch in attached(tiny_llama).values())
    tiny_llama(input_ids=IDS, labels=IDS).loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in parameters)
    assert all(branch.X.grad is None for branch in attached(tiny_llama).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_branch_that_follows_its_mask_keeps_group_sums(tiny_llama, dtype):
    """Of two groups that trade places, through master and mask, in the optimizer's own refresh."""
    linear = tiny_llama.to(dtype).get_submodule(NAMES[0])
    optimizer = SparseAdamW(
        [{"params": [linear.weight], "pattern": NM(2, 4)}], lr=0.0, schedule=Schedule(10, refresh=2, freeze=1.0)
    )
    state = optimizer.state[linear.weight]
    new = start_slorb(tiny_llama, {NAMES[0]: state["mask"]}, k=8, masters={NAMES[0]: state["master"]})
    optimizer.add_param_group({"params": new, "pattern": None})
    follow_masks(optimizer, tiny_llama)

    def sums():
        weight, branch = matrix(linear).float(), attached(tiny_llama)[NAMES[0]].product.float()
        return (weight + branch).view(len(weight), -1, 8).sum(2)

    state["master"][0, :4] = torch.tensor([0.5, 0.0, 0.25, 0.0])
    optimizer.step()
    optimizer.rewrite()
    before, mask = sums(), state["mask"].clone()
    state["master"][:, :32:4] *= 1e-3  # small now: pruned at the next refresh
    optimizer.rewrite()
    moved, kept = sums(), matrix(linear).clone()
    optimizer.step()
    assert not torch.equal(mask, state["mask"])
    assert not torch.equal(kept, matrix(linear))
    assert torch.allclose(sums(), moved, atol=1e-5 if dtype == torch.float32 else 2e-2)
    assert not torch.allclose(before, moved, atol=2e-2)


def test_a_conv1d_is_out_by_in_too():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=32))
    name = "transformer.h.0.mlp.c_fc"
    masks = masks_of(model, [name])
    assert masks[name].shape == (128, 32)
    S, X = start_slorb(model, masks, k=4)
    assert (S.shape, X.shape) == ((128, 8), (8, 32))


def test_beside_the_optimizer_that_prunes(tiny_llama):
    """Masks and masters out of its state; the branch lowers the loss that pruning has raised, and trains on."""
    matrices = {name: tiny_llama.get_submodule(name).weight for name in NAMES}
    for weight in matrices.values():
        weight.requires_grad_(True)
    optimizer = SparseAdamW(
        [{"params": list(matrices.values()), "pattern": NM(2, 4)}], method="ast", lr=1e-3, schedule=Schedule(steps=20)
    )
    states = {name: optimizer.state[weight] for name, weight in matrices.items()}
    masks, masters = ({name: state[key] for name, state in states.items()} for key in ("mask", "master"))
    new = start_slorb(tiny_llama, masks, k=16, masters=masters)
    optimizer.add_param_group({"params": new, "pattern": None})
    losses = []
    for _ in range(20):
        loss = tiny_llama(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    optimizer.project()
    assert detach(tiny_llama).keys() == set(NAMES)
    assert all(int((w.view(-1, 4) == 0).sum(1).min()) == 2 for w in matrices.values())


def test_what_cannot_be(tiny_llama):
    masks = masks_of(tiny_llama)
    with pytest.raises(UsageError, match="up_proj: groups of k inputs need k to divide in_features, got k = 5 and 32"):
        start_slorb(tiny_llama, masks, k=5)
    with pytest.raises(UsageError, match=r"dense weights of \(64, 32\) .* are wanted with its mask, got none"):
        start_slorb(tiny_llama, masks, k=8, masters={})
    with pytest.raises(UsageError, match=r"are wanted with its mask, got \(64, 32\)"):
        start_slorb(tiny_llama, {NAMES[0]: masks[NAMES[0]].T}, k=8)
    with pytest.raises(ModelError, match=r"beside an nn\.Linear"):
        start_slorb(tiny_llama, {"model.embed_tokens": masks[NAMES[0]]}, k=8)
    assert not attached(tiny_llama)
