"""Two processes train as one does: the same masks to the bit, the same weights; what one saves the other takes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

from secateur.core.pattern import NM, Unstructured
from secateur.core.sparse_adamw import UPDATES, Schedule
from secateur.training import SparseAdamW, shards

DRIVER = Path(__file__).parent / "two.py"
ROUNDING = {"rtol": 1e-5, "atol": 2e-6}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """``kept(world, case)``: the state that a run left."""
    folder = tmp_path_factory.mktemp("worlds")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(DRIVER), str(folder)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]

    def state(world, case):
        path = folder / world / case
        numbers = json.loads(path.with_suffix(".json").read_text())
        return SimpleNamespace(tensors=load_file(path.with_suffix(".safetensors")), numbers=numbers)

    return state


def masks(state):
    return {name: tensor for name, tensor in state.tensors.items() if name.endswith(".mask")}


def assert_within_rounding(one, other):
    assert one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(mask, other.tensors[name]) for name, mask in masks(one).items())
    for name, tensor in one.tensors.items():
        torch.testing.assert_close(other.tensors[name], tensor, **ROUNDING)
    assert other.numbers["groups"] == one.numbers["groups"]
    assert other.numbers["flips"] == one.numbers["flips"]
    assert other.numbers["decay"] == pytest.approx(one.numbers["decay"], rel=1e-6)
    assert other.numbers["norms"] == pytest.approx(one.numbers["norms"], rel=1e-5)


def assert_same(one, other):
    assert one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())
    assert {**one.numbers, "norms": 0, "flip_rate": 0} == {**other.numbers, "norms": 0, "flip_rate": 0}


@pytest.mark.parametrize("world", ["ddp", "fsdp2"])
@pytest.mark.parametrize(
    "case",
    [
        *(f"{method} 2:4" for method in UPDATES),
        "ast unstructured",
        "ast row",
        "ast global",
        "cast scales",
        "admm unstructured",
    ],
)
def test_two_processes_train_as_one(kept, case, world):
    half, end = kept("one", f"{case} half"), kept("one", case)
    assert_within_rounding(half, kept(world, f"{case} half"))
    assert_within_rounding(end, kept(world, case))
    assert kept(world, f"{case} half").numbers["flip_rate"] == half.numbers["flip_rate"]
    moved = sum(int((mask != masks(end)[name]).sum()) for name, mask in masks(half).items())
    assert (moved > 50) == case.startswith(("ast", "srste", "cast", "admm")), "the masks that are compared have changed"


@pytest.mark.parametrize("world", ["ddp", "fsdp2", "fsdp2 1x2", "fsdp2 2x1"])
def test_uneven_shards_and_patterns_that_need_all_rows(kept, world):
    assert_within_rounding(kept("one", "odd"), kept(world, "odd"))
    assert_same(kept(world, "odd"), kept(world, "odd loaded"))


def test_accelerate_shards_after_the_constructor(kept):
    assert_within_rounding(kept("one", "ast 2:4"), kept("accelerate", "ast 2:4"))


@pytest.mark.parametrize("world", ["one", "ddp", "fsdp2"])
def test_accumulation_and_recomputed_activations_change_nothing(kept, world):
    assert_within_rounding(kept("one", "ast 2:4"), kept(world, "in halves"))


@pytest.mark.parametrize(
    ("source", "world"), [("one", "one"), ("one", "ddp"), ("one", "fsdp2"), ("ddp", "one"), ("fsdp2", "one")]
)
def test_a_checkpoint_is_for_any_number_of_processes(kept, world, source):
    assert_same(kept(source, "ast 2:4 half"), kept(world, f"{source} taken"))
    assert_within_rounding(kept(source, "ast 2:4"), kept(world, f"{source} resumed"))
    if world == source:
        assert_same(kept(source, "ast 2:4"), kept(world, f"{source} resumed"))


def test_torchs_own_checkpoint_sees_the_shards(kept):
    assert_same(kept("one", "ast 2:4 half"), kept("fsdp2", "torch taken"))


# ---------------------------------------------------------------------------------------------------- a group of one


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_parts_of_shared_tensors(mesh):
    full = torch.arange(12.0).view(4, 3)
    shared = distribute_tensor(full, mesh, [Shard(0)])
    assert torch.equal(shards.whole(shards.like(full > 3, shared)), full > 3)
    assert torch.equal(shards.part(full, shared), full)
    assert shards.norm(full, shared) == full.norm()
    shards.local(shared).zero_()
    assert shards.whole(shared).count_nonzero() == 0


def test_a_model_that_is_asked_lies_in_shards_before_and_after(mesh):
    blocks = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    x = torch.randn(3, 8)
    expected = blocks(x)
    shards.spread_blocks(blocks, torch.device("cpu"))
    with torch.no_grad():
        assert torch.equal(blocks(x), expected)
    assert all(isinstance(parameter, DTensor) for parameter in blocks.parameters())


@pytest.mark.parametrize("placed", [Shard(1), Partial()], ids=str)
def test_a_pattern_wants_whole_rows(mesh, placed):
    shared = nn.Parameter(DTensor.from_local(torch.zeros(4, 4), mesh, [placed]))
    with pytest.raises(ValueError, match=r"placed \(.*\); a pattern needs whole rows"):
        SparseAdamW([{"params": [shared], "pattern": NM(2, 4)}], schedule=Schedule(10))


# ------------------------------------------------------------------------------------------------------- late beginning


def late(**options):
    weight = nn.Parameter(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)))
    groups = [{"params": [weight], "pattern": Unstructured(0.5)}]
    return weight, SparseAdamW(groups, schedule=Schedule(10), **options)


def test_begin_makes_sparse_what_was_dense():
    weight, optimizer = late(begin=False)
    other = nn.Parameter(torch.randn(2, 4))
    optimizer.add_param_group({"params": [other], "pattern": NM(2, 4)})
    assert not optimizer.state
    assert weight.count_nonzero() == 32
    optimizer.begin()
    optimizer.begin()
    assert weight.count_nonzero() == 16
    assert other.count_nonzero() == 4
    again, at_once = late()
    assert torch.equal(weight, again)
    assert torch.equal(optimizer.state[weight]["mask"], at_once.state[again]["mask"])
    third = nn.Parameter(torch.ones(2, 4))
    optimizer.add_param_group({"params": [third], "pattern": NM(2, 4)})
    assert third.count_nonzero() == 4


@pytest.mark.parametrize("write", [SparseAdamW.project, SparseAdamW.rewrite])
def test_whoever_writes_weights_begins(write):
    weight, optimizer = late(begin=False)
    write(optimizer)
    assert weight.count_nonzero() == 16


def test_a_step_before_the_beginning():
    weight, optimizer = late(begin=False)
    weight.grad = torch.ones_like(weight)
    with pytest.raises(RuntimeError, match=r"shape \(4, 8\) has no state: call begin\(\) before the first step"):
        optimizer.step()
    with pytest.raises(ValueError, match="divisible by 3"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 4))], "pattern": NM(2, 3)})


def test_parameters_replaced_after_the_beginning():
    """What accelerate does to an optimizer that was built without begin=False."""
    weight, optimizer = late()
    replaced = nn.Parameter(weight.detach().clone())
    optimizer.param_groups[0]["params"] = [replaced]
    replaced.grad = torch.ones_like(replaced)
    with pytest.raises(RuntimeError, match="has no state"):
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"1 parameters were replaced after they had begun.*begin=False"):
        optimizer.begin()


def test_a_flattened_parameter_cannot_begin():
    """What FSDP1 makes of a matrix."""
    weight, optimizer = late(begin=False)
    optimizer.param_groups[0]["params"] = [nn.Parameter(weight.detach().flatten())]
    with pytest.raises(ValueError, match=r"shape \(32,\) \(FSDP1 makes such ones: use FSDP2\)"):
        optimizer.begin()
